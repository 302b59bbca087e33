"""The map by gradients: what stage 02, the drift of stage 05 and re-diagnosed arms of stage 04 share."""

from pathlib import Path

import numpy as np

from backends.base import Example, HeadGradients, Shape
from data.rendering import example
from stages.method import metrics
from stages.method.arrays import FloatArray
from stages.method.conflict_map import head_map
from stages.method.gradients import conflict_from_gram
from stages.method.heads import HeadMap
from stages.run.job import Job
from stages.run.schemas import CALIBRATION

BLOCK = 16 * 2**30
"""bytes of fold gradients that a unit holds in memory; fixed, so that units are the same on every machine"""


def layer_blocks(shape: Shape, folds: int) -> list[range]:
    """Layers whose gradients are taken together, as many as BLOCK allows: of a small model all."""
    layer = 2 * folds * shape.heads * shape.head_dim * shape.model_dim * 4  # bytes
    size = max(1, BLOCK // layer)
    return [range(first, min(first + size, shape.layers)) for first in range(0, shape.layers, size)]


def calibration_examples(job: Job, split: str) -> list[Example]:
    """The calibration rows of a split: "safe", or a map's name."""
    rows = job.read(CALIBRATION)
    return [example(row) for row in rows[rows["split"] == split].to_dict("records")]


def diagnose(job: Job, map_name: str, layers: range, adapter: Path | None) -> dict[str, FloatArray]:
    """What a map follows from, for some layers of the model with an adapter in place: dot and norms of the
    two gradients (Eq. 2), and H to first order, [l, H] each."""
    safe, util = calibration_examples(job, "safe"), calibration_examples(job, map_name)
    folds, mask = job.settings.data.folds, job.settings.map.mask
    return measures(job.backend.head_gradients(safe, util, folds, layers, mask, adapter))


def measures(found: HeadGradients) -> dict[str, FloatArray]:
    """The same from gradients."""
    dot, norm_safe, norm_util = conflict_from_gram(found.gram, found.gram.shape[-1] // 2)
    changes = {"h_gen": found.gate_util, "h_safe": found.gate_safe}
    changes = {name: metrics.mean_change(gates) for name, gates in changes.items()}
    return {"dot": dot, "norm_safe": norm_safe, "norm_util": norm_util} | changes


def scores(measured: dict[str, FloatArray], job: Job) -> HeadMap:
    """The map of all heads from `measures` of all layers."""
    conflict = metrics.optimization_conflict(*(measured[name] for name in ("dot", "norm_safe", "norm_util")))
    chosen = job.settings.map
    return head_map(conflict, measured["h_gen"], measured["h_safe"], chosen.variant, chosen.buckets)


def map_with(job: Job, map_name: str, adapter: Path) -> HeadMap:
    """The map of the model with an adapter in place."""
    blocks = layer_blocks(job.shape, job.settings.data.folds)
    parts = [diagnose(job, map_name, block, adapter) for block in blocks]
    return scores({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, job)
