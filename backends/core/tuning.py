"""Both tunings, as both backends do them: what a step reads, follows and records; checkpoints; the result.

A plan says what a run reads and takes its steps; an engine, the backend's part, holds parameters and
optimizer. Gradients are arrays of the engine's library, or several of them.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.base import Example, GainRecipe, Head, Recipe, Redraw, Selection, Shape, Task
from backends.core import schedules, seeds
from backends.core.checkpoint import Checkpoint, identity
from backends.core.checks import check_gains, check_heads, check_redraw, check_tuning
from backends.core.errors import InputError
from backends.core.packing import cut_rows

FIELDS = ("step", "loss", "util_loss", "cos", "projected", "lr", "tokens", "drawn")


class Engine(Protocol):
    """Parameters and optimizer of one run; `state` is all that later steps follow from."""

    name: str
    """of the backend"""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def restore(self, arrays: dict[str, np.ndarray]) -> None: ...
    def save(self, folder: Path) -> None: ...


class LoraEngine(Engine, Protocol):
    """A and B of LoRA on W_q, of which only the chosen heads' rows move: `LoraPlan.free` when it is opened,
    each as fast as `LoraPlan.pace` says."""

    def gradients(self, rows: Sequence[Example]) -> tuple[float, Any]:
        """Mean loss over the rows, and its gradient."""
        ...

    def products(self, gradients: Any, against: Any) -> Sequence[float]:
        """gradients · against, against · against, gradients · gradients, in float64."""
        ...

    def combined(self, own: float, gradients: Any, other: float, against: Any) -> Any:
        """own * gradients + other * against."""
        ...

    def step(self, gradients: Any, number: int) -> float:
        """Clips and takes step `number` of the schedule. Returns the norm before clipping."""
        ...


class GainEngine(Engine, Protocol):
    """Gains of all neurons and their bounds, float32 [L, F]."""

    gains: Any
    least: Any
    most: Any

    def norm(self, array: Any) -> float: ...

    def gradient(self, rows: Sequence[Example], gains: Any) -> tuple[float, Any]:
        """Mean loss over the rows at some gains, and its gradient there, [L, F]."""
        ...

    def step(self, gradient: Any, number: int) -> bool:
        """Takes step `number` of the schedule and clips the gains. Returns whether one was out of bounds."""
        ...


class Run:
    """A tuning run (`base.Tuning`). The model is bare again when the iteration ends, however it ends."""

    def __init__(self, engine: Engine, plan: "LoraPlan | GainPlan"):
        self.engine, self.plan = engine, plan
        self.repeated = 0
        self._adapter: Path | None = None

    @property
    def adapter(self) -> Path:
        if self._adapter is None:
            raise RuntimeError("the adapter exists once all steps have been taken")
        return self._adapter

    def __iter__(self) -> Iterator[dict]:
        engine, plan, recipe = self.engine, self.plan, self.plan.recipe
        checkpoint = Checkpoint(recipe.checkpoint, identity(engine.name, recipe, plan.chosen, plan.rows))
        plan.recall(checkpoint.records)
        engine.open()
        try:
            if checkpoint.arrays:
                engine.restore(checkpoint.arrays)
            records = checkpoint.records
            self.repeated = len(records)
            yield from records
            for number in range(len(records), plan.steps):
                records.append(plan.take(engine, number))
                if checkpoint.due:
                    checkpoint.save(records, engine.state())
                yield records[-1]
            folder = recipe.folder or Path(tempfile.mkdtemp(prefix="cast-adapter-"))
            engine.save(folder)
            self._adapter = folder
        finally:
            engine.close()


class LoraPlan:
    """Sparse tuning of W_q, by SFT or PCGrad."""

    def __init__(
        self,
        shape: Shape,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None,
        redraw: Redraw | None = None,
    ):
        self.shape, self.recipe, self.redraw = shape, recipe, redraw
        check_redraw(redraw)
        self.heads = check_tuning(examples, heads, recipe, reference, shape)
        self.chosen = self.heads if redraw is None else [self.heads, redraw.every]
        self.examples, self.reference = cut_rows(examples, recipe.max_length), list(reference or ())
        self.rows = [*self.examples, *self.reference, *(redraw.rows if redraw else ())]
        self.order = seeds.batch_order(len(self.examples), recipe)
        self.steps = len(self.order)
        touched = {layer for layer, _ in self.heads} if redraw is None else range(shape.layers)
        self.layers = sorted(touched)
        """that have LoRA"""
        self.recall([])

    def recall(self, records: Sequence[dict]) -> None:
        """Where steps that were taken before left off: which heads are free, and since when each moves."""
        self.free, self.since = self.heads, np.full((2, self.shape.layers, self.shape.heads), self.steps)
        self._draw(self.heads, 0)
        for record in records:
            if record["drawn"] is not None:
                self._draw([tuple(head) for head in record["drawn"]], record["step"])

    def _draw(self, heads: Sequence[Head], number: int) -> None:
        self.free = sorted(check_heads(heads, self.shape))
        layers, at = np.array(self.free).T
        of_layer, of_head = self.since  # the first step of A, for each head of its layer; and of rows of B
        of_layer[layers] = np.minimum(of_layer[layers], number)
        of_head[layers, at] = np.minimum(of_head[layers, at], number)

    @property
    def mask(self) -> np.ndarray:
        """float32 [L, H]: 1 where a head is free."""
        mask = np.zeros((self.shape.layers, self.shape.heads), np.float32)
        mask[tuple(np.array(self.free).T)] = 1
        return mask

    def pace(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """What step `number` of the optimizer is multiplied by, float32: for A [L], and for rows of B [L, H].
        0: what is not free; 1: what has been from the start (`schedules.adam_pace`)."""
        of_layer, of_head = schedules.adam_pace(number + 1, np.maximum(number + 1 - self.since, 1))
        pace = (of_layer.max(axis=1) * self.mask.max(axis=1), of_head * self.mask)
        return tuple(own.astype(np.float32) for own in pace)

    def _redraw(self, engine: LoraEngine, number: int) -> list[Head] | None:
        """Draws heads anew where it is time, while the model is bare. Returns them, or None."""
        if self.redraw is None or number % self.redraw.every:
            return None
        if number:
            state = engine.state()
            with tempfile.TemporaryDirectory(prefix="cast-adapter-") as folder:
                engine.save(Path(folder))
                engine.close()
                try:
                    self._draw(self.redraw.draw(Path(folder)), number)
                finally:
                    engine.open()
            engine.restore(state)
        return self.free

    def take(self, engine: LoraEngine, number: int) -> dict:
        """Takes a step. Returns its record; InputError on a gradient that is not finite."""
        recipe, drawn = self.recipe, self._redraw(engine, number)
        batch = [self.examples[row] for row in self.order[number]]
        loss, gradients = engine.gradients(batch)
        util_loss, cos, projected = math.nan, math.nan, False
        if recipe.optimizer != "sft":
            rows = seeds.reference_rows(number, len(self.reference), len(batch), recipe)
            util_loss, against = engine.gradients([self.reference[row] for row in rows])
            symmetric = recipe.optimizer == "pcgrad-symmetric"
            gradients, cos, projected = project(engine, gradients, against, symmetric)
        if not math.isfinite(engine.step(gradients, number)):
            raise InputError(f"step {number}: the gradient is not finite: lower --lr or use --dtype float32")
        lr = schedules.learning_rate(number, self.steps, recipe)
        tokens = schedules.step_tokens(batch, recipe)
        values = (number, loss, util_loss, cos, projected, lr, tokens, drawn)
        return dict(zip(FIELDS, values, strict=True))


def project(
    engine: LoraEngine, gradients: Any, against: Any, symmetric: bool = False
) -> tuple[Any, float, bool]:
    """PCGrad for two tasks (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Alg. 1).

    Where the two conflict (negative inner product, all tensors together one vector), `gradients` lose their
    component along `against`. `symmetric` is the published algorithm, in which each task is projected against
    the other's original gradient and the step is their sum: `against` loses its component along the original
    `gradients` too, and is added, conflict or not. TorchJD's PCGrad is the same sum, without difference for
    two tasks (there is no order to shuffle). A gradient of zero conflicts with nothing.

    Args:
        gradients: the alignment loss's.
        against: the utility loss's.

    Returns the step's gradients, the cosine of the two before, and whether they conflicted.
    """
    dot, square, length = engine.products(gradients, against)
    cos = dot / (square * length) ** 0.5 if square and length else 0.0
    projected = not dot >= 0  # NaN too, so that the step is not finite and is refused
    own = 1.0 - dot / length if projected and symmetric else 1.0
    other = (-dot / square if projected else 0.0) + symmetric
    step = engine.combined(own, gradients, other, against) if other else gradients
    return step, cos, projected


class GainPlan:
    """NeuronTune's tuning: first-order MAML, whose outer step follows the query gradient at the adapted
    gains."""

    def __init__(self, shape: Shape, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe):
        check_gains(tasks, neurons, shape)
        size = recipe.max_length
        self.recipe = recipe
        self.tasks = [
            Task(task.name, *(tuple(cut_rows(rows, size)) for rows in (task.safe, task.util)))
            for task in tasks
        ]
        self.bounds = schedules.gain_bounds(neurons, shape.layers, shape.mlp_dim)
        divided = [[len(task.safe), len(task.util)] for task in tasks]
        self.chosen = [neurons.safety, neurons.utility, divided]
        self.rows = [row for task in self.tasks for row in (*task.safe, *task.util)]
        self.steps = schedules.outer_steps(tasks, neurons, recipe)

    def recall(self, records: Sequence[dict]) -> None:
        """A step follows from the gains alone."""

    def take(self, engine: GainEngine, number: int) -> dict:
        """Takes an outer step. Returns its record; InputError on a gradient that is not finite."""
        recipe = self.recipe
        support, query = schedules.draw_task_rows(self.tasks, number, recipe)
        adapted = engine.gains
        for _ in range(recipe.inner_steps):
            *_, gradient = self._objective(engine, support, adapted)
            adapted = (adapted - recipe.inner_lr * gradient).clip(engine.least, engine.most)
        loss, util_loss, cos, gradient = self._objective(engine, query, adapted)
        if not math.isfinite(engine.norm(gradient)):
            raise InputError(
                f"step {number}: the gradient is not finite: lower --gain-lr or use --dtype float32"
            )
        clipped = engine.step(gradient, number)
        lr = schedules.learning_rate(number, self.steps, recipe)
        tokens = schedules.gain_step_tokens(support, query, recipe)
        values = (number, loss, util_loss, cos, clipped, lr, tokens, None)
        return dict(zip(FIELDS, values, strict=True))

    def _objective(self, engine: GainEngine, rows: Task, gains: Any) -> tuple[float, float, float, Any]:
        """At some gains: the safety and the utility loss, the cosine of their gradients in the free gains,
        and the gradient of what is minimised, [L, F], zero where not free."""
        free = engine.least < engine.most
        safe_loss, safe = engine.gradient(rows.safe, gains)
        util_loss, util = engine.gradient(rows.util, gains)
        safe, util = safe * free, util * free
        dot, lengths = float((safe * util).sum()), engine.norm(safe) * engine.norm(util)
        gradient = self.recipe.lam * safe + schedules.utility_weight(self.recipe) * util
        return safe_loss, util_loss, dot / lengths if lengths else 0.0, gradient
