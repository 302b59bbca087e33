"""NeuronTune in both backends: attributions against plain autograd and by completeness, gains by their
bounds, against a loop written out, in PEFT, and against each other."""

import dataclasses
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import backends
from backends import checkpoint, flax_adapter
from backends.errors import InputError
from backends.neurons import (
    COMPLETE,
    NODES,
    GainRecipe,
    Selection,
    Task,
    bounds,
    draw,
    evaluated,
    integrate,
    outer_steps,
    quadrature,
)
from tests import reference
from tests.conftest import BACKENDS, KINDS, LAYERS, make_examples

RECIPE = GainRecipe(lr=0.1, inner_lr=2.0, inner_steps=2, batch=4, max_length=64, seed=3, epochs=4)
CHOSEN = Selection(safety=((0, 1), (2, 0), (2, 3)), utility=((0, 2), (1, 5)))


def tasks(seed: int = 0, rows: int = 6) -> list[Task]:
    return [
        Task(name, *(tuple(make_examples(rows, seed=seed + 10 * at + half)) for half in (1, 2)))
        for at, name in enumerate(("poem", "novel", "plain"))
    ]


@pytest.fixture(scope="module", params=KINDS)
def both(request, models):
    return [backends.load(name, models[request.param], device="cpu") for name in BACKENDS]


# Attribution


def plain_losses(model, example, put) -> torch.Tensor:
    """Loss with hooks that set neurons at the last prompt token: put(layer, what W_down reads there)."""
    at = len(example.prompt_ids) - 1

    def hook(layer):
        def replaced(module, args):
            neurons = args[0].clone()
            neurons[:, at] = put(layer, neurons[:, at])
            return neurons

        return replaced

    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(hook(number))
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        return reference.loss(model, example)
    finally:
        for handle in handles:
            handle.remove()


def plain_neurons(model, example) -> torch.Tensor:
    found = []
    with torch.no_grad():
        plain_losses(model, example, lambda _, neurons: found.append(neurons[0].clone()) or neurons)
    return torch.stack(found)


def plain_attribution(model, example, start, steps, together) -> np.ndarray:
    """[L, F], one point after another on the whole sequence."""
    end = plain_neurons(model, example)
    start = torch.zeros_like(end) if start is None else start
    total = torch.zeros_like(end)
    for node, weight in zip(*quadrature(steps), strict=True):
        for moved in [range(len(end))] if together else [[layer] for layer in range(len(end))]:
            path = (start + float(node) * (end - start)).requires_grad_(True)
            loss = plain_losses(
                model,
                example,
                lambda layer, own, path=path, moved=moved: path[layer][None] if layer in moved else own,
            )
            (gradient,) = torch.autograd.grad(loss, path)
            total += float(weight) * gradient
    return ((end - start) * total).abs().double().numpy()


def test_attributions_are_those_of_plain_loops(pair):
    examples, others = make_examples(2, seed=1), make_examples(2, seed=5)
    model = pair.plain.double()
    try:
        starts = [plain_neurons(model, one) for one in others]
        expected = [
            np.mean([plain_attribution(model, one, None, 3, False) for one in examples], axis=0),
            np.mean(
                [
                    plain_attribution(model, one, start, 3, True)
                    for one, start in zip(examples, starts, strict=True)
                ],
                axis=0,
            ),
        ]
    finally:
        pair.plain.float()
    for baselines, wanted in zip((None, others), expected, strict=True):
        found = pair.backend.attribute_neurons(examples, baselines, steps=3).score
        assert found.shape == (LAYERS, pair.backend.shape.mlp_dim) and found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * wanted.max())
        assert (wanted > 1e-4 * wanted.max()).mean() > 0.5, "most neurons must count"


def test_attributions_are_complete(gqa):
    """They sum to what the loss changes along the path."""
    examples = make_examples(3, seed=2)
    for baselines, paths in ((None, LAYERS), (make_examples(3, seed=7), 1)):
        found = gqa.backend.attribute_neurons(examples, baselines, steps=64)
        assert found.total.shape == found.change.shape == (3, paths)
        assert np.abs(found.change).max() > 1e-2, "the loss must change"
        assert found.gap < 0.01
        np.testing.assert_allclose(found.total, found.change, atol=0.01 * np.abs(found.change).max())


def test_a_path_that_goes_nowhere_attributes_nothing(gqa):
    examples = make_examples(2, seed=3)
    found = gqa.backend.attribute_neurons(examples, examples, steps=2)
    assert found.score.max() == 0 and found.gap == 0


def test_quadrature_is_exact_on_polynomials_and_of_a_linear_model():
    """A linear loss w · v has gradient w everywhere: attributions (v - v0) * w, for any number of steps."""
    nodes, weights = quadrature(4)
    for power in range(8):
        assert weights @ nodes**power == pytest.approx(1 / (power + 1), rel=1e-12)
    generator = np.random.default_rng(0)
    w, start, end = generator.normal(size=(3, 5))
    for steps in (1, 4, 16):
        nodes, weights = quadrature(steps)
        gradient = np.broadcast_to(w, (steps, 5))
        np.testing.assert_allclose((end - start) * (weights @ gradient), (end - start) * w, rtol=1e-12)


def test_a_path_gets_more_nodes_until_it_is_complete():
    """Two easy paths and one with a step near its start, which no rule of 64 nodes over the whole finds."""
    asked = []

    def evaluate(paths, points):
        asked.append(np.bincount(paths, minlength=3))
        steep = np.array([0.5, 0.5, 2000.0])[paths]
        along = np.tanh(steep * points) + 1 - np.tanh(steep)  # 1 at the end of each
        return along, (steep / np.cosh(np.minimum(steep * points, 50)) ** 2)[..., None]

    nodes, weights = quadrature(64)
    assert abs(weights @ evaluate(np.full(64, 2), nodes)[1][:, 0] - 1) > 0.1
    asked.clear()
    (found,) = integrate(evaluate, 1, 3, 64)
    assert asked[0].tolist() == [NODES + 2, NODES + 1, NODES + 1]
    assert all(rows[:2].sum() == 0 for rows in asked[1:])
    assert NODES * len(asked) <= 64, "a piece more each time"
    np.testing.assert_allclose(found.total, found.change, atol=2 * COMPLETE)
    np.testing.assert_allclose(found.own[:, 0], np.tanh([0.5, 0.5, 2000.0]), atol=2 * COMPLETE)
    asked.clear()
    integrate(evaluate, 1, 3, 2 * NODES - 1)
    assert len(asked) == 1
    asked.clear()
    apart = integrate(evaluate, 3, 1, 64)  # of three examples each to its own accuracy
    assert asked[0].tolist() == [NODES + 2] * 3
    np.testing.assert_array_equal(apart[2].own[0], found.own[2])


def test_rounding_is_no_reason_for_more_nodes():
    """A loss that rises by 1.01 in numbers of eight bits, whose last digit is more than COMPLETE of it."""
    asked = []

    def evaluate(paths, points):
        asked.append(len(points))
        rounded = torch.from_numpy(5.01 + 1.01 * points).bfloat16().double().numpy()
        return rounded, np.full((len(points), 1), 1.01)

    integrate(evaluate, 1, 1, 64, rounding=torch.finfo(torch.bfloat16).eps)
    assert asked == [NODES + 2]
    integrate(evaluate, 1, 1, 64)
    assert sum(asked[1:]) > 32


def test_rows_are_asked_for_by_path_and_few_at_a_time():
    asked = []

    def evaluate(paths, points):
        asked.append(paths.tolist())
        return points, np.stack([paths, points], axis=1)

    paths, points = np.array([2, 0, 1, 0, 2]), np.arange(5.0)
    along, gradient = evaluated([1, 2, 5], 4, evaluate)(paths, points)
    assert asked == [[0, 0, 1], [2], [2]]
    np.testing.assert_array_equal(along, points)
    np.testing.assert_array_equal(gradient, np.stack([paths, points], axis=1))


def test_both_backends_attribute_alike(both):
    """Targets of three and four tokens: another length would be another program to compile."""
    examples, others = make_examples(3, seed=1), make_examples(3, seed=5)
    examples = [
        dataclasses.replace(one, target_ids=np.resize(one.target_ids, 3 + at % 2))
        for at, one in enumerate(examples)
    ]
    for baselines in (None, others):
        left, right = (one.attribute_neurons(examples, baselines, steps=16) for one in both)
        np.testing.assert_allclose(left.score, right.score, rtol=0, atol=1e-5 * left.score.max())
        np.testing.assert_allclose(left.change, right.change, atol=1e-5 * np.abs(left.change).max())
        best = [np.argsort(-one.score.ravel(), kind="stable")[:20] for one in (left, right)]
        assert set(best[0]) == set(best[1])


def test_attribution_leaves_nothing_behind(own):
    examples = make_examples(2)
    before = own.logits(examples)
    own.attribute_neurons(examples, None, steps=2)
    np.testing.assert_array_equal(own.logits(examples), before)


# Gains


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
    least, most = bounds(CHOSEN, LAYERS, own.shape.mlp_dim)
    assert ((least <= gains) & (gains <= most)).all()
    free = least < most
    assert free.sum() == 5 and (gains[~free] == 1).all() and (gains[free] != 1).sum() >= 3
    np.testing.assert_array_equal(own.logits(rows), before)
    assert np.abs(own.logits(rows, tuning.adapter) - before).max() > 1e-3


def test_without_neurons_the_model_is_the_base_bit_for_bit(own, models):
    rows = make_examples(4)
    tuning = own.tune_gains(tasks(), Selection((), ()), RECIPE)
    assert list(tuning) == [] and (gains_of(tuning.adapter) == 1).all()
    np.testing.assert_array_equal(own.logits(rows, tuning.adapter), own.logits(rows))
    for one, other in zip(own.generate(rows, 6, tuning.adapter), own.generate(rows, 6), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module", params=BACKENDS)
def gained(request, models):
    """An IA3 folder of either backend, with gains that no one can overlook."""
    own = backends.load(request.param, models["llama-gqa"], device="cpu")
    tuning = own.tune_gains(tasks(), CHOSEN, dataclasses.replace(RECIPE, epochs=1))
    list(tuning)
    path = tuning.adapter / "adapter_model.safetensors"
    generator = np.random.default_rng(1)
    tensors = {
        name: generator.uniform(0, 2, tensor.shape).astype(np.float32)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tuning.adapter


def test_gains_answer_as_in_peft_and_as_merged(own, models, gained):
    """Each backend with the adapters of both, against PEFT's merge."""
    rows = make_examples(6, seed=7)
    base = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"])
    merged = peft.PeftModel.from_pretrained(base, gained).merge_and_unload()
    found, clean = own.logits(rows, gained), own.logits(rows)
    for one, example in zip(found, rows, strict=True):
        expected = reference.last_logits(merged, example).numpy()
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - clean).max() > 0.1
    for one, example in zip(own.generate(rows, 8, gained), rows, strict=True):
        np.testing.assert_array_equal(one, reference.generate(merged, example, 8))


def test_an_outer_step_is_maml_written_out(own, models):
    """One step of two inner ones, by autograd on a functional model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"])
    given = tasks(rows=4)
    recipe = dataclasses.replace(RECIPE, epochs=1, batch=16)  # one step of four rows each
    tuning = own.tune_gains(given, CHOSEN, recipe)
    (record,) = list(tuning)
    least, most = map(torch.from_numpy, bounds(CHOSEN, LAYERS, own.shape.mlp_dim))

    def objective(rows, gains):
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, at=at: (args[0] * gains[at],))
            for at, layer in enumerate(model.model.layers)
        ]
        safe, util = (
            torch.stack([reference.loss(model, one) for one in part]).mean()
            for part in (rows.safe, rows.util)
        )
        for hook in hooks:
            hook.remove()
        return safe, util, recipe.lam * safe + (1 - recipe.lam) * util

    support, query = draw(given, 0, recipe)
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
    runs = [one.tune_gains(tasks(rows=7), CHOSEN, recipe) for one in both]
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
        support, query = draw(given, step, RECIPE)
        names.append(support.name)
        assert support.name == query.name
        for left, right in ((support.safe, query.safe), (support.util, query.util)):
            assert len(left) == len(right) == 2
            assert not {id(row) for row in left} & {id(row) for row in right}
    for turn in range(4):
        assert set(names[3 * turn : 3 * turn + 3]) == {"poem", "novel", "plain"}


def test_a_stopped_run_goes_on_to_the_identical_gains(own, scratch, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    recipe = dataclasses.replace(RECIPE, epochs=2, folder=scratch / "whole")
    expected = list(own.tune_gains(tasks(), CHOSEN, recipe))
    recipe = dataclasses.replace(recipe, folder=scratch / "stopped", checkpoint=scratch / "state")
    steps = iter(own.tune_gains(tasks(), CHOSEN, recipe))
    for _ in range(4):
        next(steps)
    steps.close()
    again = own.tune_gains(tasks(), CHOSEN, recipe)
    records = list(again)
    assert again.repeated == 4 and json.dumps(records) == json.dumps(expected)
    for file in sorted((scratch / "whole").iterdir()):
        assert (scratch / "stopped" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(InputError, match="state is another tuning run's"):
        list(own.tune_gains(tasks(), CHOSEN, dataclasses.replace(recipe, lam=0.9)))


def test_wrong_arguments_are_named(gqa, scratch):
    own, rows = gqa.backend, make_examples(3)
    with pytest.raises(ValueError, match="no examples"):
        own.attribute_neurons([])
    with pytest.raises(ValueError, match="baselines: 2 for 3"):
        own.attribute_neurons(rows, rows[:2])
    with pytest.raises(ValueError, match="no neuron"):
        own.tune_gains(tasks(), Selection(((9, 0),), ()), RECIPE)
    with pytest.raises(ValueError, match="given twice"):
        own.tune_gains(tasks(), Selection(((0, 0),), ((0, 0),)), RECIPE)
    with pytest.raises(ValueError, match="task one: two harmful"):
        own.tune_gains([Task("one", tuple(rows[:1]), tuple(rows))], CHOSEN, RECIPE)
    flax_adapter.write_gains(scratch / "short", np.ones((LAYERS - 1, own.shape.mlp_dim), np.float32))
    if own.name == "flax":
        with pytest.raises(InputError, match="gains of W_down's input are not those"):
            own.logits(rows, scratch / "short")
