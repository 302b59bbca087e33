"""Tables of the map itself: layers, extreme heads, the two readings of Eq. 5, and other maps beside it."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from stages import arms, metrics
from stages.reporting.figures import HeadMap

MOST_HEADS = 10


def head_map(table: pa.Table) -> HeadMap:
    """heads.parquet as arrays [L, H]."""
    shape = tuple(int(np.max(table[name].to_numpy())) + 1 for name in ("layer", "head"))
    names = ("conflict", "sensitivity", "score", "bucket")
    arrays = {name: table[name].to_numpy().reshape(shape) for name in names}
    probability = np.array(table["bucket_probability"].to_pylist(), dtype=np.float64).reshape(*shape, -1)
    own = np.take_along_axis(probability, arrays["bucket"][..., None] - 1, axis=-1)[..., 0]
    return HeadMap(**arrays, own_probability=own)


def layer_rows(heads: HeadMap) -> list[dict]:
    """Per layer the means of O, S and C, and the share of its heads in each bucket."""
    rows = []
    for layer in range(len(heads.score)):
        row = {"layer": layer}
        for name in ("conflict", "sensitivity", "score"):
            row[f"mean_{name}"] = float(getattr(heads, name)[layer].mean())
        for number in range(1, heads.m + 1):
            row[f"share_bucket{number}"] = float((heads.bucket[layer] == number).mean())
        rows.append(row)
    return rows


def extreme_heads(table: pa.Table) -> list[dict]:
    """The ten heads of highest and of lowest C (fewer of a small model), highest first, with intervals."""
    rows = sorted(table.to_pylist(), key=lambda row: (-row["score"], row["layer"], row["head"]))
    most = min(MOST_HEADS, len(rows) // 2)
    numbered = [{"rank": rank} | row for rank, row in enumerate(rows, start=1)]
    chosen = []
    for row in numbered[:most] + numbered[len(rows) - most :]:
        probability = row.pop("bucket_probability")[row["bucket"] - 1]
        chosen.append(row | {"probability_of_bucket": None if np.isnan(probability) else probability})
    return chosen


def variant_rows(h_gen: np.ndarray, h_safe: np.ndarray, conflict: np.ndarray, m: int) -> list[dict]:
    """How far Eq. 5 as printed and its re-ranked variant give the same map; all inputs [L, H]."""
    names = metrics.SENSITIVITY_VARIANTS
    sensitivity = {name: metrics.functional_sensitivity(h_gen, h_safe, name) for name in names}
    score = {name: metrics.conflict_score(conflict, sensitivity[name]) for name in names}
    bucket = {name: metrics.buckets(score[name], m) for name in names}
    printed, reranked = (bucket[name] for name in names)

    def row(quantity: str, values: tuple = (None, None), agreement: float | None = None) -> dict:
        return {"quantity": quantity, "as_printed": values[0], "reranked": values[1], "agreement": agreement}

    def rank_correlation(values: dict[str, np.ndarray]) -> float | None:
        if values[names[0]].size < 2:
            return None
        rho = metrics.correlation(*(values[name].ravel() for name in names)).spearman
        return None if np.isnan(rho) else rho

    rows = [
        row("rank correlation of S (Spearman)", agreement=rank_correlation(sensitivity)),
        row("rank correlation of C (Spearman)", agreement=rank_correlation(score)),
        row("share of heads in the same bucket", agreement=float((printed == reranked).mean())),
    ]
    for label, number in (("Risky", 1), ("Safe", m)):
        both = ((printed == number) & (reranked == number)).sum() / (printed == number).sum()
        rows.append(row(f"share of the {label} Zone in the other's {label} Zone", agreement=float(both)))
    for label, function in (("smallest", np.min), ("mean", np.mean), ("largest", np.max)):
        rows.append(row(f"{label} S", tuple(float(function(sensitivity[name])) for name in names)))
    for number in range(1, m + 1):
        means = tuple(float(score[name][bucket[name] == number].mean()) for name in names)
        rows.append(row(f"mean C of bucket {number}", means))
    return rows


def other_map_rows(own: arms.HeadMap, others: Mapping[str, arms.HeadMap], m: int) -> list[dict]:
    """How far each other map is the run's own (F.3, F.4): rank correlations, heads in the same bucket."""
    rows = []
    mine = metrics.buckets(own.score, m)
    for name, one in others.items():
        row: dict = {"map": name}
        for score in "OSC":
            values = (which.by(score).ravel() for which in (own, one))
            rho = metrics.correlation(*values).spearman if own.score.size > 1 else np.nan
            row[f"spearman_{score}"] = None if np.isnan(rho) else rho
        theirs = metrics.buckets(one.score, m)
        row["same_bucket"] = float((mine == theirs).mean())
        row["same_safe_zone"] = float(((mine == m) & (theirs == m)).sum() / (mine == m).sum())
        rows.append(row)
    return rows
