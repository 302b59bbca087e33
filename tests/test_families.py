"""Every family that runs on torch, against transformers' own model with a hook and `generate`, in short; the
tests of all kinds take them too where they are marked `long`. And what is refused, by which name."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import backends
from backends import models as folders
from backends.base import Recipe
from backends.core.errors import InputError
from backends.core.schedules import learning_rate
from backends.core.seeds import batch_order
from backends.torch import decoder as torch_decoder
from stages import audit
from stages.run.pipeline import STAGES, declaration
from stages.run.presets import preset_settings
from stages.run.store import RunFolder
from tests import reference
from tests.conftest import ALL_HEADS, HEAD_DIM, Pair, assert_same, load_pair, make_examples
from tests.families import FAMILIES, GQA, save, write_family
from tests.runs import TINY, make_run

RECIPE = Recipe(rank=4, alpha=8.0, lr=1e-2, batch=2, accumulation=2, epochs=4, max_length=64, seed=5)
SOME = [(0, 1), (1, 3), (2, 0)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Pair:
    return load_pair("torch", write_family(tmp_path_factory.mktemp("family") / request.param, request.param))


def assert_near(found, expected, share: float = 1e-5) -> None:
    """Within a share of the largest."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


def test_logits_and_responses_are_transformers(family):
    examples = make_examples(5, seed=2)
    assert_near(family.backend.logits(examples), reference.logits(family.plain, examples))
    assert_same(family.backend.generate(examples, 8), reference.generate(family.plain, examples, 8))


@pytest.mark.parametrize("mask", ["output", "query"])
def test_ablated_heads_are_the_hooks(family, mask):
    own, plain, examples = *family, make_examples(4, seed=1)
    clean, choices = own.logits(examples), dict(own.sweep_choices(examples, ALL_HEADS, mask))
    for head, responses in own.sweep_generations(examples, SOME, 6, mask):
        with reference.ablated(plain, *head, mask):
            expected = reference.logits(plain, examples)
            assert_near(own.logits(examples, ablated=head, mask=mask), expected)
            np.testing.assert_array_equal(choices[head], expected.argmax(axis=1))
            assert_same(responses, reference.generate(plain, examples, 6))
        assert np.abs(expected - clean).max() > 1e-2, "ablating must change something"


def test_gradients_are_those_of_plain_losses(family):
    """Of single rows as folds, in float64."""
    safe, util = make_examples(2, seed=3), make_examples(2, seed=4)
    found = family.backend.gradient_gram(safe, util, folds=2)
    with reference.doubled(family.plain) as model:
        weights = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in model.model.layers]
        rows = [torch.autograd.grad(reference.loss(model, row), weights) for row in (*safe, *util)]
        model.requires_grad_(False)
    for layer, head in ALL_HEADS:
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        stacked = torch.stack([row[layer][own].flatten() for row in rows])
        assert_near(found[layer, head], (stacked @ stacked.T).numpy())
    assert np.ptp(found[:, :, 0, 0]) > 0


def plain_steps(model, examples, recipe: Recipe) -> Iterator[float]:
    """Adam on all of PEFT's parameters, by transformers' own loss."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam, order = torch.optim.AdamW(weights, weight_decay=0.0), batch_order(len(examples), recipe)
    for step, batch in enumerate(order):
        loss = reference.mean_loss(model, [examples[row] for row in batch])
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        adam.param_groups[0]["lr"] = learning_rate(step, len(order), recipe)
        adam.step()
        yield loss.item()


def test_one_step_and_twenty_are_pefts_own(family, scratch):
    """Every head is tuned; PEFT loads the adapter, and answers as the backend does with it."""
    folder, examples = family.plain.config._name_or_path, make_examples(20, seed=9)
    for epochs, rows in ((1, examples[:4]), (4, examples)):
        recipe = dataclasses.replace(RECIPE, epochs=epochs, folder=scratch / str(epochs))
        records = list(family.backend.tune(rows, ALL_HEADS, recipe))
        model = reference.lora(folder, recipe)
        losses = list(plain_steps(model, rows, recipe))
        assert len(losses) == {1: 1, 4: 20}[epochs]
        np.testing.assert_allclose([record["loss"] for record in records], losses, rtol=0, atol=2e-5)
    merged, prompts = reference.merged(folder, recipe.folder), make_examples(4)
    tuned = family.backend.logits(prompts, recipe.folder)
    assert_near(tuned, reference.logits(merged, prompts))
    assert_near(tuned, reference.logits(model, prompts), 1e-3)
    assert np.abs(tuned - family.backend.logits(prompts)).max() > 1e-2


# What is refused

CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48}
LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
REFUSED = {
    "phi3": (
        {},
        r"0.self_attn.q_proj.weight is none of the weights \(attention has .*qkv_proj.weight",
    ),
    "lfm2": (CONVOLUTION, "layer 0 is of type 'conv'"),
    "qwen3_5_text": (LINEAR, "layer 0 is of type 'linear_attention'"),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "self_attn.sinks is not handled"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 40}, "self_attn.q_proj.weight is none of the weights"),
}
"""family -> what its configuration has beside `GQA`, and the message"""


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_what_they_have(family, scratch):
    changes, message = REFUSED[family]
    save(scratch / "model", transformers.AutoConfig.for_model(family, **(GQA | changes)))
    with pytest.raises(InputError, match=message) as raised:
        backends.load("torch", scratch / "model", device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "name", "other", "message"),
    [
        ("gemma2", "finished", lambda _, logits: logits, "% apart in its logits"),
        ("qwen3", "attend_last", lambda _, heads, __: 0 * heads.queries, "% apart in its logits"),
        ("olmo2", "mixed", lambda heads, _: 0 * heads.queries, "% apart in its logits behind a cache"),
        ("llama", "attend_all", lambda _, heads, __: 0 * heads.queries, "% apart after layer 0"),
        ("exaone4", "attend_all", lambda *_: 1 / 0, r"cannot be run layer by layer \(division by zero"),
    ],
)
def test_another_model_layer_by_layer_is_refused(family, name, other, message, scratch, monkeypatch):
    """One step of the way is forgotten."""
    write_family(scratch / "model", family)
    monkeypatch.setattr(torch_decoder, name, other)
    with pytest.raises(InputError, match=message) as raised:
        backends.load("torch", scratch / "model", device="cpu")
    assert "\n" not in str(raised.value)


def test_attention_that_is_not_told_of_its_window_is_refused(models, monkeypatch):
    """Which short rows cannot show."""
    monkeypatch.setattr(folders, "sliding_windows", lambda config: [None, 7, 8])
    with pytest.raises(InputError, match=r"windows \[None, 7, 7\], by config.json with \[None, 7, 8\]"):
        backends.load("torch", models["qwen2-mqa"], device="cpu")


# In a run


def own_model(folder: Path, family: str) -> Path:
    """A user's folder: the family with the tiny model's tokenizer and chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders.local_folder(folders.TINY))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(family, **(GQA | FAMILIES[family] | sizes | ids))
    tokenizer.save_pretrained(save(folder, config))
    return folder


def test_flax_and_neurons_are_refused_before_anything_is_done(scratch):
    folder = own_model(scratch / "model", "qwen3_moe")
    settings = preset_settings(str(folder))
    assert settings.data.pairs == 0 and not settings.tuning.neurons, "without NeuronTune by itself"
    before = declaration("01_calibrate").before
    before(settings)
    for changes, message in (
        ({"backend": "flax"}, "architecture Qwen3MoeForCausalLM is not handled by --backend flax"),
        ({"pairs": 8}, "NeuronTune needs a down_proj in the MLP of every layer"),
    ):
        with pytest.raises(InputError, match=message):
            before(settings.replace(**changes))


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma2"])
def test_a_whole_run_of_ones_own_model_passes_the_audit(family, scratch):
    folder = own_model(scratch / "model", family)
    sizes = TINY.replace(preset=str(folder), model=str(folder))
    if family == "qwen3":
        sizes = sizes.replace(pairs=8, neurons=(8,), attribution_steps=4)
    assert audit.main(make_run(scratch / "run", sizes, STAGES)) == 0
    notes = RunFolder(scratch / "run").manifest("01_calibrate")["notes"].get("warnings", [])
    assert any("no NeuronTune" in each for each in notes) == (family == "qwen3_moe")
