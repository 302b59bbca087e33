"""Next-token choices, and the sweep that ablates one head at a time, in JAX. The torch wing's explains the
ideas."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Choices, Example, Head
from backends.core import budgets, packing
from backends.core.kept import Kept
from backends.flax import adapter as peft_folder
from backends.flax.attention import Line
from backends.flax.decoder import Config, Decoder
from backends.flax.model import Frontier, Model, clean_logits, prompt_batches

TOKENS_CPU, TOKENS_DEVICE = 4096, 32768
"""as in the torch wing, for each device of the data axis"""


def token_limit(model: Model) -> int:
    return model.limit(TOKENS_CPU, TOKENS_DEVICE)


# Programs


def _ablated(decoder: Decoder, hidden, line: Line, layer, keep, mask: str) -> jax.Array:
    """The rest of the model from `layer` on for copies of a line, keep [n, L, H]: prompts' last tokens,
    [n, R, E]."""
    copies = jnp.broadcast_to(hidden, (len(keep), *hidden.shape[1:]))
    return decoder.end(copies, line, layer, keep, mask)[0]


@partial(jax.jit, static_argnames=("graph", "mask"))
def ablated_logits(graph, weights, hidden, line: Line, layer, keep, mask: str) -> jax.Array:
    """float32 [n, R, V] after each prompt, ablated from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(_ablated(decoder, hidden, line, layer, keep, mask))


@partial(jax.jit, static_argnames=("graph", "mask"))
def ablated_choices(
    graph, weights, hidden, line: Line, layer, keep, vocabulary, columns, mask: str
) -> jax.Array:
    """Predictions [n, R] in the sense of Example.answer, ablated from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    return _choose(decoder.logits(_ablated(decoder, hidden, line, layer, keep, mask), vocabulary), columns)


@jax.jit
def clean_choices(logits, columns) -> tuple[jax.Array, jax.Array]:
    """Predictions [R], and the total probability of the candidates (of the prediction, if all compete)."""
    prediction = _choose(logits, columns)
    likely = jax.nn.softmax(logits, axis=-1)
    whole = jnp.take_along_axis(likely, prediction[:, None], axis=-1)[:, 0]
    among = jnp.take_along_axis(likely, jnp.maximum(columns, 0), axis=-1)
    among = jnp.where(columns >= 0, among, 0.0).sum(-1)
    return prediction, jnp.where((columns >= 0).any(axis=-1), among, whole)


def _choose(logits: jax.Array, columns: jax.Array) -> jax.Array:
    """Predictions [..., R] from logits [..., R, V]; columns of the candidates [R, n], then -1."""
    wanted = jnp.broadcast_to(jnp.maximum(columns, 0), (*logits.shape[:-1], columns.shape[-1]))
    among = jnp.take_along_axis(logits, wanted, axis=-1)
    chosen = jnp.where(columns >= 0, among, -jnp.inf).argmax(axis=-1)
    return jnp.where((columns >= 0).any(axis=-1), chosen, logits.argmax(axis=-1)).astype(jnp.int32)


def keep_mask(config: Config, layer: int, heads: Sequence[int], copies: int) -> np.ndarray:
    """[n, L, H]: copy i without heads[i] (a negative one: clean); copies beyond them are clean."""
    keep = np.ones((copies, config.shape.layers, config.shape.heads), np.float32)
    for copy, head in enumerate(heads):
        if head >= 0:
            keep[copy, layer, head] = 0
    return keep


def _columns(examples: Sequence[Example], rows: int, vocabulary: np.ndarray | None) -> np.ndarray:
    """Columns of each row's candidates among `vocabulary`, int32 [rows, n], -1 after them."""
    lists = [example.choice_ids for example in examples]
    return filled_up(
        lists if vocabulary is None else [np.searchsorted(vocabulary, ids) for ids in lists], rows
    )


def filled_up(lists: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """int32 [rows, n], n the longest and 1 at the least; -1 where there is nothing."""
    found = np.full((rows, max([1, *map(len, lists)])), -1, np.int32)
    for row, own in enumerate(lists):
        found[row, : len(own)] = own
    return found


# Verbs


def choose(model: Model, logits: jax.Array, examples: Sequence[Example]) -> Choices:
    """From the logits after each prompt, [R, V]; rows beyond the examples only fill the shape."""
    columns = model.put(_columns(examples, len(logits), None), 0)
    return Choices(*(np.asarray(part)[: len(examples)] for part in clean_choices(logits, columns)))


def choices(model: Model, examples: Sequence[Example], adapter: Path | None) -> Choices:
    """See Backend.choices."""
    adapter = peft_folder.load(model, adapter)
    found = Choices(np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32))
    for batch in prompt_batches(model, examples, token_limit(model)):
        logits = model.apply(clean_logits, batch.line, adapter)
        own = choose(model, logits, [examples[row] for row in batch.rows])
        found.prediction[batch.rows], found.probability[batch.rows] = own
    return found


def logits(
    model: Model, examples: Sequence[Example], adapter: Path | None, ablated: Head | None, mask: str
) -> np.ndarray:
    """See Backend.logits."""
    adapter = peft_folder.load(model, adapter)
    found = np.zeros((len(examples), model.config.shape.vocab), np.float32)
    for batch in prompt_batches(model, examples, token_limit(model)):
        if ablated is None:
            of_batch = model.apply(clean_logits, batch.line, adapter)
        else:
            frontier = Frontier(model, batch)
            frontier.move(0)
            keep = model.put(keep_mask(model.config, ablated[0], ablated[1:], 1))
            of_batch = model.apply(ablated_logits, frontier.hidden, batch.line, np.int32(0), keep, mask)[0]
        found[batch.rows] = np.asarray(of_batch)[: len(batch.rows)]
    return found


def sweep_choices(
    model: Model, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    candidates = packing.candidates(examples)
    vocabulary = None if candidates is None else model.put(candidates.astype(np.int32))

    def make() -> list[Frontier]:
        batches = prompt_batches(model, examples, token_limit(model), exact=True)
        return [Frontier(model, batch) for batch in batches]

    parts = []
    for frontier in kept.of(examples, ("choices",), make):
        batch = frontier.batch
        columns = _columns([examples[row] for row in batch.rows], batch.filled, candidates)
        parts.append((frontier, model.put(columns, 0)))
    tokens = sum(len(frontier.batch.line.ids) for frontier, _ in parts)
    keep = budgets.keeps_choices(model.config.shape, model.itemsize, model.room, tokens)
    for layer, group in packing.by_layer(heads):
        prediction = np.zeros((len(group), len(examples)), np.int32)
        for frontier, columns in parts:
            batch = frontier.batch
            frontier.move(layer)
            size, slices = packing.even_slices(len(group), token_limit(model) // len(batch.line.ids))
            for some in slices:
                chosen = model.apply(
                    ablated_choices,
                    frontier.hidden,
                    batch.line,
                    np.int32(layer),
                    model.put(keep_mask(model.config, layer, group[some], size)),
                    vocabulary,
                    columns,
                    mask,
                )
                count = some.stop - some.start
                prediction[some, batch.rows] = np.asarray(chosen)[:count, : len(batch.rows)]
            if not keep:
                frontier.release()
        for index, head in enumerate(group):
            yield (layer, head), prediction[index]
