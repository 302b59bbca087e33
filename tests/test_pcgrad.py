"""PCGrad in both backends: against the formula written out, TorchJD's aggregator, and by what it promises."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torchjd.aggregation import PCGrad

from backends import flax_tune, torch_tune
from backends.base import Recipe, learning_rate
from backends.flax_tune import Trained
from tests import reference
from tests.conftest import HEADS, LAYERS, make_examples

RECIPE = Recipe(rank=4, alpha=8.0, lr=2e-2, batch=2, accumulation=2, max_length=64, seed=3)
CHOSEN = [(0, 1), (2, 0), (2, 3)]


def as_vector(tensors) -> np.ndarray:
    return np.concatenate([np.asarray(tensor, np.float64).ravel() for tensor in tensors])


def plain_pcgrad(one: np.ndarray, other: np.ndarray, symmetric: bool) -> np.ndarray:
    """The step of two tasks' gradients, as Yu et al. 2020 write Alg. 1, in float64."""
    step = one - min(0.0, one @ other) / (other @ other) * other
    return step + other - min(0.0, one @ other) / (one @ one) * one if symmetric else step


@pytest.mark.parametrize("symmetric", [False, True], ids=["pcgrad", "symmetric"])
@pytest.mark.parametrize("module", [torch_tune, flax_tune], ids=["torch", "flax"])
def test_projection_leaves_no_conflict(module, symmetric):
    """Random gradients of all angles and lengths; the symmetric step is that of TorchJD's PCGrad too."""
    as_tensors = torch.from_numpy if module is torch_tune else jnp.asarray
    generator = np.random.default_rng(0)
    projections = 0
    for _ in range(50):
        shift = generator.normal() * generator.normal(size=17)  # together: anything from along to against
        one, other = (
            10.0 ** generator.uniform(-4, 2) * (generator.normal(size=17) + sign * shift)
            for sign in (1, generator.choice([-1, 1]))
        )
        pair = [
            Trained(*(as_tensors(part.astype("f4")) for part in (line[:12].reshape(3, 4), line[12:])))
            for line in (one, other)
        ]
        one, other = map(as_vector, pair)
        found, cos, projected = module.project(*pair, symmetric)
        found = as_vector(found)
        assert projected == (one @ other < 0) == (cos < 0)
        assert cos == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-9)
        apart = 1e-6 * (np.linalg.norm(one) + np.linalg.norm(other))
        np.testing.assert_allclose(found, plain_pcgrad(one, other, symmetric), rtol=0, atol=apart)
        assert found @ other > -apart * np.linalg.norm(other)
        if symmetric:
            assert found @ one > -apart * np.linalg.norm(one)
            torchjd = PCGrad()(torch.from_numpy(np.stack([one, other]))).numpy()
            np.testing.assert_allclose(found, torchjd, rtol=0, atol=apart)
        elif not projected:
            np.testing.assert_array_equal(found, one)
        projections += projected
    assert 10 < projections < 40


@pytest.mark.parametrize("module", [torch_tune, flax_tune], ids=["torch", "flax"])
def test_a_zero_gradient_conflicts_with_nothing_and_nan_is_kept(module):
    as_tensors = torch.tensor if module is torch_tune else jnp.asarray
    zero, one, nan = (
        Trained(*(as_tensors([value, 2 * value]) for _ in range(2))) for value in (0.0, 1.0, math.nan)
    )
    for symmetric in (False, True):
        for pair in ((zero, one), (one, zero), (zero, zero)):
            step, cos, projected = module.project(*pair, symmetric)
            assert cos == 0 and not projected
            expected = as_vector(pair[0]) + symmetric * as_vector(pair[1])
            np.testing.assert_array_equal(as_vector(step), expected)
        assert np.isnan(as_vector(module.project(one, nan, symmetric)[0])).all(), "it would go unnoticed"


@pytest.mark.parametrize("optimizer", ["pcgrad", "pcgrad-symmetric"])
def test_steps_never_conflict_with_the_utility_gradient(own, monkeypatch, optimizer):
    """The gradients of real steps, over random rows and heads; A and B both move from the second step on."""
    module = torch_tune if own.name == "torch" else flax_tune
    project, seen = module.project, []

    def watched(gradients, against, symmetric):
        step, cos, projected = project(gradients, against, symmetric)
        seen.append([as_vector(one) for one in (gradients, against, step)])
        return step, cos, projected

    monkeypatch.setattr(module, "project", watched)
    symmetric = optimizer == "pcgrad-symmetric"
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    generator = np.random.default_rng(0)
    records = []
    for case in range(8):
        heads = [every[at] for at in generator.choice(len(every), 1 + case, replace=False)]
        rows = make_examples(8, seed=case), heads, dataclasses.replace(RECIPE, optimizer=optimizer, epochs=2)
        records += own.tune(*rows, make_examples(6, seed=100 + case))
    assert len(seen) == len(records) == 32
    for (one, other, step), record in zip(seen, records, strict=True):
        lengths = np.linalg.norm(one), np.linalg.norm(other)
        assert min(lengths) > 0
        assert step @ other >= -1e-6 * sum(lengths) * lengths[1]
        assert record["projected"] == (one @ other < 0)
        assert record["cos"] == pytest.approx(one @ other / lengths[0] / lengths[1], abs=1e-6)
        np.testing.assert_allclose(step, plain_pcgrad(one, other, symmetric), atol=1e-6 * sum(lengths))
        if symmetric:
            assert step @ one >= -1e-6 * sum(lengths) * lengths[0]
            torchjd = PCGrad()(torch.from_numpy(np.stack([one, other]))).numpy()
            np.testing.assert_allclose(step, torchjd, rtol=0, atol=1e-6 * sum(lengths))
        elif not record["projected"]:
            np.testing.assert_array_equal(step, one)
    assert 4 < sum(record["projected"] for record in records) < 28


@pytest.mark.parametrize("optimizer", ["pcgrad", "pcgrad-symmetric"])
def test_three_steps_are_adam_on_plainly_projected_gradients(own, models, optimizer):
    """Full batches of all heads, written out on PEFT's model; the rows of both are all that there are."""
    examples, utility = make_examples(4, seed=5), make_examples(4, seed=6)
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    tuning = own.tune(examples, heads, dataclasses.replace(RECIPE, optimizer=optimizer, epochs=3), utility)
    records = list(tuning)
    found = load_file(tuning.adapter / "adapter_model.safetensors")

    model = reference.lora(models["llama-gqa"], RECIPE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, record in enumerate(records):
        gradients = []
        for rows in (examples, utility):
            loss = torch.stack([reference.loss(model, example) for example in rows]).mean()
            gradients.append(as_vector(torch.autograd.grad(loss, parameters)))
        assert record["util_loss"] == pytest.approx(loss.item(), rel=1e-4)
        one, other = gradients
        assert record["projected"] == (one @ other < 0)
        gradient = torch.from_numpy(plain_pcgrad(one, other, optimizer == "pcgrad-symmetric")).float()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.param_groups[0]["lr"] = learning_rate(step, 3, RECIPE)
        adam.step()
    assert any(record["projected"] for record in records), "a case without conflict shows nothing"
    expected = peft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["pcgrad", "pcgrad-symmetric"])
def test_pcgrad_tunes_and_records_the_conflict(own, optimizer):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    records = list(own.tune(make_examples(16, seed=4), CHOSEN, recipe, make_examples(6, seed=9)))
    assert all(-1 <= record["cos"] <= 1 and record["util_loss"] > 0 for record in records)
    assert all(record["projected"] == (record["cos"] < 0) for record in records)


def test_utility_rows_are_never_cut(own):
    """max_length is of alignment rows: D_util has short targets that come last."""
    examples, long = make_examples(4, seed=9), make_examples(3, seed=10)
    long = [dataclasses.replace(one, prompt_ids=np.tile(one.prompt_ids, 4)) for one in long]
    limit = max(len(one.prompt_ids) + len(one.target_ids) for one in examples)
    assert min(len(one.prompt_ids) for one in long) > limit
    recipe = dataclasses.replace(RECIPE, optimizer="pcgrad", max_length=limit)
    records = list(own.tune(examples, CHOSEN, recipe, long))
    assert records and all(math.isfinite(record["util_loss"]) for record in records)
    free = list(own.tune(examples, CHOSEN, dataclasses.replace(recipe, max_length=10 * limit), long))
    assert records == free
