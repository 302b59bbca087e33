"""The loss that gradients and tuning share, and the gradients of single heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from backends.batching import Line, by_tokens, check_folds, join, training_rows
from backends.errors import InputError
from backends.models import sliding_windows
from backends.progress import progress
from data.examples import Example

# Padded tokens of one forward and backward pass.
TOKENS_CPU, TOKENS_CUDA = 1024, 8192


def example_losses(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over each example's target tokens, float32 [N].

    Rows go through the model padded to one length, or as one line without padding in which a beginning that
    rows share (a system prompt) stands once and each token sees its own row alone: whichever is less work.

    Args:
        model: a transformers causal LM (with or without PEFT layers inside).
    """
    sequences, starts = training_rows(examples)
    line = join(sequences, 0)
    if _line_pays(model, line):
        ids, columns, rows = torch.from_numpy(line.ids)[None], line.columns, line.rows
        positions, visible = torch.from_numpy(line.positions)[None], torch.from_numpy(_visible(line))
    else:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        columns = np.arange(ids.numel()).reshape(ids.shape)
        rows, positions = np.arange(len(sequences)), None
        lengths = np.array([len(sequence) for sequence in sequences])
        visible = torch.from_numpy(np.arange(longest) < lengths[:, None])
    device = model.device
    ids = ids.to(device)
    hidden = model.model(
        input_ids=ids,
        attention_mask=visible.to(device),
        position_ids=None if positions is None else positions.to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    # The token at column t is predicted at column t - 1; the output matrix sees only the places that need it.
    own = [columns[at, starts[row] - 1 : len(sequences[row])] for at, row in enumerate(rows)]
    places = torch.from_numpy(np.concatenate([places[:-1] for places in own])).to(device)
    targets = torch.from_numpy(np.concatenate([places[1:] for places in own])).to(device)
    counts = torch.tensor([len(places) - 1 for places in own])
    of = torch.from_numpy(rows).repeat_interleave(counts).to(device)
    logits = model.lm_head(hidden[places])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits, ids.flatten()[targets], reduction="none")
    total = losses.new_zeros(len(examples)).index_add(0, of, losses)
    return total / losses.new_zeros(len(examples)).index_add(0, of, torch.ones_like(losses))


def _line_pays(model: torch.nn.Module, line: Line) -> bool:
    """Whether a line is less work than its rows, padded: it has fewer tokens, but each is held against all of
    them. Where a sliding window cuts rows it never does, since the mask would be another in every layer."""
    rows, longest = line.columns.shape
    if any(window is not None and window < longest for window in sliding_windows(model.config)):
        return False
    layer = model.model.layers[0]
    token = sum(weight.numel() for weight in layer.parameters())
    pair = 2 * model.config.num_attention_heads * layer.self_attn.head_dim
    together, apart = len(line.ids), rows * longest
    return together * (token + pair * together) < apart * (token + pair * longest)


def _visible(line: Line) -> np.ndarray:
    """Which tokens each token of a line sees: those of a row that has it, up to itself. bool [1, 1, T, T]."""
    seen = np.zeros((len(line.ids), len(line.ids)), bool)
    token, column = np.nonzero(np.arange(line.columns.shape[1]) <= line.positions[:, None])
    seen[token, line.columns[line.holders[token], column]] = True
    return seen[None, None]


@contextmanager
def _float64(model: torch.nn.Module) -> Iterator[None]:
    """A float32 model in float64 for a while; the way back is exact.

    Where the gradients of a head's rows nearly cancel, O magnifies rounding: on SmolLM2 float32 arithmetic
    moved it by up to 2e-4, most of that a last digit of the first token's keys, which every row shares.
    Computed in float64 the two backends agree to 2e-7. Half precision has no such digits to lose.
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
    model: torch.nn.Module,
    heads: int,
    safe: Sequence[Example],
    util: Sequence[Example],
    folds: int,
    layers: Sequence[int],
) -> np.ndarray:
    """See Backend.gradient_gram. A float32 model is differentiated in float64."""
    check_folds(folds, safe=safe, util=util)
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
