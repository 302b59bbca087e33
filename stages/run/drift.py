"""Drift (--drift): the map by gradients again with each arm's adapter in place, units of stage 05.

The paper's second limitation: its map is made once, before tuning, and conflict may move to other heads while
a model is tuned. Whatever --sensitivity is, the map of a tuned model is that by gradients, from one pass over
the run's own calibration rows, and is to be compared with the base model's by gradients (heads.parquet has
both). Arms of neurons have it too: their gains are an adapter like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from backends.core.progress import progress
from stages.method.arms import ArmRun
from stages.method.conflict_map import head_columns
from stages.run.diagnosis import diagnose, layer_blocks, scores
from stages.run.job import Job
from stages.run.schemas import DIAGNOSIS, DRIFT, OWN_MAP

MEASURED = DIAGNOSIS.names[5:]
"""columns of a unit beside its labels and heads"""


@dataclass(frozen=True)
class Diagnosis:
    """A unit: some layers of the map of one tuned model."""

    run: ArmRun
    layers: range

    @property
    def unit(self) -> str:
        return f"{self.run.name}-drift{self.layers[0]:03d}-{self.layers[-1]:03d}"


def units(job: Job) -> dict[str, Diagnosis]:
    """None without --drift, nor where a finished stage that is judged again has its drift."""
    if not job.settings.evaluation.drift or (job.judging_again and job.run.path(DRIFT).is_file()):
        return {}
    blocks = layer_blocks(job.shape, job.settings.data.folds)
    works = [Diagnosis(run, block) for run in job.settings.arm_runs for block in blocks]
    return {work.unit: work for work in works}


def compute(job: Job, pending: Mapping[str, Diagnosis]) -> None:
    for unit, work in progress(pending.items(), desc="drift", unit="unit"):
        adapter = job.run.folder / "04_align" / "adapters" / work.run.name
        found = diagnose(job, OWN_MAP, work.layers, adapter)
        columns = head_columns(found["dot"].shape)
        columns["layer"] = columns["layer"] + work.layers[0]
        frame = pd.DataFrame(columns | {name: values.ravel() for name, values in found.items()})
        job.keep(unit, frame.assign(**work.run.labels), DIAGNOSIS)


def join(job: Job) -> None:
    """Writes the map of every tuned model."""
    if not job.settings.evaluation.drift:
        return
    pending, shape = units(job), (job.shape.layers, job.shape.heads)
    rows = job.parts(pending, DIAGNOSIS) if pending else job.outputs(DRIFT, (), DIAGNOSIS)
    frames = []
    for _, own in rows.groupby(list(DIAGNOSIS.names[:3]), sort=False):
        measured = {name: own[name].to_numpy(float).reshape(shape) for name in MEASURED}
        found = {name: values.ravel() for name, values in scores(measured, job)._asdict().items()}
        frames.append(own.assign(**{name: values for name, values in found.items() if name not in own}))
    job.write(DRIFT, pd.concat(frames, ignore_index=True))
