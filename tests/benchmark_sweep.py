"""How much faster the sweep is than the plain loop, on the same heads and prompts in one process.

    python -m tests.benchmark_sweep --run outputs/smollm
    python -m tests.benchmark_sweep --run outputs/smollm --backend flax
    python -m tests.benchmark_sweep --shape llama-8b --device cuda --dtype bfloat16 --prompts 100 --tokens 64

The plain loop: for each head a hook, one padded batch through the whole model, one `generate`. It is timed on
one head of each sampled layer (its cost does not depend on the layer), the sweep on all heads of those.
"""

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
from backends.base import Backend, Example
from data import rendering
from stages.run.schemas import CALIBRATION
from stages.run.store import RunFolder
from tests import reference

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads",)
SHAPES = {
    "llama-8b": (128256, 4096, 14336, 32, 32, 8),
    "smollm": (49152, 576, 1536, 30, 9, 3),
    "small": (4096, 256, 512, 6, 8, 4),
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


def random_model(shape: str, name: str, device: str, dtype: str) -> tuple[Backend, torch.nn.Module]:
    """A Llama of random weights, written to a folder and loaded as any other, as `loaded` gives it."""
    sizes = dict(zip(NAMES, SHAPES[shape], strict=True))
    config = transformers.LlamaConfig(**sizes, eos_token_id=2, bos_token_id=1, tie_word_embeddings=False)
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as folder:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            made.save_pretrained(folder)
            del made
        torch.cuda.empty_cache()
        return loaded(Path(folder), name, device, dtype)


def loaded(folder: Path, name: str, device: str, dtype: str) -> tuple[Backend, torch.nn.Module]:
    """The backend, and transformers' model."""
    backend = backends.load(name, folder, dtype=dtype, device=device)
    if name == "torch":
        return backend, backend.model.model
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return backend, plain.to(device).eval()


def real(options: Options) -> tuple[Backend, torch.nn.Module, list[Example], list[Example]]:
    """The model and the first calibration rows of a run."""
    run = RunFolder(options.run)
    settings = run.manifest(CALIBRATION.stage)["settings"]
    folder = models.local_folder(settings["model"], settings.get("revision", "main"))
    rows = run.read(CALIBRATION).to_dict("records")
    util, safe = (
        [rendering.example(row) for row in rows if row["split"] == split] for split in ("util", "safe")
    )
    both = loaded(folder, options.backend, options.device, options.dtype)
    return *both, util[: options.prompts], safe[: options.prompts]


def random_prompts(count: int, vocab: int, choices: int, seed: int) -> list[Example]:
    """A shared prefix of 40 tokens, then 20 to 120 of each prompt's own."""
    generator = np.random.default_rng(seed)
    prefix = generator.integers(3, vocab, 40)
    made = []
    for number in range(count):
        own = generator.integers(3, vocab, generator.integers(20, 121))
        prompt = np.concatenate([prefix, own]).astype(np.int32)
        candidates = generator.choice(np.arange(3, vocab), choices, replace=False).astype(np.int32)
        made.append(Example(f"r{number}", prompt, np.zeros(1, np.int32), candidates, 0))
    return made


# The plain loop


def padded(examples: list[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, padded on the left."""
    width = max(len(example.prompt_ids) for example in examples)
    ids, seen = (torch.zeros((len(examples), width), dtype=torch.long) for _ in range(2))
    for row, example in enumerate(examples):
        ids[row, width - len(example.prompt_ids) :] = torch.from_numpy(example.prompt_ids.astype(np.int64))
        seen[row, width - len(example.prompt_ids) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": seen.to(device)}


@torch.no_grad()
def plain_choices(model, examples: list[Example]) -> np.ndarray:
    inputs = padded(examples, model.device)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, 0]
    return np.array(list(map(reference.chosen, logits, examples)), np.int32)


@torch.no_grad()
def plain_generations(model, prompts: list[Example], tokens: int) -> list[np.ndarray]:
    inputs, ends = padded(prompts, model.device), model.generation_config.eos_token_id
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    responses = []
    for line in output[:, inputs["input_ids"].shape[1] :].cpu().numpy().astype(np.int32):
        (at,) = np.nonzero(np.isin(line, [] if ends is None else ends))
        responses.append(line[: at[0] + 1] if len(at) else line)
    return responses


def timed(device: str, work: Callable[[], object]) -> tuple[float, object]:
    began = time.monotonic()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.monotonic() - began, result


def main(options: Options) -> None:
    if options.shape:
        backend, plain = random_model(options.shape, options.backend, options.device, options.dtype)
        util, safe = (
            random_prompts(options.prompts, backend.shape.vocab, choices, seed)
            for seed, choices in enumerate((4, 0))
        )
    else:
        backend, plain, util, safe = real(options)
    shape = backend.shape
    sampled = sorted({int((part + 0.5) * shape.layers / options.layers) for part in range(options.layers)})
    heads = [(layer, head) for layer in sampled for head in range(shape.heads)]
    print(
        f"{options.shape or options.run}: {shape.layers} layers of {shape.heads} heads, {backend.name}, "
        f"{backend.dtype} on {backend.device}, {torch.get_num_threads()} threads; {len(util)} choices and "
        f"{len(safe)} responses of {options.tokens} tokens; layers {sampled}"
    )

    fast, slow = [], []
    for part, sweep, loop in (
        ("choices", lambda: dict(backend.sweep_choices(util, heads)), lambda: plain_choices(plain, util)),
        (
            "responses",
            lambda: dict(backend.sweep_generations(safe, heads, options.tokens)),
            lambda: plain_generations(plain, safe, options.tokens),
        ),
    ):
        if backend.name == "flax":
            print(f"{part}: first call, which compiles, {timed(options.device, sweep)[0]:.1f} s")
            backend.kept.drop()  # so that the second call decodes clean responses too
        whole, found = timed(options.device, sweep)
        fast.append(whole / len(heads))
        took, equal = [], []
        for layer in sampled[: options.plain]:
            head = layer, layer % shape.heads
            with reference.ablated(plain, *head):
                spent, expected = timed(options.device, loop)
            took.append(spent)
            equal += [np.array_equal(*pair) for pair in zip(found[head], expected, strict=True)]
        print(f"{part}: sweep {fast[-1]:.3f} s a head")
        if took:
            slow.append(np.mean(took))
            print(
                f"{part}: plain loop {slow[-1]:.3f} s a head, {slow[-1] / fast[-1]:.1f} times the sweep's; "
                f"{sum(equal)} of {len(equal)} outputs equal"
            )
    if slow:
        print(f"both: sweep {sum(fast):.3f} s a head, plain loop {sum(slow) / sum(fast):.1f} times that")
    minutes = sum(fast) * shape.layers * shape.heads / 60
    print(f"whole map, extrapolated from the sampled layers: {minutes:.1f} min")
    if options.device.startswith("cuda"):
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
