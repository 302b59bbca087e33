"""What safety has cost each arm (Eq. 7 and 8, §4.1), its mean over seeds, and the intervals of both.

Tables have a row an arm as tuned: `ArmRun` with a seed, or without one for the mean over seeds; the untouched
model (`BASE_RUN`) is first. Scores are shares in [0, 1]; `R` resamples.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from pandas.api.typing import DataFrameGroupBy

from stages.method import metrics
from stages.method.arms import BASE_RUN, ArmRun
from stages.method.arrays import FloatArray
from stages.method.uncertainty import BOUNDS, fold_counts
from stages.report.words import NO_GAIN

SIDES = {"utility": "utility", "safety": "safety", "over_refusal": "over-refusal"}
"""column of the mean score -> side of its benchmarks"""
RATIOS = ["ucr", "source_cr", "over_refusal_cr"]
SELECTION = [
    *("n_heads", "n_layers", "n_neurons", "trainable_parameters"),
    *("mean_optimization_conflict", "mean_functional_sensitivity", "mean_conflict_score", "ranked_mean"),
]
"""what an arm tunes: columns of arms.parquet"""
COUNTS = ["seed", *SELECTION[:4]]

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


def cost_ratios(scores: Mapping, losses: Mapping[str, str]) -> dict[str, FloatArray]:
    """Each cost ratio by its formula, also where no safety was gained: there it means nothing.

    Args:
        scores: column -> [..., arms], the base model first; it has no ratio (NaN).
    """
    ratios, safety = {}, np.asarray(scores["safety"])
    for name, column in losses.items():
        after = np.asarray(scores[column])
        before = after[..., :1]
        if name == "over_refusal_cr":  # its loss is a rise
            before, after = after, before
        ratios[name] = metrics.utility_cost_ratio(before, after, safety[..., :1], safety)
        ratios[name][..., 0] = np.nan
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
    table[RATIOS] = pd.DataFrame(cost_ratios(table, losses), index=index).reindex(columns=RATIOS)
    table["flag"] = np.where(table["safety_gain"] <= 0, NO_GAIN, None)
    table = pd.concat([labels, arms.reindex(index)[SELECTION], table], axis=1)
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def mean_and_spread(groups: DataFrameGroupBy) -> pd.DataFrame:
    """Mean of each column in each group and, as `<column>_std` beside it, its sample standard deviation (NaN
    of fewer than two values)."""
    mean, std = groups.mean(), groups.std()
    std = std.mask(std.notna() & (groups.nunique() == 1), 0.0)  # exactly: of equal values rounding is left
    both = pd.concat([mean, std.add_suffix("_std")], axis=1)
    return both[[column for name in mean for column in (name, f"{name}_std")]]


def mean_over_seeds(costs: pd.DataFrame, losses: Mapping[str, str]) -> pd.DataFrame:
    """Every arm and optimizer: means over seeds, `<column>_std` beside each.

    A cost ratio is Eq. 7 (or 8) on the averaged scores, as in the paper's Table 7; NaN where no safety was
    gained on average. Its `_std`, where it has a ratio, is that of the ratios of the seeds that gained
    safety; `n_no_gain` counts the others.
    """
    runs = pd.Series([replace(run, seed=None) for run in costs.index], index=costs.index)
    numbers = costs.drop(columns=["arm", "optimizer", "seed", "flag"]).astype(float)
    numbers[RATIOS] = numbers[RATIOS].where(numbers["safety_gain"] > 0)
    means = mean_and_spread(numbers.groupby(runs, sort=False))
    means[RATIOS] = pd.DataFrame(cost_ratios(means, losses), index=means.index).reindex(columns=RATIOS)
    costly = [*RATIOS, *(f"{name}_std" for name in RATIOS)]
    means[costly] = means[costly].where(means["safety_gain"] > 0)
    means["flag"] = np.where(means["safety_gain"] <= 0, NO_GAIN, None)
    labels = pd.DataFrame([run.labels for run in means.index], index=means.index)[["arm", "optimizer"]]
    by_arm = (costs["safety_gain"] <= 0).groupby(runs, sort=False)
    labels["n_seeds"], labels["n_no_gain"] = by_arm.size(), by_arm.sum()
    return pd.concat([labels, means], axis=1)


# Intervals: benchmark rows and training seeds are both resampled


def resampled(
    responses: Mapping[ArmRun, pd.DataFrame],
    sides: Mapping[str, str],
    losses: Mapping[str, str],
    resamples: int,
    generator: np.random.Generator,
) -> Draws:
    """Scores, means by side and cost ratios of every arm in every resample of benchmark rows and seeds.

    All arms see the same draws, because all answered the same prompts: differences between them are paired.
    Each benchmark has two rows more, one of them passed and one failed (Agresti and Caffo 2000), which one
    being drawn for each arm: 40 of 40 rows are no proof of 100 %, nor equal rows of equal arms. Of S seeds
    each resample draws S - 1, which gives their mean its right variance (`fold_counts`); the seed of an arm
    that has one only (a draw, and every arm of a run with one seed) is held fixed. A ratio without a gain in
    safety is infinite.

    Args:
        responses: `Responses.of`.
    """
    verdicts = pd.DataFrame({run: lines["verdict"] for run, lines in responses.items()}, dtype=float)
    means = [replace(run, seed=None) for run in responses]
    arms = pd.Index(list(dict.fromkeys(means)), dtype=object)
    member = np.array([arms == mean for mean in means], dtype=float)  # [runs, arms]
    repeated = [run for run, mean in zip(responses, means, strict=True) if means.count(mean) > 1]
    share = {}
    if seeds := list(dict.fromkeys(run.seed for run in repeated)):
        drawn = fold_counts(len(seeds), generator, resamples)  # [R, S]
        share = dict(zip(seeds, (drawn / drawn.sum(axis=1, keepdims=True)).T, strict=True))
    fixed = np.ones(resamples)
    weights = [share[run.seed] if run in repeated else fixed for run in responses]
    weights = np.stack(weights, axis=1)  # [R, runs]
    draws = {}
    for name in sides:
        passed = verdicts[responses[BASE_RUN]["benchmark"] == name].to_numpy()
        rows = len(passed) + 2
        first = generator.random((resamples, len(arms))) < 0.5
        counts = generator.multinomial(rows, np.full(rows, 1 / rows), resamples)  # [R, rows]
        added = np.where(first, counts[:, [-2]], counts[:, [-1]])
        sums = (counts[:, :-2] @ passed * weights) @ member + added
        draws[name] = pd.DataFrame(sums / rows, columns=arms)
    for column, side in SIDES.items():
        if own := [draws[name] for name in sides if sides[name] == side]:
            draws[column] = sum(own) / len(own)
    return draws | drawn_ratios(draws, losses)


def drawn_ratios(draws: Draws, losses: Mapping[str, str]) -> Draws:
    """Cost ratios of resampled scores; without a gain in safety infinite."""
    gained = draws["safety"].gt(draws["safety"][BASE_RUN], axis=0)
    found = cost_ratios(draws, losses).items()
    return {name: pd.DataFrame(ratio, columns=gained.columns).where(gained, np.inf) for name, ratio in found}


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
