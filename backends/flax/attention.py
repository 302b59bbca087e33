"""Attention and rotary embedding, and rows whose common beginning stands once.

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


class Layout(NamedTuple):
    """R right-padded rows of T columns, the first P of which are alike in all, as a line of P + R * (T - P)
    tokens in which those stand once."""

    prefix: int
    rows: int
    width: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.rows * (self.width - self.prefix)

    @property
    def positions(self) -> jax.Array:
        """Of the line's tokens in their rows."""
        own = jnp.arange(self.prefix, self.width)
        return jnp.concatenate([jnp.arange(self.prefix), jnp.tile(own, self.rows)])

    def join(self, rows: jax.Array) -> jax.Array:
        """[R, T] -> [P + R * (T - P)]."""
        return jnp.concatenate([rows[0, : self.prefix], rows[:, self.prefix :].ravel()])

    def split(self, line: jax.Array) -> jax.Array:
        """[n, P + R * (T - P), …] -> [n, R, T, …]."""
        before, own = line[:, : self.prefix], line[:, self.prefix :]
        own = own.reshape(len(line), self.rows, -1, *line.shape[2:])
        before = jnp.broadcast_to(before[:, None], (*own.shape[:2], *before.shape[1:]))
        return jnp.concatenate([before, own], axis=2)

    def take(self, line: jax.Array, columns: jax.Array) -> jax.Array:
        """The tokens of each row's columns [R, G]: [n, line, …] -> [n, R, G, …]."""
        before = jnp.arange(self.rows)[:, None] * (self.width - self.prefix)
        return line[:, jnp.where(columns < self.prefix, columns, before + columns)]


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


def seen(apart: jax.Array, window: jax.Array) -> jax.Array:
    """Whether a query sees a key that stands so many tokens before it."""
    return (apart >= 0) & (apart < window)


def attend(query: jax.Array, known: KeyValue, visible: jax.Array, fused: bool = False) -> jax.Array:
    """Attention of [..., M, H, D] over keys and values [..., K, C, D].

    Args:
        visible: bool, broadcastable to [..., M, C].
        fused: by JAX's own function, which accelerators have kernels for.
    """
    if fused:
        return _fused(query, known, visible)
    kv_heads, dim = known.keys.shape[-3], query.shape[-1]
    grouped = query.reshape(*query.shape[:-2], kv_heads, -1, dim)  # (..., M, K, G, D)
    at_least = jnp.promote_types(query.dtype, jnp.float32)
    shown = visible[..., None, :, None, :]  # (..., 1, M, 1, C)
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
    weights = jax.nn.softmax(jnp.where(shown, products * dim**-0.5, jnp.finfo(at_least).min), axis=-1)
    weights = weights.astype(query.dtype)
    if alone:
        values = known.values[..., None, None, :, :].astype(at_least)
        mixed = (weights[..., None] * values).sum(axis=-2)  # (..., K, 1, G, D)
        return jnp.moveaxis(mixed, -3, -4).astype(query.dtype).reshape(query.shape)
    mixed = jnp.einsum("...kmgc,...kcd->...mkgd", weights, known.values, precision=PRECISION)
    return mixed.reshape(query.shape)


def _fused(query: jax.Array, known: KeyValue, visible: jax.Array) -> jax.Array:
    batch = query.shape[:-3]
    keys, values = (jnp.broadcast_to(part, (*batch, *part.shape[-3:])) for part in known)
    mask = jnp.broadcast_to(visible, (*batch, query.shape[-3], keys.shape[-2]))
    query, keys, values, mask = (
        part.reshape(-1, *part.shape[len(batch) :]) for part in (query, keys, values, mask)
    )
    keys, values = (jnp.moveaxis(part, 1, 2) for part in (keys, values))  # (b, C, K, D)
    with jax.default_matmul_precision("highest"):
        found = jax.nn.dot_product_attention(query, keys, values, mask=mask[:, None])
    return found.reshape(*batch, *found.shape[1:])


def attend_line(
    query: jax.Array, own: KeyValue, layout: Layout, window: jax.Array, fused: bool
) -> tuple[jax.Array, KeyValue]:
    """Every token of a line on what stands before it in its row: [n, line, H, D], from queries of that shape
    and [n, line, K, D]; and the rows' keys and values, [n, R, K, T, D]."""
    prefix, columns, copies = layout.prefix, jnp.arange(layout.width), len(query)
    visible = seen(columns[:, None] - columns, window)
    known = by_head(KeyValue(*map(layout.split, own)))
    of_rows = query[:, prefix:].reshape(copies, layout.rows, -1, *query.shape[2:])
    heads = attend(of_rows, known, visible[prefix:], fused)  # (n, R, T - P, H, D)
    heads = heads.reshape(copies, -1, *query.shape[2:])
    if prefix:
        before = by_head(KeyValue(*(part[:, :prefix] for part in own)))
        first = attend(query[:, :prefix], before, visible[:prefix, :prefix], fused)
        heads = jnp.concatenate([first, heads], axis=1)
    return heads, known
