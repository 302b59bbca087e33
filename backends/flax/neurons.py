"""NeuronTune's attribution: integrated gradients of MLP neurons along a path of activations.

A pass begins at the prompt's last token, on kept keys and values of those before it. All examples of a call
are padded to one width, and all passes to one number of rows.

Axes as in `backends.base`; P paths of an example, m layers that move on a path: either each layer has a path
of its own (P = L, m = 1), or one path moves all of them (P = 1, m = L).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Attribution, Example
from backends.core.checks import check_attribution
from backends.core.errors import InputError
from backends.core.progress import progress
from backends.flax.attention import KeyValue, attend, by_head, seen, turns
from backends.flax.decoder import Decoder, Layer
from backends.flax.model import Model

TOKENS_CPU, TOKENS_DEVICE = 128, 4096
"""tokens of a pass"""
NODES, COMPLETE = 4, 0.005
"""nodes of a piece of a path; how far its attributions may be from the loss's change, else it is halved"""


class Held(NamedTuple):
    """The clean model on a prompt of T tokens and its target of t, from which every path starts. P and W are
    T - 1 and t of the longest example."""

    known: KeyValue
    """of the tokens before the prompt's last, [L, K, P, D]"""
    hidden: jax.Array
    """residual stream of the tokens that predict the target, before each layer, [L, W, E]"""
    neurons: jax.Array
    """of the last prompt token, [L, F]"""
    before: jax.Array
    """T - 1"""
    targets: jax.Array
    """token ids, [W]"""
    share: jax.Array
    """of each target token in the loss, [W]; 0 where there is none"""


@partial(jax.jit, static_argnames=("graph", "width"))
def clean(graph, weights, ids, before, width: int):
    """Keys and values, hidden and neurons of `Held` from ids [P + W], those at `before` and on being the last
    prompt token's and the target's."""
    decoder: Decoder = nnx.merge(graph, weights)
    stacked_graph, stacked = decoder.stacked()
    columns = jnp.arange(len(ids))
    distance = columns[:, None] - columns
    turn = turns(columns, decoder.config.frequencies)

    def body(x, at):
        layer: Layer = nnx.merge(stacked_graph, at.weights)
        own = by_head(layer.key_values(x, turn))  # (1, K, P + W, D)
        query, visible = layer.queries(x, turn, at, "output", None), seen(distance, at.window)
        heads = attend(query, own, visible, decoder.config.fused)
        between = layer.attended(x, heads, at, "output")
        neurons = layer.mlp.neurons(layer.before_mlp(between))
        last = jax.lax.dynamic_slice_in_dim(x[0], before, width)
        return between + layer.mlp.down(neurons), (own, last, neurons[0, before])

    _, (own, hidden, neurons) = jax.lax.scan(body, decoder.embed(ids)[None], stacked)
    return jax.tree.map(lambda part: part[:, 0, :, : len(ids) - width], own), hidden, neurons


def hold(model: Model, example: Example, size: tuple[int, int]) -> Held:
    """The clean model on an example, padded to P and W."""
    (prefix, width), before, count = size, len(example.prompt_ids) - 1, len(example.target_ids)
    ids = np.zeros(prefix + width, np.int32)
    ids[: before + count] = np.concatenate([example.prompt_ids, example.target_ids[:-1]])
    targets, share = np.zeros(width, np.int32), np.zeros(width, np.float32)
    targets[:count], share[:count] = example.target_ids, 1 / count
    found = model.apply(clean, ids, np.int32(before), width)
    return Held(*found, np.int32(before), targets, share)


@partial(jax.jit, static_argnames=("graph",))
def losses_and_gradient(graph, weights, held: Held, start, values, rows):
    """Loss of the target in each of n rows, [n], and the gradient of their sum in `values`.

    Args:
        start: the layer that the rows enter; below it they are the clean model.
        values: what neurons are set to at each row's first token, [n, m, F].
        rows: bool [L, n], in which rows a layer's are.
    """

    def loss(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder: Decoder = nnx.merge(graph, weights)
        stacked_graph, stacked = decoder.stacked()
        width, filled = held.hidden.shape[1], held.known.keys.shape[2]
        positions = held.before + jnp.arange(width)
        turn = turns(positions, decoder.config.frequencies)
        columns = jnp.concatenate([jnp.arange(filled), positions])
        there = jnp.concatenate([jnp.arange(filled) < held.before, jnp.ones(width, bool)])
        distance = positions[:, None] - columns  # query minus key position, (W, P + W)

        def run(x, index, at, known):
            layer: Layer = nnx.merge(stacked_graph, at.weights)
            own = by_head(layer.key_values(x, turn))  # (n, K, W, D)
            every = jax.tree.map(
                lambda old, new: jnp.concatenate([jnp.broadcast_to(old, (len(x), *old.shape)), new], axis=2),
                known,
                own,
            )
            query, visible = layer.queries(x, turn, at, "output", None), seen(distance, at.window) & there
            heads = attend(query, every, visible, decoder.config.fused)
            put = values[:, jnp.minimum(index, values.shape[1] - 1)], rows[index]
            return layer.finish(x, heads, at._replace(put=put), "output")

        def body(x, each):
            index, at, known = each
            below = index < start
            return jax.lax.cond(below, lambda x, *_: x, run, x, index, at, known), None

        first = jnp.broadcast_to(held.hidden[start], (len(values), *held.hidden.shape[1:]))
        layers = jnp.arange(len(held.hidden))
        hidden, _ = jax.lax.scan(body, first, (layers, stacked, held.known))
        logits = decoder.logits(hidden)  # (n, W, V)
        picked = jnp.take_along_axis(logits, held.targets[None, :, None], axis=-1)[..., 0]
        each = ((jax.nn.logsumexp(logits, axis=-1) - picked) * held.share).sum(axis=-1)
        return each.sum(), each

    (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(values)
    return each, gradient


class Paths(NamedTuple):
    """The paths of an example."""

    model: Model
    held: Held
    starts: np.ndarray
    """values of the neurons that move, [P, m, F]"""
    ends: np.ndarray

    def __call__(self, paths: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses at a point in [0, 1] of each of n paths, [n], and their gradients there times the paths'
        lengths, [n, m, F], float64. Paths ascend."""
        model, lengths = self.model, self.ends - self.starts
        alone, layers = lengths.shape[1] == 1, np.arange(len(self.held.neurons))
        size = max(8, model.limit(TOKENS_CPU, TOKENS_DEVICE) // len(self.held.targets))
        losses, gradients = np.zeros(len(paths)), np.zeros((len(paths), *lengths.shape[1:]))
        for first in range(0, len(paths), size):
            some = slice(first, first + size)
            of = np.resize(paths[some], size)  # what only fills the shape is some row again
            along = np.resize(points[some], size)[:, None, None].astype(lengths.dtype)
            rows = layers[:, None] == of if alone else np.ones((len(layers), size), bool)
            values = self.starts[of] + along * lengths[of]
            enters = np.int32(of.min() if alone else 0)
            found = model.apply(losses_and_gradient, self.held, enters, values, rows)
            each, gradient = (np.asarray(part).astype(np.float64)[: len(paths) - first] for part in found)
            losses[some], gradients[some] = each, gradient * lengths[paths[some]].astype(np.float64)
        return losses, gradients


class Piece(NamedTuple):
    """A stretch of a path, integrated."""

    path: int
    low: float
    high: float
    change: float
    """of the loss, from end to end"""
    own: np.ndarray
    """attributions: the mean gradient times the stretch's length, [m, F]"""
    error: float
    """distance of their sum from `change`, beyond what rounding explains"""


def integrate(along: Callable, paths: int, steps: int, rounding: float) -> list[Piece]:
    """Gauss-Legendre quadrature on pieces of `NODES` nodes: at first a piece a path. In every round those are
    halved, the worst first, whose error is more than COMPLETE of the largest change on any path, as long as
    their path has at most `steps` nodes.

    Args:
        along: see `Paths`, all of which end at one place.
        rounding: relative, of the model's numbers.
    """
    nodes, weights = np.polynomial.legendre.leggauss(min(NODES, steps))
    places = np.array([-1.0, *nodes, 1.0])  # of the stretch from -1 to 1
    pieces: list[Piece] = []
    stretches = [(path, 0.0, 1.0) for path in range(paths)]
    while stretches:
        points = [(low + high) / 2 + places * (high - low) / 2 for _, low, high in stretches]
        of = np.repeat([path for path, *_ in stretches], len(places))
        losses, gradients = along(of, np.concatenate(points))
        for at, (path, low, high) in enumerate(stretches):
            some = slice(at * len(places), (at + 1) * len(places))
            own = (high - low) / 2 * np.tensordot(weights, gradients[some][1:-1], axes=1)
            ends = losses[some][[0, -1]]
            noise = rounding * (ends.max() + np.abs(own).sum())
            error = abs(own.sum() - (ends[1] - ends[0])) - noise
            pieces.append(Piece(path, low, high, ends[1] - ends[0], own, error))
        of = [piece.path for piece in pieces]
        changes = np.bincount(of, [piece.change for piece in pieces])
        room = steps // len(nodes) - np.bincount(of)
        kept, halved = [], []
        for piece in sorted(pieces, key=lambda piece: -piece.error):
            halve = piece.error > COMPLETE * np.abs(changes).max() and room[piece.path] > 0
            room[piece.path] -= halve
            (halved if halve else kept).append(piece)
        middles = [(piece, (piece.low + piece.high) / 2) for piece in halved]
        pieces = kept
        stretches = sorted(
            (piece.path, *ends) for piece, at in middles for ends in ((piece.low, at), (at, piece.high))
        )
    return pieces


def attribute_neurons(
    model: Model, examples: Sequence[Example], baselines: Sequence[Example] | None, steps: int
) -> Attribution:
    """See Backend.attribute_neurons."""
    check_attribution(examples, baselines, steps)
    every = [*examples, *(baselines or ())]
    size = max(len(row.prompt_ids) for row in every) - 1, max(len(row.target_ids) for row in every)
    rounding = float(jnp.finfo(model.config.dtype).eps)
    layers, paths = model.config.shape.layers, model.config.shape.layers if baselines is None else 1
    scores, (totals, changes) = [], np.zeros((2, len(examples), paths))
    for number, example in enumerate(progress(examples, desc="neurons", unit="row")):
        held = hold(model, example, size)
        ends = np.asarray(held.neurons).reshape(paths, layers // paths, -1)
        starts = np.zeros_like(ends)
        if baselines is not None:
            starts = np.asarray(hold(model, baselines[number], size).neurons)[None]
        own = np.zeros(ends.shape)
        for piece in integrate(Paths(model, held, starts, ends), paths, steps, rounding):
            own[piece.path] += piece.own
            changes[number, piece.path] += piece.change
        if not np.isfinite(own).all():
            where = example.example_id
            raise InputError(f"the attribution on {where} is not finite: try --dtype float32")
        totals[number] = own.sum(axis=(1, 2))
        scores.append(np.abs(own).reshape(layers, -1))
    return Attribution(np.mean(scores, axis=0), totals, changes)
