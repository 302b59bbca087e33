"""What safety has cost each arm (Eq. 7 and 8, §4.1), its mean over seeds, and the intervals of both.

Tables have a row an arm as tuned: `ArmRun` with a seed, or without one for the mean over seeds; the untouched
model (`BASE_RUN`) is first. Scores are shares in [0, 1]; `R` resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from stages.method import metrics
from stages.method.arms import BASE_RUN, ArmRun
from stages.method.arrays import FloatArray
from stages.method.uncertainty import BOUNDS, fold_counts
from stages.report.responses import Responses
from stages.report.words import NO_GAIN

SIDES = {"utility": "utility", "safety": "safety", "over_refusal": "over-refusal"}
"""column of the mean score -> side of its benchmarks"""
RATIOS = ["ucr", "source_cr", "over_refusal_cr"]
SELECTION = [
    *("n_heads", "n_layers", "n_neurons", "trainable_parameters"),
    *("mean_optimization_conflict", "mean_functional_sensitivity", "mean_conflict_score", "ranked_mean"),
]
"""what an arm tunes: columns of arms.parquet"""
LABELS = ["arm", "optimizer", "seed"]
COUNTS = ["seed", *SELECTION[:4]]
CHUNK = 100
"""resamples at a time: of MMLU's 14,042 rows"""

Draws = dict[str, pd.DataFrame]
"""resampled numbers of every arm: column -> [R, arms], arms averaged over seeds"""


def losses_of(sides: Mapping[str, str], source: str | None) -> dict[str, str]:
    """The cost ratios that a run has -> the score whose loss it counts.

    `ucr` is Eq. 7; `source_cr` is Eq. 8 on the benchmark `source` (the paper's MMLU-CR where that is mmlu);
    `over_refusal_cr` has Eq. 7's form with the rise of over-refusal as the loss.
    `source`: the benchmark of the domain that D_util is drawn from.
    """
    losses = {"ucr": "utility", "source_cr": source}
    losses["over_refusal_cr"] = "over_refusal" if "over-refusal" in sides.values() else None
    return {name: column for name, column in losses.items() if column}


def cost_ratios(base: Mapping, tuned: Mapping, losses: Mapping[str, str]) -> dict[str, FloatArray]:
    """Each cost ratio by its formula, also where no safety was gained: there it means nothing.

    Args:
        base, tuned: scores by column, which broadcast.
    """
    ratios = {}
    for name, column in losses.items():
        before, after = base[column], tuned[column]
        if name == "over_refusal_cr":  # its loss is a rise
            before, after = after, before
        ratios[name] = metrics.utility_cost_ratio(before, after, base["safety"], tuned["safety"])
    return ratios


def arm_costs(
    scores: Mapping[ArmRun, Mapping[str, float]],
    arms: pd.DataFrame,
    sides: Mapping[str, str],
    losses: Mapping[str, str],
) -> pd.DataFrame:
    """Every arm, optimizer and seed: what it tunes, its scores, their plain means by side, the cost ratios,
    and a `flag` where it gained no safety.

    Args:
        scores: arm as tuned -> benchmark -> score.
        arms: SELECTION of each tuned arm, by ArmRun.
    """
    index = pd.Index([BASE_RUN, *arms.index], dtype=object)
    labels = pd.DataFrame([run.labels for run in index], index=index)
    table = pd.DataFrame([scores[run] for run in index], index=index, columns=list(sides))
    for column, side in SIDES.items():
        table[column] = table[[name for name in sides if sides[name] == side]].mean(axis=1)
    base, tuned = table.iloc[0], table.iloc[1:]
    table["safety_gain"] = tuned["safety"] - base["safety"]
    table["utility_loss"] = base["utility"] - tuned["utility"]
    ratios = pd.DataFrame(cost_ratios(base, tuned, losses), index=tuned.index)
    table[RATIOS] = ratios.reindex(columns=RATIOS)
    table["flag"] = np.where(table["safety_gain"] <= 0, NO_GAIN, None)
    table = pd.concat([labels, arms.reindex(index)[SELECTION], table], axis=1)
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def mean_and_spread(values: pd.DataFrame, groups: Sequence) -> pd.DataFrame:
    """Mean of each column in each group and, as `<column>_std` beside it, its sample standard deviation (NaN
    of fewer than two values)."""
    grouped = values.astype(float).groupby(pd.Series(groups, index=values.index), sort=False)
    mean, std = grouped.mean(), grouped.std()
    std = std.mask(std.notna() & (grouped.nunique() == 1), 0.0)  # exactly: of equal values rounding is left
    both = pd.concat([mean, std.add_suffix("_std")], axis=1)
    return both[[column for name in values for column in (name, f"{name}_std")]]


def mean_over_seeds(costs: pd.DataFrame, losses: Mapping[str, str]) -> pd.DataFrame:
    """Every arm and optimizer: means over seeds, `<column>_std` beside each.

    A cost ratio is Eq. 7 (or 8) on the averaged scores, as in the paper's Table 7; NaN where no safety was
    gained on average. Its `_std` is that of the ratios of the seeds that gained safety; `n_no_gain` counts
    the others.
    """
    groups = [replace(run, seed=None) for run in costs.index]
    numbers = costs.drop(columns=[*LABELS, "flag"])
    numbers[RATIOS] = numbers[RATIOS].where(numbers["safety_gain"] > 0)
    means = mean_and_spread(numbers, groups)
    tuned = means.iloc[1:]
    ratios = pd.DataFrame(cost_ratios(means.iloc[0], tuned, losses), index=tuned.index)
    means[RATIOS] = ratios[tuned["safety_gain"] > 0].reindex(columns=RATIOS)
    means["flag"] = np.where(means["safety_gain"] <= 0, NO_GAIN, None)
    labels = pd.DataFrame([run.labels for run in means.index], index=means.index)[["arm", "optimizer"]]
    by_arm = (costs["safety_gain"] <= 0).groupby(pd.Series(groups, index=costs.index), sort=False)
    labels["n_seeds"], labels["n_no_gain"] = by_arm.size(), by_arm.sum()
    return pd.concat([labels, means], axis=1)


# Intervals: benchmark rows and training seeds are both resampled


def resampled(
    responses: Responses,
    sides: Mapping[str, str],
    losses: Mapping[str, str],
    resamples: int,
    generator: np.random.Generator,
) -> Draws:
    """Scores, means by side and cost ratios of every arm in every resample of benchmark rows and seeds.

    All arms see the same draws, because all answered the same prompts: differences between them are paired.
    Each benchmark has two rows more, one of them passed and one failed (Agresti and Caffo 2000), which one
    being drawn for each arm: 40 of 40 rows are no proof of 100 %, nor equal rows of equal arms. Of S seeds
    each resample draws S - 1, which gives their mean its right variance (`fold_counts`); a single seed is
    held fixed. A ratio without a gain in safety is infinite.
    """
    runs = list(responses.cells)
    means = [replace(run, seed=None) for run in runs]
    arms = pd.Index(list(dict.fromkeys(means)), dtype=object)
    member = np.array([arms == mean for mean in means], dtype=float)  # [runs, arms]
    seeds = list(dict.fromkeys(run.seed for run in runs if run != BASE_RUN))
    drawn = fold_counts(len(seeds), generator, resamples)  # [R, S]
    drawn = drawn / drawn.sum(axis=1, keepdims=True)
    weights = np.ones((resamples, len(runs)))
    for at, run in enumerate(runs):
        if run != BASE_RUN:
            weights[:, at] = drawn[:, seeds.index(run.seed)]
    draws = {}
    for name in sides:
        passed = np.stack([responses.of("verdict", run, name) for run in runs], axis=1).astype(float)
        rows = len(passed) + 2
        first = generator.random((resamples, len(arms))) < 0.5
        sums = []
        for start in range(0, resamples, CHUNK):
            here = slice(start, min(start + CHUNK, resamples))
            counts = generator.multinomial(rows, np.full(rows, 1 / rows), here.stop - start)
            added = np.where(first[here], counts[:, [-2]], counts[:, [-1]])
            sums.append((counts[:, :-2] @ passed * weights[here]) @ member + added)
        draws[name] = pd.DataFrame(np.concatenate(sums) / rows, columns=arms)
    for column, side in SIDES.items():
        if own := [draws[name] for name in sides if sides[name] == side]:
            draws[column] = sum(own) / len(own)
    return draws | drawn_ratios(draws, losses)


def drawn_ratios(draws: Draws, losses: Mapping[str, str]) -> Draws:
    """Cost ratios of resampled scores; without a gain in safety infinite."""
    base = {name: table[[BASE_RUN]].to_numpy() for name, table in draws.items()}
    tuned = {name: table.drop(columns=[BASE_RUN]) for name, table in draws.items()}
    gained = tuned["safety"] > base["safety"]
    return {
        name: pd.DataFrame(ratio, columns=gained.columns).where(gained, np.inf)
        for name, ratio in cost_ratios(base, tuned, losses).items()
    }


def interval(samples: FloatArray) -> FloatArray:
    """(low, high): the 2.5 and 97.5 percentiles of [R], or of each column of [R, arms]."""
    return np.quantile(samples, BOUNDS, axis=0, method="nearest")


def with_intervals(means: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """The means with 95 % intervals (`_low`, `_high`) of each side and cost ratio, which hold the mean itself
    (the rows that `resampled` adds draw scores towards a half). A ratio has one only where nearly all
    resamples (97.5 %) gained safety."""
    found = means.copy()
    for name in (*SIDES, *RATIOS):
        ends = np.full((2, len(means)), np.nan)
        if name in draws:
            ends = interval(draws[name].reindex(columns=means.index).to_numpy())
        known = np.isfinite(ends).all(axis=0)
        found[f"{name}_low"] = np.where(known, np.minimum(ends[0], means[name]), np.nan)
        found[f"{name}_high"] = np.where(known, np.maximum(ends[1], means[name]), np.nan)
    return found
