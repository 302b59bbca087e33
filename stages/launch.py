"""A whole run whose units are computed by many processes: on Ray's actors, or as Slurm's jobs.

    bash run_all.sh llama --ray                         # Ray on this machine: an actor a GPU
    bash run_all.sh llama --ray auto                    # the Ray cluster that this machine belongs to
    bash run_all.sh llama --slurm partition=gpu,gpus=1,jobs=16,hours=8
    bash run_all.sh llama --slurm partition=gpu,gpus=1,jobs=16 --dry-run        # prints the scripts

Stages 01 and 06 and the audit run here, once; units of 02 to 05 elsewhere, on the same run folder, which has
to lie on a file system that all nodes share. The results are those of a run on one machine. Started again,
it goes on.
"""

import dataclasses
import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.errors import InputError
from stages import cli, presets
from stages.launching.on_ray import HERE, RayEngine
from stages.launching.on_slurm import SlurmEngine, asked, script
from stages.launching.watching import Engine
from stages.locks import LAUNCH_LOCK, run_lock

UNITS = ("02_conflict", "03_sensitivity", "04_align", "05_evaluate")
PATIENCE = 60
"""seconds that workers of an earlier start have to end"""


@dataclasses.dataclass(frozen=True)
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


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The options of the launch, and those left for the run. InputError on a value that does not fit."""
    argv = list(argv)
    for at, argument in enumerate(argv):
        if argument == "--ray" and (at + 1 == len(argv) or argv[at + 1].startswith("--")):
            argv[at] = f"--ray={HERE}"
    options, rest = presets.read_options(Options, argv, Options(), "python -m stages.launch")
    if bool(options.ray) == bool(options.slurm):
        raise InputError("one of --ray and --slurm: which engine is the run to use?")
    if options.actors < 0 or options.cpus_per_actor < 0 or (options.gpus_per_actor or 0) < 0:
        raise InputError("--actors, --gpus-per-actor and --cpus-per-actor must not be negative")
    return options, rest


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Keeps other launches off a run folder, and waits until what an earlier one started has ended.

    Raises InputError where the folder stays in use.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LAUNCH_LOCK, "a") as own:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run} is launched already: wait for it, or choose another --run") from None
        for left in range(PATIENCE, -1, -1):
            try:
                with run_lock(run, None):
                    break
            except InputError:
                if not left:
                    raise
                if left == PATIENCE:
                    print(f"[launch] waiting for other processes to let go of {run}", flush=True)
                time.sleep(1)
        yield


def step(*module: str) -> None:
    """Runs a program of the project here; its failure ends this one with the same code."""
    code = subprocess.run([sys.executable, "-m", *module], check=False).returncode
    if code:
        sys.exit(code)


def engine(options: Options, settings: presets.Settings) -> Engine:
    if options.slurm:
        return SlurmEngine(settings, options.slurm)
    return RayEngine(settings, options.ray, options.gpus_per_actor, options.cpus_per_actor, options.actors)


def plan(options: Options, settings: presets.Settings) -> None:
    """What would run where."""
    if options.slurm:
        told = asked(options.slurm)
        for name in UNITS:
            print(f"# {name}: {told.jobs} jobs, then one that joins them")
            print(script(settings, told, name, told.jobs))
        return
    found = engine(options, settings)
    try:
        print("\n".join(found.layout()))
    finally:
        found.close()


def main(argv: list[str]) -> None:
    options, rest = parse(argv)
    settings = presets.parse(rest)
    if settings.shard:
        raise InputError("--shard: a launch shares the units out itself")
    if options.dry_run:
        plan(options, settings)
        return
    with alone(settings.folder):
        where = engine(options, settings)
        try:
            step("stages.01_calibrate", *rest)
            for name in UNITS:
                where.run(name)
            step("stages.06_correlate", *rest)
            step("stages.audit", str(settings.folder))
            print("\n".join(where.told()))
        finally:
            where.close()
    print(f"report: {settings.folder}/06_correlate/report.html")


if __name__ == "__main__":
    cli.guarded(lambda: main(sys.argv[1:]))
