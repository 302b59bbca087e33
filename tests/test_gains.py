"""NeuronTune's gains in both backends: by their bounds, against a loop written out, in PEFT, and against each
other."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import backends
from backends.base import GainRecipe, Selection, Task
from backends.core import checkpoint
from backends.core.errors import InputError
from backends.core.schedules import draw_task_rows, gain_bounds, outer_steps
from backends.flax import adapter as peft_folder
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


def test_gains_stay_in_their_bounds_and_others_at_one(own):
    rows = make_examples(3)
    before = own.logits(rows)
    tuning = own.tune_gains(tasks(), CHOSEN, RECIPE)
    with pytest.raises(RuntimeError):
        _ = tuning.adapter
    records = list(tuning)
    assert [record["step"] for record in records] == list(range(outer_steps(tasks(), CHOSEN, RECIPE)))
    assert any(record["projected"] for record in records)
    assert all(-1 <= record["cos"] <= 1 for record in records)
    gains = gains_of(tuning.adapter)
    least, most = gain_bounds(CHOSEN, LAYERS, own.shape.mlp_dim)
    assert ((least <= gains) & (gains <= most)).all()
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
    generator = np.random.default_rng(1)

    def scatter(tensors):
        for gains in tensors.values():
            gains[:] = generator.uniform(0, 2, gains.shape)

    change_tensors(tuning.adapter / "adapter_model.safetensors", scatter)
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


def test_an_outer_step_is_maml_written_out(own, models):
    """One step of two inner ones, by autograd on a functional model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"])
    given = tasks(rows=4)
    recipe = dataclasses.replace(RECIPE, epochs=1, batch=16)  # one step of four rows each
    tuning = own.tune_gains(given, CHOSEN, recipe)
    (record,) = list(tuning)
    least, most = map(torch.from_numpy, gain_bounds(CHOSEN, LAYERS, own.shape.mlp_dim))

    def objective(rows, gains):
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, at=at: (args[0] * gains[at],))
            for at, layer in enumerate(model.model.layers)
        ]
        safe, util = (reference.mean_loss(model, part) for part in (rows.safe, rows.util))
        for hook in hooks:
            hook.remove()
        return safe, util, recipe.lam * safe + (1 - recipe.lam) * util

    support, query = draw_task_rows(given, 0, recipe)
    gains = torch.ones_like(least)
    for _ in range(recipe.inner_steps):
        gains = gains.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(support, gains)[2], gains)
        gains = (gains - recipe.inner_lr * gradient).clamp(least, most)
    gains = gains.detach().requires_grad_(True)
    safe, util, whole = objective(query, gains)
    (gradient,) = torch.autograd.grad(whole, gains)
    start = torch.nn.Parameter(torch.ones_like(least))
    start.grad = gradient * (least < most)
    torch.optim.Adam([start], lr=recipe.lr).step()
    expected = start.detach().clamp(least, most).numpy()
    assert record["loss"] == pytest.approx(safe.item(), rel=1e-5)
    assert record["util_loss"] == pytest.approx(util.item(), rel=1e-5)
    np.testing.assert_allclose(gains_of(tuning.adapter), expected, atol=1e-5)
    assert (expected != 1).any()


def test_suppressing_turns_the_utility_gradient(own):
    found = {}
    for objective in ("preserve", "suppress"):
        recipe = dataclasses.replace(
            RECIPE, lam=0.0, utility_objective=objective, inner_lr=0.0, epochs=1, batch=8
        )
        tuning = own.tune_gains(tasks(), Selection(((0, 1), (1, 2), (2, 3)), ()), recipe)
        list(tuning)
        found[objective] = gains_of(tuning.adapter)
    both_up = (found["preserve"] > 1) & (found["suppress"] > 1)
    assert (found["preserve"] != found["suppress"]).any() and both_up.sum() < 3


def test_both_backends_tune_gains_alike(both):
    """Gains within 1e-4 after 20 outer steps."""
    recipe = dataclasses.replace(RECIPE, batch=2, epochs=3)
    runs = [backend.tune_gains(tasks(rows=7), CHOSEN, recipe) for backend in both]
    records = [list(run)[:] for run in runs]
    assert len(records[0]) == len(records[1]) >= 20
    for name in ("loss", "util_loss"):
        left, right = ([record[name] for record in own] for own in records)
        np.testing.assert_allclose(left, right, rtol=1e-4)
    left, right = (gains_of(run.adapter) for run in runs)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4)
    assert np.abs(left - 1).max() > 0.1


def test_support_and_query_share_no_row_and_tasks_take_turns():
    given = tasks(rows=7)
    names = []
    for step in range(12):
        support, query = draw_task_rows(given, step, RECIPE)
        names.append(support.name)
        assert support.name == query.name
        for left, right in ((support.safe, query.safe), (support.util, query.util)):
            assert len(left) == len(right) == 2
            assert not {id(row) for row in left} & {id(row) for row in right}
    for turn in range(4):
        assert set(names[3 * turn : 3 * turn + 3]) == {"poem", "novel", "plain"}


def test_a_stopped_run_goes_on_to_the_identical_gains(own, scratch, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    recipe = dataclasses.replace(RECIPE, epochs=2)
    reference.goes_on(lambda recipe: own.tune_gains(tasks(), CHOSEN, recipe), recipe, scratch, 4)


def test_wrong_arguments_are_named(gqa, scratch):
    own, rows = gqa.backend, make_examples(3)
    small = [Task("one", tuple(rows[:1]), tuple(rows))]
    for call, message in (
        (lambda: own.attribute_neurons([]), "no examples"),
        (lambda: own.attribute_neurons(rows, rows[:2]), "baselines: 2 for 3"),
        (lambda: own.tune_gains(tasks(), Selection(((9, 0),), ()), RECIPE), "no neuron"),
        (lambda: own.tune_gains(tasks(), Selection(((0, 0),), ((0, 0),)), RECIPE), "given twice"),
        (lambda: own.tune_gains(small, CHOSEN, RECIPE), "task one: at least two harmful"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    peft_folder.write_gains(scratch / "short", np.ones((LAYERS - 1, own.shape.mlp_dim), np.float32))
    if own.name == "flax":
        with pytest.raises(InputError, match="gains of W_down's input are not those"):
            own.logits(rows, scratch / "short")
