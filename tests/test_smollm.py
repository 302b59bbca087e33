"""The embedded model in float32: the fast paths against the plain ones, and the default data's base rates."""

import numpy as np
import pytest
import torch

import backends
from backends import models as folders
from backends.base import Recipe
from backends.core import packing
from backends.torch import continuous
from backends.torch import loss as torch_loss
from data.embedded import generate as embedded
from data.rendering import Renderer, example
from stages.method import gradients, metrics
from tests import reference
from tests.conftest import assert_same, optimized


@pytest.fixture(scope="module")
def real(smollm):
    return backends.load("torch", smollm, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def flax(smollm):
    with optimized():
        yield backends.load("flax", smollm, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rows(smollm):
    renderer = Renderer(folders.load_tokenizer(smollm), "26 Jul 2024")

    def of(role, count):
        return [example(renderer.row(record)) for record in embedded.records(role)[:count]]

    return of


def test_generation_is_transformers_generate(real, rows):
    prompts = rows("safe", 4)
    expected = [reference.generate(real.model.model, prompt, 12) for prompt in prompts]
    assert_same(real.generate(prompts, 12), expected)


def test_continuous_batching_says_the_same(real, rows):
    """As on CUDA: few rows side by side, prompts cut, one response ending while others go on."""
    prompts = rows("safe", 4) + rows("facts", 2)
    found = continuous.generate(real.model.model, prompts, 24, real.model.eos)
    assert len({len(tokens) for tokens in found}) > 1, "all of one length"
    assert_same(found, real.generate(prompts, 24))


def test_rows_as_a_line_lose_what_they_lose_alone(real, rows, monkeypatch):
    examples = rows("safe", 8)
    sequences, _ = packing.training_rows(examples)
    assert len(packing.join(sequences, 0).ids) < 0.75 * sum(map(len, sequences))
    with torch.no_grad():
        line = torch_loss.example_losses(real.model.model, examples)
        monkeypatch.setattr(torch_loss, "_line_pays", lambda *_: False)
        torch.testing.assert_close(
            line, torch_loss.example_losses(real.model.model, examples), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("head", [(0, 4), (14, 7), (29, 0)])
def test_a_ablated_head_answers_as_in_the_plain_loop(real, rows, head):
    util, safe = rows("util", 8), rows("safe", 3)
    ((_, predicted),) = real.sweep_choices(util, [head])
    ((_, generated),) = real.sweep_generations(safe, [head], 8)
    with reference.ablated(real.model.model, *head):
        expected = [reference.choice(real.model.model, row) for row in util]
        np.testing.assert_array_equal(predicted, expected)
        assert_same(generated, [reference.generate(real.model.model, example, 8) for example in safe])


def test_gradient_of_a_head_is_autograds(real, rows):
    safe, util = rows("safe", 2), rows("util", 2)
    found = real.gradient_gram(safe, util, folds=1)
    weight = real.model.model.model.layers[7].self_attn.q_proj.weight.requires_grad_(True)
    gradients = []
    for examples in (safe, util):
        losses = [reference.loss(real.model.model, example) for example in examples]
        (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
        gradients.append(gradient[3 * 64 : 4 * 64].flatten().double())
    weight.requires_grad_(False)
    stacked = torch.stack(gradients)
    np.testing.assert_allclose(found[7, 3], (stacked @ stacked.T).numpy(), atol=2e-4 * found[7, 3].max())


def test_base_accuracy_leaves_room_both_ways(real, rows):
    """Between 0.5 and 0.95 on at least 200 held-out rows, so that a loss can be seen."""
    for role in ("facts", "words"):
        examples = rows(role, 200)
        assert len(examples) == 200
        prediction, probability = real.choices(examples)
        accuracy = np.mean(
            [predicted == example.answer for predicted, example in zip(prediction, examples, strict=True)]
        )
        assert 0.5 <= accuracy <= 0.95, (role, accuracy)
        assert (probability > 0).all() and (probability <= 1 + 1e-6).all()


# torch and Flax


def test_conflicts_agree_on_every_head(real, flax, rows):
    safe, util = rows("safe", 4), rows("util", 4)
    found = [backend.gradient_gram(safe, util, folds=2) for backend in (real, flax)]
    conflicts = [metrics.optimization_conflict(*gradients.conflict_from_gram(gram, 2)) for gram in found]
    np.testing.assert_allclose(*conflicts, rtol=0, atol=1e-5)
    assert np.ptp(conflicts[0]) > 0.5, "heads must differ"


@pytest.mark.parametrize("head", [None, (14, 7)])
def test_logits_agree(real, flax, rows, head):
    prompts = rows("util", 6)
    left, right = (backend.logits(prompts, ablated=head) for backend in (real, flax))
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(left).max())


@pytest.mark.long
def test_choices_and_generations_agree_also_with_heads_ablated(real, flax, rows):
    util, safe = rows("util", 64), rows("safe", 6)
    np.testing.assert_array_equal(real.choices(util)[0], flax.choices(util)[0])
    assert_same(real.generate(safe, 16), flax.generate(safe, 16))
    heads, changed = [(3, 2), (3, 5), (21, 0)], 0
    clean = real.choices(util[:16])[0]
    sweeps = (backend.sweep_choices(util[:16], heads) for backend in (real, flax))
    for (_, left), (_, right) in zip(*sweeps, strict=True):
        np.testing.assert_array_equal(left, right)
        changed += (left != clean).sum()
    sweeps = (backend.sweep_generations(safe, heads, 12) for backend in (real, flax))
    for (_, left), (_, right) in zip(*sweeps, strict=True):
        assert_same(left, right)
    assert changed, "an ablated head must change a choice"


@pytest.mark.long
def test_tuning_agrees(real, flax, rows):
    examples = rows("vanilla_harmful", 8)
    recipe = Recipe(rank=8, alpha=8.0, lr=1e-3, batch=4, accumulation=1)
    runs = [backend.tune(examples, [(4, 1), (20, 6)], recipe) for backend in (real, flax)]
    losses = [[step["loss"] for step in run] for run in runs]
    # Without AVX512 torch's float32 is 1.4e-5 off the first loss, 3.47, in float64 (Flax's 1e-6).
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    answers = [real.logits(examples, run.adapter) for run in runs]
    moved = np.abs(answers[0] - real.logits(examples)).max()
    assert np.abs(answers[0] - answers[1]).max() < 1e-2 * moved


# NeuronTune


def pair(rows):
    """A request inside an attack, and plainly."""
    (attacked,) = rows("attacked", 1)
    name = attacked.example_id.removeprefix("embedded/attacked/")
    return attacked, next(row for row in rows("plain", 200) if row.example_id.endswith(f"/{name}"))


@pytest.mark.long
def test_attributions_are_complete(real, rows):
    """Within 2 % at 64 steps: safety on its way from the plain request, utility from zero."""
    attacked, plain = pair(rows)
    for found in (
        real.attribute_neurons([attacked], [plain], 64),
        real.attribute_neurons(rows("util", 1), None, 64),
    ):
        assert found.score.shape == (30, 1536) and np.abs(found.change).max() > 1e-3
        assert found.gap < 0.02


@pytest.mark.long
def test_attributions_agree(real, flax, rows):
    """Rounding of float32, which a single row shows most: 1e-4 of the largest score."""
    attacked, plain = pair(rows)
    for arguments in (([attacked], [plain], 4), (rows("util", 1), None, 4)):
        left, right = (backend.attribute_neurons(*arguments).score for backend in (real, flax))
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-4 * left.max())
        best = [set(np.argsort(-scores.ravel(), kind="stable")[:256].tolist()) for scores in (left, right)]
        assert len(best[0] & best[1]) >= 254
