"""How many threads and processes of a CPU a stage takes.

Stages 04 and 05 compute products of few rows. Of a small model two processes of one thread each do 15 to 20 %
more of them than one process of two threads, which wait for each other, and many times more where other work
is on the machine. One thread also rounds alike whatever the number of cores. So there a process has one
thread, also where it is the only one. Stages 02 and 03 have larger products, and plan with much of the
memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from backends import models
from backends.core.budgets import machine_bytes
from stages.run.job import Job, Units
from stages.run.schemas import ALIGNMENT, BENCHMARKS

SMALL = range(5_000_000, 1_000_000_001)
"""parameters of a model that one thread serves best; one below it is done before a process has begun"""
MOST = 8
"""processes, unless more are requested"""
LIBRARIES, DIAGNOSIS = 2**29, 40
"""bytes of a process; and of a map by gradients, for each parameter (5 GiB of SmolLM2's 135 million)"""


def parameters(folder: Path) -> int:
    """How many the files of a model have."""
    return sum(map(prod, models.tensor_shapes(folder).values()))


def one_threaded(job: Job) -> bool:
    """Whether the stage computes with one thread. InputError where --device cannot be had."""
    chosen, judge = job.settings.model, job.settings.evaluation.judge
    if not job.stage.few_rows or chosen.backend != "torch" or judge != "keyword":
        return False
    if parameters(job.model_folder) not in SMALL:
        return False
    from backends.torch.devices import resolve_device  # takes seconds

    return resolve_device(job.settings.run.device).type == "cpu"


@contextmanager
def threads_of(job: Job) -> Iterator[None]:
    """Gives torch the threads of the stage."""
    if not one_threaded(job):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(job: Job, pending: Units) -> None:
    """Computes units in this process."""
    with threads_of(job):
        job.stage.compute(job, pending)


def side_by_side(job: Job) -> int:
    """How many processes the stage's units are for: those requested, or one for each thread that torch would
    take (OMP_NUM_THREADS counts) as memory allows. A shard is one of several, whoever started them."""
    if job.shard is not None or not job.stage.few_rows:
        return 1
    if job.settings.run.processes:
        return job.settings.run.processes
    if not one_threaded(job):
        return 1
    import torch

    return max(1, min(MOST, torch.get_num_threads(), int(0.75 * machine_bytes()) // process_bytes(job)))


def process_bytes(job: Job) -> int:
    """What a process of stage 04 or 05 takes at most, roughly (1.4 GiB of SmolLM2 by `smollm`)."""
    shape, tuning = job.shape, job.settings.tuning
    if job.stage.name == "04_align":
        rows = job.read(ALIGNMENT)
        longest = (rows["prompt_ids"].map(len) + rows["target_ids"].map(len)).max()
        width = shape.mlp_dim or 4 * shape.model_dim  # of a mixture of experts: a usual one
        layer = 6 * shape.model_dim + 4 * width + 5 * shape.heads * shape.head_dim
        token = 4 * (shape.layers * layer + 4 * shape.vocab)  # what it leaves for the backward pass
        work = tuning.batch * min(int(longest), job.settings.data.max_length) * token
    else:
        token = 8 * shape.layers * shape.kv_heads * shape.head_dim  # keys and values
        longest = job.read(BENCHMARKS).groupby("split")["prompt_ids"].agg(lambda ids: ids.map(len).max())
        rows = job.read(BENCHMARKS)["split"].value_counts()
        written = [benchmark for benchmark in job.settings.benchmarks if benchmark.new_tokens]
        caches = [token * rows[own.name] * (longest[own.name] + own.new_tokens) for own in written]
        work = min(int(max(caches, default=0)), machine_bytes() // 3)  # the most that decoding plans with
    maps = tuning.rediagnose or job.settings.evaluation.drift
    return LIBRARIES + (8 + DIAGNOSIS * bool(maps)) * parameters(job.model_folder) + work
