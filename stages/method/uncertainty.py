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
from stages.method.heads import HeadMap
from stages.method.metrics import (
    SensitivityVariant,
    buckets,
    conflict_score,
    functional_sensitivity,
    optimization_conflict,
    unit_range,
)

BOUNDS = (0.025, 0.975)
"""quantiles of a 95 % interval"""


@dataclass(frozen=True)
class Outcomes:
    """What the sweep found on one set of rows: whether each was right (or refused), or its graded outcome."""

    clean: np.ndarray
    """bool or float [N], of the clean model"""
    ablated: np.ndarray
    """bool or float [L, H, N], with each head ablated"""

    @property
    def effects(self) -> FloatArray:
        """What ablating each head changes of each row, [L, H, N]."""
        return self.ablated.astype(np.float64) - self.clean.astype(np.float64)


class Effects(NamedTuple):
    """What ablating each head changes of each row's outcome."""

    util: FloatArray
    """[L, H, N], rows of D_util in the order in which they were folded"""
    safe: FloatArray
    """of D_safe"""


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


def resampled_changes(effects: FloatArray, counts: IntArray) -> FloatArray:
    """Mean effect [L, H, N] of ablating each head in every resample, with its sign, [R, L, H].

    Sums, divided once, so that equal changes of counted outcomes stay exact ties. ValueError where the rows
    do not divide into the folds.
    """
    rows, folds = effects.shape[-1], counts.shape[1]
    if rows % folds:
        raise ValueError(f"counts: {rows} rows do not divide into {folds} folds")
    by_fold = effects.reshape(*effects.shape[:2], rows // folds, folds).sum(axis=2)  # (L, H, F)
    drawn = counts.sum(axis=1) * (rows // folds)  # rows a resample draws
    return np.einsum("rf,lhf->rlh", counts.astype(np.float64), by_fold) / drawn[:, None, None]


def draw_maps(
    gram: FloatArray,
    effects: Effects,
    counts: tuple[IntArray, IntArray],
    variant: SensitivityVariant,
    m: int,
) -> HeadMap:
    """The map of each of R draws of D_util's and D_safe's folds, [R, L, H].

    Args:
        gram: [L, H, 2F, 2F], inner products of fold gradients, safe folds first.
        counts: how often each draw has each fold, of D_util and of D_safe, [R, F] each.
    """
    util, safe = counts
    weights = (own / own.sum(axis=1, keepdims=True) for own in (safe, util))
    conflict = optimization_conflict(*combine_folds(checked_gram(gram), *weights))
    h_gen, h_safe = resampled_changes(effects.util, util), resampled_changes(effects.safe, safe)
    sensitivity, score, bucket = (np.empty_like(conflict) for _ in range(3))
    for draw in range(len(conflict)):
        sizes = (unit_range(np.abs(change[draw])) for change in (h_gen, h_safe))
        sensitivity[draw] = functional_sensitivity(*sizes, variant)
        score[draw] = conflict_score(conflict[draw], sensitivity[draw])
        bucket[draw] = buckets(score[draw], m)
    return HeadMap(conflict, h_gen, h_safe, sensitivity, score, bucket.astype(int))


def map_intervals(
    gram: FloatArray, effects: Effects, variant: SensitivityVariant, m: int, resampling: Resampling
) -> MapIntervals:
    """Resamples of D_util's and D_safe's folds, and what they leave as intervals of O, H, S, C and buckets
    (arguments of `draw_maps`)."""
    folds = gram.shape[-1] // 2
    safe, util = (fold_counts(folds, *resampling) for _ in range(2))
    drawn = draw_maps(gram, effects, (util, safe), variant, m)._asdict()
    signed = {name: drawn.pop(name) for name in ("h_gen", "h_safe")}
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
