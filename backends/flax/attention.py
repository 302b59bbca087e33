"""Attention and rotary embedding, on lines of prompts and on caches.

Axes as in `flax.decoder`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Exact products for float32 on GPU and TPU, which would otherwise round to TF32 or bfloat16.
PRECISION = jax.lax.Precision.HIGHEST


class KeyValue(NamedTuple):
    """Keys and values."""

    keys: jax.Array
    values: jax.Array


class Line(NamedTuple):
    """A `packing.Line` on the mesh: T tokens, R prompts of at most C."""

    ids: jax.Array
    """[T]"""
    positions: jax.Array
    """[T]"""
    columns: jax.Array
    """[R, C]"""
    lengths: jax.Array
    """[R]"""
    picks: jax.Array
    """[T - P]"""

    @property
    def prefix(self) -> int:
        return len(self.ids) - len(self.picks)


def turns(positions: jax.Array, frequencies: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """Rotary cos and sin, float32 [..., T, 1, D / 2] for positions [..., T]."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.array(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of [..., T, heads, D], halves rotated against each other (transformers' layout)."""
    cos, sin = (part.astype(x.dtype) for part in turn)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def by_head(own: KeyValue) -> KeyValue:
    """[..., T, K, D] -> [..., K, T, D]."""
    return KeyValue(*(jnp.moveaxis(part, -2, -3) for part in own))


def attend(query: jax.Array, known: KeyValue, visible: jax.Array) -> jax.Array:
    """Attention of [..., M, H, D] over keys and values [..., K, C, D]; visible: bool, broadcastable to
    [..., M, C]."""
    kv_heads, dim = known.keys.shape[-3], query.shape[-1]
    grouped = query.reshape(*query.shape[:-2], kv_heads, -1, dim)  # (..., M, K, G, D)
    at_least = jnp.promote_types(query.dtype, jnp.float32)
    seen = visible[..., None, :, None, :]  # (..., 1, M, 1, C)
    # A single query reads each key once. XLA fuses these sums; its products of matrices so thin took a
    # quarter of a decoding step on a CPU.
    alone = query.shape[-3] == 1
    if alone:
        each = jnp.moveaxis(grouped, -4, -3).astype(at_least)[..., None, :]  # (..., K, 1, G, 1, D)
        products = (each * known.keys[..., None, None, :, :]).sum(axis=-1)  # (..., K, 1, G, C)
    else:
        products = jnp.einsum(
            "...mkgd,...kcd->...kmgc",
            grouped,
            known.keys,
            precision=PRECISION,
            preferred_element_type=at_least,
        )
    weights = jax.nn.softmax(jnp.where(seen, products * dim**-0.5, jnp.finfo(at_least).min), axis=-1)
    weights = weights.astype(query.dtype)
    if alone:
        values = known.values[..., None, None, :, :].astype(at_least)
        mixed = (weights[..., None] * values).sum(axis=-2)  # (..., K, 1, G, D)
        return jnp.moveaxis(mixed, -3, -4).astype(query.dtype).reshape(query.shape)
    mixed = jnp.einsum("...kmgc,...kcd->...mkgd", weights, known.values, precision=PRECISION)
    return mixed.reshape(query.shape)


def attend_line(query: jax.Array, own: KeyValue, line: Line, window: jax.Array) -> jax.Array:
    """Every token of a line on what stands before it in its own prompt: [n, T, H, D] on [n, T, K, D]."""
    prefix = line.prefix
    at = jnp.arange(line.columns.shape[1])
    apart = at[:, None] - at  # query minus key position
    seen = (apart >= 0) & (apart < window)
    # Each prompt's own, [n, R, C, …]; shared tokens are answered more than once and picked once.
    known = by_head(KeyValue(*(part[:, line.columns] for part in own)))
    found = attend(query[:, line.columns[:, prefix:]], known, seen[prefix:])
    found = found.reshape(len(query), -1, *query.shape[2:])[:, line.picks]  # (n, T - P, H, D)
    if not prefix:
        return found
    before = by_head(KeyValue(*(part[:, :prefix] for part in own)))
    first = attend(query[:, :prefix], before, seen[:prefix, :prefix])
    return jnp.concatenate([first, found], axis=1)


def attend_last(query: jax.Array, own: KeyValue, line: Line, window: jax.Array) -> jax.Array:
    """The prompts' last tokens on their prompts: [n, R, H, D] on [n, T, K, D]."""
    apart = (line.lengths - 1)[:, None] - jnp.arange(line.columns.shape[1])  # (R, C)
    known = by_head(KeyValue(*(part[:, line.columns] for part in own)))
    return attend(query[:, :, None], known, ((apart >= 0) & (apart < window))[:, None])[:, :, 0]
