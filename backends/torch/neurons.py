"""NeuronTune's attribution: integrated gradients of MLP neurons along a path of activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from backends.base import Attribution, Example
from backends.core.checks import check_attribution
from backends.core.integration import Integrals, attribution, evaluated, grouped, integrate
from backends.core.progress import progress
from backends.torch.attention import Heads, mixed_behind
from backends.torch.decoder import Cache, Decoder, finished

TOKENS_CPU, TOKENS_CUDA = 1024, 4096
"""tokens that go through the model together"""
Hook = Callable[[int, torch.Tensor], torch.Tensor | None]
Put = Callable[[int], tuple[np.ndarray, torch.Tensor]]
"""layer -> rows [m], and the values of their neurons at their first tokens [m, F]"""


@dataclass(frozen=True)
class Held:
    """The clean model on a prompt of T tokens and its target of t, from which every path starts."""

    keys: list[torch.Tensor]
    """of the first T - 1 tokens, [T - 1, K, D] a layer"""
    values: list[torch.Tensor]
    hidden: list[torch.Tensor]
    """residual stream of the tokens that predict the target, before each layer, [t, E]"""
    neurons: torch.Tensor
    """of the last prompt token, [L, F]"""
    targets: torch.Tensor
    """token ids, [t]"""


@contextmanager
def _on_down(model: torch.nn.Module, hook: Hook) -> Iterator[None]:
    """hook(layer, what W_down reads [n, w, F]) may return a replacement."""
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, at=at: hook(at, args[0]))
        for at, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hold(decoder: Decoder, example: Example) -> Held:
    """The clean model on an example."""
    before = len(example.prompt_ids) - 1
    sequence = np.concatenate([example.prompt_ids, example.target_ids]).astype(np.int64)
    ids = torch.from_numpy(sequence).to(decoder.device)
    stream = decoder.embed(ids[None, :-1])  # (1, T + t - 1, E)
    positions = torch.arange(stream.shape[1], device=decoder.device)[None]
    keys, values, hidden, neurons = [], [], [], []
    with _on_down(decoder.model, lambda _, found: neurons.append(found[0, before].to(decoder.device))):
        for layer in range(decoder.layers):
            hidden.append(stream[0, before:])
            cache = Cache(range(layer, layer + 1), 1, stream.shape[1], decoder.like)
            stream = decoder.extend(cache, stream, positions, stream.shape[1])
            keys.append(cache.keys[layer][0, :before])
            values.append(cache.values[layer][0, :before])
    return Held(keys, values, hidden, torch.stack(neurons), ids[before + 1 :])


def run(decoder: Decoder, held: Sequence[Held], of: np.ndarray, enters: np.ndarray, put: Put) -> torch.Tensor:
    """Loss of the target in each of n rows, [n].

    Tokens before a row's first one (the prompt's last) do not depend on the neurons that are set there, nor
    do the layers below the one that the row enters: these are the clean model's and are not computed. The
    tokens of all rows go through a layer together; only attention separates the examples.

    Args:
        of: each row's example, [n], sorted.
        enters: the layer that each row enters, [n], sorted within an example.
        put: the rows of a layer in which neurons are set, and their values.
    """
    width = np.array([len(example.targets) for example in held])[of]
    first = np.cumsum(width) - width  # each row's first token
    row = np.repeat(np.arange(len(of)), width)
    positions = (
        np.array([len(example.keys[0]) for example in held])[of][row] + np.arange(len(row)) - first[row]
    )
    like = held[0].hidden[0]
    every = decoder.positions(like, torch.from_numpy(positions)[None].to(decoder.device))
    tokens, hidden = np.zeros(0, int), like[:0]  # those in the layer, [T], and their residual stream

    def attend(index: int, heads: Heads) -> torch.Tensor:
        found, bounds = [], np.searchsorted(of[row[tokens]], np.arange(len(held) + 1))
        for example, start, stop in zip(held, bounds, bounds[1:], strict=False):
            if start < stop:
                own = (part[0, start:stop] for part in (heads.queries, heads.keys, heads.values))
                own = (part.unflatten(0, (-1, len(example.targets))) for part in own)  # (rows, t, H or K, D)
                queries, keys, values = own
                behind = replace(heads, queries=queries, keys=keys, values=values)
                found.append(mixed_behind(behind, example.keys[index], example.values[index]).flatten(0, 1))
        return torch.cat(found)[None]

    def hook(index, neurons):
        rows, values = put(index)
        if not len(rows):
            return None
        columns = torch.from_numpy(np.searchsorted(tokens, first[rows])).to(decoder.places[index])
        return neurons[0].index_copy(0, columns, values.to(decoder.places[index]))[None]

    with _on_down(decoder.model, hook):
        for place, layers in decoder.stretches(range(int(enters.min()), decoder.layers)):
            hidden, positions = hidden.to(place), every.to(place)
            for index in layers:
                entering = np.flatnonzero(enters == index)
                if len(entering):
                    own = torch.cat([held[of[number]].hidden[index] for number in entering])
                    tokens = np.concatenate([tokens, np.flatnonzero(enters[row] == index)])
                    order = np.argsort(tokens)
                    tokens, hidden = tokens[order], torch.cat([hidden, own.to(place)])[order]
                hidden = decoder.layer(index, hidden[None], positions.take(tokens), partial(attend, index))[0]
    logits = decoder.model.lm_head(decoder.model.model.norm(hidden.to(decoder.device)))  # (T, V)
    logits = finished(decoder.model, logits.to(torch.promote_types(logits.dtype, torch.float32)))
    targets = torch.cat([held[number].targets for number in of])
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    rows, counts = (torch.from_numpy(array).to(decoder.device) for array in (row, width))
    return each.new_zeros(len(of)).index_add(0, rows, each) / counts


def together(
    decoder: Decoder, held: Sequence[Held], starts: torch.Tensor, of: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paths from other neurons [N, L, F] to a prompt's own, all layers at once.

    Returns the losses at a point each of some examples' paths, [n], and their gradients in the neurons
    [n, L, F].
    """
    ends = torch.stack([example.neurons for example in held])
    path = _between(starts[of], ends[of], points).requires_grad_(True)
    every = np.arange(len(of))
    with torch.enable_grad():
        found = run(decoder, held, of, np.zeros(len(of), int), lambda layer: (every, path[:, layer]))
        (gradient,) = torch.autograd.grad(found.sum(), path)
    return _numbers(found), _numbers(gradient)


def apart(
    decoder: Decoder, held: Sequence[Held], of: np.ndarray, layers: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paths from zero to a prompt's own neurons of one layer, all other layers answering freely.

    Returns the losses at a point each of the paths of some examples and layers, [n], and their gradients in
    that layer's neurons [n, F].
    """
    ends = torch.stack([held[example].neurons[layer] for example, layer in zip(of, layers, strict=True)])
    path = _between(torch.zeros_like(ends), ends, points).requires_grad_(True)

    def put(layer: int) -> tuple[np.ndarray, torch.Tensor]:
        rows = np.flatnonzero(layers == layer)
        return rows, path[rows]

    with torch.enable_grad():
        found = run(decoder, held, of, layers, put)
        (gradient,) = torch.autograd.grad(found.sum(), path)
    return _numbers(found), _numbers(gradient)


def attribute_neurons(
    decoder: Decoder, examples: Sequence[Example], baselines: Sequence[Example] | None, steps: int
) -> Attribution:
    """See Backend.attribute_neurons."""
    check_attribution(examples, baselines, steps)
    limit = TOKENS_CUDA if decoder.device.type == "cuda" else TOKENS_CPU
    paths = decoder.layers if baselines is None else 1
    found: list[Integrals] = []
    rounding = torch.finfo(decoder.model.dtype).eps
    bar = progress(total=len(examples), desc="neurons", unit="row")
    for some in grouped(examples, paths, limit):
        held = [hold(decoder, examples[row]) for row in some]
        ends = torch.stack([example.neurons for example in held])
        starts = torch.zeros_like(ends)
        if baselines is not None:
            starts = torch.stack([hold(decoder, baselines[row]).neurons for row in some])
        length = _numbers(ends - starts)

        def evaluate(numbers, points, held=held, starts=starts, length=length):
            of, layers = np.divmod(numbers, paths)
            if baselines is not None:
                along, gradient = together(decoder, held, starts, of, points)
                return along, gradient * length[of]
            along, gradient = apart(decoder, held, of, layers, points)
            return along, gradient * length[of, layers]

        tokens = np.repeat([len(example.targets) for example in held], paths)
        found.append(integrate(evaluated(tokens, limit, evaluate), len(some), paths, steps, rounding))
        bar.update(len(some))
    bar.close()
    return attribution(examples, found)


def _between(start: torch.Tensor, end: torch.Tensor, points: np.ndarray) -> torch.Tensor:
    places = torch.from_numpy(points).to(end)
    return start + places.view(-1, *[1] * (end.dim() - 1)) * (end - start)


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
