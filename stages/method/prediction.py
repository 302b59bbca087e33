"""Whether a quantity of the heads that were tuned predicts what tuning cost, over many arms.

Arms are no independent points: what they have in common is heads. Where C means nothing but heads differ in
what tuning them costs, arms of high C share heads, and so a cost; permuting arms takes that for a relation of
C in up to a third of cases (docs of `p_over_heads`). So heads have random effects of their own, as items have
in experiments (Clark 1973, "The language-as-fixed-effect fallacy").

Axes: A arms.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from stages.method.arrays import FloatArray

PERMUTATIONS, RESAMPLES = 5000, 2000
FEWEST = 8
"""arms below which there is no answer"""
SHARES = np.linspace(0, 1, 21)[:-1]
"""of the costs' variance that is due to which heads were tuned: what `p_over_heads` averages over"""


class Prediction(NamedTuple):
    """Pearson's r of a predictor and a cost over arms. None: one of them is constant, or arms are too few."""

    n: int
    r: float | None
    low: float | None
    """95 % percentile bootstrap over arms"""
    high: float | None
    p: float | None
    """two-sided, by permutation of the arms' costs: as if arms shared no heads"""
    p_heads: float | None
    """two-sided, heads having effects of their own (`p_over_heads`): whether it is more than these heads"""
    slope: float | None
    """cost a unit of the predictor"""
    partial: float | None
    """r with the other predictors held fixed"""


def residuals(values: FloatArray, others: FloatArray) -> FloatArray:
    """What is left of values [A] after a least-squares fit on `others` [A, k] and a constant."""
    design = np.column_stack([np.ones(len(values)), others])
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def correlate(x: FloatArray, y: FloatArray) -> FloatArray:
    """Pearson's r of each row of x [..., A] with that of y; NaN where one is constant."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    lengths = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, (x * y).sum(axis=-1) / lengths, np.nan)


def constant(values: FloatArray) -> bool:
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def predict(
    x: FloatArray,
    cost: FloatArray,
    fixed: Mapping[str, FloatArray],
    others: Mapping[str, FloatArray],
    generator: np.random.Generator,
    overlap: FloatArray,
) -> Prediction:
    """How well `x` [A] predicts `cost` [A].

    Args:
        fixed: what is held fixed throughout (the safety gained, for costs at equal safety), [A] each.
        others: further predictors, held fixed for `partial` only, [A] each.
        overlap: how many heads two arms share, [A, A].
    """
    nothing = Prediction(len(x), *[None] * 7)
    if len(x) < FEWEST or constant(x) or constant(cost):
        return nothing
    held = [own for own in fixed.values() if not constant(own)]
    base = np.column_stack(held) if held else np.empty((len(x), 0))
    a, b = residuals(x, base), residuals(cost, base)
    if constant(a + np.abs(x).max()) or constant(b + np.abs(cost).max()):
        return nothing
    r = float(correlate(a, b))
    shuffled = generator.permuted(np.broadcast_to(b, (PERMUTATIONS, len(b))), axis=1)
    extreme = np.abs(correlate(a, shuffled)) >= abs(r) - 1e-12
    rows = generator.integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.nanquantile(correlate(a[rows], b[rows]), (0.025, 0.975))
    partial = None
    if others:
        every = np.column_stack([base, *others.values()])
        left = residuals(x, every), residuals(cost, every)
        if not any(constant(part + 1) for part in left):
            partial = float(correlate(*left))
    p = float((extreme.sum() + 1) / (PERMUTATIONS + 1))
    p_heads, slope = p_over_heads(x, cost, base, overlap), float(np.polyfit(a, b, 1)[0])
    return Prediction(len(x), r, float(low), float(high), p, p_heads, slope, partial)


def p_over_heads(x: FloatArray, cost: FloatArray, base: FloatArray, overlap: FloatArray) -> float:
    """Two-sided p of the slope of `cost` [A] on `x` [A], where each head has an effect of its own on the arms
    that have it: generalized least squares with the covariance share * overlap + (1 - share) * 1, t-test.

    The share is not known; p is its mean over SHARES, each weighted by the restricted likelihood.

    Of 32 draws of 270 heads whose effects had nothing to do with C, 31 % had p < 0.05 by permutation and 11 %
    had it so where arms had no noise, 20 and 4 % with noise of the size of the effects, 10 and 1 % with twice
    that; where effects of heads correlated with C by 0.3, 100 and 97 %, 97 and 93 %, 89 and 51 %.

    Args:
        base: what is held fixed, [A, k].
        overlap: how many heads two arms share, [A, A].
    """
    count = len(x)
    centre = np.eye(count) - 1 / count  # what all arms have in common is no difference
    shared = centre @ overlap @ centre
    lengths, axes = np.linalg.eigh(shared * count / np.trace(shared))
    design = axes.T @ np.column_stack([np.ones(count), x, base])
    turned, free = axes.T @ cost, count - design.shape[1]
    likelihoods, found = [], []
    for share in SHARES:
        variance = share * np.maximum(lengths, 0) + 1 - share
        products = design.T @ (design / variance[:, None])
        slopes = np.linalg.solve(products, design.T @ (turned / variance))
        left = ((turned - design @ slopes) ** 2 / variance).sum()
        error = np.sqrt(left / free * np.linalg.inv(products)[1, 1])
        found.append(2 * stats.t.sf(abs(slopes[1]) / error, free))
        determinants = np.log(variance).sum() + np.linalg.slogdet(products)[1]
        likelihoods.append(-(free * np.log(left) + determinants) / 2)
    weights = np.exp(np.array(likelihoods) - max(likelihoods))
    return float(weights @ found / weights.sum())


def smallest_r(n: int) -> float:
    """The |r| that n arms would have shown at the 5 % level in 80 % of cases (Fisher's z).

    >>> round(smallest_r(32), 2)
    0.48
    """
    return float(np.tanh((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / np.sqrt(n - 3)))
