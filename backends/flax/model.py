"""A loaded model, batches of prompts on its mesh, and passes of the clean model over them.

Programs are compiled for a few shapes: a batch's rows and widths are rounded up, and what only fills a shape
is ignored. A pass from any layer to any other is one program, in which the layers are traced numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from backends.base import Example
from backends.core import budgets, packing
from backends.flax.attention import KeyValue, Line
from backends.flax.decoder import Adapter, Config, Decoder
from backends.flax.devices import place

WIDTH, TOKENS = 8, 128
"""widths of prompts and tokens of lines are multiples of these where other prompts share a program"""


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

    def apply(self, program: Callable, *arguments):
        """A compiled program on the model."""
        return program(self.graph, self.weights, *arguments)

    def limit(self, cpu: int, device: int) -> int:
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return cpu if on_cpu else device * self.mesh.shape["data"]

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def room(self) -> int:
        """Bytes that a sweep may use beside the weights, on all devices together."""
        weights = sum(weight.nbytes for weight in jax.tree.leaves(self.weights))
        devices = self.mesh.devices.ravel()
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
        whole = budgets.machine_bytes() // 2 if limit is None else int(0.9 * limit * len(devices))
        copies = self.mesh.shape["data"] if limit is not None else 1
        return whole - weights * copies

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
    """Prompts that go through the model together, filled up to a shape that has a program."""

    rows: np.ndarray
    """indices of the prompts, int [n], n <= R"""
    line: Line

    @property
    def filled(self) -> int:
        """R."""
        return len(self.line.lengths)


def make_batch(model: Model, packed: packing.Line, exact: bool) -> Batch:
    """A line on the mesh.

    Args:
        exact: no larger than the prompts need, for a sweep, which runs the same few shapes for every head;
            else rounded up to shapes that other prompts share.
    """
    parts = model.mesh.shape["data"]
    tokens, rows, width = len(packed.ids), *packed.columns.shape
    more_tokens = packing.round_up(tokens, parts if exact else TOKENS * parts) - tokens
    more_rows = (packing.round_up(rows, parts) if exact else model.rows(rows)) - rows
    more_columns = 0 if exact else packing.round_up(width, WIDTH) - width
    columns = np.pad(packed.columns, ((0, 0), (0, more_columns)), mode="edge")
    # What only fills the shape belongs to no prompt; picks count in the wider grid.
    picks = replace(packed, columns=columns).picks
    line = Line(
        model.put(np.pad(packed.ids, (0, more_tokens)).astype(np.int32), 0),
        *(
            model.put(array.astype(np.int32))
            for array in (
                np.pad(packed.positions, (0, more_tokens)),
                np.pad(columns, ((0, more_rows), (0, 0))),
                np.pad(packed.lengths, (0, more_rows), constant_values=1),
                np.pad(picks, (0, more_tokens)),
            )
        ),
    )
    return Batch(packed.rows, line)


def make_batches(
    model: Model, sequences: Sequence[np.ndarray], tokens: int, shared: int, exact: bool, most: int = 0
) -> list[Batch]:
    """`packing.lines` on the mesh."""
    multiple = 1 if exact else WIDTH
    lines = packing.lines(sequences, tokens, shared, most, multiple)
    return [make_batch(model, line, exact) for line in lines]


def prompt_batches(model: Model, prompts: Sequence[Example], tokens: int, exact: bool = False) -> list[Batch]:
    sequences = [prompt.prompt_ids for prompt in prompts]
    return make_batches(model, sequences, tokens, min(map(len, sequences), default=0), exact)


# Programs of the clean model


@partial(jax.jit, static_argnames=("graph",))
def embed(graph, weights, ids) -> jax.Array:
    """Residual stream before layer 0, [1, T, E]."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.embed(ids)[None]


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("hidden", "caches"))
def advance(graph, weights, hidden, line: Line, start, stop, caches: KeyValue | None):
    """Layers start..stop-1, none of them the last: the stream [1, T, E] and the caches."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.run(hidden, line, start, stop, caches=caches)


@partial(jax.jit, static_argnames=("graph",))
def clean_logits(graph, weights, line: Line, adapter: Adapter | None) -> jax.Array:
    """float32 [R, V] after each prompt."""
    decoder: Decoder = nnx.merge(graph, weights)
    hidden, _ = decoder.end(decoder.embed(line.ids)[None], line, 0, adapter=adapter)
    return decoder.logits(hidden[0])


def empty_caches(config: Config, copies: int, tokens: int) -> KeyValue:
    """[L, n, T, K, D]."""
    size = config.shape
    shape = (size.layers, copies, tokens, size.kv_heads, size.head_dim)
    return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


class Frontier:
    """The clean residual stream of a batch before layer `layer`, [1, T, E], moved up as a sweep goes.

    Args:
        key_values: also keep the keys and values of the layers below, in `caches`, [L, 1, T, K, D].
    """

    def __init__(self, model: Model, batch: Batch, key_values: bool = False):
        self.model, self.batch, self.key_values = model, batch, key_values
        self.release()

    def release(self) -> None:
        """Frees the stream; the next move computes it again."""
        self.layer, self.hidden, self.caches = 0, None, None

    def move(self, layer: int) -> None:
        if layer < self.layer:
            self.release()
        model, line = self.model, self.batch.line
        if self.hidden is None:
            self.hidden = model.apply(embed, line.ids)
            if self.key_values:
                self.caches = empty_caches(model.config, 1, len(line.ids))
        if layer > self.layer:
            bounds = np.int32(self.layer), np.int32(layer)
            self.hidden, self.caches = model.apply(advance, self.hidden, line, *bounds, self.caches)
            self.layer = layer
