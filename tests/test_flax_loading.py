"""The Flax backend's loader, devices and mesh: strict both ways, bad input named; four devices as one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import backends
from backends.base import Shape
from backends.core.errors import InputError
from backends.flax import devices, weights
from tests.conftest import ROOT, edited, make_examples

# Loading


@pytest.fixture()
def folder(models, scratch):
    return edited(models, scratch)


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


QUERY = "model.layers.1.self_attn.q_proj.weight"


def set_to(key, value):
    return lambda weights: weights.__setitem__(key, value(weights[key]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(QUERY), f"1 weights are missing, the first is {QUERY}"),
        (
            lambda weights: weights.update({"model.layers.1.self_attn.q_norm.weight": np.ones(8, "f4")}),
            "1 weights are unexpected, the first is model.layers.1.self_attn.q_norm.weight",
        ),
        (
            lambda weights: weights.update({"model.layers.7.mlp.up_proj.weight": np.ones(8, "f4")}),
            "unexpected, the first is model.layers.7.mlp.up_proj.weight",
        ),
        # Transposed, it has as many values, and would divide into heads all the same.
        (
            set_to(QUERY, lambda weight: weight.T.copy()),
            r"q_proj.weight has shape \(40, 32\).*it is \(32, 40\)",
        ),
        (set_to(QUERY, lambda weight: weight * np.nan), f"weight {QUERY} holds values that are not finite"),
        (
            lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}),
            "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(InputError, match=message):
        backends.load("flax", folder, device="cpu")


def test_what_changes_nothing_is_accepted(folder, models):
    """A copy of the tied output matrix, and buffers of old checkpoints."""

    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "f4")

    change_weights(folder, add)
    examples = make_examples(3)
    found = backends.load("flax", folder, device="cpu").logits(examples)
    expected = backends.load("flax", models["llama-gqa"], device="cpu").logits(examples)
    np.testing.assert_array_equal(found, expected)


def test_a_damaged_file_ends_with_a_line(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="the weights cannot be loaded"):
        backends.load("flax", folder, device="cpu")


def test_biases_and_several_files_load(scratch):
    """Llama's attention and MLP biases, weights in shards of bfloat16, an output matrix of its own."""
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(std=0.5)
    model.bfloat16().save_pretrained(scratch / "m", max_shard_size="4KB")
    assert len(list((scratch / "m").glob("*.safetensors"))) > 2
    both = [backends.load(name, scratch / "m", device="cpu") for name in ("torch", "flax")]
    examples = [dataclasses.replace(row, prompt_ids=row.prompt_ids % 50) for row in make_examples(6)]
    left, right = (backend.logits(examples) for backend in both)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(left).max())


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_frequencies_are_transformers_to_the_bit(scaled):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        rope_parameters=dict(rope),
        max_position_embeddings=131072,
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_array_equal(np.float32(weights.rotary_frequencies(rope, 128)), expected)


# Adapters


def test_adapters_of_another_kind_are_named(models, scratch):
    backend = backends.load("flax", models["llama-gqa"], device="cpu")
    from backends.base import Recipe

    run = backend.tune(make_examples(2), [(0, 0)], Recipe(rank=2, folder=scratch / "adapter"))
    list(run)
    for change, message in [
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
        ({"use_dora": True}, "use_dora = True is not handled"),
        ({"r": 3}, "has shape"),
    ]:
        other = scratch / "other"
        shutil.copytree(run.adapter, other)
        path = other / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=message):
            backend.logits(make_examples(1), other)
        shutil.rmtree(other)


# Devices and the mesh

SHAPE = Shape(layers=2, heads=6, kv_heads=3, head_dim=4, model_dim=8, mlp_dim=8, vocab=10)


def test_devices_that_are_not_there_are_named(models):
    for device in ("cuda", "cpu:7", "cpu:x", "npu"):
        with pytest.raises(InputError, match=rf"--device {device}: JAX .* sees cpu:0"):
            backends.load("flax", models["llama-gqa"], device=device)
    with pytest.raises(InputError, match="--dtype float16"):
        backends.load("flax", models["llama-gqa"], device="cpu", dtype="float16")


def test_a_mesh_that_does_not_divide_is_refused(models):
    four = jax.devices("cpu") * 4
    with pytest.raises(InputError, match="--model-parallel 4 does not divide the model's 6 heads"):
        devices.make_mesh(four, SHAPE, 4, 0)
    with pytest.raises(InputError, match="--model-parallel 3 does not divide the 4 devices"):
        devices.make_mesh(four, SHAPE, 3, 0)


def test_the_model_axis_is_as_small_as_memory_allows():
    """Of 12 devices and 6 heads it can be 1, 2, 3 or 6; half of a device's 80 bytes may hold weights."""
    sizes = {40: 1, 41: 2, 80: 2, 81: 3, 121: 6, 240: 6}
    assert {size: devices.model_axis(12, 6, size, 80) for size in sizes} == sizes
    assert devices.model_axis(4, 6, 10**12, None) == 1, "a CPU's devices share one memory"
    for count, size in ((12, 241), (1, 41)):
        with pytest.raises(InputError, match=f"do not fit {count} devices"):
            devices.model_axis(count, 6, size, 80)


def test_auto_is_float32_on_a_cpu():
    cpus = jax.devices("cpu")
    assert devices.resolve_dtype("auto", cpus) == "float32"
    assert devices.describe(devices.make_mesh(cpus[:1], SHAPE, 0, 10)) == "cpu:0"


FOUR = """
import sys
import numpy as np
import backends
from backends.base import Recipe
from tests.conftest import assert_same, make_examples
folder, parts = sys.argv[1], int(sys.argv[2])
single = backends.load("flax", folder, device="cpu:0")
four = backends.load("flax", folder, device="cpu", model_parallel=parts)
assert four.device == f"cpu x 4 (data {4 // parts}, model {parts})", four.device
query = four.model.weights["layers"]["attention"]["query"]["kernel"][...]
assert {shard.data.shape[2] for shard in query.addressable_shards} == {4 // parts}, "heads are cut"
embedding = four.model.weights["embedding"][...]
rows, choices = make_examples(9), make_examples(8, choices=4)
np.testing.assert_allclose(four.logits(rows), single.logits(rows), atol=3e-5)
np.testing.assert_array_equal(four.choices(choices)[0], single.choices(choices)[0])
heads = [(0, 1), (1, 2), (1, 3), (2, 0)]
assert_same(four.generate(rows, 8), single.generate(rows, 8))
swept = [list(backend.sweep_generations(rows, heads, 8)) for backend in (four, single)]
for (_, left), (_, right) in zip(*swept, strict=True):
    assert_same(left, right)
swept = [[found for _, found in backend.sweep_choices(rows, heads, "query")] for backend in (four, single)]
assert_same(*swept)
grams = [backend.gradient_gram(choices, rows[:8], 2) for backend in (four, single)]
np.testing.assert_allclose(*grams, rtol=1e-5, atol=1e-6 * grams[0].max())
recipe = Recipe(rank=4, alpha=8.0, lr=1e-2, batch=4, accumulation=2)
runs = [backend.tune(rows, heads, recipe) for backend in (four, single)]
losses = [[step["loss"] for step in run] for run in runs]
np.testing.assert_allclose(*losses, atol=1e-5)
logits = [backend.logits(rows, run.adapter) for backend, run in zip((four, single), runs, strict=True)]
np.testing.assert_allclose(*logits, atol=1e-4)
"""


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("qwen2-mha", 2),
        pytest.param("llama-gqa", 1, marks=pytest.mark.long),
        pytest.param("mistral-mqa", 4, marks=pytest.mark.long),
    ],
)
def test_four_devices_answer_as_one(models, kind, parts):
    done = subprocess.run(
        [sys.executable, "-c", FOUR, models[kind], str(parts)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_programs_are_kept_in_the_users_cache_and_compiling_is_reported(models, scratch):
    code = (
        "import sys, backends; backends.load('flax', sys.argv[1], device='cpu').gradient_gram(*[rows] * 2, 1)"
    )
    code = f"from tests.conftest import make_examples; rows = make_examples(2); {code}"
    reported = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, models["llama-gqa"]],
            cwd=ROOT,
            env={**os.environ, "CAST_CACHE": str(scratch)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        reported.append("[flax] compiled query_gradients in" in done.stdout)
    assert list((scratch / "jax").iterdir()), "nothing was kept"
    assert reported == [True, False]
