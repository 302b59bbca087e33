"""The map from what it rests on: every column of gradients.parquet and heads.parquet (Eq. 2 to 6)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike

from stages.method import metrics, uncertainty
from stages.method.arrays import FloatArray
from stages.method.gradients import conflict_from_gram
from stages.method.heads import HeadMap, Sensitivity, shape_of
from stages.method.uncertainty import Effects, Resampling

Columns = dict[str, np.ndarray]
"""by name, [L * H] in the order of (layer, head)"""


def head_map(
    conflict: FloatArray, h_gen: FloatArray, h_safe: FloatArray, variant: metrics.SensitivityVariant, m: int
) -> HeadMap:
    """S, C and buckets from O and from how far abilities and refusals change without each head, in any unit
    (Eq. 5, 6)."""
    sizes = (metrics.unit_range(change) for change in (h_gen, h_safe))
    sensitivity = metrics.functional_sensitivity(*sizes, variant)
    score = metrics.conflict_score(conflict, sensitivity)
    return HeadMap(conflict, h_gen, h_safe, sensitivity, score, metrics.buckets(score, m))


def head_columns(shape: tuple[int, int]) -> Columns:
    """The labels of every head."""
    layers, heads = shape
    return {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}


def gradient_columns(gram: FloatArray) -> Columns:
    """What gradients.parquet has of Gram matrices [L, H, 2F, 2F] of fold-mean gradients, safe folds first."""
    dot, norm_safe, norm_util = conflict_from_gram(gram, gram.shape[-1] // 2)
    values = {
        "dot": dot,
        "norm_safe": norm_safe,
        "norm_util": norm_util,
        "optimization_conflict": metrics.optimization_conflict(dot, norm_safe, norm_util),
    }
    return head_columns(dot.shape) | {name: array.ravel() for name, array in values.items()}


def map_columns(
    gram: FloatArray, effects: Effects, variant: metrics.SensitivityVariant, m: int, resampling: Resampling
) -> Columns:
    """heads.parquet from Gram matrices, and from what ablating each head does to the rows of D_util and
    D_safe."""
    conflict = gradient_columns(gram)["optimization_conflict"].reshape(gram.shape[:2])
    changes = (metrics.mean_change(own) for own in effects)
    estimates = head_map(conflict, *changes, variant, m)
    bucket = estimates.bucket
    intervals = uncertainty.map_intervals(gram, effects, variant, m, resampling)
    columns = head_columns(bucket.shape)
    for name, values in estimates._asdict().items():
        columns |= {
            name: values.ravel(),
            f"{name}_low": intervals.low[name].ravel(),
            f"{name}_high": intervals.high[name].ravel(),
        }
    columns["bucket_probability"] = np.empty(bucket.size, dtype=object)
    columns["bucket_probability"][:] = list(intervals.bucket_probability.reshape(bucket.size, m))
    return columns


def change_columns(effects: Mapping[Sensitivity, Effects]) -> Columns:
    """H_gen and H_safe by every kind of outcome that was computed; None by the others."""
    columns = {}
    for kind in get_args(Sensitivity):
        for side, name in (("util", "h_gen"), ("safe", "h_safe")):
            own = getattr(effects[kind], side) if kind in effects else None
            columns[f"{name}_{kind}"] = None if own is None else metrics.mean_change(own).ravel()
    return columns


def maps_by_outcome(
    columns: Mapping[str, ArrayLike], variant: metrics.SensitivityVariant, m: int
) -> dict[Sensitivity, HeadMap]:
    """The map by every kind of outcome that was computed, from the columns of heads.parquet, every head once,
    by (layer, head)."""
    shape = shape_of(columns)
    found = {}
    for kind in get_args(Sensitivity):
        names = ("optimization_conflict", f"h_gen_{kind}", f"h_safe_{kind}")
        arrays = [np.asarray(columns[name], np.float64).reshape(shape) for name in names]
        if not np.isnan(arrays).any():
            found[kind] = head_map(*arrays, variant, m)
    return found


def map_notes(columns: Columns) -> dict:
    """What a manifest notes of a map: how much its ranks rest on."""
    sizes = (metrics.unit_range(columns[name][None, :]) for name in ("h_gen", "h_safe"))
    own = [
        row[bucket - 1] for row, bucket in zip(columns["bucket_probability"], columns["bucket"], strict=True)
    ]
    return {
        "ranks_rest_on": asdict(metrics.map_statistics(*sizes)),
        "mean_probability_of_own_bucket": float(np.mean(own)),
    }
