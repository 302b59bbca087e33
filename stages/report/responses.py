"""responses.parquet without its texts: what stage 06 counts is small, what it quotes is a few rows.

A run of the paper's size has millions of responses, gigabytes of text. Labels and measures are held as
columns; `texts` reads the rows that a page shows in one pass over the file, a batch at a time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.method.arms import Arm, ArmRun
from stages.method.arrays import IntArray
from stages.run.schemas import RESPONSES
from stages.run.store import RunFolder

LABELS = ["arm", "optimizer", "seed", "benchmark"]
MEASURES = ["verdict", "refused", "harmful", "steps", "strict", "flexible", "prediction"]
TEXTS = ["example_id", "prompt", "output"]
BATCH = 4096
"""rows whose texts are in memory at a time"""


@dataclass(frozen=True)
class Responses:
    """Every response of a run by what was counted of it."""

    path: Path
    measures: pa.Table
    """MEASURES, a row a response"""
    cells: dict[ArmRun, dict[str, IntArray]]
    """arm as tuned -> benchmark -> rows of `measures`; a benchmark's rows stand in the same order for every
    arm"""

    def of(self, column: str, run: ArmRun, benchmark: str) -> np.ndarray:
        """A measure of one arm's responses, [rows]; floats, with NaN for null, where it may be null."""
        values = self.measures[column].take(pa.array(self.cells[run][benchmark]))
        if RESPONSES.schema.field(column).nullable:
            values = pc.cast(values, pa.float64())
        return values.to_numpy()

    def texts(self, rows: Iterable[int]) -> dict[int, dict[str, str]]:
        """Row -> its example_id, prompt and output."""
        wanted = np.unique(np.array(list(rows), dtype=np.int64))
        found: dict[int, dict[str, str]] = {}
        first = 0
        batches = pq.ParquetFile(self.path).iter_batches(BATCH, columns=TEXTS) if len(wanted) else ()
        for batch in batches:
            here = wanted[(wanted >= first) & (wanted < first + batch.num_rows)]
            if len(here):
                texts = batch.take(pa.array(here - first)).select(TEXTS).to_pylist()
                found |= dict(zip(here.tolist(), texts, strict=True))
            first += batch.num_rows
        return found


def read_responses(run: RunFolder, arms: Mapping[str, Arm]) -> Responses:
    """The responses of a finished stage 05, arms and benchmarks in the order in which they first occur.

    Args:
        arms: by name.
    """
    labels = run.read(RESPONSES, columns=LABELS)
    codes = labels.groupby(LABELS, sort=False, dropna=False).ngroup().to_numpy()
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    firsts = labels.iloc[[rows[0] for rows in groups]]
    cells: dict[ArmRun, dict[str, IntArray]] = {}
    for arm_run, benchmark, rows in zip(runs_of(firsts, arms), firsts["benchmark"], groups, strict=True):
        cells.setdefault(arm_run, {})[benchmark] = rows
    path = run.path(RESPONSES)
    return Responses(path, pq.read_table(path, columns=MEASURES), cells)


def runs_of(frame: pd.DataFrame, arms: Mapping[str, Arm]) -> list[ArmRun]:
    """Which arm, as tuned, each row of a table is of.

    Args:
        frame: with the columns arm, optimizer, seed.
        arms: by name.
    """
    labels = zip(frame["arm"], frame["optimizer"], frame["seed"], strict=True)
    return [
        ArmRun(arms[arm], *((None, None) if pd.isna(seed) else (optimizer, int(seed))))
        for arm, optimizer, seed in labels
    ]
