"""A whole run whose units are computed by many processes: on Ray's actors, or as Slurm's jobs.

    bash run_all.sh llama --ray                         # Ray on this machine: an actor a GPU
    bash run_all.sh llama --ray auto                    # the Ray cluster that this machine belongs to
    bash run_all.sh llama --slurm partition=gpu,gpus=1,jobs=16,hours=8
    bash run_all.sh llama --slurm partition=gpu,gpus=1,jobs=16 --dry-run        # prints the script

Units are computed elsewhere, all else here: stages without units, joining, the audit. The run folder has to
lie on a file system that all nodes share. The results are those of a run on one machine. Started again, it
goes on.
"""

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from backends.core.errors import InputError
from backends.core.locking import held
from stages.run import guard, presets
from stages.run.locks import LAUNCH_LOCK, run_lock
from stages.run.pipeline import STAGES, WITH_UNITS
from stages.run.settings import Settings
from stages.scale.engine import LOCAL, Engine, Options, share_out
from stages.scale.on_ray import RayEngine
from stages.scale.on_slurm import SlurmEngine

PATIENCE = 60
"""seconds that workers of an earlier start have to end"""


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The options of the launch, and the run's. InputError on a value that does not fit."""
    argv = list(argv)
    for at, argument in enumerate(argv):
        if argument == "--ray" and (at + 1 == len(argv) or argv[at + 1].startswith("--")):
            argv[at] = f"--ray={LOCAL}"
    options, rest = presets.read_options(Options, argv, Options(), "python -m stages.scale.launch")
    if bool(options.ray) == bool(options.slurm):
        raise InputError("one of --ray and --slurm: which engine is the run to use?")
    if options.actors < 0 or options.cpus_per_actor < 0 or (options.gpus_per_actor or 0) < 0:
        raise InputError("--actors, --gpus-per-actor and --cpus-per-actor must not be negative")
    return options, rest


@contextmanager
def launch_lock(run: Path) -> Iterator[None]:
    """Keeps other launches off a run folder, and waits until what an earlier one started has ended.

    Raises InputError where the folder stays in use.
    """
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as kept:
        try:
            kept.enter_context(held(run / LAUNCH_LOCK))
        except BlockingIOError:
            raise InputError(f"{run} is launched already: wait for it, or choose another --run") from None
        for seconds in range(PATIENCE, -1, -1):
            try:
                with run_lock(run, None):
                    break
            except InputError:
                if not seconds:
                    raise
                if seconds == PATIENCE:
                    print(f"[launch] waiting for other processes to let go of {run}", flush=True)
                time.sleep(1)
        (run / LAUNCH_LOCK).write_text(secrets.token_hex(8))
        yield


def step(*module: str) -> None:
    """Runs a program of the project here; its failure ends this one with the same code."""
    code = subprocess.run([sys.executable, "-m", *module], check=False).returncode
    if code:
        sys.exit(code)


def launch(engine: Engine, settings: Settings, options: list[str]) -> None:
    """Makes every stage, then audits."""
    run, rows = settings.folder, []
    with launch_lock(run):
        engine.start()
        for name in STAGES:
            if name in WITH_UNITS:
                # Twice: a classifier's units need the answers that they judge.
                for _ in range(2):
                    rows += share_out(engine, name, settings)
            step(f"stages.{name}", *options)
        step("stages.audit", str(run))
    if rows:
        done = pd.DataFrame(rows).groupby("node")[["units", "seconds", "work"]].sum().reset_index()
        headers = ("node", "units", "at work (s)", "processor (s)")
        print(tabulate(done.values.tolist(), headers, tablefmt="plain", floatfmt=".0f"))
    print(f"report: {run}/{STAGES[-1]}/report.html")


def main(argv: list[str]) -> None:
    options, rest = parse(argv)
    settings = presets.parse(rest)
    if settings.run.shard:
        raise InputError("--shard: a launch shares the units out itself")
    engine = (SlurmEngine if options.slurm else RayEngine)(settings, options)
    try:
        if options.dry_run:
            print(engine.plan())
        else:
            launch(engine, settings, rest)
    finally:
        engine.close()


if __name__ == "__main__":
    guard.guarded(lambda: main(sys.argv[1:]))
