"""NeuronTune's attributions in both backends: against plain autograd, and by completeness."""

import contextlib

import numpy as np
import pytest
import torch

from backends.core.errors import InputError
from backends.core.integration import COMPLETE, NODES, integrate, quadrature
from backends.flax import neurons as flax_neurons
from tests import reference
from tests.conftest import LAYERS, make_examples


def plain_loss(model, example, put) -> torch.Tensor:
    """Loss with hooks that set neurons at the last prompt token: put(layer, what W_down reads there)."""
    at = len(example.prompt_ids) - 1

    def hook(layer: int):
        def replaced(_, args):
            neurons = args[0].clone()
            neurons[:, at] = put(layer, neurons[:, at])
            return neurons

        return replaced

    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):
            hooks.callback(layer.mlp.down_proj.register_forward_pre_hook(hook(number)).remove)
        return reference.loss(model, example)


@torch.no_grad()
def plain_neurons(model, example) -> torch.Tensor:
    found = []
    plain_loss(model, example, lambda _, neurons: found.append(neurons[0].clone()) or neurons)
    return torch.stack(found)


def plain_attribution(model, example, start, steps) -> np.ndarray:
    """[L, F], one point after another on the whole sequence: each layer on its own path from zero, or all
    together from a start."""
    end = plain_neurons(model, example)
    apart = [[layer] for layer in range(len(end))] if start is None else [range(len(end))]
    start = torch.zeros_like(end) if start is None else start
    total = torch.zeros_like(end)
    for node, weight in zip(*quadrature(steps), strict=True):
        for moved in apart:
            path = (start + float(node) * (end - start)).requires_grad_(True)

            def put(layer, own, path=path, moved=moved):
                return path[layer][None] if layer in moved else own

            (gradient,) = torch.autograd.grad(plain_loss(model, example, put), path)
            total += float(weight) * gradient
    return ((end - start) * total).abs().double().numpy()


def test_attributions_are_those_of_plain_loops(pair):
    """So both backends attribute alike; both in float32, against float64."""
    examples, others = make_examples(2, seed=1), make_examples(2, seed=5)
    if pair.backend.shape.mlp_dim is None:
        with pytest.raises(InputError, match="NeuronTune needs a down_proj"):
            pair.backend.attribute_neurons(examples)
        return
    with reference.doubled(pair.plain) as model:
        starts = [plain_neurons(model, example) for example in others]
        expected = [
            np.mean([plain_attribution(model, *row, 3) for row in zip(examples, each, strict=True)], axis=0)
            for each in ([None, None], starts)
        ]
    for baselines, wanted in zip((None, others), expected, strict=True):
        found = pair.backend.attribute_neurons(examples, baselines, steps=3).score
        assert found.shape == (LAYERS, pair.backend.shape.mlp_dim) and found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * wanted.max())
        assert (wanted > 1e-4 * wanted.max()).mean() > 0.5, "most neurons must count"


def test_attributions_are_complete(gqa):
    """They sum to what the loss changes along the path, and leave nothing behind."""
    own, examples = gqa.backend, make_examples(3, seed=2)
    before = own.logits(examples)
    for baselines, paths in ((None, LAYERS), (make_examples(3, seed=7), 1)):
        found = own.attribute_neurons(examples, baselines, steps=64)
        assert found.total.shape == found.change.shape == (3, paths)
        assert np.abs(found.change).max() > 1e-2, "the loss must change"
        assert found.gap < 0.01
        np.testing.assert_allclose(found.total, found.change, atol=0.01 * np.abs(found.change).max())
    nowhere = own.attribute_neurons(examples, examples, steps=2)
    assert nowhere.score.max() == 0 and nowhere.gap == 0
    np.testing.assert_array_equal(own.logits(examples), before)


def test_quadrature_is_exact_on_polynomials():
    nodes, weights = quadrature(4)
    for power in range(8):
        assert weights @ nodes**power == pytest.approx(1 / (power + 1), rel=1e-12)


def test_a_path_gets_more_nodes_until_it_is_complete():
    """Two easy paths and one with a step near its start, which no rule of 64 nodes over the whole finds."""
    calls = []

    def evaluate(paths, points):
        calls.append(np.bincount(paths, minlength=3))
        steep = np.array([0.5, 0.5, 2000.0])[paths]
        along = np.tanh(steep * points) + 1 - np.tanh(steep)  # 1 at the end of each
        return along, (steep / np.cosh(np.minimum(steep * points, 50)) ** 2)[..., None]

    nodes, weights = quadrature(64)
    assert abs(weights @ evaluate(np.full(64, 2), nodes)[1][:, 0] - 1) > 0.1
    calls.clear()
    own, total, change = integrate(evaluate, 1, 3, 64)
    assert calls[0].tolist() == [NODES + 2, NODES + 1, NODES + 1]
    assert all(rows[:2].sum() == 0 for rows in calls[1:])
    assert NODES * len(calls) <= 64, "a piece more each time"
    np.testing.assert_allclose(total, change, atol=2 * COMPLETE)
    np.testing.assert_allclose(own[0, :, 0], np.tanh([0.5, 0.5, 2000.0]), atol=2 * COMPLETE)
    pieces = flax_neurons.integrate(evaluate, 3, 64, 0.0)  # written anew, the same nodes
    again = [sum(piece.own for piece in pieces if piece.path == path) for path in range(3)]
    np.testing.assert_allclose(again, own[0], rtol=1e-9)
    calls.clear()
    apart, _, _ = integrate(evaluate, 3, 1, 64)  # of three examples each to its own accuracy
    assert calls[0].tolist() == [NODES + 2] * 3
    np.testing.assert_array_equal(apart[2, 0], own[0, 2])


def test_rounding_is_no_reason_for_more_nodes():
    """A loss that rises by 1.01 in numbers of eight bits, whose last digit is more than COMPLETE of it."""
    calls = []

    def evaluate(paths, points):
        calls.append(len(points))
        rounded = torch.from_numpy(5.01 + 1.01 * points).bfloat16().double().numpy()
        return rounded, np.full((len(points), 1), 1.01)

    integrate(evaluate, 1, 1, 64, rounding=torch.finfo(torch.bfloat16).eps)
    assert calls == [NODES + 2]
    integrate(evaluate, 1, 1, 64)
    assert sum(calls[1:]) > 32
