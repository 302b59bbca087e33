"""What the engines share: calls that compute units in other processes, and the loop that hands them out."""

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from backends.core.errors import InputError
from backends.core.progress import progress
from stages.run.job import Job
from stages.run.locks import BY_NAME, LAUNCH_LOCK
from stages.run.pipeline import declaration, make
from stages.run.provenance import package_versions
from stages.run.runner import unit_states
from stages.run.settings import Settings

LOCAL = "local"
"""what stands for this machine alone"""
RETRIES = 2
"""times that a unit is tried again after it failed or its process died"""
SECONDS = 1.0
"""between two looks at what runs"""


@dataclass(frozen=True)
class Options:
    """Where a run's units are computed; beside these, all options of a run."""

    ray: str = ""
    """address of a Ray cluster: host:port, "auto" (this machine's), or "local" (Ray on this machine alone)"""
    slurm: str = ""
    """key=value,…: jobs (of an array), hours, gpus, cpus, mem, any of sbatch's; "local": processes here"""
    actors: int = 0
    """of Ray; 0: as many as fit"""
    gpus_per_actor: int | None = None
    """default: 1 where the cluster has GPUs"""
    cpus_per_actor: int = 0
    """0: 4, or fewer where nodes have fewer"""
    dry_run: bool = False
    """only print Slurm's script, or where Ray's actors would be"""


class Outcome(NamedTuple):
    """What a call returns."""

    node: str
    error: str | None  # bad input, one line: no other process would do better
    seconds: float
    work: float  # processor seconds


@dataclass(frozen=True, eq=False)
class Call:
    """Units of a stage to be computed in another process, which may be on another machine."""

    settings: Settings
    stage: str
    units: Sequence[str]
    token: str
    """of the launch; a call of an earlier one, which a queue still held, finds another in the run's folder"""
    folder: str = field(default_factory=os.getcwd)
    """settings name files as they are seen from here"""
    versions: dict[str, str] = field(default_factory=package_versions)

    def __call__(self) -> Outcome:
        node, began, worked = socket.gethostname(), time.monotonic(), time.process_time()
        error = self._compute(node)
        return Outcome(node, error, time.monotonic() - began, time.process_time() - worked)

    def _compute(self, node: str) -> str | None:
        """The message of an InputError: raised, it would be taken for a failure that is worth a retry."""
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        launched = self.settings.folder / LAUNCH_LOCK
        if not launched.is_file() or launched.read_text() != self.token:
            return (
                f"node {node} does not see {self.settings.folder}: a run on several nodes needs its folder, "
                f"and this project, on a file system that all of them share, at the same path"
            )
        own = package_versions()
        if other := [name for name in self.versions if own.get(name) != self.versions[name]]:
            wanted = self.versions[other[0]]
            return f"node {node} has {other[0]} {own.get(other[0])}, not {wanted}: use one .venv"
        try:
            make(self.stage, self.settings.replace(shard=BY_NAME + ",".join(self.units)))
        except InputError as error:
            return str(error)
        return None


class Engine(Protocol):
    """Runs calls. It keeps no state that the run folder does not hold: started again, a run goes on.

    Every method raises InputError, one line, where it cannot do its part.
    """

    def plan(self) -> str:
        """What would run where."""

    def start(self) -> None:
        """Gets hold of what calls run on."""

    def batches(self, waiting: deque[str]) -> list[list[str]]:
        """Takes from the units that wait those for which there is room now, a list for each call."""

    def submit(self, calls: Sequence[Call]) -> None:
        """Begins calls."""

    def ended(self) -> list[tuple[Call, Outcome | str]]:
        """Calls that have come to an end, with why where they failed; returns after SECONDS at the latest."""

    def close(self) -> None:
        """Ends what runs."""


def share_out(engine: Engine, name: str, settings: Settings) -> list[dict]:
    """Computes the units of a stage that are not finished; its tables are not joined.

    Returns a row for each call: node, units, seconds, processor seconds. InputError where the input is bad or
    a unit fails more than RETRIES times; what is finished is kept.
    """
    states, job = unit_states(declaration(name), settings), Job(declaration(name), settings)
    waiting = deque(unit for unit, done in states.items() if not done)
    if not waiting:
        return []
    job.check_settings()
    job.remember()
    token = (settings.folder / LAUNCH_LOCK).read_text()

    def missing(units: Sequence[str]) -> list[str]:
        return [unit for unit in units if not job.part_path(unit).is_file()]

    pending, running, failed, rows = list(waiting), set(), Counter(), []
    with progress(total=len(states), initial=len(states) - len(pending), desc=name, unit="unit") as bar:
        while waiting or running:
            calls = [Call(settings, name, units, token) for units in engine.batches(waiting)]
            engine.submit(calls)
            running.update(calls)
            for call, outcome in engine.ended():
                running.remove(call)
                left = missing(call.units)
                if isinstance(outcome, Outcome):  # what is left is a classifier's, which is not answered yet
                    if outcome.error is not None:
                        raise InputError(outcome.error)
                    done = len(call.units) - len(left)
                    rows.append(outcome._asdict() | {"units": done})
                elif left:
                    failed[left[0]] += 1
                    if failed[left[0]] > RETRIES:
                        raise InputError(f"unit {left[0]} of {name} failed {RETRIES + 1} times: {outcome}")
                    waiting.extendleft(reversed(left))
            bar.set_postfix_str(f"{len(running)} at work", refresh=False)
            bar.update(len(states) - len(missing(pending)) - bar.n)
    return rows
