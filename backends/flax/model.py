"""A loaded model, and its rows in padded batches on the mesh.

A program is compiled for each shape of a batch, so that rows have two widths at most, and their number is
rounded up; what only fills a shape is ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backends.core import budgets
from backends.flax.attention import Layout
from backends.flax.decoder import Config, Padded
from backends.flax.devices import memory_of, place

WIDTH, SWEPT = 32, 4
"""widths of rows are multiples of WIDTH, and where one shape serves a whole sweep of SWEPT"""
SPLIT = 1024
"""padded tokens that pay for a second program"""
FEW = (1, 2, 3, 4, 6, 8, 12, 16)
UNLIMITED = 2**31


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
    def half(self) -> bool:
        """Half precision, in which rounding differs with what is beside a row: near a tie a head without
        effect would show one. So the clean model goes beside the ablated ones, as the last copy, and what
        they say alike is what it says elsewhere."""
        return self.itemsize < 4

    @property
    def room(self) -> int:
        """Bytes that a sweep may use beside the weights, on all devices together."""
        weights = sum(weight.nbytes for weight in jax.tree.leaves(self.weights))
        limit = memory_of(self.mesh.devices.flat[0])
        if limit is None:
            return budgets.machine_bytes() // 2 - weights
        return int(0.9 * limit * self.mesh.size) - weights * self.mesh.shape["data"]

    def rows(self, count: int) -> int:
        """The number of rows that `count` are filled up to: one of FEW or a multiple of the last of them, by
        device."""
        needed = -(-count // self.mesh.shape["data"])
        size = next((size for size in FEW if needed <= size), round_up(needed, FEW[-1]))
        return size * self.mesh.shape["data"]

    @property
    def cache_sharding(self) -> NamedSharding:
        """Of keys and values [L, n, R, K, C, D]: rows are cut among data, heads as the weights are."""
        data, parts = self.mesh.shape["data"], self.mesh.shape["model"]
        cut = [None, None, "data" if data > 1 else None]
        cut += ["model"] if parts > 1 and self.config.shape.kv_heads % parts == 0 else []
        # As XLA writes what comes out of a program, or the next one would be compiled for another placing.
        while cut and cut[-1] is None:
            cut.pop()
        return NamedSharding(self.mesh, P(*cut))


class Part(NamedTuple):
    """Rows that go through the model together."""

    rows: np.ndarray
    """which they are, int [r], r <= R; the other rows of `padded` only fill the shape"""
    padded: Padded


def make_parts(
    model: Model,
    sequences: Sequence[np.ndarray],
    tokens: int = UNLIMITED,
    most: int = UNLIMITED,
    swept: bool = False,
) -> list[Part]:
    """Rows of similar length together, at most `tokens` tokens of a line (one row at the least) and `most`
    rows, in shapes that serve other rows too.

    Args:
        swept: for a sweep, in which one shape serves every head: what all rows begin with stands once, and
            shapes are no larger than these rows need.
    """
    parts, prefix = [], _shared(sequences) if swept else 0
    lengths = np.array([len(sequence) - prefix for sequence in sequences], int)
    for group, width in _widths(lengths, SWEPT if swept else WIDTH):
        size = even(len(group), min((tokens - prefix) // width, most))
        filled = round_up(size, model.mesh.shape["data"]) if swept else model.rows(size)
        layout = Layout(prefix, filled, prefix + width)
        for start in range(0, len(group), size):
            parts.append(_part(model, sequences, group[start : start + size], layout))
    return parts


def _widths(lengths: np.ndarray, multiple: int) -> list[tuple[np.ndarray, int]]:
    """Rows in order of length, in two groups of one width each, those that need the least padding; few tokens
    are one group, for which one program does."""
    if not len(lengths):
        return []
    order, count = np.argsort(lengths, kind="stable"), np.arange(1, len(lengths) + 1)
    widths = round_up(lengths[order], multiple)
    padded = count * widths + (len(order) - count) * widths[-1]
    last = int(np.argmin(padded)) if padded[-1] > SPLIT else len(order) - 1
    groups = (order[: last + 1], int(widths[last])), (order[last + 1 :], int(widths[-1]))
    return [group for group in groups if len(group[0])]


def even(count: int, most: int) -> int:
    """The size of as few parts as `most` (one at the least) a part allow, all but the last of one size."""
    return -(-count // -(-count // max(1, most)))


def _shared(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all begin with; each keeps one at least after them."""
    shortest = min(map(len, sequences), default=1) - 1
    same = [(sequence[:shortest] == sequences[0][:shortest]) for sequence in sequences]
    return int(np.argmin(np.append(np.all(same, axis=0), False)))


def _part(model: Model, sequences: Sequence[np.ndarray], rows: np.ndarray, layout: Layout) -> Part:
    """Rows that only fill the shape repeat the first one."""
    ids, lengths = np.zeros((layout.rows, layout.width), np.int32), np.zeros(layout.rows, np.int32)
    for at in range(layout.rows):
        sequence = sequences[rows[at if at < len(rows) else 0]]
        ids[at, : len(sequence)], lengths[at] = sequence, len(sequence)
    return Part(rows, Padded(model.put(ids, 0), model.put(lengths, 0), layout))


def round_up(number, multiple: int):
    return -(-number // multiple) * multiple


def filled_up(lists: Sequence[Sequence[int]], rows: int, width: int) -> np.ndarray:
    """int32 [rows, width], one column at the least; -1 where there is nothing."""
    found = np.full((rows, max(1, width)), -1, np.int32)
    for row, own in enumerate(lists):
        found[row, : len(own)] = own
    return found
