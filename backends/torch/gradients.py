"""Gradients of single heads: in their rows of W_q, and in their gates, from one backward pass a row."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from threading import local
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from backends.base import Example, HeadGradients
from backends.core.budgets import FoldSums, GradientPlan, plan_gradients
from backends.core.packing import by_tokens, training_rows
from backends.core.progress import progress
from backends.torch.adapter import adapted
from backends.torch.attention import scaled_outputs, scaled_queries
from backends.torch.backward import recomputed, work_of
from backends.torch.decoder import Decoder
from backends.torch.graded import competing, outcome_at, predicted
from backends.torch.loss import padded, target_logits, target_losses
from backends.torch.sweep import find_candidates

TOKENS_CPU, TOKENS_CUDA = 512, 8192
"""padded tokens of one forward and backward pass, where memory allows"""
Weights = dict[int, torch.Tensor]
"""layer -> W_q, [H * D, E]"""
Sums = list[list[torch.Tensor]]
"""of each fold and layer the mean gradient in W_q, float32 [H * D, E]"""
Own = local | SimpleNamespace
"""what belongs to one pass: `gates`"""


# Precision and memory


def make_plan(
    decoder: Decoder, examples: Sequence[Example], folds: int, layers: Sequence[int]
) -> GradientPlan:
    """How gradients of all these rows fit the devices."""
    itemsize, cuda, places = decoder.itemsize, decoder.device.type == "cuda", decoder.places
    wanted = max([places[layer] for layer in layers].count(place) for place in places)
    fused = not cuda or itemsize < 4  # CUDA has no fused attention in float64
    work = work_of(decoder, examples, 8 if itemsize == 4 else itemsize, fused)
    sums = FoldSums(itemsize, wanted, folds, host=cuda)
    if cuda:
        return plan_gradients(work, sums, decoder.room, TOKENS_CUDA)
    return plan_gradients(work, sums, decoder.room, TOKENS_CPU, torch.get_num_threads())


@contextmanager
def _float64(model: torch.nn.Module) -> Iterator[None]:
    """The model in float64 inside the block; the conversion back is exact."""
    model.double()
    try:
        yield
    finally:
        model.float()


@contextmanager
def _plain_experts(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block a mixture's experts compute one by one: their joint product knows no float64."""
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def prepared(model: torch.nn.Module, plan: GradientPlan) -> Iterator[None]:
    """The model as it is differentiated: in float64 if it is float32, in half precision as it is.

    Where the gradients of a head's rows nearly cancel, O magnifies rounding: on SmolLM2 float32 moved it by
    up to 2e-4. In float64 the two backends agree to 2e-7.
    """
    layers = list(model.model.layers)
    with ExitStack() as stack:
        if model.dtype == torch.float32:
            stack.enter_context(_plain_experts(model))
        if plan.by_layer:
            stack.enter_context(recomputed([*layers, model.model.norm, model.lm_head], True))
        elif model.dtype == torch.float32:
            stack.enter_context(_float64(model))
        if plan.recompute and not plan.by_layer:
            stack.enter_context(recomputed(layers, False))
        yield


@contextmanager
def wanted(weights: Weights) -> Iterator[None]:
    """Inside the block the weights require gradients."""
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)


@contextmanager
def gated(model: torch.nn.Module, own: Own, layers: Iterable[int], mask: str) -> Iterator[None]:
    """Inside the block each row's heads are multiplied by its gates.

    Args:
        own: its `gates`, layer -> [N, H], are for the rows [N, T, E] that the model is given.
        mask: "output": what W_o reads of a head. "query": what attention receives.
    """
    scaled = scaled_outputs if mask == "output" else scaled_queries
    with ExitStack() as stack:
        for layer in layers:
            attention = model.model.layers[layer].self_attn
            stack.enter_context(scaled(attention, lambda layer=layer: own.gates[layer]))
        yield


# One pass


def _outcomes(logits: torch.Tensor, losses: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
    """Each row's graded outcome as `Backend.grade` has it, [N], from the logits that predict the
    targets [M, V]."""
    first = np.cumsum([0, *(len(example.target_ids) for example in examples)])
    rows = [row for row, example in enumerate(examples) if len(competing(example))]
    own = [examples[row] for row in rows]
    tokens, refusals, closed, places = (
        torch.from_numpy(np.array(part)).to(logits.device)
        for part in (
            [int(predicted(row)[0]) for row in own],
            [len(row.refusal_ids) > 0 for row in own],
            rows,
            first[rows],
        )
    )
    among = outcome_at(
        logits[places], tokens, find_candidates([*map(competing, own)], None, logits.device), refusals
    )
    return (-losses).index_copy(0, closed, among)


def _differentiate(
    model: torch.nn.Module, examples: Sequence[Example], weights: Weights, own: Own
) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """Gradients of the sum of losses in each W_q of `weights`, and of each row's graded outcome in its gates,
    float64 [l, H, N]; the model is `gated` by `own`."""
    heads = model.config.num_attention_heads
    wide = torch.float32 if model.dtype.itemsize == 2 else torch.float64
    own.gates = gates = {
        layer: torch.ones(len(examples), heads, dtype=wide, device=weight.device, requires_grad=True)
        for layer, weight in weights.items()
    }
    # The last token predicts none.
    sequences = [sequence[:-1] for sequence in training_rows(examples)[0]]
    logits = target_logits(model, examples, padded(sequences))
    losses = target_losses(logits, examples)
    if any(len(competing(example)) for example in examples):  # another function than the loss
        outcomes = _outcomes(logits, losses, examples).sum()
        of_gates = torch.autograd.grad(outcomes, [*gates.values()], retain_graph=True)
        of_weights = torch.autograd.grad(losses.sum(), [*weights.values()])
    else:
        found = torch.autograd.grad(losses.sum(), [*weights.values(), *gates.values()])
        of_weights, of_gates = found[: len(weights)], [-gradient for gradient in found[len(weights) :]]
    return of_weights, torch.stack([gradient.T.double().to(model.device) for gradient in of_gates])


# All passes


@dataclass(frozen=True)
class _Passes:
    """How rows go through a model."""

    model: torch.nn.Module
    weights: Weights
    mask: str
    plan: GradientPlan
    bar: tqdm


def _in_order(work: Callable, items: Iterable, threads: int) -> Iterator:
    """The outcome of each item, in order. With threads, that many items are worked on at a time, each by one
    thread, so that outcomes do not depend on how many there are."""
    if not threads:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:  # one more than are worked on, so that no thread waits for the caller
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fold_sums(passes: _Passes, examples: Sequence[Example], folds: int) -> tuple[Sums, np.ndarray]:
    """The mean gradients of folds, and the gradients in the gates of all rows, float64 [l, H, N].

    The host waits for the device at the end of a fold only, and where transformers looks whether a row of a
    pass is padded.
    """
    model, weights, plan = passes.model, passes.weights, passes.plan
    own = local() if plan.threads else SimpleNamespace()  # layers computed again may be so by another thread
    batches = []
    for fold in range(folds):
        members = np.arange(fold, len(examples), folds)
        batches += [
            (fold, members[batch]) for batch in by_tokens([examples[row] for row in members], plan.tokens)
        ]

    def differentiate(batch: tuple[int, np.ndarray]) -> tuple:
        return *batch, *_differentiate(model, [examples[row] for row in batch[1]], weights, own)

    sums: Sums = []
    rows, found = [], []
    with prepared(model, plan), wanted(weights), gated(model, own, weights, passes.mask):
        for _, done in groupby(_in_order(differentiate, batches, plan.threads), key=itemgetter(0)):
            mean = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()]
            for _, members, of_weights, of_gates in done:
                for total, gradient in zip(mean, of_weights, strict=True):
                    total.add_(gradient, alpha=folds / len(examples))
                rows.append(members)
                found.append(of_gates)
                del of_weights, gradient  # before the next pass
                passes.bar.update(len(members))
            sums.append(mean if plan.sums_on_device else [of_layer.cpu() for of_layer in mean])
            del mean  # before that of the next fold
    order = np.argsort(np.concatenate(rows))
    return sums, torch.cat(found, dim=2).cpu().numpy()[:, :, order]


def _gram(sums: Sums, weights: Weights, heads: int) -> np.ndarray:
    """float64 [l, H, F, F]: inner products of the folds' gradients of each head, a layer at a time on its
    device."""
    grams = []
    for of_layer, weight in zip(zip(*sums, strict=True), weights.values(), strict=True):
        folds = torch.stack([own.to(weight.device) for own in of_layer])  # (F, H * D, E)
        each = folds.unflatten(1, (heads, -1)).flatten(2).transpose(0, 1).double()  # (H, F, D * E)
        grams.append((each @ each.transpose(1, 2)).cpu().numpy())
    return np.stack(grams)


def head_gradients(
    decoder: Decoder,
    safe: Sequence[Example],
    utils: Sequence[Sequence[Example]],
    folds: int,
    layers: Sequence[int],
    mask: str,
    adapter: Path | None = None,
) -> Iterator[HeadGradients]:
    """See Backend.map_gradients. A float32 model is differentiated in float64."""
    model, heads = decoder.model, decoder.shape.heads
    rows = [row for side in (safe, *utils) for row in side]
    with adapted(model, adapter), progress(total=len(rows), desc="gradients", unit="row") as bar:
        plan = make_plan(decoder, rows, folds, layers)
        bar.write(f"[torch] gradients: {plan}")
        weights = {layer: model.model.layers[layer].self_attn.q_proj.weight for layer in layers}
        passes = _Passes(model, weights, mask, plan, bar)
        own, of_safe = _fold_sums(passes, safe, folds)
        for util in utils:
            other, of_util = _fold_sums(passes, util, folds)
            gram = _gram(own + other, weights, heads)
            del other  # before those of the next map
            yield HeadGradients(gram, of_safe, of_util)
