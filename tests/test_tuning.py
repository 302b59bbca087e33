"""Gradients and tuning of both backends: against plain autograd, PEFT's own loading and merging, and by their
invariants."""

import dataclasses
import json
import math

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import backends
from backends.base import Recipe
from backends.core import checkpoint
from backends.core.errors import InputError
from backends.core.schedules import learning_rate
from backends.core.seeds import batch_order
from backends.torch import loss as torch_loss
from backends.torch import tune as torch_tune
from tests import reference
from tests.conftest import BACKENDS, HEAD_DIM, HEADS, LAYERS, all_heads, assert_same, make_examples

RECIPE = Recipe(rank=4, alpha=8.0, lr=2e-2, batch=2, accumulation=2, max_length=64, seed=3)
CHOSEN = [(0, 1), (2, 0), (2, 3)]


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


def test_gradients_of_some_layers_are_those_of_all(own):
    safe, util = make_examples(4, seed=1), make_examples(4, seed=2)
    whole = own.gradient_gram(safe, util, 2)
    np.testing.assert_allclose(own.gradient_gram(safe, util, 2, [2, 0]), whole[[2, 0]], rtol=1e-6)


def test_gradients_leave_nothing_behind(torch_own):
    before = {name: weight.clone() for name, weight in torch_own.model.model.named_parameters()}
    torch_own.gradient_gram(make_examples(2), make_examples(2), folds=2)
    for name, weight in torch_own.model.model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.dtype == torch.float32
        assert not weight.requires_grad and weight.grad is None


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
    tensors = load_file(tuning.adapter / "adapter_model.safetensors")
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in tensors}
    assert layers == {0, 2}
    for name, tensor in tensors.items():
        if "lora_B" not in name:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        by_head = tensor.reshape(HEADS, HEAD_DIM, -1)
        for head in range(HEADS):
            if (layer, head) in CHOSEN:
                assert (by_head[head] != 0).all(), "a chosen head has a row that did not move"
            else:
                assert (by_head[head] == 0).all(), "a frozen row moved"
    np.testing.assert_array_equal(own.logits(examples), before)
    assert np.abs(own.logits(examples, tuning.adapter) - before).max() > 0.1


def random_adapter(tuning, seed=0):
    """Fills B's chosen rows with random non-zeros: a freshly tuned B is too small to show a mistake."""
    path = tuning.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = torch.where(tensor != 0, torch.randn(tensor.shape, generator=generator), tensor)
    save_file(tensors, path, metadata={"format": "pt"})
    return tuning.adapter


@pytest.fixture(scope="module", params=BACKENDS)
def adapter(request, models):
    """Tuned by either backend."""
    own = backends.load(request.param, models["llama-gqa"], device="cpu")
    tuning = own.tune(make_examples(8, seed=4), CHOSEN, RECIPE)
    list(tuning)
    return random_adapter(tuning)


def test_adapter_loads_in_peft_and_merges_only_into_the_chosen_rows(models, adapter):
    base = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"])
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    changed = 0
    for name, weight in merged.named_parameters():
        same = weight == before[name]
        if "q_proj" not in name:
            assert same.all()
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        for head in range(HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            if (layer, head) in CHOSEN:
                changed += 1
                assert not same[rows].all(dim=1).any()
            else:
                assert torch.equal(weight[rows].view(torch.int32), before[name][rows].view(torch.int32))
    assert changed == len(CHOSEN)


def test_adapter_answers_as_merged_and_leaves_the_base_alone(own, models, adapter):
    """Each backend with the adapters of both, against PEFT's merge."""
    examples = make_examples(6, seed=7)
    clean = own.generate(examples, 8)
    base = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"])
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    for found, example in zip(own.logits(examples, adapter), examples, strict=True):
        expected = reference.last_logits(merged, example).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    tuned = own.generate(examples, 8, adapter)
    assert any(not np.array_equal(tokens, other) for tokens, other in zip(tuned, clean, strict=True))
    assert_same(own.generate(examples, 8), clean)
    assert not np.array_equal(own.choices(examples, adapter)[1], own.choices(examples)[1])


def test_same_seed_same_adapter_other_seed_other(own):
    def tuned(seed):
        tuning = own.tune(make_examples(8, seed=4), CHOSEN, dataclasses.replace(RECIPE, seed=seed))
        losses = [record["loss"] for record in tuning]
        return losses, (tuning.adapter / "adapter_model.safetensors").read_bytes()

    assert tuned(3) == tuned(3)
    assert tuned(3)[0] != tuned(4)[0]


def test_a_step_is_adam_on_the_mean_of_example_losses(own, models):
    """One full-batch step of all heads equals AdamW on PEFT's model, written out plainly."""
    examples = make_examples(4, seed=5)
    tuning = own.tune(examples, all_heads(), RECIPE)
    (record,) = list(tuning)
    found = load_file(tuning.adapter / "adapter_model.safetensors")

    model = reference.lora(models["llama-gqa"], RECIPE)
    loss = torch.stack([reference.loss(model, example) for example in examples]).mean()
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0).step()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = peft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_rows_are_cut_at_their_end_and_need_a_target(own):
    (example,) = make_examples(1, seed=8)
    long = dataclasses.replace(example, target_ids=np.arange(3, 63, dtype=np.int32))
    cut = dataclasses.replace(example, target_ids=np.arange(3, 8, dtype=np.int32))
    limit = len(example.prompt_ids) + 5
    recipe = dataclasses.replace(RECIPE, max_length=limit)
    (long_record,), (other,) = list(own.tune([long], CHOSEN, recipe)), list(own.tune([cut], CHOSEN, recipe))
    assert long_record["loss"] == other["loss"] and long_record["tokens"] == other["tokens"] == limit
    with pytest.raises(ValueError, match="e0 has no target token"):
        list(own.tune([example], CHOSEN, dataclasses.replace(RECIPE, max_length=len(example.prompt_ids))))


def test_a_stopped_tuning_leaves_the_model_bare(torch_own):
    for number, _ in enumerate(torch_own.tune(make_examples(8), CHOSEN, RECIPE)):
        if number == 0:
            break
    import gc

    gc.collect()
    assert not any("lora" in name for name, _ in torch_own.model.model.named_modules())


def test_wrong_arguments_are_named(gqa):
    own = gqa.backend
    with pytest.raises(ValueError, match="safe: 5 examples"):
        own.gradient_gram(make_examples(5), make_examples(4), folds=2)
    with pytest.raises(ValueError, match="no head"):
        own.tune(make_examples(2), [(9, 0)], RECIPE)
    with pytest.raises(ValueError, match="no heads"):
        own.tune(make_examples(2), [], RECIPE)
    for optimizer in ("pcgrad", "pcgrad-symmetric"):
        with pytest.raises(ValueError, match=f"reference: {optimizer} needs"):
            own.tune(make_examples(2), CHOSEN, dataclasses.replace(RECIPE, optimizer=optimizer))
    with pytest.raises(InputError, match="cannot be loaded"):
        own.choices(make_examples(2), "/nowhere/at/all")
    with pytest.raises(ValueError, match="ablated"):
        own.logits(make_examples(2), adapter="/any", ablated=(0, 0))


def test_gradients_that_are_not_finite_end_with_a_line(torch_own, monkeypatch):
    def infinite(model, examples, *_):
        return sum(weight.sum() for weight in model.parameters() if weight.requires_grad) * float("inf")

    monkeypatch.setattr(torch_loss, "example_losses", infinite)
    with pytest.raises(InputError, match=r"the gradient of head \(0, 0\) is not finite"):
        torch_own.gradient_gram(make_examples(2), make_examples(2), folds=1)
    monkeypatch.setattr(torch_tune, "example_losses", infinite)
    with pytest.raises(InputError, match="step 0: the gradient is not finite"):
        list(torch_own.tune(make_examples(2), CHOSEN, RECIPE))


# Resuming


@pytest.mark.parametrize("optimizer", ["sft", "pcgrad", "pcgrad-symmetric"])
def test_a_run_that_was_stopped_goes_on_to_the_identical_adapter(own, scratch, monkeypatch, optimizer):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    rows = make_examples(24, seed=4), CHOSEN
    against = make_examples(6, seed=9)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, folder=scratch / "whole")
    expected = list(own.tune(*rows, recipe, against))
    recipe = dataclasses.replace(recipe, folder=scratch / "stopped", checkpoint=scratch / "state")
    steps = iter(own.tune(*rows, recipe, against))
    for _ in range(3):
        next(steps)
    steps.close()
    again = own.tune(*rows, recipe, against)
    records = list(again)
    assert again.repeated == 3 and len(records) == 6
    assert json.dumps(records) == json.dumps(expected)  # NaN is NaN here
    for file in sorted((scratch / "whole").iterdir()):
        assert (scratch / "stopped" / file.name).read_bytes() == file.read_bytes(), file.name

    with pytest.raises(InputError, match="state is another tuning run's"):
        list(own.tune(*rows, dataclasses.replace(recipe, lr=1e-3), against))
    with pytest.raises(InputError, match="state is another tuning run's"):
        list(own.tune(rows[0][:20], CHOSEN, recipe, against))
    (scratch / "state").write_bytes((scratch / "state").read_bytes()[:100])
    with pytest.raises(InputError, match="state is damaged"):
        list(own.tune(*rows, recipe, against))


# What both backends share


def test_every_epoch_sees_every_row_once():
    order = batch_order(10, dataclasses.replace(RECIPE, epochs=3))
    assert [len(rows) for rows in order] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(np.concatenate(order[3 * epoch : 3 * epoch + 3])) == list(range(10))
    assert [learning_rate(step, 4, RECIPE) for step in range(4)] == [2e-2, 1.5e-2, 1e-2, 5e-3]
