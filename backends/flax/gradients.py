"""Gradients of single heads: in their rows of W_q, and in their gates, from one forward pass a row."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Example, HeadGradients
from backends.core.packing import by_tokens
from backends.core.progress import progress
from backends.flax import adapter as adapters
from backends.flax.decoder import Adapter, Decoder
from backends.flax.loglikelihood import Batch, log_likelihood, make_batch
from backends.flax.loss import TOKENS_CPU, TOKENS_DEVICE, recomputes, row_losses, target_logits
from backends.flax.model import Model


@partial(jax.jit, static_argnames=("graph", "mask", "compete", "recompute"))
def differentiate(
    graph,
    weights,
    batch: Batch,
    layers,
    mask: str,
    compete: bool,
    recompute: bool,
    adapter: Adapter | None = None,
):
    """Gradients of the sum of losses in W_q of some layers, float32 [l, E, H, D], and of each row's
    log-likelihood in its gates, [R, l, H].

    Args:
        compete: choices do in some row, where the outcome is another function than the loss.
    """
    if weights["embedding"][...].dtype == jnp.float32:
        weights, adapter = jax.tree.map(lambda each: each.astype(jnp.float64), (weights, adapter))

    def sums(kernel: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of losses, and of log-likelihoods."""
        decoder: Decoder = nnx.merge(graph, weights)
        decoder.layers.attention.query.kernel = nnx.Param(kernel)
        hidden = decoder.forward(batch.rows.ids, adapter, recompute, gates, mask)
        logits = target_logits(decoder, hidden, batch.rows)
        return row_losses(logits, batch.rows).sum(), log_likelihood(logits, batch).sum()

    decoder: Decoder = nnx.merge(graph, weights)
    kernel, size = decoder.layers.attention.query.kernel[...], decoder.config.shape
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    gates = jnp.ones((len(batch.rows.ids), size.layers, size.heads), wide)
    (loss, outcome), backward = jax.vjp(sums, kernel, gates)
    of_kernel, of_gates = backward((jnp.ones_like(loss), jnp.zeros_like(outcome)))
    of_gates = backward((jnp.zeros_like(loss), jnp.ones_like(outcome)))[1] if compete else -of_gates
    return of_kernel[layers].astype(jnp.float32), of_gates[:, layers]


def head_gradients(
    model: Model,
    sides: tuple[Sequence[Example], Sequence[Example]],
    folds: int,
    layers: Sequence[int],
    mask: str,
    adapter: Path | None = None,
) -> HeadGradients:
    """See Backend.head_gradients. A float32 model is differentiated in float64."""
    shape, layers = model.config.shape, np.array(layers, np.int32)
    gradients = np.zeros((2 * folds, len(layers), shape.model_dim, shape.heads, shape.head_dim), np.float32)
    gates = [np.zeros((len(layers), shape.heads, len(examples))) for examples in sides]
    budget, loaded = model.limit(TOKENS_CPU, TOKENS_DEVICE), adapters.load(model, adapter)
    bar = progress(total=sum(map(len, sides)), desc="gradients", unit="row")
    for side, examples in enumerate(sides):
        for fold in range(folds):
            members = np.arange(fold, len(examples), folds)
            for some in by_tokens([examples[row] for row in members], budget):
                rows = [examples[row] for row in members[some]]
                batch = make_batch(model, rows)
                compete = any(len(row.choice_ids) for row in rows)
                recompute = recomputes(model, *batch.rows.ids.shape)
                with jax.enable_x64(model.config.dtype == "float32"):
                    found = model.apply(differentiate, batch, layers, mask, compete, recompute, loaded)
                of_kernel, of_gates = (np.asarray(part) for part in found)
                gradients[side * folds + fold] += of_kernel / len(members)
                gates[side][:, :, members[some]] = np.moveaxis(of_gates[: len(rows)], 0, -1)
                bar.update(len(rows))
    bar.close()
    gram = np.empty((len(layers), shape.heads, 2 * folds, 2 * folds))
    for at in range(len(layers)):
        each = gradients[:, at].transpose(2, 0, 1, 3).reshape(shape.heads, 2 * folds, -1)  # (H, 2F, E * D)
        each = each.astype(np.float64)
        gram[at] = each @ each.transpose(0, 2, 1)
    return HeadGradients(gram, *gates)
