"""Prompts of a pass, and how their tokens attend. Axes as in `torch.decoder`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from backends.core import packing
from backends.torch.attention import Heads, Masks, mixed


@dataclass(frozen=True)
class Batch:
    """A `packing.Line` on a device: prompts without padding, shared beginnings once."""

    rows: np.ndarray
    ids: torch.Tensor
    positions: torch.Tensor
    prefix: int
    columns: torch.Tensor
    lengths: torch.Tensor
    picks: torch.Tensor
    whole: bool = False
    """the last layer's outcome is wanted of every token, not of the prompts' last ones only"""

    @property
    def last(self) -> torch.Tensor:
        """Each prompt's last token in the line, [R]."""
        return self.columns[:, -1]

    def to(self, device: torch.device) -> "Batch":
        tensors = ("ids", "positions", "columns", "lengths", "picks")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def make_batch(line: packing.Line, device: torch.device) -> Batch:
    ids, positions, columns, lengths, picks = (
        torch.from_numpy(part).to(device)
        for part in (line.ids, line.positions, line.columns, line.lengths, line.picks)
    )
    return Batch(line.rows, ids, positions, line.prefix, columns, lengths, picks)


def make_batches(
    sequences: Sequence[np.ndarray], device: torch.device, tokens: int, shared: int, most: int = 0
) -> list[Batch]:
    """`packing.lines` on the device."""
    return [make_batch(line, device) for line in packing.lines(sequences, tokens, shared, most)]


def attend_all(batch: Batch, heads: Heads, masks: Masks) -> torch.Tensor:
    """Every token of a line on what stands before it in its own prompt, [n, T, H, D]."""
    prefix, copies = batch.prefix, len(heads.queries)
    mask = masks.of(heads).unflatten(2, (heads.group, -1))  # (1, 1, G, C, C)
    # Each prompt's own, (n * R, C, K, D) and (n * R, C - P, H, D); shared tokens are answered more than once
    # and picked once.
    keys, values = (part[:, batch.columns].flatten(0, 1) for part in (heads.keys, heads.values))
    queries = heads.queries[:, batch.columns[:, prefix:]].flatten(0, 1)
    own = mixed(
        replace(heads, queries=queries, keys=keys, values=values), mask[:, :, :, prefix:].flatten(2, 3)
    )
    own = own.unflatten(0, (copies, -1)).flatten(1, 2)[:, batch.picks]  # (n, T - P, H, D)
    if not prefix:
        return own
    queries, keys, values = (part[:, :prefix] for part in (heads.queries, heads.keys, heads.values))
    before = mask[:, :, :, :prefix, :prefix].flatten(2, 3)
    first = mixed(replace(heads, queries=queries, keys=keys, values=values), before)
    return torch.cat([first, own], dim=1)


def attend_last(batch: Batch, heads: Heads, masks: Masks) -> torch.Tensor:
    """The prompts' last tokens, [n, R, H, D], on their prompts' keys and values [n, T, K, D]."""
    copies = len(heads.queries)
    keys, values = (part[:, batch.columns].flatten(0, 1) for part in (heads.keys, heads.values))
    queries = heads.queries.flatten(0, 1)[:, None]  # (n * R, 1, H, D)
    own = replace(heads, queries=queries, keys=keys, values=values)
    found = mixed(own, masks.of(heads).repeat(copies, 1, 1, 1))
    return found[:, 0].unflatten(0, (copies, -1))
