"""What the stages know of a backend: one loaded causal language model, numpy in, numpy out.

Axes: L layers, H query heads, K key/value heads, D head dim, E model dim, F neurons of a layer, B batch,
T tokens, V vocabulary, N examples, P paths, r LoRA's rank. Layers, heads and neurons count from 0. In
`gradient_gram` F is the number of folds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

Head = tuple[int, int]
"""(layer, head)"""
Neuron = tuple[int, int]
"""(layer, neuron): a unit of an MLP's intermediate activation, which W_down reads"""
Mask = Literal["output", "query"]
Optimizer = Literal["sft", "pcgrad", "pcgrad-symmetric"]


@dataclass(frozen=True)
class Example:
    """One tokenized row, the only form of data that a backend sees; all ids int32."""

    example_id: str
    prompt_ids: np.ndarray
    """[T], rendered with the chat template, generation prompt and assistant prefix included"""
    target_ids: np.ndarray
    """[t], what the loss is taken on: answer token(s), or the completion and EOS"""
    choice_ids: np.ndarray
    """[n], candidate next tokens; empty: the whole vocabulary competes"""
    answer: int
    """index into choice_ids, or the token id where choice_ids is empty; -1: none"""
    refusal_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """[m], of a request: the tokens that refusals begin with; empty: no request, or an answer has begun"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: L, H, K, D, E, F, V."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    model_dim: int
    mlp_dim: int | None
    """None: the MLPs have no W_down of their own (a mixture of experts), and so no neurons"""
    vocab: int


@dataclass(frozen=True)
class Recipe:
    """How an adapter is tuned: the paper's Table 3.

    Decided here, since the paper is silent: linear decay to 0 without warm-up, gradients clipped to global
    norm 1, no weight decay, AdamW's betas (0.9, 0.999) and eps 1e-8 (defaults of transformers' Trainer).
    """

    rank: int = 32
    alpha: float = 32.0
    lr: float = 1e-4
    epochs: int = 1
    batch: int = 4
    """rows of a forward pass at most; rows of similar length share a pass"""
    accumulation: int = 2
    """a step's loss is the mean over its batch * accumulation rows"""
    max_length: int = 1024
    """tokens; a longer row of `examples` is cut at its end, a row of `reference` never"""
    seed: int = 21
    """of LoRA's A and of the order of rows"""
    optimizer: Optimizer = "sft"
    """pcgrad: the alignment gradient loses its component against the utility gradient, which itself is not
    followed; pcgrad-symmetric: PCGrad as published, both are projected and the step follows their sum"""
    clip: float = 1.0
    """global gradient norm"""
    folder: Path | None = None
    """where the PEFT folder is written; None: a new temporary folder"""
    checkpoint: Path | None = None
    """file that keeps the run's state, about once a minute; a run continues from an existing one"""


@dataclass(frozen=True)
class Redraw:
    """How the heads that a tuning moves are drawn anew while it runs.

    Rows of B that are no longer drawn keep what they have and stop moving. (LoRA's A is shared by a layer's
    heads and moves on where one of them is drawn, and with it what such rows add to W_q.) Rows that are drawn
    for the first time start to move with the steps of an Adam that starts then. While a row is not drawn,
    Adam sees zero gradients of it. Where the same heads are drawn again, nothing changes.
    """

    every: int
    """before step `every`, 2 * `every`, …"""
    draw: Callable[[Path], Sequence[Head]]
    """the heads, given the PEFT folder of the adapter so far; it may call the backend"""
    rows: Sequence[Example] = ()
    """all that `draw` reads: a checkpoint is of a run with these"""


@dataclass(frozen=True)
class HeadGradients:
    """What one backward pass over every row says of every head."""

    gram: np.ndarray
    """float64 [L, H, 2F, 2F]: inner products of the fold-mean gradients of the loss in W_q's head rows
    (θ_h, [D, E]), safe folds first"""
    gate_safe: np.ndarray
    """float64 [L, H, N]: d graded outcome / d gate of each head, for each row of D_safe. A gate is 1 and
    multiplies what ablating the head zeroes; minus its gradient is the first-order effect of the ablation
    (Michel et al. 2019, "Are sixteen heads really better than one?")"""
    gate_util: np.ndarray
    """the same for each row of D_util"""


class Choices(NamedTuple):
    """What a model takes for the next token of each row."""

    prediction: np.ndarray
    """int32 [N], as Example.answer"""
    probability: np.ndarray
    """float32 [N], of all candidates together; of the predicted token where the whole vocabulary competes"""


class Grades(NamedTuple):
    """What a model says of each row's target, and of its next token."""

    outcome: np.ndarray
    """float64 [N]: see `Backend.grade`"""
    choices: Choices


@dataclass(frozen=True)
class Attribution:
    """How much each neuron, at the last prompt token, moves the loss along a path (integrated gradients)."""

    score: np.ndarray
    """float64 [L, F]: mean over examples of the attributions' absolute values"""
    total: np.ndarray
    """float64 [N, P]: an example's attributions, summed over the neurons that move on a path; P is 1, or L
    where each layer has its own path"""
    change: np.ndarray
    """float64 [N, P]: loss at a path's end minus loss at its start, which `total` approximates"""

    @property
    def gap(self) -> float:
        """Completeness: |total - change| / |change| in Euclidean norms; 0 where nothing changes."""
        change = float(np.linalg.norm(self.change))
        return float(np.linalg.norm(self.total - self.change)) / change if change else 0.0


@dataclass(frozen=True)
class Selection:
    """Neurons whose gains are tuned, each once."""

    safety: tuple[Neuron, ...]
    """gains from 1 up"""
    utility: tuple[Neuron, ...]
    """gains from 1 down to 0"""


@dataclass(frozen=True)
class Task:
    """A task of the meta-learning: one attack family, or one kind of request where no family is known."""

    name: str
    safe: tuple[Example, ...]
    """harmful requests with refusals"""
    util: tuple[Example, ...]
    """benign requests of the same form with answers"""


@dataclass(frozen=True)
class GainRecipe:
    """How gains are tuned: first-order MAML (Finn et al. 2017) with Adam as the outer optimizer.

    All of it is our reading: the abstract of NeuronTune fixes no more than meta-learning.
    """

    lam: float = 0.5
    """weight of the safety loss; 1 - lam is that of the utility loss"""
    utility_objective: Literal["preserve", "suppress"] = "preserve"
    """preserve: the utility loss is minimised; suppress: maximised, as a third party's code does"""
    lr: float = 0.05
    """outer step (Adam), decays linearly to 0"""
    inner_lr: float = 1.0
    """inner step (plain gradient descent)"""
    inner_steps: int = 1
    epochs: int = 1
    """passes over the tasks' rows, support and query together"""
    batch: int = 8
    """rows of a support batch, and of a query batch; half of them harmful, half benign"""
    max_length: int = 1024
    """tokens; a longer row is cut at its end"""
    seed: int = 21
    """of the order of tasks and rows"""
    folder: Path | None = None
    """as in Recipe"""
    checkpoint: Path | None = None
    """as in Recipe"""


class Tuning(Protocol):
    """A tuning run: iterate it for a record per step, then read `adapter`. A run that continues from a
    checkpoint repeats the records of the steps before.

    A record has step, loss, util_loss, cos, projected, lr, tokens, drawn; util_loss and cos are NaN without a
    reference; drawn is the heads, where they were drawn before this step (`Redraw`; at step 0 the first
    ones), else None.
    """

    repeated: int
    """steps taken before by a process that was stopped; known once the iteration has begun"""

    def __iter__(self) -> Iterator[dict]: ...

    @property
    def adapter(self) -> Path:
        """The finished PEFT folder. RuntimeError before the last step."""
        ...


class Backend(Protocol):
    """One loaded model. `adapter` is the path of a PEFT folder; `heads` a sequence of (layer, head)."""

    name: str
    dtype: str
    """"float32" or "bfloat16", as resolved"""
    device: str
    """as resolved, e.g. "cpu" or "cuda:0" """
    shape: Shape
    quantize: str
    """"nf4" or "int8": base weights but W_q are packed; "": none is"""

    def gradient_gram(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """float64 [L, H, 2F, 2F]: inner products of the fold-mean gradients of W_q's head rows (θ_h, [D, E]),
        safe folds first.

        Fold f holds examples f, f + F, f + 2F, …; an example's loss is the mean over its target tokens. A
        float32 model is differentiated in float64: where fold gradients nearly cancel, O magnifies rounding.

        Args:
            layers: only these, in their order; None: all. 2F float32 gradients of their W_q are held at once.

        Raises ValueError unless both lists divide into equal folds, InputError on a gradient that is not
        finite.
        """
        ...

    def head_gradients(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
        mask: Mask = "output",
        adapter: Path | None = None,
    ) -> HeadGradients:
        """`gradient_gram`'s matrices, and the gradients in the heads' gates from the same passes.

        Args:
            mask: what a gate multiplies: a head's output, or its query.
            adapter: in place, not merged, while gradients are taken; θ_h stay the base's rows of W_q, whose
                gradient is that of the rows with the adapter merged.

        Raises ValueError also where a row has no target; else as `gradient_gram`.
        """
        ...

    def map_gradients(
        self,
        safe: Sequence[Example],
        utils: Sequence[Sequence[Example]],
        folds: int = 4,
        layers: Sequence[int] | None = None,
        mask: Mask = "output",
        adapter: Path | None = None,
    ) -> Iterator[HeadGradients]:
        """`head_gradients` of D_safe and each of several D_util, one after another; D_safe is differentiated
        once."""
        ...

    def grade(self, examples: Sequence[Example], adapter: Path | None = None) -> Grades:
        """The graded outcome of each row: the mean log p of its target's tokens; where choices compete, log p
        of the answer's token among them; of a request the log-odds that the next token is one that refusals
        begin with (Arditi et al. 2024, "Refusal in language models is mediated by a single direction"; over
        51 tuned models it tells refused from answered requests with an AUC of 0.82, the mean log p of a
        refusal's tokens with 0.63: docs/LOG.md). From the same pass what `choices` returns.

        Raises ValueError where a row has neither a target nor choices nor refusals.
        """
        ...

    def logits(
        self,
        examples: Sequence[Example],
        adapter: Path | None = None,
        ablated: Head | None = None,
        mask: Mask = "output",
    ) -> np.ndarray:
        """float32 [N, V]: logits of the token after each prompt, with an adapter or with a head ablated
        (ValueError on both)."""
        ...

    def choices(self, examples: Sequence[Example], adapter: Path | None = None) -> Choices:
        """The next token of each row; no target is read."""
        ...

    def generate(
        self, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None = None
    ) -> list[np.ndarray]:
        """Greedy continuations, int32 [<= max_new_tokens] each; EOS is kept where one ends with it."""
        ...

    def sweep_choices(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        """For each head in order: the predictions of `choices` with that head ablated, int32 [N]."""
        ...

    def sweep_generations(
        self, prompts: Sequence[Example], heads: Sequence[Head], max_new_tokens: int, mask: Mask = "output"
    ) -> Iterator[tuple[Head, list[np.ndarray]]]:
        """For each head in order: the continuations of `generate` with that head ablated."""
        ...

    def sweep_grades(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        """For each head in order: outcomes of `grade` with that head ablated, float64 [N]; nothing is
        decoded."""
        ...

    def tune(
        self,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None = None,
        redraw: Redraw | None = None,
    ) -> Tuning:
        """LoRA on W_q; rows of B outside `heads` stay exactly zero. PCGrad's utility gradient is that of
        `reference` (D_util). With `redraw` other heads may be drawn on the way: the adapter has all layers,
        and rows of B that were never drawn stay exactly zero."""
        ...

    def attribute_neurons(
        self, examples: Sequence[Example], baselines: Sequence[Example] | None = None, steps: int = 64
    ) -> Attribution:
        """Integrated gradients of every MLP neuron at the last prompt token, of the loss of the target, in
        the model's own precision (float64 moves a score by 5e-5 of the largest on SmolLM2, in twice the
        time).

        Args:
            baselines: prompts whose neurons, at their own last token, each path starts from, all layers
                together (a plain request, where the example is the same request inside an attack). None:
                paths start at zero, one per layer, while the layers above compute freely.
            steps: nodes of Gauss-Legendre quadrature on a path at most.

        Raises ValueError where there is nothing to attribute, InputError on a gradient that is not finite.
        """
        ...

    def tune_gains(self, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> Tuning:
        """Gains of the selected neurons by first-order MAML, as a PEFT IA3 folder; all others stay 1. Of a
        record, loss and util_loss are those of the query rows, cos is that of their two gradients, and
        projected is whether a bound clipped a gain."""
        ...
