"""Units on Slurm: an array of jobs a stage, each a shard of it, then one that joins them; by submitit.

A job that is preempted or out of time is queued again by itself and goes on from the parts; one that fails is
submitted again, RETRIES times. The driver waits on the login node; one that dies is started again. Logs are
in <run>-jobs (https://github.com/facebookincubator/submitit).
"""

import math
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backends.errors import InputError
from stages import artifacts
from stages.launching.watching import RETRIES, SECONDS, compute, table, watch
from stages.settings import Settings

try:
    import submitit
except ImportError:
    submitit = None

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = "local"
"""stands for processes on this machine in place of Slurm's jobs"""
JOBS = 8
HOURS = 24.0
NAMES = {"gpus": "gpus_per_node", "cpus": "cpus_per_task", "mem": "mem"}
"""short names; what is not listed goes to sbatch under its own"""


class Asked(NamedTuple):
    """What --slurm says."""

    local: bool
    jobs: int
    """of an array"""
    parameters: dict
    """submitit's"""


def asked(text: str) -> Asked:
    """Reads "partition=gpu,gpus=1,jobs=16,hours=8". InputError names what is no such thing.

    >>> asked("partition=gpu,gpus=1,jobs=16").jobs
    16
    """
    local, jobs, hours = False, JOBS, HOURS
    found: dict = {}
    for one in text.split(","):
        key, equals, value = one.partition("=")
        if one == HERE:
            local = True
            continue
        try:
            if not (key and equals and value):
                raise ValueError
            if key == "jobs":
                jobs = int(value)
            elif key == "hours":
                hours = float(value)
            else:
                key = NAMES.get(key, key.replace("-", "_"))
                found[key] = int(value) if key in ("gpus_per_node", "cpus_per_task") else value
        except ValueError:
            raise InputError(
                f"--slurm {one}: key=value, for example partition=gpu,gpus=1,jobs=16,hours=8,mem=64GB; other "
                f"keys are sbatch's"
            ) from None
    other = found.keys() - {"gpus_per_node"}
    if local and other:
        raise InputError(
            f"--slurm {HERE}: only jobs, hours and gpus count there, not {', '.join(sorted(other))}"
        )
    if jobs < 1 or not 0 < hours < math.inf:
        raise InputError(f"--slurm: jobs and hours must be positive, not {jobs} and {hours:g}")
    return Asked(local, jobs, {"time": math.ceil(60 * hours)} | found)


@dataclass
class Job:
    """What a job runs: a shard of a stage; with an empty one, the whole stage, which joins the others'."""

    settings: Settings
    name: str
    shard: str
    folder: str

    def __call__(self) -> str:
        """A user's mistake, one line; empty: none."""
        os.chdir(self.folder)
        return compute(self.settings, self.name, self.shard)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Called by submitit before Slurm takes the node away: the same again; its parts are kept."""
        return submitit.helpers.DelayedSubmission(self)


def script(settings: Settings, told: Asked, name: str, jobs: int) -> str:
    """The sbatch script of a stage."""
    _needs()
    from submitit.slurm.slurm import _make_sbatch_string

    folder = logs(settings)
    return _make_sbatch_string(
        command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]),
        folder=folder,
        job_name=f"cast-{name}",
        map_count=jobs if jobs > 1 else None,
        **sbatch_parameters(told.parameters),
    )


def sbatch_parameters(parameters: dict) -> dict:
    """What submitit knows by name, and the rest as it hands it on to sbatch."""
    known = submitit.SlurmExecutor._valid_parameters()
    other = {key: value for key, value in parameters.items() if key not in known}
    return {key: value for key, value in parameters.items() if key in known} | {
        "additional_parameters": other or None
    }


def logs(settings: Settings) -> Path:
    """Where jobs' logs and what submitit hands them lie: beside the run, which holds artifacts only."""
    return settings.folder.resolve().with_name(f"{settings.folder.name}-jobs")


def _needs() -> None:
    if submitit is None:
        raise InputError("--slurm needs submitit: `.venv/bin/pip install -r requirements-slurm.txt`")


class SlurmEngine:
    """See watching.Engine."""

    def __init__(self, settings: Settings, text: str):
        _needs()
        self.settings, self.asked = settings, asked(text)
        os.environ["PYTHONPATH"] = ":".join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        folder = logs(settings)
        parameters = self.asked.parameters
        try:
            if self.asked.local:
                self.executor = submitit.LocalExecutor(folder)
                gpus = parameters.get("gpus_per_node", 0)
                self.executor.update_parameters(timeout_min=parameters["time"], gpus_per_node=gpus)
            else:
                self.executor = submitit.SlurmExecutor(folder)
                self.executor.update_parameters(**sbatch_parameters(parameters), job_name="cast")
        except RuntimeError:
            raise InputError(
                "--slurm: no srun on this machine: start it on a login node, or say --slurm local"
            ) from None
        self.rows: list[tuple[str, ...]] = [("stage", "jobs", "failed", "time")]

    def run(self, name: str) -> None:
        began, failed = time.monotonic(), 0
        if not (self.settings.folder / name / artifacts.MANIFEST).is_file() and self.asked.jobs > 1:
            count = self.asked.jobs
            failed = self._all(name, [f"{number}/{count}" for number in range(1, count + 1)])
        failed += self._all(name, [""])
        self.rows.append((name, str(self.asked.jobs), str(failed), f"{time.monotonic() - began:.0f} s"))

    def _submit(self, name: str, shards: list[str]) -> dict:
        """Jobs, and the shard that each makes."""
        jobs = [Job(self.settings, name, shard, os.getcwd()) for shard in shards]
        try:
            return dict(zip(self.executor.submit_array(jobs), shards, strict=True))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            told = " ".join(str(error).split())[:300]
            raise InputError(f"--slurm: sbatch refused the job ({told}): see its options") from None

    def _all(self, name: str, shards: list[str]) -> int:
        """Runs jobs to their end; returns how many failed and were submitted again. However it ends, none is
        left running."""
        failed: Counter = Counter()
        running = self._submit(name, shards)
        try:
            with watch(self.settings.folder / name) as bar:
                while running:
                    time.sleep(SECONDS)
                    self._turn(name, running, failed)
                    bar.look(f"{len(running)} jobs")
        finally:
            for job in running:
                job.cancel(check=False)
        return sum(failed.values())

    def _turn(self, name: str, running: dict, failed: Counter) -> None:
        """Takes out the jobs that have ended, and submits those that failed again."""
        again = []
        for job in [job for job in running if job.done()]:
            shard = running.pop(job)
            why = self._ended(job)
            if not why:
                continue
            failed[shard] += 1
            if failed[shard] > RETRIES:
                raise InputError(
                    f"{name}: job {job.job_id} failed {failed[shard]} times ({why}): its log is "
                    f"{job.paths.stderr}"
                )
            again.append(shard)
        if again:
            running.update(self._submit(name, again))

    def _ended(self, job: "submitit.Job") -> str:
        """Why a job failed, or nothing. InputError where the stage refused its input: no other job would do
        better."""
        try:
            refused = job.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            return str(error).strip().splitlines()[-1][:200]
        if refused:
            raise InputError(refused)
        return ""

    def told(self) -> list[str]:
        return table(self.rows)

    def close(self) -> None:
        """Nothing is held between jobs."""
