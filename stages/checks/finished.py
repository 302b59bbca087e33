"""A finished run as the audit and the comparison read it, and how two tables are compared."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from backends import models
from backends.core.errors import InputError
from stages.run.pipeline import STAGES, declaration
from stages.run.presets import stored_settings
from stages.run.schemas import GRADIENTS, OWN_MAP, Table
from stages.run.settings import Settings
from stages.run.store import RUN_FILE, RunFolder

Faults = list[str]
Result = tuple[Faults | None, str]
"""what is wrong (None: what the check needs is not on this machine), and a figure or the reason"""
TOLERANCE = 1e-12
"""of a recomputed number, relative to the largest of its column"""
NO_FOLDER = "the model's folder is not on this machine"


class FinishedRun(RunFolder):
    """A run whose `stages` are finished. InputError where it is none, or says which command makes it one."""

    def __init__(self, folder: Path, stages: Sequence[str] = STAGES):
        super().__init__(folder)
        if not (self.folder / RUN_FILE).is_file():
            raise InputError(f"{folder} is no run (no {RUN_FILE}): give a run's folder, e.g. outputs/smollm")
        self.manifests = {stage: RunFolder.manifest(self, stage) for stage in stages}

    def manifest(self, stage: str) -> dict:
        return self.manifests[stage]

    def notes(self, stage: str) -> dict:
        return self.manifests[stage]["notes"]

    @cached_property
    def settings(self) -> Settings:
        return stored_settings(self.folder).replace(run=str(self.folder))

    @cached_property
    def map_names(self) -> list[str]:
        return [spec.name for spec in self.settings.maps]

    def tables(self, stage: str) -> list[tuple[Table, str]]:
        """Tables that a stage declares, each with its map; optional ones where they are there."""
        return [
            (table, name)
            for table in declaration(stage).writes
            for name in (self.map_names if table.per_map else [OWN_MAP])
            if not table.optional or self.has(table, name)
        ]

    @cached_property
    def heads(self) -> tuple[int, int]:
        """(L, H), by gradients.parquet."""
        table = self.read(GRADIENTS)
        return tuple(int(table[name].max()) + 1 for name in ("layer", "head"))

    @cached_property
    def model_folder(self) -> Path | None:
        """Where weights and tokenizer were; None where this machine has no such folder."""
        folder = Path(self.notes("01_calibrate")["model_folder"])
        return folder if folder.is_dir() else None

    @cached_property
    def tokenizer(self):
        """The recorded tokenizer; None where it is not here, or not the recorded one."""
        folder = self.model_folder
        if folder is None or models.tokenizer_sha256(folder) != self.notes("01_calibrate")["tokenizer"]:
            return None
        return models.load_tokenizer(folder)


LABELS = ("arm", "optimizer", "seed", "step", "benchmark", "layer", "head", "neuron", "example_id")
"""columns that name a row"""
TEXTS = ("prompt", "rendered", "target", "output", "text")
"""columns that are not shown: they may be harmful"""


def unequal(stored: pd.DataFrame, computed: pd.DataFrame) -> Faults:
    """A fault for each cell of `computed` that `stored` does not have, row by row.

    Floats may differ by `TOLERANCE`, all else is exact; a null equals a null.
    """
    if len(stored) != len(computed):
        return [f"{len(stored)} rows, recomputed {len(computed)}"]
    faults = []
    for column in computed:
        found, expected = stored[column], computed[column]
        for row in np.flatnonzero(differs(found, expected)):
            values = [str(plain(each.iloc[row])) for each in (found, expected)]
            shown = "differs" if column in TEXTS else "is {}, recomputed {}".format(*values)
            faults.append(f"{place(computed, row)}: {column} {shown}")
    return faults


def place(table: pd.DataFrame, row: int) -> str:
    """A row by its labels: "layer 1, head 3"."""
    labels = table[[name for name in LABELS if name in table]].iloc[row].dropna()
    return ", ".join(f"{name} {value}" for name, value in labels.items()) or f"row {row}"


def differs(found: pd.Series, expected: pd.Series) -> np.ndarray:
    """bool: where two columns differ, as `unequal` says."""
    if expected.dtype.kind == "f":
        left, right = pd.to_numeric(found, errors="coerce").to_numpy(float), expected.to_numpy(float)
        scale = np.nanmax(np.abs(right), initial=0.0)
        return ~np.isclose(left, right, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
    left, right = found.to_numpy(object), expected.to_numpy(object)
    if any(isinstance(value, np.ndarray | list | tuple) for value in right):
        return np.array([not _same_list(*pair) for pair in zip(left, right, strict=True)])
    return ~((left == right) | (pd.isna(left) & pd.isna(right)))


def _same_list(left: object, right: object) -> bool:
    left, right = (np.asarray(plain(value)) for value in (left, right))
    if left.dtype.kind not in "iuf" or right.dtype.kind not in "iuf":  # texts; an empty list is of floats
        return left.tolist() == right.tolist()
    return left.shape == right.shape and np.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE)


def plain(value: object) -> object:
    """A cell without numpy's types."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value
