"""How work fits into memory, by calculation before it begins: a sweep, gradients, tuning.

Axes as in `backends.base`. Bytes of a backward pass are estimates from what autograd keeps of a layer of a
Llama (measured by its hooks on saved tensors), rounded up.
"""

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from backends.base import Shape
from backends.core.errors import InputError

CONTROL_GROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes() -> int:
    """This machine's memory, or a container's share. Not what is free now: how work is cut must not depend on
    it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, CONTROL_GROUP):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


@dataclass(frozen=True)
class Plan:
    """How responses are swept."""

    rows: int
    """responses (head x prompt) decoded together"""
    prompts: int
    """of a block, whose clean keys and values are held together"""
    keep: bool
    """all blocks' clean streams stay between layers; else each is computed again for each layer"""


def plan_responses(shape: Shape, itemsize: int, room: int, prompts: int, tokens: int, most: int) -> Plan:
    """Sizes a sweep of responses.

    Args:
        itemsize: bytes of a number.
        room: bytes beside the weights.
        prompts: how many there are.
        tokens: of the longest prompt and its response.
        most: rows that decoding gains from.

    Raises InputError where not even two responses fit.
    """
    key_values = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
    # A row decodes with its keys and values and its logits (in float32 beside the model's own type).
    row = key_values * tokens + shape.vocab * (4 + itemsize)
    clean = (key_values + shape.model_dim * itemsize) * tokens
    rows = min(most, int(0.6 * room) // row)
    if rows < 2:  # in half precision an ablated response goes beside the clean one
        raise InputError(
            f"two responses of {tokens} tokens take {2 * row / 2**30:.2f} GiB to decode, and "
            f"{room / 2**30:.2f} GiB are free beside the weights: fewer --sweep-tokens, or a larger machine"
        )
    # In half precision a clean response goes beside the ablated ones of its prompt: with few heads to a block
    # it would be half of the work.
    block = min(prompts, max(1, rows // (8 if itemsize < 4 else 2)), max(1, int(0.2 * room) // clean))
    return Plan(rows, block, prompts * clean <= 0.2 * room)


def keeps_choices(shape: Shape, itemsize: int, room: int, tokens: int) -> bool:
    """Whether the residual streams of all prompts, `tokens` in all, stay between layers."""
    return tokens * shape.model_dim * itemsize <= 0.4 * room


def neurons(shape: Shape) -> int:
    """That a token goes through in a layer. Of a mixture of experts it is not known, and taken for a usual
    one."""
    return shape.mlp_dim or 4 * shape.model_dim


def layer_weights(shape: Shape) -> int:
    """How many weights a token is multiplied by in a layer."""
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return shape.model_dim * (attention + 3 * neurons(shape))


@dataclass(frozen=True)
class Work:
    """What a backward pass goes through, on the device that has most of it."""

    shape: Shape
    wide: int
    """bytes of a number of the pass"""
    layers: int
    """of the model on the device"""
    longest: int
    """tokens of the longest row"""
    targets: float
    """largest share of a row's tokens that are its target"""
    squares: bool = False
    """attention keeps the weights of each pair of tokens"""
    adapted: int = 0
    """numbers of a token in a layer that an adapter reads, and keeps in float32"""

    @property
    def kept_of_layer(self) -> int:
        """Bytes that a token of a pass leaves in a layer for the backward pass."""
        shape = self.shape
        numbers = 6 * shape.model_dim + 4 * neurons(shape) + 5 * shape.heads * shape.head_dim
        return self.wide * (numbers + self.squares * 3 * shape.heads * self.longest) + 4 * self.adapted

    @property
    def kept_of_logits(self) -> int:
        """Bytes that a token of a pass leaves in the logits, on average."""
        return int(self.targets * self.shape.vocab * (2 * self.wide + 4 * max(4, self.wide)))

    def token_bytes(self, recompute: bool) -> int:
        """What each token of a pass holds."""
        kept = self.shape.model_dim * self.wide if recompute else self.kept_of_layer
        return self.layers * kept + self.kept_of_layer + self.kept_of_logits


@dataclass(frozen=True)
class FoldSums:
    """What gradients are summed up in, on that device."""

    itemsize: int
    """bytes of a weight; a model of 4 is differentiated in float64"""
    wanted: int
    """how many of its layers' gradients of W_q are wanted"""
    folds: int
    host: bool = True
    """there is memory beside the device's"""


@dataclass(frozen=True)
class GradientPlan:
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


def plan_gradients(work: Work, sums: FoldSums, room: int, most: int, threads: int = 0) -> GradientPlan:
    """The fastest way that leaves `room` for a pass of an eighth of `most` tokens, and for the longest row;
    the one that takes least where none does.

    Args:
        room: bytes beside the weights.
        most: tokens of a pass that it gains from.
        threads: on which passes could go side by side; they do where all of them are as large as one alone.
    """
    shape, least = work.shape, max(work.longest, most // 8)
    numbers = sums.wanted * shape.heads * shape.head_dim * shape.model_dim  # of all W_q that are wanted
    passes = [(False, False), (True, False)] + [(True, True)] * (sums.itemsize == 4)
    places = [True, False] if sums.host else [True]
    for (recompute, by_layer), on_device in product(passes, places):
        fixed = numbers * (work.wide + 4 * (2 * sums.folds if on_device else 1))
        fixed += _widened(work, by_layer) if sums.itemsize == 4 else 0
        tokens = (room - fixed) // work.token_bytes(recompute)
        if tokens >= least:
            break
    each = numbers * work.wide
    if recompute or (room - fixed - (threads - 1) * each) // work.token_bytes(False) < threads * most:
        threads = 0
    return GradientPlan(min(most, max(work.longest, tokens)), recompute, by_layer, on_device, threads)


def _widened(work: Work, by_layer: bool) -> int:
    """Bytes that float64 takes beside float32 weights."""
    rest = work.shape.vocab * work.shape.model_dim
    if by_layer:  # one layer, and what its weights' copies need for a moment; the output matrix
        return 8 * max(2 * layer_weights(work.shape), rest)
    return 4 * (work.layers * layer_weights(work.shape) + 2 * rest)


@dataclass(frozen=True)
class TuningPlan:
    """How rows of a step go through a model that is tuned."""

    rows: int
    """of a forward and backward pass"""
    recompute: bool
    """the backward pass computes each layer again instead of keeping what it left"""

    def __str__(self) -> str:
        return f"{self.rows} rows a pass" + ", layers computed again in the backward pass" * self.recompute


def plan_tuning(work: Work, room: int, rows: int) -> TuningPlan:
    """`rows` a pass, kept if they fit `room` bytes beside the weights, else computed again; where that is too
    much, as many as fit, one at the least."""
    for recompute in (False, True):
        fit = room // (work.token_bytes(recompute) * work.longest)
        if fit >= rows:
            break
    return TuningPlan(min(rows, max(1, fit)), recompute)
