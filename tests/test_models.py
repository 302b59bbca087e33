"""Model folders: which ones are refused, and how; the ones made here are made once."""

import json
import multiprocessing
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import backends
from backends import models as folders
from backends.core.errors import InputError
from backends.models import sources


@pytest.fixture()
def model(models, scratch):
    folder = scratch / "model"
    shutil.copytree(models["llama-gqa"], folder)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, message):
    with pytest.raises(InputError, match=message) as raised:
        backends.load("torch", folder, device="cpu")
    assert "\n" not in str(raised.value)


def test_not_a_model_folder(scratch):
    refused(scratch, "no config.json")
    with pytest.raises(InputError, match="no model folder"):
        folders.local_folder("./not/here")


def test_architecture_and_attributes_are_refused_by_name(model):
    edit(model, architectures=["GemmaForCausalLM"])
    refused(model, "architecture GemmaForCausalLM")
    edit(model, architectures=["LlamaForCausalLM"], attn_logit_softcapping=50.0)
    refused(model, "attribute attn_logit_softcapping = 50.0")
    edit(model, attn_logit_softcapping=0)  # 0 == False, but it is no default
    refused(model, "attribute attn_logit_softcapping = 0 is")
    edit(model, attn_logit_softcapping=False, use_cache=0, hidden_act="gelu")
    refused(model, "hidden_act = 'gelu'")
    edit(model, hidden_act="silu", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})
    refused(model, "rope_type 'yarn'")


def test_missing_and_damaged_files_are_named(model):
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(model, "weights cannot be loaded")
    weights.unlink()
    refused(model, "no [*].safetensors")
    weights.write_bytes(content)
    (model / "config.json").write_text("{")
    refused(model, "config.json cannot be read")


def test_weights_that_are_not_finite_are_named(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(model, "model.layers.1.mlp.up_proj.weight holds values that are not finite")


def test_weights_that_do_not_fit_the_architecture_are_named(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    refused(model, "1 weights are unexpected, the first is model.layers.0.extra.weight")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    refused(model, "1 weights are missing, the first is model.layers.2.mlp.up_proj.weight")


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


def test_devices_and_dtypes_and_names(models):
    for options, message in (
        ({"device": "cuda:7"}, "sees"),
        ({"device": "warp"}, "no such device"),
        ({"device": "meta"}, "not handled"),
        ({"dtype": "float16"}, "float16"),
    ):
        with pytest.raises(InputError, match=message):
            backends.load("torch", models["llama-gqa"], **options)
    with pytest.raises(InputError, match="unknown backend 'tensorflow'"):
        backends.load("tensorflow", models["llama-gqa"])
    assert backends.load("torch", models["llama-gqa"], device="cpu", dtype="auto").dtype in (
        "float32",
        "bfloat16",
    )


def test_hub_errors_say_how_to_get_access(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def failing(error):
        def download(*_, **__):
            raise error

        return download

    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    for error, message in (
        (gated, r"gated: accept its terms at https://huggingface.co/a/b"),
        (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError), "not on the hub"),
        (errors.LocalEntryNotFoundError("offline"), "neither in the local cache nor reachable"),
        (ConnectionError("down"), "neither in the local cache nor reachable"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
        with pytest.raises(InputError, match=message):
            folders.local_folder("a/b")
        monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", failing(error))
        assert re.search(message, folders.missing("a/b"))
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
    assert folders.missing("a/b") is None


def _make(folder, queue):
    queue.put(str(sources._made_once("thing", "x/y", lambda target: (target / "made").write_text("x"))))


def test_made_once_by_two_processes(scratch, monkeypatch):
    monkeypatch.setenv("CAST_CACHE", str(scratch))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_make, args=(scratch, queue)) for _ in range(2)]
    for process in both:
        process.start()
    paths = {queue.get(timeout=60) for _ in both}
    for process in both:
        process.join()
    assert paths == {str(scratch / "models/thing")}
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
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "tokenizer_config.json").write_text('{"a": 1}')
    after = folders.weights_sha256(model), folders.tokenizer_sha256(model)
    assert before[0] != after[0] and before[1] != after[1]
    assert torch.isfinite(tensors["model.norm.weight"]).all()
