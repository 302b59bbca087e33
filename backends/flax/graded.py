"""Graded outcomes, of the model and with one head at a time ablated: padded rows, nothing decoded."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Choices, Example, Grades, Head
from backends.core import budgets, packing
from backends.core.kept import Kept
from backends.flax import adapter as peft_folder
from backends.flax.decoder import Adapter, Decoder
from backends.flax.loss import Rows, make_rows, row_losses, target_logits
from backends.flax.model import Model, embed
from backends.flax.sweep import choose, filled_up, keep_mask

TOKENS_CPU, TOKENS_DEVICE = 2048, 16384
"""padded tokens of a pass, for each device of the data axis"""


class Batch(NamedTuple):
    """Rows of one pass; some only fill the shape."""

    rows: Rows
    rivals: jax.Array
    """tokens that compete for a row's next token, the answer first, int32 [R, n], then -1; all -1: none do,
    the whole target is predicted from the whole vocabulary"""
    refusals: jax.Array
    """tokens that refusals of a request begin with, int32 [R, m], then -1; all -1: no request"""


def make_batch(model: Model, examples: Sequence[Example]) -> Batch:
    filled = model.rows(len(examples))
    rivals = filled_up([np.roll(row.choice_ids, -row.answer) for row in examples], filled)
    refusals = filled_up([row.refusal_ids for row in examples], filled)
    return Batch(make_rows(model, examples, filled, 1), model.put(rivals, 0), model.put(refusals, 0))


def grades(logits: jax.Array, batch: Batch) -> jax.Array:
    """[R] from logits [R, G, V] of the places that predict targets."""
    first = logits[:, 0]
    among = jnp.take_along_axis(first, jnp.maximum(batch.rivals, 0), axis=-1)
    among = jax.nn.log_softmax(among, axis=-1, where=batch.rivals >= 0)[:, 0]
    outcome = jnp.where(batch.rivals[:, 0] >= 0, among, -row_losses(logits, batch.rows))
    return jnp.where(batch.refusals[:, 0] >= 0, log_odds(first, batch.refusals), outcome)


def log_odds(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """That the next token is one of a row's tokens [R, m] (-1: none) and no other one, [R] of [R, V]."""
    named = jnp.where(tokens >= 0, tokens, logits.shape[1])  # no column
    rows = jnp.arange(len(logits))[:, None]
    among = jnp.zeros(logits.shape, bool).at[rows, named].set(True, mode="drop")
    among = among.at[:, 0].set(among[:, 0] | (tokens[:, 0] < 0))  # a row without: a number, which none reads
    own, others = (jax.nn.logsumexp(logits, axis=-1, where=where) for where in (among, ~among))
    return own - others


# Programs


@partial(jax.jit, static_argnames=("graph",))
def clean(graph, weights, batch: Batch, adapter: Adapter | None) -> tuple[jax.Array, jax.Array]:
    """Outcomes [R], and the logits after each prompt [R, V]."""
    decoder: Decoder = nnx.merge(graph, weights)
    hidden = decoder.forward(batch.rows.ids, adapter)
    logits = target_logits(decoder, hidden, batch.rows)
    return grades(logits, batch), logits[:, 0]


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("hidden",))
def advance(graph, weights, hidden, start, stop) -> jax.Array:
    """The clean residual stream, [R, T, E], moved up from layer `start` to `stop`."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.climb(hidden, start, stop, None, "output")


@partial(jax.jit, static_argnames=("graph", "mask"))
def ablated(graph, weights, hidden, batch: Batch, layer, keep, mask: str) -> jax.Array:
    """[n, R] for n copies of a batch, keep [n, L, H], from its clean stream before `layer`."""
    decoder: Decoder = nnx.merge(graph, weights)

    def one(own: jax.Array) -> jax.Array:
        every = jnp.broadcast_to(own, (len(hidden), *own.shape))  # (R, L, H)
        last = decoder.climb(hidden, layer, decoder.config.shape.layers, every, mask)
        return grades(target_logits(decoder, last, batch.rows), batch)

    return jax.lax.map(one, keep)


# Verbs


def batches(model: Model, examples: Sequence[Example]) -> list[tuple[list[int], Batch]]:
    """Batches of similar length, with the places of their rows."""
    groups = packing.by_tokens(examples, model.limit(TOKENS_CPU, TOKENS_DEVICE))
    return [(members, make_batch(model, [examples[row] for row in members])) for members in groups]


def grade(model: Model, examples: Sequence[Example], adapter: Path | None) -> Grades:
    """See Backend.grade."""
    adapter, outcome = peft_folder.load(model, adapter), np.zeros(len(examples))
    found = Choices(np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32))
    for members, batch in batches(model, examples):
        of_batch, logits = model.apply(clean, batch, adapter)
        outcome[members] = np.asarray(of_batch)[: len(members)]
        own = choose(model, logits, [examples[row] for row in members])
        found.prediction[members], found.probability[members] = own
    return Grades(outcome, found)


class Stream:
    """The clean residual stream of a batch before layer `layer`, [R, T, E], moved up as a sweep goes."""

    def __init__(self, model: Model, members: list[int], batch: Batch):
        self.model, self.members, self.batch = model, members, batch
        self.release()

    def release(self) -> None:
        """Frees the stream; the next move computes it again."""
        self.layer, self.hidden = 0, None

    def move(self, layer: int) -> None:
        if layer < self.layer:
            self.release()
        if self.hidden is None:
            self.hidden = self.model.apply(embed, self.batch.rows.ids)[0]
        if layer > self.layer:
            bounds = np.int32(self.layer), np.int32(layer)
            self.hidden, self.layer = self.model.apply(advance, self.hidden, *bounds), layer


def sweep_grades(
    model: Model, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_grades."""
    targets = tuple(
        (row.target_ids.tobytes(), row.choice_ids.tobytes(), row.refusal_ids.tobytes(), row.answer)
        for row in examples
    )

    def make() -> list[Stream]:
        return [Stream(model, *of_pass) for of_pass in batches(model, examples)]

    streams = kept.of(examples, ("grade", targets), make)
    tokens = sum(stream.batch.rows.ids.size for stream in streams)
    keep = budgets.keeps_choices(model.config.shape, model.itemsize, model.room, tokens)
    for layer, group in packing.by_layer(heads):
        found = np.zeros((len(group), len(examples)))
        # As many copies for every layer: one program.
        gates = model.put(keep_mask(model.config, layer, group, model.config.shape.heads))
        for stream in streams:
            stream.move(layer)
            values = model.apply(ablated, stream.hidden, stream.batch, np.int32(layer), gates, mask)
            found[:, stream.members] = np.asarray(values)[: len(group), : len(stream.members)]
            if not keep:
                stream.release()
        for index, head in enumerate(group):
            yield (layer, head), found[index]
