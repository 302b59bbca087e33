"""Model folders: which ones are refused, and how; the ones made here are made once."""

import functools
import json
import multiprocessing
import re
import shutil
import subprocess
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import transformers
from huggingface_hub import errors

import backends
from backends import models as folders
from backends.core.errors import InputError
from backends.models import sources
from tests import reference
from tests.conftest import BACKENDS, change_tensors, edited, load_pair, make_examples


@pytest.fixture()
def model(models, scratch):
    return edited(models, scratch)


def refused(folder, message, backend="torch"):
    with pytest.raises(InputError, match=message) as raised:
        backends.load(backend, folder, device="cpu")
    assert "\n" not in str(raised.value)


def test_not_a_model_folder(scratch):
    refused(scratch, "no config.json")
    with pytest.raises(InputError, match="no model folder"):
        folders.local_folder("./not/here")


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
REFUSED = [
    ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM"),
    ({"attn_logit_softcapping": 50.0}, "attribute attn_logit_softcapping = 50.0"),
    ({"attn_logit_softcapping": 0}, "attribute attn_logit_softcapping = 0 is"),  # 0 == False, no default
    ({"use_cache": 0}, "config.json cannot be used .*'use_cache' expected bool"),
]
"""by either backend"""
REFUSED_FLAX = [
    ({"attn_logit_softcapping": False, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_parameters": YARN}, "rope_type 'yarn'"),
    ({"rms_norm_eps": 0.5, "clip_qkv": 8.0}, "attribute clip_qkv = 8.0"),
]
REFUSED_TORCH = [
    ({"rope_parameters": YARN | {"rope_type": "dynamic"}}, "rope_type 'dynamic' is not handled"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is not handled"),
    ({"num_attention_heads": 8}, r"q_proj.weight has shape \(32, 40\), by config.json it is \(64, 40\)"),
]


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [(backend, *case) for backend in BACKENDS for case in REFUSED]
    + [("flax", *case) for case in REFUSED_FLAX]
    + [("torch", *case) for case in REFUSED_TORCH],
)
def test_architecture_and_attributes_are_refused_by_name(models, scratch, backend, changes, message):
    refused(edited(models, scratch, **changes), message, backend)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"rope_parameters": YARN}])
def test_torch_computes_with_what_transformers_knows(models, scratch, changes):
    own, plain = load_pair("torch", edited(models, scratch, **changes))
    examples = make_examples(4)
    found, expected = own.logits(examples), reference.logits(plain, examples)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    other = backends.load("torch", models["llama-gqa"], device="cpu").logits(examples)
    assert np.abs(found - other).max() > 1e-2 * np.abs(other).max()


def test_marks_and_labels_of_other_tools_change_nothing(models, scratch):
    """As in the hub's own SmolLM2, in what unsloth saves, and in configurations of older versions."""
    marks = {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "unsloth_fixed": True}
    marks |= {"id2label": {"0": "LABEL_0"}, "temperature": 0.6, "do_sample": True, "repetition_penalty": 1.3}
    folder = edited(models, scratch, **marks)
    folders.check_folder(folder)
    assert folders.model_hashes(folder) == folders.model_hashes(models["llama-gqa"])


QUERY, EXTRA = "model.layers.1.self_attn.q_proj.weight", "model.layers.7.mlp.up_proj.weight"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


WEIGHTS = [
    (lambda own: own.pop(QUERY), f"1 weights are missing, the first is {QUERY}"),
    (lambda own: own.update({EXTRA: np.ones(2, "f4")}), f"1 weights are unexpected, the first is {EXTRA}"),
    (lambda own: own.update({QUERY: own[QUERY] * np.nan}), f"{QUERY} holds values that are not finite"),
    (
        lambda own: own.update({OUTPUT: own[EMBEDDING] + 1}),
        f"tie_word_embeddings is true, but {OUTPUT} is not {EMBEDDING}",
    ),
]
"""changes of a file's tensors"""
WEIGHTS_FLAX = [
    # Transposed, it has as many values, and would divide into heads all the same.
    (lambda own: own.update({QUERY: own[QUERY].T.copy()}), r"q_proj.weight has shape \(40, 32\).*it is"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_do_not_fit_or_are_damaged_are_named(model, backend):
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for change, message in WEIGHTS + (WEIGHTS_FLAX if backend == "flax" else []):
        weights.write_bytes(content)
        change_tensors(weights, change)
        refused(model, message, backend)
    weights.write_bytes(content[: len(content) // 2])
    refused(model, "weights cannot be loaded", backend)
    weights.unlink()
    refused(model, "no model.safetensors and no index", backend)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(model, "is a Git LFS pointer", backend)
    weights.write_bytes(content)
    (model / "config.json").write_text("{")
    refused(model, "config.json cannot be read", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_models_own_files_are_its_weights(model, scratch, backend):
    """A stray file is neither computed with nor hashed; parts are those of the index, and an adapter in the
    folder, which transformers would load too, is refused."""
    examples = make_examples(4)
    expected, named = (
        backends.load(backend, model, device="cpu").logits(examples),
        folders.weights_sha256(model),
    )
    shutil.copy(model / "model.safetensors", model / "zz.safetensors")
    change_tensors(model / "zz.safetensors", lambda own: own.update({QUERY: own[QUERY] + 1}))
    np.testing.assert_array_equal(backends.load(backend, model, device="cpu").logits(examples), expected)
    assert folders.weights_sha256(model) == named
    parts = scratch / "parts"
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    plain.save_pretrained(parts, max_shard_size="20KB")
    shutil.copy(model / "zz.safetensors", parts / "zz.safetensors")
    assert len(folders.weight_files(parts)) > 2
    np.testing.assert_array_equal(backends.load(backend, parts, device="cpu").logits(examples), expected)
    folders.weight_files(parts)[1].unlink()
    refused(parts, "weight files are missing, as model-00002", backend)
    (model / "adapter_config.json").write_text("{}")
    refused(model, "holds an adapter", backend)


def test_a_tokenizer_without_chat_template(scratch):
    folder = folders.local_folder(folders.TINY)
    copy = scratch / "tiny"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        folders.load_tokenizer(copy)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        folders.load_tokenizer(copy)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch", {"device": "cuda:7"}, "sees"),
        ("torch", {"device": "warp"}, "no such device"),
        ("torch", {"device": "meta"}, "not handled"),
        ("torch", {"dtype": "float16"}, "float16"),
        ("flax", {"device": "cpu", "dtype": "float16"}, "--dtype float16"),
        ("flax", {"device": "cuda"}, r"--device cuda: JAX .* sees cpu:0"),
        ("flax", {"device": "cpu:7"}, r"--device cpu:7: JAX .* sees cpu:0"),
        ("flax", {"device": "npu"}, r"--device npu: JAX .* sees cpu:0"),
        ("tensorflow", {}, "unknown backend 'tensorflow'"),
    ],
)
def test_devices_dtypes_and_backends_that_are_not_there_are_named(models, name, options, message):
    with pytest.raises(InputError, match=message):
        backends.load(name, models["llama-gqa"], **options)


def test_hub_errors_say_how_to_get_access(monkeypatch):
    away = "neither in the local cache nor reachable"
    for kind, message in (
        (errors.GatedRepoError, r"gated: accept its terms at https://huggingface.co/a/b"),
        (errors.RepositoryNotFoundError, "not on the hub"),
        (errors.LocalEntryNotFoundError, away),
        (ConnectionError, away),
    ):
        failing = mock.Mock(side_effect=kind.__new__(kind))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
        with pytest.raises(InputError, match=message):
            folders.local_folder("a/b")
        monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", failing)
        assert re.search(message, folders.missing("a/b"))
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
    assert folders.missing("a/b") is None


def test_made_once_by_two_processes(scratch, monkeypatch):
    monkeypatch.setenv("CAST_CACHE", str(scratch))
    (scratch / "source").mkdir()
    (scratch / "source/made").write_text("x")
    fill = functools.partial(shutil.copytree, scratch / "source", dirs_exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(sources._made_once, [("thing", "x/y", fill)] * 2, chunksize=1)
    assert found == [scratch / "models/thing"] * 2
    assert (scratch / "models/thing/made").read_text() == "x"

    def broken(target):
        (target / "half").write_text("x")
        raise OSError("the network went away")

    with pytest.raises(OSError, match="went away"):
        sources._made_once("other", "x/y", broken)
    assert sorted(path.name for path in (scratch / "models").iterdir() if path.is_dir()) == ["thing"]


def test_embedded_model_without_a_network_says_so(scratch, monkeypatch):
    monkeypatch.setenv("CAST_CACHE", str(scratch))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: Could not find a version\nERROR: more")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"could not be fetched \(ERROR: Could not find a version\)"):
        folders.local_folder(folders.EMBEDDED)
    assert not list((scratch / "models").glob("smollm2*/"))


def test_hashes_change_with_content(model):
    before = folders.weights_sha256(model), folders.tokenizer_sha256(model)
    assert before == (folders.weights_sha256(model), folders.tokenizer_sha256(model))
    change_tensors(model / "model.safetensors", lambda tensors: tensors.update({QUERY: tensors[QUERY] + 1}))
    (model / "tokenizer_config.json").write_text('{"a": 1}')
    assert before[0] != folders.weights_sha256(model) and before[1] != folders.tokenizer_sha256(model)


@pytest.mark.parametrize(
    ("file", "change", "other"),
    [
        ("config.json", {"rms_norm_eps": 1e-3}, True),
        ("config.json", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, True),
        ("generation_config.json", {"eos_token_id": [2, 5]}, True),
        ("generation_config.json", {"temperature": 0.5}, False),
        ("config.json", {"transformers_version": "0", "_name_or_path": "x", "torch_dtype": "float16"}, False),
    ],
)
def test_config_hash_changes_with_what_is_computed(model, file, change, other):
    before, path = folders.model_hashes(model), model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    after = folders.model_hashes(model)
    assert (before["config_sha256"] != after["config_sha256"]) == other
    assert before["weights_sha256"] == after["weights_sha256"]
