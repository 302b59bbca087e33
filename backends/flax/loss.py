"""The loss that gradients and tuning share, and the gradients of single heads."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Example
from backends.core.checks import check_folds
from backends.core.errors import InputError
from backends.core.packing import by_tokens, round_up, training_rows
from backends.core.progress import progress
from backends.flax.decoder import Adapter, Config, Decoder
from backends.flax.model import Model

# Padded tokens of one forward and backward pass, for each device of the data axis.
TOKENS_CPU, TOKENS_DEVICE = 1024, 8192
WIDTH, PLACES = 16, 8
"""row widths and target places are multiples of these, so that few programs are compiled"""


class Rows(NamedTuple):
    """Training rows on the mesh; R rows (some only fill the shape), T tokens, G target places."""

    ids: jax.Array
    """[R, T], right-padded"""
    places: jax.Array
    """column whose logits predict each target token, [R, G]"""
    targets: jax.Array
    """[R, G]"""
    share: jax.Array
    """of each target token in the loss, float32 [R, G]; 0 where there is none"""


def make_rows(model: Model, examples: Sequence[Example], filled: int, of: int) -> Rows:
    """Examples as arrays of `filled` rows, each weighing 1 / `of` in the loss, its tokens alike."""
    sequences, starts = training_rows(examples)
    width = round_up(max(map(len, sequences)), WIDTH)
    most = max(len(sequence) - start for sequence, start in zip(sequences, starts, strict=True))
    shape = (filled, round_up(most, PLACES))
    ids = np.zeros((filled, width), np.int32)
    places, targets, share = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        ids[row, : len(sequence)] = sequence
        count = len(sequence) - start
        places[row, :count] = np.arange(start - 1, len(sequence) - 1)
        targets[row, :count] = sequence[start:]
        share[row, :count] = 1 / (count * of)
    return Rows(*(model.put(array, 0) for array in (ids, places, targets, share)))


def loss_of(decoder: Decoder, rows: Rows, adapter: Adapter | None, recompute: bool) -> jax.Array:
    """Sum over target tokens of share * cross-entropy."""
    hidden = decoder.forward(rows.ids, adapter, recompute)
    # The output matrix sees only the places that predict a target.
    hidden = jnp.take_along_axis(hidden, rows.places[..., None], axis=1)  # (R, G, E)
    logits = decoder.logits(hidden)
    picked = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits, axis=-1) - picked) * rows.share).sum()


def recomputes(model: Model, rows: int, tokens: int) -> bool:
    """Whether the backward pass recomputes each layer: where what it would keep of a layer (about ten widths
    of the residual stream and three of the MLP) takes more than a quarter of a device's memory."""
    devices = model.mesh.devices.ravel()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    size, itemsize = model.config.shape, jnp.dtype(model.config.dtype).itemsize
    kept = size.layers * rows * tokens * (10 * size.model_dim + 3 * size.mlp_dim) * itemsize
    return memory is not None and kept / len(devices) > memory / 4


@partial(jax.jit, static_argnames=("graph", "recompute"))
def query_gradients(graph, weights, rows: Rows, layers, recompute: bool) -> jax.Array:
    """Gradient of the loss in W_q of some layers, float32 [l, E, H, D]."""

    if weights["embedding"][...].dtype == jnp.float32:
        weights = jax.tree.map(lambda weight: weight.astype(jnp.float64), weights)

    def loss(kernel: jax.Array) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, weights)
        decoder.layers.attention.query.kernel = nnx.Param(kernel)
        return loss_of(decoder, rows, None, recompute)

    kernel = nnx.merge(graph, weights).layers.attention.query.kernel[...]
    return jax.grad(loss)(kernel)[layers].astype(jnp.float32)


def gradient_gram(
    model: Model, safe: Sequence[Example], util: Sequence[Example], folds: int, layers: Sequence[int]
) -> np.ndarray:
    """See Backend.gradient_gram. A float32 model is differentiated in float64."""
    check_folds(folds, safe=safe, util=util)
    size: Config = model.config
    shape = size.shape
    layers = np.array(layers, np.int32)
    gradients = np.zeros((2 * folds, len(layers), shape.model_dim, shape.heads, shape.head_dim), np.float32)
    budget = model.limit(TOKENS_CPU, TOKENS_DEVICE)
    with progress(total=len(safe) + len(util), desc="gradients", unit="row") as bar:
        for kind, examples in enumerate((safe, util)):
            for fold in range(folds):
                members = examples[fold::folds]
                for batch in by_tokens(members, budget):
                    rows = make_rows(model, batch, model.rows(len(batch)), len(members))
                    recompute = recomputes(model, *rows.ids.shape)
                    with jax.enable_x64(model.config.dtype == "float32"):
                        new = model.apply(query_gradients, rows, layers, recompute)
                    gradients[kind * folds + fold] += np.asarray(new)
                    bar.update(len(batch))
    gram = np.empty((len(layers), shape.heads, 2 * folds, 2 * folds))
    for at in range(len(layers)):
        each = gradients[:, at].transpose(2, 0, 1, 3).reshape(shape.heads, 2 * folds, -1)  # (H, 2F, E * D)
        each = each.astype(np.float64)
        gram[at] = each @ each.transpose(0, 2, 1)
    if not np.isfinite(gram).all():
        at, head = np.argwhere(~np.isfinite(gram).all(axis=(2, 3)))[0]
        raise InputError(f"the gradient of head ({layers[at]}, {head}) is not finite: try --dtype float32")
    return gram
