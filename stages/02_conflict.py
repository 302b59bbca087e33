"""Stage 02: gradients of every head's W_q rows, and from them the optimization conflict O(h) (§3.2, Eq. 2);
and, for NeuronTune, what every MLP neuron contributes to safety and to utility.

    python -m stages.02_conflict --run outputs/smollm

Reads calibration.parquet; writes gradients.parquet: for each head the Gram matrix [2F, 2F] of F fold-mean
gradients of D_safe and of D_util, and what follows from it: dot, norms, O, and O's bootstrap interval over
folds. Every other map (--maps) has its own table, gradients-<map>.parquet. As many layers of a map as BLOCK
bytes of gradients allow are a unit (a small model is one unit).

With --pairs also neurons.parquet: integrated gradients of every neuron at the last prompt token. Safety: of
the refusal's loss, from a plain request to the same one inside an attack. Utility: of the right answer's
loss on as many rows of D_util, from zero. NeuronTune's abstract says "attribution"; integrated gradients is a
third party's reading of the paper, the paths, losses and rows are ours.
"""

import time

import numpy as np
import pyarrow as pa

from backends.base import Backend, Shape
from data.rendering import example
from stages import artifacts, cli, maps, metrics, neurons, presets, schemas
from stages import gram as gram_formulas
from stages.loading import load_backend
from stages.locks import parse_shard

NAME = "02_conflict"
USES = ["backend", "dtype", "device", "seed", "folds", "maps", "resamples", "pairs", "attribution_steps"]
NEURONS = {"neurons-safety": "safety", "neurons-utility": "utility"}
"""units of the attribution"""
INCOMPLETE = 0.1
"""share of the losses' change by which attributions may miss it without a warning"""
CALIBRATION = "01_calibrate/calibration.parquet"
BLOCK = 16 * 2**30
"""bytes of fold gradients that a unit holds in memory; fixed, so that units are the same on every machine"""


def units(shape: Shape, folds: int, map_: str) -> dict[str, range]:
    """Names of a map's units, and their layers."""
    layer = 2 * folds * shape.heads * shape.head_dim * shape.model_dim * 4
    size = max(1, BLOCK // layer)
    blocks = [range(first, min(first + size, shape.layers)) for first in range(0, shape.layers, size)]
    prefix = f"{map_}-" if map_ else ""
    return {f"{prefix}layers{block[0]:03d}-{block[-1]:03d}": block for block in blocks}


def conflict_rows(gram: np.ndarray, folds: int, generator: np.random.Generator, resamples: int) -> list[dict]:
    """The rows of gradients.parquet from Gram matrices [L, H, 2F, 2F]."""
    dot, norm_safe, norm_util = gram_formulas.conflict_from_gram(gram, folds)
    conflict = metrics.optimization_conflict(dot, norm_safe, norm_util)
    low, high = np.quantile(
        gram_formulas.bootstrap_conflict(gram, generator, resamples), [0.025, 0.975], axis=0
    )
    columns = {"dot": dot, "norm_safe": norm_safe, "norm_util": norm_util, "conflict": conflict}
    columns |= {"conflict_low": low, "conflict_high": high}
    return [
        {"layer": layer, "head": head, "gram": gram[layer, head].ravel().tolist()}
        | {name: values[layer, head] for name, values in columns.items()}
        for layer, head in np.ndindex(*conflict.shape)
    ]


def attribute(stage: artifacts.Stage, backend: Backend, unit: str, rows: list[dict], steps: int) -> None:
    """Keeps one side's score of every neuron, and what the attributions sum to beside what the loss did."""
    plain, attacked, util = (
        [example(row) for row in rows if row["role"] == role] for role in ("plain", "attacked", "util")
    )
    began = time.monotonic()
    if NEURONS[unit] == "safety":
        found = backend.attribute_neurons(attacked, plain, steps)
    else:
        found = backend.attribute_neurons(util[: len(plain)], None, steps)
    table = [
        {"layer": layer, "neuron": neuron, "score": found.score[layer, neuron]}
        for layer, neuron in np.ndindex(*found.score.shape)
    ]
    stage.write_part(unit, table, schemas.SCORED, seconds=round(time.monotonic() - began, 2), gap=found.gap)


def join_neurons(stage: artifacts.Stage) -> dict:
    """Writes neurons.parquet from its two units. Returns what the manifest tells of them."""
    parts = {side: stage.read_parts([unit], schemas.SCORED) for unit, side in NEURONS.items()}
    table = {name: parts["safety"][name] for name in ("layer", "neuron")}
    shape = tuple(int(table[name].to_numpy().max()) + 1 for name in table)
    for side, part in parts.items():
        table[side] = part["score"]
        table[f"{side}_rank"] = neurons.ranks(part["score"].to_numpy().reshape(shape)).ravel()
    gaps = {side: stage.units[unit]["gap"] for unit, side in NEURONS.items()}
    for side, gap in gaps.items():
        if gap > INCOMPLETE:
            stage.warn(
                f"{side} attributions of neurons miss {100 * gap:.0f} % of what the loss does along their "
                f"paths: raise --attribution-steps"
            )
    columns = [table[name] for name in schemas.NEURONS.names]
    stage.write("neurons.parquet", pa.table(columns, schema=schemas.NEURONS), schemas.NEURONS)
    return {"attribution_gap": gaps}


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES)
    shard = parse_shard(settings.shard)
    with artifacts.open_stage(settings.folder, NAME, uses, [CALIBRATION], shard=shard) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, CALIBRATION, schemas.EXAMPLES).to_pylist()
        presets.remember(settings)
        backend = load_backend(settings, stage)
        shape, folds = backend.shape, settings.folds
        names = [maps.OWN, *maps.asked(settings.maps, folds)]
        safe = [example(row) for row in rows if row["role"] == "safe"]
        util = {name: [example(row) for row in rows if row["role"] == (name or "util")] for name in names}
        blocks = {name: units(shape, folds, name) for name in names}
        every = [unit for name in names for unit in blocks[name]] + (list(NEURONS) if settings.pairs else [])
        stage.plan(every)
        left = stage.left(every)
        for name in names:
            stage.say(
                f"gradients of {len(safe)} safety and {len(util[name])} utility rows in {folds} folds each"
                + (f" (map {name})" if name else "")
            )
            for unit in (unit for unit in blocks[name] if unit in left):
                found = backend.gradient_gram(safe, util[name], folds, blocks[name][unit])
                told = [
                    {"layer": layer, "head": head, "gram": matrix.ravel().tolist()}
                    for layer, heads in zip(blocks[name][unit], found, strict=True)
                    for head, matrix in enumerate(heads)
                ]
                stage.write_part(unit, told, schemas.GRAM)
        for unit in (unit for unit in NEURONS if unit in left):
            stage.say(f"{NEURONS[unit]} attributions of {shape.layers * shape.mlp_dim} neurons")
            attribute(stage, backend, unit, rows, settings.attribution_steps)
        if not stage.gathers():
            return
        notes = {}
        for number, name in enumerate(names):
            matrices = stage.read_parts(list(blocks[name]), schemas.GRAM)["gram"].to_pylist()
            gram = np.array(matrices).reshape(shape.layers, shape.heads, 2 * folds, 2 * folds)
            generator = np.random.default_rng([settings.seed, 2, number] if name else [settings.seed, 2])
            table = conflict_rows(gram, folds, generator, settings.resamples)
            stage.write(maps.file("gradients", name), table, schemas.GRADIENTS)
            if zero := sum(row["norm_safe"] == 0 or row["norm_util"] == 0 for row in table):
                stage.warn(f"{zero} heads have no gradient at all: their O is 0.5 by convention")
            conflict = np.array([row["conflict"] for row in table])
            width = np.mean([row["conflict_high"] - row["conflict_low"] for row in table])
            stage.say(
                f"{f'map {name}: ' if name else ''}O: mean {conflict.mean():.3f}, range {conflict.min():.3f} "
                f"to {conflict.max():.3f}"
            )
            notes[name] = {
                "conflict_mean": float(conflict.mean()),
                "conflict_range": [float(conflict.min()), float(conflict.max())],
                "interval_width_mean": float(width),
            }
        others = {name: notes[name] for name in names if name}
        told = join_neurons(stage) if settings.pairs else {}
        stage.finish(**notes[maps.OWN], **({"maps": others} if others else {}), **told)


if __name__ == "__main__":
    cli.run(main, units=True)
