"""Whether the map predicted the cost: correlations over buckets (§5.3, App. F.1, Table 8).

A point is a bucket, its x what it was ranked by (mean C, O or S of its heads), its y a cost ratio. Four
buckets are four points, so that finer buckets, and each seed by itself, stand beside them.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from stages.method import metrics
from stages.method.arms import ArmRun
from stages.method.arrays import FloatArray
from stages.method.heads import COLUMN, Ranking
from stages.method.uncertainty import BOUNDS
from stages.report.costs import RATIOS, Draws
from stages.report.words import family_words

FEWEST_POINTS = 3
"""two points lie on a line whatever they are"""
STATISTICS = ("pearson", "spearman")
INTERVALS = [f"{name}{end}" for name in STATISTICS for end in ("", "_low", "_high")]
FAMILY = ["optimizer", "family", "buckets", "ranked_by", "map", "cost", "measure", "seed", "n_seeds"]
COLUMNS = [*FAMILY, "n_points", "n_no_gain", "n_dropped", *INTERVALS, "critical_r", "all_equal"]


def critical_r(points: int) -> float:
    """The |r| that uncorrelated normal points exceed in one case of twenty (two-sided test, `points` >= 3).

    >>> round(critical_r(4), 3)
    0.95
    """
    t = stats.t.ppf(0.975, points - 2)
    return float(t / np.sqrt(t * t + points - 2))


def families(means: pd.DataFrame, m: int) -> list[list[ArmRun]]:
    """The buckets of each ranking and optimizer, by number; of an optimizer the run's own family first."""
    buckets = [run for run in means.index if run.arm.kind == "bucket"]
    order = list(dict.fromkeys(run.optimizer for run in buckets))
    buckets.sort(key=lambda run: (order.index(run.optimizer), not run.arm.is_zone(m)))
    found: dict[tuple, list[ArmRun]] = {}
    for run in buckets:
        found.setdefault((run.optimizer, run.arm.ranked_by, run.arm.of, run.arm.map), []).append(run)
    return [sorted(family, key=lambda run: run.arm.bucket) for family in found.values()]


def correlations(costs: pd.DataFrame, means: pd.DataFrame, draws: Draws, m: int) -> pd.DataFrame:
    """Pearson and Spearman of each family of buckets with each cost ratio.

    Without `seed` the costs are those of the scores averaged over seeds, the intervals those of resampled
    rows and seeds. With several seeds each has rows of its own, without intervals.

    Where no buckets of O and S were tuned, the mean O and S of C's buckets are correlated too (`measure`).
    They are no test of O and S alone, but all that such a run has.
    """
    found, rows = families(means, m), []
    alone = any(family[0].arm.ranked_by != "C" for family in found)
    for family in found:
        first = family[0]
        labels = {"optimizer": first.optimizer, "family": family_words(first.arm, m)}
        labels |= {"buckets": first.arm.of, "ranked_by": first.arm.ranked_by, "map": first.arm.map}
        measures = "COS" if first.arm.is_zone(m) and not alone else first.arm.ranked_by
        seeds = [run.seed for run in costs.index if replace(run, seed=None) == first]
        for cost, measure in product((name for name in RATIOS if name in draws), measures):
            row = labels | {"cost": cost, "measure": measure, "n_seeds": len(seeds)}
            rows.append(row | over_buckets(means.loc[family], measure, cost, draws))
            for seed in seeds if len(seeds) > 1 else ():
                own = costs.loc[[replace(run, seed=seed) for run in family]]
                rows.append(row | {"seed": seed, "n_seeds": 1} | over_buckets(own, measure, cost))
    types = dict.fromkeys((*INTERVALS, "critical_r"), float) | dict.fromkeys(("seed", "n_dropped"), "Int64")
    return pd.DataFrame(rows, columns=COLUMNS).astype(types)


def over_buckets(buckets: pd.DataFrame, measure: Ranking, cost: str, draws: Draws | None = None) -> dict:
    """Coefficients over buckets that gained safety, the others counted in `n_no_gain`; 95 % intervals from
    the resampled costs in which each of them gained some, the others counted in `n_dropped`. Where there is
    no coefficient over enough points, `all_equal` says why: "costs", "values of C", or both."""
    used = buckets[buckets["safety_gain"] > 0]
    row = {"n_points": len(used), "n_no_gain": len(buckets) - len(used), **dict.fromkeys(INTERVALS)}
    if len(used) < FEWEST_POINTS:
        return row
    own = measure == used.index[0].arm.ranked_by
    x = used["ranked_mean" if own else f"mean_{COLUMN[measure]}"]
    row["critical_r"] = critical_r(len(used))
    found = metrics.correlation(x, used[cost])
    row |= {name: getattr(found, name) for name in STATISTICS}
    if np.isnan(found.pearson):
        axes = {f"values of {measure}": x, "costs": used[cost]}
        row["all_equal"] = " and ".join(name for name, values in axes.items() if is_constant(values))
    if draws is None or np.isnan(found.pearson):
        return row
    samples = draws[cost][list(used.index)].to_numpy()
    finite = np.isfinite(samples).all(axis=1)
    row["n_dropped"] = int((~finite).sum())
    for name, values in zip(STATISTICS, coefficients(x, samples[finite]), strict=True):
        if len(values := values[~np.isnan(values)]):
            # With few points r is skewed: an interval holds the coefficient itself.
            low, high = np.quantile(values, BOUNDS)
            row[f"{name}_low"], row[f"{name}_high"] = min(low, row[name]), max(high, row[name])
    return row


def is_constant(values: pd.Series) -> bool:
    """As `metrics.correlation` sees it: it has none even with their order."""
    return bool(np.isnan(metrics.correlation(values, np.arange(len(values))).pearson))


def coefficients(x: Sequence[float], y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Pearson's r and Spearman's rho of x [points] with each row of y [R, points]; NaN where it is constant.
    Values that agree in twelve decimals are ties."""
    y = np.round(y, 12)
    x, constant, found = np.broadcast_to(np.asarray(x), y.shape), np.ptp(y, axis=1) == 0, []
    for pair in ((x, y), (stats.rankdata(x, axis=1), stats.rankdata(y, axis=1))):
        one, other = (values - values.mean(axis=1, keepdims=True) for values in pair)
        lengths = np.sqrt((one * one).sum(axis=1) * (other * other).sum(axis=1))
        found.append((one * other).sum(axis=1) / np.where(constant, np.nan, lengths))
    return tuple(found)
