"""NeuronTune's attribution: integrated gradients of MLP neurons along a path of activations.

A pass begins at the prompt's last token, on kept keys and values of those before it. Widths are rounded up;
what only fills them is masked.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backends.base import Attribution, Example
from backends.core.checks import check_attribution
from backends.core.integration import Integrals, attribution, evaluated, integrate
from backends.core.packing import round_up
from backends.core.progress import progress
from backends.flax.attention import KeyValue, attend, by_head, turns
from backends.flax.decoder import Decoder, Layer
from backends.flax.loss import WIDTH
from backends.flax.model import Model

TOKENS_CPU, TOKENS_DEVICE = 1024, 4096
"""tokens that go through the model together"""
FEW, MANY = (8, 32), 64
"""rows of a program: one of FEW, or a multiple of MANY"""


class Held(NamedTuple):
    """The clean model on a prompt of T tokens and its target of t, from which every path starts. P and W are
    T - 1 and t, rounded up."""

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
        seen = (distance >= 0) & (distance < at.window)
        between = layer.attended(
            x, attend(layer.queries(x, turn, at, "output", None), own, seen), at, "output"
        )
        neurons = layer.mlp.neurons(layer.before_mlp(between))
        last = jax.lax.dynamic_slice_in_dim(x[0], before, width)
        return between + layer.mlp.down(neurons), (own, last, neurons[0, before])

    _, (own, hidden, neurons) = jax.lax.scan(body, decoder.embed(ids)[None], stacked)
    return jax.tree.map(lambda part: part[:, 0, :, : len(ids) - width], own), hidden, neurons


def hold(model: Model, example: Example) -> Held:
    """The clean model on an example."""
    before, count = len(example.prompt_ids) - 1, len(example.target_ids)
    width = 1 << (count - 1).bit_length()  # most answers are a token or two
    ids = np.zeros(round_up(before, WIDTH) + width, np.int32)
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
        values: what neurons are set to at each row's first token, [L, n, F], or for all layers [1, n, F].
        rows: bool [L, n], in which rows.
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
            seen = (distance >= 0) & (distance < at.window) & there
            heads = attend(layer.queries(x, turn, at, "output", None), every, seen)
            put = values[jnp.minimum(index, len(values) - 1)], rows[index]
            return layer.finish(x, heads, at._replace(put=put), "output")

        def body(x, each):
            index, at, known = each
            below = index < start
            return jax.lax.cond(below, lambda x, *_: x, run, x, index, at, known), None

        first = jnp.broadcast_to(held.hidden[start], (values.shape[1], *held.hidden.shape[1:]))
        layers = jnp.arange(len(held.hidden))
        hidden, _ = jax.lax.scan(body, first, (layers, stacked, held.known))
        logits = decoder.logits(hidden)  # (n, W, V)
        picked = jnp.take_along_axis(logits, held.targets[None, :, None], axis=-1)[..., 0]
        each = ((jax.nn.logsumexp(logits, axis=-1) - picked) * held.share).sum(axis=-1)
        return each.sum(), each

    (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(values)
    return each, gradient


def filled(count: int) -> int:
    """As many rows as there is a program for."""
    return next((size for size in FEW if count <= size), round_up(count, MANY))


def together(
    model: Model, held: Held, start: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """See the torch wing's `together`."""
    path = np.zeros((len(start), filled(len(points)), start.shape[1]), start.dtype)
    length = np.asarray(held.neurons) - start
    path[:, : len(points)] = start[:, None] + points.astype(start.dtype)[:, None] * length[:, None]
    rows = np.ones(path.shape[:2], bool)
    along, gradient = model.apply(losses_and_gradient, held, np.int32(0), path, rows)
    return _numbers(along)[: len(points)], _numbers(gradient).swapaxes(0, 1)[: len(points)]


def apart(model: Model, held: Held, layers: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See the torch wing's `apart`. All rows enter at the first one's layer."""
    neurons, count = np.asarray(held.neurons), len(points)
    path = np.zeros((1, filled(count), neurons.shape[1]), neurons.dtype)
    path[0, :count] = points.astype(neurons.dtype)[:, None] * neurons[layers]
    rows = np.zeros((len(neurons), path.shape[1]), bool)
    rows[layers, np.arange(count)] = True
    along, gradient = model.apply(losses_and_gradient, held, np.int32(layers[0]), path, rows)
    return _numbers(along)[:count], _numbers(gradient)[0, :count]


def attribute_neurons(
    model: Model, examples: Sequence[Example], baselines: Sequence[Example] | None, steps: int
) -> Attribution:
    """See Backend.attribute_neurons."""
    check_attribution(examples, baselines, steps)
    limit = model.limit(TOKENS_CPU, TOKENS_DEVICE)
    paths = model.config.shape.layers if baselines is None else 1
    found: list[Integrals] = []
    rounding = float(jnp.finfo(model.config.dtype).eps)
    for number, example in enumerate(progress(examples, desc="neurons", unit="row")):
        held = hold(model, example)
        start = np.zeros_like(held.neurons)
        if baselines is not None:
            start = np.asarray(hold(model, baselines[number]).neurons)
        length = _numbers(np.asarray(held.neurons) - start)

        def evaluate(layers, points, held=held, start=start, length=length):
            if baselines is not None:
                along, gradient = together(model, held, start, points)
                return along, gradient * length
            along, gradient = apart(model, held, layers, points)
            return along, gradient * length[layers]

        tokens = np.full(paths, len(held.targets))
        found.append(integrate(evaluated(tokens, limit, evaluate), 1, paths, steps, rounding))
    return attribution(examples, found)


def _numbers(values: jax.Array) -> np.ndarray:
    return np.asarray(values).astype(np.float64)
