"""Stage 04: budget-matched sparse tuning, every arm x optimizer x seed (§3.5, §4.2, App. B).

    python -m stages.04_align --run outputs/smollm --seeds 21 42 84

An arm is a set of heads: all (`full`), one bucket of the conflict map (`bucket1` risky … `bucketM` safe),
as many heads drawn at random, or another selection (stages/arms.py). Only the location of what is trained
differs; rows, order, steps and LoRA's start do not. `pcgrad` projects against gradients of D_util (§4.2).
NeuronTune's arms tune gains of MLP neurons on the same rows, by meta-learning over families of attacks
(stages/neurons.py). Reads alignment.parquet, calibration.parquet, the maps and neurons.parquet; writes
adapters/<arm>-<optimizer>-<seed>/ (PEFT's format), training.parquet (a row a step) and arms.parquet. Each arm
x optimizer x seed is a unit.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from backends.base import Head, Recipe, Shape, Tuning
from backends.neurons import GainRecipe, Selection, outer_steps
from backends.progress import progress
from data.rendering import example
from stages import arms, artifacts, cli, maps, neurons, presets, schemas
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
    "pairs",
    "neurons",
    "lam",
    "gain_lr",
    "gain_inner_lr",
    "gain_inner_steps",
    "utility_objective",
]
ALIGNMENT, CALIBRATION = "01_calibrate/alignment.parquet", "01_calibrate/calibration.parquet"
NEURONS = "02_conflict/neurons.parquet"


def trainable_parameters(heads: list[Head], shape: Shape, rank: int) -> int:
    """What an arm trains: A of every layer it touches (a layer's heads share it), and its heads' rows of
    B."""
    return len({layer for layer, _ in heads}) * rank * shape.model_dim + len(heads) * shape.head_dim * rank


def tune(
    stage: artifacts.Stage,
    unit: str,
    labels: dict,
    what: str,
    steps: int,
    start: Callable[[Path, Path], Tuning],
) -> None:
    """Tunes one arm and keeps its adapter (moved into place complete) and its training records.

    Args:
        what: is tuned, in words.
        start: begins, given where the adapter goes and where a checkpoint is kept.
    """
    final = stage.folder / "adapters" / unit
    scratch = final.with_name(f".{unit}.tmp")
    for left_over in (scratch, final):
        shutil.rmtree(left_over, ignore_errors=True)
    records, began = [], time.monotonic()
    checkpoint = stage.part(unit).with_suffix(".checkpoint")
    tuning = start(scratch, checkpoint)
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
    told = f"{unit}: {what}"
    if records:
        few = max(1, min(5, len(records) // 2))
        first, last = (
            np.mean([record["loss"] for record in part]) for part in (records[:few], records[-few:])
        )
        told += f", loss {first:.3f} -> {last:.3f}, {seconds:.0f} s, {speed:.0f} tokens/s"
    stage.say(told)
    stage.write_part(
        unit, records, schemas.TRAINING, seconds=round(seconds, 2), tokens_per_second=round(speed, 1)
    )
    checkpoint.unlink(missing_ok=True)


def head_map(table: pa.Table, shape: Shape) -> arms.HeadMap:
    """What arms are chosen by, [L, H] each, from a table of schemas.HEADS."""
    names = ("conflict", "sensitivity", "score")
    return arms.HeadMap(**{name: table[name].to_numpy().reshape(shape.layers, shape.heads) for name in names})


def arm_row(
    labels: dict, unit: str, heads: list[Head], ranked: dict, m: int, shape: Shape, rank: int
) -> dict:
    """An arm of heads in arms.parquet."""
    own = ranked[arms.parse(labels["arm"], m).map]
    at = tuple(np.array(heads).T)
    return labels | {
        "adapter": f"adapters/{unit}",
        "layers": [layer for layer, _ in heads],
        "heads": [head for _, head in heads],
        "n_heads": len(heads),
        "n_layers": len({layer for layer, _ in heads}),
        "safety_neurons": [],
        "utility_neurons": [],
        "n_neurons": 0,
        "trainable_parameters": trainable_parameters(heads, shape, rank),
        "mean_conflict": float(own.conflict[at].mean()),
        "mean_sensitivity": float(own.sensitivity[at].mean()),
        "mean_score": float(own.score[at].mean()),
    }


def neuron_row(labels: dict, unit: str, chosen: Selection) -> dict:
    """An arm of neurons in arms.parquet; it trains one gain a neuron."""
    every = [*chosen.safety, *chosen.utility]
    return labels | {
        "adapter": f"adapters/{unit}",
        "layers": [],
        "heads": [],
        "n_heads": 0,
        "n_layers": len({layer for layer, _ in every}),
        "safety_neurons": [list(neuron) for neuron in chosen.safety],
        "utility_neurons": [list(neuron) for neuron in chosen.utility],
        "n_neurons": len(every),
        "trainable_parameters": len(every),
        "mean_conflict": None,
        "mean_sensitivity": None,
        "mean_score": None,
    }


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES)
    shard = parse_shard(settings.shard)
    m = settings.buckets
    names = [maps.OWN, *maps.asked(settings.maps, settings.folds)]
    reads = [ALIGNMENT, CALIBRATION, *(f"03_sensitivity/{maps.file('heads', name)}" for name in names)]
    units = {f"{one['arm']}-{one['optimizer']}-{one['seed']}": one for one in arms.units(settings)}
    of_neurons = [unit for unit, labels in units.items() if arms.parse(labels["arm"], m).of_neurons]
    with artifacts.open_stage(
        settings.folder, NAME, uses, reads + ([NEURONS] if of_neurons else []), 0.5, shard
    ) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, ALIGNMENT, schemas.EXAMPLES).to_pylist()
        calibration = artifacts.read_input(settings.folder, CALIBRATION, schemas.EXAMPLES).to_pylist()
        tables = [artifacts.read_input(settings.folder, relative, schemas.HEADS) for relative in reads[2:]]
        scored = artifacts.read_input(settings.folder, NEURONS, schemas.NEURONS) if of_neurons else None
        presets.remember(settings)
        backend = load_backend(settings, stage)
        shape = backend.shape
        ranked = {name: head_map(table, shape) for name, table in zip(names, tables, strict=True)}
        examples = [example(row) for row in rows]
        util = [example(row) for row in calibration if row["role"] == "util"]
        tasks = neurons.tasks(rows, examples)

        heads = {
            unit: arms.heads(labels["arm"], ranked, m, labels["seed"])
            for unit, labels in units.items()
            if unit not in of_neurons
        }
        chosen = {
            unit: neurons.of_arm(arms.parse(units[unit]["arm"], m), scored, units[unit]["seed"])
            for unit in of_neurons
        }
        stage.plan(list(units))
        for unit in stage.left(list(units)):
            labels = units[unit]
            if unit in chosen:
                gains = GainRecipe(
                    lam=arms.parse(labels["arm"], m).lam,
                    utility_objective=settings.utility_objective,
                    lr=settings.gain_lr,
                    inner_lr=settings.gain_inner_lr,
                    inner_steps=settings.gain_inner_steps,
                    epochs=settings.epochs,
                    batch=settings.batch * settings.accumulation,
                    max_length=settings.max_length,
                    seed=labels["seed"],
                )
                count = len(chosen[unit].safety), len(chosen[unit].utility)
                tune(
                    stage,
                    unit,
                    labels,
                    f"{count[0]} safety and {count[1]} utility neurons",
                    outer_steps(tasks, chosen[unit], gains),
                    lambda folder, checkpoint, unit=unit, gains=gains: backend.tune_gains(
                        tasks, chosen[unit], replace(gains, folder=folder, checkpoint=checkpoint)
                    ),
                )
                continue
            recipe = Recipe(
                rank=settings.rank,
                alpha=settings.alpha,
                lr=settings.lr,
                epochs=settings.epochs,
                batch=settings.batch,
                accumulation=settings.accumulation,
                max_length=settings.max_length,
                seed=labels["seed"],
                optimizer=labels["optimizer"],
            )
            reference = None if recipe.optimizer == "sft" else util
            tune(
                stage,
                unit,
                labels,
                f"{len(heads[unit])} heads",
                -(-len(examples) // (recipe.batch * recipe.accumulation)) * recipe.epochs,
                lambda folder, checkpoint, unit=unit, recipe=recipe, reference=reference: backend.tune(
                    examples,
                    heads[unit],
                    replace(recipe, folder=folder, checkpoint=checkpoint),
                    reference,
                ),
            )
        if not stage.gathers():
            return
        table = [
            neuron_row(labels, unit, chosen[unit])
            if unit in chosen
            else arm_row(labels, unit, heads[unit], ranked, m, shape, settings.rank)
            for unit, labels in units.items()
        ]
        training = stage.gather("training.parquet", list(units), schemas.TRAINING)
        stage.write("arms.parquet", table, schemas.ARMS)
        stage.finish(
            arms=len(units), steps=training.num_rows, tokens=int(training["tokens"].to_numpy().sum())
        )


if __name__ == "__main__":
    cli.run(main, units=True)
