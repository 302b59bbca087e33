"""How a stage runs: lock, skip, units, resume, shard, manifest.

Its units are computed one by one, each kept as a part under a digest of what it was made from; `join` turns
the parts into the stage's tables. Killed at any moment, the same command does what is missing and ends in the
same files.
"""

import shutil
from collections.abc import Callable

from backends.core.errors import InputError
from backends.core.locking import soft_warning
from stages.run import threads
from stages.run.job import Job, Stage, Units
from stages.run.locks import run_lock
from stages.run.settings import Settings
from stages.run.store import RunFolder


def run_stage(
    stage: Stage, settings: Settings, compute: Callable[[Job, Units], None] = threads.compute
) -> None:
    """Makes a stage, or what is missing of it, or this shard's share; a finished one is skipped.

    Args:
        compute: computes and keeps its units, here or elsewhere.

    Raises InputError, one line, where it cannot be made.
    """
    job = Job(stage, settings)
    _ = job.inputs
    with run_lock(settings.folder, job.shard) as soft:
        if soft:
            job.warn(soft_warning(settings.folder))
        free = shutil.disk_usage(settings.folder).free / 2**30
        if free < stage.needed_gib:
            raise InputError(
                f"{settings.folder} has {free:.2f} GiB free, stage {stage.name} wants "
                f"{stage.needed_gib:.2f}: make space"
            )
        if job.find():
            job.say("is done and unchanged: skipped")
            return
        for relative in job.inputs:
            job.run.check(relative)
        stage.before(settings)
        job.check_settings()
        units = stage.units(job)
        pending = job.pending(units)
        if pending:
            compute(job, pending)
        if job.shard is not None:
            done = sum(job.part_path(unit).is_file() for unit in units)
            job.say(
                f"shard {settings.run.shard} is done; {done} of {len(units)} units of the stage are. When "
                f"all are, `python -m stages.{stage.name} --run {settings.folder}` joins them"
            )
            return
        notes = stage.join(job)
        job.remember()
        job.finish(notes)


def unit_states(stage: Stage, settings: Settings, run: RunFolder | None = None) -> dict[str, bool]:
    """Every unit of a stage in order, and whether it is finished; needs the stage's inputs, and no lock.

    Args:
        run: what the inputs are read from; None: the run's own folder.
    """
    job = Job(stage, settings, run)
    finished = job.run.is_finished(stage.name)
    return {unit: finished or job.part_path(unit).is_file() for unit in stage.units(job)}
