"""The map from what it rests on: every column of gradients.parquet and heads.parquet (Eq. 2 to 6)."""

from dataclasses import asdict

import numpy as np

from stages.method import metrics, uncertainty
from stages.method.arrays import FloatArray
from stages.method.gradients import conflict_from_gram
from stages.method.uncertainty import Outcomes, Resampling

Columns = dict[str, np.ndarray]
"""by name, [L * H] in the order of (layer, head)"""


def head_columns(shape: tuple[int, int]) -> Columns:
    """The labels of every head."""
    layers, heads = shape
    return {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}


def gradient_columns(gram: FloatArray) -> Columns:
    """gradients.parquet from Gram matrices [L, H, 2F, 2F] of fold-mean gradients, safe folds first."""
    dot, norm_safe, norm_util = conflict_from_gram(gram, gram.shape[-1] // 2)
    values = {
        "dot": dot,
        "norm_safe": norm_safe,
        "norm_util": norm_util,
        "optimization_conflict": metrics.optimization_conflict(dot, norm_safe, norm_util),
    }
    matrices = np.empty(dot.size, dtype=object)
    matrices[:] = list(gram.reshape(dot.size, -1))
    return (
        head_columns(dot.shape) | {name: array.ravel() for name, array in values.items()} | {"gram": matrices}
    )


def map_columns(
    gram: FloatArray,
    correct: Outcomes,
    refused: Outcomes,
    variant: metrics.SensitivityVariant,
    m: int,
    resampling: Resampling,
) -> Columns:
    """heads.parquet from Gram matrices and the sweep's outcomes on D_util and D_safe."""
    estimates = {
        "optimization_conflict": gradient_columns(gram)["optimization_conflict"].reshape(gram.shape[:2]),
        "h_gen": metrics.accuracy_change(correct.clean, correct.ablated),
        "h_safe": metrics.accuracy_change(refused.clean, refused.ablated),
    }
    sensitivity = metrics.functional_sensitivity(estimates["h_gen"], estimates["h_safe"], variant)
    score = metrics.conflict_score(estimates["optimization_conflict"], sensitivity)
    bucket = metrics.buckets(score, m)
    estimates |= {"functional_sensitivity": sensitivity, "conflict_score": score, "bucket": bucket}
    intervals = uncertainty.map_intervals(gram, correct, refused, variant, m, resampling)
    columns = head_columns(bucket.shape)
    for name, values in estimates.items():
        columns |= {
            name: values.ravel(),
            f"{name}_low": intervals.low[name].ravel(),
            f"{name}_high": intervals.high[name].ravel(),
        }
    columns["bucket_probability"] = np.empty(bucket.size, dtype=object)
    columns["bucket_probability"][:] = list(intervals.bucket_probability.reshape(bucket.size, m))
    return columns


def map_notes(columns: Columns, correct: Outcomes, refused: Outcomes) -> dict:
    """What a manifest notes of a map: how much its ranks rest on."""
    h_gen, h_safe = (columns[name][None, :] for name in ("h_gen", "h_safe"))
    own = [
        row[bucket - 1] for row, bucket in zip(columns["bucket_probability"], columns["bucket"], strict=True)
    ]
    return {
        "base": {"accuracy": float(correct.clean.mean()), "refusal_rate": float(refused.clean.mean())},
        "ranks_rest_on": asdict(metrics.map_statistics(h_gen, h_safe)),
        "mean_probability_of_own_bucket": float(np.mean(own)),
    }
