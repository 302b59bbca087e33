"""responses.parquet, without its texts: gigabytes of a whole run, of which a page quotes a few rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from stages.method.arms import BASE_RUN, Arm, ArmRun
from stages.method.arrays import FloatArray, IntArray
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
    measures: pd.DataFrame
    """MEASURES, a row a response: floats, NaN where there is none"""
    cells: dict[ArmRun, dict[str, IntArray]]
    """arm as tuned -> benchmark -> rows of `measures`; a benchmark's rows stand in the same order for every
    arm"""

    def of(self, column: str, run: ArmRun, benchmark: str) -> FloatArray:
        """A measure of one arm's responses, [rows]."""
        return self.measures[column].to_numpy()[self.cells[run][benchmark]]

    def texts(self, rows: Collection[int]) -> dict[int, dict[str, str]]:
        """Row -> its example_id, prompt and output."""
        rows = np.unique(np.array(list(rows), dtype=np.int64))
        found = pyarrow.dataset.dataset(self.path).take(rows, columns=TEXTS, batch_size=BATCH)
        return dict(zip(rows.tolist(), found.to_pylist(), strict=True))


def read_responses(run: RunFolder, arms: Mapping[str, Arm]) -> Responses:
    """The responses of a finished stage 05, arms (`arms`: by name) and benchmarks by their first rows."""
    groups = run.read(RESPONSES, columns=LABELS).groupby(LABELS, sort=False, dropna=False)
    firsts, cells = groups.head(1), {}
    labels = zip(runs_of(firsts, arms), firsts["benchmark"], groups, strict=True)
    for arm_run, benchmark, (_, rows) in labels:
        cells.setdefault(arm_run, {})[benchmark] = rows.index.to_numpy()
    path = run.path(RESPONSES)
    numbers = pa.schema([(name, pa.float64()) for name in MEASURES])
    return Responses(path, pq.read_table(path, columns=MEASURES).cast(numbers).to_pandas(), cells)


def runs_of(frame: pd.DataFrame, arms: Mapping[str, Arm]) -> list[ArmRun]:
    """Which arm, as tuned, each row of a table with arm, optimizer and seed is of; `arms`: by name."""
    tuned = zip(frame["arm"], frame["optimizer"], frame["seed"], strict=True)
    return [BASE_RUN if pd.isna(seed) else ArmRun(arms[arm], by, int(seed)) for arm, by, seed in tuned]
