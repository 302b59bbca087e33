"""The decoder in Flax NNX: one for Llama, Qwen2 and Mistral. Heads are an axis, layers are scanned.

Every layer's weights stand in one array with a leading axis L, and a loop over layers runs one compiled body
(compile time does not grow with depth) from any layer to any other. What changes from call to call is an
argument: which heads are kept (`keep`), LoRA, keys and values. Arithmetic follows transformers' modules
(norms, softmax and logits in float32).

Axes as in `backends.base`; n copies of a line (each with another head ablated) or rows, R prompts, P tokens
of the prefix that all share, C of the longest prompt, or columns of a cache, G = H / K.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from backends.base import Shape
from backends.flax.attention import (
    PRECISION,
    KeyValue,
    Line,
    attend,
    attend_last,
    attend_line,
    by_head,
    rotate,
    turns,
)

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
    dtype: str


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

    def neurons(self, x: jax.Array) -> jax.Array:
        """What W_down reads, [..., F]."""
        return nnx.silu(self.gate(x)) * self.up(x)


class Layer(nnx.Module):
    """All layers as constructed; one layer in the body of the loop."""

    def __init__(self, config: Config):
        self.attention, self.mlp = Attention(config), MLP(config)
        self.before_attention = RMSNorm(config, config.shape.layers)
        self.before_mlp = RMSNorm(config, config.shape.layers)

    def queries(self, x, turn, at: At, mask: str, scale) -> jax.Array:
        """[n, T, E] -> [n, T, H, D]."""
        x = self.before_attention(x)
        query = self.attention.query(x)
        if at.a is not None:
            low = jnp.einsum("...e,re->...r", wide(x), at.a, precision=PRECISION)
            added = jnp.einsum("...r,hdr->...hd", low, at.b, precision=PRECISION) * scale
            query = (query + added).astype(query.dtype)
        if at.keep is not None and mask == "query":
            query = query * at.keep[:, None, :, None].astype(query.dtype)
        return rotate(query, turn)

    def key_values(self, x, turn) -> KeyValue:
        """[n, T, E] -> [n, T, K, D] each."""
        x = self.before_attention(x)
        return KeyValue(rotate(self.attention.key(x), turn), self.attention.value(x))

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

    def stacked(
        self, keep: jax.Array | None = None, adapter: Adapter | None = None
    ) -> tuple[nnx.GraphDef, At]:
        """One layer's structure, and the arguments of all layers, each array with a leading axis L."""
        graph, weights = nnx.split(self.layers)
        each = None if keep is None else jnp.moveaxis(keep, 1, 0)  # (L, n, H)
        a, b, _, gains = adapter or Adapter()
        return graph, At(weights, jnp.array(self.config.windows), each, a, b, gains)

    def _at(self, stacked: At, index) -> At:
        return jax.tree.map(lambda whole: jax.lax.dynamic_index_in_dim(whole, index, 0, False), stacked)

    def run(
        self,
        hidden: jax.Array,
        line: Line,
        start: jax.Array,
        stop: jax.Array,
        keep: jax.Array | None = None,
        mask: str = "output",
        adapter: Adapter | None = None,
        caches: KeyValue | None = None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Layers start..stop-1 (traced) for copies of a line, each with its own heads ablated.

        Args:
            hidden: residual stream before layer `start`, [n, T, E].
            keep: [n, L, H], 0 where a head is ablated; None: none is.
            caches: keys and values, [L, n, T, K, D], filled in from `start` on.

        Returns the residual stream after layer stop-1, and the caches.
        """
        turn = turns(line.positions, self.config.frequencies)
        scale = None if adapter is None else adapter.scale
        graph, stacked = self.stacked(keep, adapter)

        def body(index, carry):
            hidden, caches = carry
            at = self._at(stacked, index)
            layer: Layer = nnx.merge(graph, at.weights)
            own = layer.key_values(hidden, turn)
            if caches is not None:
                caches = jax.tree.map(lambda whole, new: whole.at[index].set(new), caches, own)
            heads = attend_line(layer.queries(hidden, turn, at, mask, scale), own, line, at.window)
            return layer.finish(hidden, heads, at, mask), caches

        return jax.lax.fori_loop(start, stop, body, (hidden, caches))

    def end(
        self,
        hidden: jax.Array,
        line: Line,
        start: jax.Array,
        keep: jax.Array | None = None,
        mask: str = "output",
        adapter: Adapter | None = None,
        caches: KeyValue | None = None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """As `run` to the model's end: the last layer's residual stream of the prompts' last tokens only,
        [n, R, E]."""
        final = self.config.shape.layers - 1
        hidden, caches = self.run(hidden, line, start, final, keep, mask, adapter, caches)
        turn = turns(line.positions, self.config.frequencies)
        graph, stacked = self.stacked(keep, adapter)
        at = jax.tree.map(lambda whole: whole[final], stacked)
        layer: Layer = nnx.merge(graph, at.weights)
        own = layer.key_values(hidden, turn)
        if caches is not None:
            caches = jax.tree.map(lambda whole, new: whole.at[final].set(new), caches, own)
        last = line.columns[:, -1]
        hidden, turn = hidden[:, last], tuple(part[last] for part in turn)
        query = layer.queries(hidden, turn, at, mask, None if adapter is None else adapter.scale)
        return layer.finish(hidden, attend_last(query, own, line, at.window), at, mask), caches

    def extend(
        self,
        hidden: jax.Array,
        cache: KeyValue,
        positions: jax.Array,
        start: jax.Array,
        stop: jax.Array,
        keep: jax.Array | None = None,
        mask: str = "output",
        adapter: Adapter | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Layers start..stop-1 (traced) for w further tokens of each row, [n, w, E] at positions [n, w].

        Args:
            cache: [L, n, K, C, D], a token's column being its position; returned with these tokens in it.
            keep: [n, L, H].
        """
        turn = turns(positions, self.config.frequencies)
        rows = jnp.arange(len(hidden))[:, None]
        apart = positions[..., None] - jnp.arange(cache.keys.shape[-2])  # (n, w, C)
        scale = None if adapter is None else adapter.scale
        graph, stacked = self.stacked(keep, adapter)

        def body(index, carry):
            hidden, cache = carry
            at = self._at(stacked, index)
            layer: Layer = nnx.merge(graph, at.weights)
            new = layer.key_values(hidden, turn)  # (n, w, K, D)
            cache = jax.tree.map(lambda whole, own: whole.at[index, rows, :, positions].set(own), cache, new)
            known = jax.tree.map(lambda whole: jax.lax.dynamic_index_in_dim(whole, index, 0, False), cache)
            query = layer.queries(hidden, turn, at, mask, scale)
            heads = attend(query, known, (apart >= 0) & (apart < at.window))
            return layer.finish(hidden, heads, at, mask), cache

        return jax.lax.fori_loop(start, stop, body, (hidden, cache))

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
        layer = self._padded_layer(graph, ids.shape[1], adapter, mask)

        def body(x, at: At):
            return layer(x, at), None

        step = jax.checkpoint(body) if recompute else body
        return jax.lax.scan(step, self.embed(ids), stacked)[0]

    def climb(
        self, hidden: jax.Array, start: jax.Array, stop: jax.Array, keep: jax.Array | None, mask: str
    ) -> jax.Array:
        """Layers start..stop-1 (traced) for the residual stream [B, T, E] of right-padded rows."""
        graph, stacked = self.stacked(keep)
        layer = self._padded_layer(graph, hidden.shape[1], None, mask)
        return jax.lax.fori_loop(start, stop, lambda index, x: layer(x, self._at(stacked, index)), hidden)

    def _padded_layer(self, graph, width: int, adapter: Adapter | None, mask: str):
        """(x, At) -> x, a layer on right-padded rows of `width` tokens, [B, T, E]."""
        columns = jnp.arange(width)
        apart = columns[:, None] - columns[None, :]  # query minus key position
        turn = turns(columns, self.config.frequencies)
        scale = None if adapter is None else adapter.scale

        def apply(x: jax.Array, at: At) -> jax.Array:
            layer: Layer = nnx.merge(graph, at.weights)
            query, own = layer.queries(x, turn, at, mask, scale), by_head(layer.key_values(x, turn))
            heads = attend(query, own, (apart >= 0) & (apart < at.window))
            return layer.finish(x, heads, at, mask)

        return apply
