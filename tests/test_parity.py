"""One method, two frameworks: torch against Flax, both against transformers, on every kind of tiny model."""

import dataclasses

import numpy as np
import pytest

from backends.base import Recipe
from backends.core import adapters as peft_folder
from stages.method import gradients, metrics
from tests import reference
from tests.conftest import make_examples

RECIPE = Recipe(rank=4, alpha=8.0, lr=1e-2, batch=4, accumulation=2, epochs=4, max_length=64, seed=5)
CHOSEN = [(0, 1), (2, 0), (2, 3)]


def conflict(matrix: np.ndarray, folds: int) -> np.ndarray:
    return metrics.optimization_conflict(*gradients.conflict_from_gram(matrix, folds))


def delta(backend, adapter) -> np.ndarray:
    """ΔW of every layer, [L, H, D, E]."""
    a, b, scale = peft_folder.read(adapter, backend.shape)
    return scale * np.einsum("lhdr,lre->lhde", b.astype(np.float64), a.astype(np.float64))


def assert_logits(found, expected) -> None:
    """Within 1e-5 of the largest."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_logits_are_transformers(pair):
    """Also of transformers in float64, to tell whose rounding it is."""
    examples = make_examples(7)
    found = pair.backend.logits(examples)
    assert_logits(found, reference.logits(pair.plain, examples))
    with reference.doubled(pair.plain) as exact:
        assert_logits(found, reference.logits(exact, examples))


@pytest.mark.parametrize("mask", ["output", "query"])
def test_logits_of_ablated_heads_are_the_hooks(pair, mask):
    examples = make_examples(4)
    clean = pair.backend.logits(examples)
    for head in [(0, 1), (1, 3), (2, 0)]:
        found = pair.backend.logits(examples, ablated=head, mask=mask)
        with reference.ablated(pair.plain, *head, mask):
            assert_logits(found, reference.logits(pair.plain, examples))
        assert np.abs(found - clean).max() > 1e-2, "ablating must change something"


def test_conflicts_and_gates_agree(both):
    safe, util = make_examples(4, seed=1), make_examples(6, seed=2)
    found = [backend.head_gradients(safe, util, folds=2) for backend in both]
    grams = [gradients.gram for gradients in found]
    for left, right in zip(*((each.gate_safe, each.gate_util) for each in found), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(left).max())
    np.testing.assert_allclose(*(conflict(matrix, 2) for matrix in grams), rtol=0, atol=1e-6)
    norms = np.sqrt(np.einsum("lhff->lhf", grams[0]))
    apart = np.abs(grams[0] - grams[1]) / (norms[..., :, None] * norms[..., None, :])
    assert apart.max() < 1e-5
    assert np.ptp(conflict(grams[0], 2)) > 0.1, "heads must differ"


@pytest.mark.parametrize("optimizer", ["sft", "pcgrad", "pcgrad-symmetric"])
def test_twenty_steps_agree_and_adapters_go_both_ways(both, optimizer):
    examples, utility = make_examples(40, seed=9), make_examples(6, seed=4)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    runs = [backend.tune(examples, CHOSEN, recipe, utility) for backend in both]
    records = [list(run) for run in runs]
    assert [len(steps) for steps in records] == [20, 20]
    # Rounding that Adam magnifies adds up over steps: losses of 5 to 6 here.
    for name, apart in (("loss", 2e-5), ("util_loss", 2e-5), ("cos", 1e-4)):
        left, right = ([step[name] for step in steps] for steps in records)
        np.testing.assert_allclose(left, right, rtol=0, atol=apart, err_msg=name)
    assert [step["projected"] for step in records[0]] == [step["projected"] for step in records[1]]
    assert any(step["projected"] for step in records[0]) == (optimizer != "sft")
    updates = [delta(both[0], run.adapter) for run in runs]
    assert np.linalg.norm(updates[0] - updates[1]) < 1e-4 * np.linalg.norm(updates[0])
    prompts = make_examples(5)
    for run in runs:  # either backend's adapter, in both
        answers = [backend.logits(prompts, run.adapter) for backend in both]
        assert_logits(*answers)
        assert np.abs(answers[0] - both[0].logits(prompts)).max() > 1e-2
