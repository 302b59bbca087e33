"""Every verb on CUDA against the CPU, on tiny random models in float32; bfloat16 against float32.

python -m pytest -m cuda                          # on a machine with a GPU
CAST_TEST_DEVICE=cpu python -m pytest -m cuda     # the same code without one: a CPU with itself
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import backends
from backends.base import Backend, GainRecipe, Recipe, Selection, Task
from backends.core import checkpoint
from backends.torch import generate
from stages import compare
from stages.run.presets import preset_settings
from tests import reference
from tests.conftest import ALL_HEADS, HEAD_DIM, KINDS, VOCABULARY, assert_records, assert_same, make_examples
from tests.runs import make_run
from tests.test_sweep import assert_idle, idle_model

DEVICE = os.environ.get("CAST_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason=f"torch {torch.__version__} sees no CUDA device",
    ),
]


def has_device(name: str) -> bool:
    if name == "torch" or DEVICE == "cpu":
        return True
    import jax

    return jax.default_backend() == "gpu"


@pytest.fixture(
    scope="module",
    params=[*(("torch", kind) for kind in KINDS), ("flax", "llama-gqa"), ("flax", "qwen2-mqa")],
    ids="-".join,
)
def two(request, models) -> tuple[Backend, Backend]:
    """A model on the device and on the CPU."""
    name, kind = request.param
    if not has_device(name):
        pytest.skip("JAX sees no GPU")
    return tuple(backends.load(name, models[kind], device=device) for device in (DEVICE, "cpu"))


@pytest.fixture(params=["torch", "flax"])
def own(request, models) -> Backend:
    """On the device, in float32."""
    if not has_device(request.param):
        pytest.skip("JAX sees no GPU")
    return backends.load(request.param, models["llama-gqa"], device=DEVICE)


# Float32: the same as on the CPU


def close(found, expected, tolerance: float = 1e-4) -> None:
    """Within a share of the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_logits_choices_and_likelihoods(two):
    here, cpu = two
    assert here.device == {"cuda": "cuda:0"}.get(DEVICE, cpu.device)
    open_, closed = make_examples(7), make_examples(6, seed=1, choices=4)
    close(here.logits(open_), cpu.logits(open_))
    for mask in ("output", "query"):
        close(here.logits(open_, ablated=(1, 2), mask=mask), cpu.logits(open_, ablated=(1, 2), mask=mask))
    for examples in (open_, closed):
        for found, expected in zip(here.choices(examples), cpu.choices(examples), strict=True):
            close(found, expected)
        close(here.grade(examples).outcome, cpu.grade(examples).outcome)


@pytest.mark.parametrize("mask", ["output", "query"])
def test_sweeps(two, mask):
    here, cpu = two
    open_, closed = make_examples(5, seed=2), make_examples(6, seed=1, choices=4)
    for examples in (open_, closed):
        found, expected = (dict(own.sweep_choices(examples, ALL_HEADS, mask)) for own in two)
        assert all(np.array_equal(found[head], expected[head]) for head in ALL_HEADS)
        found, expected = (dict(own.sweep_grades(examples, ALL_HEADS, mask)) for own in two)
        close([found[head] for head in ALL_HEADS], [expected[head] for head in ALL_HEADS])
    found, expected = (dict(own.sweep_generations(open_, ALL_HEADS, 10, mask)) for own in two)
    for head in ALL_HEADS:
        assert_same(found[head], expected[head])


def test_responses(two):
    here, cpu = two
    prompts = make_examples(9)
    assert_same(here.generate(prompts, 24), cpu.generate(prompts, 24))


@pytest.mark.parametrize("mask", ["output", "query"])
def test_gradients(two, mask):
    here, cpu = two
    safe, util = make_examples(6), make_examples(8, seed=1, choices=4)
    found, expected = (own.head_gradients(safe, util, folds=2, mask=mask) for own in two)
    for name in ("gram", "gate_safe", "gate_util"):
        close(getattr(found, name), getattr(expected, name))


def test_attribution(two):
    safe, plain = make_examples(5), make_examples(5, seed=4)
    for baselines in (None, plain):
        found, expected = (own.attribute_neurons(safe, baselines, steps=4) for own in two)
        close(found.score, expected.score, 1e-3)


@pytest.mark.parametrize("optimizer", ["sft", "pcgrad", "pcgrad-symmetric"])
def test_tuned_heads(two, scratch, optimizer):
    """Records, adapters, and answers with them; rows of other heads stay zero."""
    here, cpu = two
    rows, against = make_examples(16), make_examples(6, seed=1)
    heads = [(0, 1), (1, 3), (2, 0)]
    recipe = Recipe(rank=4, alpha=4.0, lr=0.02, optimizer=optimizer)
    runs = [
        own.tune(rows, heads, replace(recipe, folder=scratch / name), against)
        for own, name in zip(two, ("here", "cpu"), strict=True)
    ]
    for found, expected in zip(*runs, strict=True):
        assert_records(found, expected, rel=1e-3, abs=1e-5)
    tensors, same = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    assert tensors.keys() == same.keys()
    for name, tensor in tensors.items():
        close(tensor, same[name], 1e-3)
        if "lora_B" in name:
            moved = {row // HEAD_DIM for row in np.flatnonzero(np.abs(tensor).sum(axis=1))}
            assert len(moved) == 1
    close(here.logits(rows, runs[1].adapter), cpu.logits(rows, runs[1].adapter))
    assert_same(here.generate(rows, 6, runs[1].adapter), cpu.generate(rows, 6, runs[1].adapter))


def test_tuned_gains(two, scratch):
    tasks = [Task("plain", tuple(make_examples(8)), tuple(make_examples(8, seed=1)))]
    neurons = Selection(safety=((0, 1), (2, 3)), utility=((1, 2),))
    runs = [
        own.tune_gains(tasks, neurons, GainRecipe(lr=0.1, batch=4, folder=scratch / name))
        for own, name in zip(two, ("here", "cpu"), strict=True)
    ]
    for found, expected in zip(*runs, strict=True):
        assert_records(found, expected, rel=1e-3, abs=1e-5)
    tensors, same = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    for name, tensor in tensors.items():
        close(tensor, same[name], 1e-3)


def test_a_stopped_tuning_goes_on_to_the_identical_adapter(own, scratch, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    rows, recipe = make_examples(24), Recipe(rank=4, lr=0.02, batch=2, optimizer="pcgrad")
    reference.goes_on(
        lambda recipe: own.tune(rows, ALL_HEADS[::2], recipe, make_examples(4, seed=1)),
        recipe,
        scratch,
        stop=2,
    )


def test_rows_that_end_make_room(two, monkeypatch):
    """Few rows side by side, responses of unequal length."""
    if two[0].name == "flax":
        pytest.skip("Flax decodes in blocks")
    here, cpu = two
    prompts = make_examples(24, seed=5)
    ends = frozenset(range(0, VOCABULARY, 9))
    monkeypatch.setattr(here.model, "eos", ends)
    monkeypatch.setattr(cpu.model, "eos", ends)
    expected = cpu.generate(prompts, 12)
    assert len({len(tokens) for tokens in expected}) > 4
    monkeypatch.setattr(generate, "ROWS_CUDA", 5)
    assert_same(here.generate(prompts, 12), expected)


# Half precision


@pytest.mark.parametrize("mask", ["output", "query"])
def test_a_head_without_effect_shows_none(models, scratch, mask):
    assert_idle(backends.load("torch", idle_model(models, scratch), device=DEVICE, dtype="bfloat16"), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(models, kind):
    half, full = (
        backends.load("torch", models[kind], device=DEVICE, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    examples = make_examples(24, seed=5)
    spread = float(full.logits(examples).std())
    assert np.abs(half.logits(examples) - full.logits(examples)).mean() < 0.05 * spread
    np.testing.assert_allclose(
        half.grade(examples).outcome, full.grade(examples).outcome, atol=0.05 * spread, rtol=0.05
    )


# A whole run


def test_stages_give_what_they_give_on_the_cpu(scratch):
    """Stages 01 to 05 of a tiny run on both devices."""
    settings = preset_settings("tiny").replace(
        benchmarks=("facts=12", "problems=4:6", "adversarial=4:6", "benign=4:6"),
        arms=("full", "bucket1"),
        align_rows=16,
        sweep_tokens=5,
    )
    runs = [
        make_run(scratch / device, settings.replace(device=device))
        for device in dict.fromkeys((DEVICE, "cpu"))
    ]
    if len(runs) == 2:
        assert compare.main(*runs) == 0
