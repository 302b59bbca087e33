"""What a step of PCGrad costs beside a plain one: memory and time, on random weights and rows.

    python -m tests.benchmark_tuning --shape smollm
    python -m tests.benchmark_tuning --shape smollm --backend flax
    python -m tests.benchmark_tuning --shape smollm --device cuda --dtype bfloat16 --tokens 1024

Memory is the peak of two steps over the state before them. On a CPU that is the resident memory of a process
for each optimizer (Linux), on CUDA the allocator's own count. PCGrad keeps one gradient more, which is LoRA's
size, so where activations dominate it needs hardly more than a plain step. It takes two gradients, so twice
the time.
"""

import ctypes
import gc
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import tyro

from backends.base import Backend, Example, Recipe, Tuning
from tests.benchmark_sweep import random_model

OPTIMIZERS = ("sft", "pcgrad", "pcgrad-symmetric")


@dataclass
class Options:
    shape: Literal["small", "smollm"] = "small"
    """random weights in this shape"""
    backend: Literal["torch", "flax"] = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    tokens: int = 256
    """of a row, a quarter of them its target"""
    steps: int = 4
    """timed steps of each optimizer, after one that is not; 0: memory only"""


def loaded(options: Options) -> Backend:
    return random_model(options.shape, options.backend, options.device, options.dtype)[0]


def rows(options: Options, count: int, vocab: int, seed: int) -> list[Example]:
    """All of one length, so that every step costs the same and a compiling backend has one program."""
    lines = np.random.default_rng(seed).integers(3, vocab, (count, options.tokens)).astype(np.int32)
    start, none = 3 * options.tokens // 4, np.zeros(0, np.int32)
    return [Example(f"r{number}", line[:start], line[start:], none, 0) for number, line in enumerate(lines)]


def tuning(backend: Backend, options: Options, optimizer: str, steps: int) -> Tuning:
    """All heads, so that LoRA and its gradients are as large as they get."""
    recipe = Recipe(max_length=options.tokens, optimizer=optimizer)
    size, shape = recipe.batch * recipe.accumulation, backend.shape
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    reference = rows(options, 2 * size, shape.vocab, 2)
    return backend.tune(rows(options, steps * size, shape.vocab, 1), heads, recipe, reference)


# Memory

OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""for glibc: larger pieces in pages of their own, which are returned when freed; by default pieces of up to
32 MiB come from arenas, whose holes stay resident"""


def used(backend: Backend, peak: bool) -> int:
    """Bytes in use now, or at most since the peak began anew."""
    if backend.device.startswith("cpu"):
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM" if peak else "VmRSS"].split()[0])
    if backend.name == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use" if peak else "bytes_in_use"]


def memory_here(options: Options, optimizer: str) -> int:
    """Bytes that two steps add at their peak; the second one's Adam has its moments already. A plain step
    before has compiled and loaded what there is."""
    backend = loaded(options)
    list(tuning(backend, options, "sft", steps=1))
    run = tuning(backend, options, optimizer, steps=2)
    gc.collect()
    if backend.device.startswith("cpu"):
        ctypes.CDLL(None).malloc_trim(0)  # memory that the C library holds would hide what is allocated next
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at what is resident now
    elif backend.name == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
    before = used(backend, peak=False)
    list(run)
    return used(backend, peak=True) - before


def memory_apart(options: Options, optimizer: str) -> int:
    """The same in a process of its own, as another optimizer's memory would count; the least of two, as what
    threads hold by chance only adds."""
    found = []
    for _ in range(2):
        with mock.patch.dict(os.environ, OWN_PAGES), multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(memory_here, (options, optimizer)))
    return min(found)


# Time


def seconds_a_step(backend: Backend, options: Options, optimizer: str) -> float:
    """Median of all steps but the first, which compiles and allocates."""
    ends = [time.perf_counter()]
    for _ in tuning(backend, options, optimizer, options.steps + 1):
        ends.append(time.perf_counter())  # a record holds the loss, so the device has finished
    return float(np.median(np.diff(ends)[1:]))


def main(options: Options) -> None:
    print(
        f"{options.shape}, {options.backend}, {options.dtype} on {options.device}: {Recipe().batch} x "
        f"{Recipe().accumulation} rows of {options.tokens} tokens a step, rank {Recipe().rank}"
    )
    added = {optimizer: memory_apart(options, optimizer) for optimizer in OPTIMIZERS}
    for optimizer, bytes_ in added.items():
        print(f"{optimizer}: memory {bytes_ / 2**20:.0f} MiB, {bytes_ / added['sft']:.3f} of sft's")
    if not options.steps:
        return
    backend = loaded(options)
    took = {optimizer: seconds_a_step(backend, options, optimizer) for optimizer in OPTIMIZERS}
    for optimizer, seconds in took.items():
        print(f"{optimizer}: {seconds:.3f} s a step, {seconds / took['sft']:.2f} times sft's")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
