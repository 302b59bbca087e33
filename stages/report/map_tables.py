"""Tables of the map itself: layers, extreme heads, the two readings of Eq. 5, and other maps beside it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from stages.method import metrics
from stages.method.heads import COLUMN, HeadMap

MOST_HEADS = 10
COLUMNS = ["as_printed", "reranked"]


def layer_table(heads: HeadMap) -> pd.DataFrame:
    """Per layer the means of O, S and C, and the share of its heads in each bucket."""
    columns = {f"mean_{name}": getattr(heads, name).mean(axis=1) for name in map(COLUMN.get, "OSC")}
    shares = {f"share_bucket{n}": (heads.bucket == n).mean(axis=1) for n in range(1, heads.m + 1)}
    return pd.DataFrame({"layer": np.arange(heads.shape[0])} | columns | shares)


def extreme_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """The ten heads of highest and of lowest C (fewer of a small model), highest first, with intervals.

    Args:
        heads: heads.parquet.
    """
    ranked = heads.sort_values(["conflict_score", "layer", "head"], ascending=[False, True, True])
    ranked["probability_of_bucket"] = [
        row[bucket - 1]
        for row, bucket in zip(ranked.pop("bucket_probability"), ranked["bucket"], strict=True)
    ]
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    most = min(MOST_HEADS, len(ranked) // 2)
    return pd.concat([ranked[:most], ranked[len(ranked) - most :]])


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Of two maps; NaN where one is constant or has a single head."""
    return metrics.correlation(one.ravel(), other.ravel()).spearman if one.size > 1 else np.nan


def variant_table(heads: HeadMap) -> pd.DataFrame:
    """How far Eq. 5 as printed and its re-ranked variant give the same map."""
    names = metrics.SENSITIVITY_VARIANTS
    sensitivity = [metrics.functional_sensitivity(heads.h_gen, heads.h_safe, name) for name in names]
    score = [metrics.conflict_score(heads.optimization_conflict, values) for values in sensitivity]
    printed, reranked = bucket = [metrics.buckets(values, heads.m) for values in score]
    rows = [
        {"quantity": "rank correlation of S (Spearman)", "agreement": spearman(*sensitivity)},
        {"quantity": "rank correlation of C (Spearman)", "agreement": spearman(*score)},
        {"quantity": "share of heads in the same bucket", "agreement": (printed == reranked).mean()},
    ]
    for zone, number in (("Risky", 1), ("Safe", heads.m)):
        quantity = f"share of the {zone} Zone in the other's {zone} Zone"
        rows.append({"quantity": quantity, "agreement": (reranked == number)[printed == number].mean()})
    for label, function in (("smallest", np.min), ("mean", np.mean), ("largest", np.max)):
        rows.append({"quantity": f"{label} S"} | dict(zip(COLUMNS, map(function, sensitivity), strict=True)))
    for number in range(1, heads.m + 1):
        means = [values[own == number].mean() for values, own in zip(score, bucket, strict=True)]
        rows.append({"quantity": f"mean C of bucket {number}"} | dict(zip(COLUMNS, means, strict=True)))
    return pd.DataFrame(rows, columns=["quantity", *COLUMNS, "agreement"])


def other_maps_table(own: HeadMap, others: Mapping[str, HeadMap]) -> pd.DataFrame:
    """How far each other map is the run's own (F.3, F.4): rank correlations, heads in the same bucket."""
    rows = []
    for name, other in others.items():
        alike = {f"spearman_{score}": spearman(own.by(score), other.by(score)) for score in "OSC"}
        same, safe = own.bucket == other.bucket, own.bucket == own.m
        rows.append({"map": name} | alike | {"same_bucket": same.mean(), "same_safe_zone": same[safe].mean()})
    return pd.DataFrame(rows)
