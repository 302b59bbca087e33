"""How much faster the sweep is than the plain loop, on the same heads and prompts in one process.

    python -m tests.benchmark_sweep --run outputs/smollm
    python -m tests.benchmark_sweep --run outputs/smollm --backend flax
    python -m tests.benchmark_sweep --shape llama-8b --device cuda --dtype bfloat16 --prompts 100 --tokens 64

The plain loop is what one would write first: for each head a hook, one padded batch through the whole model,
one `generate`. It is timed on one head of each sampled layer (its cost does not depend on the layer), the
sweep on all heads of those layers. The bound that work is held against counts the layers from the silenced
one up, for the prefix that all prompts share once a head and for each prompt's own tokens, and every layer
for tokens after a response has left the clean one. Sharing more than that prefix goes below it.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro

import backends
from backends import models
from backends.base import Backend, Head, Shape
from data.examples import Example
from data.rendering import example
from stages import artifacts, schemas
from tests import reference

SHAPES = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


@dataclass
class Options:
    run: Path = Path("outputs/smollm")
    """where stage 01 has put prompts of a real model; not read with --shape"""
    shape: Literal["", "llama-8b", "small"] = ""
    """random weights in this shape, random prompts of a realistic length"""
    backend: Literal["torch", "flax"] = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    prompts: int = 16
    """of each part"""
    tokens: int = 32
    """new tokens of a response"""
    layers: int = 6
    """sampled evenly; all their heads are silenced"""
    plain: int = 6
    """heads that the plain loop does, at most one a layer; 0: no plain loop"""
    mask: Literal["output", "query"] = "output"


# What is measured


def real(options: Options) -> tuple[Backend, torch.nn.Module, list[Example], list[Example]]:
    """The model and the first calibration rows of a run."""
    rows = artifacts.read_input(options.run, "01_calibrate/calibration.parquet", schemas.EXAMPLES).to_pylist()
    settings = artifacts.stage_manifest(options.run, "01_calibrate")["settings"]
    folder = models.local_folder(settings["model"], settings.get("revision", ""))
    backend = backends.load(options.backend, folder, dtype=options.dtype, device=options.device)
    plain = backend.model if options.backend == "torch" else load_plain(folder, options)
    util, safe = ([example(row) for row in rows if row["role"] == role] for role in ("util", "safe"))
    return backend, plain, util[: options.prompts], safe[: options.prompts]


def invented(options: Options) -> tuple[Backend, torch.nn.Module, list[Example], list[Example]]:
    """A model of random weights, written to a folder and loaded as any other, and random prompts."""
    size = SHAPES[options.shape]
    config = transformers.LlamaConfig(**size, eos_token_id=2, bos_token_id=1, tie_word_embeddings=False)
    with (
        tempfile.TemporaryDirectory(prefix="cast-benchmark-") as folder,
        torch.random.fork_rng(),
        torch.device(options.device),
    ):
        torch.manual_seed(0)
        dtype = getattr(torch, options.dtype)
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        torch.cuda.empty_cache()
        backend = backends.load(options.backend, folder, dtype=options.dtype, device=options.device)
        plain = backend.model if options.backend == "torch" else load_plain(Path(folder), options)
    util = random_prompts(options.prompts, size["vocab_size"], 4, 0)
    return backend, plain, util, random_prompts(options.prompts, size["vocab_size"], 0, 1)


def load_plain(folder: Path, options: Options) -> torch.nn.Module:
    dtype = getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(options.device).eval()


def random_prompts(count: int, vocab: int, choices: int, seed: int) -> list[Example]:
    """A shared prefix of 40 tokens, then 20 to 120 of each prompt's own."""
    generator = np.random.default_rng(seed)
    prefix = generator.integers(3, vocab, 40)
    made = []
    for number in range(count):
        own = generator.integers(3, vocab, generator.integers(20, 121))
        made.append(
            Example(
                example_id=f"r{number}",
                prompt_ids=np.concatenate([prefix, own]).astype(np.int32),
                target_ids=np.zeros(1, np.int32),
                choice_ids=generator.choice(np.arange(3, vocab), choices, replace=False).astype(np.int32),
                answer=0,
            )
        )
    return made


# The plain loop


def padded(examples: list[Example], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, padded on the left."""
    width = max(len(one.prompt_ids) for one in examples)
    ids, seen = (np.zeros((len(examples), width), np.int64) for _ in range(2))
    for row, one in enumerate(examples):
        ids[row, width - len(one.prompt_ids) :] = one.prompt_ids
        seen[row, width - len(one.prompt_ids) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(seen).to(device)


@torch.no_grad()
def plain_choices(model, examples: list[Example]) -> np.ndarray:
    ids, seen = padded(examples, model.device)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=seen, position_ids=positions, logits_to_keep=1).logits[:, 0]
    picked = [
        int(line[torch.from_numpy(one.choice_ids.astype(np.int64)).to(line.device)].argmax())
        if len(one.choice_ids)
        else int(line.argmax())
        for line, one in zip(logits, examples, strict=True)
    ]
    return np.array(picked, np.int32)


@torch.no_grad()
def plain_generations(model, prompts: list[Example], tokens: int) -> list[np.ndarray]:
    ids, seen = padded(prompts, model.device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    told = model.generate(ids, attention_mask=seen, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    responses = []
    for line in told[:, ids.shape[1] :].cpu().numpy():
        end = next((at + 1 for at, token in enumerate(line) if int(token) in ends), len(line))
        responses.append(line[:end].astype(np.int32))
    return responses


# Counting


def layer_tokens(model: torch.nn.Module, work: Callable[[], object]) -> int:
    """Tokens through a layer's MLP, summed over layers, while `work` runs."""
    seen = 0

    def count(_, inputs):
        nonlocal seen
        seen += inputs[0].shape[0] * inputs[0].shape[1]

    hooks = [layer.mlp.register_forward_pre_hook(count) for layer in model.model.layers]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def bound(examples: list[Example], heads: list[Head], shape: Shape, after: dict[Head, list] | None) -> int:
    """Layer-tokens without padding, the common prefix once.

    Args:
        after: for each head, tokens on and off the clean response.
    """
    prompts = [one.prompt_ids for one in examples]
    prefix = min(len(prompts[0]) - 1, *(common(prompts[0], prompt) for prompt in prompts))
    own = prefix + sum(len(prompt) - prefix for prompt in prompts)
    total = 0
    for layer, head in heads:
        above = shape.layers - layer
        total += above * own
        # The last token of a response is never read.
        for on, off in (after or {}).get((layer, head), ()):
            total += above * max(0, on - (off == 0)) + shape.layers * max(0, off - 1)
    return total


def common(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    return int(differing[0]) if len(differing) else size


def peak_gib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(device: str, work: Callable[[], object]) -> tuple[float, object]:
    began = time.monotonic()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.monotonic() - began, result


def main(options: Options) -> None:
    if options.shape:
        backend, plain, util, safe = invented(options)
    else:
        backend, plain, util, safe = real(options)
    shape = backend.shape
    sampled = sorted({int((part + 0.5) * shape.layers / options.layers) for part in range(options.layers)})
    heads = [(layer, head) for layer in sampled for head in range(shape.heads)]
    alone = [(layer, layer % shape.heads) for layer in sampled[: options.plain]]
    print(
        f"{options.shape or options.run}: {shape.layers} layers of {shape.heads} heads, {backend.name}, "
        f"{backend.dtype} on {backend.device}, {torch.get_num_threads()} threads; {len(util)} choices and "
        f"{len(safe)} responses of {options.tokens} tokens; layers {sampled}"
    )

    def responses() -> dict:
        backend.kept.drop()  # so that a second call decodes them too
        return dict(backend.sweep_generations(safe, heads, options.tokens, options.mask))

    parts = {
        "choices": (
            lambda: dict(backend.sweep_choices(util, heads, options.mask)),
            lambda: plain_choices(plain, util),
        ),
        "responses": (responses, lambda: plain_generations(plain, safe, options.tokens)),
    }
    seconds, slow = {}, {}
    for part, (sweep, loop) in parts.items():
        if backend.name == "flax":
            print(f"{part}: first call, which compiles, {timed(options.device, sweep)[0]:.1f} s")
        seconds[part], found = timed(options.device, sweep)
        seconds[part] /= len(heads)
        equal = compared = 0
        took = []
        for layer, head in alone:
            with reference.silenced(plain, layer, head, options.mask):
                spent, expected = timed(options.device, loop)
            took.append(spent)
            compared += len(expected)
            equal += sum(np.array_equal(*pair) for pair in zip(found[layer, head], expected, strict=True))
        line = f"{part}: sweep {seconds[part]:.3f} s a head"
        if took:
            slow[part] = float(np.mean(took))
            line += f", plain loop {slow[part]:.3f} s: {slow[part] / seconds[part]:.1f} times faster"
            line += f"; {equal} of {compared} outputs equal"
        print(line)
        after = None
        if part == "responses":
            clean = backend.generate(safe, options.tokens)
            after = {
                head: [
                    (common(one, draft), len(one) - common(one, draft))
                    for one, draft in zip(lines, clean, strict=True)
                ]
                for head, lines in found.items()
            }
            on, off = np.array([pair for pairs in after.values() for pair in pairs]).sum(axis=0)
            print(f"{part}: {on / (on + off):.0%} of the tokens are the clean response's")
        if backend.name == "torch":
            done = layer_tokens(backend.model, sweep)
            least = bound(util if part == "choices" else safe, heads, shape, after)
            print(f"{part}: {done / 1e6:.2f} M layer-tokens, {done / least:.2f} times the bound")
    if slow:
        ratio = sum(slow.values()) / sum(seconds.values())
        print(
            f"both: sweep {sum(seconds.values()):.3f} s a head, {ratio:.1f} times faster than the plain loop"
        )
    whole = sum(seconds.values()) * shape.layers * shape.heads
    print(f"whole map, extrapolated from the sampled layers: {whole / 60:.1f} min")
    print(f"peak memory {peak_gib(options.device):.1f} GiB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
