"""Units of a stage computed by processes of this machine side by side (`threads.side_by_side` says how many).

Each holds the model and is handed one unit after another by the process that was started, which alone holds
the run's lock, shows how far all are, and joins. They end when it does, however that ends; what they had
finished is kept.
"""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from threading import RLock, Thread

from tqdm import tqdm

from backends.core.errors import InputError
from backends.core.files import write_text
from backends.core.progress import progress
from stages.run import threads
from stages.run.job import Job, Units
from stages.run.locks import BY_NAME
from stages.run.pipeline import declaration
from stages.run.settings import Settings

LOG = ".processes.tmp"
"""in the stage's folder, until it is finished: what the processes say"""


def compute(job: Job, pending: Units) -> None:
    """Computes units, by several processes where that is faster or requested."""
    count = min(threads.side_by_side(job), len(pending))
    if count > 1:
        job.say(f"{len(pending)} units by {count} processes")
        job.remember()
        share_out(job, pending, count)
        pending = job.pending(pending)  # a classifier's, which came before the answers that they judge
    if pending:
        threads.compute(job, pending)


def share_out(job: Job, pending: Units, count: int) -> None:
    """Hands out units until all are computed. Raises what a process raised, InputError where one died."""
    log = job.folder / LOG
    write_text(log, "")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start, (log,))
    total = len(job.stage.units(job))
    try:
        computed = as_completed(submit(pool, job, pending))
        for done in progress(
            computed, total=total, initial=total - len(pending), desc=job.stage.name, unit="unit"
        ):
            done.result()
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if not isinstance(error, BrokenProcessPool):
            raise
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise InputError(
            f"a process of {job.stage.name} died ({last[0]}): if memory is short, fewer --processes; the "
            f"same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def submit(pool: ProcessPoolExecutor, job: Job, units: Units) -> list[Future]:
    """Starts the processes. Ctrl-C, which reaches all of a terminal, is for this one."""
    settings = job.settings.replace(shard=BY_NAME)  # of no units: theirs are handed to it
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return [pool.submit(compute_unit, job.stage.name, settings, unit) for unit in units]
    finally:
        signal.signal(signal.SIGINT, before)


# In a process that was started


def start(log: Path) -> None:
    """What it says goes to the log."""
    tqdm.set_lock(RLock())  # its own is one of the system's, which whoever is killed leaves behind
    Thread(target=end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)


def end_with_parent() -> None:
    """At any moment: as if it were killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


@cache
def job_of(name: str, settings: Settings) -> Job:
    """Made once, so that the model is loaded once."""
    job = Job(declaration(name), settings)
    job.find()  # what an earlier start said of it
    return job


def compute_unit(name: str, settings: Settings, unit: str) -> None:
    job = job_of(name, settings)
    threads.compute(job, {unit: job.stage.units(job)[unit]})
