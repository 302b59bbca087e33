"""Graded outcomes of both backends: log-likelihoods, their sweep, and gradients in the heads' gates, against
transformers' own loss with a hook, one row at a time, float32."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import reference
from tests.conftest import ALL_HEADS, make_examples

REQUESTS = [
    replace(row, refusal_ids=np.array([5, 9, 11][: 1 + at % 3], np.int32))
    for at, row in enumerate(make_examples(3, seed=6))
]
EXAMPLES = [*make_examples(5, seed=3), *REQUESTS, *make_examples(4, seed=4, choices=3)]
"""rows whose whole target counts, requests, and rows whose answer competes with two other tokens"""


def plain_grade(model, example) -> torch.Tensor:
    """In the model's own precision (transformers' loss rounds to float32)."""
    start, target = len(example.prompt_ids) - 1, torch.from_numpy(example.target_ids.astype(np.int64))
    ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.target_ids]).astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, start:-1]
    if len(example.refusal_ids):
        refuses = logits[0].softmax(dim=-1)[example.refusal_ids.astype(np.int64)].sum()
        return (refuses / (1 - refuses)).log()
    if len(example.choice_ids):
        return logits[0, example.choice_ids.astype(np.int64)].log_softmax(dim=-1)[example.answer]
    return logits.log_softmax(dim=-1)[torch.arange(len(target)), target].mean()


@torch.no_grad()
def plain_grades(model, examples) -> np.ndarray:
    return np.array([float(plain_grade(model, example)) for example in examples])


def looped(model, mask) -> dict:
    """Of the clean model (None) and with each head ablated."""
    found = {None: plain_grades(model, EXAMPLES)}
    for layer, head in ALL_HEADS:
        with reference.ablated(model, layer, head, mask):
            found[layer, head] = plain_grades(model, EXAMPLES)
    return found


@pytest.mark.parametrize("mask", ["output", "query"])
def test_sweep_equals_hook_and_loop(pair, mask):
    """Beside the loop in float64, where nothing is rounded; the loop in float32 says what rounding may do."""
    rounded = looped(pair.plain, mask)
    with reference.doubled(pair.plain) as model:
        exact = looped(model, mask)
    graded, choices = pair.backend.grade(EXAMPLES), pair.backend.choices(EXAMPLES)
    for part, same in zip(graded.choices, choices, strict=True):
        np.testing.assert_allclose(part, same, rtol=1e-5)
    swept = dict(pair.backend.sweep_grades(EXAMPLES, ALL_HEADS, mask))
    assert list(swept) == list(ALL_HEADS)
    for place, found in ({None: graded.outcome} | swept).items():
        bound = (2e-5 if place else 1e-5) + np.abs(rounded[place] - exact[place]).max()
        np.testing.assert_allclose(found, exact[place], atol=bound, err_msg=f"head {place}")
        assert place is None or mask == "query" or np.abs(found - exact[None]).max() > 1e-3


@pytest.mark.parametrize("mask", ["output", "query"])
def test_gates_equal_a_hooked_gate_and_finite_differences(pair, mask):
    rows, gate, step = EXAMPLES[2:10], torch.ones((), requires_grad=True), 0.01
    found = pair.backend.head_gradients(rows[:4], rows[4:], 2, mask=mask)
    gates = np.concatenate([found.gate_safe, found.gate_util], axis=2)  # (L, H, 8)
    assert np.abs(gates).max() > 0.01
    with reference.doubled(pair.plain) as model:
        for layer, head in ALL_HEADS:
            with reference.ablated(model, layer, head, mask, gate):
                exact = [torch.autograd.grad(plain_grade(model, row), gate)[0] for row in rows]
            np.testing.assert_allclose(gates[layer, head], exact, atol=1e-5 * np.abs(gates).max())
            sides = []
            for moved in (1 + step, 1 - step):
                with reference.ablated(model, layer, head, mask, moved):
                    sides.append(plain_grades(model, rows))
            near = (sides[0] - sides[1]) / (2 * step)
            np.testing.assert_allclose(gates[layer, head], near, atol=2e-2 * np.abs(gates).max())


def test_a_request_needs_no_target_and_a_sure_refusal_is_a_number(pair):
    nothing = np.zeros(0, np.int32)
    bare = [replace(row, target_ids=nothing) for row in REQUESTS]
    found = pair.backend.grade(bare).outcome
    np.testing.assert_allclose(found, pair.backend.grade(REQUESTS).outcome, atol=1e-6)
    _, swept = next(iter(pair.backend.sweep_grades(bare, [(1, 0)])))
    assert np.isfinite(swept).all()
    vocabulary = np.arange(pair.backend.shape.vocab, dtype=np.int32)
    sure = [replace(row, refusal_ids=np.delete(vocabulary, 7)) for row in REQUESTS]
    other = [replace(row, refusal_ids=vocabulary[[7]]) for row in REQUESTS]
    np.testing.assert_allclose(
        pair.backend.grade(sure).outcome, -pair.backend.grade(other).outcome, atol=1e-4
    )


def test_gates_of_some_layers_and_the_same_gram(gqa):
    whole = gqa.backend.head_gradients(EXAMPLES[:4], EXAMPLES[4:8], 2)
    some = gqa.backend.head_gradients(EXAMPLES[:4], EXAMPLES[4:8], 2, layers=[2, 0])
    np.testing.assert_allclose(some.gate_util, whole.gate_util[[2, 0]], rtol=1e-9)
    gram = gqa.backend.gradient_gram(EXAMPLES[:4], EXAMPLES[4:8], 2)
    np.testing.assert_allclose(gram, whole.gram, rtol=1e-6)


def test_maps_are_those_of_one_at_a_time_and_share_the_gradients_of_safe_rows(gqa, monkeypatch):
    safe, utils = EXAMPLES[:4], [EXAMPLES[4:8], EXAMPLES[5:9], EXAMPLES[5:7]]
    apart = [gqa.backend.head_gradients(safe, util, 2) for util in utils]
    wing, passed = importlib.import_module(f"backends.{gqa.backend.name}.gradients"), []
    place, name = {"torch": (wing, "by_tokens"), "flax": (getattr(wing, "Passes", None), "of")}[
        gqa.backend.name
    ]
    batches = getattr(place, name)

    def counted(*arguments):
        examples = arguments[0] if place is wing else arguments[1]
        passed.extend(example.example_id for example in examples)
        return batches(*arguments)

    monkeypatch.setattr(place, name, counted)
    for found, expected in zip(gqa.backend.map_gradients(safe, utils, 2), apart, strict=True):
        for name in ("gram", "gate_safe", "gate_util"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(passed) == 4 + 4 + 4 + 2


def test_an_adapter_changes_them(gqa, scratch):
    from backends.base import Recipe

    recipe = Recipe(rank=2, lr=0.1, batch=4, accumulation=1, folder=scratch / "adapter")
    tuning = gqa.backend.tune(EXAMPLES[:4], [(0, 1), (2, 3)], recipe)
    assert list(tuning)
    merged = reference.merged(gqa.plain.config._name_or_path, tuning.adapter)
    found = gqa.backend.grade(EXAMPLES, tuning.adapter).outcome
    np.testing.assert_allclose(found, plain_grades(merged, EXAMPLES), atol=1e-5)
    assert np.abs(found - gqa.backend.grade(EXAMPLES).outcome).max() > 1e-3


def test_a_row_without_target_is_named(gqa):
    import dataclasses

    bare = dataclasses.replace(EXAMPLES[0], target_ids=np.zeros(0, np.int32))
    wrong = dataclasses.replace(EXAMPLES[-1], answer=3)
    for rows, message in (([bare], "no prompt or no target"), ([wrong], "answer 3 is none")):
        for call in (gqa.backend.grade, lambda own: gqa.backend.sweep_grades(own, [(0, 0)])):
            with pytest.raises(ValueError, match=message):
                call(rows)
    assert gqa.backend.grade([]).outcome.shape == (0,)
