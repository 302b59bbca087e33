"""Both tunings: what a step reads and records; checkpoints; the result. Nothing of what a step computes.

A plan says what a run reads and takes its steps; an engine, the backend's part, holds parameters and
optimizer, and does the arithmetic. Gradients are arrays of the engine's library, or several of them.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
    each as an Adam moves it that starts when `LoraPlan.since` says."""

    def gradients(self, rows: Sequence[Example]) -> tuple[float, Any]:
        """Mean loss over the rows, and its gradient."""
        ...

    def project(self, gradients: Any, against: Any, symmetric: bool) -> tuple[Any, float, bool]:
        """PCGrad of the alignment loss's gradients against the utility loss's, in what is free: the step's
        gradients, the cosine of the two before, and whether they conflicted."""
        ...

    def step(self, gradients: Any, number: int) -> float:
        """Clips and takes step `number` of the schedule. Returns the norm before clipping."""
        ...


class GainStep(NamedTuple):
    """An outer step of first-order MAML."""

    loss: float
    """of the query rows at the adapted gains: the safety loss"""
    util_loss: float
    cos: float
    """of the two losses' gradients in the free gains, 0 where one is zero"""
    norm: float
    """of the gradient of what is minimised"""
    clipped: bool
    """whether a bound clipped a gain"""


class GainEngine(Engine, Protocol):
    """Gains of all neurons; those of `GainPlan.neurons` move."""

    def step(self, support: Task, query: Task, number: int) -> GainStep:
        """Adapts the gains to the support rows by plain gradient descent, and takes step `number` of the
        schedule along the query rows' gradient there; both inside the bounds."""
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
        """Where steps that were taken before left off: which heads are free, and since when each moves, the
        first step of each A, [L], and of each head's rows of B, [L, H] (`steps`: none)."""
        shape = self.shape
        self.since = tuple(np.full(size, self.steps) for size in (shape.layers, (shape.layers, shape.heads)))
        self._draw(self.heads, 0)
        for record in records:
            if record["drawn"] is not None:
                self._draw([tuple(head) for head in record["drawn"]], record["step"])

    def _draw(self, heads: Sequence[Head], number: int) -> None:
        self.free = sorted(check_heads(heads, self.shape))
        if not self.free:
            raise ValueError("redraw: no heads were drawn")
        of_layer, of_head = self.since
        for layer, head in self.free:
            of_layer[layer] = min(of_layer[layer], number)
            of_head[layer, head] = min(of_head[layer, head], number)

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
            gradients, cos, projected = engine.project(gradients, against, symmetric)
        if not math.isfinite(engine.step(gradients, number)):
            raise InputError(f"step {number}: the gradient is not finite: lower --lr or use --dtype float32")
        lr = schedules.learning_rate(number, self.steps, recipe)
        tokens = schedules.step_tokens(batch, recipe)
        values = (number, loss, util_loss, cos, projected, lr, tokens, drawn)
        return dict(zip(FIELDS, values, strict=True))


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
        self.neurons = neurons
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
        loss, util_loss, cos, norm, clipped = engine.step(support, query, number)
        if not math.isfinite(norm):
            raise InputError(
                f"step {number}: the gradient is not finite: lower --gain-lr or use --dtype float32"
            )
        lr = schedules.learning_rate(number, self.steps, recipe)
        tokens = schedules.gain_step_tokens(support, query, recipe)
        values = (number, loss, util_loss, cos, clipped, lr, tokens, None)
        return dict(zip(FIELDS, values, strict=True))
