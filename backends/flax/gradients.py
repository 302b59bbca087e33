"""Gradients of single heads: in their rows of W_q, and in their gates, from one forward pass a row."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from backends.base import Example, HeadGradients
from backends.core.packing import by_tokens
from backends.core.progress import progress
from backends.flax import adapter as adapters
from backends.flax.decoder import Adapter, Decoder
from backends.flax.graded import Batch, grades, make_batch
from backends.flax.loss import TOKENS_CPU, TOKENS_DEVICE, recomputes, row_losses, target_logits
from backends.flax.model import Model


class _Passes(NamedTuple):
    """What all passes have in common."""

    model: Model
    adapter: Adapter | None
    layers: np.ndarray
    mask: str
    bar: tqdm


@partial(jax.jit, static_argnames=("graph", "mask", "other", "recompute"))
def differentiate(graph, weights, batch: Batch, adapter, layers, mask: str, other: bool, recompute: bool):
    """Gradients of the sum of losses in W_q of some layers, float32 [l, E, H, D], and of each row's
    graded outcome in its gates, [R, l, H].

    Args:
        other: some row's outcome is another function than its loss.
    """
    if weights["embedding"][...].dtype == jnp.float32:
        weights, adapter = jax.tree.map(lambda each: each.astype(jnp.float64), (weights, adapter))

    def sums(kernel: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of losses, and of graded outcomes."""
        decoder: Decoder = nnx.merge(graph, weights)
        decoder.layers.attention.query.kernel = nnx.Param(kernel)
        hidden = decoder.forward(batch.rows.ids, adapter, recompute, gates, mask)
        logits = target_logits(decoder, hidden, batch.rows)
        return row_losses(logits, batch.rows).sum(), grades(logits, batch).sum()

    decoder: Decoder = nnx.merge(graph, weights)
    kernel, size = decoder.layers.attention.query.kernel[...], decoder.config.shape
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    gates = jnp.ones((len(batch.rows.ids), size.layers, size.heads), wide)
    (loss, outcome), backward = jax.vjp(sums, kernel, gates)
    of_kernel, of_gates = backward((jnp.ones_like(loss), jnp.zeros_like(outcome)))
    of_gates = backward((jnp.zeros_like(loss), jnp.ones_like(outcome)))[1] if other else -of_gates
    return of_kernel[layers].astype(jnp.float32), of_gates[:, layers]


def _fold_sums(passes: _Passes, examples: Sequence[Example], folds: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean gradients of folds, float32 [F, l, E, H, D], and the gradients in the gates of all rows,
    float64 [l, H, N]."""
    model, adapter, layers, mask, bar = passes
    shape = model.config.shape
    sums = np.zeros((folds, len(layers), shape.model_dim, shape.heads, shape.head_dim), np.float32)
    gates = np.zeros((len(layers), shape.heads, len(examples)))
    budget = model.limit(TOKENS_CPU, TOKENS_DEVICE)
    for fold in range(folds):
        members = np.arange(fold, len(examples), folds)
        for some in by_tokens([examples[row] for row in members], budget):
            rows = [examples[row] for row in members[some]]
            batch = make_batch(model, rows)
            other = any(len(row.choice_ids) + len(row.refusal_ids) for row in rows)
            recompute = recomputes(model, *batch.rows.ids.shape)
            with jax.enable_x64(model.config.dtype == "float32"):
                found = model.apply(differentiate, batch, adapter, layers, mask, other, recompute)
            of_kernel, of_gates = (np.asarray(part) for part in found)
            sums[fold] += of_kernel / len(members)
            gates[:, :, members[some]] = np.moveaxis(of_gates[: len(rows)], 0, -1)
            bar.update(len(rows))
    return sums, gates


def _gram(safe: np.ndarray, util: np.ndarray) -> np.ndarray:
    """float64 [l, H, 2F, 2F]: inner products of the folds' gradients of each head, a layer at a time."""
    grams = []
    for layer in range(safe.shape[1]):
        folds = np.concatenate([safe[:, layer], util[:, layer]])  # (2F, E, H, D)
        each = folds.transpose(2, 0, 1, 3).reshape(folds.shape[2], len(folds), -1).astype(np.float64)
        grams.append(each @ each.transpose(0, 2, 1))
    return np.stack(grams)


def head_gradients(
    model: Model,
    safe: Sequence[Example],
    utils: Sequence[Sequence[Example]],
    folds: int,
    layers: Sequence[int],
    mask: str,
    adapter: Path | None = None,
) -> Iterator[HeadGradients]:
    """See Backend.map_gradients. A float32 model is differentiated in float64."""
    layers, loaded = np.array(layers, np.int32), adapters.load(model, adapter)
    with progress(total=sum(map(len, (safe, *utils))), desc="gradients", unit="row") as bar:
        passes = _Passes(model, loaded, layers, mask, bar)
        own, of_safe = _fold_sums(passes, safe, folds)
        for util in utils:
            other, of_util = _fold_sums(passes, util, folds)
            gram = _gram(own, other)
            del other  # before those of the next map
            yield HeadGradients(gram, of_safe, of_util)
