"""How backward passes fit: whatever the plan gradients and tunings are the same, and its estimates hold."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import backends
from backends.base import GainRecipe, Recipe, Selection, Shape, Task
from backends.core.budgets import FoldSums, TuningPlan, Work, plan_gradients, plan_tuning
from backends.core.budgets import GradientPlan as Plan
from backends.torch import gradients, tune
from tests.conftest import make_examples

LLAMA = Shape(layers=32, heads=32, kv_heads=8, head_dim=128, model_dim=4096, mlp_dim=14336, vocab=128256)
GIB = 2**30
PLAIN = Plan(1024, recompute=False, by_layer=False, sums_on_device=True)
OTHERS = [
    Plan(32, recompute=False, by_layer=False, sums_on_device=False),
    Plan(64, recompute=True, by_layer=False, sums_on_device=True),
    Plan(1, recompute=True, by_layer=True, sums_on_device=False),
    Plan(32, recompute=False, by_layer=False, sums_on_device=True, threads=3),
]


def found_by(own, plan, monkeypatch, layers=None, mask="output"):
    safe, util = make_examples(6), make_examples(8, seed=1, choices=4)
    monkeypatch.setattr(gradients, "make_plan", lambda *_: plan)
    found = own.head_gradients(safe, util, 2, layers, mask)
    return found.gram, found.gate_safe, found.gate_util


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2-mqa"])
def test_every_plan_gives_the_same(models, monkeypatch, kind, dtype):
    own = backends.load("torch", models[kind], dtype=dtype, device="cpu")
    before = {name: weight.clone() for name, weight in own.model.model.state_dict().items()}
    expected = found_by(own, PLAIN, monkeypatch)
    bound = 1e-6 if dtype == "float32" else 0.05  # a bfloat16 pass of fewer rows rounds otherwise
    for plan in OTHERS if dtype == "float32" else OTHERS[:2] + OTHERS[3:]:
        for part, same in zip(found_by(own, plan, monkeypatch), expected, strict=True):
            np.testing.assert_allclose(part, same, rtol=0, atol=bound * np.abs(same).max())
        some = found_by(own, plan, monkeypatch, [2, 0], "query")
        for part, same in zip(some, found_by(own, PLAIN, monkeypatch, [2, 0], "query"), strict=True):
            np.testing.assert_allclose(part, same, rtol=0, atol=bound * np.abs(same).max())
    for module in own.model.model.modules():
        assert "forward" not in vars(module)
    for name, weight in own.model.model.named_parameters():
        assert not weight.requires_grad
        assert weight.dtype == before[name].dtype and torch.equal(weight, before[name])


def test_computing_layers_again_changes_no_bit(models, monkeypatch):
    own = backends.load("torch", models["llama-gqa"], dtype="bfloat16", device="cpu")
    again = Plan(1024, recompute=True, by_layer=False, sums_on_device=False)
    for part, same in zip(*(found_by(own, plan, monkeypatch) for plan in (PLAIN, again)), strict=True):
        np.testing.assert_array_equal(part, same)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_pass_keeps_is_foreseen(models, dtype):
    """Autograd keeps less than the estimate, and more than a third of it."""
    decoder = backends.load("torch", models["llama-gqa"], dtype=dtype, device="cpu").model
    rows = make_examples(64, shared=60)
    tokens = len(rows) * max(len(row.prompt_ids) + len(row.target_ids) for row in rows)
    weights = {at: layer.self_attn.q_proj.weight for at, layer in enumerate(decoder.model.model.layers)}
    for weight in weights.values():
        weight.requires_grad_(True)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # which stays, so that no place is used again
        return tensor

    targets = sum(len(row.target_ids) for row in rows) / tokens
    work = Work(decoder.shape, 8 if dtype == "float32" else 2, 3, 80, targets)
    own = SimpleNamespace()
    with (
        gradients.prepared(decoder.model, PLAIN),
        gradients.gated(decoder.model, own, weights, "output"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        weight_places = {weight.untyped_storage().data_ptr() for weight in decoder.model.parameters()}
        gradients._differentiate(decoder.model, rows, weights, own)
    found = sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weight_places
    )
    foreseen = tokens * (work.layers * work.kept_of_layer + work.kept_of_logits)
    assert foreseen / 3 < found < foreseen


@pytest.mark.parametrize(
    ("itemsize", "gib", "expected"),
    [
        (2, 120, Plan(8192, recompute=False, by_layer=False, sums_on_device=True)),  # bfloat16 on an H200
        (2, 20, Plan(2327, recompute=False, by_layer=False, sums_on_device=False)),  # on a card of 40 GB
        (2, 7, Plan(2279, recompute=True, by_layer=False, sums_on_device=False)),  # of 24 GB
        (4, 15, Plan(1077, recompute=True, by_layer=True, sums_on_device=False)),  # float32 on 48 GB
        (4, 1, Plan(400, recompute=True, by_layer=True, sums_on_device=False)),  # tried at least
    ],
)
def test_an_8b_model_by_what_is_free(itemsize, gib, expected):
    work = Work(LLAMA, 8 if itemsize == 4 else 2, layers=32, longest=400, targets=0.5)
    found = plan_gradients(work, FoldSums(itemsize, wanted=32, folds=4), gib * GIB, 8192)
    assert (found.recompute, found.by_layer, found.sums_on_device) == (
        expected.recompute,
        expected.by_layer,
        expected.sums_on_device,
    )
    assert found.tokens == pytest.approx(expected.tokens, rel=0.1)


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (120, TuningPlan(8, recompute=False)),  # bfloat16 on an H200
        (20, TuningPlan(8, recompute=True)),  # on a card of 40 GB
        (7, TuningPlan(4, recompute=True)),  # of 24 GB
        (1, TuningPlan(1, recompute=True)),  # tried at least
    ],
)
def test_tuning_an_8b_model_by_what_is_free(gib, expected):
    work = Work(LLAMA, 2, layers=32, longest=1024, targets=0.5, adapted=LLAMA.model_dim)
    assert plan_tuning(work, gib * GIB, 8) == expected


def tuned_by(own, plan, folder, monkeypatch, kind="heads"):
    """Losses and weights of an adapter, when its passes go by `plan`."""
    monkeypatch.setattr(tune, "plan_tuning", lambda *_: plan)
    if kind == "heads":
        recipe = Recipe(rank=2, alpha=4.0, lr=0.05, batch=4, accumulation=2, seed=3, folder=folder)
        run = own.tune(make_examples(16), [(0, 1), (2, 0)], recipe)
    else:
        rows = make_examples(8), make_examples(8, seed=1)
        chosen = Selection(safety=((0, 1), (2, 5)), utility=((1, 3),))
        run = own.tune_gains([Task("t", *map(tuple, rows))], chosen, GainRecipe(batch=8, folder=folder))
    losses = [record["loss"] for record in run]
    return np.array(losses), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_every_plan_tunes_the_same(models, scratch, monkeypatch, kind):
    own = backends.load("torch", models["llama-gqa"], device="cpu")
    plans = [TuningPlan(4, False), TuningPlan(4, True), TuningPlan(1, False)]
    found = [tuned_by(own, plan, scratch / str(plan), monkeypatch, kind) for plan in plans]
    (losses, weights), (again, same), (alone, close) = found
    np.testing.assert_array_equal(again, losses)
    np.testing.assert_allclose(alone, losses, rtol=1e-5)
    assert any(np.abs(weight).max() > 1e-3 for weight in weights.values())
    for name, weight in weights.items():
        np.testing.assert_array_equal(same[name], weight)
        np.testing.assert_allclose(close[name], weight, atol=1e-3)
    assert all("forward" not in vars(module) for module in own.model.model.modules())


def test_how_many_threads_there_are_changes_no_bit(models, monkeypatch):
    own = backends.load("torch", models["llama-gqa"], device="cpu")
    expected = found_by(own, replace(OTHERS[3], threads=1), monkeypatch)
    for part, same in zip(found_by(own, OTHERS[3], monkeypatch), expected, strict=True):
        np.testing.assert_array_equal(part, same)


def test_an_error_in_a_thread_is_raised(models, monkeypatch):
    own = backends.load("torch", models["llama-gqa"], device="cpu")

    def fail(*_):
        raise ValueError("no such row")

    monkeypatch.setattr(gradients, "_differentiate", fail)
    with pytest.raises(ValueError, match="no such row"):
        found_by(own, OTHERS[3], monkeypatch)
    assert not any(weight.requires_grad for weight in own.model.model.parameters())
    assert own.model.model.dtype == torch.float32


def test_passes_go_side_by_side_where_memory_allows():
    work = Work(LLAMA, 2, layers=32, longest=100, targets=0.5)
    sums = FoldSums(2, wanted=32, folds=4, host=False)
    for gib, threads in ((400, 8), (40, 0), (1, 0)):
        assert plan_gradients(work, sums, gib * GIB, 512, threads=8).threads == threads


def test_a_cpu_keeps_its_sums():
    work, sums = Work(LLAMA, 2, layers=32, longest=100, targets=0.5), FoldSums(2, 32, 4, host=False)
    assert all(plan_gradients(work, sums, gib * GIB, 1024).sums_on_device for gib in (1, 20, 40))


def test_a_plan_says_what_it_is():
    assert str(TuningPlan(8, False)) == "8 rows a pass"
    assert str(TuningPlan(3, True)) == "3 rows a pass, layers computed again in the backward pass"
    assert str(PLAIN) == "1024 tokens a pass, sums on the device"
    assert str(OTHERS[3]) == "32 tokens a pass, 3 at a time, sums on the device"
    assert str(OTHERS[2]) == (
        "1 tokens a pass, layers computed again in the backward pass, float64 one by one, sums on the host"
    )
