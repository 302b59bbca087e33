"""Continuous batching, called directly on the CPU: its tokens are the plain decoder's and transformers' own,
and what it drops is noticed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

import backends
from backends.base import Example, Recipe, Shape
from backends.core.errors import InputError
from backends.flax import adapter as peft_folder
from backends.torch import continuous
from tests import reference
from tests.conftest import HEADS, KINDS, LAYERS, VOCABULARY, assert_same, load_pair, make_examples


@pytest.fixture(scope="module", params=KINDS)
def torch_pair(request, models):
    return load_pair("torch", models[request.param])


@pytest.fixture()
def own(models):
    return backends.load("torch", models["llama-gqa"], device="cpu")


@pytest.fixture()
def adapter(own, scratch):
    """LoRA in every layer and head, B far from zero."""
    generator, shape = np.random.default_rng(0), own.shape
    a = generator.normal(size=(LAYERS, 4, shape.model_dim)).astype(np.float32)
    b = 0.3 * generator.normal(size=(LAYERS, HEADS, shape.head_dim, 4)).astype(np.float32)
    peft_folder.write(scratch / "adapter", a, b, list(range(LAYERS)), Recipe(rank=4, alpha=8.0))
    return scratch / "adapter"


def prompt_of(ids) -> Example:
    return Example(f"r{len(ids)}", ids.astype(np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32), 0)


# Exactness


def test_tokens_are_the_plain_decoders_and_transformers(torch_pair, monkeypatch):
    """Also where the whole model slides a window shorter than its prompts (Mistral here), with few rows side
    by side and prompts cut."""
    own, prompts = torch_pair.backend, make_examples(9)
    assert len({len(prompt.prompt_ids) for prompt in prompts}) > 3
    expected = own.generate(prompts, 24)
    assert_same(expected, reference.generate(torch_pair.plain, prompts, 24))
    assert_same(continuous.generate(own.model.model, prompts, 24, own.model.eos), expected)
    monkeypatch.setattr(continuous, "ROWS_SDPA", 2)
    monkeypatch.setattr(continuous, "TOKENS_SDPA", 5)
    assert_same(continuous.generate(own.model.model, prompts, 24, own.model.eos), expected)


def test_every_end_of_a_response_is_kept(own):
    """With most of the vocabulary as EOS: responses of one token, of some, and of the whole budget."""
    assert continuous.generate(own.model.model, [], 4, own.model.eos) == []
    prompts, eos = make_examples(24, seed=5), set(range(0, VOCABULARY, 9))
    own.model.eos = frozenset(eos)
    found = continuous.generate(own.model.model, prompts, 12, eos)
    assert_same(found, own.generate(prompts, 12))
    lengths = [len(response) for response in found]
    assert min(lengths) < 4 and max(lengths) == 12
    assert all(response[-1] in eos for response in found if len(response) < 12)
    own.model.eos, generator = frozenset(), np.random.default_rng(0)
    prompts = [prompt_of(generator.integers(3, VOCABULARY, size)) for size in (230, 300, 520)]
    found = continuous.generate(own.model.model, prompts, 40, set())  # longer than a block of the pool
    assert_same(found, own.generate(prompts, 40))


def test_an_adapter_in_the_model_answers(own, adapter, monkeypatch):
    """Through the backend, as on CUDA; the model is as before afterwards."""
    prompts = make_examples(8, seed=7)
    clean, expected = own.generate(prompts, 16), own.generate(prompts, 16, adapter)
    assert any(not np.array_equal(tokens, other) for tokens, other in zip(clean, expected, strict=True))
    calls = []
    monkeypatch.setattr(continuous, "handles", lambda model: calls.append(model) or True)
    assert_same(own.generate(prompts, 16, adapter), expected)
    assert_same(own.generate(prompts, 16), clean)
    assert calls == [own.model.model] * 2 and own.model.model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(continuous, "generate", None)
    swept = dict(own.sweep_generations(prompts[:2], [(1, 0)], 4))
    assert swept.keys() == {(1, 0)}, "the sweep decodes by itself"


# Failures


def test_a_response_that_is_not_a_whole_one_to_its_prompt_is_noticed(own, monkeypatch):
    run = continuous._run
    for change, message in (
        (lambda names, found: found.pop(names[1]), "of 4 responses 0 failed and 1 are missing"),
        (lambda names, found: found[names[0]].generated_tokens.pop(), "is not a whole one to its prompt"),
        (lambda names, found: names.reverse(), "is not a whole one to its prompt"),
    ):

        def changed(*arguments, change=change):
            names, found = run(*arguments)
            change(names, found)
            return names, found

        monkeypatch.setattr(continuous, "_run", changed)
        with pytest.raises(InputError, match=message):
            continuous.generate(own.model.model, make_examples(4), 4, set())


def test_a_step_that_fails_ends_with_a_line(own, monkeypatch):
    """transformers logs the error, and returns what it has."""
    step, taken = ContinuousBatchProcessor._generation_step, []

    def failing(self, model):
        taken.append(None)
        if len(taken) > 3:
            raise RuntimeError("out of something\nand more")
        return step(self, model)

    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", failing)
    with pytest.raises(InputError, match=r"responses \d failed \(out of something\) and 0 are missing"):
        continuous.generate(own.model.model, make_examples(6), 12, own.model.eos)
    monkeypatch.undo()
    assert len(continuous.generate(own.model.model, make_examples(6), 12, own.model.eos)) == 6


# Where, and how large


def test_the_cpu_and_models_of_mixed_windows_are_the_plain_decoders(own, monkeypatch):
    def on_cuda(dtype=torch.bfloat16, **window):
        config = transformers.Qwen2Config(num_hidden_layers=4, **window)
        return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, config=config)

    assert not continuous.handles(own.model.model)
    assert continuous.handles(on_cuda())
    assert not continuous.handles(on_cuda(use_sliding_window=True, sliding_window=64, max_window_layers=2))
    assert continuous.handles(on_cuda(use_sliding_window=True, sliding_window=64, max_window_layers=0))
    monkeypatch.setattr(continuous, "_has_flash", lambda: True)
    monkeypatch.setattr(continuous, "_can_refuse_flash", lambda: False)
    assert continuous.handles(on_cuda())
    assert not continuous.handles(on_cuda(torch.float32))


LLAMA_8B = Shape(layers=32, heads=32, kv_heads=8, head_dim=128, model_dim=4096, mlp_dim=14336, vocab=128256)


def test_the_pool_holds_every_row_to_its_end_and_fits():
    prompts = [prompt_of(np.zeros(size)) for size in [200, 150, 90] * 100]
    for gib in (8, 16, 40, 120):
        for flash in (False, True):
            pool = continuous.plan(LLAMA_8B, 2, gib * 2**30, prompts, 2048, flash)
            assert 1 <= pool.rows <= 300 and pool.rows <= pool.tokens
            assert pool.blocks * 256 >= pool.rows * (200 + 2048)
            held = pool.blocks * 256 * 2 * 32 * 8 * 128 * 2  # keys and values of all layers, two bytes each
            assert held < 0.6 * gib * 2**30
    for some, rows in ((prompts, 64), (prompts[:5], 5)):
        assert continuous.plan(LLAMA_8B, 2, 120 * 2**30, some, 2048, False).rows == rows
    with pytest.raises(InputError, match="a response of 2248 tokens takes"):
        continuous.plan(LLAMA_8B, 2, 2**30, prompts, 2048, False)
