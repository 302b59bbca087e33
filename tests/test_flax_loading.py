"""The Flax backend's loader, devices and mesh: strict both ways, bad input named; four devices as one."""

import json

import jax
import numpy as np
import pytest
import transformers

import backends
from backends.base import Recipe, Shape
from backends.core import adapters
from backends.core.errors import InputError
from backends.flax import devices
from tests.conftest import HEADS, change_tensors, edited, make_examples, run_apart

# Loading


def test_what_changes_nothing_is_accepted(models, scratch):
    """A copy of the tied output matrix, and buffers of old checkpoints."""
    folder = edited(models, scratch)
    added = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")}
    change_tensors(
        folder / "model.safetensors",
        lambda own: own.update({"lm_head.weight": own["model.embed_tokens.weight"].copy(), **added}),
    )
    found, expected = (
        backends.load("flax", each, device="cpu").logits(make_examples(3))
        for each in (folder, models["llama-gqa"])
    )
    np.testing.assert_array_equal(found, expected)


def test_biases_and_several_files_load(models, scratch):
    """Llama's attention and MLP biases, weights in shards of bfloat16, an output matrix of its own."""
    others = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    config = transformers.LlamaConfig.from_pretrained(models["llama-gqa"], **others)
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(std=0.5)
    model.bfloat16().save_pretrained(scratch / "m", max_shard_size="4KB")
    assert len(list((scratch / "m").glob("*.safetensors"))) > 2
    both = [backends.load(name, scratch / "m", device="cpu") for name in ("torch", "flax")]
    left, right = (backend.logits(make_examples(6)) for backend in both)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(left).max())


# Adapters


def test_adapters_of_another_kind_are_named(models, scratch):
    own = backends.load("flax", models["llama-gqa"], device="cpu")
    a, b = np.ones((1, 2, own.shape.model_dim), "f4"), np.ones((1, HEADS, own.shape.head_dim, 2), "f4")
    adapters.write(scratch / "adapter", a, b, [0], Recipe(rank=2))
    path = scratch / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
        ({"use_dora": True}, "use_dora = True is not handled"),
        ({"r": 3}, "has shape"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            own.logits(make_examples(1), scratch / "adapter")
    gains = np.ones((own.shape.layers - 1, own.shape.mlp_dim), np.float32)
    adapters.write_gains(scratch / "short", gains)
    with pytest.raises(InputError, match="gains of W_down's input are not those"):
        own.logits(make_examples(1), scratch / "short")


# Devices and the mesh

SHAPE = Shape(layers=2, heads=6, kv_heads=3, head_dim=4, model_dim=8, mlp_dim=8, vocab=10)


def test_a_mesh_divides_heads_and_devices_and_its_model_axis_is_as_small_as_memory_allows():
    four = jax.devices("cpu") * 4
    for parts, message in (
        (4, "4 does not divide the model's 6 heads"),
        (3, "3 does not divide the 4 devices"),
    ):
        with pytest.raises(InputError, match=f"--model-parallel {message}"):
            devices.make_mesh(four, SHAPE, parts, 0)
    assert devices.describe(devices.make_mesh(four[:1], SHAPE, 0, 10)) == "cpu:0"
    assert devices.resolve_dtype("auto", four) == "float32"
    # Of 12 devices and 6 heads it can be 1, 2, 3 or 6; half of a device's 80 bytes may hold weights.
    sizes = {40: 1, 41: 2, 80: 2, 81: 3, 121: 6, 240: 6}
    assert {size: devices.model_axis(12, 6, size, 80) for size in sizes} == sizes
    assert devices.model_axis(4, 6, 10**12, None) == 1, "a CPU's devices share one memory"
    for count, size in ((12, 241), (1, 41)):
        with pytest.raises(InputError, match=f"do not fit {count} devices"):
            devices.model_axis(count, 6, size, 80)


@pytest.mark.parametrize(
    ("kind", "parts", "verbs"),
    [
        ("qwen2-mha", 2, "logits"),
        pytest.param("llama-gqa", 1, "every", marks=pytest.mark.long),
        pytest.param("qwen2-mha", 2, "every", marks=pytest.mark.long),
        pytest.param("mistral-mqa", 4, "every", marks=pytest.mark.long),
    ],
)
def test_four_devices_answer_as_one_and_hold_less(models, kind, parts, verbs):
    run = "import runpy; runpy.run_module('tests.four_devices', run_name='__main__')"
    run_apart(run, models[kind], parts, verbs, XLA_FLAGS="--xla_force_host_platform_device_count=4")


KEPT = """
import sys
import jax
import numpy as np
import backends
from backends.base import Example
own = backends.load("flax", sys.argv[1], device="cpu")
row = Example("a", np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([], np.int32), 8)
for _ in range(2):
    own.gradient_gram([row, row], [row, row], 1)
    print("again")
    jax.clear_caches()
"""


@pytest.mark.long
def test_programs_are_kept_in_the_users_cache_and_compiling_is_reported(models, scratch):
    first, second, _ = run_apart(KEPT, models["llama-gqa"], CAST_CACHE=str(scratch)).split("again")
    assert list((scratch / "jax").iterdir()), "nothing was kept"
    assert "[flax] compiled differentiate in" in first and "compiled differentiate" not in second
