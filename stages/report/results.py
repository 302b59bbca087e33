"""All that stage 06 computes of a run, as what tables, claims, figures and the page are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import pandas as pd

from stages.method.arms import OWN, Arm, ArmRun, head_arm
from stages.method.heads import HeadMap, Sensitivity
from stages.report import drift
from stages.report.costs import Draws
from stages.report.drawn_arms import EQUAL, Family
from stages.run.maps import MapSpec

FULL, RANDOM = (head_arm(kind, None, 1) for kind in ("full", "random"))


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table with None for every missing value."""
    return table.astype(object).where(table.notna(), None)


@dataclass(frozen=True)
class Results:
    """The numbers of a run. Tables of arms are indexed by `ArmRun`."""

    m: int
    """number of buckets"""
    paper: str | None
    """the paper's model whose printed numbers stand beside the run's"""
    maps: tuple[MapSpec, ...]
    """the run's own, then the others"""
    heads: Mapping[str, HeadMap]
    """by name of the map"""
    sensitivity: Sensitivity
    """which outcomes S is made of"""
    reliability: pd.DataFrame
    """of every map, by every kind of outcome that was computed: the columns of RELIABILITY"""
    sides: Mapping[str, str]
    """benchmark -> side"""
    source: str | None
    """benchmark of Eq. 8"""
    costs: pd.DataFrame
    """of every seed: costs.arm_costs"""
    means: pd.DataFrame
    """over seeds: costs.with_intervals"""
    draws: Draws
    correlations: pd.DataFrame
    failures: pd.DataFrame
    drawn: Sequence[Family]
    """arms drawn to be predicted"""
    predictions: pd.DataFrame
    """what each map says of their costs: drawn_arms.predictions"""
    drift: pd.DataFrame
    """how far the map of each tuned model moved: drift.drift_tables; empty without --drift"""
    drift_layers: pd.DataFrame
    """the same of each layer"""
    redraws: pd.DataFrame
    """drift.redraw_table"""
    judges: pd.DataFrame
    """agreement.table; empty where the keyword judge was alone"""

    def benchmarks(self, side: str) -> list[str]:
        """Of one side."""
        return [name for name, its_side in self.sides.items() if its_side == side]

    @cached_property
    def several_seeds(self) -> bool:
        return int(self.means["n_seeds"].max()) > 1

    @cached_property
    def tuned(self) -> list[ArmRun]:
        """All arms but the base model."""
        return list(self.means.index[1:])

    @cached_property
    def main(self) -> list[ArmRun]:
        """Tuned arms of the paper's main comparison."""
        return [run for run in self.tuned if run.arm.is_main(self.m)]

    @cached_property
    def neurons(self) -> list[ArmRun]:
        """NeuronTune's tuned arms."""
        return [run for run in self.tuned if run.arm.of_neurons]

    @cached_property
    def ablations(self) -> list[ArmRun]:
        """All other tuned arms."""
        return [run for run in self.tuned if run not in self.main and run not in self.neurons]

    @cached_property
    def optimizers(self) -> list[str]:
        """Of the main comparison, in order."""
        return list(dict.fromkeys(run.optimizer for run in self.main))

    @cached_property
    def drift_means(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Drift of models and of layers, over seeds and draws."""
        arms = {run.arm.name: run.arm for run in self.tuned}
        return tuple(drift.means(table, arms, self.m) for table in (self.drift, self.drift_layers))

    @cached_property
    def by_domain(self) -> list[tuple[str, MapSpec, Sensitivity, dict[str, dict]]]:
        """C of each map against the graded cost of each benchmark at equal safety: map along which arms were
        drawn, MapSpec that predicts, what its S is made of (the run's own kind first), and by benchmark the
        rows of the predictions."""
        rows = self.predictions
        if rows.empty:
            return []
        rows = rows[(rows["predictor"] == "C") & (rows["outcome"] == "graded") & (rows["at"] == EQUAL)]
        labels = ["draws", "map", "sensitivity"]
        return [
            (family.along.name, spec, kind, plain(own.set_index("benchmark")).to_dict("index"))
            for family in self.drawn
            for spec in self.maps
            for kind in sorted(get_args(Sensitivity), key=lambda kind: kind != self.sensitivity)
            if len(own := rows[(rows[labels] == [family.along.name, spec.name, kind]).all(axis=1)])
        ]

    def map_reliability(self, quantity: str) -> dict:
        """A quantity's row of the run's own map as it is used, None for what is unknown."""
        rows = self.reliability
        own = rows[(rows["map"] == OWN) & (rows["sensitivity"] == self.sensitivity)]
        return plain(own[own["quantity"] == quantity]).iloc[0].to_dict()

    def find(self, arm: Arm, optimizer: str) -> ArmRun | None:
        """An arm as tuned; None: it was not."""
        run = ArmRun(arm, optimizer, None)
        return run if run in self.means.index else None

    def bucket(self, number: int, optimizer: str) -> ArmRun | None:
        """One of the run's own buckets as tuned."""
        return self.find(head_arm("bucket", number, self.m), optimizer)

    def buckets(self, optimizer: str, **of: str) -> list[ArmRun]:
        """Those of a ranking that were tuned, by number; `ranked_by` and `map_name` as in `head_arm`."""
        arms = (head_arm("bucket", number, self.m, **of) for number in range(1, self.m + 1))
        return [run for arm in arms if (run := self.find(arm, optimizer))]

    def correlation(self, optimizer: str, cost: str, ranked_by: str = "C", of: int | None = None) -> dict:
        """Over buckets of the run's own map, seeds averaged, None for what it lacks; empty: they were not
        tuned."""
        labels = {"optimizer": optimizer, "cost": cost, "ranked_by": ranked_by, "measure": ranked_by}
        labels |= {"buckets": of or self.m, "map": OWN}
        same = (self.correlations[list(labels)] == pd.Series(labels)).all(axis=1)
        rows = self.correlations[same & self.correlations["seed"].isna()]
        return {} if rows.empty else plain(rows).iloc[0].to_dict()
