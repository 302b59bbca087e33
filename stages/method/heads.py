"""The conflict map: what is known of every head, [L, H] each."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

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


@dataclass(frozen=True)
class HeadMap:
    """heads.parquet as arrays [L, H]."""

    optimization_conflict: FloatArray
    h_gen: FloatArray
    h_safe: FloatArray
    functional_sensitivity: FloatArray
    conflict_score: FloatArray
    bucket: IntArray
    own_probability: FloatArray
    """share of resamples in which the head falls into its own bucket (stages.method.uncertainty)"""

    @classmethod
    def from_columns(cls, columns: Mapping[str, ArrayLike]) -> "HeadMap":
        """From the columns of heads.parquet, every head once, by (layer, head)."""
        shape = tuple(int(np.max(columns[name])) + 1 for name in ("layer", "head"))
        bucket = np.asarray(columns["bucket"], dtype=np.int64)
        probability = np.stack([np.asarray(row) for row in columns["bucket_probability"]])  # (L * H, M)
        own = probability[np.arange(len(bucket)), bucket - 1]
        plain = [field.name for field in fields(cls) if field.name not in ("bucket", "own_probability")]
        arrays = {name: np.asarray(columns[name], dtype=np.float64).reshape(shape) for name in plain}
        return cls(**arrays, bucket=bucket.reshape(shape), own_probability=own.reshape(shape))

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
