"""How much faster the sweep is than the plain loop, on the same heads and prompts in one process.

    python -m tests.benchmark_sweep --run outputs/smollm
    python -m tests.benchmark_sweep --run outputs/smollm --backend flax
    python -m tests.benchmark_sweep --shape llama-8b --device cuda --dtype bfloat16 --prompts 100 --tokens 64

The plain loop: for each head a hook, one padded batch through the whole model, one `generate`. It is timed on
one head of each sampled layer (its cost does not depend on the layer), the sweep on all heads of those
layers. The bound for the sweep's work counts the layers from the ablated one up, for the prefix that all
prompts share once a head and for each prompt's own tokens, and every layer for tokens after a response has
left the clean one. Sharing more than that prefix goes below it.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro

import backends
from backends import models
from backends.base import Backend, Example, Head, Shape
from data import rendering
from stages.run.schemas import CALIBRATION
from stages.run.store import RunFolder
from tests import reference

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    shape: dict(zip((*NAMES, "num_key_value_heads"), sizes, strict=True))
    for shape, sizes in {
        "llama-8b": (128256, 4096, 14336, 32, 32, 8),
        "smollm": (49152, 576, 1536, 30, 9, 3),
        "small": (4096, 256, 512, 6, 8, 4),
    }.items()
}


@dataclass
class Options:
    run: Path = Path("outputs/smollm")
    """where stage 01 has put prompts of a real model; not read with --shape"""
    shape: Literal["", "llama-8b", "smollm", "small"] = ""
    """random weights in this shape, random prompts of a realistic length"""
    backend: Literal["torch", "flax"] = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    prompts: int = 16
    """of each part"""
    tokens: int = 32
    """new tokens of a response"""
    layers: int = 6
    """sampled evenly; all their heads are ablated"""
    plain: int = 6
    """heads that the plain loop does, at most one a layer; 0: no plain loop"""
    mask: Literal["output", "query"] = "output"


# What is measured


def real(options: Options) -> tuple[Backend, torch.nn.Module, list[Example], list[Example]]:
    """The model and the first calibration rows of a run."""
    run = RunFolder(options.run)
    settings = run.manifest(CALIBRATION.stage)["settings"]
    folder = models.local_folder(settings["model"], settings.get("revision", "main"))
    rows = run.read(CALIBRATION).to_dict("records")
    util, safe = (
        [rendering.example(row) for row in rows if row["split"] == split] for split in ("util", "safe")
    )
    return *loaded(folder, options), util[: options.prompts], safe[: options.prompts]


def loaded(folder: Path, options: Options) -> tuple[Backend, torch.nn.Module]:
    """The backend, and transformers' model."""
    backend = backends.load(options.backend, folder, dtype=options.dtype, device=options.device)
    if options.backend == "torch":
        return backend, backend.model.model
    dtype = getattr(torch, options.dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return backend, plain.to(options.device).eval()


def random_model(shape: str, folder: str | Path, device: str = "cpu", dtype: str = "float32") -> None:
    """Writes a Llama of random weights."""
    config = transformers.LlamaConfig(
        **SHAPES[shape], eos_token_id=2, bos_token_id=1, tie_word_embeddings=False
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        transformers.AutoModelForCausalLM.from_config(config, dtype=kind).save_pretrained(folder)
    torch.cuda.empty_cache()


def invented(options: Options) -> tuple[Backend, torch.nn.Module, list[Example], list[Example]]:
    """A model of random weights and random prompts."""
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as folder:
        random_model(options.shape, folder, options.device, options.dtype)
        both = loaded(Path(folder), options)
    vocab = SHAPES[options.shape]["vocab_size"]
    return *both, random_prompts(options.prompts, vocab, 4, 0), random_prompts(options.prompts, vocab, 0, 1)


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
    width = max(len(example.prompt_ids) for example in examples)
    ids, seen = (np.zeros((len(examples), width), np.int64) for _ in range(2))
    for row, example in enumerate(examples):
        ids[row, width - len(example.prompt_ids) :] = example.prompt_ids
        seen[row, width - len(example.prompt_ids) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(seen).to(device)


@torch.no_grad()
def plain_choices(model, examples: list[Example]) -> np.ndarray:
    ids, seen = padded(examples, model.device)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=seen, position_ids=positions, logits_to_keep=1).logits[:, 0]
    chosen = [
        int(line[torch.from_numpy(example.choice_ids.astype(np.int64)).to(line.device)].argmax())
        if len(example.choice_ids)
        else int(line.argmax())
        for line, example in zip(logits, examples, strict=True)
    ]
    return np.array(chosen, np.int32)


@torch.no_grad()
def plain_generations(model, prompts: list[Example], tokens: int) -> list[np.ndarray]:
    ids, seen = padded(prompts, model.device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    output = model.generate(ids, attention_mask=seen, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    responses = []
    for line in output[:, ids.shape[1] :].cpu().numpy():
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
    prompts = [example.prompt_ids for example in examples]
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


def common(first: np.ndarray, second: np.ndarray) -> int:
    size = min(len(first), len(second))
    differing = np.flatnonzero(first[:size] != second[:size])
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
    backend, plain, util, safe = invented(options) if options.shape else real(options)
    shape = backend.shape
    sampled = sorted({int((part + 0.5) * shape.layers / options.layers) for part in range(options.layers)})
    heads = [(layer, head) for layer in sampled for head in range(shape.heads)]
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
        whole, found = timed(options.device, sweep)
        seconds[part] = whole / len(heads)
        print(f"{part}: sweep {seconds[part]:.3f} s a head")
        alone = [(layer, layer % shape.heads) for layer in sampled[: options.plain]]
        if alone:
            slow[part] = compared(part, options, plain, loop, {head: found[head] for head in alone})
            print(f"{part}: {slow[part] / seconds[part]:.1f} times faster than the plain loop")
        after = on_and_off(found, backend.generate(safe, options.tokens)) if part == "responses" else None
        if backend.name == "torch":
            done = layer_tokens(plain, sweep)
            least = bound(util if part == "choices" else safe, heads, shape, after)
            print(f"{part}: {done / 1e6:.2f} M layer-tokens, {done / least:.2f} times the bound")
    whole = sum(seconds.values())
    if slow:
        ratio = sum(slow.values()) / whole
        print(f"both: sweep {whole:.3f} s a head, {ratio:.1f} times faster than the plain loop")
    minutes = whole * shape.layers * shape.heads / 60
    print(f"whole map, extrapolated from the sampled layers: {minutes:.1f} min")
    print(f"peak memory {peak_gib(options.device):.1f} GiB")


def compared(
    part: str, options: Options, plain: torch.nn.Module, loop: Callable, found: dict[Head, Sequence]
) -> float:
    """Seconds a head of the plain loop, whose outputs should be the sweep's."""
    equal = count = 0
    took = []
    for head, outputs in found.items():
        with reference.ablated(plain, *head, options.mask):
            spent, expected = timed(options.device, loop)
        took.append(spent)
        count += len(expected)
        equal += sum(np.array_equal(*pair) for pair in zip(outputs, expected, strict=True))
    print(f"{part}: plain loop {np.mean(took):.3f} s a head; {equal} of {count} outputs equal")
    return float(np.mean(took))


def on_and_off(found: dict[Head, list], clean: list) -> dict[Head, list[tuple[int, int]]]:
    """For each head and prompt, tokens on and off the clean response."""
    after = {}
    for head, responses in found.items():
        shared = [common(*pair) for pair in zip(responses, clean, strict=True)]
        after[head] = [(size, len(own) - size) for own, size in zip(responses, shared, strict=True)]
    on, off = np.array([pair for pairs in after.values() for pair in pairs]).sum(axis=0)
    print(f"responses: {on / (on + off):.0%} of the tokens are the clean response's")
    return after


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
