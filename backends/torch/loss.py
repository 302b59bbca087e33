"""The loss that gradients and tuning share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from backends.base import Example
from backends.core.budgets import layer_weights
from backends.core.packing import Line, join, training_rows
from backends.models import read_shape, sliding_windows
from backends.torch.decoder import finished


class Rows(NamedTuple):
    """Sequences for one pass."""

    ids: torch.Tensor
    """[1, T] of a line, or [N, C], right-padded"""
    positions: torch.Tensor | None
    """of the tokens in their sequences, as `ids`; None: their columns"""
    visible: torch.Tensor
    """bool [1, 1, T, T], or of tokens that are no padding [N, C]"""
    columns: np.ndarray
    """where in `ids`, flattened, the token at each position of a sequence stands, [N, C]"""
    order: np.ndarray
    """which sequence each row of `columns` is, [N]"""


def as_line(line: Line) -> Rows:
    """A token attends to those of a sequence that has it, up to itself."""
    visible = torch.zeros(len(line.ids), len(line.ids), dtype=torch.bool)
    token, column = np.nonzero(np.arange(line.columns.shape[1]) <= line.positions[:, None])
    visible[token, line.columns[line.holders[token], column]] = True
    ids, positions = (torch.from_numpy(part)[None] for part in (line.ids, line.positions))
    return Rows(ids, positions, visible[None, None], line.columns, line.rows)


def padded(sequences: Sequence[np.ndarray]) -> Rows:
    """A token attends to those before it in its row, as a mask of two axes says to transformers."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    visible = torch.arange(ids.shape[1]) < lengths[:, None]
    columns = np.arange(ids.numel()).reshape(ids.shape)
    return Rows(ids, None, visible, columns, np.arange(len(sequences)))


def example_losses(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over each example's target tokens, float32 (float64 of a float64 model) [N].

    Examples go through the model padded to one length, or as one line without padding in which a beginning
    that they share (a system prompt) stands once, whichever is less work.

    Args:
        model: a transformers causal LM (with or without PEFT layers inside).
    """
    sequences, _ = training_rows(examples)
    line = join(sequences, 0)
    rows = as_line(line) if _line_pays(model, line) else padded(sequences)
    logits = target_logits(model, examples, rows)
    return target_losses(logits, [examples[at] for at in rows.order])[np.argsort(rows.order)]


def target_logits(model: torch.nn.Module, examples: Sequence[Example], rows: Rows) -> torch.Tensor:
    """Logits that predict each target token, float32 (float64 of a float64 model) [M, V]; examples in the
    order of `rows`."""
    device = model.device
    hidden = model.model(
        input_ids=rows.ids.to(device),
        attention_mask=rows.visible.to(device),
        position_ids=None if rows.positions is None else rows.positions.to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    # A token is predicted by the one before it; the output matrix sees only the places that predict a target.
    places = []
    for at, columns in zip(rows.order, rows.columns, strict=True):
        start = len(examples[at].prompt_ids) - 1
        places.append(columns[start : start + len(examples[at].target_ids)])
    logits = model.lm_head(hidden[torch.from_numpy(np.concatenate(places)).to(device)])
    return finished(model, logits.to(torch.promote_types(logits.dtype, torch.float32)))


def target_losses(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy of each example's target, [N], from the logits that predict them [M, V]."""
    targets = np.concatenate([example.target_ids for example in examples]).astype(np.int64)
    targets = torch.from_numpy(targets).to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.stack([own.mean() for own in losses.split([len(row.target_ids) for row in examples])])


def _line_pays(model: torch.nn.Module, line: Line) -> bool:
    """Whether a line is less work than padded rows: it has fewer tokens, but each is compared with all of
    them. Never where a sliding window cuts rows, since layers would need different masks."""
    rows, longest = line.columns.shape
    if any(window is not None and window < longest for window in sliding_windows(model.config)):
        return False
    shape = read_shape(model.config)
    token = layer_weights(shape)
    pair = 2 * shape.heads * shape.head_dim
    together, apart = len(line.ids), rows * longest
    return together * (token + pair * together) < apart * (token + pair * longest)
