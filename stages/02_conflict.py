"""Stage 02: gradients of every head's W_q rows, and from them the optimization conflict O(h) (§3.2, Eq. 2);
and, for NeuronTune, what every MLP neuron contributes to safety and to utility.

    python -m stages.02_conflict --run outputs/smollm

Reads calibration.parquet; writes gradients.parquet: for each head the Gram matrix [2F, 2F] of F fold-mean
gradients of D_safe and of D_util, and what follows from it: dot, norms, O (its interval is in heads.parquet);
and from the same passes, for every row, the gradient of its graded outcome in the head's gate, which to first
order is what ablating the head does (stage 03, --sensitivity gradient).
Every other map (--maps) has its own table, gradients-<map>.parquet. As many layers of a map as memory
allows are a unit (stages.run.diagnosis; a small model is one unit); for units of the same layers D_safe is
differentiated once.

With --pairs also neurons.parquet: integrated gradients of every neuron at the last prompt token. Safety: of
the refusal's loss, from a plain request to the same one inside an attack. Utility: of the right answer's
loss on as many rows of D_util, from zero. NeuronTune's abstract says "attribution"; integrated gradients is a
third party's reading of the paper, the paths, losses and rows are ours.
"""

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd

from backends.base import Shape
from data.sampling import PAIR
from stages.method.conflict_map import gradient_columns, head_columns
from stages.method.neurons import ranks
from stages.run import cli
from stages.run.diagnosis import calibration_examples, layer_blocks
from stages.run.job import Job, Stage, Units
from stages.run.schemas import ATTRIBUTIONS, CALIBRATION, GRADIENT_LISTS, GRADIENTS, GRAM, NEURONS, OWN_MAP

INCOMPLETE = 0.1
"""share of the losses' change by which attributions may miss it without a warning"""


@dataclass(frozen=True)
class Gradients:
    """A unit: some layers of a map."""

    map_name: str
    layers: range


@dataclass(frozen=True)
class Attributions:
    """A unit: one side's score of every neuron."""

    side: str


def gradient_units(shape: Shape, folds: int, map_name: str) -> dict[str, Gradients]:
    """A map's units."""
    prefix = "" if map_name == OWN_MAP else f"{map_name}-"
    return {
        f"{prefix}layers{block[0]:03d}-{block[-1]:03d}": Gradients(map_name, block)
        for block in layer_blocks(shape, folds)
    }


def units(job: Job) -> Units:
    settings, found = job.settings, {}
    for spec in settings.maps:
        found |= gradient_units(job.shape, settings.data.folds, spec.name)
    if settings.data.pairs:
        found |= {f"neurons-{side}": Attributions(side) for side in ATTRIBUTIONS}
    return found


def compute(job: Job, pending: Units) -> None:
    for layers, maps in by_layers(pending).items():
        differentiate(job, layers, maps)
    for unit, work in pending.items():
        if isinstance(work, Attributions):
            attribute(job, unit, work.side)


def by_layers(pending: Units) -> dict[range, dict[str, str]]:
    """Layers -> unit -> map: units that share the gradients of D_safe."""
    found: dict[range, dict[str, str]] = {}
    for unit, work in pending.items():
        if isinstance(work, Gradients):
            found.setdefault(work.layers, {})[unit] = work.map_name
    return found


def differentiate(job: Job, layers: range, maps: dict[str, str]) -> None:
    """Keeps the Gram matrices of some layers, of each unit's map."""
    folds, safe = job.settings.data.folds, calibration_examples(job, "safe")
    utils = {unit: calibration_examples(job, map_name) for unit, map_name in maps.items()}
    rows = " + ".join(
        f"{len(util)}" + (f" (map {map_name})" if map_name != OWN_MAP else "")
        for map_name, util in zip(maps.values(), utils.values(), strict=True)
    )
    job.say(f"gradients of {len(safe)} safety and {rows} utility rows in {folds} folds each")
    every = job.backend.map_gradients(safe, [*utils.values()], folds, layers, job.settings.map.mask)
    for unit, found in zip(utils, every, strict=True):
        columns = head_columns(found.gram.shape[:2])
        columns["layer"] = columns["layer"] + layers[0]
        for name in GRADIENT_LISTS:
            columns[name] = list(getattr(found, name).reshape(len(columns["head"]), -1))
        job.keep(unit, pd.DataFrame(columns), GRAM)


def attribute(job: Job, unit: str, side: str) -> None:
    """Keeps one side's score of every neuron, and what the attributions sum to beside what the loss did."""
    shape, steps = job.backend.shape, job.settings.map.attribution_steps
    plain, attacked = (calibration_examples(job, split) for split in PAIR)
    job.say(f"{side} attributions of {shape.layers * shape.mlp_dim} neurons")
    began = time.monotonic()
    if side == "safety":
        found = job.backend.attribute_neurons(attacked, plain, steps)
    else:
        found = job.backend.attribute_neurons(calibration_examples(job, OWN_MAP)[: len(plain)], None, steps)
    layer, neuron = np.indices(found.score.shape).reshape(2, -1)
    frame = pd.DataFrame({"layer": layer, "neuron": neuron, f"{side}_score": found.score.ravel()})
    job.keep(unit, frame, ATTRIBUTIONS[side], seconds=round(time.monotonic() - began, 2), gap=found.gap)


def join(job: Job) -> dict:
    """Writes a table of each map and that of the neurons."""
    notes = {spec.name: join_map(job, spec.name) for spec in job.settings.maps}
    own = notes.pop(OWN_MAP)
    return own | ({"maps": notes} if notes else {}) | (join_neurons(job) if job.settings.data.pairs else {})


def join_map(job: Job, map_name: str) -> dict:
    """O of every head (Eq. 2) from the Gram matrices."""
    shape, folds = job.shape, job.settings.data.folds
    parts = job.outputs(GRADIENTS, gradient_units(shape, folds, map_name), GRAM, map_name)
    gram = np.stack(parts["gram"]).reshape(shape.layers, shape.heads, 2 * folds, 2 * folds)
    columns = gradient_columns(gram) | {name: parts[name].to_numpy() for name in GRADIENT_LISTS}
    job.write(GRADIENTS, pd.DataFrame(columns), map_name)
    if zero := int(((columns["norm_safe"] == 0) | (columns["norm_util"] == 0)).sum()):
        job.warn(f"{zero} heads have no gradient at all: their O is 0.5 by convention")
    conflict = columns["optimization_conflict"]
    mean, low, high = float(conflict.mean()), float(conflict.min()), float(conflict.max())
    label = "" if map_name == OWN_MAP else f"map {map_name}: "
    job.say(f"{label}O: mean {mean:.3f}, range {low:.3f} to {high:.3f}")
    return {"conflict_mean": mean, "conflict_range": [low, high]}


def join_neurons(job: Job) -> dict:
    """Scores and ranks of every neuron by both sides."""
    columns, gaps = {}, {}
    for side, schema in ATTRIBUTIONS.items():
        scored = job.outputs(NEURONS, [f"neurons-{side}"], schema)
        score = scored[f"{side}_score"].to_numpy().reshape(job.shape.layers, -1)
        columns |= dict(scored.items()) | {f"{side}_rank": ranks(score).ravel()}
        gaps[side] = job.info[f"neurons-{side}"]["gap"]
        if gaps[side] > INCOMPLETE:
            job.warn(
                f"{side} attributions of neurons miss {100 * gaps[side]:.0f} % of what the loss does along "
                f"their paths: raise --attribution-steps"
            )
    job.write(NEURONS, pd.DataFrame(columns))
    return {"attribution_gap": gaps}


STAGE = Stage(
    name="02_conflict",
    rests_on=("model", "data", "map"),
    reads=(CALIBRATION,),
    writes=(GRADIENTS, NEURONS),
    units=units,
    compute=compute,
    join=join,
)


if __name__ == "__main__":
    cli.run(STAGE)
