"""The torch backend: one loaded transformers model behind `backends.base.Backend`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers

from backends import (
    models,
    torch_continuous,
    torch_devices,
    torch_generate,
    torch_loss,
    torch_neurons,
    torch_sweep,
)
from backends.base import Head, Mask, Recipe, Tuning, check_heads, check_mask, check_silenced
from backends.errors import InputError
from backends.kept import Kept
from backends.neurons import Attribution, GainRecipe, Selection, Task
from backends.torch_decoder import Decoder
from data.examples import Example

SMALL = 5_000_000
"""Parameters below which a CPU's cores only wait for one another (2 threads took twice as long as 1 on
`tiny`)."""


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies in it, float32 elsewhere."""
    if dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = Path("/proc/cpuinfo")
            native = cpu.is_file() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: float32, bfloat16 or auto")
    return getattr(torch, dtype)


class TorchBackend:
    """See `backends.base.Backend`. Weights never require gradients between calls."""

    name = "torch"

    def __init__(
        self, model_dir: Path, *, dtype: str = "float32", device: str = "auto", model_parallel: int = 0
    ):
        kind = resolve_dtype(dtype, torch_devices.resolve_device(device))
        places = torch_devices.places(model_dir, kind, device, model_parallel)
        self.dtype, self.device = str(kind).removeprefix("torch."), torch_devices.describe(places)
        several = len(set(places)) > 1
        try:
            with models.without_progress_bars():
                self.model, told = transformers.AutoModelForCausalLM.from_pretrained(
                    model_dir,
                    dtype=kind,
                    attn_implementation="sdpa",
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    device_map=torch_devices.device_map(places) if several else None,
                )
        except Exception as error:  # the libraries raise many types for a damaged file
            raise InputError(
                f"{model_dir}: the weights cannot be loaded ({str(error).splitlines()[0]})"
            ) from None
        # transformers would fill what is missing with random numbers and pass over what it does not know.
        for what in ("missing", "unexpected", "mismatched"):
            if keys := sorted(map(str, told[f"{what}_keys"])):
                raise InputError(f"{model_dir}: {len(keys)} weights are {what}, the first is {keys[0]}")
        size = sum(weight.numel() for weight in self.model.parameters())
        if places[0].type == "cpu" and size < SMALL:
            torch.set_num_threads(1)
        if not several:
            self.model.to(places[0])
        self.model.eval().requires_grad_(False)
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise InputError(f"{model_dir}: weight {name} holds values that are not finite")
        self.shape = models.read_shape(self.model.config)
        self.eos = set(models.eos_ids(model_dir))
        self.decoder = Decoder(self.model, places)
        self.kept = Kept()

    @contextmanager
    def _adapted(self, adapter: Path | None):
        """The model with a PEFT adapter in place, not merged: what was tuned is what answers, bit for bit."""
        if adapter is None:
            yield
            return
        import peft  # seconds to import, and the sweep needs none of it

        from backends.torch_tune import quietly

        try:
            with quietly():
                wrapped = peft.PeftModel.from_pretrained(self.model, adapter)
        except Exception as error:  # as above
            raise InputError(
                f"{adapter}: the adapter cannot be loaded ({str(error).splitlines()[0]})"
            ) from None
        try:
            yield
        finally:
            wrapped.unload()

    def gradient_gram(
        self,
        safe: Sequence[Example],
        util: Sequence[Example],
        folds: int = 4,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        self.kept.drop()
        layers = range(self.shape.layers) if layers is None else layers
        return torch_loss.gradient_gram(self.model, self.shape.heads, safe, util, folds, layers)

    def logits(
        self,
        examples: Sequence[Example],
        adapter: Path | None = None,
        silenced: Head | None = None,
        mask: Mask = "output",
    ) -> np.ndarray:
        check_mask(mask)
        silenced = check_silenced(silenced, adapter, self.shape)
        with self._adapted(adapter):
            return torch_sweep.logits(self.decoder, examples, silenced, mask)

    def choices(
        self, examples: Sequence[Example], adapter: Path | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        with self._adapted(adapter):
            return torch_sweep.choices(self.decoder, examples)

    def generate(
        self, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None = None
    ) -> list[np.ndarray]:
        self.kept.drop()
        with self._adapted(adapter):
            if len(set(self.decoder.places)) == 1 and torch_continuous.handles(self.model):
                return torch_continuous.generate(self.model, prompts, max_new_tokens, self.eos)
            return torch_generate.generate(self.decoder, self.shape, prompts, max_new_tokens, self.eos)

    def sweep_choices(
        self, examples: Sequence[Example], heads: Sequence[Head], mask: Mask = "output"
    ) -> Iterator[tuple[Head, np.ndarray]]:
        check_mask(mask)
        heads = check_heads(heads, self.shape)
        return torch_sweep.sweep_choices(self.decoder, self.shape, examples, heads, mask, self.kept)

    def sweep_generations(
        self, prompts: Sequence[Example], heads: Sequence[Head], max_new_tokens: int, mask: Mask = "output"
    ) -> Iterator[tuple[Head, list[np.ndarray]]]:
        check_mask(mask)
        heads = check_heads(heads, self.shape)
        return torch_generate.sweep_generations(
            self.decoder, self.shape, prompts, heads, max_new_tokens, self.eos, mask, self.kept
        )

    def tune(
        self,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None = None,
    ) -> Tuning:
        self.kept.drop()
        from backends.torch_tune import TorchTuning

        return TorchTuning(self.model, self.shape, examples, heads, recipe, reference)

    def attribute_neurons(
        self, examples: Sequence[Example], baselines: Sequence[Example] | None = None, steps: int = 64
    ) -> Attribution:
        self.kept.drop()
        return torch_neurons.attribute(self.decoder, examples, baselines, steps)

    def tune_gains(self, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> Tuning:
        self.kept.drop()
        from backends.torch_gains import TorchGainTuning

        return TorchGainTuning(self.model, self.shape, tasks, neurons, recipe)
