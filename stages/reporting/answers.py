"""responses.parquet without its texts: what stage 06 counts is small, what it quotes is a few rows.

A run of the paper's size has millions of responses, gigabytes of text. Labels and verdicts are held as
arrays; `texts` reads the rows that a page shows in one pass over the file, a batch at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from backends.errors import InputError
from stages import artifacts, schemas
from stages.checks import IntArray

FILE = "05_evaluate/responses.parquet"
LABELS = ("arm", "optimizer", "seed", "benchmark")
MEASURES = ("verdict", "refused", "harmful", "steps", "strict", "flexible", "prediction")
TEXTS = ("example_id", "prompt", "output")
BATCH = 4096
"""rows whose texts are in memory at a time"""

Unit = tuple[str, str, int]
"""arm, optimizer, seed"""


@dataclass(frozen=True)
class Answers:
    """Every response of a run by what was counted of it."""

    path: Path
    measures: pa.Table
    """MEASURES, a row a response"""
    cells: dict[Unit, dict[str, IntArray]]
    """unit -> benchmark -> rows of `measures`; a benchmark's rows stand in the same order for every unit"""

    def of(self, column: str, unit: Unit, benchmark: str) -> np.ndarray:
        """A measure of one unit's responses, [rows]; floats, with NaN for null, where the column may lack."""
        return self.at(column, self.cells[unit][benchmark])

    def at(self, column: str, rows: IntArray) -> np.ndarray:
        values = self.measures[column].take(pa.array(rows))
        if schemas.RESPONSES.field(column).nullable:
            values = pc.cast(values, pa.float64())
        return values.to_numpy()

    def texts(self, rows: Iterable[int]) -> dict[int, dict[str, str]]:
        """Row -> its example_id, prompt and output."""
        wanted = np.unique(np.array(list(rows), dtype=np.int64))
        found: dict[int, dict[str, str]] = {}
        first = 0
        batches = pq.ParquetFile(self.path).iter_batches(BATCH, columns=list(TEXTS)) if len(wanted) else ()
        for batch in batches:
            here = wanted[(wanted >= first) & (wanted < first + batch.num_rows)]
            if len(here):
                texts = batch.take(pa.array(here - first)).select(TEXTS).to_pylist()
                found |= dict(zip(here.tolist(), texts, strict=True))
            first += batch.num_rows
        return found


def read(run: Path) -> Answers:
    """The responses of a finished stage 05, checked against its manifest as artifacts.read_input does."""
    stage, file = FILE.split("/")
    path, told = run / FILE, artifacts.stage_manifest(run, stage)["outputs"].get(file)
    if not path.is_file() or artifacts.sha256(path) != told:
        raise InputError(f"{path} is not what its manifest says (sha256): delete {run / stage}, run it again")
    schema = pq.read_schema(path)
    if not schema.equals(schemas.RESPONSES):
        raise InputError(f"{path} has not the columns of {schemas.SCHEMA_VERSION}/responses")
    return from_table(pq.read_table(path, columns=[*LABELS, *MEASURES]), path)


def from_table(table: pa.Table, path: Path) -> Answers:
    """Finds the rows of every unit and benchmark, in the order in which they first occur."""
    codes, names = [], []
    for label in LABELS:
        encoded = table[label].combine_chunks().dictionary_encode()
        codes.append(encoded.indices.to_numpy().astype(np.int64))
        names.append(encoded.dictionary.to_pylist())
    one = np.ravel_multi_index(codes, [len(values) for values in names])
    order = np.argsort(one, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(one[order])) + 1)
    cells: dict[Unit, dict[str, IntArray]] = {}
    for rows in sorted(groups, key=lambda rows: rows[0]):
        *unit, benchmark = (values[code[rows[0]]] for values, code in zip(names, codes, strict=True))
        cells.setdefault(tuple(unit), {})[benchmark] = rows
    return Answers(path, table.select(MEASURES), cells)
