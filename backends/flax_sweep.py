"""Next-token choices, greedy generation, and the sweep that silences one head at a time, in JAX.

Mirrors `torch_sweep`, where the ideas are explained.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends import batching
from backends.base import Head
from backends.flax_decode import Decoding, decode, gather_cache
from backends.flax_decoder import Config, Decoder, Lora
from backends.flax_model import (
    Batch,
    Model,
    Streams,
    advance,
    clean,
    embed,
    empty_caches,
    last_logits,
    last_of,
    make_batches,
    prompt_batches,
)
from data.examples import Example

# As in torch_sweep, for each device of the data axis.
TOKENS_CPU, TOKENS_DEVICE = 4096, 32768
BATCH_CPU, BATCH_DEVICE = 1024, 16384
COLUMNS = 64
"""columns of a decoding cache are multiples of it, but in a sweep, which has one shape"""
PLACES = 256
"""rows of the output matrix's product at once: [PLACES, V] floats are kept"""


# Programs


def _silenced(decoder: Decoder, streams: Streams, layer, keep, mask: str) -> Streams:
    """The rest of the model from `layer` on for copies of a batch; keep [c, L, H]."""
    copies = len(keep)
    prefix, suffix = (
        jnp.broadcast_to(stream, (copies, *stream.shape[1:])) for stream in (streams.prefix, streams.suffix)
    )
    caches = None if streams.caches is None else empty_caches(decoder.config, copies, prefix, suffix)
    layers = decoder.config.shape.layers
    return Streams(*decoder.run(prefix, suffix, layer, layers, keep, mask, caches=caches))


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_logits(graph, weights, streams: Streams, layer, keep, lengths, mask: str) -> jax.Array:
    """float32 [c, R, V] after each row's last token, silenced from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(last_of(_silenced(decoder, streams, layer, keep, mask).suffix, lengths))


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_choices(
    graph, weights, streams: Streams, layer, keep, lengths, vocabulary, asked, mask: str
) -> jax.Array:
    """Predictions [c, R] in the sense of Example.answer, silenced from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    suffix = _silenced(decoder, streams, layer, keep, mask).suffix
    return _choose(decoder.logits(last_of(suffix, lengths), vocabulary), asked)


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


@partial(jax.jit, static_argnames=("graph",))
def greedy_at(graph, weights, suffix, lines, places) -> jax.Array:
    """Greedy tokens [n] after tokens `places` of rows `lines` of a suffix stream [c, R, S, E]."""
    decoder: Decoder = nnx.merge(graph, weights)
    hidden = suffix.reshape(-1, *suffix.shape[2:])[lines, places]  # (n, E)
    return jax.lax.map(lambda one: decoder.logits(one).argmax().astype(jnp.int32), hidden, batch_size=PLACES)


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_streams(graph, weights, streams: Streams, layer, keep, mask: str) -> Streams:
    return _silenced(nnx.merge(graph, weights), streams, layer, keep, mask)


def _keep(config: Config, layer: int, heads: Sequence[int], copies: int) -> np.ndarray:
    """[copies, L, H]: copy i without heads[i]; copies beyond them are clean."""
    keep = np.ones((copies, config.shape.layers, config.shape.heads), np.float32)
    keep[np.arange(len(heads)), layer, np.array(heads, int)] = 0
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


def choices(model: Model, examples: Sequence[Example], lora: Lora | None) -> tuple[np.ndarray, np.ndarray]:
    """See Backend.choices."""
    prediction, probability = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32)
    for batch in prompt_batches(model, examples, model.limit(BATCH_CPU, BATCH_DEVICE)):
        found = last_logits(
            model.graph, model.weights, clean(model, batch, lora, False).suffix, batch.lengths
        )
        asked = _asked([examples[row] for row in batch.indices], batch.filled, None)
        told = clean_choices(found, model.put(asked, 0))
        prediction[batch.indices], probability[batch.indices] = (
            np.asarray(part)[: len(batch.indices)] for part in told
        )
    return prediction, probability


def logits(
    model: Model, examples: Sequence[Example], lora: Lora | None, silenced: Head | None, mask: str
) -> np.ndarray:
    """See Backend.logits."""
    found = np.zeros((len(examples), model.config.shape.vocab), np.float32)
    for batch in prompt_batches(model, examples, model.limit(BATCH_CPU, BATCH_DEVICE)):
        if silenced is None:
            streams = clean(model, batch, lora, False)
            told = last_logits(model.graph, model.weights, streams.suffix, batch.lengths)
        else:
            streams = embed(model.graph, model.weights, batch.prefix, batch.suffix, False)
            keep = model.put(_keep(model.config, silenced[0], silenced[1:], 1))
            told = silenced_logits(
                model.graph, model.weights, streams, np.int32(0), keep, batch.lengths, mask
            )[0]
        found[batch.indices] = np.asarray(told)[: len(batch.indices)]
    return found


class _Frontier:
    """The clean streams of a batch before layer `layer`, moved up as the sweep goes."""

    def __init__(self, model: Model, batch: Batch, caching: bool):
        self.model, self.batch, self.caching = model, batch, caching
        self.restart()

    def restart(self) -> None:
        self.layer = 0
        model, batch = self.model, self.batch
        self.streams = embed(model.graph, model.weights, batch.prefix, batch.suffix, self.caching)

    def move(self, layer: int) -> None:
        if layer < self.layer:
            self.restart()
        if layer > self.layer:
            model = self.model
            bounds = np.int32(self.layer), np.int32(layer)
            self.streams = advance(model.graph, model.weights, self.streams, *bounds, None)
            self.layer = layer

    def groups(self, heads: Sequence[int]) -> Iterator[tuple[list[int], jax.Array]]:
        """Indices into `heads`, as many together as fit the token budget, and their mask [c, L, H]; groups of
        even size, so that one program serves them all."""
        model = self.model
        most = max(1, model.limit(TOKENS_CPU, TOKENS_DEVICE) // self.batch.suffix.size)
        size = -(-len(heads) // -(-len(heads) // most))
        for start in range(0, len(heads), size):
            some = list(range(start, min(start + size, len(heads))))
            yield some, model.put(_keep(model.config, self.layer, [heads[index] for index in some], size))


def sweep_choices(
    model: Model, examples: Sequence[Example], heads: Sequence[Head], mask: str
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    candidates = batching.candidates(examples)
    vocabulary = None if candidates is None else model.put(candidates.astype(np.int32))
    parts = []
    for batch in prompt_batches(model, examples, model.limit(BATCH_CPU, BATCH_DEVICE), exact=True):
        asked = _asked([examples[row] for row in batch.indices], batch.filled, candidates)
        parts.append((_Frontier(model, batch, False), model.put(asked, 0)))
    for layer, group in batching.by_layer(heads):
        prediction = np.zeros((len(group), len(examples)), np.int32)
        for frontier, asked in parts:
            batch = frontier.batch
            frontier.move(layer)
            for some, keep in frontier.groups(group):
                told = silenced_choices(
                    model.graph,
                    model.weights,
                    frontier.streams,
                    np.int32(layer),
                    keep,
                    batch.lengths,
                    vocabulary,
                    asked,
                    mask,
                )
                told = np.asarray(told)[: len(some), : len(batch.indices)]
                prediction[np.ix_(some, batch.indices)] = told
        for index, head in enumerate(group):
            yield (layer, head), prediction[index]


def _columns(batch: Batch, new_tokens: int, multiple: int) -> int:
    return batching.round_up(len(batch.prefix) + batch.suffix.shape[1] + new_tokens, multiple)


def generate(
    model: Model, prompts: Sequence[Example], max_new_tokens: int, lora: Lora | None
) -> list[np.ndarray]:
    """See Backend.generate."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for batch in prompt_batches(model, prompts, model.limit(TOKENS_CPU, TOKENS_DEVICE)):
        streams = clean(model, batch, lora, True)
        tokens = last_logits(model.graph, model.weights, streams.suffix, batch.lengths).argmax(axis=-1)
        lines = model.put(np.arange(batch.filled, dtype=np.int32), 0)
        lengths = batch.lengths + len(batch.prefix)
        columns = _columns(batch, max_new_tokens, COLUMNS)
        cache, key_position = gather_cache(streams, None, np.int32(0), lines, lengths, columns)
        left = np.where(np.arange(batch.filled) < len(batch.indices), max_new_tokens - 1, 0)
        state = Decoding(
            cache,
            key_position,
            np.int32(len(batch.prefix) + batch.suffix.shape[1]),
            tokens.astype(jnp.int32),
            lengths,
            model.put(left.astype(np.int32), 0),
            None,
        )
        told = decode(model, state, len(batch.indices), lora, "output")
        for row, continuation in zip(batch.indices, told, strict=True):
            outputs[row] = np.array(continuation, np.int32)
    return outputs


def sweep_generations(
    model: Model, prompts: Sequence[Example], heads: Sequence[Head], max_new_tokens: int, mask: str
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """See Backend.sweep_generations. The clean continuation is the draft of every silenced model."""
    if not prompts:
        yield from ((head, []) for head in heads)
        return
    drafts = generate(model, prompts, max_new_tokens, None)
    # What predicts the draft's tokens: the prompt, then the draft but for its last token.
    sequences = [
        np.concatenate([prompt.prompt_ids, draft[:-1]]) for prompt, draft in zip(prompts, drafts, strict=True)
    ]
    shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
    checks = []
    for batch in make_batches(model, sequences, model.limit(TOKENS_CPU, TOKENS_DEVICE), shared, True):
        check = _DraftCheck(
            batch, [prompts[row] for row in batch.indices], [drafts[row] for row in batch.indices]
        )
        check.expect(check.predictions(model, clean(model, batch, None, False).suffix))
        checks.append((_Frontier(model, batch, True), check))
    for layer, group in batching.by_layer(heads):
        outputs = [list(drafts) for _ in group]
        for frontier, check in checks:
            batch = frontier.batch
            frontier.move(layer)
            for some, keep in frontier.groups(group):
                silenced = silenced_streams(
                    model.graph, model.weights, frontier.streams, np.int32(layer), keep, mask
                )
                predicted = check.predictions(model, silenced.suffix)[: len(some)]  # (c, n, G)
                accepted = check.accepted(predicted)  # (c, n)
                copies, lines = np.nonzero(accepted < check.drafted)
                if len(lines) == 0:
                    continue
                agreed = accepted[copies, lines]
                first = predicted[copies, lines, agreed]
                state = _left_drafts(
                    model,
                    frontier,
                    silenced,
                    keep,
                    copies,
                    lines,
                    first,
                    check.prompt_lengths[lines] + agreed,
                    max_new_tokens - agreed,
                    _columns(batch, max_new_tokens, 1),
                )
                tails = decode(model, state, len(lines), None, mask)
                for copy, line, count, tokens in zip(copies, lines, agreed, tails, strict=True):
                    row = batch.indices[line]
                    outputs[some[copy]][row] = np.concatenate(
                        [drafts[row][:count], np.array(tokens, np.int32)]
                    )
        for index, head in enumerate(group):
            yield (layer, head), outputs[index]


def _left_drafts(model, frontier, silenced, keep, copies, lines, first, lengths, budget, columns) -> Decoding:
    """Decoding state of the rows that leave the draft: row lines[i] of copy copies[i] says first[i] next."""
    size, batch = model.decode_rows(len(lines)), frontier.batch

    def filled(values: np.ndarray, filler: int = 0) -> jax.Array:
        padded = np.pad(values, (0, size - len(values)), constant_values=filler)
        return model.put(padded.astype(np.int32), 0)

    lengths = filled(lengths, 1)
    flat = filled(copies * batch.filled + lines)
    cache, key_position = gather_cache(
        frontier.streams, silenced, np.int32(frontier.layer), flat, lengths, columns
    )
    column = np.int32(len(batch.prefix) + batch.suffix.shape[1])
    left = filled(budget - 1)
    return Decoding(cache, key_position, column, filled(first), lengths, left, keep[flat // batch.filled])


class _DraftCheck:
    """Compares one-pass predictions with drafts, G tokens at the most (see `torch_sweep._DraftCheck`)."""

    def __init__(self, batch: Batch, prompts: Sequence[Example], drafts: Sequence[np.ndarray]):
        self.batch = batch
        self.prompt_lengths = np.array([len(prompt.prompt_ids) for prompt in prompts])
        self.drafted = np.array([len(draft) for draft in drafts])
        self.inside = np.arange(self.drafted.max()) < self.drafted[:, None]  # (n, G)
        # Where token g of the draft is predicted.
        lines, tokens = np.nonzero(self.inside)
        places = self.prompt_lengths[lines] - 1 - len(batch.prefix) + tokens
        self.lines, self.places = lines.astype(np.int32), places.astype(np.int32)

    def predictions(self, model: Model, suffix: jax.Array) -> np.ndarray:
        """Greedy token at each place of the draft, [c, n, G]."""
        copies, rows = suffix.shape[:2]
        lines = (np.arange(copies)[:, None] * rows + self.lines).ravel().astype(np.int32)
        places = np.tile(self.places, copies)
        extra = batching.round_up(len(lines), PLACES) - len(lines)
        told = greedy_at(
            model.graph, model.weights, suffix, np.pad(lines, (0, extra)), np.pad(places, (0, extra))
        )
        predicted = np.zeros((copies, *self.inside.shape), np.int32)
        predicted[:, self.inside] = np.asarray(told)[: len(lines)].reshape(copies, -1)
        return predicted

    def expect(self, clean: np.ndarray) -> None:
        self.clean = clean[0]  # (n, G)

    def accepted(self, predicted: np.ndarray) -> np.ndarray:
        """Number of leading draft tokens that stand in each row, [c, n]."""
        wrong = (predicted != self.clean) & self.inside
        return np.where(wrong.any(axis=-1), wrong.argmax(axis=-1), self.drafted)
