"""A loaded model, batches of prompts on its mesh, and passes of the clean model over them.

Programs are compiled for a few shapes: a batch's rows and widths are rounded up, and rows that only fill a
shape count for nothing. A pass from any layer to any other is one program, the layers being traced numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from backends import batching
from backends.flax_decoder import Config, Decoder, KeyValue, Lora
from backends.flax_devices import place
from data.examples import Example

WIDTH = 8
"""prompt widths are multiples of it"""


@dataclass(frozen=True)
class Model:
    """A loaded decoder: its structure, its weights on the mesh, and the ids that end a response."""

    graph: nnx.GraphDef
    weights: nnx.State
    config: Config
    mesh: Mesh
    eos: np.ndarray

    def put(self, array: np.ndarray, axis: int | None = None) -> jax.Array:
        return place(self.mesh, array, axis)

    def limit(self, cpu: int, device: int) -> int:
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return cpu if on_cpu else device * self.mesh.shape["data"]

    def rows(self, count: int) -> int:
        """The number of rows that `count` are filled up to: 1, 2, 3, 4, 6, 8, 12, 16, …, by device."""
        parts = self.mesh.shape["data"]
        needed, size = -(-count // parts), 1
        while size < needed:
            size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else -(-size * 4 // 3)
        return size * parts

    def decode_rows(self, count: int) -> int:
        """The number of rows that `count` decoding ones are filled up to: 8, 16, 32, …, by device. (Fewer
        would cost as much: a step reads all weights.)"""
        parts = self.mesh.shape["data"]
        return parts * max(8, 1 << (-(-count // parts) - 1).bit_length())


class Batch(NamedTuple):
    """A batch on the mesh: rows that share a prefix, filled up to a shape that has a program."""

    indices: np.ndarray
    """of the prompts, int [n], n <= R"""
    prefix: jax.Array
    """[P]"""
    suffix: jax.Array
    """[R, S]"""
    lengths: jax.Array
    """[R]; 1 in a row that only fills"""

    @property
    def filled(self) -> int:
        return len(self.lengths)


def make_batches(
    model: Model, sequences: Sequence[np.ndarray], tokens: int, shared: int, exact: bool
) -> list[Batch]:
    """`batching.pack` on the mesh.

    Args:
        exact: no larger than the rows need, for a sweep, which runs the same few shapes for every head; else
            rounded up to shapes that other prompts share.
    """
    batches, parts = [], model.mesh.shape["data"]
    for packed in batching.pack(sequences, tokens, shared, 1 if exact else WIDTH):
        count = len(packed.rows)
        extra = (batching.round_up(count, parts) if exact else model.rows(count)) - count
        suffix = np.pad(packed.suffix, ((0, extra), (0, 0))).astype(np.int32)
        lengths = np.pad(packed.lengths, (0, extra), constant_values=1).astype(np.int32)
        batches.append(
            Batch(
                packed.rows,
                model.put(packed.prefix.astype(np.int32)),
                model.put(suffix, 0),
                model.put(lengths, 0),
            )
        )
    return batches


def prompt_batches(model: Model, prompts: Sequence[Example], tokens: int, exact: bool = False) -> list[Batch]:
    sequences = [prompt.prompt_ids for prompt in prompts]
    return make_batches(model, sequences, tokens, min(map(len, sequences), default=0), exact)


class Streams(NamedTuple):
    """Residual streams [1, 1, P, E] and [1, R, S, E], and keys and values of both where they are kept."""

    prefix: jax.Array
    suffix: jax.Array
    caches: tuple[KeyValue, KeyValue] | None


def empty_caches(
    config: Config, copies: int, prefix: jax.Array, suffix: jax.Array
) -> tuple[KeyValue, KeyValue]:
    """Empty keys and values for every layer: [L, c, K, P, D] and [L, c, R, K, S, D]."""
    size = config.shape
    kept, tail = (size.layers, copies), (size.kv_heads,)

    def empty(*middle: int, length: int) -> KeyValue:
        shape = (*kept, *middle, *tail, length, size.head_dim)
        return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    return empty(length=prefix.shape[-2]), empty(suffix.shape[1], length=suffix.shape[-2])


@partial(jax.jit, static_argnames=("graph", "caching"))
def embed(graph, weights, prefix, suffix, caching: bool) -> Streams:
    """Streams before layer 0 of prefix ids [P] and suffix ids [R, S]."""
    decoder: Decoder = nnx.merge(graph, weights)
    streams = decoder.embed(prefix)[None, None], decoder.embed(suffix)[None]
    return Streams(*streams, empty_caches(decoder.config, 1, *streams) if caching else None)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("streams",))
def advance(graph, weights, streams: Streams, start, stop, lora: Lora | None) -> Streams:
    """Layers start..stop-1 of the clean model."""
    decoder: Decoder = nnx.merge(graph, weights)
    return Streams(
        *decoder.run(streams.prefix, streams.suffix, start, stop, lora=lora, caches=streams.caches)
    )


def last_of(suffix: jax.Array, lengths: jax.Array) -> jax.Array:
    """Residual stream at each row's last token, [c, R, E]."""
    return jnp.take_along_axis(suffix, (lengths - 1)[None, :, None, None], axis=2)[:, :, 0]


@partial(jax.jit, static_argnames=("graph",))
def last_logits(graph, weights, suffix, lengths) -> jax.Array:
    """float32 [R, V] after each row's last token."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(last_of(suffix, lengths)[0])


def clean(model: Model, batch: Batch, lora: Lora | None, caching: bool) -> Streams:
    streams = embed(model.graph, model.weights, batch.prefix, batch.suffix, caching)
    layers = np.int32(model.config.shape.layers)
    return advance(model.graph, model.weights, streams, np.int32(0), layers, lora)
