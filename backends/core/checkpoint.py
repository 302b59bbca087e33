"""The state of a tuning run on disk, from which it continues after a kill to the identical adapter."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backends.base import Example, GainRecipe, Recipe
from backends.core.errors import InputError, reason
from backends.core.files import write_atomic

SECONDS = 60.0
"""work that a kill may cost"""


def identity(backend: str, recipe: Recipe | GainRecipe, chosen: Sequence, rows: Sequence[Example]) -> str:
    """A digest of all that a tuning run depends on except the model.

    Args:
        chosen: which heads or neurons are tuned, and how the rows divide, as JSON knows it.
        rows: all that the run may read, in order.
    """
    seen = hashlib.sha256()
    settings = {name: value for name, value in vars(recipe).items() if name not in ("folder", "checkpoint")}
    seen.update(json.dumps([backend, settings, chosen], sort_keys=True).encode())
    for example in rows:
        for ids in (example.prompt_ids, example.target_ids):
            seen.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return seen.hexdigest()


class Checkpoint:
    """Records of the steps taken and arrays after the last of them; kept at `path`, if there is one.

    Raises InputError where the file there is damaged or another tuning run's.
    """

    def __init__(self, path: Path | None, of: str):
        self.path, self.of = path, of
        self.records: list[dict] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.saved_at = time.monotonic()
        if path is None or not path.is_file():
            return
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.records = json.loads(metadata["records"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is damaged ({reason(error)}): delete it, and the tuning starts again"
            ) from None
        if metadata.get("of") != of:
            raise InputError(f"{path} is another tuning run's: delete it, and this one starts again")

    @property
    def due(self) -> bool:
        return self.path is not None and time.monotonic() - self.saved_at >= SECONDS

    def save(self, records: Sequence[dict], arrays: dict[str, np.ndarray]) -> None:
        metadata = {"of": self.of, "records": json.dumps(list(records))}
        write_atomic(self.path, lambda temporary: save_file(arrays, temporary, metadata=metadata))
        self.saved_at = time.monotonic()
