"""Greedy responses by transformers' continuous batching: a response that ends makes room for the next prompt.

For long responses of uneven length on CUDA, where rows of the plain decoder (`generate.side_by_side`) would
wait for the longest. Uses what transformers 5.17 and 5.23 share. The sweep never comes here.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
import transformers
from transformers.generation import ContinuousBatchingConfig

from backends import models
from backends.base import Example, Shape
from backends.core import budgets
from backends.core.errors import InputError, reason

BLOCK = 256
"""tokens of a block of the pool, transformers' default"""
ROWS_SDPA, ROWS_FLASH = 64, 512
"""Responses side by side. SDPA attends from every row to every row's keys and masks the others', so that
attention grows with the square of the rows; by calculation 64 is where it costs as much as reading an 8B
model's weights."""
TOKENS_SDPA, TOKENS_FLASH = 1024, 4096
"""tokens of a step, those of new prompts included"""
SHARE = 0.6
"""of the free memory; transformers refuses a pool that is too large by its own count"""
SPARE = 1.25
"""blocks per needed block: with less than a fifth of them free, transformers admits no new prompt"""


@dataclass(frozen=True)
class Pool:
    """Sizes of what is held on the device."""

    rows: int
    """responses side by side, each with room for its longest possible end"""
    blocks: int
    tokens: int
    """of a step"""


def handles(model: torch.nn.Module) -> bool:
    """Whether responses of this model come from here: on CUDA, except where layers differ in their sliding
    window (older transformers count a pool's blocks for each kind of layer, so that it cannot be sized), and
    except float32 where flash attention (half precision only) is installed and transformers cannot be kept
    from it.
    """
    if model.device.type != "cuda" or len(set(models.sliding_windows(model.config))) > 1:
        return False
    return model.dtype != torch.float32 or _can_refuse_flash() or not _has_flash()


def generate(
    model: torch.nn.Module, prompts: Sequence[Example], max_new_tokens: int, eos: set[int]
) -> list[np.ndarray]:
    """See Backend.generate. In float32 the tokens are those of the plain decoder and of transformers'
    `generate`; in half precision they may differ by rounding, and are the same in every run.

    Args:
        model: a transformers causal LM, with or without PEFT layers inside.

    Raises InputError where the device has no room for one response, or where transformers ends without all of
    them (it only logs what failed).
    """
    if not prompts:
        return []
    shape = models.read_shape(model.config)
    flash = model.dtype != torch.float32 and _has_flash()
    pool = plan(shape, model.dtype.itemsize, _free(model.device), prompts, max_new_tokens, flash)
    settings = ContinuousBatchingConfig(
        num_blocks=pool.blocks,
        max_batch_tokens=pool.tokens,
        max_requests_per_batch=pool.rows,
        allow_block_sharing=False,  # prompts are short beside their responses
        **({"auto_switch_to_flash": flash} if _can_refuse_flash() else {}),
    )
    greedy = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(eos) or -1, pad_token_id=0
    )
    lines = [prompt.prompt_ids.tolist() for prompt in prompts]
    try:
        with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
            names, found = _run(model, greedy, settings, lines, max_new_tokens)
    except (MemoryError, RuntimeError, ValueError) as error:
        raise InputError(f"continuous batching: {reason(error)}") from error
    return _checked(names, found, lines, max_new_tokens, eos)


def _run(model, greedy, settings, lines: list[list[int]], max_new_tokens: int) -> tuple[list[str], dict]:
    """Names of the requests in the prompts' order, and their results by name.

    `generate_batch` would add requests while the loop runs, so that which ones share a step, and with it the
    last digits, would depend on the threads' timing. Here all are added before it starts.
    """
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=settings)
    found: dict = {}
    names: list[str] = []
    try:
        manager.warmup()  # makes the pool, in this thread, so that its errors come here
        names = manager.add_requests(lines, max_new_tokens=max_new_tokens)
        manager.start()
        while len(found) < len(names):
            result = manager.get_result(timeout=1.0)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                break
    finally:
        if names:
            manager.stop(hard_stop=len(found) < len(names))
        manager.destroy()
    return names, found


def _checked(names: list[str], found: dict, lines, max_new_tokens: int, eos: set[int]) -> list[np.ndarray]:
    failed = [found[name].error for name in names if name in found and found[name].error is not None]
    missing = len(lines) - sum(name in found for name in names)
    if failed or missing:
        message = f" ({str(failed[0]).splitlines()[0]})" if failed and failed[0] else ""
        raise InputError(
            f"continuous batching: of {len(lines)} responses {len(failed)} failed{message} and {missing} are "
            f"missing"
        )
    responses = []
    for name, line in zip(names, lines, strict=True):
        tokens = found[name].generated_tokens
        ended = bool(tokens) and (len(tokens) == max_new_tokens or tokens[-1] in eos)
        if not ended or found[name].prompt_ids != line or eos.intersection(tokens[:-1]):
            raise InputError(f"continuous batching: response {name} is not a whole one to its prompt")
        responses.append(np.array(tokens, np.int32))
    return responses


def plan(
    shape: Shape, itemsize: int, free: int, prompts: Sequence[Example], max_new_tokens: int, flash: bool
) -> Pool:
    """As many rows as fit, up to where more cost more than they gain.

    Args:
        itemsize: bytes of a number.
        free: bytes on the device.

    Raises InputError where not one response fits.
    """
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
    most = min(len(prompts), ROWS_FLASH if flash else ROWS_SDPA)
    read = sum(len(prompt.prompt_ids) for prompt in prompts)
    tokens = max(most, min(TOKENS_FLASH if flash else TOKENS_SDPA, read))
    per_head = shape.head_dim * itemsize
    # Of a token in the pool: its keys and values, and for one layer at a time the copies that attention reads
    # (SDPA: one per query head) and its column in the step's mask.
    held = 2 * shape.layers * shape.kv_heads * per_head + 16
    seen = 2 * shape.kv_heads * per_head if flash else (2 * shape.heads + shape.kv_heads) * per_head
    seen += 0 if flash else tokens * itemsize
    # Of a token of a step: logits and a layer's activations, and its own mask.
    step = shape.vocab * (4 + itemsize) + 8 * (shape.model_dim + shape.mlp_dim) * itemsize + tokens * itemsize
    blocks = -(-longest // BLOCK)
    row = blocks * BLOCK * (held + seen)
    room = SHARE * free - tokens * step
    rows = min(most, int(room // (SPARE * row)))
    if rows < 1:
        raise InputError(
            f"a response of {longest} tokens takes {(SPARE * row + tokens * step) / 2**30:.2f} GiB, and "
            f"{SHARE * free / 2**30:.2f} GiB may be used beside the weights: fewer new tokens, or a larger "
            f"device"
        )
    return Pool(rows, int(SPARE * rows * blocks) + 1, tokens)


def _free(device: torch.device) -> int:
    """Bytes: on CUDA what is free, and what torch holds in reserve."""
    if device.type != "cuda":
        return budgets.machine_bytes() // 2
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def _has_flash() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface"))


def _can_refuse_flash() -> bool:
    return "auto_switch_to_flash" in {field.name for field in fields(ContinuousBatchingConfig)}
