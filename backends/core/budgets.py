"""How much of a sweep fits into memory, by calculation before it begins."""

import os
from dataclasses import dataclass
from pathlib import Path

from backends.base import Shape
from backends.core.errors import InputError

CONTROL_GROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes() -> int:
    """This machine's memory, or a container's share. Not what is free now: how work is cut must not depend on
    it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, CONTROL_GROUP):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


@dataclass(frozen=True)
class Plan:
    """How responses are swept."""

    rows: int
    """responses (head x prompt) decoded together"""
    prompts: int
    """of a block, whose clean keys and values are held together"""
    keep: bool
    """all blocks' clean streams stay between layers; else each is computed again for each layer"""


def plan_responses(shape: Shape, itemsize: int, room: int, prompts: int, tokens: int, most: int) -> Plan:
    """Sizes a sweep of responses.

    Args:
        itemsize: bytes of a number.
        room: bytes beside the weights.
        prompts: how many there are.
        tokens: of the longest prompt and its response.
        most: rows that decoding gains from.

    Raises InputError where not even two responses fit.
    """
    key_values = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
    # A row decodes with its keys and values and its logits (in float32 beside the model's own type).
    row = key_values * tokens + shape.vocab * (4 + itemsize)
    clean = (key_values + shape.model_dim * itemsize) * tokens
    rows = min(most, int(0.6 * room) // row)
    if rows < 2:  # in half precision an ablated response goes beside the clean one
        raise InputError(
            f"two responses of {tokens} tokens take {2 * row / 2**30:.2f} GiB to decode, and "
            f"{room / 2**30:.2f} GiB are free beside the weights: fewer --sweep-tokens, or a larger machine"
        )
    # In half precision a clean response goes beside the ablated ones of its prompt: with few heads to a block
    # it would be half of the work.
    block = min(prompts, max(1, rows // (8 if itemsize < 4 else 2)), max(1, int(0.2 * room) // clean))
    return Plan(rows, block, prompts * clean <= 0.2 * room)


def keeps_choices(shape: Shape, itemsize: int, room: int, tokens: int) -> bool:
    """Whether the residual streams of all prompts, `tokens` in all, stay between layers."""
    return tokens * shape.model_dim * itemsize <= 0.4 * room
