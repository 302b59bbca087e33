"""NeuronTune's gains in both backends: against a loop written out, and in PEFT."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import backends
from backends.base import GainRecipe, Selection, Task
from backends.core import checkpoint
from backends.core.schedules import draw_task_rows, gain_bounds, learning_rate, outer_steps
from tests import reference
from tests.conftest import BACKENDS, LAYERS, assert_same, change_tensors, make_examples

RECIPE = GainRecipe(lr=0.1, inner_lr=2.0, inner_steps=2, batch=4, max_length=64, seed=3, epochs=4)
CHOSEN = Selection(safety=((0, 1), (2, 0), (2, 3)), utility=((0, 2), (1, 5)))


def tasks(seed: int = 0, rows: int = 6) -> list[Task]:
    return [
        Task(name, *(tuple(make_examples(rows, seed=seed + 10 * at + half)) for half in (1, 2)))
        for at, name in enumerate(("poem", "novel", "plain"))
    ]


def gains_of(folder) -> np.ndarray:
    """[L, F]."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return np.concatenate(
        [tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.ia3_l"] for layer in range(LAYERS)]
    )


def test_other_gains_stay_exactly_one_and_the_model_as_it_was(own):
    rows = make_examples(3)
    before = own.logits(rows)
    tuning = own.tune_gains(tasks(), CHOSEN, RECIPE)
    with pytest.raises(RuntimeError):
        _ = tuning.adapter
    records = list(tuning)
    assert [record["step"] for record in records] == list(range(outer_steps(tasks(), CHOSEN, RECIPE)))
    assert any(record["projected"] for record in records)
    gains = gains_of(tuning.adapter)
    least, most = gain_bounds(CHOSEN, LAYERS, own.shape.mlp_dim)
    free = least < most
    assert free.sum() == 5 and (gains[~free] == 1).all() and (gains[free] != 1).sum() >= 3
    np.testing.assert_array_equal(own.logits(rows), before)
    assert np.abs(own.logits(rows, tuning.adapter) - before).max() > 1e-3
    nothing = own.tune_gains(tasks(), Selection((), ()), RECIPE)
    assert list(nothing) == [] and (gains_of(nothing.adapter) == 1).all()
    np.testing.assert_array_equal(own.logits(rows, nothing.adapter), before)  # bit for bit
    assert_same(own.generate(rows, 6, nothing.adapter), own.generate(rows, 6))


@pytest.fixture(scope="module", params=BACKENDS)
def gained(request, models):
    """An IA3 folder of either backend, with gains that no one can overlook."""
    own = backends.load(request.param, models["llama-gqa"], device="cpu")
    tuning = own.tune_gains(tasks(), CHOSEN, dataclasses.replace(RECIPE, epochs=1))
    list(tuning)
    draw = np.random.default_rng(1).uniform
    change_tensors(
        tuning.adapter / "adapter_model.safetensors",
        lambda tensors: tensors.update(
            {name: draw(0, 2, own.shape).astype("f4") for name, own in tensors.items()}
        ),
    )
    return tuning.adapter


def test_gains_answer_as_in_peft_and_as_merged(own, models, gained):
    """Each backend with the adapters of both, against PEFT's merge."""
    rows = make_examples(6, seed=7)
    merged = reference.merged(models["llama-gqa"], gained)
    found, expected = own.logits(rows, gained), reference.logits(merged, rows)
    for logits, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(found - own.logits(rows)).max() > 0.1
    assert_same(own.generate(rows, 8, gained), reference.generate(merged, rows, 8))


@pytest.mark.parametrize(("objective", "sign"), [("preserve", 1), ("suppress", -1)])
def test_outer_steps_are_maml_written_out(own, models, objective, sign):
    """Three steps of two inner ones, by autograd on a functional model: so both backends tune alike."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"])
    given, recipe = (
        tasks(rows=4),
        dataclasses.replace(RECIPE, epochs=3, batch=12, utility_objective=objective),
    )
    tuning = own.tune_gains(given, CHOSEN, recipe)
    records = list(tuning)
    assert len(records) == 3
    least, most = map(torch.from_numpy, gain_bounds(CHOSEN, LAYERS, own.shape.mlp_dim))

    def losses(rows, gains):
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, at=at: (args[0] * gains[at],))
            for at, layer in enumerate(model.model.layers)
        ]
        safe, util = (reference.mean_loss(model, part) for part in (rows.safe, rows.util))
        for hook in hooks:
            hook.remove()
        return safe, util

    def gradient(safe, util, gains):
        return torch.autograd.grad(recipe.lam * safe + sign * (1 - recipe.lam) * util, gains)[0]

    outer = torch.nn.Parameter(torch.ones_like(least))
    adam = torch.optim.Adam([outer])
    for step, record in enumerate(records):
        support, query = draw_task_rows(given, step, recipe)
        gains = outer.detach()
        for _ in range(recipe.inner_steps):
            gains = gains.detach().requires_grad_(True)
            moved = gains - recipe.inner_lr * gradient(*losses(support, gains), gains)
            gains = moved.clamp(least, most)
        gains = gains.detach().requires_grad_(True)
        safe, util = losses(query, gains)
        assert record["loss"] == pytest.approx(safe.item(), rel=1e-5)
        assert record["util_loss"] == pytest.approx(util.item(), rel=1e-5)
        assert -1 <= record["cos"] <= 1
        outer.grad = gradient(safe, util, gains) * (least < most)
        adam.param_groups[0]["lr"] = learning_rate(step, len(records), recipe)
        adam.step()
        outer.data.clamp_(least, most)
    expected = outer.detach().numpy()
    np.testing.assert_allclose(gains_of(tuning.adapter), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - 1).max() > 0.05


def test_support_and_query_share_no_row_and_tasks_take_turns():
    given = tasks(rows=7)
    drawn = [draw_task_rows(given, step, RECIPE) for step in range(12)]
    for support, query in drawn:
        assert support.name == query.name
        for left, right in ((support.safe, query.safe), (support.util, query.util)):
            assert len(left) == len(right) == 2
            assert not {id(row) for row in left} & {id(row) for row in right}
    for turn in range(0, 12, 3):
        assert {support.name for support, _ in drawn[turn : turn + 3]} == {"poem", "novel", "plain"}


def test_a_stopped_run_goes_on_to_the_identical_gains(own, scratch, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    recipe = dataclasses.replace(RECIPE, epochs=2)
    reference.goes_on(lambda recipe: own.tune_gains(tasks(), CHOSEN, recipe), recipe, scratch, 4)
