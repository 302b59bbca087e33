"""Gradients of single heads: in their rows of W_q, and in their gates, from one backward pass a row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from backends.base import Example, HeadGradients
from backends.core.packing import by_tokens, training_rows
from backends.core.progress import progress
from backends.torch.adapter import adapted
from backends.torch.decoder import Decoder
from backends.torch.loss import padded, target_logits, target_losses

TOKENS_CPU, TOKENS_CUDA = 1024, 8192
"""padded tokens of one forward and backward pass"""


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


@contextmanager
def gated(model: torch.nn.Module, gates: dict[int, torch.Tensor], mask: str) -> Iterator[None]:
    """Inside the block each row's heads are multiplied by its gates.

    Args:
        gates: layer -> [N, H], for the rows [N, T, E] that the model is given.
        mask: "output": what W_o reads of a head. "query": its query, before the rotary turn.
    """

    def scaled(per_head: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        split = per_head.unflatten(-1, (own.shape[1], -1))  # (N, T, H, D)
        return (split * own[:, None, :, None].to(split.device)).flatten(-2).to(per_head.dtype)

    hooks = []
    for layer, own in gates.items():
        attention = model.model.layers[layer].self_attn
        if mask == "output":
            hook = attention.o_proj.register_forward_pre_hook(
                lambda _, inputs, own=own: (scaled(inputs[0], own),)
            )
        else:
            hook = attention.q_proj.register_forward_hook(lambda _, __, output, own=own: scaled(output, own))
        hooks.append(hook)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _outcomes(logits: torch.Tensor, losses: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
    """Each row's log-likelihood as `Backend.loglikelihoods` has it, [N]."""
    outcomes, place = list(-losses), 0
    for row, example in enumerate(examples):
        if len(example.choice_ids):
            ids = torch.from_numpy(example.choice_ids.astype(np.int64)).to(logits.device)
            outcomes[row] = logits[place, ids].log_softmax(dim=0)[example.answer]
        place += len(example.target_ids)
    return torch.stack(outcomes)


def _differentiate(
    model: torch.nn.Module, examples: Sequence[Example], weights: dict[int, torch.Tensor], mask: str
) -> tuple[list[torch.Tensor], np.ndarray]:
    """Gradients of the sum of losses in each W_q of `weights`, and of each row's log-likelihood in its gates,
    [l, H, N]."""
    heads = model.config.num_attention_heads
    wide = torch.promote_types(model.dtype, torch.float32)
    gates = {
        layer: torch.ones(len(examples), heads, dtype=wide, device=weight.device, requires_grad=True)
        for layer, weight in weights.items()
    }
    with gated(model, gates, mask):
        logits = target_logits(model, examples, padded(training_rows(examples)[0]))
    losses = target_losses(logits, examples)
    wanted = [*weights.values(), *gates.values()]
    if any(len(example.choice_ids) for example in examples):
        # Where choices compete the outcome is another function than the loss.
        outcomes = _outcomes(logits, losses, examples).sum()
        of_gates = torch.autograd.grad(outcomes, [*gates.values()], retain_graph=True)
        of_weights = torch.autograd.grad(losses.sum(), [*weights.values()])
    else:
        found = torch.autograd.grad(losses.sum(), wanted)
        of_weights, of_gates = found[: len(weights)], [-own for own in found[len(weights) :]]
    return of_weights, np.stack([own.double().cpu().numpy().T for own in of_gates])


def head_gradients(
    decoder: Decoder,
    sides: tuple[Sequence[Example], Sequence[Example]],
    folds: int,
    layers: Sequence[int],
    mask: str,
    adapter: Path | None = None,
) -> HeadGradients:
    """See Backend.head_gradients."""
    with adapted(decoder.model, adapter):
        return _head_gradients(decoder, sides, folds, layers, mask)


def _head_gradients(
    decoder: Decoder,
    sides: tuple[Sequence[Example], Sequence[Example]],
    folds: int,
    layers: Sequence[int],
    mask: str,
) -> HeadGradients:
    """Of the model as it is. A float32 model is differentiated in float64."""
    model, heads = decoder.model, decoder.shape.heads
    weights = {layer: model.model.layers[layer].self_attn.q_proj.weight for layer in layers}
    budget = TOKENS_CUDA if model.device.type == "cuda" else TOKENS_CPU
    size = next(iter(weights.values())).shape
    gradients = torch.zeros(len(weights), 2 * folds, *size)  # (l, 2F, H * D, E)
    gates = [np.zeros((len(weights), heads, len(examples))) for examples in sides]
    bar = progress(total=sum(map(len, sides)), desc="gradients", unit="row")
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with _float64(model):
            for side, examples in enumerate(sides):
                for fold in range(folds):
                    members = np.arange(fold, len(examples), folds)
                    for batch in by_tokens([examples[row] for row in members], budget):
                        rows = members[batch]
                        batch = [examples[row] for row in rows]
                        of_weights, of_gates = _differentiate(model, batch, weights, mask)
                        for layer, gradient in enumerate(of_weights):
                            gradients[layer, side * folds + fold] += (gradient / len(members)).float().cpu()
                        gates[side][:, :, rows] = of_gates
                        bar.update(len(batch))
    finally:
        bar.close()
        for weight in weights.values():
            weight.requires_grad_(False)
    gram = np.empty((len(weights), heads, 2 * folds, 2 * folds))
    for layer, gradient in enumerate(gradients):
        each = gradient.reshape(2 * folds, heads, -1).transpose(0, 1).double()  # (H, 2F, D * E)
        gram[layer] = (each @ each.transpose(1, 2)).numpy()
    return HeadGradients(gram, *gates)
