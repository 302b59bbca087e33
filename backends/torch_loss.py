"""The loss that gradients and tuning share, and the gradients of single heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from backends.errors import InputError
from backends.progress import progress
from data.examples import Example

# Padded tokens of one forward and backward pass.
TOKENS_CPU, TOKENS_CUDA = 1024, 8192


def example_losses(model: torch.nn.Module, examples: Sequence[Example], max_length: int = 0) -> torch.Tensor:
    """Mean cross-entropy over each example's target tokens, float32 [N].

    Args:
        model: a transformers causal LM (with or without PEFT layers inside).
        max_length: tokens that a row is cut to at its end; 0: not cut. ValueError if no target token is left.
    """
    sequences = [np.concatenate([example.prompt_ids, example.target_ids]) for example in examples]
    if max_length:
        sequences = [sequence[:max_length] for sequence in sequences]
    starts = [len(example.prompt_ids) for example in examples]
    for example, sequence, start in zip(examples, sequences, starts, strict=True):
        if len(sequence) <= start:
            raise ValueError(f"example {example.example_id} has no target token within {max_length} tokens")
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
    logits = model.lm_head(hidden[rows, places]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[rows, places + 1], reduction="none")
    total = torch.zeros(len(examples), device=device).index_add(0, rows, losses)
    return total / predicts.sum(dim=1)


def _by_tokens(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """Examples in batches of similar length, at most `budget` padded tokens each."""
    ordered = sorted(examples, key=lambda example: -(len(example.prompt_ids) + len(example.target_ids)))
    batches, start = [], 0
    while start < len(ordered):
        length = len(ordered[start].prompt_ids) + len(ordered[start].target_ids)
        size = max(1, budget // length)
        batches.append(ordered[start : start + size])
        start += size
    return batches


@contextmanager
def _plain_attention(model: torch.nn.Module) -> Iterator[None]:
    """In float32, attention written out. The backward pass of torch's fused CPU kernel loses digits where a
    head's attention is saturated: on SmolLM2 it moved O by 1e-4 on one head, where every other way of
    computing agreed to 1e-5. Half precision has no such digits to lose."""
    fused = model.config._attn_implementation
    if model.dtype == torch.float32:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(fused)


def gradient_gram(
    model: torch.nn.Module, heads: int, safe: Sequence[Example], util: Sequence[Example], folds: int
) -> np.ndarray:
    """See Backend.gradient_gram. Holds 2F gradients of every W_q in float32: 2F * L * H * D * E * 4 bytes."""
    for name, examples in (("safe", safe), ("util", util)):
        if len(examples) == 0 or len(examples) % folds:
            raise ValueError(f"{name}: {len(examples)} examples do not divide into {folds} equal folds")
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    budget = TOKENS_CUDA if model.device.type == "cuda" else TOKENS_CPU
    gradients = torch.zeros(len(weights), 2 * folds, *weights[0].shape)  # (L, 2F, H * D, E)
    bar = progress(total=len(safe) + len(util), desc="gradients", unit="row")
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with _plain_attention(model):
            for kind, examples in enumerate((safe, util)):
                for fold in range(folds):
                    members = examples[fold::folds]
                    for batch in _by_tokens(members, budget):
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
        layer, head = np.argwhere(~np.isfinite(gram).all(axis=(2, 3)))[0]
        raise InputError(f"the gradient of head ({layer}, {head}) is not finite: try --dtype float32")
    return gram
