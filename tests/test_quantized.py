"""Base weights in 4 and 8 bits: what is packed, and that every verb runs on it as on a dense model.

bitsandbytes works on a CPU too, slowly, and so do these tests; users are refused there. Speed, memory, and
CUDA's own kernels only a GPU shows.
"""

import importlib.util

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import backends
from backends.base import GainRecipe, Recipe, Selection
from backends.core.errors import InputError
from backends.torch import devices, quantized
from stages import audit
from stages.checks.comparison import Comparison
from stages.checks.finished import FinishedRun
from stages.run.pipeline import STAGES
from stages.run.store import MANIFEST, read_json
from tests import reference
from tests.conftest import ALL_HEADS, HEAD_DIM, change_tensors, edited, make_examples
from tests.families import write_family
from tests.runs import COMPUTED, TINY, make_run
from tests.tampering import edit_manifest
from tests.test_sweep import assert_idle, idle_model

KINDS = ["nf4", "int8"]
PACKED = {"nf4": torch.uint8, "int8": torch.int8}


def on_a_cpu(monkeypatch) -> None:
    """Lets a CPU have quantized weights."""
    pytest.importorskip("bitsandbytes", reason="requirements-quantize.txt is not installed")
    monkeypatch.setattr(quantized, "check_here", lambda *_: None)
    # Its kernel for CPUs wants matrices larger than a tiny model's, and packs them anew, for inference only.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def loaded(folder, kind: str, device: str, monkeypatch) -> backends.Backend:
    on_a_cpu(monkeypatch)
    return backends.load("torch", folder, dtype="auto", device=device, quantize=kind)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])])
def device(request) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture()
def own(models, kind, device, monkeypatch) -> backends.Backend:
    return loaded(models["llama-gqa"], kind, device, monkeypatch)


# What is packed


def test_all_matrices_of_the_layers_but_w_q_are_packed(own, kind):
    assert (own.quantize, own.dtype, own.shape.mlp_dim is not None) == (kind, "bfloat16", True)
    packed, dense = set(), set()
    for name, weight in own.model.model.named_parameters():
        (packed if weight.dtype == PACKED[kind] else dense).add(name.split(".")[-2])
        assert not weight.requires_grad and weight.dtype in (PACKED[kind], torch.bfloat16)
    assert packed == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {"q_proj", "embed_tokens", "norm"} < dense and not packed & dense


def test_bytes_are_those_of_packed_weights(own, models, kind):
    dense = backends.load("torch", models["llama-gqa"], device="cpu", dtype="bfloat16")
    each = {"nf4": 0.5 + 4 / 64, "int8": 1}[kind]
    for layer, full in zip(own.model.model.model.layers, dense.model.model.model.layers, strict=True):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight, count = layer.get_submodule(name).weight, full.get_submodule(name).weight.numel()
            assert quantized.stored_bytes(weight) == pytest.approx(each * count, rel=0.01)
    assert own.model.room != dense.model.room


# Every verb


def test_the_sweep_is_the_plain_loop(own):
    """With a hook on the same model; rounding decides no more than a near-tie."""
    plain, examples = own.model.model, make_examples(6, seed=1)
    swept = dict(own.sweep_choices(examples, ALL_HEADS))
    tops, changed = [], 0
    for layer, head in ALL_HEADS:
        logits = own.logits(examples, ablated=(layer, head))
        with torch.no_grad(), plain_attention(plain), reference.ablated(plain, layer, head):
            expected = np.stack([reference.last_logits(plain, row).cpu().numpy() for row in examples])
        assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
        for row, token in enumerate(swept[layer, head]):
            tops.append(expected[row].max() - expected[row, token])
        changed += (swept[layer, head] != own.choices(examples)[0]).sum()
    assert max(tops) < 0.05 * np.abs(expected).max() and np.mean(np.array(tops) == 0) > 0.9 and changed


class plain_attention:
    """Inside, the model attends as transformers does."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.before = model, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.set_attn_implementation("eager")

    def __exit__(self, *_) -> None:
        self.model.set_attn_implementation(self.before)


@pytest.mark.parametrize("mask", ["output", "query"])
def test_a_head_without_effect_shows_none(models, scratch, kind, device, mask, monkeypatch):
    """What is computed beside a row does not change it."""
    assert_idle(loaded(idle_model(models, scratch), kind, device, monkeypatch), mask)


def test_gradients_are_finite_and_near_those_of_plain_autograd(own):
    safe, util = make_examples(4, seed=1), make_examples(4, seed=2)
    found = own.head_gradients(safe, util, folds=2)
    assert np.isfinite(found.gram).all() and np.ptp(found.gram[:, :, 0, 0]) > 0
    assert np.isfinite(found.gate_safe).all() and np.abs(found.gate_safe).max() > 0
    model = own.model.model
    weights = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in model.model.layers]
    with plain_attention(model):
        losses = [reference.loss(model, row) for row in safe[0::2]]
        mean = torch.autograd.grad(torch.stack(losses).mean(), weights)
    model.requires_grad_(False)
    for layer, gradient in enumerate(mean):
        heads = gradient.double().unflatten(0, (-1, HEAD_DIM)).flatten(1)
        expected = heads.square().sum(1).cpu().numpy()
        np.testing.assert_allclose(found.gram[layer, :, 0, 0], expected, rtol=0.1, atol=0.05 * expected.max())


def test_tuned_adapters_load_here_and_into_the_dense_model(own, models, scratch):
    rows, chosen = make_examples(16), [(0, 1), (2, 3)]
    before = own.logits(rows)
    tuning = own.tune(rows, chosen, Recipe(rank=4, alpha=4.0, lr=0.05, folder=scratch / "adapter"))
    records = list(tuning)
    assert len(records) == 2 and all(np.isfinite(record["loss"]) for record in records)
    np.testing.assert_array_equal(own.logits(rows), before)  # nothing was merged
    tuned = own.logits(rows, tuning.adapter)
    assert np.isfinite(tuned).all() and np.abs(tuned - before).max() > 0
    for name, tensor in load_file(tuning.adapter / "adapter_model.safetensors").items():
        if "lora_B" in name:
            moved = {row // HEAD_DIM for row in np.flatnonzero(np.abs(tensor).sum(axis=1))}
            assert moved == {head for layer, head in chosen if f"layers.{layer}." in name}
    dense = peft.PeftModel.from_pretrained(reference.load(models["llama-gqa"]), tuning.adapter)
    assert dense.merge_and_unload().config.model_type == "llama"


# Refusals


def test_what_does_not_go_with_it_is_refused(models, own):
    usual = {"device": "cpu", "dtype": "auto", "quantize": "nf4"}
    for other, message in (
        ({"dtype": "float32"}, "computes in bfloat16, not in float32"),
        ({"model_parallel": 2}, "is for one device"),
        ({"quantize": "int4"}, "--quantize int4: nf4 or int8"),
    ):
        with pytest.raises(InputError, match=message):
            backends.load("torch", models["llama-gqa"], **usual | other)
    with pytest.raises(InputError, match="NeuronTune is not handled on quantized weights"):
        own.attribute_neurons(make_examples(2))
    with pytest.raises(InputError, match="NeuronTune is not handled on quantized weights"):
        own.tune_gains([], Selection((), ()), GainRecipe())


def test_values_that_are_not_finite_and_experts_are_refused(models, scratch, monkeypatch):
    folder = edited(models, scratch)
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder / "model.safetensors", lambda weights: weights[name].__setitem__((0, 0), np.nan))
    with pytest.raises(InputError, match=f"weight {name} holds values that are not finite"):
        loaded(folder, "nf4", "cpu", monkeypatch)
    mixture = write_family(scratch / "mixture", "qwen3_moe")
    with pytest.raises(InputError, match="--quantize does not reach experts"):
        loaded(mixture, "nf4", "cpu", monkeypatch)


def test_without_cuda_or_bitsandbytes_one_line_says_so(models, monkeypatch):
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as found:
            backends.load("torch", models["llama-gqa"], dtype="auto", device="cuda", quantize="nf4")
        assert "\n" not in str(found.value)

    monkeypatch.setattr(devices, "resolve_device", lambda _: torch.device("cpu"))
    refused("--quantize nf4 needs CUDA")
    monkeypatch.setattr(devices, "resolve_device", lambda _: torch.device("cuda:0"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    refused("--quantize nf4 needs bitsandbytes: .*requirements-quantize.txt")


# A whole run


def test_a_run_says_so_and_passes_the_audit(kind, scratch, monkeypatch, capsys):
    on_a_cpu(monkeypatch)
    settings = TINY.replace(quantize=kind, dtype="bfloat16", device="cpu", arms=("full", "bucket1"))
    run = make_run(scratch / "run", settings, STAGES)
    models = [read_json(run / stage / MANIFEST)["model"] for stage in COMPUTED[1:]]
    assert {(model["quantize"], model["dtype"]) for model in models} == {(kind, "bfloat16")}
    page = (run / STAGES[-1] / "report.html").read_text("utf-8")
    assert f"torch, bfloat16 on cpu, base weights but W_q in {kind}" in page
    assert audit.main(run) == 0
    edit_manifest(run, "04_align", lambda manifest: manifest["model"].update(quantize=""))
    capsys.readouterr()
    assert audit.main(run) == 1
    assert f"04_align: quantize '{kind}' -> ''" in capsys.readouterr().out
    assert Comparison(*[FinishedRun(run, COMPUTED)] * 2).half
