"""Greedy responses, and the sweep of responses that ablates one head at a time. One program decodes all rows
of a batch to their ends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from backends.base import Example, Head
from backends.core.errors import InputError
from backends.core.kept import Kept
from backends.flax import adapter as peft_folder
from backends.flax.attention import KeyValue, Layout
from backends.flax.decoder import CLEAN, Ablation, Adapter, Config, Decoder, Padded
from backends.flax.model import Model, Part, even, filled_up, make_parts, round_up
from backends.flax.sweep import Stream, Swept, empty_stream, sweep

ROWS_CPU, ROWS_DEVICE = 256, 640
"""rows (head x prompt) that decode together, for each device of the data axis"""
RESPONSE = 16
"""columns of a cache after the prompts are a multiple of it"""


@partial(jax.tree_util.register_dataclass, data_fields=["eos", "budget"], meta_fields=["columns", "sharding"])
@dataclass(frozen=True)
class Decoding:
    """How responses decode."""

    eos: jax.Array
    """ids that end one"""
    budget: np.int32
    """tokens of one at most"""
    columns: int
    """N, of a cache after the prompts"""
    sharding: NamedSharding
    """of a cache"""


class State(NamedTuple):
    """Responses on their way, [n, R] in n copies."""

    count: jax.Array
    """tokens of each that goes on"""
    token: jax.Array
    """the last one, [n, R]"""
    active: jax.Array
    """[n, R]"""
    on: jax.Array
    """on the clean response so far, [n, R]"""
    tokens: jax.Array
    """int32 [n, R, N]; -1 after the end"""
    caches: KeyValue
    """[L, n, R, K, C, D]"""


# Programs


@partial(jax.jit, static_argnames=("graph",))
def responses(graph, weights, padded: Padded, adapter: Adapter | None, decoding: Decoding) -> jax.Array:
    """int32 [R, N]; -1 after a response's end."""
    decoder: Decoder = nnx.merge(graph, weights)
    below = no_key_values(decoder.config, padded.layout)
    return _decode(decoder, decoder.line(padded), 0, padded, below, decoding, CLEAN, adapter)[0]


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("kept",))
def ablated_responses(
    graph, weights, kept, start, layer, padded: Padded, ablation: Ablation, decoding: Decoding, draft
) -> tuple[tuple[jax.Array, KeyValue], jax.Array]:
    """The clean stream before `layer`, [1, line, E], and keys and values below it, [L, 1, R, K, T, D], from
    those of `start`; and the responses of ablated copies, int32 [n, R, N]."""
    decoder: Decoder = nnx.merge(graph, weights)
    stream, below = kept
    stream = jnp.where(start == 0, decoder.line(padded), stream)
    stream, below = decoder.climb(stream, start, layer, padded.layout, caches=below)
    below = jax.lax.with_sharding_constraint(below, decoding.sharding)
    copies = jnp.broadcast_to(stream, (len(ablation.keep), *stream.shape[1:]))
    found = _decode(decoder, copies, layer, padded, below, decoding, ablation, None, draft)
    return (stream, below), found


def no_key_values(config: Config, layout: Layout) -> KeyValue:
    """[L, 1, R, K, T, D], of the layers below the first."""
    size = config.shape
    shape = (size.layers, 1, layout.rows, size.kv_heads, layout.width, size.head_dim)
    return KeyValue(*(jnp.zeros(shape, config.dtype) for _ in range(2)))


def _decode(
    decoder: Decoder,
    stream: jax.Array,
    layer,
    padded: Padded,
    below: KeyValue,
    decoding: Decoding,
    ablation: Ablation,
    adapter: Adapter | None,
    draft: jax.Array | None = None,
) -> jax.Array:
    """Responses int32 [n, R, N] from the residual stream before `layer`, [n, line, E].

    Args:
        below: the prompts' keys and values [L, 1, R, K, T, D], of the layers below `layer`.
        draft: in half precision the clean responses [R, N], which the last copy follows. Another that says
            what this one says has not left them.
    """

    def said(state: State, hidden: jax.Array) -> State:
        """With the tokens that follow, from the last residual stream [n, R, E]."""
        token, on = decoder.logits(hidden).argmax(axis=-1).astype(jnp.int32), state.on
        if draft is not None:
            drafted = draft[:, state.count]
            token = jnp.where(on & (token == token[-1]), drafted, token)
            on &= token == drafted
        token = jnp.where(state.active, token, -1)
        tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.count, 2)
        ended = (token[..., None] == decoding.eos).any(axis=-1) | (state.count + 1 >= decoding.budget)
        return State(state.count + 1, token, state.active & ~ended, on, tokens, state.caches)

    def step(state: State) -> State:
        fed, number = jnp.maximum(state.token, 0), state.count - 1
        hidden, caches = decoder.step(fed, number, padded, state.caches, ablation, adapter)
        return said(state._replace(caches=caches), hidden)

    # Each copy's own keys and values come over the clean ones from `layer` on, and behind the prompts.
    copied = (jnp.broadcast_to(part, (len(part), len(stream), *part.shape[2:])) for part in below)
    behind = [(0, 0)] * 4 + [(0, decoding.columns), (0, 0)]
    caches = KeyValue(*(jnp.pad(part, behind) for part in copied))
    caches = jax.lax.with_sharding_constraint(caches, decoding.sharding)
    layers, layout = decoder.config.shape.layers, padded.layout
    last, caches = decoder.climb(stream, layer, layers, layout, ablation, adapter, caches)
    last = padded.ends(last)  # (n, R, E)
    every, tokens = (
        jnp.ones(last.shape[:2], bool),
        jnp.full((*last.shape[:2], decoding.columns), -1, jnp.int32),
    )
    first = said(State(jnp.int32(0), tokens[..., 0], every, every, tokens, caches), last)
    return jax.lax.while_loop(lambda state: state.active.any(), step, first).tokens


# Verbs


def _plan(model: Model, prompts: Sequence[Example], budget: int) -> tuple[Decoding, int]:
    """How they decode, and how many rows together. InputError where not even two fit."""
    size, columns, room = model.config.shape, round_up(budget, RESPONSE), model.room
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + columns
    # A row's keys and values and a copy of them, the clean ones, and logits.
    row = 6 * size.layers * size.kv_heads * size.head_dim * model.itemsize * longest + 8 * size.vocab
    rows = min(model.limit(ROWS_CPU, ROWS_DEVICE), int(0.6 * room) // row)
    if rows < 2:
        raise InputError(
            f"two responses of {longest} tokens take {2 * row / 2**30:.2f} GiB to decode, and "
            f"{room / 2**30:.2f} GiB are free beside the weights: fewer --sweep-tokens, or a larger machine"
        )
    eos = model.put(model.eos.astype(np.int32))
    return Decoding(eos, np.int32(budget), columns, model.cache_sharding), rows


def _cut(tokens: np.ndarray) -> np.ndarray:
    return tokens[tokens >= 0].astype(np.int32)


def generate(
    model: Model, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None
) -> list[np.ndarray]:
    """See Backend.generate."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    loaded = peft_folder.load(model, adapter)
    if not prompts:
        return outputs
    decoding, most = _plan(model, prompts, max_new_tokens)
    for part in make_parts(model, [prompt.prompt_ids for prompt in prompts], most=most):
        found = np.asarray(model.apply(responses, part.padded, loaded, decoding))
        for row, tokens in zip(part.rows, found, strict=False):
            outputs[row] = _cut(tokens)
    return outputs


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
    decoding, most = _plan(model, prompts, max_new_tokens)
    copies = even(model.config.shape.heads, most - model.half)

    def make() -> Swept:
        clean = generate(model, prompts, max_new_tokens, None) if model.half else None
        sequences = [prompt.prompt_ids for prompt in prompts]
        parts = make_parts(model, sequences, most=most // (copies + model.half), swept=True)
        return Swept([_stream(model, part, decoding, clean) for part in parts], copies)

    swept = kept.of(prompts, ("responses", max_new_tokens, most), make)
    for head, found in sweep(model, swept, ablated_responses, heads, mask):
        yield head, [_cut(tokens) for tokens in found]


def _stream(model: Model, part: Part, decoding: Decoding, clean: list[np.ndarray] | None) -> Stream:
    """Of which the residual stream is kept, and the keys and values below it."""
    layout, draft = part.padded.layout, None
    if clean is not None:
        lists = [clean[row] for row in part.rows]
        draft = model.put(filled_up(lists, layout.rows, decoding.columns), 0)

    def fresh() -> tuple[jax.Array, KeyValue]:
        below = jax.device_put(no_key_values(model.config, layout), model.cache_sharding)
        return empty_stream(model, part), below

    return Stream(model, part, decoding, draft, fresh=fresh)
