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
from stages.run.schemas import RESPONSES
from stages.run.store import RunFolder

LABELS = ["arm", "optimizer", "seed"]
MEASURES = ["verdict", "refused", "harmful", "steps", "strict", "flexible", "prediction", "graded"]
TEXTS = ["example_id", "prompt", "output"]
BATCH = 4096
"""rows whose texts are in memory at a time"""


@dataclass(frozen=True)
class Responses:
    """Every response of a run by what was counted of it."""

    path: Path
    of: dict[ArmRun, pd.DataFrame]
    """arm as tuned, the base model first -> a line a response: `row` in the file, `benchmark`, `side`, and
    MEASURES as floats, NaN where there is none; the same prompts on the same lines for every arm"""

    def texts(self, rows: Collection[int]) -> dict[int, dict[str, str]]:
        """Row in the file -> its example_id, prompt and output; all in one pass."""
        rows = np.unique(np.array(list(rows), dtype=np.int64))
        found = pyarrow.dataset.dataset(self.path).take(rows, columns=TEXTS, batch_size=BATCH)
        return dict(zip(rows.tolist(), found.to_pylist(), strict=True))


def read_responses(run: RunFolder, arms: Mapping[str, Arm], sides: Mapping[str, str]) -> Responses:
    """The responses of a finished stage 05.

    Args:
        arms: by name.
        sides: benchmark -> side, in the order in which an arm's responses are to stand.
    """
    lines = run.read(RESPONSES, columns=[*LABELS, "benchmark"])
    numbers = pa.schema([(name, pa.float64()) for name in MEASURES])
    lines[MEASURES] = pq.read_table(run.path(RESPONSES), columns=MEASURES).cast(numbers).to_pandas()
    lines["row"], lines["side"] = np.arange(len(lines)), lines["benchmark"].map(sides)
    lines = lines.sort_values("benchmark", key=lambda names: names.map(list(sides).index), kind="stable")
    groups = lines.groupby(LABELS, sort=False, dropna=False)
    cells = zip(runs_of(groups.head(1), arms), (own.reset_index(drop=True) for _, own in groups), strict=True)
    return Responses(run.path(RESPONSES), dict(sorted(cells, key=lambda cell: cell[0] != BASE_RUN)))


def runs_of(frame: pd.DataFrame, arms: Mapping[str, Arm]) -> list[ArmRun]:
    """Which arm, as tuned, each row of a table with arm, optimizer and seed is of; `arms`: by name."""
    tuned = zip(frame["arm"], frame["optimizer"], frame["seed"], strict=True)
    return [BASE_RUN if pd.isna(seed) else ArmRun(arms[arm], by, int(seed)) for arm, by, seed in tuned]
