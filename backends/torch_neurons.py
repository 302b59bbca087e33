"""NeuronTune's attribution: integrated gradients of MLP neurons along a path of activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from backends.errors import InputError
from backends.neurons import Attribution, check_attribution, evaluated, integrate
from backends.progress import progress
from backends.torch_decoder import Cache, Decoder, to
from data.examples import Example

ROWS_CPU, ROWS_CUDA = 256, 1024
"""tokens that go through the model together"""
Hook = Callable[[int, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Held:
    """The clean model on a prompt of T tokens and its target of t: what every path through it starts from."""

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
    """hook(layer, what W_down reads [n, w, F]) may return something else for it to read."""
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
            stream = decoder.extend(cache, stream, positions)
            keys.append(cache.keys[layer][0, :before])
            values.append(cache.values[layer][0, :before])
    return Held(keys, values, hidden, torch.stack(neurons), ids[before + 1 :])


def run(decoder: Decoder, held: Held, enters: Sequence[int], put: Hook) -> torch.Tensor:
    """Loss of the target in each of n rows, [n].

    What stands before a row's first token, the prompt's last, knows nothing of it, and neither do the layers
    below the one where its neurons are set: there a row is the clean model, and is not computed.

    Args:
        enters: the layer that each row enters, [n], sorted.
        put: sets what W_down reads at a row's first token.
    """
    before, count = len(held.keys[0]), len(held.targets)
    hidden = held.hidden[0][None][:0]  # (0, t, E)
    positions = torch.arange(before, before + count, device=decoder.device)[None]
    turns = decoder.rotary(hidden, positions)

    def attend(index, queries, keys, values):
        return decoder.attend_behind(index, queries, (held.keys[index], held.values[index]), (keys, values))

    with _on_down(decoder.model, put):
        for place, layers in decoder.stretches(range(enters[0], decoder.layers)):
            hidden, rotary = hidden.to(place), to(turns, place)
            for index in layers:
                if new := enters.count(index):
                    entering = held.hidden[index].to(place)
                    hidden = torch.cat([hidden, entering.expand(new, -1, -1)])
                hidden = decoder.layer(index, hidden, rotary, attend)
        hidden = hidden.to(decoder.device)
    logits = decoder.model.lm_head(decoder.model.model.norm(hidden))  # (n, t, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, held.targets.repeat(len(hidden)), reduction="none")
    return each.unflatten(0, (len(hidden), -1)).mean(dim=1)


def together(decoder: Decoder, held: Held, start: torch.Tensor, points: np.ndarray) -> tuple:
    """The path from other neurons [L, F] to the prompt's own, all layers at once.

    Returns the losses at `points` of it [n] and their gradients in the neurons [n, L, F].
    """
    places = torch.from_numpy(points).to(start)[:, None, None]
    path = (start + places * (held.neurons - start)).requires_grad_(True)

    def put(layer: int, neurons: torch.Tensor) -> torch.Tensor:
        own = path[:, layer, None].to(decoder.places[layer])
        return torch.cat([own, neurons[:, 1:]], dim=1)

    with torch.enable_grad():
        found = run(decoder, held, [0] * len(points), put)
        (gradient,) = torch.autograd.grad(found.sum(), path)
    return _numbers(found), _numbers(gradient)


def apart(decoder: Decoder, held: Held, layers: np.ndarray, points: np.ndarray) -> tuple:
    """Paths from zero to the prompt's own neurons of one layer, all other layers answering freely.

    Returns the losses at a point each of some layers' paths, [n], and their gradients in that layer's neurons
    [n, F]. `layers` [n] is sorted.
    """
    places = torch.from_numpy(points).to(held.neurons)[:, None]
    path = (places * held.neurons[layers]).requires_grad_(True)

    def put(layer: int, neurons: torch.Tensor) -> torch.Tensor | None:
        low, high = np.searchsorted(layers, [layer, layer + 1])
        if low == high:
            return None
        assert high == len(neurons), "rows that enter a layer come last"
        first = torch.cat([neurons[:low, 0], path[low:high].to(decoder.places[layer])])
        return torch.cat([first[:, None], neurons[:, 1:]], dim=1)

    with torch.enable_grad():
        found = run(decoder, held, layers.tolist(), put)
        (gradient,) = torch.autograd.grad(found.sum(), path)
    return _numbers(found), _numbers(gradient)


def attribute(
    decoder: Decoder, examples: Sequence[Example], baselines: Sequence[Example] | None, steps: int
) -> Attribution:
    """See Backend.attribute_neurons."""
    check_attribution(examples, baselines, steps)
    rows = ROWS_CUDA if decoder.device.type == "cuda" else ROWS_CPU
    score, total, change = 0.0, [], []
    for number, example in enumerate(progress(examples, desc="neurons", unit="row")):
        held = hold(decoder, example)
        start = torch.zeros_like(held.neurons)
        if baselines is not None:
            start = hold(decoder, baselines[number]).neurons
        length = _numbers(held.neurons - start)

        def evaluate(paths, points, held=held, start=start, length=length):
            if baselines is not None:
                along, gradient = together(decoder, held, start, points)
                return along, gradient * length
            along, gradient = apart(decoder, held, paths, points)
            return along, gradient * length[paths]

        own, *sums = integrate(
            evaluated(max(1, rows // len(held.targets)), evaluate),
            decoder.layers if baselines is None else 1,
            steps,
        )
        own = np.concatenate(own).reshape(length.shape)
        if not np.isfinite(own).all():
            where = example.example_id
            raise InputError(f"the attribution on {where} is not finite: try --dtype float32")
        score = score + np.abs(own) / len(examples)
        total.append(sums[0])
        change.append(sums[1])
    return Attribution(score, np.array(total), np.array(change))


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
