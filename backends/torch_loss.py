"""The loss that gradients and tuning share, and the gradients of single heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from backends.batching import by_tokens, check_folds, training_rows
from backends.errors import InputError
from backends.progress import progress
from data.examples import Example

# Padded tokens of one forward and backward pass.
TOKENS_CPU, TOKENS_CUDA = 1024, 8192


def example_losses(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over each example's target tokens, float32 [N].

    Args:
        model: a transformers causal LM (with or without PEFT layers inside).
    """
    sequences, starts = training_rows(examples)
    lengths = [len(sequence) for sequence in sequences]
    device = model.device
    ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = torch.from_numpy(sequence.astype(np.int64))
    ids = ids.to(device)
    columns = torch.arange(ids.shape[1], device=device)
    limits = torch.tensor(lengths, device=device)[:, None]
    hidden = model.model(
        input_ids=ids, attention_mask=(columns < limits).long(), use_cache=False
    ).last_hidden_state
    # The token at column t is predicted at column t - 1; the output matrix sees only the places that need it.
    first = torch.tensor(starts, device=device)[:, None]
    predicts = (columns >= first - 1) & (columns < limits - 1)
    rows, places = predicts.nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, places])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits, ids[rows, places + 1], reduction="none")
    total = losses.new_zeros(len(examples)).index_add(0, rows, losses)
    return total / predicts.sum(dim=1)


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
