"""Stage 04: budget-matched sparse tuning, every arm x optimizer x seed (§3.5, §4.2, App. B).

    python -m stages.04_align --run outputs/smollm --seeds 21 42 84

An arm is a set of heads: all (`full`), one bucket of the conflict map (`bucket1` risky … `bucketM` safe),
as many heads drawn at random, or another selection (stages/arms.py). Only the location of what is trained
differs; rows, order, steps and LoRA's start do not. `pcgrad` projects against gradients of D_util (§4.2).
Reads alignment.parquet, calibration.parquet and the maps; writes adapters/<arm>-<optimizer>-<seed>/ (PEFT's
format), training.parquet (a row a step) and arms.parquet. Each arm x optimizer x seed is a unit.
"""

import dataclasses
import os
import shutil
import time

import numpy as np
import pyarrow as pa

from backends.base import Backend, Head, Recipe, Shape
from backends.progress import progress
from data.examples import Example
from data.rendering import example
from stages import arms, artifacts, cli, maps, presets, schemas
from stages.loading import load_backend
from stages.locks import parse_shard

NAME = "04_align"
USES = [
    "backend",
    "dtype",
    "device",
    "buckets",
    "arms",
    "optimizers",
    "ablations",
    "maps",
    "folds",
    "seeds",
    "rank",
    "alpha",
    "lr",
    "epochs",
    "batch",
    "accumulation",
    "max_length",
]
ALIGNMENT, CALIBRATION = "01_calibrate/alignment.parquet", "01_calibrate/calibration.parquet"


def trainable_parameters(heads: list[Head], shape: Shape, rank: int) -> int:
    """What an arm trains: A of every layer it touches (a layer's heads share it), and its heads' rows of
    B."""
    return len({layer for layer, _ in heads}) * rank * shape.model_dim + len(heads) * shape.head_dim * rank


def tune(
    stage: artifacts.Stage,
    backend: Backend,
    unit: str,
    labels: dict,
    heads: list[Head],
    examples: list[Example],
    recipe: Recipe,
    reference: list[Example] | None,
) -> None:
    """Tunes one arm and keeps its adapter (moved into place complete) and its training records.

    Args:
        reference: D_util, for pcgrad.
    """
    final = stage.folder / "adapters" / unit
    scratch = final.with_name(f".{unit}.tmp")
    for left_over in (scratch, final):
        shutil.rmtree(left_over, ignore_errors=True)
    records, began = [], time.monotonic()
    steps = -(-len(examples) // (recipe.batch * recipe.accumulation)) * recipe.epochs
    checkpoint = stage.part(unit).with_suffix(".checkpoint")
    tuning = backend.tune(
        examples, heads, dataclasses.replace(recipe, folder=scratch, checkpoint=checkpoint), reference
    )
    for record in progress(tuning, total=steps, desc=unit, unit="step"):
        if tuning.repeated and not records:
            stage.say(f"{unit} goes on after step {tuning.repeated} of {steps}")
        records.append(labels | record)
    seconds = time.monotonic() - began
    config = artifacts.read_json(scratch / "adapter_config.json")
    artifacts.write_json(
        scratch / "adapter_config.json", config | {"base_model_name_or_path": stage.model["id"]}
    )
    os.replace(scratch, final)
    speed = sum(record["tokens"] for record in records[tuning.repeated :]) / seconds
    few = max(1, min(5, len(records) // 2))
    first, last = (np.mean([record["loss"] for record in part]) for part in (records[:few], records[-few:]))
    stage.say(
        f"{unit}: {len(heads)} heads, loss {first:.3f} -> {last:.3f}, {seconds:.0f} s, {speed:.0f} tokens/s"
    )
    stage.write_part(
        unit, records, schemas.TRAINING, seconds=round(seconds, 2), tokens_per_second=round(speed, 1)
    )
    checkpoint.unlink(missing_ok=True)


def head_map(table: pa.Table, shape: Shape) -> arms.HeadMap:
    """What arms are chosen by, [L, H] each, from a table of schemas.HEADS."""
    names = ("conflict", "sensitivity", "score")
    return arms.HeadMap(**{name: table[name].to_numpy().reshape(shape.layers, shape.heads) for name in names})


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES)
    shard = parse_shard(settings.shard)
    names = [maps.OWN, *maps.asked(settings.maps, settings.folds)]
    reads = [ALIGNMENT, CALIBRATION, *(f"03_sensitivity/{maps.file('heads', name)}" for name in names)]
    with artifacts.open_stage(settings.folder, NAME, uses, reads, 0.5, shard) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, ALIGNMENT, schemas.EXAMPLES).to_pylist()
        calibration = artifacts.read_input(settings.folder, CALIBRATION, schemas.EXAMPLES).to_pylist()
        tables = [artifacts.read_input(settings.folder, relative, schemas.HEADS) for relative in reads[2:]]
        presets.remember(settings)
        backend = load_backend(settings, stage)
        shape = backend.shape
        ranked = {name: head_map(table, shape) for name, table in zip(names, tables, strict=True)}
        examples = [example(row) for row in rows]
        util = [example(row) for row in calibration if row["role"] == "util"]

        units = {
            f"{labels['arm']}-{labels['optimizer']}-{labels['seed']}": labels
            for labels in arms.units(settings)
        }
        heads = {
            unit: arms.heads(labels["arm"], ranked, settings.buckets, labels["seed"])
            for unit, labels in units.items()
        }
        for unit in stage.left(list(units)):
            recipe = Recipe(
                rank=settings.rank,
                alpha=settings.alpha,
                lr=settings.lr,
                epochs=settings.epochs,
                batch=settings.batch,
                accumulation=settings.accumulation,
                max_length=settings.max_length,
                seed=units[unit]["seed"],
                optimizer=units[unit]["optimizer"],
            )
            reference = None if recipe.optimizer == "sft" else util
            tune(stage, backend, unit, units[unit], heads[unit], examples, recipe, reference)
        if not stage.gathers(list(units)):
            return
        table = []
        for unit, labels in units.items():
            own = ranked[arms.parse(labels["arm"], settings.buckets).map]
            at = tuple(np.array(heads[unit]).T)
            table.append(
                labels
                | {
                    "adapter": f"adapters/{unit}",
                    "layers": [layer for layer, _ in heads[unit]],
                    "heads": [head for _, head in heads[unit]],
                    "n_heads": len(heads[unit]),
                    "n_layers": len({layer for layer, _ in heads[unit]}),
                    "trainable_parameters": trainable_parameters(heads[unit], shape, settings.rank),
                    "mean_conflict": float(own.conflict[at].mean()),
                    "mean_sensitivity": float(own.sensitivity[at].mean()),
                    "mean_score": float(own.score[at].mean()),
                }
            )
        training = stage.gather("training.parquet", list(units), schemas.TRAINING)
        stage.write("arms.parquet", table, schemas.ARMS)
        stage.finish(
            arms=len(units), steps=training.num_rows, tokens=int(training["tokens"].to_numpy().sum())
        )


if __name__ == "__main__":
    cli.run(main, units=True)
