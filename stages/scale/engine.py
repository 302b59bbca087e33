"""What the engines share: their options, how a process computes units, and a bar over a stage's units."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from backends.core.errors import InputError
from backends.core.progress import progress
from stages.run.pipeline import declaration, make
from stages.run.runner import Job, unit_states
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
    """only print Slurm's scripts, or where Ray's actors would be"""


class Engine(Protocol):
    """Computes the units of stages 02 to 05 in other processes.

    It keeps no state that the run folder does not hold: started again, a run goes on. Every method raises
    InputError, one line, where it cannot do its part.
    """

    def plan(self) -> str:
        """What would run where."""

    def start(self) -> None:
        """Gets hold of what the units are computed by."""

    def run(self, name: str) -> None:
        """Makes a stage, or does nothing where it is made. InputError where a unit failed more than RETRIES
        times; what is finished is kept."""

    def summary(self) -> str:
        """A table of what was done where."""

    def close(self) -> None:
        """Lets go of what the engine holds."""


def compute(settings: Settings, name: str, shard: str) -> str | None:
    """A shard of a stage in this process; with an empty one the whole stage, which joins what is there.

    Returns the message of an InputError: raised, it would be taken for a failure that is worth a retry.
    """
    try:
        make(name, settings.replace(shard=shard))
    except InputError as error:
        return str(error)
    return None


class Watch:
    """A stage's units as its folder shows them, whoever computes them, and a bar over those that are done."""

    def __init__(self, name: str, settings: Settings, bar: tqdm):
        states = unit_states(declaration(name), settings)
        self.job = Job(declaration(name), settings)
        self.begun_with = [unit for unit, done in states.items() if not done]
        """those that were not finished when the watch began"""
        self.bar = bar
        self.bar.total, self.bar.initial = len(states), len(states) - len(self.begun_with)
        self.bar.n = self.bar.initial  # so that the pace is this run's own

    def pending(self, units: Iterable[str]) -> list[str]:
        """Of those units, what is not finished."""
        if self.job.run.is_finished(self.job.stage.name):
            return []
        return [unit for unit in units if not self.job.part_path(unit).is_file()]

    def show(self, note: str) -> None:
        """Brings the bar up to date."""
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(self.bar.total - len(self.pending(self.begun_with)) - self.bar.n)


@contextmanager
def watch(name: str, settings: Settings) -> Iterator[Watch]:
    """Watches a stage. InputError where its inputs are missing."""
    with progress(total=None, desc=name, unit="unit") as bar:
        yield Watch(name, settings, bar)
