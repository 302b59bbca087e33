"""Two runs of one method, quantity by quantity: how far they differ, and how far they may.

Rows are matched by their keys, so the order of arms and rows does not matter. No model is needed.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from backends.core.errors import InputError
from backends.models import MODEL_HASHES
from stages.checks.finished import LABELS, FinishedRun, differs, plain, unequal
from stages.checks.tuning import gains, lora, stored_arms
from stages.method.arms import BASE_RUN, ArmRun
from stages.method.drift import rank_correlation
from stages.run import schemas
from stages.run.schemas import OWN_MAP, Table
from stages.run.settings import GROUPS
from stages.run.store import differences
from stages.run.sweep import TABLES


class Quantity(NamedTuple):
    """A column of a table, held to a tolerance: in float32, and where either run is in half precision; None:
    only reported."""

    name: str
    table: Table
    column: str
    measure: Literal["largest", "mean", "rank", "equal"]
    full: float | None
    half: float | None = None


# What two backends showed is in docs/LOG.md; the bounds leave room for another processor's rounding.
# Half precision decides most near-ties of responses otherwise, and with them refusals, H_safe, S and buckets
# (bfloat16 against float32, one backend: 40 % of responses and 53 % of buckets equal).
UPDATES = Quantity("updates", schemas.TRAINING, "", "largest", 0.01)
BASE = Quantity("responses, base", schemas.RESPONSES, "output", "equal", 0.99)
NEAR_TIES = Quantity("near-ties", schemas.RESPONSES, "", "largest", 1e-3)
# Updates within t of one another are apart by |a - b|² <= 2 t |a|² at most, and so, to first order, is what
# they did to the map. 1 - r of two maps is half their squared distance by their variance: t at most, where
# tuning moved the map no further than its heads differ.
DRIFT_RANK = 1 - UPDATES.full
DRIFTED = {"O": "optimization_conflict", "H_gen": "h_gen", "H_safe": "h_safe"}
DRIFTED |= {"S": "functional_sensitivity", "C": "conflict_score"}
QUANTITIES = (
    Quantity("gradients", schemas.GRADIENTS, "gram", "largest", 1e-5),  # in units of fold gradients' norms
    Quantity("gates, utility", schemas.GRADIENTS, "gate_util", "largest", 1e-4),  # relative to the largest
    Quantity("gates, safety", schemas.GRADIENTS, "gate_safe", "largest", 1e-4),
    Quantity("graded outcomes", schemas.SWEEP_GRADED, "graded", "largest", 1e-3),
    Quantity("predictions", schemas.SWEEP_CHOICES, "prediction", "equal", 0.99, 0.95),
    Quantity("worked answers", schemas.SWEEP_ANSWERS, "token_ids", "equal", 0.99),
    Quantity("generations", schemas.SWEEP_GENERATIONS, "token_ids", "equal", 0.99),
    Quantity("O", schemas.HEADS, "optimization_conflict", "largest", 1e-5, 0.1),
    Quantity("H_gen", schemas.HEADS, "h_gen", "mean", 0.005),
    Quantity("H_safe", schemas.HEADS, "h_safe", "mean", 0.005),
    Quantity("S", schemas.HEADS, "functional_sensitivity", "rank", 0.99),
    Quantity("C", schemas.HEADS, "conflict_score", "rank", 0.99),
    Quantity("buckets", schemas.HEADS, "bucket", "equal", 0.99),
    Quantity("neurons' safety", schemas.NEURONS, "safety_score", "largest", 1e-4),  # relative to the largest
    Quantity("neurons' utility", schemas.NEURONS, "utility_score", "largest", 1e-4),
    Quantity("training losses", schemas.TRAINING, "loss", "mean", 1e-3, 0.2),
    BASE,
    Quantity("responses, tuned", schemas.RESPONSES, "output", "equal", None),  # scores hold them
    Quantity("scores", schemas.SCORES, "score", "largest", 0.03),
    *(
        Quantity(f"{name}, tuned", schemas.DRIFT, column, "rank", DRIFT_RANK)
        for name, column in DRIFTED.items()
    ),
    Quantity("buckets, tuned", schemas.DRIFT, "bucket", "equal", None),  # C's ranks hold them
)
CALIBRATED = (schemas.GRADIENTS, schemas.NEURONS, *TABLES.values())
"""what is compared row by row of the calibration set; a map is compared whatever it was made from"""


class Row(NamedTuple):
    """What was found of a quantity: how many were compared, their largest and mean difference, Spearman's
    correlation (of maps of tuned models the lowest), the share that is equal; None where a measure does not
    apply."""

    quantity: str
    compared: str
    largest: float | None = None
    mean: float | None = None
    rank: float | None = None
    equal: float | None = None
    allowed: str = ""
    ok: bool | None = None
    """None: not held to a tolerance, or not comparable"""
    note: str = ""


class Comparison:
    """Two runs of one model, finished up to stage 05. InputError where they are of different models."""

    def __init__(self, first: FinishedRun, second: FinishedRun):
        self.first, self.runs = first, (first, second)
        models = [run.manifest("02_conflict")["model"] for run in self.runs]
        hashes = [[model.get(name) for name in MODEL_HASHES] for model in models]
        if hashes[0] != hashes[1] or first.heads != second.heads:
            raise InputError(f"{first.folder} and {second.folder} are runs of different models")
        self.half = any(model["dtype"] != "float32" for model in models)
        names = ["layers", "heads", "safety_neurons", "utility_neurons"]
        rows = [dict(stored_arms(run)) for run in self.runs]
        own, others = (
            {tuned: plain([row[name] for name in names]) for tuned, row in each.items()} for each in rows
        )
        alike = [tuned for tuned in own if own[tuned] == others.get(tuned)]
        self.arms: list[ArmRun] = alike if self.same_rows(schemas.ALIGNMENT) else []
        """that both runs tuned alike: the same heads or neurons, seed and rows"""

    def rows(self) -> list[Row]:
        """All quantities but near-ties."""
        maps = [name for name in self.first.map_names if name in self.runs[1].map_names]
        found = [self.updates()]
        for quantity in QUANTITIES:
            names = maps if quantity.table.per_map else [OWN_MAP]
            found += [self.row(quantity, name) for name in names if self.first.has(quantity.table)]
        return found

    def same_rows(self, table: Table, split: str | None = None) -> bool:
        """Whether a table of examples, or a split of it, holds the same rows, token by token, in both."""
        columns = ["example_id", "split", "prompt_ids", "target_ids", "choice_ids", "refusal_ids", "answer"]
        left, right = (run.read(table)[columns] for run in self.runs)
        if split is not None:
            left, right = (rows[rows["split"] == split] for rows in (left, right))
        return not unequal(left, right)

    @cached_property
    def benchmarks(self) -> list[str]:
        """Benchmarks of the same rows in both runs."""
        names = self.first.read(schemas.BENCHMARKS)["split"].unique()
        return [name for name in names if self.same_rows(schemas.BENCHMARKS, name)]

    def settings(self) -> str:
        """The settings in which the runs differ, where they are and what computes them aside; empty: none."""
        groups = [name for name in GROUPS if name != "run"]
        return differences(*(run.settings.group(*groups) for run in self.runs))

    def obstacle(self, table: Table) -> str:
        """Why a table cannot be compared: one run has none, or it rests on other calibration rows or folds;
        empty: it can."""
        if not all(run.has(table) for run in self.runs):
            return "in one run only"
        if table in CALIBRATED and not self.same_rows(schemas.CALIBRATION):
            return "other calibration rows"
        if table is schemas.GRADIENTS and len({run.settings.data.folds for run in self.runs}) > 1:
            return "other folds"
        return ""

    def paired(self, quantity: Quantity, map_name: str = OWN_MAP) -> pd.DataFrame:
        """Rows of both runs by their keys, the other run's columns with "_other"; a row that only one of them
        has is there too. Of models that only one of them has, or tuned otherwise, there is none."""
        table, keys = quantity.table, [name for name in LABELS if name in quantity.table.schema.names]
        left, right = (run.read(table, map_name) for run in self.runs)
        if table in (schemas.SCORES, schemas.RESPONSES):
            left, right = (rows[rows["benchmark"].isin(self.benchmarks)] for rows in (left, right))
        if table is schemas.SCORES:  # averaged over each run's seeds
            keys.remove("seed")
            sides = (rows.groupby(keys, dropna=False, as_index=False) for rows in (left, right))
            left, right = (side["score"].mean() for side in sides)
        elif table in (schemas.TRAINING, schemas.RESPONSES, schemas.DRIFT):
            chosen = [BASE_RUN] if quantity is BASE else self.arms
            wanted = pd.DataFrame([tuned.labels for tuned in chosen], columns=keys[:3], dtype=object)
            left, right = (rows.astype(dict.fromkeys(keys[:3], object)) for rows in (left, right))
            left, right = (rows.merge(wanted, on=keys[:3]) for rows in (left, right))
        how = "inner" if table is schemas.SCORES else "outer"  # runs may have other arms
        return left.merge(right, on=keys, how=how, suffixes=("", "_other"), validate="1:1", indicator="side")

    def row(self, quantity: Quantity, map_name: str = OWN_MAP) -> Row:
        label = quantity.name if map_name == OWN_MAP else f"{quantity.name} ({map_name})"
        if why := self.obstacle(quantity.table):
            return Row(label, "not compared", note=why)
        table = self.paired(quantity, map_name)
        if table.empty:
            note = (
                "no model with the same heads, seed and rows" if self.benchmarks else "other benchmark rows"
            )
            return Row(label, "not compared", note=note)
        compared, alone = f"{len(table)}", int((table["side"] != "both").sum())
        if alone:
            return Row(label, compared, ok=False, note=f"{alone} rows are in one run only")
        left, right = table[quantity.column], table[f"{quantity.column}_other"]
        if quantity.measure == "equal":
            return self.held(quantity, Row(label, compared, equal=float((~differs(right, left)).mean())))
        left, right = numbers(quantity, left, right)
        apart, parts = np.abs(left - right), [slice(None)]
        if quantity.table is schemas.DRIFT:  # one model's map would be lost among those of many
            parts = list(table.groupby(list(LABELS[:3])).indices.values())
        ranks = [rank_correlation(left[part], right[part]) for part in parts]
        rank = None if None in ranks else min(ranks)
        return self.held(quantity, Row(label, compared, float(apart.max()), float(apart.mean()), rank))

    def held(self, quantity: Quantity, row: Row) -> Row:
        """The row with its tolerance and whether it holds."""
        bound = quantity.half if self.half else quantity.full
        if bound is None:
            return row
        value, least = getattr(row, quantity.measure), quantity.measure in ("rank", "equal")
        ok = row.largest == 0 or (value is not None and (value >= bound if least else value <= bound))
        return row._replace(allowed=f"{quantity.measure} {bound:g}", ok=ok)

    def updates(self) -> Row:
        """ΔW of W_q, or gains - 1, of every arm that both runs tuned alike: `update_difference`."""
        if not self.arms:
            return Row(UPDATES.name, "not compared", note="no model with the same heads, seed and rows")
        apart = []
        for tuned in self.arms:
            a, b = (factors(run, tuned) for run in self.runs)
            apart.append(update_difference(inner(a, a), inner(a, b), inner(b, b)))
        return self.held(UPDATES, Row(UPDATES.name, f"{len(apart)}", max(apart), float(np.mean(apart))))


def factors(run: FinishedRun, tuned: ArmRun) -> list[tuple[np.ndarray, np.ndarray]]:
    """Matrices B, A of an arm's update, whose products B A are its layers."""
    if tuned.arm.of_neurons:
        return [(gains(run, tuned).astype(float).reshape(-1, 1) - 1, np.ones((1, 1)))]
    scale = run.settings.tuning.alpha / run.settings.tuning.rank
    return [(scale * b.astype(float), a.astype(float)) for _, a, b in lora(run, tuned)]


def inner(left: Sequence[tuple], right: Sequence[tuple]) -> float:
    """<B A, B' A'> summed over layers, from r x r matrices: tr(Aᵀ Bᵀ B' A')."""
    pairs = zip(left, right, strict=True)
    return sum(float(((b.T @ other_b) * (a @ other_a.T)).sum()) for (b, a), (other_b, other_a) in pairs)


def numbers(quantity: Quantity, left: pd.Series, right: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Both sides in the unit that the tolerance is in."""
    if quantity.column == "gram":
        left, right = np.stack(left), np.stack(right)
        side = math.isqrt(left.shape[1])  # 2F
        norms = np.sqrt(left.reshape(-1, side, side).diagonal(axis1=1, axis2=2) + np.finfo(float).tiny)
        unit = (norms[:, :, None] * norms[:, None, :]).reshape(left.shape)
        return (left / unit).ravel(), (right / unit).ravel()
    if quantity.column.startswith("gate"):
        left, right = (pd.Series(np.concatenate(list(each))) for each in (left, right))
    left, right = left.to_numpy(float), right.to_numpy(float)
    relative = quantity.table is schemas.NEURONS or quantity.column.startswith("gate")
    unit = np.abs(left).max() if relative else 1.0
    return left / unit, right / unit


def update_difference(aa: float, ab: float, bb: float) -> float:
    """How far two updates a and b differ along themselves, from their inner products: the larger of
    |<a - b, a>| / <a, a> and |<a - b, b>| / <b, b>.

    Adam's first steps are signs: a component whose gradient is nothing but rounding moves by the whole rate,
    in a direction that the processor chooses. If k of n components do, |a - b| / |a| is 2 sqrt(k / n), but
    this is 2 k / n: a flipped component counts with its own share of the update. A wrong rate or scale counts
    in full, and both being below t bounds |a - b|² by t (|a|² + |b|²).
    """
    if not aa or not bb:
        return float(aa != bb)
    return max(abs(aa - ab) / aa, abs(bb - ab) / bb)
