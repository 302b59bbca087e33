"""What the audit reads: a finished run, its tables, and what follows from them. And a line of its answer.

Nothing derived is believed: the properties of `Run` are computed from the rawest table there is. What is not
as it must be raises a ValueError, which `stages.audit` makes a failure.
"""

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from backends import models
from data import benchmarks as registry
from data.judges import keyword_refusal
from data.scoring import verdict
from stages import artifacts, drawing, judging, maps, schemas

TABLES = {
    "01_calibrate/calibration.parquet": schemas.EXAMPLES,
    "01_calibrate/alignment.parquet": schemas.EXAMPLES,
    "01_calibrate/benchmarks.parquet": schemas.EXAMPLES,
    "02_conflict/gradients.parquet": schemas.GRADIENTS,
    "03_sensitivity/sweep_generations.parquet": schemas.SWEEP_GENERATIONS,
    "03_sensitivity/heads.parquet": schemas.HEADS,
    "04_align/arms.parquet": schemas.ARMS,
    "04_align/training.parquet": schemas.TRAINING,
    "05_evaluate/responses.parquet": schemas.RESPONSES,
    "05_evaluate/scores.parquet": schemas.SCORES,
}
SWEPT = {
    "03_sensitivity/sweep_choices.parquet": schemas.SWEEP_CHOICES,
    "03_sensitivity/sweep_answers.parquet": schemas.SWEEP_ANSWERS,
}
"""of utility rows: the one where some are answered by the next token, the other where some are in writing"""
NEURONS = "02_conflict/neurons.parquet"
"""where neurons were attributed (--pairs)"""
SAFETY_ROLES = ("safe", "plain", "attacked")
"""of calibration rows; all other roles are utility rows"""
GROUPS = ("calibration", "alignment", "benchmarks")
"""the tables of stage 01"""
BASE = ("base", "none", -1)
TOLERANCE = 1e-12

Arm = tuple[str, str, int]


class Finding(NamedTuple):
    """One line of the audit."""

    what: str
    ok: bool | None
    """None: what it needs is not on this machine"""
    detail: str


def finding(what: str, faults: Sequence[str], figure: str) -> Finding:
    """ok with `figure` where there are no faults, else the first three of them."""
    if not faults:
        return Finding(what, True, figure)
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Finding(what, False, "; ".join(faults[:3]) + more)


def unlike(
    column: str, places: Iterable[object], stored: Sequence, computed: Sequence, scale: float = 1.0
) -> list[str]:
    """A fault for each place where a column is not as recomputed (numbers: to 1e-12, or that of `scale`)."""
    stored, computed = np.asarray(stored), np.asarray(computed)
    if stored.shape != computed.shape:
        return [f"{column} has shape {stored.shape}, recomputed {computed.shape}"]
    if computed.dtype.kind == "f":
        differs = ~np.isclose(stored, computed, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
    else:
        differs = stored != computed
    differs = differs.reshape(len(differs), -1).any(axis=1)
    return [
        f"{place}: {column} is {_plain(stored[row])}, recomputed {_plain(computed[row])}"
        for row, place in enumerate(places)
        if differs[row]
    ]


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


class Run:
    """A finished run on disk. Tables are read once and checked against their schema."""

    def __init__(self, folder: Path, manifests: dict[str, dict]):
        self.folder, self.manifests = folder, manifests
        self._tables: dict[str, pa.Table] = {}

    def settings(self, stage: str) -> dict:
        return self.manifests[stage]["settings"]

    def table(self, relative: str) -> pa.Table:
        if relative not in self._tables:
            schema = (TABLES | SWEPT | {NEURONS: schemas.NEURONS}).get(relative)
            if schema is None:  # another map's
                schema = schemas.HEADS if "/heads-" in relative else schemas.GRADIENTS
            self._tables[relative] = artifacts.read_table(self.folder / relative, schema)
        return self._tables[relative]

    @cached_property
    def map_names(self) -> list[str]:
        """Names of the run's maps, its own ("") first."""
        settings = self.settings("01_calibrate")
        return [maps.OWN, *maps.asked(tuple(settings["maps"]), settings["folds"])]

    @cached_property
    def swept(self) -> dict[str, list[dict]]:
        """Utility rows by the table that their sweep is in; a row that several maps have stands once."""
        distinct = {}
        for role, rows in self.calibration.items():
            distinct |= {} if role in SAFETY_ROLES else {row["example_id"]: row for row in rows}
        kinds = [[], []]
        for row in distinct.values():
            kinds[row["scoring"] != "choice"].append(row)
        return {relative: rows for relative, rows in zip(SWEPT, kinds, strict=True) if rows}

    @property
    def tables(self) -> list[str]:
        """Every table that this run must have, as far as its manifests can tell."""
        others = [name for name in self.map_names if name]
        swept = self.manifests["03_sensitivity"]["outputs"]
        return [
            *TABLES,
            *(relative for relative in SWEPT if relative.split("/")[1] in swept),
            *([NEURONS] if self.settings("02_conflict")["pairs"] else []),
            *(f"02_conflict/{maps.file('gradients', name)}" for name in others),
            *(f"03_sensitivity/{maps.file('heads', name)}" for name in others),
        ]

    @cached_property
    def calibration(self) -> dict[str, list[dict]]:
        """Rows by role: util, safe, each other map's, and a pair's two where there are pairs."""
        rows = self.table("01_calibrate/calibration.parquet").to_pylist()
        roles = ["util", "safe", *(name for name in self.map_names if name)]
        roles += drawing.PAIR if self.settings("01_calibrate")["pairs"] else ()
        return {role: [row for row in rows if row["role"] == role] for role in roles}

    @cached_property
    def benchmarks(self) -> dict[str, list[dict]]:
        """Rows by benchmark, in the order of the file."""
        by_benchmark: dict[str, list[dict]] = {}
        for row in self.table("01_calibrate/benchmarks.parquet").to_pylist():
            by_benchmark.setdefault(row["role"], []).append(row)
        return by_benchmark

    @cached_property
    def asked(self) -> dict[str, registry.Asked]:
        settings = self.settings("01_calibrate")
        named = registry.asked(tuple(settings["benchmarks"]), bool(settings["util"]), bool(settings["safe"]))
        return {one.name: one for one in named}

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(L, H), from gradients.parquet, which must hold every head once, in order."""
        return self.check_grid("02_conflict/gradients.parquet", None)

    def check_grid(self, relative: str, expected: tuple[int, int] | None) -> tuple[int, int]:
        table = self.table(relative)
        found = list(zip(table["layer"].to_pylist(), table["head"].to_pylist(), strict=True))
        grid = expected or tuple(int(top) + 1 for top in np.max(found, axis=0))
        if found != list(np.ndindex(*grid)):
            raise ValueError(f"{relative} does not hold every head of {grid[0]} x {grid[1]} once, in order")
        return grid

    @cached_property
    def heads(self) -> list[tuple[int, int]]:
        return list(np.ndindex(*self.grid))

    @cached_property
    def model_folder(self) -> Path | None:
        """Where the weights and the tokenizer were; None where this machine has no such folder."""
        folder = Path(self.manifests["01_calibrate"]["notes"]["model_folder"])
        return folder if folder.is_dir() else None

    @cached_property
    def tokenizer(self):
        """The recorded tokenizer; None where it is not here, or not the recorded one."""
        if self.model_folder is None:
            return None
        if models.tokenizer_sha256(self.model_folder) != self.manifests["01_calibrate"]["notes"]["tokenizer"]:
            return None
        return models.load_tokenizer(self.model_folder)

    def covered(self, relative: str, examples: list[dict]) -> None:
        """ValueError unless a sweep table holds the clean model and every head x example once, in order."""
        table, ids = self.table(relative), [row["example_id"] for row in examples]
        silenced = [(-1, -1), *self.heads]
        if table.num_rows != len(silenced) * len(ids):
            raise ValueError(
                f"{relative}: {table.num_rows} rows, not {len(silenced)} x {len(ids)} (heads x rows)"
            )
        expected = ((*head, example_id) for head in silenced for example_id in ids)
        columns = (table[name].to_pylist() for name in ("layer", "head", "example_id"))
        for row, (found, wanted) in enumerate(zip(zip(*columns, strict=True), expected, strict=True)):
            if found != wanted:
                raise ValueError(f"{relative}, row {row}: is {found}, should be {wanted}")

    @cached_property
    def outcomes(self) -> dict[str, np.ndarray]:
        """bool [1 + L*H] of every utility row by its id, the clean model first: right, judged again."""
        found, judge = {}, cache(verdict)
        for relative, rows in self.swept.items():
            self.covered(relative, rows)
            if relative.endswith("sweep_choices.parquet"):
                prediction = self.table(relative)["prediction"].to_numpy().reshape(-1, len(rows))
                right = prediction == np.array([row["answer"] for row in rows])
            else:
                texts = self.table(relative)["text"].to_pylist()
                judged = [
                    judge(rows[at % len(rows)]["scoring"], text, rows[at % len(rows)]["target"])
                    for at, text in enumerate(texts)
                ]
                right = np.array(judged).reshape(-1, len(rows))
            found |= {row["example_id"]: right[:, at] for at, row in enumerate(rows)}
        return found

    def correct(self, name: str = maps.OWN) -> np.ndarray:
        """bool [1 + L*H, N] of a map's utility rows, the clean model first."""
        return np.stack(
            [self.outcomes[row["example_id"]] for row in self.calibration[name or "util"]], axis=1
        )

    @cached_property
    def refused(self) -> np.ndarray:
        """bool [1 + L*H, N], the clean model first: the keyword judge on every text of the sweep."""
        relative, examples = "03_sensitivity/sweep_generations.parquet", self.calibration["safe"]
        self.covered(relative, examples)
        judge = cache(keyword_refusal)  # silenced models mostly say what the clean one said
        texts = self.table(relative)["text"].to_pylist()
        return np.array([judge(text) for text in texts]).reshape(-1, len(examples))

    def gram(self, name: str = maps.OWN) -> np.ndarray:
        """A map's Gram matrices, float64 [L, H, 2F, 2F]."""
        folds, relative = self.settings("02_conflict")["folds"], f"02_conflict/{maps.file('gradients', name)}"
        if name:
            self.check_grid(relative, self.grid)
        matrices = self.table(relative)["gram"].to_pylist()
        return np.array(matrices, dtype=np.float64).reshape(*self.grid, 2 * folds, 2 * folds)

    @cached_property
    def arms(self) -> list[dict]:
        return self.table("04_align/arms.parquet").to_pylist()

    @cached_property
    def labels(self) -> list[Arm]:
        """The base model and every arm."""
        return [BASE, *((arm["arm"], arm["optimizer"], arm["seed"]) for arm in self.arms)]

    @cached_property
    def answers(self) -> dict[tuple[Arm, str], pa.Table]:
        """responses.parquet by arm x benchmark. ValueError unless each row is there once, in order."""
        relative = "05_evaluate/responses.parquet"
        table, first, found = self.table(relative), 0, {}
        count = len(self.labels) * sum(map(len, self.benchmarks.values()))
        if table.num_rows != count:
            raise ValueError(f"{relative} has {table.num_rows} rows, arms x benchmark rows are {count}")
        for label in self.labels:
            for name, asked in self.benchmarks.items():
                own = table.slice(first, len(asked))
                columns = [
                    own[key].to_pylist() for key in ("arm", "optimizer", "seed", "benchmark", "example_id")
                ]
                for at, (is_, row) in enumerate(zip(zip(*columns, strict=True), asked, strict=True)):
                    if is_ != (should := (*label, name, row["example_id"])):
                        raise ValueError(f"{relative}, row {first + at}: is {is_}, should be {should}")
                found[label, name], first = own, first + len(asked)
        return found

    @property
    def classified(self) -> bool:
        """Whether a classifier gave the verdicts on requests, which cannot be judged again here."""
        return self.manifests["05_evaluate"]["notes"].get("classifier") is not None

    @cached_property
    def judged(self) -> dict[tuple[Arm, str], pa.Table]:
        """Every arm x benchmark's responses judged again; a classifier's words are believed."""
        again = {}
        for (label, name), own in self.answers.items():
            benchmark, words = registry.BENCHMARKS[name], None
            if self.classified and benchmark.side != "utility":
                words = pa.table({"refusal": own["verdict"], "harmful": own["harmful"]})
            outputs = own.select(schemas.OUTPUTS.names)
            again[label, name] = judging.judged(outputs, self.benchmarks[name], benchmark, words)
        return again

    @cached_property
    def verdicts(self) -> dict[tuple[Arm, str], np.ndarray]:
        """bool [N] of every arm x benchmark, judged again."""
        return {cell: table["verdict"].to_numpy(zero_copy_only=False) for cell, table in self.judged.items()}

    @cached_property
    def scores(self) -> dict[tuple[Arm, str], float]:
        return {cell: int(passed.sum()) / len(passed) for cell, passed in self.verdicts.items()}
