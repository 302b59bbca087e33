"""The loss that gradients and tuning share, and the gradients of single heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from backends.base import Example
from backends.core.checks import check_folds
from backends.core.errors import InputError
from backends.core.packing import Line, by_tokens, join, training_rows
from backends.core.progress import progress
from backends.models import sliding_windows
from backends.torch.decoder import Decoder

# Padded tokens of one forward and backward pass.
TOKENS_CPU, TOKENS_CUDA = 1024, 8192


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
    sequences, starts = training_rows(examples)
    line, device = join(sequences, 0), model.device
    rows = as_line(line) if _line_pays(model, line) else padded(sequences)
    ids = rows.ids.to(device)
    hidden = model.model(
        input_ids=ids,
        attention_mask=rows.visible.to(device),
        position_ids=None if rows.positions is None else rows.positions.to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    # A token is predicted by the one before it; the output matrix sees only the places that predict a target.
    own = [
        columns[starts[at] - 1 : len(sequences[at])]
        for at, columns in zip(rows.order, rows.columns, strict=True)
    ]
    places, targets = (
        torch.from_numpy(np.concatenate(parts)).to(device)
        for parts in ([part[:-1] for part in own], [part[1:] for part in own])
    )
    logits = model.lm_head(hidden[places])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits, ids.flatten()[targets], reduction="none")
    means = [each.mean() for each in losses.split([len(part) - 1 for part in own])]
    return torch.stack([means[at] for at in np.argsort(rows.order)])


def _line_pays(model: torch.nn.Module, line: Line) -> bool:
    """Whether a line is less work than padded rows: it has fewer tokens, but each is compared with all of
    them. Never where a sliding window cuts rows, since layers would need different masks."""
    rows, longest = line.columns.shape
    if any(window is not None and window < longest for window in sliding_windows(model.config)):
        return False
    layer = model.model.layers[0]
    token = sum(weight.numel() for weight in layer.parameters())
    pair = 2 * model.config.num_attention_heads * layer.self_attn.head_dim
    together, apart = len(line.ids), rows * longest
    return together * (token + pair * together) < apart * (token + pair * longest)


@contextmanager
def _float64(model: torch.nn.Module) -> Iterator[None]:
    """A float32 model in float64 inside the block; the conversion back is exact.

    Where the gradients of a head's rows nearly cancel, O magnifies rounding: on SmolLM2 float32 moved it by
    up to 2e-4. In float64 the two backends agree to 2e-7. Half precision is left as it is.
    """
    if model.dtype != torch.float32:
        yield
        return
    model.double()
    try:
        yield
    finally:
        model.float()


def gradient_gram(
    decoder: Decoder,
    safe: Sequence[Example],
    util: Sequence[Example],
    folds: int,
    layers: Sequence[int],
) -> np.ndarray:
    """See Backend.gradient_gram. A float32 model is differentiated in float64."""
    check_folds(folds, safe=safe, util=util)
    model, heads = decoder.model, decoder.shape.heads
    weights = [model.model.layers[layer].self_attn.q_proj.weight for layer in layers]
    budget = TOKENS_CUDA if model.device.type == "cuda" else TOKENS_CPU
    gradients = torch.zeros(len(weights), 2 * folds, *weights[0].shape)  # (L, 2F, H * D, E)
    bar = progress(total=len(safe) + len(util), desc="gradients", unit="row")
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with _float64(model):
            for kind, examples in enumerate((safe, util)):
                for fold in range(folds):
                    members = examples[fold::folds]
                    for batch in by_tokens(members, budget):
                        loss = example_losses(model, batch).sum() / len(members)
                        for layer, gradient in enumerate(torch.autograd.grad(loss, weights)):
                            gradients[layer, kind * folds + fold] += gradient.float().cpu()
                        bar.update(len(batch))
    finally:
        bar.close()
        for weight in weights:
            weight.requires_grad_(False)
    gram = np.empty((len(weights), heads, 2 * folds, 2 * folds))
    for layer, gradient in enumerate(gradients):
        rows = gradient.reshape(2 * folds, heads, -1).transpose(0, 1).double()  # (H, 2F, D * E)
        gram[layer] = (rows @ rows.transpose(1, 2)).numpy()
    if not np.isfinite(gram).all():
        at, head = np.argwhere(~np.isfinite(gram).all(axis=(2, 3)))[0]
        layer = layers[at]
        raise InputError(f"the gradient of head ({layer}, {head}) is not finite: try --dtype float32")
    return gram
