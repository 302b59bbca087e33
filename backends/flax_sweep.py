"""Next-token choices, greedy generation, and the sweep that silences one head at a time, in JAX.

Mirrors `torch_sweep`, where the ideas are explained. What is JAX's own: programs are compiled for a few
shapes (a batch's rows and widths are rounded up, rows that only fill a shape count for nothing), a pass from
any layer is one program because the layer is a traced number, and decoding runs on the device until half
of its rows are done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from backends import batching
from backends.base import Head
from backends.flax_decoder import EVERY, Config, Decoder, KeyValue, Lora
from backends.flax_devices import place
from data.examples import Example

# As in torch_sweep, for each device of the data axis.
TOKENS_CPU, TOKENS_DEVICE = 4096, 32768
BATCH_CPU, BATCH_DEVICE = 1024, 16384
WIDTH = 8
"""prompt widths are multiples of it"""
COLUMNS = 64
"""columns of a decoding cache are multiples of it"""
PLACES = 256
"""rows of the output matrix's product at once: [PLACES, V] floats are kept"""


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


def make_batches(model: Model, sequences: Sequence[np.ndarray], tokens: int, shared: int) -> list[Batch]:
    batches = []
    for packed in batching.pack(sequences, tokens, shared, WIDTH):
        extra = model.rows(len(packed.rows)) - len(packed.rows)
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


def _prompt_batches(model: Model, prompts: Sequence[Example], tokens: int) -> list[Batch]:
    sequences = [prompt.prompt_ids for prompt in prompts]
    return make_batches(model, sequences, tokens, min(map(len, sequences), default=0))


class Streams(NamedTuple):
    """Residual streams [1, 1, P, E] and [1, R, S, E], and keys and values of both where they are kept."""

    prefix: jax.Array
    suffix: jax.Array
    caches: tuple[KeyValue, KeyValue] | None


# Programs


def _caches(config: Config, copies: int, prefix: jax.Array, suffix: jax.Array) -> tuple[KeyValue, KeyValue]:
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
    return Streams(*streams, _caches(decoder.config, 1, *streams) if caching else None)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("streams",))
def advance(graph, weights, streams: Streams, start, stop, lora: Lora | None) -> Streams:
    """Layers start..stop-1 of the clean model."""
    decoder: Decoder = nnx.merge(graph, weights)
    return Streams(
        *decoder.run(streams.prefix, streams.suffix, start, stop, lora=lora, caches=streams.caches)
    )


def _silenced(decoder: Decoder, streams: Streams, layer, keep, mask: str) -> Streams:
    """The rest of the model from `layer` on for copies of a batch; keep [c, L, H]."""
    copies = len(keep)
    prefix, suffix = (
        jnp.broadcast_to(stream, (copies, *stream.shape[1:])) for stream in (streams.prefix, streams.suffix)
    )
    caches = None if streams.caches is None else _caches(decoder.config, copies, prefix, suffix)
    layers = decoder.config.shape.layers
    return Streams(*decoder.run(prefix, suffix, layer, layers, keep, mask, caches=caches))


def _last(suffix: jax.Array, lengths: jax.Array) -> jax.Array:
    """Residual stream at each row's last token, [c, R, E]."""
    return jnp.take_along_axis(suffix, (lengths - 1)[None, :, None, None], axis=2)[:, :, 0]


@partial(jax.jit, static_argnames=("graph",))
def last_logits(graph, weights, suffix, lengths) -> jax.Array:
    """float32 [R, V] after each row's last token."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(_last(suffix, lengths)[0])


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_logits(graph, weights, streams: Streams, layer, keep, lengths, mask: str) -> jax.Array:
    """float32 [c, R, V] after each row's last token, silenced from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    return decoder.logits(_last(_silenced(decoder, streams, layer, keep, mask).suffix, lengths))


@partial(jax.jit, static_argnames=("graph", "mask"))
def silenced_choices(
    graph, weights, streams: Streams, layer, keep, lengths, vocabulary, asked, mask: str
) -> jax.Array:
    """Predictions [c, R] in the sense of Example.answer, silenced from `layer` on."""
    decoder: Decoder = nnx.merge(graph, weights)
    suffix = _silenced(decoder, streams, layer, keep, mask).suffix
    return _choose(decoder.logits(_last(suffix, lengths), vocabulary), asked)


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


class Decoding(NamedTuple):
    """Rows in the middle of greedy decoding; R rows, C columns."""

    cache: KeyValue
    """[L, R, K, C, D]"""
    key_position: jax.Array
    """[R, C]; EVERY where a column holds no token"""
    column: jax.Array
    """the next to be written"""
    tokens: jax.Array
    """the last token of each row, decided but not yet in the cache, [R]"""
    position: jax.Array
    """its position, [R]"""
    left: jax.Array
    """tokens that may still come, [R]"""
    keep: jax.Array | None
    """[R, L, H]"""


@partial(jax.jit, static_argnames=("columns",))
def gather_cache(clean: Streams, silenced: Streams | None, layer, lines, lengths, columns: int):
    """The decoding cache of rows `lines` (into copies * R), layers below `layer` from the clean streams.

    Returns cache [L, n, K, columns, D] and key_position [n, columns]; lengths [n] counts each row's valid
    tokens.
    """
    rows = clean.suffix.shape[1]

    def joined(prefix, suffix, line, copy):
        # prefix [L, c, K, P, D], suffix [L, c, R, K, S, D] -> [L, n, K, P + S, D]
        flat = suffix.reshape(suffix.shape[0], -1, *suffix.shape[3:])
        return jnp.concatenate([prefix[:, copy], flat[:, line]], axis=-2)

    def whole(at: int) -> jax.Array:
        known = joined(*(part[at] for part in clean.caches), lines % rows, jnp.zeros_like(lines))
        if silenced is not None:
            new = joined(*(part[at] for part in silenced.caches), lines, lines // rows)
            below = jnp.arange(len(new)) < layer
            known = jnp.where(below[:, None, None, None, None], known, new)
        room = columns - known.shape[-2]
        return jnp.pad(known, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))

    at = jnp.arange(columns)
    return KeyValue(whole(0), whole(1)), jnp.where(at < lengths[:, None], at, EVERY)


@partial(jax.jit, static_argnames=("graph", "mask"), donate_argnames=("state",))
def decode_some(graph, weights, state: Decoding, lora, eos, until, mask: str):
    """Decodes until at most `until` rows go on. Returns the state and the tokens written, [R, C], -1 where
    none."""
    decoder: Decoder = nnx.merge(graph, weights)
    rows, columns = state.key_position.shape

    def going(state: Decoding) -> jax.Array:
        return (state.left > 0) & ~(state.tokens[:, None] == eos).any(axis=-1)

    def body(carry):
        state, written, step = carry
        alive = going(state)
        key_position = state.key_position.at[:, state.column].set(state.position)
        hidden, cache = decoder.step(
            state.cache, state.column, key_position, state.tokens, state.position, state.keep, mask, lora
        )
        tokens = jnp.where(alive, decoder.logits(hidden).argmax(axis=-1), state.tokens).astype(jnp.int32)
        written = written.at[:, step].set(jnp.where(alive, tokens, -1))
        state = Decoding(
            cache,
            key_position,
            state.column + 1,
            tokens,
            state.position + 1,
            state.left - alive,
            state.keep,
        )
        return state, written, step + 1

    written = jnp.full((rows, columns), -1, jnp.int32)
    state, written, _ = jax.lax.while_loop(
        lambda carry: going(carry[0]).sum() > until, body, (state, written, 0)
    )
    return state, written, going(state)


@jax.jit
def take_rows(state: Decoding, rows, filled) -> Decoding:
    """The rows that go on; `filled` False where a row only fills the shape."""
    cache = KeyValue(*(part[:, rows] for part in state.cache))
    return Decoding(
        cache,
        state.key_position[rows],
        state.column,
        state.tokens[rows],
        state.position[rows],
        jnp.where(filled, state.left[rows], 0),
        None if state.keep is None else state.keep[rows],
    )


def decode(model: Model, state: Decoding, rows: int, lora: Lora | None, mask: str) -> list[list[int]]:
    """Greedy continuations of the first `rows` rows of a state, each beginning with its `tokens`, EOS
    included."""
    written = [[token] for token in np.asarray(state.tokens)[:rows].tolist()]
    origin = np.arange(rows)  # which of `written` a row of the state is; fewer than the state's rows
    eos = model.put(model.eos.astype(np.int32))
    while True:
        # Finished rows are dropped where that halves the work.
        filled = len(state.tokens)
        until = filled // 2 if model.decode_rows(filled // 2) < filled else 0
        state, new, going = decode_some(model.graph, model.weights, state, lora, eos, np.int32(until), mask)
        new, going = np.asarray(new), np.asarray(going)[: len(origin)]
        for line, row in enumerate(origin):
            written[row] += new[line][new[line] >= 0].tolist()
        if not going.any():
            return written
        kept = np.flatnonzero(going)
        size = model.decode_rows(len(kept))
        chosen = np.pad(kept, (0, size - len(kept))).astype(np.int32)
        state = take_rows(state, chosen, np.arange(size) < len(kept))
        origin = origin[kept]


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


def _clean(model: Model, batch: Batch, lora: Lora | None, caching: bool) -> Streams:
    streams = embed(model.graph, model.weights, batch.prefix, batch.suffix, caching)
    layers = np.int32(model.config.shape.layers)
    return advance(model.graph, model.weights, streams, np.int32(0), layers, lora)


def choices(model: Model, examples: Sequence[Example], lora: Lora | None) -> tuple[np.ndarray, np.ndarray]:
    """See Backend.choices."""
    prediction, probability = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32)
    for batch in _prompt_batches(model, examples, model.limit(BATCH_CPU, BATCH_DEVICE)):
        found = last_logits(
            model.graph, model.weights, _clean(model, batch, lora, False).suffix, batch.lengths
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
    for batch in _prompt_batches(model, examples, model.limit(BATCH_CPU, BATCH_DEVICE)):
        if silenced is None:
            streams = _clean(model, batch, lora, False)
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
    for batch in _prompt_batches(model, examples, model.limit(BATCH_CPU, BATCH_DEVICE)):
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


def _columns(batch: Batch, new_tokens: int) -> int:
    return batching.round_up(len(batch.prefix) + batch.suffix.shape[1] + new_tokens, COLUMNS)


def generate(
    model: Model, prompts: Sequence[Example], max_new_tokens: int, lora: Lora | None
) -> list[np.ndarray]:
    """See Backend.generate."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for batch in _prompt_batches(model, prompts, model.limit(TOKENS_CPU, TOKENS_DEVICE)):
        streams = _clean(model, batch, lora, True)
        tokens = last_logits(model.graph, model.weights, streams.suffix, batch.lengths).argmax(axis=-1)
        lines = model.put(np.arange(batch.filled, dtype=np.int32), 0)
        lengths = batch.lengths + len(batch.prefix)
        columns = _columns(batch, max_new_tokens)
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
    for batch in make_batches(model, sequences, model.limit(TOKENS_CPU, TOKENS_DEVICE), shared):
        check = _DraftCheck(
            batch, [prompts[row] for row in batch.indices], [drafts[row] for row in batch.indices]
        )
        check.expect(check.predictions(model, _clean(model, batch, None, False).suffix))
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
                    _columns(batch, max_new_tokens),
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
