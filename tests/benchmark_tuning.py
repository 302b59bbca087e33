"""What a step of PCGrad costs beside a plain one: memory and time, on random weights and rows.

    python -m tests.benchmark_tuning --shape smollm
    python -m tests.benchmark_tuning --shape smollm --backend flax
    python -m tests.benchmark_tuning --shape smollm --device cuda --dtype bfloat16 --tokens 1024
    python -m tests.benchmark_tuning --shape smollm --tokens 63 --shared 28 --batch 8 --accumulation 1

Memory is what the steps need over the state before the first of them (weights, rows, compiled programs), at
its peak. On a CPU that is the resident memory of a process for each optimizer (Linux), on CUDA the
allocator's own count. PCGrad keeps one gradient more, which is LoRA's size, so where activations dominate,
as they do here, it needs hardly more than a plain step. It takes two gradients, so twice the time.

With --shared, rows begin alike, and torch's plain step is also timed with each row on its own.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as backends does, and before torch is imported here

import ctypes
import dataclasses
import gc
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro

import backends
from backends.base import Backend, Example, Recipe, Tuning
from backends.torch import loss as torch_loss
from tests.benchmark_sweep import SHAPES, random_model
from tests.conftest import ROOT

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
    shared: int = 0
    """of these, the first that are the same in all rows"""
    batch: int = 4
    """rows a forward pass"""
    accumulation: int = 2
    """forward passes a step"""
    rank: int = 32
    steps: int = 4
    """timed steps of each optimizer, after one that is not; 0: memory only"""
    repeats: int = 2
    """processes that measure an optimizer's memory, of which the least counts"""
    optimizer: Literal["", "sft", "pcgrad", "pcgrad-symmetric"] = ""
    """only its memory, in this process; the others' are measured by calling this"""


def loaded(options: Options) -> Backend:
    """A model of random weights, written to a folder and loaded as any other."""
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as folder:
        random_model(options.shape, folder)
        return backends.load(options.backend, Path(folder), dtype=options.dtype, device=options.device)


def rows(options: Options, count: int, seed: int) -> list[Example]:
    """All of one length, so that every step costs the same and a compiling backend has one program."""
    generator = np.random.default_rng(seed)
    lines = generator.integers(3, SHAPES[options.shape]["vocab_size"], (count, options.tokens)).astype(
        np.int32
    )
    lines[:, : options.shared] = np.arange(3, 3 + options.shared)
    start = 3 * options.tokens // 4
    return [
        Example(f"r{number}", line[:start], line[start:], np.zeros(0, np.int32), 0)
        for number, line in enumerate(lines)
    ]


def tuning(backend: Backend, options: Options, optimizer: str, steps: int) -> Tuning:
    """All heads, so that LoRA and its gradients are as large as they get."""
    recipe = Recipe(
        rank=options.rank,
        batch=options.batch,
        accumulation=options.accumulation,
        max_length=options.tokens,
        optimizer=optimizer,
    )
    size, shape = options.batch * options.accumulation, backend.shape
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    return backend.tune(rows(options, steps * size, 1), heads, recipe, rows(options, 2 * size, 2))


# Memory

OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""for glibc: larger pieces in pages of their own, which are returned when freed; by default pieces of up to
32 MiB come from arenas, whose holes stay resident"""


class Peak:
    """Bytes in use at most since this was made, over what was in use then."""

    def __init__(self, backend: Backend):
        self.backend = backend
        gc.collect()
        if sys.platform == "linux":  # memory that the C library holds would hide what is allocated next
            ctypes.CDLL(None).malloc_trim(0)
        if not backend.device.startswith("cpu") and backend.name == "torch":
            torch.cuda.reset_peak_memory_stats()
        elif backend.device.startswith("cpu"):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at what is resident now
        self.before = self._bytes(peak=False)

    def _bytes(self, peak: bool) -> int:
        if self.backend.device.startswith("cpu"):
            status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            return 1024 * int(status["VmHWM" if peak else "VmRSS"].split()[0])
        if self.backend.name == "torch":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        import jax

        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use" if peak else "bytes_in_use"]

    def added(self) -> int:
        return self._bytes(peak=True) - self.before


def memory_here(options: Options) -> int:
    """Bytes that two steps add at their peak; the second one's Adam has its moments already. A plain step
    before has compiled and loaded what there is."""
    backend = loaded(options)
    list(tuning(backend, options, "sft", steps=1))
    run = tuning(backend, options, options.optimizer, steps=2)
    peak = Peak(backend)
    list(run)
    return peak.added()


def memory_apart(options: Options, optimizer: str) -> int:
    """The same, the least of `repeats` processes of its own: another optimizer's memory would count, and what
    threads hold by chance only adds."""
    requested = dataclasses.asdict(options) | {"optimizer": optimizer, "steps": 0}
    flags = [part for name, value in requested.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.benchmark_tuning", *flags]
    found = []
    for _ in range(options.repeats):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | OWN_PAGES, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found.append(int(done.stdout.split()[-1]))
    return min(found)


# Time


def seconds_a_step(backend: Backend, options: Options, optimizer: str) -> list[float]:
    """Of each step but the first, which compiles and allocates."""
    took, began = [], time.perf_counter()
    for _ in tuning(backend, options, optimizer, options.steps + 1):
        took.append(time.perf_counter() - began)  # a record holds the loss, so the device has finished
        began = time.perf_counter()
    return took[1:]


def main(options: Options) -> None:
    if options.optimizer:
        print(memory_here(options))
        return
    size = options.batch * options.accumulation
    print(
        f"{options.shape}, {options.backend}, {options.dtype} on {options.device}: {size} rows of "
        f"{options.tokens} tokens a step, {options.batch} a forward pass, rank {options.rank}"
    )
    added = {optimizer: memory_apart(options, optimizer) for optimizer in OPTIMIZERS}
    for optimizer in OPTIMIZERS:
        ratio = added[optimizer] / added["sft"]
        print(f"{optimizer}: memory {added[optimizer] / 2**20:.0f} MiB, {ratio:.3f} of sft's")
    if not options.steps:
        return
    backend = loaded(options)
    took = {optimizer: np.median(seconds_a_step(backend, options, optimizer)) for optimizer in OPTIMIZERS}
    for optimizer in OPTIMIZERS:
        tokens = size * options.tokens / took[optimizer]
        print(
            f"{optimizer}: {took[optimizer]:.3f} s a step, {took[optimizer] / took['sft']:.2f} times sft's, "
            f"{tokens:.0f} tokens/s (without the reference's)"
        )
    if options.shared and options.backend == "torch":
        with mock.patch.object(torch_loss, "_line_pays", lambda *_: False):
            apart = np.median(seconds_a_step(backend, options, "sft"))
        print(f"sft, each row on its own: {apart:.3f} s a step; as a line {took['sft'] / apart:.3f} of that")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
