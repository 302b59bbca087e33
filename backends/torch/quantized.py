"""Base weights in 4 or 8 bits, by bitsandbytes: larger models on one card.

Which weights: all matrices of the layers but W_q. O needs gradients in W_q's rows, and packed weights have
none; LoRA sits there too. So `q_proj` stays in bfloat16, in which all is computed, and what is done to it
(adapters in place, gradients of the base's rows) is done as in a dense model. The embedding, the norms and
the output matrix, whose logits are compared, stay too. Nothing is merged; an adapter also fits the dense
model, but was tuned on this one.

nf4: blocks of 64 weights share a float32 scale (QLoRA without its second quantization: half a bit a weight
for one approximation less). int8: a row of a matrix is one block, and only weights are rounded. LLM.int8 also
rounds what they are multiplied by, in steps that follow the largest value of a row: without a head these are
others, so that a head without effect would show one.
"""

import importlib.util
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from backends import models
from backends.core.errors import InputError
from backends.torch import devices

DENSE = ["q_proj", "lm_head"]
"""modules that are not quantized"""


def check_here(kind: str, device: str) -> None:
    """InputError, one line, where no quantized model can be loaded: without CUDA, or without bitsandbytes."""
    if devices.resolve_device(device).type != "cuda":
        raise InputError(
            f"--quantize {kind} needs CUDA, and --device {device} is none here; where only the nodes "
            f"of --ray or --slurm have it, say --device cuda"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"--quantize {kind} needs bitsandbytes: `.venv/bin/pip install -r requirements-quantize.txt`"
        )


def configuration(kind: str) -> transformers.BitsAndBytesConfig:
    """transformers' own, of "nf4" or "int8"."""
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=DENSE)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=DENSE,
    )


class Product(torch.autograd.Function):
    """x @ W.T of x [..., m] and W [n, m] in 8 bits with a scale a row [n]. W has no gradient, so x is not
    kept; and W is dense only while it is multiplied."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        return x @ dense(packed, scales, x.dtype).t()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ dense(*ctx.saved_tensors, gradient.dtype), None, None


def dense(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return packed.to(dtype).mul_((scales / 127)[:, None])


def multiply_unrounded(model: torch.nn.Module) -> None:
    """What 8-bit matrices multiply stays as it is."""
    import bitsandbytes

    def forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        found = Product.apply(x, module.weight.data, module.weight.SCB)
        return found if module.bias is None else found + module.bias

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.forward = partial(forward, module)


def check_weights(folder: Path) -> None:
    """InputError on experts, which bitsandbytes leaves dense (it packs linear layers only), and on values
    that are not finite, which would not show once they are packed."""
    for path in models.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if ".experts." in name:
                    raise InputError(f"{folder}: --quantize does not reach experts, as weight {name}")
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise InputError(f"{folder}: weight {name} holds values that are not finite")


def stored_bytes(weight: torch.Tensor) -> int:
    """Of a weight as it is held, with the scales of its blocks where it is packed in 4 bits."""
    state = getattr(weight, "quant_state", None)
    return weight.nbytes + (state.absmax.nbytes if state is not None else 0)
