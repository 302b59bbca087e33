"""The embedded model in float32: the fast paths against the plain ones, and the default data's base rates."""

import numpy as np
import pytest

import backends
from backends import models as folders
from backends.base import Recipe
from backends.torch import generate
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


def test_generation_is_transformers_generate(real, rows, monkeypatch):
    """Also where few rows go side by side and one that ends makes room for the next prompt."""
    prompts = rows("safe", 4) + rows("facts", 2)
    expected = reference.generate(real.model.model, prompts, 24)
    assert len({len(tokens) for tokens in expected}) > 1, "all of one length"
    assert_same(real.generate(prompts, 24), expected)
    monkeypatch.setattr(generate, "ROWS_CPU", 2)
    assert_same(real.generate(prompts, 24), expected)


def test_ablated_heads_answer_as_in_the_plain_loop(real, rows):
    util, safe, heads = rows("util", 8), rows("safe", 3), [(0, 4), (14, 7), (29, 0)]
    chosen, responses = real.sweep_choices(util, heads), real.sweep_generations(safe, heads, 8)
    for (head, predicted), (_, generated) in zip(chosen, responses, strict=True):
        with reference.ablated(real.model.model, *head):
            np.testing.assert_array_equal(predicted, reference.choices(real.model.model, util))
            assert_same(generated, reference.generate(real.model.model, safe, 8))


def test_base_accuracy_leaves_room_both_ways(real, rows):
    """Between 0.5 and 0.95 on at least 200 held-out rows, so that a loss can be seen."""
    for role in ("facts", "words"):
        examples = rows(role, 200)
        assert len(examples) == 200
        prediction, probability = real.choices(examples)
        accuracy = np.mean(prediction == [example.answer for example in examples])
        assert 0.5 <= accuracy <= 0.95, (role, accuracy)
        assert (probability > 0).all() and (probability <= 1 + 1e-6).all()


# torch and Flax


def test_conflicts_and_logits_agree_on_every_head(real, flax, rows):
    safe, util = rows("safe", 4), rows("util", 4)
    found = [backend.gradient_gram(safe, util, folds=2) for backend in (real, flax)]
    conflicts = [metrics.optimization_conflict(*gradients.conflict_from_gram(gram, 2)) for gram in found]
    np.testing.assert_allclose(*conflicts, rtol=0, atol=1e-5)
    assert np.ptp(conflicts[0]) > 0.5, "heads must differ"
    for head in (None, (14, 7)):
        left, right = (backend.logits(util, ablated=head) for backend in (real, flax))
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(left).max())


@pytest.mark.long
def test_choices_and_generations_agree_also_with_heads_ablated(real, flax, rows):
    util, safe = rows("util", 64), rows("safe", 6)
    heads, both = [(3, 2), (3, 5), (21, 0)], (real, flax)
    np.testing.assert_array_equal(*(backend.choices(util)[0] for backend in both))
    assert_same(*(backend.generate(safe, 16) for backend in both))
    left, right = ([found for _, found in backend.sweep_choices(util[:16], heads)] for backend in both)
    np.testing.assert_array_equal(left, right)
    assert (left != real.choices(util[:16])[0]).any(), "an ablated head must change a choice"
    for (_, one), (_, other) in zip(
        *(backend.sweep_generations(safe, heads, 12) for backend in both), strict=True
    ):
        assert_same(one, other)


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


@pytest.mark.long
def test_attributions_are_complete_and_agree(real, flax, rows):
    """Safety on its way from the plain request to an attack, utility from zero: complete within 2 % at 64
    steps; torch and Flax within float32's rounding, which one row shows most: 1e-4 of the largest score."""
    (attacked,) = rows("attacked", 1)
    name = attacked.example_id.removeprefix("embedded/attacked/")
    plain = next(row for row in rows("plain", 200) if row.example_id.endswith(f"/{name}"))
    for arguments in (([attacked], [plain]), (rows("util", 1), None)):
        found = real.attribute_neurons(*arguments, 64)
        assert found.score.shape == (30, 1536) and np.abs(found.change).max() > 1e-3
        assert found.gap < 0.02
        left, right = (backend.attribute_neurons(*arguments, 4).score for backend in (real, flax))
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-4 * left.max())
        best = [set(np.argsort(-scores.ravel(), kind="stable")[:256].tolist()) for scores in (left, right)]
        assert len(best[0] & best[1]) >= 254
