"""The decoder in Flax NNX: one for Llama, Qwen2 and Mistral. Heads are an axis, layers are scanned.

Every layer's weights stand in one array with a leading axis L, and a loop over layers runs one compiled body
(compile time does not grow with depth) from any layer to any other. What changes from call to call is an
argument: which heads speak (`keep`), LoRA, keys and values. Arithmetic follows transformers' modules step by
step (norms, softmax and logits in float32).

Axes as in `backends.base`; c copies of a batch (each with another head silenced), R rows, P tokens of the
shared prefix, S of the (right-padded) suffix, C columns of a decoding cache, G = H / K.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from backends.base import Shape

EVERY = 2**30
"""the window of a layer that attends to all tokens; the position of a column that holds none"""

# Exact products for float32 on GPU and TPU, which would otherwise round to TF32 or bfloat16.
PRECISION = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Config:
    """What is fixed of a model, hashable."""

    shape: Shape
    eps: float
    """of RMSNorm"""
    frequencies: tuple[float, ...]
    """rotary, radians a position, [D / 2]"""
    windows: tuple[int, ...]
    """tokens that each layer attends to, [L]; EVERY: all"""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    """the output matrix is the embedding"""
    dtype: str


class Lora(NamedTuple):
    """LoRA on W_q, float32. `scale` is alpha / r."""

    a: jax.Array
    """[L, r, E]"""
    b: jax.Array
    """[L, H, D, r]; zero where a head is frozen"""
    scale: jax.Array


class KeyValue(NamedTuple):
    """Keys and values, [..., K, T, D] each."""

    keys: jax.Array
    values: jax.Array


class At(NamedTuple):
    """What one layer (or, with a leading axis L, all layers) works with beside its input."""

    weights: nnx.State
    window: jax.Array
    keep: jax.Array | None
    """[c, H]: 0 silences a head of a copy, 1 does not"""
    a: jax.Array | None
    b: jax.Array | None


def wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
    def __init__(self, config: Config, *stack: int):
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones((*stack, config.shape.model_dim), config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * y.astype(x.dtype)


class Projection(nnx.Module):
    """A matrix with named axes, and perhaps a bias."""

    def __init__(self, equation: str, kernel: tuple[int, ...], bias: tuple[int, ...] | None, dtype: str):
        self.equation = equation
        self.kernel = nnx.Param(jnp.zeros(kernel, dtype))
        self.bias = None if bias is None else nnx.Param(jnp.zeros(bias, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum(self.equation, x, self.kernel[...], precision=PRECISION)
        return y if self.bias is None else y + self.bias[...]


class Attention(nnx.Module):
    def __init__(self, config: Config):
        size, dtype = config.shape, config.dtype
        layers, dim, model = size.layers, size.head_dim, size.model_dim

        def heads(count: int) -> Projection:
            bias = (layers, count, dim) if config.qkv_bias else None
            return Projection("...e,ehd->...hd", (layers, model, count, dim), bias, dtype)

        self.query, self.key, self.value = heads(size.heads), heads(size.kv_heads), heads(size.kv_heads)
        self.output = Projection(
            "...hd,hde->...e",
            (layers, size.heads, dim, model),
            (layers, model) if config.output_bias else None,
            dtype,
        )


class MLP(nnx.Module):
    def __init__(self, config: Config):
        size, dtype = config.shape, config.dtype
        wide = (size.layers, size.mlp_dim) if config.mlp_bias else None
        narrow = (size.layers, size.model_dim) if config.mlp_bias else None
        into = (size.layers, size.model_dim, size.mlp_dim)
        self.gate = Projection("...e,em->...m", into, wide, dtype)
        self.up = Projection("...e,em->...m", into, wide, dtype)
        self.down = Projection("...m,me->...e", (size.layers, size.mlp_dim, size.model_dim), narrow, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """All layers as it is made, one layer in the body of the loop."""

    def __init__(self, config: Config):
        self.attention, self.mlp = Attention(config), MLP(config)
        self.before_attention = RMSNorm(config, config.shape.layers)
        self.before_mlp = RMSNorm(config, config.shape.layers)

    def project(self, x, turn, at: At, mask: str, scale) -> tuple[jax.Array, KeyValue]:
        """x [c, R, T, E] -> queries [c, R, T, H, D] and keys and values [c, R, K, T, D]."""
        x = self.before_attention(x)
        query = self.attention.query(x)
        if at.a is not None:
            low = jnp.einsum("...e,re->...r", x.astype(jnp.float32), at.a, precision=PRECISION)
            added = jnp.einsum("...r,hdr->...hd", low, at.b, precision=PRECISION) * scale
            query = (query + added).astype(query.dtype)
        if at.keep is not None and mask == "query":
            query = query * at.keep[:, None, None, :, None].astype(query.dtype)
        key, value = rotate(self.attention.key(x), turn), self.attention.value(x)
        return rotate(query, turn), KeyValue(jnp.moveaxis(key, -2, -3), jnp.moveaxis(value, -2, -3))

    def finish(self, x, query, own, visible, at: At, mask: str, shared=None, shared_visible=None):
        """The layer's output [c, R, T, E] from its input, its queries and what they may see."""
        heads = attend(query, own, visible, shared, shared_visible)
        if at.keep is not None and mask == "output":
            heads = heads * at.keep[:, None, None, :, None].astype(heads.dtype)
        x = x + self.attention.output(heads)
        return x + self.mlp(self.before_mlp(x))


def turns(positions: jax.Array, frequencies: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """Rotary cos and sin, float32 [..., T, 1, D / 2] for positions [..., T]."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.array(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of [..., T, heads, D], halves rotated against each other (transformers' layout)."""
    cos, sin = (part.astype(x.dtype) for part in turn)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query, own: KeyValue, visible, shared: KeyValue | None, shared_visible) -> jax.Array:
    """Attention of [c, R, T, H, D] over a row's own keys and those that all rows of a copy share.

    Args:
        own: [c, R, K, S, D]; visible: bool, broadcastable to [c, R, T, S].
        shared: [c, K, P, D]; shared_visible: bool [T, P].
    """
    copies, rows, length, heads, dim = query.shape
    kv_heads = own.keys.shape[2]
    grouped = query.reshape(copies, rows, length, kv_heads, heads // kv_heads, dim)  # (c, R, T, K, G, D)
    at_least = jnp.promote_types(query.dtype, jnp.float32)
    lowest = jnp.finfo(at_least).min

    def scores(equation: str, keys: jax.Array, seen: jax.Array) -> jax.Array:
        products = jnp.einsum(equation, grouped, keys, precision=PRECISION, preferred_element_type=at_least)
        return jnp.where(seen, products * dim**-0.5, lowest)

    found = scores("crtkgd,crksd->crktgs", own.keys, visible[:, :, None, :, None])
    if shared is None:
        weights = jax.nn.softmax(found, axis=-1).astype(query.dtype)
        mixed = jnp.einsum("crktgs,crksd->crtkgd", weights, own.values, precision=PRECISION)
        return mixed.reshape(query.shape)
    before = scores("crtkgd,ckpd->crktgp", shared.keys, shared_visible[:, None])
    together = jnp.concatenate([before, found], axis=-1)  # (c, R, K, T, G, P + S)
    weights = jax.nn.softmax(together, axis=-1).astype(query.dtype)
    width = before.shape[-1]
    mixed = sum(
        jnp.einsum(equation, part, values, precision=PRECISION, preferred_element_type=at_least)
        for equation, part, values in (
            ("crktgp,ckpd->crtkgd", weights[..., :width], shared.values),
            ("crktgs,crksd->crtkgd", weights[..., width:], own.values),
        )
    )
    return mixed.astype(query.dtype).reshape(query.shape)


class Decoder(nnx.Module):
    """The causal language model."""

    def __init__(self, config: Config):
        size = config.shape
        self.config = config
        self.embedding = nnx.Param(jnp.zeros((size.vocab, size.model_dim), config.dtype))
        self.layers = Layer(config)
        self.norm = RMSNorm(config)
        self.head = None if config.tied else nnx.Param(jnp.zeros((size.vocab, size.model_dim), config.dtype))

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]

    def logits(self, hidden: jax.Array, vocabulary: jax.Array | None = None) -> jax.Array:
        """float32 [..., V] from the last layer's residual stream, or [..., n] for the n tokens of
        `vocabulary`."""
        matrix = (self.embedding if self.head is None else self.head)[...]
        matrix = matrix if vocabulary is None else matrix[vocabulary]
        return wide(jnp.einsum("...e,ve->...v", self.norm(hidden), matrix, precision=PRECISION))

    def _stacked(self, keep: jax.Array | None, lora: Lora | None) -> tuple[nnx.GraphDef, At]:
        graph, weights = nnx.split(self.layers)
        each = None if keep is None else jnp.moveaxis(keep, 1, 0)  # (L, c, H)
        a, b = (None, None) if lora is None else (lora.a, lora.b)
        return graph, At(weights, jnp.array(self.config.windows), each, a, b)

    def run(
        self,
        prefix: jax.Array,
        suffix: jax.Array,
        start: jax.Array,
        stop: jax.Array,
        keep: jax.Array | None = None,
        mask: str = "output",
        lora: Lora | None = None,
        caches: tuple[KeyValue, KeyValue] | None = None,
    ):
        """Layers start..stop-1 (traced) for copies of a batch, each copy with its own heads silenced.

        Args:
            prefix: residual stream of the shared prefix before layer `start`, [c, 1, P, E].
            suffix: that of the rows, [c, R, S, E].
            keep: [c, L, H], 0 where a head is silenced; None: none is.
            caches: keys and values of prefix [L, c, K, P, D] and suffix [L, c, R, K, S, D], filled in from
                `start` on.

        Returns the residual streams after layer stop-1, and the caches.
        """
        width, length = prefix.shape[2], suffix.shape[2]
        columns = jnp.arange(width + length)
        apart = columns[:, None] - columns[None, :]  # query minus key position
        turn = turns(columns, self.config.frequencies)
        turn_prefix, turn_suffix = ([part[at] for part in turn] for at in (slice(width), slice(width, None)))
        scale = None if lora is None else lora.scale
        graph, stacked = self._stacked(keep, lora)

        def body(index, carry):
            prefix, suffix, caches = carry
            at = jax.tree.map(lambda whole: jax.lax.dynamic_index_in_dim(whole, index, 0, False), stacked)
            layer: Layer = nnx.merge(graph, at.weights)
            # Padding stands after a row's own tokens, so causality alone hides it from them.
            seen = (apart >= 0) & (apart < at.window)
            shared = None
            if width:
                query, own = layer.project(prefix, turn_prefix, at, mask, scale)
                prefix = layer.finish(prefix, query, own, seen[None, None, :width, :width], at, mask)
                shared = KeyValue(own.keys[:, 0], own.values[:, 0])
            query, own = layer.project(suffix, turn_suffix, at, mask, scale)
            visible = seen[None, None, width:, width:]
            suffix = layer.finish(suffix, query, own, visible, at, mask, shared, seen[width:, :width])
            if caches is not None:
                kept = [own] if shared is None else [shared, own]
                written = [
                    jax.tree.map(lambda all_, new: all_.at[index].set(new), cache, new)
                    for cache, new in zip(caches[-len(kept) :], kept, strict=True)
                ]
                caches = (*caches[: -len(kept)], *written)
            return prefix, suffix, caches

        return jax.lax.fori_loop(start, stop, body, (prefix, suffix, caches))

    def forward(self, ids: jax.Array, lora: Lora | None = None, recompute: bool = False) -> jax.Array:
        """Last layer's residual stream [B, T, E] of right-padded ids [B, T]; can be differentiated.

        Args:
            recompute: keep only each layer's input for the backward pass, where memory is short.
        """
        columns = jnp.arange(ids.shape[1])
        apart = columns[:, None] - columns[None, :]
        turn = turns(columns, self.config.frequencies)
        scale = None if lora is None else lora.scale
        graph, stacked = self._stacked(None, lora)

        def body(x, at: At):
            layer: Layer = nnx.merge(graph, at.weights)
            visible = ((apart >= 0) & (apart < at.window))[None, None]
            query, own = layer.project(x, turn, at, "output", scale)
            return layer.finish(x, query, own, visible, at, "output"), None

        step = jax.checkpoint(body) if recompute else body
        return jax.lax.scan(step, self.embed(ids)[None], stacked)[0][0]

    def step(
        self,
        cache: KeyValue,
        column: jax.Array,
        key_position: jax.Array,
        tokens: jax.Array,
        position: jax.Array,
        keep: jax.Array | None,
        mask: str,
        lora: Lora | None,
    ) -> tuple[jax.Array, KeyValue]:
        """One token for each row: the last layer's residual stream [R, E], and the cache with it written.

        Args:
            cache: [L, R, K, C, D], written at `column`.
            key_position: position of the token in each column, [R, C], `column`'s included; EVERY: none.
            tokens: [R], at `position` [R].
            keep: [R, L, H].
        """
        turn = turns(position[:, None, None], self.config.frequencies)  # (R, 1, 1, 1, D / 2)
        apart = (position[:, None] - key_position)[:, None, None]  # (R, 1, 1, C)
        scale = None if lora is None else lora.scale
        graph, stacked = self._stacked(keep, lora)

        def body(index, carry):
            x, cache = carry
            at = jax.tree.map(lambda whole: jax.lax.dynamic_index_in_dim(whole, index, 0, False), stacked)
            layer: Layer = nnx.merge(graph, at.weights)
            query, new = layer.project(x, turn, at, mask, scale)
            place = (index, 0, 0, column, 0)
            cache = KeyValue(
                # new [R, 1, K, 1, D] into [L, R, K, C, D]
                *(
                    jax.lax.dynamic_update_slice(old, one[None, :, 0], place)
                    for old, one in zip(cache, new, strict=True)
                )
            )
            own = KeyValue(*(jax.lax.dynamic_index_in_dim(old, index, 0, False)[:, None] for old in cache))
            visible = (apart >= 0) & (apart < at.window)
            return layer.finish(x, query, own, visible, at, mask), cache

        hidden, cache = jax.lax.fori_loop(
            0, self.config.shape.layers, body, (self.embed(tokens)[:, None, None], cache)
        )
        return hidden[:, 0, 0], cache
