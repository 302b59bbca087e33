"""How much the conflict map rests on its rows: every quantity of a head again, for resampled rows.

Rows are resampled in blocks, the folds of stage 02 (row n of D_util or D_safe is in fold n mod F): a resample
draws F - 1 of the F folds of each set with replacement, and O and H follow from the same draw, because they
rest on the same rows. F - 1 draws, not F, give the mean its right variance (with F it is too small by
(F - 1) / F; Rao and Wu 1988, "Resampling inference with complex survey data").

Axes: L layers, H heads, F folds, N rows, R resamples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.method.arrays import FloatArray, IntArray, count
from stages.method.gradients import checked_gram, combine_folds
from stages.method.metrics import (
    SensitivityVariant,
    buckets,
    conflict_score,
    functional_sensitivity,
    optimization_conflict,
)

BOUNDS = (0.025, 0.975)
"""quantiles of a 95 % interval"""


@dataclass(frozen=True)
class Outcomes:
    """What the sweep found on one set of rows: whether each was right (or refused)."""

    clean: np.ndarray
    """bool [N], of the clean model"""
    ablated: np.ndarray
    """bool [L, H, N], with each head ablated"""


class Resampling(NamedTuple):
    """How rows are drawn again."""

    generator: np.random.Generator
    resamples: int


@dataclass(frozen=True)
class MapIntervals:
    """95 % intervals and bucket frequencies over resamples."""

    low: dict[str, FloatArray]
    """by column of heads.parquet, [L, H]"""
    high: dict[str, FloatArray]
    bucket_probability: FloatArray
    """[L, H, M]: share of resamples in which a head falls into bucket 1..M, so how often a bucket survives a
    redraw of the map's own rows. It is not the probability of the true bucket: a resample has the rows' noise
    twice, once in the rows and once in the draw, which lifts |change| of heads without an effect."""


def fold_counts(folds: int, generator: np.random.Generator, resamples: int) -> IntArray:
    """How often each resample draws each fold, int [R, F]: F - 1 draws; a single fold is always drawn."""
    count("resamples", resamples)
    if count("folds", folds) == 1:
        return np.ones((resamples, 1), dtype=np.int64)
    return generator.multinomial(folds - 1, np.full(folds, 1 / folds), size=resamples)


def resampled_changes(outcomes: Outcomes, counts: IntArray) -> FloatArray:
    """Signed change of accuracy (or refusal rate) by ablating each head, in every resample, [R, L, H].

    Sums of whole numbers, divided once, so that equal changes stay exact ties. ValueError where the rows do
    not divide into the folds.
    """
    rows, folds = len(outcomes.clean), counts.shape[1]
    if rows % folds:
        raise ValueError(f"counts: {rows} rows do not divide into {folds} folds")
    change = outcomes.ablated.astype(np.float64) - outcomes.clean.astype(np.float64)  # (L, H, N)
    by_fold = change.reshape(*change.shape[:2], rows // folds, folds).sum(axis=2)  # (L, H, F)
    drawn = counts.sum(axis=1) * (rows // folds)  # rows a resample draws
    return np.einsum("rf,lhf->rlh", counts.astype(np.float64), by_fold) / drawn[:, None, None]


def map_intervals(
    gram: FloatArray,
    correct: Outcomes,
    refused: Outcomes,
    variant: SensitivityVariant,
    m: int,
    resampling: Resampling,
) -> MapIntervals:
    """Resamples of D_util's and D_safe's folds, and what they leave as intervals of O, H, S, C and buckets.

    Args:
        gram: [L, H, 2F, 2F], inner products of fold gradients, safe folds first.
        correct, refused: of D_util's and D_safe's rows, in the order in which they were folded.
    """
    gram = checked_gram(gram)
    folds = gram.shape[-1] // 2
    safe, util = (fold_counts(folds, *resampling) for _ in range(2))
    weights = (counts / counts.sum(axis=1, keepdims=True) for counts in (safe, util))
    drawn: dict[str, FloatArray] = {
        "optimization_conflict": optimization_conflict(*combine_folds(gram, *weights))
    }
    signed = {"h_gen": resampled_changes(correct, util), "h_safe": resampled_changes(refused, safe)}
    sizes = {name: np.abs(change) for name, change in signed.items()}
    maps: dict[str, list] = {"functional_sensitivity": [], "conflict_score": [], "bucket": []}
    for conflict, h_gen, h_safe in zip(drawn["optimization_conflict"], *sizes.values(), strict=True):
        sensitivity = functional_sensitivity(h_gen, h_safe, variant)
        score = conflict_score(conflict, sensitivity)
        maps["functional_sensitivity"].append(sensitivity)
        maps["conflict_score"].append(score)
        maps["bucket"].append(buckets(score, m))
    drawn |= {name: np.array(values) for name, values in maps.items()}
    low, high = {}, {}
    for name, values in drawn.items():
        # The bounds of a bucket are buckets that occurred.
        method = "nearest" if name == "bucket" else "linear"
        low[name], high[name] = np.quantile(values, BOUNDS, axis=0, method=method)
    for name, change in signed.items():
        low[name], high[name] = absolute_interval(*np.quantile(change, BOUNDS, axis=0))
    probability = np.stack([(drawn["bucket"] == number).mean(axis=0) for number in range(1, m + 1)], axis=-1)
    return MapIntervals(low, high, probability)


def absolute_interval(low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The interval of |x| from that of x: it begins at 0 where x may have either sign.

    >>> absolute_interval(np.array([-0.2, -0.3, 0.1]), np.array([0.1, -0.1, 0.4]))
    (array([0. , 0.1, 0.1]), array([0.2, 0.3, 0.4]))
    """
    ends = np.abs([low, high])
    return np.where((low <= 0) & (high >= 0), 0.0, ends.min(axis=0)), ends.max(axis=0)
