"""The paper's formulas (Eq. 2-8), in numpy float64, and the statistics that the stages put beside them.

Notation: `L` layers, `H` heads, `F` folds, `R` resamples, `N` examples. A per-head array is [L, H].
"Paper" is *Safety-Utility Conflicts Are Not Global: Surgical Alignment via Head-Level Diagnosis* (CAST).
What is undefined or impossible raises a ValueError that begins with the argument's name; nothing here
returns NaN, except `correlation` where an input is constant.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.method.arrays import ROUNDING, FloatArray, IntArray, array, count

SensitivityVariant = Literal["rank-difference", "reranked"]
SENSITIVITY_VARIANTS = get_args(SensitivityVariant)


def optimization_conflict(dot: ArrayLike, norm_safe: ArrayLike, norm_util: ArrayLike) -> FloatArray:
    """Eq. 2: O = (1 - cos(g_safe, g_util)) / 2, in [0, 1]; 0 = same direction, 1 = opposed.

    All three have the same shape, [L, H] or with leading axes; so has the result. A head without a gradient
    (a norm of zero) has no direction: it gets 0.5, as if orthogonal (the paper does not say).

    Raises ValueError on NaN, different shapes, a negative norm, or |dot| above norm_safe * norm_util by more
    than rounding.

    >>> optimization_conflict([[1.0, -2.0, 0.0]], [[1.0, 2.0, 0.0]], [[1.0, 1.0, 5.0]]).tolist()
    [[0.0, 1.0, 0.5]]
    """
    dot = array("dot", dot)
    norm_safe = array("norm_safe", norm_safe, shape=dot.shape, low=0.0)
    norm_util = array("norm_util", norm_util, shape=dot.shape, low=0.0)
    zero = (norm_safe == 0) | (norm_util == 0)
    if np.any(dot[zero] != 0):
        raise ValueError("dot: must be 0 where norm_safe or norm_util is 0")
    # Divided one after the other, because the product of two small norms can underflow to zero.
    cosine = dot / np.where(zero, 1.0, norm_safe) / np.where(zero, 1.0, norm_util)
    if np.any(np.abs(cosine) > 1 + ROUNDING):
        worst = np.unravel_index(np.argmax(np.abs(cosine)), cosine.shape)
        place = tuple(int(i) for i in worst)
        raise ValueError(f"dot: |dot| > norm_safe * norm_util at index {place} (cosine {cosine[worst]:.9g})")
    return (1 - np.clip(cosine, -1.0, 1.0)) / 2


def percentile_rank(x: ArrayLike) -> FloatArray:
    """Percentile rank of every value among all of x, in [0, 1] (§3.3): (rank - 1) / (n - 1).

    The array is ranked flat and returned in its shape; tied values share their average rank, so an array of
    equal values is 0.5 everywhere. A single value is 0.5 for the same reason.

    Raises ValueError on NaN or an empty array.

    >>> percentile_rank([[3.0, 1.0], [2.0, 2.0]]).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    x = array("x", x)
    if x.size == 1:
        return np.full(x.shape, 0.5)
    return (_ranks(x) - 1) / (x.size - 1)


def functional_sensitivity(
    h_gen: ArrayLike,
    h_safe: ArrayLike,
    variant: SensitivityVariant = "rank-difference",
) -> FloatArray:
    """Eq. 5: S = exp(rank of H_gen - rank of H_safe), with percentile ranks; [L, H] like both inputs.

    `h_gen` and `h_safe` are Eq. 3 and 4: absolute changes of accuracy and of refusal rate, in [0, 1].

    - "rank-difference": Eq. 5 as printed; S in [1/e, e], near 1.09 on average.
    - "reranked": S = exp(percentile_rank(rank difference)), in [1, e]. Not in the paper's text, but its
      Table 7 needs an exponent that is a percentile rank: any exp(percentile rank) has the bucket averages of
      S (and C) printed there, whatever was ranked. The rank difference is the likeliest.

    Raises ValueError on NaN, different or not two-dimensional shapes, values outside [0, 1], unknown variant.

    >>> functional_sensitivity([[0.0, 0.1, 0.2]], [[0.0, 0.5, 0.2]]).round(3).tolist()
    [[1.0, 0.607, 1.649]]
    """
    h_gen = array("h_gen", h_gen, axes=2, low=0.0, high=1.0)
    h_safe = array("h_safe", h_safe, shape=h_gen.shape, low=0.0, high=1.0)
    if variant not in SENSITIVITY_VARIANTS:
        raise ValueError(f"variant: must be one of {', '.join(SENSITIVITY_VARIANTS)}, not {variant!r}")
    # Ranks are multiples of 1/2, so their difference is exact and equal differences stay ties when ranked
    # again; differences of percentile ranks would be split by rounding.
    difference = _ranks(h_gen) - _ranks(h_safe)
    if variant == "reranked":
        return np.exp(percentile_rank(difference))
    return np.exp(difference / max(h_gen.size - 1, 1))


def conflict_score(conflict: ArrayLike, sensitivity: ArrayLike) -> FloatArray:
    """Eq. 6: C = O * S, elementwise; both of one shape, conflict in [0, 1], sensitivity positive.

    Raises ValueError on NaN, different shapes, values out of range.

    >>> conflict_score([[0.5, 1.0]], [[2.0, 0.5]]).tolist()
    [[1.0, 0.5]]
    """
    conflict = array("conflict", conflict, low=0.0, high=1.0)
    sensitivity = array("sensitivity", sensitivity, shape=conflict.shape)
    if np.any(sensitivity <= 0):
        raise ValueError(f"sensitivity: must be positive, found {sensitivity.min()}")
    return conflict * sensitivity


def buckets(score: ArrayLike, m: int = 4) -> IntArray:
    """The bucket of every head, 1..m, by descending score [L, H] (§3.5): 1 = Risky Zone, m = Safe Zone.

    Heads of equal score go by (layer, head), the lower first. Sizes differ by at most one: where m does not
    divide the number of heads, the first buckets (highest scores) hold the extra ones.

    Raises ValueError on NaN, a score that is not [L, H], m that is no whole number in 1..L*H.

    >>> buckets([[0.1, 0.9, 0.5], [0.5, 0.2, 0.3]], m=4).tolist()
    [[4, 1, 1], [2, 3, 2]]
    """
    score = array("score", score, axes=2)
    m = count("m", m, high=score.size)
    order = np.argsort(-score, axis=None, kind="stable")  # stable: ties keep (layer, head) order
    size, extra = divmod(score.size, m)
    result = np.empty(score.size, dtype=np.int64)
    result[order] = np.repeat(np.arange(1, m + 1), [size + (b < extra) for b in range(m)])
    return result.reshape(score.shape)


def utility_cost_ratio(
    utility_base: ArrayLike,
    utility_aligned: ArrayLike,
    safety_base: ArrayLike,
    safety_aligned: ArrayLike,
    eps: float = 1e-8,
) -> FloatArray:
    """Eq. 7 (UCR), and Eq. 8 (MMLU-CR) when the utilities are MMLU: what a unit of safety gained has cost.

    max(0, (utility_base - utility_aligned) / (safety_aligned - safety_base + eps)), literally; lower is
    better. Scores are numbers or arrays that broadcast, all in percent or all in [0, 1]; numbers give a numpy
    float64. Where no safety was gained the ratio means nothing (0, huge, or positive because both signs
    flipped): it is returned by the formula, and the caller marks the row "no safety gain".

    Raises ValueError on NaN, scores outside [0, 100], shapes that do not broadcast, eps <= 0, or a
    denominator of exactly 0.

    >>> round(float(utility_cost_ratio(66.10, 61.34, 67.22, 92.62)), 2)
    0.19
    """
    names = ("utility_base", "utility_aligned", "safety_base", "safety_aligned")
    values = (utility_base, utility_aligned, safety_base, safety_aligned)
    scores = [array(name, value, low=0.0, high=100.0) for name, value in zip(names, values, strict=True)]
    eps = float(array("eps", eps, axes=0))
    if eps <= 0:
        raise ValueError(f"eps: must be positive, not {eps}")
    try:
        u_base, u_aligned, s_base, s_aligned = np.broadcast_arrays(*scores)
    except ValueError:
        shapes = ", ".join(f"{name} {score.shape}" for name, score in zip(names, scores, strict=True))
        raise ValueError(f"{shapes}: shapes do not broadcast") from None
    gain = (s_aligned - s_base) + eps
    if np.any(gain == 0):
        raise ValueError("safety_aligned: safety_aligned - safety_base + eps is 0")
    return np.maximum(0.0, (u_base - u_aligned) / gain)


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's rho, NaN where an input is constant; intervals are (low, high) or None."""

    pearson: float
    spearman: float
    pearson_interval: tuple[float, float] | None
    spearman_interval: tuple[float, float] | None


def correlation(x: ArrayLike, y: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Correlation:
    """How well a score predicts a cost over the same points (§4.1, Table 8): Pearson r and Spearman rho.

    x and y are [points], or [seeds, points] where several training seeds were measured. The coefficients are
    those of the means over seeds, as the paper averages its seeds first. With two seeds or more, a 95 %
    percentile bootstrap over the seeds gives an interval: each resample draws seeds with replacement
    (the same ones for x and y when both have them), averages, correlates. With three seeds it rests on
    ten distinct draws: read it as a range, not as a test.

    A constant input has no correlation: both coefficients are NaN and there is no interval. Resamples in
    which an input is constant are left out. Values that agree in their first 12 digits are ties.

    Raises ValueError on NaN or inf, fewer than two points, different numbers of points or of seeds.

    >>> correlation([1.27, 0.88, 0.67, 0.47], [0.41, 0.37, 0.27, 0.19]).spearman
    1.0
    """
    x = array("x", x)
    y = array("y", y)
    for name, value in (("x", x), ("y", y)):
        if value.ndim not in (1, 2):
            raise ValueError(f"{name}: must be [points] or [seeds, points], not of shape {value.shape}")
        if value.shape[-1] < 2:
            raise ValueError(f"{name}: needs two points or more, has {value.shape[-1]}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: has {y.shape[-1]} points, x has {x.shape[-1]}")
    if x.ndim == y.ndim == 2 and len(x) != len(y):
        raise ValueError(f"y: has {len(y)} seeds, x has {len(x)}")
    resamples = count("resamples", resamples)
    # Scale changes no correlation; squares of cost ratios without a safety gain (up to 1e10) stay harmless.
    x = np.atleast_2d(x) / (np.abs(x).max() or 1.0)
    y = np.atleast_2d(y) / (np.abs(y).max() or 1.0)
    mean_x = x.mean(axis=0, keepdims=True)
    mean_y = y.mean(axis=0, keepdims=True)
    pearson = float(_pearson(mean_x, mean_y)[0])
    spearman = float(_spearman(mean_x, mean_y)[0])
    seeds = max(len(x), len(y))
    if seeds == 1 or np.isnan(pearson):
        return Correlation(pearson, spearman, None, None)
    draws = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
    drawn_x = x[draws].mean(axis=1) if len(x) > 1 else np.broadcast_to(mean_x, (resamples, x.shape[1]))
    drawn_y = y[draws].mean(axis=1) if len(y) > 1 else np.broadcast_to(mean_y, (resamples, y.shape[1]))
    return Correlation(
        pearson, spearman, _interval(_pearson(drawn_x, drawn_y)), _interval(_spearman(drawn_x, drawn_y))
    )


def mean_change(effects: ArrayLike) -> FloatArray:
    """Eq. 3 and 4: |mean effect of ablating a head|, [L, H].

    `effects` [L, H, N] is the change of each row's outcome. Counted outcomes are 0 or 1, so effects are -1,
    0 or 1 and the mean is the change of accuracy (or refusal rate); they are summed before they are divided
    by N, so that equal changes are equal floats: Eq. 5's ranks live on exact ties. Graded outcomes are log p
    or log-odds.

    Raises ValueError on NaN, other than three axes, no rows.

    >>> mean_change([[[0, -1, 0], [0, 0, 1], [1, 1, -1]]]).round(3).tolist()
    [[0.333, 0.333, 0.333]]
    """
    effects = array("effects", effects, axes=3)
    return np.abs(effects.sum(axis=-1)) / effects.shape[-1]


def unit_range(change: ArrayLike) -> FloatArray:
    """Changes in any unit as values in [0, 1] with the same ranks: divided by the largest where that is over
    1, as changes of graded outcomes may be.

    Raises ValueError on NaN or a negative change.

    >>> unit_range([[0.0, 1.0, 4.0]]).tolist()
    [[0.0, 0.25, 1.0]]
    """
    change = array("change", change, low=0.0)
    return change / max(change.max(), 1.0)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a proportion: the error bar of a benchmark score in [0, 1].

    Raises ValueError on n < 1, successes outside 0..n, confidence outside (0, 1).

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    n = count("n", n)
    successes = count("successes", successes, low=0, high=n)
    confidence = float(array("confidence", confidence, axes=0))
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must lie between 0 and 1, not {confidence}")
    interval = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class MapStatistics:
    """What the ranks of a conflict map rest on: few distinct values or many ties make a poor map."""

    distinct_gen: int
    """different values of H_gen"""
    distinct_safe: int
    """different values of H_safe"""
    tied_gen: float
    """share of heads whose H_gen another head has too"""
    tied_safe: float
    """share of heads whose H_safe another head has too"""


def map_statistics(h_gen: ArrayLike, h_safe: ArrayLike) -> MapStatistics:
    """Distinct values and share of tied heads in H_gen and H_safe (Eq. 3, 4), both [L, H] in [0, 1].

    Raises ValueError on NaN, different or not two-dimensional shapes, values outside [0, 1].

    >>> map_statistics([[0.0, 0.0, 0.1, 0.2]], [[0.1, 0.2, 0.3, 0.4]])
    MapStatistics(distinct_gen=3, distinct_safe=4, tied_gen=0.5, tied_safe=0.0)
    """
    h_gen = array("h_gen", h_gen, axes=2, low=0.0, high=1.0)
    h_safe = array("h_safe", h_safe, shape=h_gen.shape, low=0.0, high=1.0)
    counts_gen = np.unique(h_gen, return_counts=True)[1]
    counts_safe = np.unique(h_safe, return_counts=True)[1]
    return MapStatistics(
        distinct_gen=len(counts_gen),
        distinct_safe=len(counts_safe),
        tied_gen=float(counts_gen[counts_gen > 1].sum() / h_gen.size),
        tied_safe=float(counts_safe[counts_safe > 1].sum() / h_safe.size),
    )


def _ranks(x: FloatArray) -> FloatArray:
    """Ranks 1..n of the flattened array in its shape, ties averaged."""
    return stats.rankdata(x, axis=None).reshape(x.shape)


def _pearson(x: FloatArray, y: FloatArray) -> FloatArray:
    """Pearson's r of each row pair of [R, points]; NaN where a row is constant."""
    constant = (np.ptp(_twelve_digits(x), axis=1) == 0) | (np.ptp(_twelve_digits(y), axis=1) == 0)
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    variances = (x * x).sum(axis=1) * (y * y).sum(axis=1)
    r = (x * y).sum(axis=1) / np.sqrt(np.where(constant, 1.0, variances))
    return np.where(constant, np.nan, np.clip(r, -1.0, 1.0))


def _spearman(x: FloatArray, y: FloatArray) -> FloatArray:
    """Spearman's rho of each row pair: Pearson's r of the ranks, ties averaged."""
    return _pearson(stats.rankdata(_twelve_digits(x), axis=1), stats.rankdata(_twelve_digits(y), axis=1))


def _twelve_digits(x: FloatArray) -> FloatArray:
    """x without its last digits, so that means of the same values in another order stay equal."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(mantissa.round(12), exponent)


def _interval(samples: FloatArray) -> tuple[float, float] | None:
    """The 2.5 and 97.5 percentiles of the samples that are numbers; None where there are none."""
    samples = samples[~np.isnan(samples)]
    if samples.size == 0:
        return None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
