"""How gradients of every W_q fit beside the weights, by calculation before they begin.

Axes as in `backends.base`. Bytes are estimates from what autograd keeps of a layer of a Llama (measured by
its hooks on saved tensors), rounded up.
"""

from dataclasses import dataclass
from itertools import product

from backends.base import Shape


@dataclass(frozen=True)
class Work:
    """What is to be differentiated, on the device that has most of it."""

    shape: Shape
    itemsize: int
    """bytes of a weight; a model of 4 is differentiated in float64"""
    layers: int
    """of the model on the device"""
    wanted: int
    """of these, how many gradients of W_q are wanted"""
    folds: int
    longest: int
    """tokens of the longest row"""
    targets: float
    """largest share of a row's tokens that are its target"""
    squares: bool = False
    """attention keeps the weights of each pair of tokens"""
    host: bool = True
    """there is memory beside the device's"""

    @property
    def wide(self) -> int:
        """Bytes of a number of a pass."""
        return 8 if self.itemsize == 4 else self.itemsize

    @property
    def sum_bytes(self) -> int:
        """Of the sums of one fold."""
        shape = self.shape
        return 4 * self.wanted * shape.heads * shape.head_dim * shape.model_dim

    @property
    def mlp_dim(self) -> int:
        """Of a mixture of experts it is not known, and taken for a usual one."""
        return self.shape.mlp_dim or 4 * self.shape.model_dim

    @property
    def layer_weights(self) -> int:
        """How many a layer has."""
        shape = self.shape
        attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
        return shape.model_dim * (attention + 3 * self.mlp_dim)

    @property
    def kept_of_layer(self) -> int:
        """Bytes that a token of a pass leaves in a layer for the backward pass."""
        shape = self.shape
        numbers = 6 * shape.model_dim + 4 * self.mlp_dim + 5 * shape.heads * shape.head_dim
        return self.wide * (numbers + self.squares * 3 * shape.heads * self.longest)

    @property
    def kept_of_logits(self) -> int:
        """Bytes that a token of a pass leaves in the logits, on average."""
        return int(self.targets * self.shape.vocab * (2 * self.wide + 4 * max(4, self.wide)))


@dataclass(frozen=True)
class Plan:
    """How gradients are computed."""

    tokens: int
    """padded tokens of a forward and backward pass, one row at the least"""
    recompute: bool
    """the backward pass computes each layer again instead of keeping what it left"""
    by_layer: bool
    """a float32 model becomes float64 a layer at a time, not as a whole"""
    sums_on_device: bool
    """those of all folds; else only those of the fold that is being summed, the others on the host"""
    threads: int = 0
    """passes side by side, each on one thread of a CPU; 0: one after another, on all threads of the device"""

    def __str__(self) -> str:
        layers = ["computed again in the backward pass"] * self.recompute + [
            "float64 one by one"
        ] * self.by_layer
        kept = "on the device" if self.sums_on_device else "on the host"
        said = [f"{self.tokens} tokens a pass", *([f"layers {', '.join(layers)}"] if layers else [])]
        said += [f"{self.threads} at a time"] * (self.threads > 1)
        return ", ".join([*said, f"sums {kept}"])


def plan_gradients(work: Work, room: int, most: int, threads: int = 0) -> Plan:
    """The fastest way that leaves `room` for a pass of an eighth of `most` tokens, and for the longest row;
    the one that takes least where none does.

    Args:
        room: bytes beside the weights.
        most: tokens of a pass that it gains from.
        threads: on which passes could go side by side; they do where all of them are as large as one alone.
    """
    least = max(work.longest, most // 8)
    passes = [(False, False), (True, False)] + [(True, True)] * (work.itemsize == 4)
    places = [True, False] if work.host else [True]
    for (recompute, by_layer), on_device in product(passes, places):
        fixed, token = _bytes(work, recompute, by_layer, on_device)
        tokens = (room - fixed) // token
        if tokens >= least:
            break
    if recompute or (room - fixed - (threads - 1) * _pass_bytes(work)) // token < threads * most:
        threads = 0
    return Plan(min(most, max(work.longest, tokens)), recompute, by_layer, on_device, threads)


def _pass_bytes(work: Work) -> int:
    """Of the gradients of a pass."""
    return work.sum_bytes // 4 * work.wide


def _bytes(work: Work, recompute: bool, by_layer: bool, on_device: bool) -> tuple[int, int]:
    """What is held whatever the pass, and by each token of a pass."""
    shape, held = work.shape, work.sum_bytes * (2 * work.folds if on_device else 1)
    held += _pass_bytes(work)
    if by_layer:  # one layer, and what its weights' copies need for a moment; the output matrix
        held += 8 * max(2 * work.layer_weights, shape.vocab * shape.model_dim)
    elif work.itemsize == 4:  # by which float64 weights are larger
        held += 4 * (work.layers * work.layer_weights + 2 * shape.vocab * shape.model_dim)
    layers = work.layers * shape.model_dim * work.wide if recompute else work.layers * work.kept_of_layer
    return held, layers + work.kept_of_layer + work.kept_of_logits
