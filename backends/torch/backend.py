"""Loads a model folder into transformers' model, to be run layer by layer (`torch.decoder`)."""

from pathlib import Path

import torch
import transformers

from backends import models
from backends.core.errors import InputError, reason
from backends.core.loaded import Loaded
from backends.torch import attention, devices, probe, quantized

SMALL = 5_000_000
"""parameters below which one CPU thread is faster (two took twice as long on `tiny`)"""


def load(model_dir: Path, dtype: str, device: str, model_parallel: int, quantize: str = "") -> Loaded:
    """See `backends.load`. Weights never require gradients between calls."""
    kind = devices.resolve_dtype(dtype, devices.resolve_device(device))
    places = devices.places(model_dir, kind, device, model_parallel)
    several = len(set(places)) > 1
    more = {"device_map": devices.device_map(places) if several else None}
    if quantize:
        quantized.check_weights(model_dir)
        more = {"device_map": {"": places[0]}, "quantization_config": quantized.configuration(quantize)}
    try:
        with models.without_progress_bars():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=kind,
                attn_implementation=attention.NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **more,
            )
    except Exception as error:  # the libraries raise many types for a damaged file
        raise InputError(f"{model_dir}: the weights cannot be loaded ({reason(error)})") from None
    # transformers would fill what is missing with random numbers and ignore what it does not know.
    for problem in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, report[f"{problem}_keys"])):
            raise InputError(f"{model_dir}: {len(keys)} weights are {problem}, the first is {keys[0]}")
    if places[0].type == "cpu" and sum(weight.numel() for weight in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    devices.prepare()
    if quantize:
        quantized.multiply_unrounded(model)
    elif not several:
        model.to(places[0])
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"{model_dir}: weight {name} holds values that are not finite")
    decoder = probe.probed(model_dir, model, places)
    dtype = str(kind).removeprefix("torch.")
    return Loaded("torch", decoder, dtype, devices.describe(places), decoder.shape, quantize)
