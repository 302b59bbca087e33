"""The model of a run, loaded for a stage and checked against what the run began with."""

import gc
from functools import lru_cache
from pathlib import Path

import backends
from backends import models
from backends.base import Backend
from backends.core.errors import InputError
from stages.run.settings import Settings
from stages.run.store import MANIFEST, RunFolder, read_json


@lru_cache(maxsize=1)
def _load(name: str, folder: Path, weights: str, dtype: str, device: str, model_parallel: int) -> Backend:
    """Kept for the next stage of a process that makes several, as long as the weights are these."""
    return backends.load(name, folder, dtype=dtype, device=device, model_parallel=model_parallel)


def forget() -> None:
    """Frees the model's place."""
    _load.cache_clear()
    gc.collect()


def load_backend(settings: Settings, run: RunFolder) -> tuple[Backend, dict]:
    """The run's backend, and what a manifest says of it. InputError if the weights or the tokenizer are not
    those that earlier stages used."""
    chosen, place = settings.model, settings.run
    folder = models.local_folder(chosen.model, chosen.revision)
    if models.tokenizer_sha256(folder) != run.manifest("01_calibrate")["notes"]["tokenizer"]:
        raise InputError(f"the tokenizer in {folder} is not the one stage 01 used: choose another --run")
    weights = models.weights_sha256(folder)
    for earlier in sorted(run.folder.glob(f"*/{MANIFEST}")):
        model = read_json(earlier)["model"]
        if model and model["weights_sha256"] != weights:
            raise InputError(
                f"the weights in {folder} are not those of {earlier.parent}: choose another --run"
            )
    backend = _load(chosen.backend, folder, weights, chosen.dtype, place.device, place.model_parallel)
    return backend, {
        "id": chosen.model,
        "revision": chosen.revision,
        "weights_sha256": weights,
        "backend": backend.name,
        "device": backend.device,
        "dtype": backend.dtype,
    }
