"""The sweep, choices and generation of both backends against the hook-and-loop reference: token for token,
float32."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import backends
from backends.base import Recipe
from backends.core import budgets
from backends.flax import generate as flax_generate
from backends.flax import sweep as flax_sweep
from backends.torch import decoder as torch_decoder
from backends.torch import generate as torch_generate
from backends.torch import sweep as torch_sweep
from tests import reference
from tests.conftest import (
    ALL_HEADS,
    HEAD_DIM,
    VOCABULARY,
    assert_same,
    change_tensors,
    edited,
    load_pair,
    make_examples,
)


def assert_plain_generations(pair, examples, heads, tokens, mask="output") -> list:
    """The sweep's responses, which are those of the plain loop."""
    swept = []
    for (layer, head), found in pair.backend.sweep_generations(examples, heads, tokens, mask):
        with reference.ablated(pair.plain, layer, head, mask):
            assert_same(found, reference.generate(pair.plain, examples, tokens))
        swept += found
    assert len(swept) == len(heads) * len(examples)
    return swept


@pytest.mark.parametrize("choices", [0, 4])
def test_choices_are_the_plain_models(pair, choices):
    examples = make_examples(7, choices=choices)
    prediction, probability = pair.backend.choices(examples)
    np.testing.assert_array_equal(prediction, reference.choices(pair.plain, examples))
    for example, predicted, total in zip(examples, prediction, probability, strict=True):
        likely = reference.last_logits(pair.plain, example).softmax(-1).numpy()
        candidates = example.choice_ids if choices else [predicted]
        assert total == pytest.approx(likely[candidates].sum(), abs=1e-5)


def test_generate_is_transformers_generate(pair):
    examples = make_examples(7)
    found = pair.backend.generate(examples, 12)
    assert_same(found, reference.generate(pair.plain, examples, 12))
    assert len({tuple(tokens) for tokens in found}) > 2, "all prompts alike would show nothing"


@pytest.mark.parametrize("mask", ["output", "query"])
@pytest.mark.parametrize("choices", [0, 4])
def test_sweep_choices_every_head(pair, mask, choices):
    examples = make_examples(6, seed=1, choices=choices)
    clean, changed = reference.choices(pair.plain, examples), 0
    for (layer, head), found in pair.backend.sweep_choices(examples, ALL_HEADS, mask):
        with reference.ablated(pair.plain, layer, head, mask):
            np.testing.assert_array_equal(
                found, reference.choices(pair.plain, examples), err_msg=f"head {layer}, {head}"
            )
        changed += (found != clean).sum()
    assert changed > 0, "no head changed a prediction: the test would show nothing"


@pytest.mark.parametrize("mask", ["output", "query"])
def test_sweep_generations_every_head(pair, mask):
    examples = make_examples(5, seed=2)
    drafts = pair.backend.generate(examples, 10) * len(ALL_HEADS)
    found = assert_plain_generations(pair, examples, ALL_HEADS, 10, mask)
    others = [each for each in zip(found, drafts, strict=True) if not np.array_equal(*each)]
    at_once = [tokens[0] != draft[0] for tokens, draft in others]
    assert any(at_once) and not all(at_once), "drafts that are wrong at once and later must both occur"


@pytest.mark.parametrize(("count", "shared"), [(1, 5), (2, 0), (6, 0), (6, 5)])
def test_prefixes_and_counts(gqa, count, shared):
    """One prompt, no common prefix, duplicates."""
    examples = make_examples(count, seed=3, shared=shared)
    assert_plain_generations(gqa, examples, [(0, 1), (1, 3), (2, 0)], 6)


def test_eos_inside_the_draft(gqa, models, scratch):
    """Every token that the clean model likes is made an end, so that drafts end early and ablated rows go
    on."""
    examples = make_examples(5, seed=2)
    ends = sorted({int(tokens[3]) for tokens in gqa.backend.generate(examples, 10)})
    own = load_pair(gqa.backend.name, edited(models, scratch, eos_token_id=ends))
    clean = own.backend.generate(examples, 10)
    assert any(len(tokens) < 10 for tokens in clean) and all(
        tokens[-1] in ends or len(tokens) == 10 for tokens in clean
    )
    assert_same(clean, reference.generate(own.plain, examples, 10))
    assert_plain_generations(own, examples, ALL_HEADS, 10)


def test_heads_in_any_order_in_many_calls_and_small_batches(gqa, monkeypatch):
    """What is kept of the clean model between calls is that of their prompts and length."""
    own, examples = gqa.backend, make_examples(5, seed=2)
    choices = dict(own.sweep_choices(examples, ALL_HEADS))
    responses = dict(own.sweep_generations(examples, ALL_HEADS, 10))
    for heads, tokens, order in ((ALL_HEADS[:4], 10, 1), (ALL_HEADS[8:], 10, -1), (ALL_HEADS[4:8], 9, 1)):
        for head, found in own.sweep_generations(examples[::order], heads, tokens):
            assert_same(found, [response[:tokens] for response in responses[head][::order]])
        for head, found in own.sweep_choices(examples[::order], heads):
            np.testing.assert_array_equal(found, choices[head][::order])
    for module in (torch_sweep, flax_sweep):
        monkeypatch.setattr(module, "TOKENS_CPU", 40)
    monkeypatch.setattr(torch_decoder, "PIECE", 7)  # of the vocabulary, whose logits are never written out
    shuffled = [ALL_HEADS[index] for index in np.random.default_rng(0).permutation(len(ALL_HEADS))]
    found = list(own.sweep_choices(examples, shuffled))
    assert [head for head, _ in found] == shuffled
    assert_same([prediction for _, prediction in found], [choices[head] for head in shuffled])
    assert_same(own.generate(examples, 10), reference.generate(gqa.plain, examples, 10))


def swept(backend, examples, tokens) -> tuple[list, list]:
    """Choices and responses of every head, as lists."""
    responses = backend.sweep_generations(examples, ALL_HEADS, tokens)
    return (
        [prediction.tolist() for _, prediction in backend.sweep_choices(examples, ALL_HEADS)],
        [[response.tolist() for response in found] for _, found in responses],
    )


@pytest.mark.parametrize("gqa", ["torch"], indirect=True)
def test_guesses_save_steps_and_change_nothing(gqa, monkeypatch):
    """A head at a time, with a token a step for each row, or all that may be guessed."""
    examples, widths, step = make_examples(3, seed=5), [], torch_generate._Engine.step

    def counted(self, ids, *rest):
        widths.append(ids.shape[1])
        return step(self, ids, *rest)

    monkeypatch.setattr(torch_generate._Engine, "step", counted)
    monkeypatch.setattr(budgets, "plan_responses", lambda *_, **__: budgets.Plan(3, 3, True))
    monkeypatch.setattr(torch_generate, "STEP_CPU", 1)
    expected, plain = swept(gqa.backend, examples, 12), list(widths)
    widths.clear()
    monkeypatch.setattr(torch_generate, "STEP_CPU", 10**6)
    assert swept(gqa.backend, examples, 12) == expected
    assert set(plain) == {1} and max(widths) > 1 and len(widths) < len(plain)


def test_rows_that_end_make_room(models, scratch, monkeypatch):
    """Three rows side by side, with ends of responses at once, on the way, and at the budget; also through an
    adapter."""
    ends = list(range(0, VOCABULARY, 5))
    own = load_pair("torch", edited(models, scratch, eos_token_id=ends))
    prompts = make_examples(24, seed=5)
    expected = own.backend.generate(prompts, 12)
    assert_same(expected, reference.generate(own.plain, prompts, 12))
    assert {len(tokens) for tokens in expected} >= {1, 2, 12}
    recipe = Recipe(rank=4, lr=0.1, folder=scratch / "adapter")
    list(own.backend.tune(make_examples(8), ALL_HEADS, recipe))
    adapted = own.backend.generate(prompts, 12, recipe.folder)
    assert [list(tokens) for tokens in adapted] != [list(tokens) for tokens in expected]
    monkeypatch.setattr(torch_generate, "ROWS_CPU", 3)
    monkeypatch.setattr(torch_sweep, "TOKENS_CPU", 30)
    assert_same(own.backend.generate(prompts, 12), expected)
    assert_same(own.backend.generate(prompts, 12, recipe.folder), adapted)


# Half precision


def idle_model(models, folder) -> Path:
    """A model whose head (1, 2) has no effect."""
    copy = folder / "idle"
    shutil.copytree(models["llama-gqa"], copy)

    def silence(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][:, 2 * HEAD_DIM : 3 * HEAD_DIM] = 0

    change_tensors(copy / "model.safetensors", silence)
    return copy


def assert_idle(backend, mask: str) -> None:
    """What head (1, 2) does is what the clean model does, to the last; other heads do something."""
    for choices in (0, 4):
        examples = make_examples(40, seed=3, choices=choices)
        found = dict(backend.sweep_choices(examples, ALL_HEADS, mask))
        np.testing.assert_array_equal(found[1, 2], backend.choices(examples)[0])
        graded = dict(backend.sweep_grades(examples, ALL_HEADS, mask))
        np.testing.assert_array_equal(graded[1, 2], backend.grade(examples).outcome)
        assert any(not np.array_equal(found[head], found[1, 2]) for head in ALL_HEADS)
    prompts = make_examples(24, seed=4)
    responses = dict(backend.sweep_generations(prompts, ALL_HEADS, 24, mask))
    assert_same(responses[1, 2], backend.generate(prompts, 24))


@pytest.mark.parametrize("name", ["torch", pytest.param("flax", marks=pytest.mark.long)])
@pytest.mark.parametrize("mask", ["output", "query"])
def test_a_head_without_effect_shows_none(models, scratch, name, mask):
    """In bfloat16, whose rounding differs with what is beside it."""
    assert_idle(backends.load(name, idle_model(models, scratch), device="cpu", dtype="bfloat16"), mask)


@pytest.mark.parametrize("name", ["torch", "flax"])
def test_logits_are_not_rounded_to_half_precision(models, name):
    """Float32 holds eight times and more values between two of bfloat16; ties of letters go with it."""
    half = backends.load(name, models["llama-gqa"], device="cpu", dtype="bfloat16")
    found = half.logits(make_examples(24, seed=6))
    rounded = torch.from_numpy(found).to(torch.bfloat16).float().numpy()
    assert (rounded != found).mean() > 0.9


@pytest.mark.parametrize("gqa", ["torch", pytest.param("flax", marks=pytest.mark.long)], indirect=True)
def test_little_memory_changes_nothing(gqa, monkeypatch):
    """Rows, prompts and heads in small groups, and clean streams computed again for every layer."""
    examples = make_examples(5, seed=2)
    expected = swept(gqa.backend, examples, 10)
    gqa.backend.kept.drop()
    monkeypatch.setattr(budgets, "plan_responses", lambda *_, **__: budgets.Plan(6, 2, False))
    monkeypatch.setattr(budgets, "keeps_choices", lambda *_: False)
    for name, value in (("ROWS_CPU", 6), ("RESPONSE", 1)):
        monkeypatch.setattr(flax_generate, name, value)
    monkeypatch.setattr(flax_sweep, "TOKENS_CPU", 40)
    monkeypatch.setattr(flax_sweep, "KEPT", 0.0)
    assert swept(gqa.backend, examples, 10) == expected


def test_nothing_requested_nothing_answered(gqa):
    assert gqa.backend.generate([], 4) == [] and [len(part) for part in gqa.backend.choices([])] == [0, 0]
    assert list(gqa.backend.sweep_generations([], [(0, 1)], 4)) == [((0, 1), [])]
    ((head, prediction),) = gqa.backend.sweep_choices([], np.array([[0, 1]]))
    assert head == (0, 1) and prediction.shape == (0,)
    assert list(gqa.backend.sweep_choices(make_examples(2), [])) == []


@pytest.mark.parametrize("name", ["torch", pytest.param("flax", marks=pytest.mark.long)])
def test_half_precision_shows_no_effect_where_there_is_none(models, scratch, name):
    """A head whose W_o columns are zero must change nothing, also in bfloat16 where batch shapes matter."""
    folder = edited(models, scratch, eos_token_id=None)
    key, columns = "model.layers.1.self_attn.o_proj.weight", slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    change_tensors(folder / "model.safetensors", lambda weights: weights[key][:, columns].fill(0))
    own, _ = load_pair(name, folder, dtype="bfloat16")
    examples = make_examples(6, seed=6)
    clean = own.generate(examples, 12)
    assert {len(tokens) for tokens in clean} == {12}, "a model without an end never stops"
    ((_, found),) = own.sweep_generations(examples, [(1, 2)], 12)
    assert_same(found, clean)
    ((_, predicted),) = own.sweep_choices(examples, [(1, 2)])
    np.testing.assert_array_equal(predicted, own.choices(examples)[0])
