"""Rows padded for a pass, and the loss that gradients and tuning share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backends.base import Example
from backends.flax.decoder import Adapter, Decoder
from backends.flax.model import Model

TOKENS_CPU, TOKENS_DEVICE = 1024, 8192
"""padded tokens of a forward and backward pass, for each device of the data axis"""


class Size(NamedTuple):
    """What rows of a pass are padded to: T, a multiple of 16, and G, a multiple of 8."""

    tokens: int
    places: int


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


def read(example: Example) -> np.ndarray:
    """The tokens that a pass reads: the last one of the target predicts nothing."""
    return np.concatenate([example.prompt_ids, example.target_ids[:-1]])


def sizes_of(examples: Sequence[Example], most: int) -> list[Size]:
    """At most `most` sizes, from the smallest up: each holds an equal share of the examples more than the
    one before, the last one all."""
    order, found = sorted(examples, key=lambda row: len(read(row))), set()
    for number in range(1, most + 1):
        held = order[: -(-len(order) * number // most)]
        targets = max(1, *(len(row.target_ids) for row in held))
        found.add(Size(-(-len(read(held[-1])) // 16) * 16, -(-targets // 8) * 8))
    return sorted(found)


def make_rows(
    model: Model, examples: Sequence[Example], filled: int, of: int, sizes: Sequence[Size] = ()
) -> Rows:
    """Examples as arrays of `filled` rows, each weighing 1 / `of` in the loss, its target tokens alike.

    Args:
        sizes: from the smallest up; the first that holds all examples is taken. Empty: their own.
    """
    needed = Size(max(len(read(row)) for row in examples), max(len(row.target_ids) for row in examples))
    fitting = (size for size in sizes if size.tokens >= needed.tokens and size.places >= needed.places)
    size = next(fitting) if sizes else sizes_of(examples, 1)[0]
    ids = np.zeros((filled, size.tokens), np.int32)
    places, targets = np.zeros((2, filled, size.places), np.int32)
    share = np.zeros(targets.shape, np.float32)
    for row, example in enumerate(examples):
        tokens, first, count = read(example), len(example.prompt_ids) - 1, len(example.target_ids)
        ids[row, : len(tokens)] = tokens
        places[row] = np.minimum(first + np.arange(size.places), len(tokens) - 1)
        targets[row, :count] = example.target_ids
        share[row, :count] = 1 / (max(1, count) * of)
    return Rows(*(model.put(array, 0) for array in (ids, places, targets, share)))


@dataclass(frozen=True)
class Passes:
    """How rows go through the model."""

    model: Model
    rows: int
    """of a pass; fewer are filled up, since each number of rows would need a program of its own"""
    sizes: Sequence[Size]

    def of(self, examples: Sequence[Example], share: int) -> Iterator[tuple[list[int], Rows]]:
        """Each pass: its examples' places, the longest first, and its rows, each weighing 1 / `share`."""
        order = sorted(range(len(examples)), key=lambda place: -len(read(examples[place])))
        for start in range(0, len(order), self.rows):
            group = order[start : start + self.rows]
            own = [examples[place] for place in group]
            yield group, make_rows(self.model, own, self.model.rows(self.rows), share, self.sizes)

    def sum(self, program: Callable, examples: Sequence[Example], *arguments):
        """Mean loss over the examples, and its gradient: program(graph, weights, rows, recompute, *arguments)
        returns both for a pass, of which these are the sums."""
        total, gradients = 0.0, None
        for _, rows in self.of(examples, len(examples)):
            loss, new = self.model.apply(program, rows, recomputes(self.model, *rows.ids.shape), *arguments)
            gradients = new if gradients is None else jax.tree.map(jnp.add, gradients, new)
            total += float(loss)
        return total, gradients


def loss_of(decoder: Decoder, rows: Rows, adapter: Adapter | None, recompute: bool) -> jax.Array:
    """Sum over target tokens of share * cross-entropy."""
    logits = target_logits(decoder, decoder.forward(rows.ids, adapter, recompute), rows)
    return row_losses(logits, rows).sum()


def target_logits(decoder: Decoder, hidden: jax.Array, rows: Rows) -> jax.Array:
    """At least float32 [R, G, V] from the last residual stream [R, T, E]: the output matrix sees only the
    places that predict a target."""
    return decoder.logits(jnp.take_along_axis(hidden, rows.places[..., None], axis=1))


def row_losses(logits: jax.Array, rows: Rows) -> jax.Array:
    """Each row's sum over target tokens of share * cross-entropy, [R]."""
    picked = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits, axis=-1) - picked) * rows.share).sum(axis=-1)


def recomputes(model: Model, rows: int, tokens: int) -> bool:
    """Whether the backward pass computes each layer again: where what it would keep of all layers takes more
    than half of the room beside the weights. That is of a token about ten widths of the residual stream and
    three of the MLP, and of each pair of tokens and head a score in float32 and a weight."""
    size, itemsize = model.config.shape, model.itemsize
    token = itemsize * (10 * size.model_dim + 3 * size.mlp_dim) + (4 + itemsize) * size.heads * tokens
    return size.layers * rows * tokens * token > model.room / 2
