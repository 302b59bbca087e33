"""Next-token choices, and the sweep that silences one head at a time, in JAX.

Mirrors `torch_sweep`, where the ideas are explained.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends import batching, memory
from backends.base import Head
from backends.flax_attention import Line
from backends.flax_decoder import Adapter, Config, Decoder
from backends.flax_model import Frontier, Model, clean_logits, prompt_batches
from backends.kept import Kept
from data.examples import Example

TOKENS_CPU, TOKENS_DEVICE = 4096, 32768
"""as in torch_sweep, for each device of the data axis"""


def token_limit(model: Model) -> int:
    return model.limit(TOKENS_CPU, TOKENS_DEVICE)


# Programs


def _silenced(decoder: Decoder, hidden, line: Line, layer, keep, mask: str) -> jax.Array:
    """The rest of the model from `layer` on for copies of a line, keep [n, L, H]: prompts' last tokens,
    [n, R, E]."""
    copies = jnp.broadcast_to(hidden, (len(keep), *hidden.shape[1:]))
    return decoder.end(copies, line, layer, keep, mask)[0]


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_logits(graph, weights, hidden, line: Line, layer, keep, mask: str) -> jax.Array:
    """float32 [n, R, V] after each prompt, silenced from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(_silenced(decoder, hidden, line, layer, keep, mask))


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_choices(
    graph, weights, hidden, line: Line, layer, keep, vocabulary, asked, mask: str
) -> jax.Array:
    """Predictions [n, R] in the sense of Example.answer, silenced from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    return _choose(decoder.logits(_silenced(decoder, hidden, line, layer, keep, mask), vocabulary), asked)


@jax.jit
def clean_choices(logits, asked) -> tuple[jax.Array, jax.Array]:
    """Predictions [R], and the total probability of the candidates (of the prediction, if all compete)."""
    prediction = _choose(logits, asked)
    likely = jax.nn.softmax(logits, axis=-1)
    whole = jnp.take_along_axis(likely, prediction[:, None], axis=-1)[:, 0]
    among = jnp.where(asked >= 0, jnp.take_along_axis(likely, jnp.maximum(asked, 0), axis=-1), 0.0).sum(-1)
    return prediction, jnp.where((asked >= 0).any(axis=-1), among, whole)


def _choose(logits: jax.Array, asked: jax.Array) -> jax.Array:
    """Predictions [..., R] from logits [..., R, V]; asked [R, n]: columns of the candidates, then -1."""
    among = jnp.take_along_axis(
        logits, jnp.broadcast_to(jnp.maximum(asked, 0), (*logits.shape[:-1], asked.shape[-1])), axis=-1
    )
    chosen = jnp.where(asked >= 0, among, -jnp.inf).argmax(axis=-1)
    return jnp.where((asked >= 0).any(axis=-1), chosen, logits.argmax(axis=-1)).astype(jnp.int32)


def keep_mask(config: Config, layer: int, heads: Sequence[int], copies: int) -> np.ndarray:
    """[n, L, H]: copy i without heads[i] (a negative one: clean); copies beyond them are clean."""
    keep = np.ones((copies, config.shape.layers, config.shape.heads), np.float32)
    for copy, head in enumerate(heads):
        if head >= 0:
            keep[copy, layer, head] = 0
    return keep


def _asked(examples: Sequence[Example], rows: int, vocabulary: np.ndarray | None) -> np.ndarray:
    """Columns of each row's candidates among `vocabulary`, int32 [rows, n], -1 after them."""
    most = max(1, max((len(example.choice_ids) for example in examples), default=1))
    asked = np.full((rows, most), -1, np.int32)
    for row, example in enumerate(examples):
        ids = example.choice_ids
        asked[row, : len(ids)] = ids if vocabulary is None else np.searchsorted(vocabulary, ids)
    return asked


# Verbs


def choices(
    model: Model, examples: Sequence[Example], adapter: Adapter | None
) -> tuple[np.ndarray, np.ndarray]:
    """See Backend.choices."""
    prediction, probability = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32)
    for batch in prompt_batches(model, examples, token_limit(model)):
        found = clean_logits(model.graph, model.weights, batch.line, adapter)
        asked = _asked([examples[row] for row in batch.rows], batch.filled, None)
        told = clean_choices(found, model.put(asked, 0))
        prediction[batch.rows], probability[batch.rows] = (
            np.asarray(part)[: len(batch.rows)] for part in told
        )
    return prediction, probability


def logits(
    model: Model, examples: Sequence[Example], adapter: Adapter | None, silenced: Head | None, mask: str
) -> np.ndarray:
    """See Backend.logits."""
    found = np.zeros((len(examples), model.config.shape.vocab), np.float32)
    for batch in prompt_batches(model, examples, token_limit(model)):
        if silenced is None:
            told = clean_logits(model.graph, model.weights, batch.line, adapter)
        else:
            frontier = Frontier(model, batch)
            frontier.move(0)
            keep = model.put(keep_mask(model.config, silenced[0], silenced[1:], 1))
            told = silenced_logits(
                model.graph, model.weights, frontier.hidden, batch.line, np.int32(0), keep, mask
            )[0]
        found[batch.rows] = np.asarray(told)[: len(batch.rows)]
    return found


def groups(model: Model, count: int, tokens: int) -> tuple[int, Iterator[slice]]:
    """`count` copies of `tokens` tokens, as many together as the limit allows, in groups of even size so that
    one program serves them all: that size, and the groups."""
    parts = -(-count // max(1, token_limit(model) // tokens))
    size = -(-count // parts)
    return size, (slice(start, min(start + size, count)) for start in range(0, count, size))


def sweep_choices(
    model: Model, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    candidates = batching.candidates(examples)
    vocabulary = None if candidates is None else model.put(candidates.astype(np.int32))
    frontiers = kept.of(
        examples,
        ("choices",),
        lambda: [
            Frontier(model, batch)
            for batch in prompt_batches(model, examples, token_limit(model), exact=True)
        ],
    )
    parts = []
    for frontier in frontiers:
        asked = _asked([examples[row] for row in frontier.batch.rows], frontier.batch.filled, candidates)
        parts.append((frontier, model.put(asked, 0)))
    tokens = sum(len(frontier.batch.line.ids) for frontier in frontiers)
    keep = memory.keeps_choices(model.config.shape, model.itemsize, model.room, tokens)
    for layer, group in batching.by_layer(heads):
        prediction = np.zeros((len(group), len(examples)), np.int32)
        for frontier, asked in parts:
            batch = frontier.batch
            frontier.move(layer)
            size, some = groups(model, len(group), len(batch.line.ids))
            for part in some:
                told = silenced_choices(
                    model.graph,
                    model.weights,
                    frontier.hidden,
                    batch.line,
                    np.int32(layer),
                    model.put(keep_mask(model.config, layer, group[part], size)),
                    vocabulary,
                    asked,
                    mask,
                )
                count = part.stop - part.start
                prediction[part, batch.rows] = np.asarray(told)[:count, : len(batch.rows)]
            if not keep:
                frontier.release()
        for index, head in enumerate(group):
            yield (layer, head), prediction[index]
