"""Whether a quantity of the heads that were tuned predicts what tuning cost, over many arms.

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


class Prediction(NamedTuple):
    """Pearson's r of a predictor and a cost over arms. None: one of them is constant, or arms are too few."""

    n: int
    r: float | None
    low: float | None
    """95 % percentile bootstrap over arms"""
    high: float | None
    p: float | None
    """two-sided, by permutation of the arms' costs"""
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
) -> Prediction:
    """How well `x` [A] predicts `cost` [A].

    Args:
        fixed: what is held fixed throughout (the safety gained, for costs at equal safety), [A] each.
        others: further predictors, held fixed for `partial` only, [A] each.
    """
    nothing = Prediction(len(x), *[None] * 6)
    if len(x) < FEWEST or constant(x) or constant(cost):
        return nothing
    base = np.column_stack([*fixed.values()]) if fixed else np.empty((len(x), 0))
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
    return Prediction(len(x), r, float(low), float(high), p, float(np.polyfit(a, b, 1)[0]), partial)


def smallest_r(n: int) -> float:
    """The |r| that n arms would have shown at the 5 % level in 80 % of cases (Fisher's z).

    >>> round(smallest_r(32), 2)
    0.48
    """
    return float(np.tanh((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / np.sqrt(n - 3)))
