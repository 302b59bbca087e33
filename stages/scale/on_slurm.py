"""Units on Slurm: an array of jobs a stage, which share its units; by submitit.

A job that is preempted or out of time is queued again by itself and goes on from the parts; one that fails is
submitted again. The driver waits on the login node. Logs are in <run>-jobs
(https://github.com/facebookincubator/submitit).
"""

import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from backends.core.errors import InputError
from stages.run.pipeline import WITH_UNITS
from stages.run.provenance import ROOT
from stages.run.settings import Settings
from stages.scale.engine import LOCAL, SECONDS, Call, Options, Outcome

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
    if negative := [value for value in found.values() if isinstance(value, int) and value < 0]:
        raise InputError(f"--slurm: gpus and cpus must not be negative, not {negative[0]}")
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
class SlurmCall:
    """A call as submitit runs it."""

    call: Call

    def __call__(self) -> Outcome:
        return self.call()

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
        self.request = parse_request(options.slurm)
        # Beside the run, which holds artifacts only: logs, and what submitit hands to jobs.
        self.logs = settings.folder.resolve().with_name(f"{settings.folder.name}-jobs")
        self.running: dict = {}
        """job -> its call"""

    def plan(self) -> str:
        """The script that sbatch would get."""
        jobs = self.request.jobs
        script = submitit.slurm.slurm._make_sbatch_string(
            command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(self.logs)]),
            folder=self.logs,
            job_name="cast",
            map_count=jobs if jobs > 1 else None,
            **sbatch_parameters(self.request.parameters),
        )
        return f"# each of {', '.join(WITH_UNITS)}: {jobs} jobs at most\n{script}"

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

    def batches(self, waiting: deque[str]) -> list[list[str]]:
        """All units, among the jobs that may be submitted."""
        units, free = list(waiting), self.request.jobs - len(self.running)
        waiting.clear()
        return [units[first::free] for first in range(min(free, len(units)))]

    def submit(self, calls: Sequence[Call]) -> None:
        if not calls:
            return
        try:
            jobs = self.executor.submit_array([SlurmCall(call) for call in calls])
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            message = " ".join(str(error).split())[:300]
            raise InputError(f"--slurm: sbatch refused the job ({message}): see its options") from None
        self.running |= dict(zip(jobs, calls, strict=True))

    def ended(self) -> list[tuple[Call, Outcome | str]]:
        time.sleep(SECONDS)
        found = []
        for job in [job for job in self.running if job.done()]:
            try:
                outcome = job.result()
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                outcome = f"{str(error).strip().splitlines()[-1][:200]}; its log is {job.paths.stderr}"
            found.append((self.running.pop(job), outcome))
        return found

    def close(self) -> None:
        for job in self.running:
            job.cancel(check=False)
