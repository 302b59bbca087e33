"""The one implementation of `backends.base.Backend`: it checks arguments and calls the functions of a wing,
which are named alike in `backends.torch` and `backends.flax`."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from backends.base import (
    Attribution,
    Choices,
    Example,
    GainRecipe,
    Grades,
    Head,
    HeadGradients,
    Mask,
    Recipe,
    Redraw,
    Selection,
    Shape,
    Task,
    Tuning,
)
from backends.core.checks import (
    check_ablated,
    check_dense,
    check_folds,
    check_graded,
    check_heads,
    check_mask,
    check_neurons,
    check_targets,
    finite,
)
from backends.core.kept import Kept
from backends.core.tuning import GainPlan, LoraPlan, Run


@dataclass(frozen=True)
class Loaded:
    """A loaded model (see `backends.base.Backend`)."""

    name: str
    model: Any
    """the wing's own: `torch.decoder.Decoder` or `flax.model.Model`"""
    dtype: str
    device: str
    shape: Shape
    quantize: str = ""
    kept: Kept = field(default_factory=Kept)

    def _wing(self, module: str) -> ModuleType:
        """Imported when it is needed: PEFT takes seconds, and the sweep does without."""
        return importlib.import_module(f"backends.{self.name}.{module}")

    def gradient_gram(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        return self.head_gradients(safe, util, folds, layers).gram

    def head_gradients(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
        mask: Mask = "output",
        adapter: Path | None = None,
    ) -> HeadGradients:
        (found,) = self.map_gradients(safe, [util], folds, layers, mask, adapter)
        return found

    def map_gradients(
        self,
        safe: Sequence[Example],
        utils: Sequence[Sequence[Example]],
        folds: int = 4,
        layers: Sequence[int] | None = None,
        mask: Mask = "output",
        adapter: Path | None = None,
    ) -> Iterator[HeadGradients]:
        self.kept.drop()
        check_mask(mask)
        for util in utils:
            check_folds(folds, safe=safe, util=util)
            check_targets(*safe, *util)
        layers = range(self.shape.layers) if layers is None else layers
        wing = self._wing("gradients")
        found = wing.head_gradients(self.model, safe, utils, folds, layers, mask, adapter)
        return finite(found, layers)

    def grade(self, examples: Sequence[Example], adapter: Path | None = None) -> Grades:
        check_graded(*examples)
        return self._wing("graded").grade(self.model, examples, adapter)

    def logits(
        self,
        examples: Sequence[Example],
        adapter: Path | None = None,
        ablated: Head | None = None,
        mask: Mask = "output",
    ) -> np.ndarray:
        check_mask(mask)
        ablated = check_ablated(ablated, adapter, self.shape)
        return self._wing("sweep").logits(self.model, examples, adapter, ablated, mask)

    def choices(self, examples: Sequence[Example], adapter: Path | None = None) -> Choices:
        return self._wing("sweep").choices(self.model, examples, adapter)

    def generate(
        self, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None = None
    ) -> list[np.ndarray]:
        self.kept.drop()
        return self._wing("generate").generate(self.model, prompts, max_new_tokens, adapter)

    def sweep_choices(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        check_mask(mask)
        heads = check_heads(heads, self.shape)
        return self._wing("sweep").sweep_choices(self.model, examples, heads, mask, self.kept)

    def sweep_generations(
        self, prompts: Sequence[Example], heads: Sequence[Head], max_new_tokens: int, mask: Mask = "output"
    ) -> Iterator[tuple[Head, list[np.ndarray]]]:
        check_mask(mask)
        heads = check_heads(heads, self.shape)
        sweep = self._wing("generate").sweep_generations
        return sweep(self.model, prompts, heads, max_new_tokens, mask, self.kept)

    def sweep_grades(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        check_mask(mask)
        check_graded(*examples)
        heads = check_heads(heads, self.shape)
        sweep = self._wing("graded").sweep_grades
        return sweep(self.model, examples, heads, mask, self.kept)

    def tune(
        self,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None = None,
        redraw: Redraw | None = None,
    ) -> Tuning:
        self.kept.drop()
        plan = LoraPlan(self.shape, examples, heads, recipe, reference, redraw)
        return Run(self._wing("tune").Lora(self.model, plan), plan)

    def attribute_neurons(
        self, examples: Sequence[Example], baselines: Sequence[Example] | None = None, steps: int = 64
    ) -> Attribution:
        self.kept.drop()
        check_neurons(self.shape)
        check_dense(self.quantize)
        return self._wing("neurons").attribute_neurons(self.model, examples, baselines, steps)

    def tune_gains(self, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> Tuning:
        self.kept.drop()
        check_dense(self.quantize)
        plan = GainPlan(self.shape, tasks, neurons, recipe)
        return Run(self._wing("gains").Gains(self.model, plan), plan)
