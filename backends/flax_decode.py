"""Greedy decoding of rows whose keys and values are known, on the device until half of them are done."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.flax_decoder import EVERY, Decoder, KeyValue, Lora
from backends.flax_model import Model, Streams


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
