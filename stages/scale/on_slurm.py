"""Units on Slurm: an array of jobs a stage, each a shard of it, then one that joins them; by submitit.

A job that is preempted or out of time is queued again by itself and goes on from the parts; one that fails is
submitted again. The driver waits on the login node. Logs are in <run>-jobs
(https://github.com/facebookincubator/submitit).
"""

import math
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass

from tabulate import tabulate

from backends.core.errors import InputError
from stages.run.pipeline import WITH_UNITS
from stages.run.provenance import ROOT
from stages.run.settings import Settings
from stages.run.store import RunFolder
from stages.scale.engine import LOCAL, RETRIES, SECONDS, Options, compute, watch

try:
    import submitit
except ImportError:
    submitit = None

JOBS = 8
HOURS = 24.0
NAMES = {"gpus": "gpus_per_node", "cpus": "cpus_per_task"}
"""short names of numbers; other keys go to sbatch as they are"""


@dataclass(frozen=True)
class Request:
    """What --slurm says."""

    local: bool
    """processes on this machine in place of Slurm's jobs"""
    jobs: int
    """of an array"""
    parameters: dict
    """submitit's, in its own names"""


def parse_request(text: str) -> Request:
    """Reads "partition=gpu,gpus=1,jobs=16,hours=8". InputError names what is no such thing.

    >>> parse_request("partition=gpu,gpus=1,jobs=16").jobs
    16
    """
    words = text.split(",")
    found = dict(_parse(word) for word in words if word != LOCAL)
    local, jobs, hours = LOCAL in words, found.pop("jobs", JOBS), found.pop("hours", HOURS)
    if local and (other := found.keys() - {"gpus_per_node"}):
        raise InputError(
            f"--slurm {LOCAL}: only jobs, hours and gpus count there, not {', '.join(sorted(other))}"
        )
    if jobs < 1 or not 0 < hours < math.inf:
        raise InputError(f"--slurm: jobs and hours must be positive, not {jobs} and {hours:g}")
    return Request(local, jobs, {"time": math.ceil(60 * hours)} | found)


def _parse(word: str) -> tuple[str, object]:
    key, _, value = word.partition("=")
    kind = {"jobs": int, "hours": float}.get(key, int if key in NAMES else str)
    try:
        if not (key and value):
            raise ValueError
        return NAMES.get(key, key.replace("-", "_")), kind(value)
    except ValueError:
        raise InputError(
            f"--slurm {word}: key=value, for example partition=gpu,gpus=1,jobs=16,hours=8,mem=64GB; other "
            f"keys are sbatch's"
        ) from None


@dataclass
class ShardJob:
    """What a job runs: a shard of a stage; with an empty one, the whole stage, which joins the others'."""

    settings: Settings
    name: str
    shard: str
    folder: str

    def __call__(self) -> str | None:
        """Returns the message of bad input, one line."""
        os.chdir(self.folder)
        return compute(self.settings, self.name, self.shard)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Called by submitit before Slurm takes the node away: the same again; its parts are kept."""
        return submitit.helpers.DelayedSubmission(self)


def sbatch_parameters(parameters: dict) -> dict:
    """What submitit knows by name, and the rest as it hands it on to sbatch."""
    known = submitit.SlurmExecutor._valid_parameters()
    other = {key: value for key, value in parameters.items() if key not in known}
    return {key: value for key, value in parameters.items() if key in known} | {
        "additional_parameters": other or None
    }


class SlurmEngine:
    """See engine.Engine."""

    def __init__(self, settings: Settings, options: Options):
        if submitit is None:
            raise InputError("--slurm needs submitit: `.venv/bin/pip install -r requirements-slurm.txt`")
        self.settings, self.request = settings, parse_request(options.slurm)
        # Beside the run, which holds artifacts only: logs, and what submitit hands to jobs.
        self.logs = settings.folder.resolve().with_name(f"{settings.folder.name}-jobs")
        self.rows: list[tuple] = []

    def plan(self) -> str:
        """The scripts that sbatch would get."""
        jobs, scripts = self.request.jobs, []
        for name in WITH_UNITS:
            script = submitit.slurm.slurm._make_sbatch_string(
                command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(self.logs)]),
                folder=self.logs,
                job_name=f"cast-{name}",
                map_count=jobs if jobs > 1 else None,
                **sbatch_parameters(self.request.parameters),
            )
            scripts += [f"# {name}: {jobs} jobs, then one that joins them", script]
        return "\n".join(scripts)

    def start(self) -> None:
        os.environ["PYTHONPATH"] = ":".join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        parameters = self.request.parameters
        if self.request.local:
            self.executor = submitit.LocalExecutor(self.logs)
            gpus = parameters.get("gpus_per_node", 0)
            self.executor.update_parameters(timeout_min=parameters["time"], gpus_per_node=gpus)
            return
        try:
            self.executor = submitit.SlurmExecutor(self.logs)
        except RuntimeError:
            raise InputError(
                "--slurm: no srun on this machine: start it on a login node, or say --slurm local"
            ) from None
        self.executor.update_parameters(**sbatch_parameters(parameters), job_name="cast")

    def run(self, name: str) -> None:
        began, failed, count = time.monotonic(), 0, self.request.jobs
        if not RunFolder(self.settings.folder).is_finished(name) and count > 1:
            failed = self._run_all(name, [f"{number}/{count}" for number in range(1, count + 1)])
        failed += self._run_all(name, [""])
        self.rows.append((name, count, failed, time.monotonic() - began))

    def _submit(self, name: str, shards: list[str]) -> dict:
        """Jobs, and the shard that each makes."""
        jobs = [ShardJob(self.settings, name, shard, os.getcwd()) for shard in shards]
        try:
            return dict(zip(self.executor.submit_array(jobs), shards, strict=True))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            message = " ".join(str(error).split())[:300]
            raise InputError(f"--slurm: sbatch refused the job ({message}): see its options") from None

    def _run_all(self, name: str, shards: list[str]) -> int:
        """Runs jobs to their end; returns how many failed and were submitted again. However it ends, none is
        still running then."""
        failed: Counter = Counter()
        with watch(name, self.settings) as watched:
            running = self._submit(name, shards)
            try:
                while running:
                    time.sleep(SECONDS)
                    self._turn(name, running, failed)
                    watched.show(f"{len(running)} jobs")
            finally:
                for job in running:
                    job.cancel(check=False)
        return failed.total()

    def _turn(self, name: str, running: dict, failed: Counter) -> None:
        """Takes out the jobs that have ended, and submits those that failed again."""
        again = []
        for job in [job for job in running if job.done()]:
            shard = running.pop(job)
            if (why := self._failure(job)) is None:
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

    def _failure(self, job: "submitit.Job") -> str | None:
        """Why a job failed. InputError where the stage refused its input: no other job would do better."""
        try:
            refused = job.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            return str(error).strip().splitlines()[-1][:200]
        if refused is not None:
            raise InputError(refused)
        return None

    def summary(self) -> str:
        headers = ("stage", "jobs", "failed", "time (s)")
        return tabulate(self.rows, headers=headers, tablefmt="plain", floatfmt=".0f")

    def close(self) -> None:
        """Nothing is held between jobs."""
