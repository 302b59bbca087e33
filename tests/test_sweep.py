"""The sweep, choices and generation of both backends against the hook-and-loop reference: token for token,
float32."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.core import budgets
from backends.flax import generate as flax_generate
from backends.flax import model as flax_model
from backends.flax import sweep as flax_sweep
from backends.torch import decoder as torch_decoder
from backends.torch import generate as torch_generate
from backends.torch import sweep as torch_sweep
from tests import reference
from tests.conftest import (
    BACKENDS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    all_heads,
    assert_same,
    edited,
    load_pair,
    make_examples,
)

ALL_HEADS = all_heads()


def slow_choices(plain, examples):
    return np.array([reference.choice(plain, example) for example in examples], np.int32)


def slow_generations(plain, examples, tokens):
    return [reference.generate(plain, example, tokens) for example in examples]


@pytest.mark.parametrize("choices", [0, 4])
def test_choices_are_the_plain_models(pair, choices):
    examples = make_examples(7, choices=choices)
    prediction, probability = pair.backend.choices(examples)
    np.testing.assert_array_equal(prediction, slow_choices(pair.plain, examples))
    for example, predicted, total in zip(examples, prediction, probability, strict=True):
        likely = reference.last_logits(pair.plain, example).softmax(-1).numpy()
        candidates = example.choice_ids if choices else [predicted]
        assert total == pytest.approx(likely[candidates].sum(), abs=1e-5)


def test_generate_is_transformers_generate(pair):
    examples = make_examples(7)
    found = pair.backend.generate(examples, 12)
    assert_same(found, slow_generations(pair.plain, examples, 12))
    assert len({tuple(tokens) for tokens in found}) > 2, "all prompts alike would show nothing"


@pytest.mark.parametrize("mask", ["output", "query"])
@pytest.mark.parametrize("choices", [0, 4])
def test_sweep_choices_every_head(pair, mask, choices):
    examples = make_examples(6, seed=1, choices=choices)
    clean, changed = slow_choices(pair.plain, examples), 0
    for (layer, head), found in pair.backend.sweep_choices(examples, ALL_HEADS, mask):
        with reference.ablated(pair.plain, layer, head, mask):
            np.testing.assert_array_equal(
                found, slow_choices(pair.plain, examples), err_msg=f"head {layer}, {head}"
            )
        changed += (found != clean).sum()
    assert changed > 0, "no head changed a prediction: the test would show nothing"


@pytest.mark.parametrize("mask", ["output", "query"])
def test_sweep_generations_every_head(pair, mask):
    examples = make_examples(5, seed=2)
    clean = pair.backend.generate(examples, 10)
    wrong_at_once = wrong_later = 0
    for (layer, head), found in pair.backend.sweep_generations(examples, ALL_HEADS, 10, mask):
        with reference.ablated(pair.plain, layer, head, mask):
            assert_same(found, slow_generations(pair.plain, examples, 10))
        for tokens, draft in zip(found, clean, strict=True):
            wrong_at_once += tokens[0] != draft[0]
            wrong_later += tokens[0] == draft[0] and not np.array_equal(tokens, draft)
    assert wrong_at_once and wrong_later, "drafts that are wrong at once and later must both occur"


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_prefixes_and_counts(gqa, shared, count):
    """One prompt, no common prefix, duplicates."""
    examples = make_examples(count, seed=3, shared=shared)
    heads = [(0, 1), (1, 3), (2, 0)]
    for (layer, head), found in gqa.backend.sweep_generations(examples, heads, 6):
        with reference.ablated(gqa.plain, layer, head):
            assert_same(found, slow_generations(gqa.plain, examples, 6))


def test_eos_inside_the_draft(gqa, models, scratch):
    """Every token that the clean model likes is made an end, so that drafts end early and ablated rows go
    on."""
    examples = make_examples(6, seed=4)
    ends = sorted({int(tokens[3]) for tokens in gqa.backend.generate(examples, 10)})
    own, plain = load_pair(gqa.backend.name, edited(models, scratch, eos_token_id=ends))
    clean = own.generate(examples, 10)
    assert any(len(tokens) < 10 for tokens in clean) and all(
        tokens[-1] in ends or len(tokens) == 10 for tokens in clean
    )
    assert_same(clean, slow_generations(plain, examples, 10))
    for (layer, head), found in own.sweep_generations(examples, ALL_HEADS, 10):
        with reference.ablated(plain, layer, head):
            assert_same(found, slow_generations(plain, examples, 10))


def test_heads_in_any_order_and_small_batches(gqa, monkeypatch):
    examples = make_examples(6, seed=5)
    expected = dict(gqa.backend.sweep_choices(examples, ALL_HEADS))
    for module in (torch_sweep, flax_sweep):
        monkeypatch.setattr(module, "TOKENS_CPU", 40)
    shuffled = [ALL_HEADS[index] for index in np.random.default_rng(0).permutation(len(ALL_HEADS))]
    found = list(gqa.backend.sweep_choices(examples, shuffled))
    assert [head for head, _ in found] == shuffled
    for head, prediction in found:
        np.testing.assert_array_equal(prediction, expected[head])
    assert_same(gqa.backend.generate(examples, 8), slow_generations(gqa.plain, examples, 8))


def generations(backend, examples, tokens):
    """Of every head, as lists."""
    swept = backend.sweep_generations(examples, ALL_HEADS, tokens)
    return {head: [response.tolist() for response in responses] for head, responses in swept}


def test_guesses_save_steps_and_change_nothing(gqa, monkeypatch):
    """A head at a time, with a token a step for each row, or all that may be guessed."""
    module = {"torch": torch_generate, "flax": flax_generate}[gqa.backend.name]
    examples, taken, step = make_examples(3, seed=5), [], module._Engine.step

    def counted(self, ids, *rest):
        taken.append(ids.shape[1])
        return step(self, ids, *rest)

    monkeypatch.setattr(module._Engine, "step", counted)
    monkeypatch.setattr(budgets, "plan_responses", lambda *_, **__: budgets.Plan(3, 3, True))
    monkeypatch.setattr(module, "STEP_CPU", 1)
    expected, plain = generations(gqa.backend, examples, 12), list(taken)
    taken.clear()
    monkeypatch.setattr(module, "STEP_CPU", 10**6)
    assert generations(gqa.backend, examples, 12) == expected
    assert set(plain) == {1} and max(taken) > 1 and len(taken) < len(plain)


def test_little_memory_changes_nothing(gqa, monkeypatch):
    """Rows, prompts and heads in small groups, and clean streams computed again for every layer."""
    examples = make_examples(5, seed=6)
    answers = [prediction.tolist() for _, prediction in gqa.backend.sweep_choices(examples, ALL_HEADS)]
    expected = generations(gqa.backend, examples, 8)
    gqa.backend.kept.drop()
    monkeypatch.setattr(budgets, "plan_responses", lambda *_, **__: budgets.Plan(6, 2, False))
    monkeypatch.setattr(budgets, "keeps_choices", lambda *_: False)
    assert generations(gqa.backend, examples, 8) == expected
    found = [prediction.tolist() for _, prediction in gqa.backend.sweep_choices(examples, ALL_HEADS)]
    assert found == answers


def test_the_clean_model_answers_once(gqa, monkeypatch):
    """However many calls a sweep is cut into; and again for other prompts, or for longer responses."""
    module, name = {
        "torch": (torch_generate, "side_by_side"),
        "flax": (flax_generate, "generate"),
    }[gqa.backend.name]
    calls, generate = [], getattr(module, name)

    def counted(*args):
        calls.append(args)
        return generate(*args)

    monkeypatch.setattr(module, name, counted)
    gqa.backend.kept.drop()
    examples, whole = make_examples(4, seed=7), {}
    for layer in range(LAYERS):
        whole |= dict(gqa.backend.sweep_generations(examples, [(layer, head) for head in range(HEADS)], 6))
    assert len(calls) == 1
    for head, found in gqa.backend.sweep_generations(examples, ALL_HEADS, 7):
        assert_same([tokens[:6] for tokens in found], whole[head])
    for head, found in gqa.backend.sweep_generations(examples[::-1], ALL_HEADS, 6):
        assert_same(found[::-1], whole[head])
    assert len(calls) == 3


def test_clean_streams_are_read_once(gqa, monkeypatch):
    """However many calls a sweep is cut into, as long as the memory is not wanted for something else."""
    frontier = {"torch": torch_sweep.Frontier, "flax": flax_model.Frontier}[gqa.backend.name]
    begun, move = [], frontier.move

    def counted(self, layer):
        if self.hidden is None or layer < self.layer:
            begun.append(layer)
        move(self, layer)

    monkeypatch.setattr(frontier, "move", counted)
    gqa.backend.kept.drop()
    examples = make_examples(4, seed=8)
    whole = dict(gqa.backend.sweep_choices(examples, ALL_HEADS))
    assert begun == [0]
    gqa.backend.kept.drop()
    for layer in range(LAYERS):
        for head, found in gqa.backend.sweep_choices(examples, [(layer, head) for head in range(HEADS)]):
            assert_same(found, whole[head])
    assert begun == [0, 0]
    list(gqa.backend.sweep_choices(examples, [(1, 0)]))  # below where the stream is
    gqa.backend.generate(examples, 2)
    list(gqa.backend.sweep_choices(examples, [(2, 0)]))
    assert begun == [0, 0, 1, 2]


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_greedy_tokens_are_those_of_the_largest_logits(models, piece, monkeypatch):
    own, _ = load_pair("torch", models["llama-gqa"])
    monkeypatch.setattr(torch_decoder, "PIECE", piece)
    decoder, generator = own.model, torch.Generator().manual_seed(5)
    hidden = torch.randn(5, 3, own.shape.model_dim, generator=generator)
    with torch.no_grad():
        token, expected = decoder.greedy(hidden), decoder.logits(hidden).argmax(dim=-1)
    torch.testing.assert_close(token, expected, rtol=0, atol=0)
    assert len(set(expected.flatten().tolist())) > 5


def test_nothing_requested_nothing_answered(gqa):
    assert gqa.backend.generate([], 4) == [] and [len(part) for part in gqa.backend.choices([])] == [0, 0]
    assert list(gqa.backend.sweep_generations([], [(0, 1)], 4)) == [((0, 1), [])]
    ((head, prediction),) = gqa.backend.sweep_choices([], np.array([[0, 1]]))
    assert head == (0, 1) and prediction.shape == (0,)
    assert list(gqa.backend.sweep_choices(make_examples(2), [])) == []


@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_without_an_end_never_stops(models, scratch, name):
    own, _ = load_pair(name, edited(models, scratch, eos_token_id=None))
    assert [len(tokens) for tokens in own.generate(make_examples(3), 20)] == [20, 20, 20]


def test_wrong_arguments_are_named(gqa):
    examples = make_examples(2)
    with pytest.raises(ValueError, match="mask"):
        gqa.backend.sweep_choices(examples, [(0, 0)], "key")
    with pytest.raises(ValueError, match=r"no head \(0, 4\)"):
        gqa.backend.sweep_choices(examples, [(0, HEADS)])
    with pytest.raises(ValueError, match="twice"):
        gqa.backend.sweep_generations(examples, [(0, 0), (0, 0)], 4)


@pytest.mark.parametrize("name", BACKENDS)
def test_half_precision_shows_no_effect_where_there_is_none(models, scratch, name):
    """A head whose W_o columns are zero must change nothing, also in bfloat16 where batch shapes matter."""
    folder = edited(models, scratch)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][:, 2 * HEAD_DIM : 3 * HEAD_DIM] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    own, _ = load_pair(name, folder, dtype="bfloat16")
    examples = make_examples(6, seed=6)
    clean = own.generate(examples, 12)
    ((_, found),) = own.sweep_generations(examples, [(1, 2)], 12)
    assert_same(found, clean)
    ((_, predicted),) = own.sweep_choices(examples, [(1, 2)])
    np.testing.assert_array_equal(predicted, own.choices(examples)[0])
