"""Stage 04: budget-matched sparse tuning, every arm x optimizer x seed (§3.5, §4.2, App. B).

    python -m stages.04_align --run outputs/smollm --seeds 21 42 84

An arm is a set of heads: all (`full`), one bucket of the conflict map (`bucket1` risky … `bucketM` safe),
or as many heads drawn at random. Only the location of what is trained differs; rows, order, steps and
LoRA's start do not. Reads alignment.parquet and heads.parquet; writes adapters/<arm>-<optimizer>-<seed>/
(PEFT's format), training.parquet (a row a step) and arms.parquet. Each arm x optimizer x seed is a unit.
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
from stages import artifacts, cli, presets
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
    "seeds",
    "rank",
    "alpha",
    "lr",
    "epochs",
    "batch",
    "accumulation",
    "max_length",
]
ALIGNMENT, HEADS = "01_calibrate/alignment.parquet", "03_sensitivity/heads.parquet"


def arm_heads(arm: str, bucket: np.ndarray, seed: int) -> list[Head]:
    """The heads of an arm, sorted.

    Args:
        arm: "full", "random" or "bucketN".
        bucket: int [L, H] in 1..M.
        seed: of the random arm's draw. It is as large as the smallest bucket, the Safe Zone.
    """
    if arm == "full":
        chosen = np.argwhere(bucket > 0)
    elif arm == "random":
        every = np.argwhere(bucket > 0)
        size = np.bincount(bucket.ravel())[1:].min()
        chosen = every[np.random.default_rng([seed, 4]).choice(len(every), size, replace=False)]
    else:
        chosen = np.argwhere(bucket == int(arm.removeprefix("bucket")))
    return sorted((int(layer), int(head)) for layer, head in chosen)


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
) -> None:
    """Tunes one arm and keeps its adapter (moved into place complete) and its training records."""
    final = stage.folder / "adapters" / unit
    scratch = final.with_name(f".{unit}.tmp")
    for left_over in (scratch, final):
        shutil.rmtree(left_over, ignore_errors=True)
    records, began = [], time.monotonic()
    steps = -(-len(examples) // (recipe.batch * recipe.accumulation)) * recipe.epochs
    checkpoint = stage.part(unit).with_suffix(".checkpoint")
    tuning = backend.tune(examples, heads, dataclasses.replace(recipe, folder=scratch, checkpoint=checkpoint))
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
        unit, records, artifacts.TRAINING, seconds=round(seconds, 2), tokens_per_second=round(speed, 1)
    )
    checkpoint.unlink(missing_ok=True)


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES)
    shard = parse_shard(settings.shard)
    with artifacts.open_stage(settings.folder, NAME, uses, [ALIGNMENT, HEADS], 0.5, shard) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, ALIGNMENT, artifacts.EXAMPLES).to_pylist()
        map_ = artifacts.read_input(settings.folder, HEADS, artifacts.HEADS)
        presets.remember(settings)
        backend = load_backend(settings, stage)
        shape = backend.shape
        per_head = {
            name: map_[name].to_numpy().reshape(shape.layers, shape.heads)
            for name in ("conflict", "sensitivity", "score", "bucket")
        }
        examples = [example(row) for row in rows]

        arms = {
            f"{arm}-{optimizer}-{seed}": {"arm": arm, "optimizer": optimizer, "seed": seed}
            for seed in settings.seeds
            for optimizer in settings.optimizers
            for arm in settings.arms
        }
        heads = {
            unit: arm_heads(labels["arm"], per_head["bucket"], labels["seed"])
            for unit, labels in arms.items()
        }
        for unit in stage.left(list(arms)):
            recipe = Recipe(
                rank=settings.rank,
                alpha=settings.alpha,
                lr=settings.lr,
                epochs=settings.epochs,
                batch=settings.batch,
                accumulation=settings.accumulation,
                max_length=settings.max_length,
                seed=arms[unit]["seed"],
                optimizer=arms[unit]["optimizer"],
            )
            tune(stage, backend, unit, arms[unit], heads[unit], examples, recipe)
        if not stage.gathers(list(arms)):
            return
        table = []
        for unit, labels in arms.items():
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
                    "mean_conflict": float(per_head["conflict"][at].mean()),
                    "mean_sensitivity": float(per_head["sensitivity"][at].mean()),
                    "mean_score": float(per_head["score"][at].mean()),
                }
            )
        training: pa.Table = stage.gather("training.parquet", list(arms), artifacts.TRAINING)
        stage.write("arms.parquet", table, artifacts.ARMS)
        stage.finish(arms=len(arms), steps=training.num_rows, tokens=int(training["tokens"].to_numpy().sum()))


if __name__ == "__main__":
    cli.run(main, units=True)
