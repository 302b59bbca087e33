"""Graded outcomes, of the model and with one head at a time ablated; nothing is decoded."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Choices, Example, Grades, Head
from backends.core.kept import Kept
from backends.flax import adapter as peft_folder
from backends.flax.decoder import CLEAN, Ablation, Adapter, Decoder, Padded
from backends.flax.loss import Rows, make_rows, row_losses
from backends.flax.model import Model, Part, filled_up, make_parts, round_up
from backends.flax.sweep import Stream, Swept, ablated, copies_of, predicted, rivals_of, sweep, token_limit

LOGITS_CPU, LOGITS_DEVICE = 1024, 4096
"""places whose logits over the vocabulary are held together, for each device of the data axis"""
PLACES = 8
"""places of a row are one, or a multiple of it"""


class Batch(NamedTuple):
    """Rows of one pass; some only fill the shape."""

    rows: Rows
    rivals: jax.Array
    """tokens that compete for a row's next token, the answer first, int32 [R, n], then -1; all -1: none do,
    the whole target is predicted from the whole vocabulary"""
    refusals: jax.Array
    """tokens that refusals of a request begin with, int32 [R, m], then -1; all -1: no request"""


def make_batch(model: Model, examples: Sequence[Example]) -> Batch:
    """Of examples with their whole targets."""
    filled = model.rows(len(examples))
    return _with_rivals(model, examples, examples, make_rows(model, examples, filled, 1), filled)


def _with_rivals(
    model: Model, examples: Sequence[Example], every: Sequence[Example], rows: Rows, filled: int
) -> Batch:
    """Of some rows of `every`, which say how many tokens compete at most."""
    rivals = [np.roll(row.choice_ids, -row.answer) for row in examples]
    refusals = [row.refusal_ids for row in examples]
    widths = (max(len(row.choice_ids) for row in every), max(len(row.refusal_ids) for row in every))
    both = (filled_up(lists, filled, width) for lists, width in zip((rivals, refusals), widths, strict=True))
    return Batch(rows, *(model.put(part, 0) for part in both))


# What is graded


def counted(example: Example) -> np.ndarray:
    """The tokens whose likelihood is the outcome: of a request, and where choices compete, the next one."""
    if len(example.refusal_ids):
        return example.refusal_ids[:1]
    return example.choice_ids[[example.answer]] if len(example.choice_ids) else example.target_ids


def sequences(examples: Sequence[Example]) -> list[np.ndarray]:
    """What is read of each row: the prompt, and all but the last of what counts."""
    return [np.concatenate([row.prompt_ids, counted(row)[:-1]]) for row in examples]


def most_places(examples: Sequence[Example]) -> int:
    most = max((len(counted(row)) for row in examples), default=1)
    return round_up(most, PLACES) if most > 1 else 1


def most_rows(model: Model, examples: Sequence[Example]) -> int:
    """Of a pass, by their logits."""
    return max(1, model.limit(LOGITS_CPU, LOGITS_DEVICE) // most_places(examples))


def read_part(model: Model, examples: Sequence[Example], part: Part) -> Batch:
    """What counts in some of `sequences`."""
    some, layout = [examples[row] for row in part.rows], part.padded.layout
    targets = filled_up([counted(row) for row in some], layout.rows, most_places(examples))
    named = targets >= 0
    starts = filled_up([[len(row.prompt_ids) - 1] for row in some], layout.rows, 1)
    places = np.clip(starts + np.arange(targets.shape[1]), 0, layout.width - 1).astype(np.int32)
    share = (named / np.maximum(1, named.sum(axis=1, keepdims=True))).astype(np.float32)
    arrays = (model.put(array, 0) for array in (places, np.maximum(targets, 0), share))
    return _with_rivals(model, some, examples, Rows(part.padded.ids, *arrays), layout.rows)


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
def clean_grades(graph, weights, padded: Padded, batch: Batch, rivals, adapter: Adapter | None):
    """Outcomes [R], and `predicted` of the next tokens."""
    decoder: Decoder = nnx.merge(graph, weights)
    last = decoder.last(padded, CLEAN, adapter)
    logits = decoder.logits(padded.layout.take(last, batch.rows.places)[0])
    return grades(logits, batch), *predicted(logits[:, 0], rivals)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("stream",))
def ablated_grades(graph, weights, stream, start, layer, padded: Padded, ablation: Ablation, batch: Batch):
    """As `ablated_choices`: the clean stream, and outcomes [n, R]."""
    decoder: Decoder = nnx.merge(graph, weights)
    stream, last = ablated(decoder, stream, start, layer, padded, ablation)
    wanted = padded.layout.take(last, batch.rows.places)  # (n, R, G, E)
    return stream, jax.lax.map(lambda own: grades(decoder.logits(own), batch), wanted)


# Verbs


def grade(model: Model, examples: Sequence[Example], adapter: Path | None) -> Grades:
    """See Backend.grade."""
    loaded, count = peft_folder.load(model, adapter), len(examples)
    found = np.zeros(count), np.zeros(count, np.int32), np.zeros(count, np.float32)
    for part in make_parts(model, sequences(examples), token_limit(model), most_rows(model, examples)):
        batch, rivals = read_part(model, examples, part), rivals_of(model, examples, part)
        for whole, own in zip(
            found, model.apply(clean_grades, part.padded, batch, rivals, loaded), strict=True
        ):
            whole[part.rows] = np.asarray(own)[: len(part.rows)]
    return Grades(found[0], Choices(*found[1:]))


def sweep_grades(
    model: Model, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_grades."""
    read = sequences(examples)
    copies = copies_of(model, read)

    def make() -> Swept:
        tokens = token_limit(model) // (copies + model.half)
        parts = make_parts(model, read, tokens, most_rows(model, examples), swept=True)
        streams = [Stream(model, part, read_part(model, examples, part)) for part in parts]
        return Swept(streams, copies, grade(model, examples, None).outcome if model.half else None)

    targets = tuple(
        (row.target_ids.tobytes(), row.choice_ids.tobytes(), row.refusal_ids.tobytes(), row.answer)
        for row in examples
    )
    swept = kept.of(examples, ("grade", targets, token_limit(model)), make)
    for head, outcome in sweep(model, swept, ablated_grades, heads, mask):
        yield head, outcome.astype(np.float64)
