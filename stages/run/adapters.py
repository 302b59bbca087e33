"""Tunings of stage 04: their recipes, and how one is followed and its adapter kept."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from backends.base import Example, GainRecipe, Head, Recipe, Redraw, Task, Tuning
from backends.core.files import write_json
from backends.core.progress import progress
from stages.method.arms import ArmRun, bucket_heads
from stages.method.neurons import task_rows
from stages.run import tracking
from stages.run.diagnosis import calibration_examples, map_with
from stages.run.job import Job
from stages.run.schemas import TRAINING
from stages.run.settings import Settings
from stages.run.store import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def lora_recipe(settings: Settings, run: ArmRun) -> Recipe:
    """How an arm of heads is tuned."""
    names = ("rank", "alpha", "lr", "epochs", "batch", "accumulation")
    return Recipe(
        **{name: getattr(settings.tuning, name) for name in names},
        max_length=settings.data.max_length,
        seed=run.seed,
        optimizer=run.optimizer,
    )


def gain_recipe(settings: Settings, run: ArmRun) -> GainRecipe:
    """How an arm of neurons is tuned."""
    tuning = settings.tuning
    return GainRecipe(
        lam=run.arm.lam,
        utility_objective=tuning.utility_objective,
        lr=tuning.gain_lr,
        inner_lr=tuning.gain_inner_lr,
        inner_steps=tuning.gain_inner_steps,
        epochs=tuning.epochs,
        batch=tuning.batch * tuning.accumulation,
        max_length=settings.data.max_length,
        seed=run.seed,
    )


def tasks_of(rows: pd.DataFrame, examples: list[Example]) -> list[Task]:
    """The tasks of NeuronTune's meta-learning, from alignment rows."""
    found = task_rows(rows["split"].tolist(), rows["source"].tolist())
    return [
        Task(task.name, *(tuple(examples[at] for at in part) for part in (task.harmful, task.benign)))
        for task in found
    ]


def redraw_of(job: Job, run: ArmRun) -> Redraw:
    """How a bucket is drawn anew: from the map by gradients of the model with the adapter so far."""

    def draw(adapter: Path) -> list[Head]:
        ranked = map_with(job, run.arm.map, adapter).by(run.arm.ranked_by)
        return [tuple(head) for head in bucket_heads(run.arm, ranked).tolist()]

    rows = (*calibration_examples(job, "safe"), *calibration_examples(job, run.arm.map))
    return Redraw(job.settings.tuning.rediagnose, draw, rows)


def drawn_heads(training: pd.DataFrame, run: ArmRun) -> list[list[Head]]:
    """The heads of an arm at each of its draws; of one that is not re-diagnosed none."""
    own = training[(training[list(run.labels)] == pd.Series(run.labels)).all(axis=1)]
    return [[tuple(map(int, head)) for head in drawn] for drawn in own["drawn"].dropna()]


def run_tuning(job: Job, run: ArmRun, what: str, steps: int, start: Callable[[Path, Path], Tuning]) -> None:
    """Tunes an arm and keeps its adapter (moved into place complete) and a record of each step.

    Args:
        what: is tuned, in words.
        start: begins the tuning, given where the adapter goes and where a checkpoint is kept.
    """
    unit = run.name
    final = job.folder / "adapters" / unit
    scratch = final.with_name(f".{unit}.tmp")
    for folder in (scratch, final):
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint = job.part_path(unit).with_suffix(".checkpoint")
    records, heads, began = [], None, time.monotonic()
    tuning = start(scratch, checkpoint)
    with tracking.tracked(job.settings.run.track, job.settings.folder, unit, job.warn) as tracker:
        for record in progress(tuning, total=steps, desc=unit, unit="step"):
            if tuning.repeated and not records:
                job.say(f"{unit} goes on after step {tuning.repeated} of {steps}")
            records.append(run.labels | record)
            if record["drawn"] is not None:
                drawn = set(map(tuple, record["drawn"]))
                if heads is not None:
                    entered = len(drawn - heads)
                    job.say(
                        f"{unit}: {entered} of {len(drawn)} heads are others from step {record['step']} on"
                    )
                heads = drawn
            if len(records) > tuning.repeated:
                tracker.log(tracking.of_step(record), record["step"])
    seconds = time.monotonic() - began
    # The backend knows a folder; readers of the adapter know the model by its id.
    config = read_json(scratch / CONFIG) | {"base_model_name_or_path": job.model["id"]}
    write_json(scratch / CONFIG, config)
    # safetensors makes files that their owner alone can read; the umask says who may.
    shutil.copymode(scratch / CONFIG, scratch / WEIGHTS)
    os.replace(scratch, final)
    speed = sum(record["tokens"] for record in records[tuning.repeated :]) / seconds
    message = f"{unit}: {what}"
    if records:
        few = max(1, min(5, len(records) // 2))
        first, last = (
            np.mean([record["loss"] for record in part]) for part in (records[:few], records[-few:])
        )
        message += f", loss {first:.3f} -> {last:.3f}, {seconds:.0f} s, {speed:.0f} tokens/s"
    job.say(message)
    frame = pd.DataFrame(records, columns=TRAINING.schema.names)
    job.keep(unit, frame, TRAINING.schema, seconds=round(seconds, 2), tokens_per_second=round(speed, 1))
    checkpoint.unlink(missing_ok=True)
