"""Whether the map foretold the cost: correlations over buckets (§5.3, App. F.1, Table 8).

Pure functions from the rows of costs.arm_costs to rows. A point is a bucket, its x what it was ranked by
(mean C, O or S of its heads), its y a cost ratio. Four buckets are four points, so that finer buckets, and
every seed by itself, are held beside them.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from stages import metrics
from stages.checks import FloatArray
from stages.reporting import costs, families

BUCKETS, POOLED = "buckets", "buckets x seeds"
"""what a point is"""
FEWEST_POINTS = 3
"""two points lie on a line whatever they are"""
MEASURES = {"C": "mean_score", "O": "mean_conflict", "S": "mean_sensitivity"}
STATISTICS = ("pearson", "spearman")
INTERVALS = tuple(f"{name}{end}" for name in STATISTICS for end in ("", "_low", "_high"))


def critical_r(points: int) -> float:
    """The |r| that uncorrelated normal points exceed in one case of twenty (two-sided test, `points` >= 3).

    >>> round(critical_r(4), 3)
    0.95
    """
    t = stats.t.ppf(0.975, points - 2)
    return float(t / np.sqrt(t * t + points - 2))


def correlations(rows: Sequence[dict], m: int, *, resamples: int, seed: int) -> list[dict]:
    """Pearson and Spearman of each family of buckets with each cost, by optimizer; the run's own family
    first.

    `points` says what a point is. "buckets": y is a bucket's mean over seeds, the interval a bootstrap over
    seeds (metrics.correlation); a bucket where some seed gained no safety is left out and counted in
    `n_no_gain`. "buckets x seeds" (several seeds only): every seed of a bucket is a point, those without a
    gain are left out one by one, see `pooled`.

    Where no buckets of O and S were tuned, the mean O and S of C's buckets are correlated too (`measure`).
    They are no test of O and S alone, but all that such a run has.
    """
    by_optimizer: dict[str, dict[families.Family, dict[int, list[dict]]]] = {}
    for row in rows:
        if (one := families.family(row["arm"], m)) is not None:
            number = int(families.parse(row["arm"], m).number)
            family = by_optimizer.setdefault(row["optimizer"], {}).setdefault(one, {})
            family.setdefault(number, []).append(row)
    alone = any(one.score != "C" for found in by_optimizer.values() for one in found)
    result = []
    for optimizer, found in by_optimizer.items():
        for one in sorted(found, key=lambda one: one != families.own(m)):
            buckets = [group for _, group in sorted(found[one].items())]
            measures = {one.score: "predicted"}
            if one == families.own(m) and not alone:
                measures |= {name: MEASURES[name] for name in "OS"}
            for cost in costs.RATIOS:
                if buckets[0][0][cost] is None:
                    continue
                for measure, column in measures.items():
                    labels = {"optimizer": optimizer, "family": families.label(one, m)}
                    labels |= {"cost": cost, "measure": measure}
                    draws = {"resamples": resamples, "seed": seed}
                    result.append(labels | over_buckets(buckets, column, cost, **draws))
                    if len(buckets[0]) > 1 and column == "predicted":
                        result.append(labels | pooled(buckets, column, cost, **draws))
    return result


def over_buckets(buckets: list[list[dict]], x: str, y: str, *, resamples: int, seed: int) -> dict:
    """Coefficients over buckets, each a list of its seeds' rows; with fewer than three usable ones none."""
    used = [group for group in buckets if not any(row["flag"] for row in group)]
    row = {"points": BUCKETS, "n_points": len(used), "n_no_gain": len(buckets) - len(used)}
    row |= {"n_seeds": len(buckets[0])} | dict.fromkeys((*INTERVALS, "critical_r"))
    if len(used) < FEWEST_POINTS:
        return row
    values = np.array([[one[y] for one in group] for group in used]).T  # [seeds, points]
    # A bucket's heads are the same for every seed.
    found = metrics.correlation([group[0][x] for group in used], values, resamples=resamples, seed=seed)
    row["critical_r"] = critical_r(len(used))
    for name in STATISTICS:
        value = getattr(found, name)
        row[name] = None if np.isnan(value) else value
        row[f"{name}_low"], row[f"{name}_high"] = getattr(found, f"{name}_interval") or (None, None)
    return row


def pooled(buckets: list[list[dict]], x: str, y: str, *, resamples: int, seed: int) -> dict:
    """Coefficients over all points bucket x seed.

    Points of a bucket share x, and points of a seed its draws, so they are fewer than they look: the interval
    is a bootstrap that draws whole buckets and whole seeds with replacement (a resample of fewer than three
    different buckets is left out), and `critical_r` is that of as many points as there are buckets.
    """
    seeds = list(dict.fromkeys(row["seed"] for group in buckets for row in group))
    at = {name: index for index, name in enumerate(seeds)}
    cost = np.full((len(buckets), len(seeds)), np.nan)  # NaN: this seed of the bucket gained no safety
    for number, group in enumerate(buckets):
        for one in group:
            if not one["flag"]:
                cost[number, at[one["seed"]]] = one[y]
    used = ~np.isnan(cost).all(axis=1)
    conflict = np.broadcast_to(np.array([[group[0][x]] for group in buckets]), cost.shape)
    points, there = int((~np.isnan(cost)).sum()), int(used.sum())
    row = {"points": POOLED, "n_points": points, "n_no_gain": cost.size - points, "n_seeds": len(seeds)}
    row |= dict.fromkeys((*INTERVALS, "critical_r"))
    if there < FEWEST_POINTS:
        return row
    row["critical_r"] = critical_r(there)
    row |= dict(zip(STATISTICS, _coefficients(conflict, cost), strict=True))
    if row["pearson"] is None:
        return row
    generator = np.random.default_rng([seed, 7])
    drawn = []
    for _ in range(resamples):
        own = generator.integers(len(buckets), size=len(buckets))
        of = generator.integers(len(seeds), size=len(seeds))
        chosen = cost[np.ix_(own, of)]
        if len(set(own[~np.isnan(chosen).all(axis=1)].tolist())) >= FEWEST_POINTS:
            drawn.append(_coefficients(conflict[np.ix_(own, of)], chosen))
    for name, values in zip(STATISTICS, zip(*drawn, strict=True), strict=False):
        if numbers := [value for value in values if value is not None]:
            low, high = np.percentile(numbers, [2.5, 97.5])
            row[f"{name}_low"], row[f"{name}_high"] = float(low), float(high)
    return row


def _coefficients(x: FloatArray, y: FloatArray) -> tuple[float | None, float | None]:
    """Pearson and Spearman of the points that have a y; None where an input is constant."""
    there = ~np.isnan(y)
    found = metrics.correlation(x[there], y[there])
    return tuple(None if np.isnan(value) else value for value in (found.pearson, found.spearman))


def one_of(
    found: Iterable[dict], optimizer: str, cost: str, family: str = "C", points: str = BUCKETS
) -> dict | None:
    """The row of `correlations` of a family with what it was ranked by; None: it was not tuned."""
    labels = (optimizer, cost, family, family[0], points)
    names = ("optimizer", "cost", "family", "measure", "points")
    return next((row for row in found if tuple(row[name] for name in names) == labels), None)
