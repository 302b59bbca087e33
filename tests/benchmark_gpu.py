"""What an 8B-shaped model costs on a GPU: random weights in bfloat16, random prompts, nothing is written.

    python -m tests.benchmark_gpu --device cuda
    python -m tests.benchmark_gpu --device cpu --shape small --prompts 8 --tokens 4

One line a quantity, with the extrapolation that a user wants to know; then the kernels that take most of a
decoding step and of a tuning step.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro

import backends
from backends.base import Backend, Example, Recipe
from backends.core.loaded import Loaded
from backends.torch import devices
from backends.torch.decoder import Decoder
from tests.benchmark_sweep import NAMES, SHAPES, random_prompts

PARTS = ("choices", "responses", "likelihoods", "gradients", "tuning", "generation", "flax", "profile")


@dataclass
class Options:
    device: str = "cuda"
    dtype: str = "bfloat16"
    shape: Literal["llama-8b", "smollm", "small"] = "llama-8b"
    prompts: int = 100
    """of each part of the sweep"""
    tokens: int = 64
    """new tokens of a response of the sweep"""
    layers: int = 4
    """sampled evenly; all their heads are ablated"""
    responses: int = 500
    length: int = 256
    """new tokens of each of `responses`"""
    row: int = 1024
    """tokens of a row of tuning"""
    steps: int = 3
    """timed steps of tuning, after one that is not"""
    parts: tuple[str, ...] = PARTS


def random_backend(options: Options, layers: int | None = None) -> Backend:
    """A Llama of random weights, made on the device."""
    sizes = dict(zip(NAMES, SHAPES[options.shape], strict=True))
    sizes |= {"num_hidden_layers": layers} if layers else {}
    config = transformers.LlamaConfig(**sizes, eos_token_id=2, bos_token_id=1, tie_word_embeddings=False)
    with torch.random.fork_rng(), torch.device(options.device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        )
    devices.prepare()
    decoder = Decoder(model.eval().requires_grad_(False))
    return Loaded("torch", decoder, options.dtype, options.device, decoder.shape)


def synchronize(options: Options) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def timed(options: Options, told: Callable[[float], str]) -> Iterator[None]:
    """Prints what `told` says of the seconds that the block took, and the peak of memory in it."""
    gc.collect()
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize(options)
    began = time.perf_counter()
    yield
    synchronize(options)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device.startswith("cuda") else float("nan")
    print(f"{told(seconds)}; peak {peak:.1f} GiB", flush=True)


def training_rows(options: Options, count: int, vocab: int, seed: int) -> list[Example]:
    """All of one length, a quarter of it the target."""
    lines = np.random.default_rng(seed).integers(3, vocab, (count, options.row)).astype(np.int32)
    start, none = 3 * options.row // 4, np.zeros(0, np.int32)
    return [Example(f"t{number}", line[:start], line[start:], none, 0) for number, line in enumerate(lines)]


def with_targets(examples: list[Example], tokens: int, vocab: int) -> list[Example]:
    generator = np.random.default_rng(9)
    return [
        Example(
            row.example_id,
            row.prompt_ids,
            generator.integers(3, vocab, tokens).astype(np.int32),
            np.zeros(0, np.int32),
            0,
        )
        for row in examples
    ]


# Parts


def sweeps(backend: Backend, options: Options) -> None:
    shape = backend.shape
    sampled = sorted({int((part + 0.5) * shape.layers / options.layers) for part in range(options.layers)})
    heads, every = (
        [(layer, head) for layer in sampled for head in range(shape.heads)],
        shape.layers * shape.heads,
    )
    util, safe = (random_prompts(options.prompts, shape.vocab, *kind) for kind in ((4, 0), (0, 1)))
    targets = with_targets(safe, 16, shape.vocab)

    def told(name: str) -> Callable[[float], str]:
        return lambda seconds: (
            f"{name}: {seconds:.1f} s for {len(heads)} heads of layers {sampled}, "
            f"{seconds / len(heads):.3f} s a head, "
            f"{seconds / len(heads) * every / 60:.1f} min for {every} heads"
        )

    list(backend.sweep_choices(util[:4], heads[:1]))  # starts the libraries
    if "choices" in options.parts:
        with timed(options, told(f"sweep of {len(util)} choices")):
            list(backend.sweep_choices(util, heads))
    if "responses" in options.parts:
        with timed(options, told(f"sweep of {len(safe)} responses of {options.tokens} tokens")):
            list(backend.sweep_generations(safe, heads, options.tokens))
    if "likelihoods" in options.parts:
        with timed(options, told(f"sweep of {len(safe)} targets of 16 tokens")):
            list(backend.sweep_grades(targets, heads))


def gradients(backend: Backend, options: Options) -> None:
    rows = with_targets(random_prompts(16, backend.shape.vocab, 0, 3), 16, backend.shape.vocab)
    with timed(options, lambda seconds: f"gradients of 8 + 8 rows in 2 folds: {seconds:.1f} s"):
        backend.head_gradients(rows[:8], rows[8:], folds=2)


def tuning(backend: Backend, options: Options) -> None:
    shape = backend.shape
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    for optimizer in ("sft", "pcgrad"):
        recipe = Recipe(max_length=options.row, optimizer=optimizer)
        size = recipe.batch * recipe.accumulation
        rows = training_rows(options, (options.steps + 1) * size, shape.vocab, 1)
        run = iter(backend.tune(rows, heads, recipe, training_rows(options, size, shape.vocab, 2)))
        next(run)
        with timed(
            options,
            lambda seconds, name=optimizer, size=size: (
                f"{name}: {seconds / options.steps:.2f} s a step of {size} rows of {options.row} tokens, "
                f"{seconds / options.steps * 10_000 / size / 60:.1f} min for 10,000 rows"
            ),
        ):
            list(run)


def generation(backend: Backend, options: Options) -> None:
    count, length = options.responses, options.length
    prompts = random_prompts(count, backend.shape.vocab, 0, 5)
    with timed(
        options,
        lambda seconds: (
            f"{count} responses of {length} tokens in {seconds:.1f} s, "
            f"{count * length / seconds:.0f} tokens a second, "
            f"{seconds * 2000 * 256 / count / length:.0f} s for 2,000 of 256"
        ),
    ):
        backend.generate(prompts, length)


def flax(options: Options) -> None:
    """Two layers of the shape in both backends."""
    sizes = dict(zip(NAMES, SHAPES[options.shape], strict=True)) | {"num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, eos_token_id=2, bos_token_id=1, tie_word_embeddings=False)
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as folder:
        with torch.random.fork_rng(), torch.device(options.device):
            torch.manual_seed(0)
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
            made.save_pretrained(folder)
            del made
        for name in ("torch", "flax"):
            _layers(backends.load(name, Path(folder), dtype=options.dtype, device=options.device), options)


def _layers(backend: Backend, options: Options) -> None:
    shape = backend.shape
    heads = [(1, head) for head in range(shape.heads)]
    util, safe = (random_prompts(options.prompts, shape.vocab, *kind) for kind in ((4, 0), (0, 1)))
    rows, recipe = training_rows(options, 16, shape.vocab, 1), Recipe(max_length=options.row)
    for part, work in (
        ("choices of a layer", lambda: list(backend.sweep_choices(util, heads))),
        ("responses of a layer", lambda: list(backend.sweep_generations(safe, heads, options.tokens))),
        ("two steps", lambda: list(backend.tune(rows, heads, recipe))),
    ):
        took = []
        for _ in range(2):
            backend.kept.drop()
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
        print(f"two layers, {backend.name}: {part} {took[1]:.2f} s (first {took[0]:.2f} s)", flush=True)


def profile(backend: Backend, options: Options) -> None:
    shape = backend.shape
    safe = random_prompts(min(options.prompts, 100), shape.vocab, 0, 1)
    middle = [(shape.layers // 2, head) for head in range(shape.heads)][:5]
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    rows = training_rows(options, 8, shape.vocab, 1)
    prompts = random_prompts(min(options.responses, 500), shape.vocab, 0, 5)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    key = "self_cuda_time_total" if options.device.startswith("cuda") else "self_cpu_time_total"
    list(backend.sweep_generations(safe, middle, 10))
    for name, work in (
        ("ten decoding steps of a sweep", lambda: list(backend.sweep_generations(safe, middle, 10))),
        ("ten decoding steps of responses", lambda: backend.generate(prompts, 10)),
        ("a step of tuning", lambda: list(backend.tune(rows, heads, Recipe(max_length=options.row)))),
    ):
        synchronize(options)
        began = time.perf_counter()
        with torch.profiler.profile(activities=activities) as found:
            work()
            synchronize(options)
        table = found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)
        print(f"\n{name}, {time.perf_counter() - began:.2f} s with the profiler\n{table}", flush=True)
        own = found.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=60
        )
        print(own, flush=True)


def main(options: Options) -> None:
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(
        f"{card}, torch {torch.__version__}, transformers {transformers.__version__}; {options.shape}, "
        f"{options.dtype}"
    )
    parts = set(options.parts)
    if parts - {"flax"}:
        began = time.perf_counter()
        backend = random_backend(options)
        synchronize(options)
        print(f"random weights in {time.perf_counter() - began:.1f} s", flush=True)
        sweeps(backend, options)
        for part in (gradients, tuning, generation, profile):
            if part.__name__ in parts:
                try:
                    part(backend, options)
                except Exception as error:  # one part that fails must not take the others with it
                    print(f"{part.__name__} FAILED: {type(error).__name__}: {error}", flush=True)
        del backend
        gc.collect()
    if "flax" in parts:
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        flax(options)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main(tyro.cli(Options, description=__doc__))
