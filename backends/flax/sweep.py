"""Next-token choices, and how any sweep goes: a layer at a time, one program over its heads and the rows of a
batch, from the clean residual stream before that layer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Choices, Example, Head
from backends.core.kept import Kept
from backends.flax import adapter as peft_folder
from backends.flax.decoder import CLEAN, Ablation, Adapter, Decoder, Padded
from backends.flax.model import Model, Part, even, filled_up, make_parts

TOKENS_CPU, TOKENS_DEVICE = 4096, 32768
"""of a pass, in all copies, for each device of the data axis"""
KEPT = 0.2
"""share of the memory that clean streams may take between layers"""


# A sweep


class Stream:
    """Some rows, and what is kept of the clean model on it, which has come to layer `layer`.

    Args:
        about: what else a program reads of them.
        fresh: makes what is kept at the embedding; by default a residual stream, [1, line, E].
    """

    def __init__(self, model: Model, part: Part, *about, fresh: Callable[[], Any] | None = None):
        self.model, self.part, self.about = model, part, about
        self.fresh = fresh or (lambda: empty_stream(model, part))
        self.layer, self.kept = 0, None

    def run(self, program: Callable, layer: int, ablation: Ablation) -> np.ndarray:
        """program(kept, start, layer, padded, ablation, *about) -> kept, found: what it found, [n, R, …]."""
        kept, self.kept = self.kept, None  # it is donated
        if kept is None or layer < self.layer:
            kept, self.layer = self.fresh(), 0
        bounds = np.int32(self.layer), np.int32(layer)
        kept, found = self.model.apply(program, kept, *bounds, self.part.padded, ablation, *self.about)
        self.kept, self.layer = kept, layer
        return np.asarray(found)


def empty_stream(model: Model, part: Part) -> jax.Array:
    """[1, line, E]."""
    shape = (1, part.padded.layout.tokens, model.config.shape.model_dim)
    return model.put(np.zeros(shape, model.config.dtype))


@dataclass(frozen=True)
class Swept:
    """What a sweep goes over, whichever heads it ablates."""

    streams: list[Stream]
    copies: int
    """heads that go through a layer together; fewer are filled up"""
    clean: np.ndarray | None = None
    """in half precision what the clean model says of all rows, [N] (see `Model.half`)"""


def sweep(
    model: Model, swept: Swept, program: Callable, heads: Sequence[Head], mask: str
) -> Iterator[tuple[Head, np.ndarray]]:
    """For each head in order what the program finds with it ablated, [N, …] (see `Stream.run`)."""
    for layer, group in groupby(heads, key=lambda head: head[0]):
        group = list(group)
        found = [[] for _ in group]
        for stream in swept.streams:
            for start in range(0, len(group), swept.copies):
                some = group[start : start + swept.copies]
                ablation = ablate(model, some, swept.copies + model.half, mask)
                values = stream.run(program, layer, ablation)[:, : len(stream.part.rows)]
                if swept.clean is not None:
                    values = np.where(values == values[-1], swept.clean[stream.part.rows], values)
                for place in range(len(some)):
                    found[start + place].append(values[place])
            held = sum(array.nbytes for array in jax.tree.leaves(stream.kept))
            if held * len(swept.streams) > KEPT * model.room:
                stream.kept = None  # it is computed again for the next layer
        order = np.concatenate([stream.part.rows for stream in swept.streams] or [[]])
        for head, parts in zip(group, found, strict=True):
            yield head, np.concatenate(parts)[np.argsort(order)] if parts else np.zeros(0, np.int32)


def ablate(model: Model, heads: Sequence[Head], copies: int, mask: str) -> Ablation:
    """A head in each copy; none in those beyond."""
    keep = np.ones((copies, model.config.shape.layers, model.config.shape.heads), np.float32)
    for copy, head in enumerate(heads):
        keep[copy, *head] = 0
    return Ablation(model.put(keep), mask)


def token_limit(model: Model) -> int:
    return model.limit(TOKENS_CPU, TOKENS_DEVICE)


def copies_of(model: Model, sequences: Sequence[np.ndarray]) -> int:
    """Heads that go through a layer together."""
    longest = max(map(len, sequences), default=1)
    return even(model.config.shape.heads, token_limit(model) // longest - model.half)


# Programs


@partial(jax.jit, static_argnames=("graph",))
def prompt_logits(graph, weights, padded: Padded, ablation: Ablation, adapter: Adapter | None) -> jax.Array:
    """float32 [R, V] after each prompt."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(padded.ends(decoder.last(padded, ablation, adapter))[0])


@partial(jax.jit, static_argnames=("graph",))
def clean_choices(graph, weights, padded: Padded, rivals, adapter: Adapter | None):
    """See `predicted`."""
    decoder: Decoder = nnx.merge(graph, weights)
    return predicted(decoder.logits(padded.ends(decoder.last(padded, CLEAN, adapter))[0]), rivals)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("stream",))
def ablated_choices(graph, weights, stream, start, layer, padded: Padded, ablation: Ablation, rivals):
    """The clean stream before `layer`, [1, line, E], from that before `start`; and the predictions of ablated
    copies, int32 [n, R]."""
    decoder: Decoder = nnx.merge(graph, weights)
    stream, last = ablated(decoder, stream, start, layer, padded, ablation)
    return stream, jax.lax.map(lambda own: predicted(decoder.logits(own), rivals)[0], padded.ends(last))


def ablated(
    decoder: Decoder, stream, start, layer, padded: Padded, ablation: Ablation
) -> tuple[jax.Array, jax.Array]:
    """The clean stream moved up from layer `start` to `layer`, and the last one of ablated copies, which
    begin there: [n, line, E]."""
    stream = jnp.where(start == 0, decoder.line(padded), stream)
    stream, _ = decoder.climb(stream, start, layer, padded.layout)
    copies = jnp.broadcast_to(stream, (len(ablation.keep), *stream.shape[1:]))
    return stream, decoder.climb(copies, layer, decoder.config.shape.layers, padded.layout, ablation)[0]


def predicted(logits: jax.Array, rivals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Predictions int32 [R] in the sense of Example.answer, and the total probability of the candidates (of
    the prediction, if the whole vocabulary competes), from logits [R, V].

    Args:
        rivals: tokens that compete in a row, [R, n], then -1; none: all do.
    """
    named = rivals >= 0
    among = jnp.take_along_axis(logits, jnp.maximum(rivals, 0), axis=-1)
    chosen = jnp.where(named, among, -jnp.inf).argmax(axis=-1)
    chosen = jnp.where(named.any(axis=-1), chosen, logits.argmax(axis=-1)).astype(jnp.int32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_rivals = jnp.where(named, jnp.exp(among - total), 0.0).sum(axis=-1)
    return chosen, jnp.where(named.any(axis=-1), of_rivals, jnp.exp(logits.max(axis=-1) - total[:, 0]))


# Verbs


def rivals_of(model: Model, examples: Sequence[Example], part: Part) -> jax.Array:
    """What competes in each row, [R, n]; n is that of all examples."""
    width = max((len(row.choice_ids) for row in examples), default=0)
    lists = [examples[row].choice_ids for row in part.rows]
    return model.put(filled_up(lists, part.padded.layout.rows, width), 0)


def prompt_parts(model: Model, examples: Sequence[Example]) -> list[Part]:
    return make_parts(model, [row.prompt_ids for row in examples], token_limit(model))


def choices(model: Model, examples: Sequence[Example], adapter: Path | None) -> Choices:
    """See Backend.choices."""
    loaded = peft_folder.load(model, adapter)
    found = Choices(np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32))
    for part in prompt_parts(model, examples):
        rivals = rivals_of(model, examples, part)
        own = model.apply(clean_choices, part.padded, rivals, loaded)
        for whole, found_here in zip(found, own, strict=True):
            whole[part.rows] = np.asarray(found_here)[: len(part.rows)]
    return found


def logits(
    model: Model, examples: Sequence[Example], adapter: Path | None, ablated: Head | None, mask: str
) -> np.ndarray:
    """See Backend.logits."""
    loaded = peft_folder.load(model, adapter)
    ablation = CLEAN if ablated is None else ablate(model, [ablated], 1, mask)
    found = np.zeros((len(examples), model.config.shape.vocab), np.float32)
    for part in prompt_parts(model, examples):
        own = model.apply(prompt_logits, part.padded, ablation, loaded)
        found[part.rows] = np.asarray(own)[: len(part.rows)]
    return found


def sweep_choices(
    model: Model, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    prompts = [row.prompt_ids for row in examples]
    copies = copies_of(model, prompts)

    def make() -> Swept:
        parts = make_parts(model, prompts, token_limit(model) // (copies + model.half), swept=True)
        streams = [Stream(model, part, rivals_of(model, examples, part)) for part in parts]
        return Swept(streams, copies, choices(model, examples, None).prediction if model.half else None)

    among = tuple(row.choice_ids.tobytes() for row in examples)
    swept = kept.of(examples, ("choices", among, token_limit(model)), make)
    yield from sweep(model, swept, ablated_choices, heads, mask)
