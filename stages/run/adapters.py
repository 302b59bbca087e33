"""How a tuning of stage 04 is followed and its adapter kept."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from backends.base import Tuning
from backends.core.files import write_json
from backends.core.progress import progress
from stages.method.arms import ArmRun
from stages.run.runner import Job
from stages.run.schemas import TRAINING
from stages.run.store import read_json

CONFIG = "adapter_config.json"


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
    records, began = [], time.monotonic()
    tuning = start(scratch, checkpoint)
    for record in progress(tuning, total=steps, desc=unit, unit="step"):
        if tuning.repeated and not records:
            job.say(f"{unit} goes on after step {tuning.repeated} of {steps}")
        records.append(run.labels | record)
    seconds = time.monotonic() - began
    # The backend knows a folder; readers of the adapter know the model by its id.
    config = read_json(scratch / CONFIG) | {"base_model_name_or_path": job.model["id"]}
    write_json(scratch / CONFIG, config)
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
