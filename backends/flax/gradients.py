"""Gradients of single heads: in their rows of W_q, and in their gates, from one forward pass a row.

The backward pass is written out, a layer after another from the last one down to the lowest that is asked
for: only the streams between layers are kept, and what a layer does is computed again when its turn comes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from backends.base import Example, HeadGradients
from backends.core.progress import progress
from backends.flax import adapter as adapters
from backends.flax.attention import Layout, attend_line, turns
from backends.flax.decoder import Adapter, Decoder, Layer
from backends.flax.graded import Batch, grades
from backends.flax.loss import TOKENS_CPU, TOKENS_DEVICE, Passes, row_losses, sizes_of, target_logits
from backends.flax.model import Model, filled_up


@partial(jax.jit, static_argnames=("graph", "mask", "other"))
def differentiate(graph, weights, batch: Batch, adapter: Adapter | None, layers, mask: str, other: bool):
    """Gradients of the sum of losses in W_q of l layers, float32 [l, E, H, D], and of each row's graded
    outcome in its gates, [l, R, H].

    Args:
        other: some row's outcome is another function than its loss.
    """
    decoder: Decoder = nnx.merge(graph, weights)
    size, dtype, ids = decoder.config.shape, decoder.config.dtype, batch.rows.ids
    # The stream is float64, and so are a layer's weights for as long as it multiplies them with it.
    numbers = jnp.float64 if dtype == "float32" else dtype
    gates = jnp.ones((len(ids), size.layers, size.heads), jnp.promote_types(numbers, jnp.float32))
    layer_graph, stacked = decoder.stacked(gates, adapter)
    layout = Layout(0, 1, ids.shape[1])
    turn = turns(layout.positions, decoder.config.frequencies)

    def run(x, at):
        layer: Layer = nnx.merge(layer_graph, at.weights)
        query = layer.queries(x, turn, at, mask, None if adapter is None else adapter.scale)
        heads, _ = attend_line(query, layer.key_values(x, turn), layout, at.window, decoder.config.fused)
        return layer.finish(x, heads, at, mask)

    def sums(hidden):
        """Of losses, and of graded outcomes."""
        logits = target_logits(decoder, hidden, batch.rows)
        return row_losses(logits, batch.rows).sum(), grades(logits, batch).sum()

    start = decoder.embed(ids).astype(numbers)
    hidden, streams = jax.lax.scan(lambda x, at: (run(x, at), x), start, stacked)
    (loss, outcome), back = jax.vjp(sums, hidden)
    one, zero = jnp.ones_like(loss), jnp.zeros_like(outcome)
    of_hidden = [*back((one, zero)), *(back((zero, one)) if other else ())]
    slots = jnp.full(size.layers, len(layers)).at[layers].set(jnp.arange(len(layers)))  # others': beyond

    def down(step, carry):
        of_hidden, of_kernels, of_gates = carry
        index = size.layers - 1 - step
        stream, at = jax.tree.map(lambda whole: whole[index], (streams, stacked))
        _, back = jax.vjp(run, stream, at)
        below, of_at = zip(*map(back, of_hidden), strict=True)
        of_kernel = of_at[0].weights["attention"]["query"]["kernel"][...].astype(jnp.float32)
        of_gate = of_at[1].keep if other else -of_at[0].keep
        found = ((of_kernels, of_kernel), (of_gates, of_gate))
        return list(below), *(whole.at[slots[index]].set(own, mode="drop") for whole, own in found)

    shape = (len(layers), size.model_dim, size.heads, size.head_dim)
    none = jnp.zeros(shape, jnp.float32), jnp.zeros((len(layers), len(ids), size.heads), gates.dtype)
    return jax.lax.fori_loop(0, size.layers - layers.min(), down, (of_hidden, *none))[1:]


class Call(NamedTuple):
    """What all passes of a call have in common."""

    model: Model
    adapter: Adapter | None
    layers: np.ndarray
    mask: str
    bar: tqdm


def named(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that compete for the next one, the answer first, and those that refusals begin with."""
    return np.roll(example.choice_ids, -example.answer), example.refusal_ids


def fold_sums(call: Call, examples: Sequence[Example], folds: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean gradients of folds, float32 [F, l, E, H, D], and the gradients in the gates of all rows,
    float64 [l, H, N]."""
    model, adapter, layers, mask, bar = call
    size, sizes = model.config.shape, sizes_of(examples, 2)
    passes = Passes(model, max(1, model.limit(TOKENS_CPU, TOKENS_DEVICE) // sizes[-1].tokens), sizes)
    filled = model.rows(passes.rows)
    choices, refusals = (max(map(len, lists)) for lists in zip(*map(named, examples), strict=True))
    sums = np.zeros((folds, len(layers), size.model_dim, size.heads, size.head_dim), np.float32)
    gates = np.zeros((len(layers), size.heads, len(examples)))
    for fold in range(folds):
        members = np.arange(fold, len(examples), folds)
        for group, rows in passes.of([examples[row] for row in members], 1):
            own = [examples[row] for row in members[group]]
            rivals, begin = zip(*map(named, own), strict=True)
            other = any(map(len, rivals + begin))
            each = filled_up(rivals, filled, choices), filled_up(begin, filled, refusals)
            batch = Batch(rows, *(model.put(tokens, 0) for tokens in each))
            with jax.enable_x64(model.config.dtype == "float32"):
                found = model.apply(differentiate, batch, adapter, layers, mask, other)
            of_kernel, of_gates = (np.asarray(part) for part in found)
            sums[fold] += of_kernel / len(members)
            gates[:, :, members[group]] = of_gates[:, : len(own)].swapaxes(1, 2)
            bar.update(len(own))
    return sums, gates


def gram(safe: np.ndarray, util: np.ndarray) -> np.ndarray:
    """float64 [l, H, 2F, 2F]: inner products of the folds' gradients of each head, a layer at a time."""
    found = []
    for layer in range(safe.shape[1]):
        folds = np.concatenate([safe[:, layer], util[:, layer]])  # (2F, E, H, D)
        each = folds.transpose(2, 0, 1, 3).reshape(folds.shape[2], len(folds), -1).astype(np.float64)
        found.append(each @ each.transpose(0, 2, 1))
    return np.stack(found)


def head_gradients(
    model: Model,
    safe: Sequence[Example],
    utils: Sequence[Sequence[Example]],
    folds: int,
    layers: Sequence[int],
    mask: str,
    adapter: Path | None = None,
) -> Iterator[HeadGradients]:
    """See Backend.map_gradients. A float32 model is differentiated in float64."""
    layers, loaded = np.array(layers, np.int32), adapters.load(model, adapter)
    with progress(total=sum(map(len, (safe, *utils))), desc="gradients", unit="row") as bar:
        call = Call(model, loaded, layers, mask, bar)
        own, of_safe = fold_sums(call, safe, folds)
        for util in utils:
            other, of_util = fold_sums(call, util, folds)
            found = gram(own, other)
            del other  # before those of the next map
            yield HeadGradients(found, of_safe, of_util)
