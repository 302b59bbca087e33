"""What the stages know of a backend: one loaded causal language model, numpy in, numpy out.

Axes: L layers, H query heads, K key/value heads, D head dim, E model dim, B batch, T tokens, V vocabulary,
F folds, N examples. A head is (layer, head), both from 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from backends.neurons import Attribution, GainRecipe, Selection, Task
from data.examples import Example

Head = tuple[int, int]
Mask = Literal["output", "query"]
Optimizer = Literal["sft", "pcgrad", "pcgrad-symmetric"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: L, H, K, D, E, width of the MLP, V."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    model_dim: int
    mlp_dim: int
    vocab: int


@dataclass(frozen=True)
class Recipe:
    """How an adapter is tuned (the paper's Table 3; where it is silent, decided here).

    Silent: the schedule (linear decay to 0, no warm-up), clipping (global norm 1), weight decay (0),
    AdamW's betas (0.9, 0.999) and eps (1e-8): transformers' Trainer defaults.
    """

    rank: int = 32
    alpha: float = 32.0
    lr: float = 1e-4
    epochs: int = 1
    batch: int = 4
    """rows a forward pass, at most: similar lengths go together, a far longer row alone"""
    accumulation: int = 2
    """a step's loss is the mean over its batch * accumulation rows"""
    max_length: int = 1024
    """tokens; a longer row of `examples` is cut at its end, never one of `reference`"""
    seed: int = 21
    """LoRA's A and the order of rows"""
    optimizer: Optimizer = "sft"
    """pcgrad: the alignment gradient loses what conflicts with the utility gradient, which is not followed
    itself; pcgrad-symmetric: PCGrad as published, both are projected and the step follows their sum"""
    clip: float = 1.0
    """global gradient norm"""
    folder: Path | None = None
    """where the PEFT folder goes; None: a new temporary folder"""
    checkpoint: Path | None = None
    """file that keeps the run's state, about once a minute; one that is there is gone on from"""


class Tuning(Protocol):
    """A tuning run: iterate it for a record a step, then read `adapter`. One that goes on from a checkpoint
    repeats the records of the steps before.

    A record has step, loss, util_loss, cos, projected, lr, tokens (util_loss and cos are NaN without a
    reference).
    """

    def __iter__(self) -> Iterator[dict]: ...

    repeated: int
    """how many steps were taken before, by a process that was stopped; known once the iteration has begun"""

    @property
    def adapter(self) -> Path:
        """The finished PEFT folder. RuntimeError while steps are left."""
        ...


class Backend(Protocol):
    """One loaded model. `adapter` is the path of a PEFT folder; `heads` a sequence of (layer, head)."""

    name: str
    dtype: str
    """"float32" or "bfloat16", as resolved"""
    device: str
    """as resolved, e.g. "cpu" or "cuda:0" """
    shape: Shape

    def gradient_gram(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """float64 [L, H, 2F, 2F]: inner products of the fold-mean gradients of W_q's head rows (θ_h, [D, E]).

        `layers`: only those, in their order; 2F gradients of their W_q are held in memory, in float32. Safe
        folds first. Fold f holds examples f, f + F, f + 2F, …; an example's loss is the mean over its
        target tokens. A float32 model is differentiated in float64: where fold gradients nearly cancel, O
        magnifies rounding. ValueError unless both lists divide into equal folds; InputError on a gradient
        that is not finite.
        """
        ...

    def logits(
        self,
        examples: Sequence[Example],
        adapter: Path | None = None,
        silenced: Head | None = None,
        mask: Mask = "output",
    ) -> np.ndarray:
        """float32 [N, V]: the next token's logits after each prompt, with an adapter or with a head silenced
        (ValueError on both). For looking into single answers; every row of V floats is returned."""
        ...

    def choices(
        self, examples: Sequence[Example], adapter: Path | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """prediction int32 [N] (in the sense of Example.answer) and float32 [N], the total probability that
        the model gives to the candidates (to the predicted token where the whole vocabulary competes)."""
        ...

    def generate(
        self, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None = None
    ) -> list[np.ndarray]:
        """Greedy continuations, int32 [<= max_new_tokens] each; one that ends does so with EOS, which is
        kept."""
        ...

    def sweep_choices(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        """For each head in order: `choices`' predictions with that head silenced, int32 [N]."""
        ...

    def sweep_generations(
        self, prompts: Sequence[Example], heads: Sequence[Head], max_new_tokens: int, mask: Mask = "output"
    ) -> Iterator[tuple[Head, list[np.ndarray]]]:
        """For each head in order: `generate`'s continuations with that head silenced."""
        ...

    def tune(
        self,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None = None,
    ) -> Tuning:
        """LoRA on W_q, rows of B outside `heads` exactly zero; `reference` (D_util) is where pcgrad's utility
        gradient comes from."""
        ...

    def attribute_neurons(
        self, examples: Sequence[Example], baselines: Sequence[Example] | None = None, steps: int = 64
    ) -> Attribution:
        """Integrated gradients of every MLP neuron at the last prompt token, of the loss of the target.

        Args:
            baselines: prompts whose neurons, at their own last token, the path begins at; all layers move
                together (a plain request, the example being the same request inside an attack). None: the
                path begins at zero, and each layer has its own while the layers above it answer freely: with
                all layers at zero the model says nothing that a path could come back from.
            steps: nodes of Gauss and Legendre's rule on a path at most; each gets as many as make it complete
                (`neurons.integrate`).

        In the model's own precision: float64, which `gradient_gram` needs, would move a score by 5e-5 of the
        largest on SmolLM2 and take twice the time. ValueError where there is nothing to attribute; InputError
        on a gradient that is not finite.
        """
        ...

    def tune_gains(self, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> Tuning:
        """Gains of neurons by first-order MAML over `tasks`, as a PEFT IA3 folder; all others stay 1. A
        record's loss and util_loss are those of the query rows, cos that of their two gradients, projected
        whether a bound held a gain back."""
        ...


# What both backends must do alike


def lora_a(seed: int, layers: int, rank: int, model_dim: int) -> np.ndarray:
    """LoRA's A of every layer, float32 [L, r, E]: PEFT's kaiming_uniform(a=√5), drawn by numpy.

    All layers are drawn whatever the arm, so that one seed gives a layer the same A in every arm and backend.
    """
    bound = 1.0 / np.sqrt(model_dim)
    return (
        np.random.default_rng([seed, 1]).uniform(-bound, bound, (layers, rank, model_dim)).astype(np.float32)
    )


def batch_order(rows: int, recipe: Recipe) -> list[np.ndarray]:
    """Row indices of each step, [<= batch * accumulation], over all epochs; each epoch is a new
    permutation."""
    generator = np.random.default_rng([recipe.seed, 2])
    size = recipe.batch * recipe.accumulation
    steps = []
    for _ in range(recipe.epochs):
        order = generator.permutation(rows)
        steps += [order[start : start + size] for start in range(0, rows, size)]
    return steps


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear decay from recipe.lr at step 0 towards 0 after the last step."""
    return recipe.lr * (1.0 - step / steps)


def reference_rows(step: int, reference: int, batch: int, recipe: Recipe) -> np.ndarray:
    """Indices of the rows of D_util that a step of PCGrad looks at: as many as the step's own, drawn anew."""
    generator = np.random.default_rng([recipe.seed, 3, step])
    return generator.choice(reference, min(batch, reference), replace=False)


def step_tokens(batch: Sequence[Example], recipe: Recipe) -> int:
    """Tokens that a step reads, padding not counted."""
    return sum(min(len(row.prompt_ids) + len(row.target_ids), recipe.max_length) for row in batch)


def check_tuning(
    examples: Sequence[Example],
    heads: Sequence[Head],
    recipe: Recipe,
    reference: Sequence[Example] | None,
    shape: Shape,
) -> list[Head]:
    """The heads, sorted. ValueError where there is nothing to tune, or nothing to project against."""
    pairs = sorted(check_heads(heads, shape))
    if not pairs or not examples:
        raise ValueError("tune: no heads or no examples")
    if recipe.optimizer != "sft" and not reference:
        raise ValueError(f"reference: {recipe.optimizer} needs examples to project against")
    return pairs


def check_heads(heads: Sequence[Head], shape: Shape) -> list[Head]:
    """The heads as pairs of int. ValueError names one that the model does not have, or one given twice."""
    pairs = [(int(layer), int(head)) for layer, head in heads]
    if len(set(pairs)) < len(pairs):
        raise ValueError("heads: one is given twice")
    for layer, head in pairs:
        if not (0 <= layer < shape.layers and 0 <= head < shape.heads):
            raise ValueError(f"heads: the model has no head ({layer}, {head})")
    return pairs


def check_mask(mask: str) -> None:
    if mask not in ("output", "query"):
        raise ValueError(f'mask: "output" or "query", not {mask!r}')


def check_silenced(silenced: Head | None, adapter: Path | None, shape: Shape) -> Head | None:
    """The head as a pair of int. ValueError where an adapter is asked for too: the sweep knows none."""
    if silenced is None:
        return None
    if adapter is not None:
        raise ValueError("silenced: a head is silenced in the model without an adapter only")
    return check_heads([silenced], shape)[0]
