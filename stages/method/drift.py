"""How far the map of a tuned model is from the base model's, on the same rows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.method.arrays import FloatArray
from stages.method.heads import HeadMap
from stages.method.reliability import QUANTITIES

FEWEST = 3
"""heads below which a rank correlation says nothing"""


class Drift(NamedTuple):
    """Of a whole map, or of one of its layers. None: it cannot be told (a quantity is constant, there are no
    such heads)."""

    correlations: dict[str, float | None]
    """Spearman's rho over heads, of each of QUANTITIES"""
    changed: float
    """share of heads in another bucket"""
    changed_tuned: float | None
    """the same of the heads that were tuned"""
    changed_others: float | None
    conflict_change: float
    """mean O of the tuned model minus that of the base model"""


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's rho; None where one is constant or there are fewer than FEWEST.

    >>> rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]), rank_correlation([1, 1, 1], [1, 2, 3])
    (0.8, None)
    """
    x, y = np.ravel(x), np.ravel(y)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return round(float(stats.spearmanr(x, y).statistic), 12)  # so that equal ranks are exactly 1


def share(changed: np.ndarray) -> float | None:
    return float(changed.mean()) if changed.size else None


def map_drift(base: HeadMap, tuned: HeadMap, heads: np.ndarray) -> Drift:
    """From the base model's map to a tuned one's.

    Args:
        heads: bool [L, H], those that were tuned.
    """
    pairs = {name: (getattr(base, name), getattr(tuned, name)) for name in QUANTITIES}
    changed = base.bucket != tuned.bucket
    return Drift(
        {name: rank_correlation(*pair) for name, pair in pairs.items()},
        float(changed.mean()),
        share(changed[heads]),
        share(changed[~heads]),
        float((tuned.optimization_conflict - base.optimization_conflict).mean()),
    )


def layer_of(scores: HeadMap, layer: int) -> HeadMap:
    """One layer of a map, as a map [1, H]; buckets are those of the whole."""
    return HeadMap(*(values[[layer]] for values in scores))


def by_layer(base: HeadMap, tuned: HeadMap, heads: FloatArray) -> list[Drift]:
    """`map_drift` of each layer."""
    layers = range(len(base.bucket))
    return [map_drift(layer_of(base, layer), layer_of(tuned, layer), heads[[layer]]) for layer in layers]
