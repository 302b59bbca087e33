"""Backends: torch and flax implementations of `backends.base.Backend`."""

import importlib.util
import os
from pathlib import Path

# Read by OpenMP when torch is first imported. Threads that spin while they wait take the cores from
# whatever else runs: on two cores shared with other work, tuning ran at 23 tokens/s spinning and at 210
# sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from backends.base import Backend
from backends.errors import InputError


def load(
    name: str,
    model_dir: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    model_parallel: int = 0,
) -> Backend:
    """Loads the model in `model_dir` (a Hugging Face folder with safetensors) into a backend.

    Args:
        name: "torch" or "flax".
        dtype: "float32", "bfloat16", or "auto" (bfloat16 where the hardware multiplies faster in it).
        device: "auto", "cpu", "cuda", "cuda:1", …; flax uses all of the kind named, torch as many as hold it.
        model_parallel: devices that share one copy of the weights, by layers (torch, CUDA) or cut by heads
            (flax); 0: as few as hold it.

    Raises InputError, one line, on a folder that cannot be used.
    """
    from backends import models

    check(name)
    models.check_folder(Path(model_dir))
    if name == "torch":
        from backends.torch_backend import TorchBackend

        return TorchBackend(Path(model_dir), dtype=dtype, device=device, model_parallel=model_parallel)
    from backends.flax_backend import FlaxBackend

    return FlaxBackend(Path(model_dir), dtype=dtype, device=device, model_parallel=model_parallel)


NEEDS = {"torch": ("torch", "peft"), "flax": ("jax", "flax", "optax")}


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
