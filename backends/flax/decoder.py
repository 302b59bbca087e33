"""The decoder in Flax NNX: one for Llama, Qwen2, Qwen3 and Mistral. Heads are an axis, layers are scanned.

Every layer's weights stand in one array with a leading axis L, and a loop over layers runs one compiled body
(compile time does not grow with depth) from any layer to any other. What changes from call to call is an
argument: which heads are kept (`keep`), LoRA, keys and values. Arithmetic follows transformers' modules
(norms, softmax and logits in float32).

Axes as in `backends.base`; n copies of a line (`attention.Layout`: R rows of T columns, the first P of which
stand once), each with another head ablated; G columns of a row whose outcome is wanted, or H / K; C columns
of a cache.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from backends.base import Shape
from backends.flax.attention import PRECISION, KeyValue, Layout, attend, attend_line, rotate, seen, turns

EVERY = 2**30
"""the window of a layer that attends to all tokens"""


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
    head_norms: bool
    """queries and keys of a head are normed before the rotary turn"""
    dtype: str
    fused: bool = False
    """attention by JAX's own function"""


class Adapter(NamedTuple):
    """A PEFT folder's content, float32: LoRA on W_q (`scale` is alpha / r), or gains of neurons (IA3)."""

    a: jax.Array | None = None
    """[L, r, E]"""
    b: jax.Array | None = None
    """[L, H, D, r]; zero where a head is frozen"""
    scale: jax.Array | None = None
    gains: jax.Array | None = None
    """[L, F], the factor of each neuron (a unit that W_down reads)"""


class At(NamedTuple):
    """Arguments of one layer (or, with a leading axis L, of all layers) beside its input."""

    weights: nnx.State
    window: jax.Array
    keep: jax.Array | None
    """[n, H]: 0 ablates a head of a copy or row"""
    a: jax.Array | None = None
    b: jax.Array | None = None
    gains: jax.Array | None = None
    """[F]"""
    put: tuple[jax.Array, jax.Array] | None = None
    """values [n, F] of the neurons at each row's first token, and rows bool [n] in which they are set"""


@partial(jax.tree_util.register_dataclass, data_fields=["keep"], meta_fields=["mask"])
@dataclass(frozen=True)
class Ablation:
    """Which heads are kept in each copy of a line, and what is zeroed of the others."""

    keep: jax.Array | None = None
    """[n, L, H]; None: all"""
    mask: str = "output"


CLEAN = Ablation()


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "lengths"], meta_fields=["layout"])
@dataclass(frozen=True)
class Padded:
    """Rows on the mesh."""

    ids: jax.Array
    """[R, T], right-padded"""
    lengths: jax.Array
    """[R]"""
    layout: Layout

    def ends(self, line: jax.Array) -> jax.Array:
        """Each row's last token: [n, line, …] -> [n, R, …]."""
        return self.layout.take(line, self.lengths[:, None] - 1)[:, :, 0]


def wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
    def __init__(self, config: Config, *shape: int):
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones(shape, config.dtype))

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
        self.query_norm = RMSNorm(config, layers, dim) if config.head_norms else None
        self.key_norm = RMSNorm(config, layers, dim) if config.head_norms else None


class MLP(nnx.Module):
    def __init__(self, config: Config):
        size, dtype = config.shape, config.dtype
        wide = (size.layers, size.mlp_dim) if config.mlp_bias else None
        narrow = (size.layers, size.model_dim) if config.mlp_bias else None
        into = (size.layers, size.model_dim, size.mlp_dim)
        self.gate = Projection("...e,em->...m", into, wide, dtype)
        self.up = Projection("...e,em->...m", into, wide, dtype)
        self.down = Projection("...m,me->...e", (size.layers, size.mlp_dim, size.model_dim), narrow, dtype)

    def neurons(self, x: jax.Array) -> jax.Array:
        """What W_down reads, [..., F]."""
        return nnx.silu(self.gate(x)) * self.up(x)


class Layer(nnx.Module):
    """All layers as constructed; one layer in the body of the loop."""

    def __init__(self, config: Config):
        self.attention, self.mlp = Attention(config), MLP(config)
        size = config.shape
        self.before_attention = RMSNorm(config, size.layers, size.model_dim)
        self.before_mlp = RMSNorm(config, size.layers, size.model_dim)

    def queries(self, x, turn, at: At, mask: str, scale) -> jax.Array:
        """[n, T, E] -> [n, T, H, D]."""
        x = self.before_attention(x)
        query = self.attention.query(x)
        if at.a is not None:
            low = jnp.einsum("...e,re->...r", wide(x), at.a, precision=PRECISION)
            added = jnp.einsum("...r,hdr->...hd", low, at.b, precision=PRECISION) * scale
            query = (query + added).astype(query.dtype)
        if self.attention.query_norm is not None:
            query = self.attention.query_norm(query)
        if at.keep is not None and mask == "query":
            query = query * at.keep[:, None, :, None].astype(query.dtype)
        return rotate(query, turn)

    def key_values(self, x, turn) -> KeyValue:
        """[n, T, E] -> [n, T, K, D] each."""
        x = self.before_attention(x)
        key = self.attention.key(x)
        if self.attention.key_norm is not None:
            key = self.attention.key_norm(key)
        return KeyValue(rotate(key, turn), self.attention.value(x))

    def attended(self, x, heads, at: At, mask: str) -> jax.Array:
        """The stream [n, T, E] between attention and MLP, from the layer's input and what its heads read,
        [n, T, H, D]."""
        if at.keep is not None and mask == "output":
            heads = heads * at.keep[:, None, :, None].astype(heads.dtype)
        return x + self.attention.output(heads)

    def finish(self, x, heads, at: At, mask: str) -> jax.Array:
        """The layer's output [n, T, E]."""
        x = self.attended(x, heads, at, mask)
        neurons = self.mlp.neurons(self.before_mlp(x))
        if at.gains is not None:
            neurons = (wide(neurons) * at.gains).astype(neurons.dtype)
        if at.put is not None:
            values, rows = at.put
            neurons = neurons.at[:, 0].set(jnp.where(rows[:, None], values, neurons[:, 0]))
        return x + self.mlp.down(neurons)


class Decoder(nnx.Module):
    """The causal language model."""

    def __init__(self, config: Config):
        size = config.shape
        self.config = config
        self.embedding = nnx.Param(jnp.zeros((size.vocab, size.model_dim), config.dtype))
        self.layers = Layer(config)
        self.norm = RMSNorm(config, size.model_dim)
        self.head = None if config.tied else nnx.Param(jnp.zeros((size.vocab, size.model_dim), config.dtype))

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]

    def line(self, padded: Padded) -> jax.Array:
        """The residual stream of rows before layer 0, [1, line, E]."""
        return self.embed(padded.layout.join(padded.ids))[None]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] from the last layer's residual stream, never rounded to half precision."""
        matrix, hidden = (self.embedding if self.head is None else self.head)[...], self.norm(hidden)
        return jnp.einsum(
            "...e,ve->...v",
            hidden,
            matrix,
            precision=PRECISION,
            preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
        )

    def stacked(
        self, keep: jax.Array | None = None, adapter: Adapter | None = None
    ) -> tuple[nnx.GraphDef, At]:
        """One layer's structure, and the arguments of all layers, each array with a leading axis L."""
        graph, weights = nnx.split(self.layers)
        each = None if keep is None else jnp.moveaxis(keep, 1, 0)  # (L, n, H)
        a, b, _, gains = adapter or Adapter()
        return graph, At(weights, jnp.array(self.config.windows), each, a, b, gains)

    def climb(
        self,
        hidden: jax.Array,
        start: jax.Array,
        stop: jax.Array,
        layout: Layout,
        ablation: Ablation = CLEAN,
        adapter: Adapter | None = None,
        caches: KeyValue | None = None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Layers start..stop-1 (traced) for copies of a line, each with its own heads ablated.

        Args:
            hidden: residual stream before layer `start`, [n, line, E].
            caches: keys and values [L, n, R, K, C, D], whose first T columns are filled in from `start` on.

        Returns the residual stream before layer `stop`, and the caches.
        """

        graph, stacked = self.stacked(ablation.keep, adapter)
        scale = None if adapter is None else adapter.scale
        turn = turns(layout.positions, self.config.frequencies)

        def body(index, carry):
            hidden, caches = carry
            at = at_layer(stacked, index)
            layer: Layer = nnx.merge(graph, at.weights)
            query, own = layer.queries(hidden, turn, at, ablation.mask, scale), layer.key_values(hidden, turn)
            heads, known = attend_line(query, own, layout, at.window, self.config.fused)
            return layer.finish(hidden, heads, at, ablation.mask), with_layer(caches, index, known)

        return jax.lax.fori_loop(start, stop, body, (hidden, caches))

    def last(self, padded: Padded, ablation: Ablation, adapter: Adapter | None) -> jax.Array:
        """The last layer's residual stream, [n, line, E]."""
        line = self.line(padded)
        if ablation.keep is not None:
            line = jnp.broadcast_to(line, (len(ablation.keep), *line.shape[1:]))
        return self.climb(line, 0, self.config.shape.layers, padded.layout, ablation, adapter)[0]

    def step(
        self,
        tokens: jax.Array,
        number: jax.Array,
        padded: Padded,
        caches: KeyValue,
        ablation: Ablation = CLEAN,
        adapter: Adapter | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """All layers for one further token of each row, [n, R] -> [n, R, E].

        Args:
            number: of the token in its response; its column is T + number, its position lengths + number.
            padded: the prompts.
            caches: [L, n, R, K, C, D]; returned with this token in them.
        """
        lengths, width = padded.lengths, padded.layout.width
        columns, position = jnp.arange(caches.keys.shape[-2]), lengths + number
        there = (columns >= width) | (columns < lengths[:, None])
        positions = jnp.where(columns >= width, lengths[:, None] + columns - width, columns)  # (R, C)
        apart = jnp.where(there, position[:, None] - positions, -1)

        graph, stacked = self.stacked(ablation.keep, adapter)
        scale = None if adapter is None else adapter.scale
        turn, column = turns(position, self.config.frequencies), width + number

        def body(hidden, each):
            at, known = each  # the layer's keys and values, [n, R, K, C, D]
            layer: Layer = nnx.merge(graph, at.weights)
            query, own = layer.queries(hidden, turn, at, ablation.mask, scale), layer.key_values(hidden, turn)
            own = KeyValue(*(part[:, :, :, None] for part in own))  # (n, R, K, 1, D)
            visible = seen(apart, at.window)[:, None]  # (R, 1, C)
            heads = attend(query[:, :, None], filled(known, own, column), visible, self.config.fused)
            return layer.finish(hidden, heads[:, :, 0], at, ablation.mask), own

        # The caches of all layers are written once, behind the loop: inside it, where they are read too, XLA
        # copied the whole of them in every layer.
        hidden, new = jax.lax.scan(body, self.embed(tokens), (stacked, caches))
        return hidden, filled(caches, new, column)

    def forward(
        self,
        ids: jax.Array,
        adapter: Adapter | None = None,
        recompute: bool = False,
        keep: jax.Array | None = None,
        mask: str = "output",
    ) -> jax.Array:
        """Last layer's residual stream [B, T, E] of right-padded ids [B, T]; can be differentiated.

        Args:
            recompute: keep only each layer's input for the backward pass, where memory is short.
            keep: [B, L, H], the gate of each head.
        """
        graph, stacked = self.stacked(keep, adapter)
        scale, layout = None if adapter is None else adapter.scale, Layout(0, 1, ids.shape[1])
        turn = turns(layout.positions, self.config.frequencies)

        def body(x, at: At):
            layer: Layer = nnx.merge(graph, at.weights)
            query, own = layer.queries(x, turn, at, mask, scale), layer.key_values(x, turn)
            heads, _ = attend_line(query, own, layout, at.window, self.config.fused)
            return layer.finish(x, heads, at, mask), None

        step = jax.checkpoint(body) if recompute else body
        return jax.lax.scan(step, self.embed(ids), stacked)[0]


def at_layer(stacked, index):
    return jax.tree.map(lambda whole: jax.lax.dynamic_index_in_dim(whole, index, 0, False), stacked)


def with_layer(caches: KeyValue | None, index: jax.Array, known: KeyValue) -> KeyValue | None:
    """Caches [L, …, C, D] with a layer's keys and values [..., T, D] in the first T columns; None stays
    None."""
    if caches is None:
        return None

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part[None], (index, *(0,) * (whole.ndim - 1)))

    return jax.tree.map(put, caches, known)


def filled(caches: KeyValue, new: KeyValue, column: jax.Array) -> KeyValue:
    """Caches [..., C, D] with further keys and values [..., t, D] from a column on."""
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, column, whole.ndim - 2),
        caches,
        new,
    )
