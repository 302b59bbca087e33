"""Gradients and tuning of both backends: against plain autograd, PEFT's own loading and merging, and by their
invariants."""

import dataclasses
import gc
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import backends
from backends.base import GainRecipe, Recipe, Selection, Task
from backends.core import checkpoint
from backends.core.errors import InputError
from backends.core.schedules import learning_rate
from backends.core.seeds import batch_order
from backends.torch import gradients as torch_gradients
from backends.torch import tune as torch_tune
from tests import reference
from tests.conftest import BACKENDS, HEAD_DIM, HEADS, LAYERS, assert_same, change_tensors, make_examples

RECIPE = Recipe(rank=4, alpha=8.0, lr=2e-2, batch=2, accumulation=2, max_length=64, seed=3)
CHOSEN = [(0, 1), (2, 0), (2, 3)]


def optimized_by(optimizer: str) -> Recipe:
    return dataclasses.replace(RECIPE, optimizer=optimizer)


@pytest.fixture()
def torch_own(models):
    return backends.load("torch", models["llama-gqa"], device="cpu")


# Gradients


def test_gram_is_that_of_plain_gradients(pair):
    safe, util = make_examples(4, seed=1), make_examples(6, seed=2)
    gram = pair.backend.gradient_gram(safe, util, folds=2)
    assert gram.shape == (LAYERS, HEADS, 4, 4) and gram.dtype == np.float64
    weights = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in pair.plain.model.layers]
    means = []
    for examples in (safe, util):
        for fold in range(2):
            losses = [reference.loss(pair.plain, example) for example in examples[fold::2]]
            means.append(torch.autograd.grad(torch.stack(losses).mean(), weights))
    pair.plain.requires_grad_(False)
    for layer in range(LAYERS):
        for head in range(HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            stacked = torch.stack([mean[layer][rows].flatten().double() for mean in means])
            expected = (stacked @ stacked.T).numpy()
            np.testing.assert_allclose(gram[layer, head], expected, rtol=2e-4, atol=1e-6 * expected.max())
    assert np.ptp(gram[:, :, 0, 0]) > 0


def test_gradients_of_some_layers_are_those_of_all_and_leave_nothing_behind(own):
    safe, util = make_examples(4, seed=1), make_examples(4, seed=2)
    before = own.logits(safe)
    whole = own.gradient_gram(safe, util, 2)
    np.testing.assert_allclose(own.gradient_gram(safe, util, 2, [2, 0]), whole[[2, 0]], rtol=1e-6)
    np.testing.assert_array_equal(own.logits(safe), before)
    if own.name == "torch":
        assert not any(weight.requires_grad for weight in own.model.model.parameters())


# Tuning


def test_rows_outside_the_chosen_heads_never_move(own):
    examples = make_examples(3)
    before = own.logits(examples)
    tuning = own.tune(make_examples(8, seed=4), CHOSEN, dataclasses.replace(RECIPE, epochs=12))
    with pytest.raises(RuntimeError):
        _ = tuning.adapter
    records = list(tuning)
    assert [record["step"] for record in records] == list(range(24))
    first, last = (sum(record["loss"] for record in part) for part in (records[:2], records[-2:]))
    assert last < 0.9 * first, "it must learn its eight rows"
    assert all(math.isnan(record["cos"]) and not record["projected"] for record in records)
    updates = {
        int(name.split("layers.")[1].split(".")[0]): tensor.reshape(HEADS, HEAD_DIM, -1)
        for name, tensor in load_file(tuning.adapter / "adapter_model.safetensors").items()
        if "lora_B" in name
    }
    assert updates.keys() == {0, 2}
    for layer, by_head in updates.items():
        for head, rows in enumerate(by_head):
            assert (rows != 0).all() if (layer, head) in CHOSEN else (rows == 0).all()
    np.testing.assert_array_equal(own.logits(examples), before)
    assert np.abs(own.logits(examples, tuning.adapter) - before).max() > 0.1


@pytest.fixture(scope="module", params=BACKENDS)
def adapter(request, models):
    """Tuned by either backend, and B's chosen rows made random: freshly tuned they are too small to show a
    mistake."""
    own = backends.load(request.param, models["llama-gqa"], device="cpu")
    tuning = own.tune(make_examples(8, seed=4), CHOSEN, RECIPE)
    list(tuning)

    def scatter(tensors):
        generator = np.random.default_rng(0)
        for tensor in (tensor for name, tensor in tensors.items() if "lora_B" in name):
            tensor[tensor != 0] = generator.normal(size=(tensor != 0).sum())

    change_tensors(tuning.adapter / "adapter_model.safetensors", scatter)
    return tuning.adapter


def test_adapter_answers_as_merged_by_peft(own, models, adapter):
    """Each backend with the adapters of both; the base is left as it was."""
    merged = reference.merged(models["llama-gqa"], adapter)
    examples = make_examples(6, seed=7)
    clean = own.generate(examples, 8)
    expected = reference.logits(merged, examples)
    for found, wanted in zip(own.logits(examples, adapter), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    tuned = own.generate(examples, 8, adapter)
    assert_same(tuned, reference.generate(merged, examples, 8))
    assert any(not np.array_equal(tokens, other) for tokens, other in zip(tuned, clean, strict=True))
    assert_same(own.generate(examples, 8), clean)
    assert not np.array_equal(own.choices(examples, adapter)[1], own.choices(examples)[1])


def test_rows_are_cut_at_their_end_and_need_a_target_and_utility_rows_are_never_cut(own):
    """max_length is of alignment rows: D_util has short targets that come last."""
    (example,) = make_examples(1, seed=8)
    long = dataclasses.replace(example, target_ids=np.arange(3, 63, dtype=np.int32))
    cut = dataclasses.replace(example, target_ids=np.arange(3, 8, dtype=np.int32))
    limit = len(example.prompt_ids) + 5
    utility = [
        dataclasses.replace(row, prompt_ids=np.resize(row.prompt_ids, limit + 9))
        for row in make_examples(3, seed=10)
    ]
    recipe = dataclasses.replace(RECIPE, optimizer="pcgrad", max_length=limit)
    records = list(own.tune([long], CHOSEN, recipe, utility))
    assert records == list(own.tune([cut], CHOSEN, dataclasses.replace(recipe, max_length=999), utility))
    assert records[0]["tokens"] == limit and math.isfinite(records[0]["util_loss"])
    short = dataclasses.replace(RECIPE, max_length=len(example.prompt_ids))
    with pytest.raises(ValueError, match="e0 has no target token"):
        list(own.tune([example], CHOSEN, short))


def test_a_stopped_tuning_leaves_the_model_bare(torch_own):
    for number, _ in enumerate(torch_own.tune(make_examples(8), CHOSEN, RECIPE)):
        if number == 0:
            break
    gc.collect()
    assert not any("lora" in name for name, _ in torch_own.model.model.named_modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda own, rows: own.gradient_gram(rows, rows[:4], folds=2), "safe: 5 examples"),
        (lambda own, rows: own.tune(rows, [(9, 0)], RECIPE), "no head"),
        (lambda own, rows: own.tune(rows, [], RECIPE), "no heads"),
        (lambda own, rows: own.tune(rows, CHOSEN, optimized_by("pcgrad")), "reference: pcgrad needs"),
        (
            lambda own, rows: own.tune(rows, CHOSEN, optimized_by("pcgrad-symmetric")),
            "pcgrad-symmetric needs",
        ),
        (lambda own, rows: own.choices(rows, "/nowhere/at/all"), "cannot be loaded"),
        (lambda own, rows: own.logits(rows, adapter="/any", ablated=(0, 0)), "ablated"),
        (lambda own, rows: own.sweep_choices(rows, [(0, 0)], "key"), "mask"),
        (lambda own, rows: own.sweep_choices(rows, [(0, HEADS)]), r"no head \(0, 4\)"),
        (lambda own, rows: own.sweep_generations(rows, [(0, 0), (0, 0)], 4), "twice"),
        (lambda own, rows: own.attribute_neurons([]), "no examples"),
        (lambda own, rows: own.attribute_neurons(rows[:3], rows[:2]), "baselines: 2 for 3"),
        (lambda own, rows: own.tune_gains([], Selection(((9, 0),), ()), GainRecipe()), "no neuron"),
        (lambda own, rows: own.tune_gains([], Selection(((0, 0),), ((0, 0),)), GainRecipe()), "given twice"),
        (
            lambda own, rows: own.tune_gains(
                [Task("one", tuple(rows[:1]), tuple(rows))], Selection(((0, 0),), ()), GainRecipe()
            ),
            "task one: at least two harmful",
        ),
    ],
)
def test_wrong_arguments_are_named(gqa, call, message):
    with pytest.raises(InputError if "cannot be loaded" in message else ValueError, match=message):
        call(gqa.backend, make_examples(5))


def test_gradients_that_are_not_finite_end_with_a_line(torch_own, monkeypatch):
    def infinite(model, examples, *_):
        return sum(weight.sum() for weight in model.parameters() if weight.requires_grad) * float("inf")

    losses = "target_losses"
    monkeypatch.setattr(torch_gradients, losses, lambda logits, rows: logits[: len(rows), 0] * np.inf)
    with pytest.raises(InputError, match=r"the gradient of head \(0, 0\) is not finite"):
        torch_own.gradient_gram(make_examples(2), make_examples(2), folds=1)
    monkeypatch.setattr(torch_tune, "example_losses", infinite)
    with pytest.raises(InputError, match="step 0: the gradient is not finite"):
        list(torch_own.tune(make_examples(2), CHOSEN, RECIPE))


# Resuming


@pytest.mark.parametrize("optimizer", ["sft", "pcgrad", "pcgrad-symmetric"])
def test_a_run_that_was_stopped_goes_on_to_the_identical_adapter(own, scratch, monkeypatch, optimizer):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    rows, against = make_examples(24, seed=4), make_examples(6, seed=9)
    recipe = optimized_by(optimizer)
    reference.goes_on(lambda recipe: own.tune(rows, CHOSEN, recipe, against), recipe, scratch, 3)
    assert all(record["drawn"] is None for record in own.tune(rows, CHOSEN, recipe, against))
    recipe = dataclasses.replace(recipe, folder=scratch / "stopped", checkpoint=scratch / "state")
    with pytest.raises(InputError, match="state is another tuning run's"):
        list(own.tune(rows[:20], CHOSEN, recipe, against))
    (scratch / "state").write_bytes((scratch / "state").read_bytes()[:100])
    with pytest.raises(InputError, match="state is damaged"):
        list(own.tune(rows, CHOSEN, recipe, against))


# What both backends share


def test_every_epoch_sees_every_row_once():
    order = batch_order(10, dataclasses.replace(RECIPE, epochs=3))
    assert [len(rows) for rows in order] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(np.concatenate(order[3 * epoch : 3 * epoch + 3])) == list(range(10))
    assert [learning_rate(step, 4, RECIPE) for step in range(4)] == [2e-2, 1.5e-2, 1e-2, 5e-3]
