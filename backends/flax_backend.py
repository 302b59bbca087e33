"""The Flax backend: one loaded decoder on a mesh of devices behind `backends.base.Backend`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from backends import (
    flax_adapter,
    flax_devices,
    flax_generate,
    flax_loss,
    flax_model,
    flax_neurons,
    flax_sweep,
    flax_weights,
    models,
)
from backends.base import Head, Mask, Recipe, Tuning, check_heads, check_mask, check_silenced
from backends.flax_decoder import Adapter
from backends.flax_gains import FlaxGainTuning
from backends.flax_tune import FlaxTuning
from backends.kept import Kept
from backends.neurons import Attribution, GainRecipe, Selection, Task
from data.examples import Example


class FlaxBackend:
    """See `backends.base.Backend`."""

    name = "flax"

    def __init__(
        self, model_dir: Path, *, dtype: str = "float32", device: str = "auto", model_parallel: int = 0
    ):
        flax_devices.keep_programs()
        devices = flax_devices.resolve_devices(device)
        self.dtype = flax_devices.resolve_dtype(dtype, devices)
        config = flax_weights.read_config(model_dir, self.dtype)
        count = sum(int(np.prod(shape)) for shape in flax_weights.parameters(config).values())
        mesh = flax_devices.make_mesh(
            devices, config.shape, model_parallel, count * jnp.dtype(self.dtype).itemsize
        )
        self.device, self.shape = flax_devices.describe(mesh), config.shape
        graph, weights = flax_weights.load(model_dir, config, mesh)
        self.model = flax_model.Model(graph, weights, config, mesh, np.array(models.eos_ids(model_dir), int))
        self.kept = Kept()

    def _adapter(self, folder: Path | None) -> Adapter | None:
        if folder is None:
            return None
        if flax_adapter.is_gains(Path(folder)):
            return Adapter(gains=self.model.put(flax_adapter.read_gains(Path(folder), self.shape)))
        a, b, scale = flax_adapter.read(Path(folder), self.shape)
        return Adapter(self.model.put(a), self.model.put(b), np.float32(scale))

    def gradient_gram(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        self.kept.drop()
        layers = range(self.shape.layers) if layers is None else layers
        return flax_loss.gradient_gram(self.model, safe, util, folds, layers)

    def logits(
        self,
        examples: Sequence[Example],
        adapter: Path | None = None,
        silenced: Head | None = None,
        mask: Mask = "output",
    ) -> np.ndarray:
        check_mask(mask)
        silenced = check_silenced(silenced, adapter, self.shape)
        return flax_sweep.logits(self.model, examples, self._adapter(adapter), silenced, mask)

    def choices(
        self, examples: Sequence[Example], adapter: Path | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return flax_sweep.choices(self.model, examples, self._adapter(adapter))

    def generate(
        self, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None = None
    ) -> list[np.ndarray]:
        self.kept.drop()
        return flax_generate.generate(self.model, prompts, max_new_tokens, self._adapter(adapter))

    def sweep_choices(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        check_mask(mask)
        heads = check_heads(heads, self.shape)
        return flax_sweep.sweep_choices(self.model, examples, heads, mask, self.kept)

    def sweep_generations(
        self, prompts: Sequence[Example], heads: Sequence[Head], max_new_tokens: int, mask: Mask = "output"
    ) -> Iterator[tuple[Head, list[np.ndarray]]]:
        check_mask(mask)
        heads = check_heads(heads, self.shape)
        return flax_generate.sweep_generations(self.model, prompts, heads, max_new_tokens, mask, self.kept)

    def tune(
        self,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None = None,
    ) -> Tuning:
        self.kept.drop()
        return FlaxTuning(self.model, examples, heads, recipe, reference)

    def attribute_neurons(
        self, examples: Sequence[Example], baselines: Sequence[Example] | None = None, steps: int = 64
    ) -> Attribution:
        self.kept.drop()
        return flax_neurons.attribute(self.model, examples, baselines, steps)

    def tune_gains(self, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> Tuning:
        self.kept.drop()
        return FlaxGainTuning(self.model, tasks, neurons, recipe)
