"""Backends: torch and flax implementations of `backends.base.Backend`."""

import importlib
import importlib.util
import os
from pathlib import Path

# Read by OpenMP when torch is first imported. Threads that spin while they wait take the cores from other
# work: on two shared cores tuning ran at 23 tokens/s with spinning threads and at 210 with sleeping ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read by torch's allocator when CUDA starts: batches of ever other sizes leave holes that no block fits.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from backends.base import Backend
from backends.core.errors import InputError

NEEDS = {"torch": ("torch", "peft"), "flax": ("jax", "flax", "optax")}


def load(
    name: str,
    model_dir: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    model_parallel: int = 0,
    quantize: str = "",
) -> Backend:
    """Loads the model in `model_dir` (a Hugging Face folder with safetensors) into a backend.

    Args:
        name: "torch" or "flax".
        dtype: "float32", "bfloat16", or "auto" (bfloat16 where the hardware multiplies faster in it).
        device: "auto", "cpu", "cuda", "cuda:1", …; flax uses all of the named kind, torch as many as needed.
        model_parallel: devices that share one copy of the weights, by layers (torch, CUDA) or cut by heads
            (flax); 0: as few as hold it.
        quantize: "nf4" or "int8": base weights in 4 or 8 bits (`torch.quantized`; CUDA, one device).

    Raises InputError, one line, on a folder that cannot be used.
    """
    check(name)
    check_folder(name, Path(model_dir))
    wing = importlib.import_module(f"backends.{name}.backend")
    if not quantize:
        return wing.load(Path(model_dir), dtype, device, model_parallel)
    check_quantize(quantize, name, dtype, model_parallel)
    check_quantize_here(quantize, device)
    return wing.load(Path(model_dir), "bfloat16", device, 1, quantize)


def check_folder(name: str, model_dir: Path) -> None:
    """InputError, one line, on a folder that a backend cannot use, as far as that can be told without loading
    its weights."""
    from backends import models

    models.check_folder(model_dir)
    importlib.import_module(f"backends.{name}.usable").check_folder(model_dir)


def check(name: str) -> None:
    """InputError, one line, if a backend cannot work here; nothing is loaded."""
    if name not in NEEDS:
        raise InputError(f'unknown backend {name!r}: "torch" or "flax"')
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        plugin = " (on GPU or TPU also JAX's plugin for it, e.g. jax[cuda12])" if name == "flax" else ""
        other = "flax" if name == "torch" else "torch"
        raise InputError(
            f"backend {name} needs {missing[0]}, which is not installed: "
            f"`pip install -r requirements.txt`{plugin}, or use --backend {other}"
        )


def check_device(name: str, device: str) -> None:
    """InputError, one line, where a backend has no such device on this machine; nothing is loaded."""
    if device not in ("auto", "cpu"):  # to ask takes seconds
        devices = importlib.import_module(f"backends.{name}.devices")
        (devices.resolve_device if name == "torch" else devices.resolve_devices)(device)


def check_quantize(quantize: str, name: str, dtype: str, model_parallel: int) -> None:
    """InputError, one line, where quantized weights do not go with the rest."""
    if quantize not in ("nf4", "int8"):
        raise InputError(f"--quantize {quantize}: nf4 or int8")
    if name != "torch":
        raise InputError(f"--quantize {quantize} is not handled by --backend {name}: use --backend torch")
    if dtype == "float32":
        raise InputError(f"--quantize {quantize} computes in bfloat16, not in float32: say --dtype bfloat16")
    if model_parallel > 1:
        raise InputError(f"--quantize {quantize} is for one device, not --model-parallel {model_parallel}")


def check_quantize_here(quantize: str, device: str) -> None:
    """InputError, one line, where weights cannot be quantized on this machine; nothing is loaded."""
    importlib.import_module("backends.torch.quantized").check_here(quantize, device)
