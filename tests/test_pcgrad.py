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

from backends.base import Recipe
from backends.core.schedules import learning_rate
from backends.flax import tune as flax_tune
from backends.flax.tune import Trained
from backends.torch import tune as torch_tune
from tests import reference
from tests.conftest import ALL_HEADS, make_examples

RECIPE = Recipe(rank=4, alpha=8.0, lr=2e-2, batch=2, accumulation=2, max_length=64, seed=3)


def as_vector(tensors) -> np.ndarray:
    return np.concatenate([np.asarray(tensor, np.float64).ravel() for tensor in tensors])


def plain_pcgrad(alignment: np.ndarray, utility: np.ndarray, symmetric: bool) -> np.ndarray:
    """The step of two tasks' gradients, as Yu et al. 2020 write Alg. 1, in float64."""
    step = alignment - min(0.0, alignment @ utility) / (utility @ utility) * utility
    if not symmetric:
        return step
    return step + utility - min(0.0, alignment @ utility) / (alignment @ alignment) * alignment


MODULES = pytest.mark.parametrize("module", [torch_tune, flax_tune], ids=["torch", "flax"])


def trained(module, *parts: np.ndarray) -> Trained:
    as_tensor = torch.from_numpy if module is torch_tune else jnp.asarray
    return Trained(*(as_tensor(part.astype("f4")) for part in parts))


@pytest.mark.parametrize("symmetric", [False, True], ids=["pcgrad", "symmetric"])
@MODULES
def test_projection_leaves_no_conflict(module, symmetric):
    """Random gradients of all angles and lengths; the symmetric step is that of TorchJD's PCGrad too."""
    generator = np.random.default_rng(0)
    projections = 0
    for _ in range(50):
        shift = generator.normal() * generator.normal(size=17)  # together: anything from along to against
        alignment, utility = (
            10.0 ** generator.uniform(-4, 2) * (generator.normal(size=17) + sign * shift)
            for sign in (1, generator.choice([-1, 1]))
        )
        pair = [trained(module, line[:12].reshape(3, 4), line[12:]) for line in (alignment, utility)]
        alignment, utility = map(as_vector, pair)
        found, cos, projected = module.project(*pair, symmetric)
        found = as_vector(found)
        assert projected == (alignment @ utility < 0) == (cos < 0)
        lengths = np.linalg.norm(alignment), np.linalg.norm(utility)
        assert cos == pytest.approx(alignment @ utility / lengths[0] / lengths[1], abs=1e-9)
        apart = 1e-6 * sum(lengths)
        np.testing.assert_allclose(found, plain_pcgrad(alignment, utility, symmetric), rtol=0, atol=apart)
        assert found @ utility > -apart * lengths[1]
        if symmetric:
            torchjd = PCGrad()(torch.from_numpy(np.stack([alignment, utility]))).numpy()
            np.testing.assert_allclose(found, torchjd, rtol=0, atol=apart)
        elif not projected:
            np.testing.assert_array_equal(found, alignment)
        projections += projected
    assert 10 < projections < 40


@pytest.mark.parametrize("symmetric", [False, True], ids=["pcgrad", "symmetric"])
@MODULES
def test_a_zero_gradient_conflicts_with_nothing_and_nan_is_kept(module, symmetric):
    zero, unit, nan = (trained(module, *[np.array([value, 2 * value])] * 2) for value in (0.0, 1.0, math.nan))
    for pair in ((zero, unit), (unit, zero), (zero, zero)):
        step, cos, projected = module.project(*pair, symmetric)
        assert cos == 0 and not projected
        np.testing.assert_array_equal(as_vector(step), as_vector(pair[0]) + symmetric * as_vector(pair[1]))
    assert np.isnan(as_vector(module.project(unit, nan, symmetric)[0])).all(), "it would be lost"


@pytest.mark.parametrize("optimizer", ["sft", "pcgrad", "pcgrad-symmetric"])
def test_three_steps_are_adam_on_plainly_projected_gradients(own, models, optimizer):
    """Full batches of all heads, written out on PEFT's model; the rows of both are all that there are.

    Adam's first steps are signs: where a gradient is within rounding of zero they may go either way, and all
    that is known is how far they reach.
    """
    examples, utility = make_examples(4, seed=5), make_examples(4, seed=6)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, epochs=3)
    tuning = own.tune(examples, ALL_HEADS, recipe, utility)
    records = list(tuning)
    found = load_file(tuning.adapter / "adapter_model.safetensors")

    model = reference.lora(models["llama-gqa"], RECIPE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, weight_decay=0.0)
    sure, reach = [torch.ones_like(parameter, dtype=torch.bool) for parameter in parameters], 0.0
    for step, record in enumerate(records):
        losses = [reference.mean_loss(model, rows) for rows in (examples, utility)]
        assert record["loss"] == pytest.approx(losses[0].item(), rel=1e-4 if step else 1e-5)
        gradient, against = (as_vector(torch.autograd.grad(loss, parameters)) for loss in losses)
        if optimizer != "sft":
            assert record["util_loss"] == pytest.approx(losses[1].item(), rel=1e-4)
            assert record["projected"] == (gradient @ against < 0)
            gradient = plain_pcgrad(gradient, against, optimizer == "pcgrad-symmetric")
        parts = torch.from_numpy(gradient).float().split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        for own, parameter in zip(sure, parameters, strict=True):
            size = parameter.grad.abs()
            own &= (size == 0) | (size > 1e-3 * size.max())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.param_groups[0]["lr"] = learning_rate(step, 3, RECIPE)
        reach += 2 * adam.param_groups[0]["lr"]
        adam.step()
    assert any(record["projected"] for record in records) == (optimizer != "sft")
    expected = peft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    names = [name.replace(".default", "") for name, own in model.named_parameters() if own.requires_grad]
    assert sum(own.sum() for own in sure) > 0.97 * sum(own.numel() for own in sure)
    for name, own in zip(names, sure, strict=True):
        torch.testing.assert_close(found[name][own], expected[name][own], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=reach)
