"""The loss that gradients and tuning share."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backends.base import Example
from backends.core.packing import round_up, training_rows
from backends.flax.decoder import Adapter, Decoder
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
    shape = (filled, round_up(max(1, most), PLACES))
    ids = np.zeros((filled, width), np.int32)
    places, targets, share = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        ids[row, : len(sequence)] = sequence
        count = len(sequence) - start
        places[row, 0] = start - 1  # also of a row without a target
        places[row, :count] = np.arange(start - 1, len(sequence) - 1)
        targets[row, :count] = sequence[start:]
        share[row, :count] = 1 / (max(1, count) * of)
    return Rows(*(model.put(array, 0) for array in (ids, places, targets, share)))


def loss_of(decoder: Decoder, rows: Rows, adapter: Adapter | None, recompute: bool) -> jax.Array:
    """Sum over target tokens of share * cross-entropy."""
    logits = target_logits(decoder, decoder.forward(rows.ids, adapter, recompute), rows)
    return row_losses(logits, rows).sum()


def target_logits(decoder: Decoder, hidden: jax.Array, rows: Rows) -> jax.Array:
    """float32 [R, G, V] from the last residual stream [R, T, E]: the output matrix sees only the places that
    predict a target."""
    return decoder.logits(jnp.take_along_axis(hidden, rows.places[..., None], axis=1))


def row_losses(logits: jax.Array, rows: Rows) -> jax.Array:
    """Each row's sum over target tokens of share * cross-entropy, [R]."""
    picked = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits, axis=-1) - picked) * rows.share).sum(axis=-1)


def recomputes(model: Model, rows: int, tokens: int) -> bool:
    """Whether the backward pass recomputes each layer: where what it would keep of a layer (about ten widths
    of the residual stream and three of the MLP) takes more than a quarter of a device's memory."""
    devices = model.mesh.devices.ravel()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    size, itemsize = model.config.shape, jnp.dtype(model.config.dtype).itemsize
    kept = size.layers * rows * tokens * (10 * size.model_dim + 3 * size.mlp_dim) * itemsize
    return memory is not None and kept / len(devices) > memory / 4
