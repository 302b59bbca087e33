"""The conflict map: what is known of every head, [L, H] each."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stages.method.arrays import FloatArray, IntArray

Ranking = Literal["C", "O", "S"]
"""what heads are ranked by: conflict score, optimization conflict, functional sensitivity"""
Sensitivity = Literal["counted", "graded", "gradient"]
"""which outcomes H_gen and H_safe are made of"""
COLUMN = {
    "C": "conflict_score",
    "O": "optimization_conflict",
    "S": "functional_sensitivity",
}


class HeadMap(NamedTuple):
    """The conflict map: O, H, S, C and bucket of every head, [L, H] each; of R resamples [R, L, H]."""

    optimization_conflict: FloatArray
    h_gen: FloatArray
    """of resamples with its sign, as is h_safe"""
    h_safe: FloatArray
    functional_sensitivity: FloatArray
    conflict_score: FloatArray
    bucket: IntArray

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)"""
        return self.bucket.shape

    @property
    def m(self) -> int:
        """Number of buckets."""
        return int(self.bucket.max())

    def by(self, ranking: Ranking) -> FloatArray:
        """What heads are ranked by, [L, H]."""
        return getattr(self, COLUMN[ranking])


def shape_of(columns: Mapping[str, ArrayLike]) -> tuple[int, int]:
    """(L, H) of a table that has every head once, by (layer, head)."""
    layers, heads = (int(np.max(columns[name])) + 1 for name in ("layer", "head"))
    return layers, heads


def read_map(columns: Mapping[str, ArrayLike]) -> HeadMap:
    """From the columns of a table that has every head once, by (layer, head)."""
    shape = shape_of(columns)
    *values, bucket = (np.asarray(columns[name]).reshape(shape) for name in HeadMap._fields)
    return HeadMap(*(array.astype(np.float64) for array in values), bucket.astype(np.int64))


def own_probability(columns: Mapping[str, ArrayLike]) -> FloatArray:
    """Share of resamples in which each head falls into its own bucket, [L, H], from the columns of
    heads.parquet (stages.method.uncertainty)."""
    probability = np.stack([np.asarray(row) for row in columns["bucket_probability"]])  # (L * H, M)
    own = np.asarray(columns["bucket"], np.int64)[:, None] - 1
    return np.take_along_axis(probability, own, axis=1).reshape(shape_of(columns))
