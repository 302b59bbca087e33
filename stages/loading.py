"""The model of a run, loaded for a stage and checked against what the run began with."""

import gc
from functools import lru_cache
from pathlib import Path

import backends
from backends import models
from backends.base import Backend
from backends.errors import InputError
from stages import artifacts, presets


@lru_cache(maxsize=1)
def _loaded(name: str, folder: Path, weights: str, dtype: str, device: str, model_parallel: int) -> Backend:
    """Kept for the next stage of a process that makes several, as long as the weights are these."""
    return backends.load(name, folder, dtype=dtype, device=device, model_parallel=model_parallel)


def forget() -> None:
    """Frees the model's place."""
    _loaded.cache_clear()
    gc.collect()


def load_backend(settings: presets.Settings, stage: artifacts.Stage) -> Backend:
    """Loads the run's backend and begins the stage with it. InputError if the weights or tokenizer have
    changed."""
    folder = models.local_folder(settings.model, settings.revision)
    begun = artifacts.stage_manifest(settings.folder, "01_calibrate")["notes"]
    if models.tokenizer_sha256(folder) != begun["tokenizer"]:
        raise InputError(f"the tokenizer in {folder} is not the one stage 01 used: choose another --run")
    weights = models.weights_sha256(folder)
    backend = _loaded(
        settings.backend, folder, weights, settings.dtype, settings.device, settings.model_parallel
    )
    stage.begin(
        {
            "id": settings.model,
            "revision": settings.revision,
            "weights_sha256": weights,
            "backend": backend.name,
            "device": backend.device,
            "dtype": backend.dtype,
        }
    )
    shape = backend.shape
    stage.say(
        f"{settings.model}: {shape.layers} layers of {shape.heads} heads, {backend.name}, "
        f"{backend.dtype} on {backend.device}"
    )
    for earlier in sorted(settings.folder.glob(f"*/{artifacts.MANIFEST}")):
        model = artifacts.read_json(earlier)["model"]
        if model and model["weights_sha256"] != stage.model["weights_sha256"]:
            raise InputError(
                f"the weights in {folder} are not those of {earlier.parent}: choose another --run"
            )
    return backend
