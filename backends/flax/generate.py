"""Greedy responses, and the sweep of responses that ablates one head at a time, in JAX (see
`core.drafts`)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Example, Head
from backends.core import budgets, drafts, packing
from backends.core.drafts import WIDTH, Decoding, Row, Settings
from backends.core.kept import Kept
from backends.flax import adapter as peft_folder
from backends.flax.attention import KeyValue, Line
from backends.flax.decoder import Adapter, Decoder
from backends.flax.model import Batch, Frontier, Model, empty_caches, make_batch, make_batches
from backends.flax.sweep import keep_mask, token_limit

# As in the torch wing, for each device of the data axis.
ROWS_CPU, ROWS_DEVICE = 512, 640
STEP_CPU, STEP_DEVICE = 32, 512
COLUMNS = 64
"""columns of a cache are multiples of it, except in a sweep, whose shape is fixed"""


# Programs


@partial(jax.jit, static_argnames=("graph", "mask"))
def begin(graph, weights, hidden, within, line: Line, layer, keep, adapter, mask: str):
    """First tokens [n, R] of ablated copies of a line, and its keys and values [L, n, T, K, D] from `layer`
    on.

    Args:
        hidden: clean stream before `layer`, [1, T', E]; None: the line is embedded.
        within: where the line's tokens stand in it, [T].
    """
    decoder: Decoder = nnx.merge(graph, weights)
    stream = decoder.embed(line.ids)[None] if hidden is None else hidden[:, within]
    copies = 1 if keep is None else len(keep)
    stream = jnp.broadcast_to(stream, (copies, *stream.shape[1:]))
    caches = empty_caches(decoder.config, copies, stream.shape[1])
    last, caches = decoder.end(stream, line, layer, keep, mask, adapter, caches)
    return decoder.logits(last).argmax(axis=-1), caches


@partial(jax.jit, donate_argnames=("cache",))
def fill(cache: KeyValue, caches: KeyValue, places, rows) -> KeyValue:
    """Rows of a cache [L, R, K, C, D] from keys and values of lines [L, n, T, K, D].

    Args:
        places: where the tokens of each prompt stand in its line, [r, C'].
        rows: which rows of the cache they become, copy by copy, [n * r]; beyond its end: none.
    """

    def filled(whole: jax.Array, lines: jax.Array) -> jax.Array:
        new = lines[:, :, places]  # (L, n, r, C', K, D)
        new = jnp.moveaxis(new.reshape(len(new), -1, *new.shape[3:]), 3, 2)  # (L, n * r, K, C', D)
        return whole.at[:, rows, :, : new.shape[3]].set(new, mode="drop")

    return jax.tree.map(filled, cache, caches)


@partial(jax.jit, static_argnames=("graph", "mask"), donate_argnames=("cache", "lower"))
def step(graph, weights, cache, lower, stream, ids, positions, places, off, layer, keep, adapter, mask: str):
    """Greedy tokens [R, w] after ids [R, w], and the caches with these in them.

    Args:
        cache: [L, R, K, C, D], of layers from `layer` on.
        lower: [L, r, K, C, D], of the layers below, for rows `off` [r] (beyond R: none); None: all rows are
            embedded, and `layer` is 0.
        stream: clean stream before `layer`, [1, T, E], and where the rows on it stand in it, `places` [R, w].
    """
    decoder: Decoder = nnx.merge(graph, weights)
    if lower is None:
        hidden = decoder.embed(ids)
    else:
        own, at = (part.at[off].get(mode="fill", fill_value=0) for part in (ids, positions))
        below, lower = decoder.extend(decoder.embed(own), lower, at, 0, layer)
        hidden = stream[0, places].at[off].set(below, mode="drop")
    layers = decoder.config.shape.layers
    hidden, cache = decoder.extend(hidden, cache, positions, layer, layers, keep, mask, adapter)
    return decoder.logits(hidden).argmax(axis=-1), cache, lower


@jax.jit
def take(cache: KeyValue, rows) -> KeyValue:
    return jax.tree.map(lambda whole: whole[:, rows], cache)


@partial(jax.jit, static_argnames=("rows",))
def grow(cache: KeyValue, rows: int) -> KeyValue:
    def grown(whole: jax.Array) -> jax.Array:
        return jnp.pad(whole, ((0, 0), (0, rows - whole.shape[1]), *((0, 0),) * 3))

    return jax.tree.map(grown, cache)


def _empty(model: Model, rows: int, columns: int) -> KeyValue:
    size = model.config.shape
    shape = (size.layers, rows, size.kv_heads, columns, size.head_dim)
    return KeyValue(jnp.zeros(shape, model.config.dtype), jnp.zeros(shape, model.config.dtype))


# Rows


class _Engine:
    """See `drafts.Engine`. Without a frontier all rows are off, and the cache has all layers.

    Args:
        cache: prompts filled in, of the layers from the frontier's on; more rows than there are only fill it.
        keep: [R, L, H].
        frontier: the clean model on prompts and responses, before the ablated layer.
    """

    def __init__(
        self,
        model: Model,
        cache: KeyValue,
        adapter: Adapter | None = None,
        keep: np.ndarray | None = None,
        frontier: Frontier | None = None,
        mask: str = "output",
    ):
        self.model, self.cache, self.adapter, self.frontier, self.mask = model, cache, adapter, frontier, mask
        self.keep, self.layer = keep, 0 if frontier is None else frontier.layer
        self.sent = None if keep is None else model.put(keep)
        columns = cache.keys.shape[-2]
        self.lower = None if frontier is None else _empty(model, model.decode_rows(1), columns)
        self.columns = None if frontier is None else np.asarray(frontier.batch.line.columns)

    @property
    def size(self) -> int:
        return self.cache.keys.shape[1]

    def step(self, ids: np.ndarray, positions: np.ndarray, rows: list[Row], off: list[int]) -> np.ndarray:
        model, extra = self.model, self.size - len(rows)
        ids, positions = (np.pad(array, ((0, extra), (0, 0))) for array in (ids, positions))
        stream = places = lines = None
        if self.frontier is not None:
            stream = self.frontier.hidden
            prompts = np.pad([row.prompt for row in rows], (0, extra))
            places = self.columns[prompts[:, None], np.minimum(positions, self.columns.shape[1] - 1)]
            lines = np.full(self.lower.keys.shape[1], self.size, np.int32)
            lines[: len(off)] = off
        tokens, self.cache, self.lower = model.apply(
            step,
            self.cache,
            self.lower,
            stream,
            ids,
            positions,
            places,
            lines,
            np.int32(self.layer),
            self.sent,
            self.adapter,
            self.mask,
        )
        return np.asarray(tokens)[: len(rows)]

    def leave(self, rows: list[Row], slots: range) -> None:
        room = self.lower.keys.shape[1]
        if slots.stop > room:
            room = self.model.decode_rows(slots.stop)
            self.lower = grow(self.lower, room)
        size = self.model.decode_rows(len(rows))
        places = np.zeros((size, self.columns.shape[1]), np.int32)
        places[: len(rows)] = self.columns[[row.prompt for row in rows]]
        into = np.full(size, room, np.int32)
        into[: len(rows)] = slots
        self.lower = fill(self.lower, self.frontier.caches, places, into)

    def pack(self, kept: list[int], off: list[int]) -> None:
        size = min(self.size, self.model.decode_rows(len(kept)))
        lines = np.zeros(size, np.int32)
        lines[: len(kept)] = kept
        self.cache = take(self.cache, lines)
        if self.lower is not None:
            lower = np.zeros(self.model.decode_rows(max(1, len(off))), np.int32)
            lower[: len(off)] = off
            self.lower = take(self.lower, lower)
        if self.keep is not None:
            self.keep = self.keep[lines]
            self.sent = self.model.put(self.keep)


def _plan(model: Model, prompts: Sequence[Example], max_new_tokens: int) -> budgets.Plan:
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens + WIDTH
    most = model.limit(ROWS_CPU, ROWS_DEVICE)
    # Twice the rows: `lower` has all layers too.
    return budgets.plan_responses(
        model.config.shape, 2 * model.itemsize, model.room, len(prompts), longest, most
    )


def _settings(model: Model, max_new_tokens: int) -> Settings:
    eos = frozenset(model.eos.tolist())
    return Settings(max_new_tokens, eos, model.limit(STEP_CPU, STEP_DEVICE), model.itemsize < 4)


def generate(
    model: Model, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None
) -> list[np.ndarray]:
    """See Backend.generate."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    adapter = peft_folder.load(model, adapter)
    if not prompts:
        return outputs
    sequences = [prompt.prompt_ids for prompt in prompts]
    most = _plan(model, prompts, max_new_tokens).rows
    shared = min(map(len, sequences))
    for batch in make_batches(model, sequences, token_limit(model), shared, False, most):
        first, caches = model.apply(begin, None, None, batch.line, np.int32(0), None, adapter, "output")
        size, count = model.decode_rows(batch.filled), len(batch.rows)
        columns = packing.round_up(batch.line.columns.shape[1] + max_new_tokens + WIDTH, COLUMNS)
        into = np.where(np.arange(batch.filled) < count, np.arange(batch.filled), size).astype(np.int32)
        cache = fill(_empty(model, size, columns), caches, batch.line.columns, into)
        rows = [Row(row, len(sequences[row])) for row in batch.rows]
        decoding = Decoding(_Engine(model, cache, adapter), rows, _settings(model, max_new_tokens))
        decoding.run(np.asarray(first)[0, :count].tolist())
        for row in rows:
            outputs[row.prompt] = np.array(row.tokens, np.int32)
    return outputs


class _Block:
    """See `drafts.Block`.

    Args:
        line: prompts with their responses.
        budget: tokens of a row after its prompt, at most.
    """

    def __init__(
        self,
        model: Model,
        line: Batch,
        prompts: Sequence[Example],
        responses: Sequence[np.ndarray],
        budget: int,
    ):
        self.model, self.rows = model, line.rows
        own = [prompts[row].prompt_ids for row in line.rows]
        self.lengths = [len(ids) for ids in own]
        self.columns = max(self.lengths) + budget
        self.drafts = [responses[row].tolist() for row in line.rows]
        self.frontier = Frontier(model, line, key_values=True)
        # The prompts alone, which ablated models read, and where their tokens stand in the line.
        alone = packing.join(own, min(self.lengths) - 1)
        self.batch = make_batch(model, alone, True)
        within = np.asarray(line.line.columns)[alone.rows[alone.holders], alone.positions]
        extra = len(self.batch.line.ids) - len(within)
        self.within = model.put(np.pad(within, (0, extra)).astype(np.int32))

    def release(self) -> None:
        self.frontier.release()

    def begin(self, layer: int, heads: list[int], copies: int, mask: str) -> tuple[list[int], _Engine]:
        """A last group of heads is filled up with clean copies, so that it has the shape of the others."""
        self.frontier.move(layer)
        model, batch, count = self.model, self.batch, len(self.rows)
        heads = [*heads, *[drafts.CLEAN] * (copies - len(heads))]
        total = packing.round_up(copies * count, model.mesh.shape["data"])
        cache = _empty(model, total, self.columns)
        first = np.zeros((copies, count), int)
        size, parts = packing.even_slices(copies, token_limit(model) // len(batch.line.ids))
        for part in parts:
            some = part.stop - part.start
            tokens, caches = model.apply(
                begin,
                self.frontier.hidden,
                self.within,
                batch.line,
                np.int32(layer),
                model.put(keep_mask(model.config, layer, heads[part], size)),
                None,
                mask,
            )
            into = np.full((size, batch.filled), total, np.int32)
            into[:some, :count] = np.arange(part.start, part.stop)[:, None] * count + batch.rows
            cache = fill(cache, caches, batch.line.columns, into.ravel())
            first[part, batch.rows] = np.asarray(tokens)[:some, :count]
        keep = keep_mask(model.config, layer, np.repeat(heads, count).tolist(), total)
        return first.ravel().tolist(), _Engine(model, cache, None, keep, self.frontier, mask)


def sweep_generations(
    model: Model,
    prompts: Sequence[Example],
    heads: Sequence[Head],
    max_new_tokens: int,
    mask: str,
    kept: Kept,
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """See Backend.sweep_generations."""
    if not prompts:
        yield from ((head, []) for head in heads)
        return
    plan = _plan(model, prompts, max_new_tokens)

    def make() -> list[_Block]:
        responses = generate(model, prompts, max_new_tokens, None)
        sequences = drafts.clean_sequences(prompts, responses)
        shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
        lines = make_batches(model, sequences, token_limit(model), shared, True, plan.prompts)
        return [_Block(model, line, prompts, responses, max_new_tokens + WIDTH) for line in lines]

    blocks = kept.of(prompts, ("responses", max_new_tokens, plan), make)
    yield from drafts.sweep(blocks, heads, mask, _settings(model, max_new_tokens), plan)
