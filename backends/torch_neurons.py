"""NeuronTune's attribution: integrated gradients of MLP neurons along a path of activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from backends.errors import InputError
from backends.neurons import Attribution, blocks, check_attribution, integrate
from backends.progress import progress
from backends.torch_decoder import Cache, Decoder
from data.examples import Example

ROWS_CPU, ROWS_CUDA = 128, 1024
"""points of paths that go through the model together, where each layer has a path of its own"""
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
    like = decoder.like.to(stream.dtype)
    keys, values, hidden, neurons = [], [], [], []
    with _on_down(decoder.model, lambda _, found: neurons.append(found[0, before])):
        for layer in range(decoder.layers):
            hidden.append(stream[0, before:])
            cache = Cache(range(layer, layer + 1), 1, stream.shape[1], like)
            stream = decoder.extend(cache, stream, positions)
            keys.append(cache.keys[layer][0, :before])
            values.append(cache.values[layer][0, :before])
    return Held(keys, values, hidden, torch.stack(neurons), ids[before + 1 :])


def losses(decoder: Decoder, held: Held, start: int, points: int, put: Hook) -> torch.Tensor:
    """Loss of the target in each of `points` rows, [n], from layer `start` up.

    Args:
        put: sets what W_down reads at a row's first token, the prompt's last. What stands before it does not
            know of it, nor do the layers below `start`.
    """
    before, count = len(held.keys[0]), len(held.targets)
    cache = Cache(range(start, decoder.layers), points, before + count, decoder.like.to(held.neurons.dtype))
    for layer in cache.layers:
        cache.fill(layer, slice(None), held.keys[layer][None], held.values[layer][None])
    positions = torch.arange(before, before + count, device=decoder.device).expand(points, -1)
    with _on_down(decoder.model, put):
        hidden = decoder.extend(cache, held.hidden[start].expand(points, -1, -1), positions)
    logits = decoder.model.lm_head(decoder.model.model.norm(hidden))  # (n, t, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, held.targets.repeat(points), reduction="none")
    return each.unflatten(0, (points, -1)).mean(dim=1)


def together(decoder: Decoder, held: Held, start: torch.Tensor, points: torch.Tensor) -> tuple:
    """The path from other neurons [L, F] to the prompt's own, all layers at once.

    Returns the losses at `points` of it [n] and their gradients in the neurons [L, n, F].
    """
    path = (start[:, None] + points[:, None] * (held.neurons - start)[:, None]).requires_grad_(True)

    def put(layer: int, neurons: torch.Tensor) -> torch.Tensor:
        return torch.cat([path[layer][:, None], neurons[:, 1:]], dim=1)

    with torch.enable_grad():
        found = losses(decoder, held, 0, len(points), put)
        (gradient,) = torch.autograd.grad(found.sum(), path)
    return found.detach(), gradient


def apart(decoder: Decoder, held: Held, points: torch.Tensor, layers: list[int]) -> tuple:
    """A path from zero to the prompt's own neurons for each of some layers, all others answering freely.

    Returns the losses at `points` of each [l, n] and their gradients in that layer's neurons [l, n, F].
    """
    path = (points[:, None] * held.neurons[layers, None]).requires_grad_(True)  # (l, n, F)
    size = len(points)

    def put(layer: int, neurons: torch.Tensor) -> torch.Tensor | None:
        if layer not in layers:
            return None
        own = layers.index(layer) * size
        first = torch.cat([neurons[:own, 0], path[layers.index(layer)], neurons[own + size :, 0]])
        return torch.cat([first[:, None], neurons[:, 1:]], dim=1)

    with torch.enable_grad():
        found = losses(decoder, held, layers[0], len(layers) * size, put)
        (gradient,) = torch.autograd.grad(found.sum(), path)
    return found.detach().unflatten(0, (len(layers), size)), gradient


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
        length = (held.neurons - start).double().cpu().numpy()

        def evaluate(paths, points, held=held, start=start, length=length):
            places = torch.from_numpy(points).to(held.neurons)
            if baselines is not None:
                along, gradient = together(decoder, held, start, places)
                return _numbers(along)[None], _numbers(gradient).swapaxes(0, 1)[None] * length
            size = rows // (len(points) * len(held.targets))
            found = [apart(decoder, held, places, some) for some in blocks(paths, size)]
            along, gradient = (_numbers(torch.cat(each)) for each in zip(*found, strict=True))
            return along, gradient * length[paths, None]

        found, *sums = integrate(evaluate, decoder.layers if baselines is None else 1, steps)
        own = np.concatenate(found).reshape(length.shape)
        if not np.isfinite(own).all():
            where = example.example_id
            raise InputError(f"the attribution on {where} is not finite: try --dtype float32")
        score = score + np.abs(own) / len(examples)
        total.append(sums[0])
        change.append(sums[1])
    return Attribution(score, np.array(total), np.array(change))


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
