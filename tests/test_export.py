"""Adapters that leave a run: small folders that PEFT loads as before, exact merges, cards, clear refusals."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import backends
from backends.base import Recipe
from backends.core import adapters as peft_format
from backends.core.errors import InputError
from backends.models import adapters
from data.refusal_judge import KEYWORD_JUDGE_VERSION
from stages import export
from stages.report.card import Licence
from stages.run.guard import guarded
from stages.run.schemas import ARMS, RELIABILITY, RESPONSES, SCORES
from stages.run.store import RunFolder, read_json
from tests import reference
from tests.conftest import HEAD_DIM, HEADS, LAYERS, make_examples
from tests.tampering import edit_adapter

OLD_PEFT = os.environ.get("CAST_PEFT13", "")
LORA_KEYS = {*("peft_type", "task_type", "inference_mode", "r", "lora_alpha", "target_modules")}
LORA_KEYS |= {"layers_to_transform", "base_model_name_or_path"}
IA3_KEYS = {"peft_type", "task_type", "inference_mode", "target_modules", "feedforward_modules"}
IA3_KEYS |= {"base_model_name_or_path"}
FROZEN = slice(HEAD_DIM, 2 * HEAD_DIM)
"""rows of B, and so of W_q, that no adapter here changes: those of head 1"""


def random_adapter(base: Path, to: Path, kind: str) -> Path:
    """A PEFT folder whose numbers no one can overlook; rows of head 1 of B are zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    common = {"task_type": "CAUSAL_LM"}
    if kind == "lora":
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[0, 2], **common
        )
    else:
        config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], **common)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
            parameter.data[FROZEN] = 0
        if "ia3_l" in name:
            parameter.data.uniform_(0, 2, generator=generator)
    wrapped.save_pretrained(to)
    return to


@pytest.fixture(scope="module", params=["lora", "ia3"])
def made(request, models, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("adapter") / request.param
    return request.param, random_adapter(models["llama-gqa"], folder, request.param)


def peft_logits(base: Path, folder: Path) -> np.ndarray:
    """Of rows of unequal length, by PEFT itself in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return reference.logits(peft.PeftModel.from_pretrained(model, folder).eval(), make_examples(4))


def test_an_exported_adapter_says_no_more_than_needed_and_answers_the_same(made, models, scratch):
    kind, folder = made
    adapters.write_adapter(folder, scratch / "out", str(models["llama-gqa"]), None)
    config = read_json(scratch / "out" / adapters.CONFIG)
    assert config.keys() == (LORA_KEYS if kind == "lora" else IA3_KEYS)
    assert config["base_model_name_or_path"] == str(models["llama-gqa"])
    found, expected = (peft_logits(models["llama-gqa"], each) for each in (scratch / "out", folder))
    for logits, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(logits, wanted)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(scratch / "out")  # its base's name resolves
    assert loaded.peft_config["default"].base_model_name_or_path == str(models["llama-gqa"])
    adapters.write_adapter(folder, scratch / "hub", "someone/model", "abc")
    config = read_json(scratch / "hub" / adapters.CONFIG)
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/model", "abc")


def test_an_adapter_of_flax_is_exported_alike(models, scratch):
    draw = np.random.default_rng(0).normal
    model_dim = read_json(models["llama-gqa"] / "config.json")["hidden_size"]
    a = draw(size=(LAYERS, 4, model_dim)).astype("f4")
    b = draw(size=(LAYERS, HEADS, HEAD_DIM, 4)).astype("f4")
    peft_format.write(scratch / "flax", a, b, [0, 1], Recipe(rank=4, alpha=4.0))
    adapters.write_adapter(scratch / "flax", scratch / "out", str(models["llama-gqa"]), None)
    assert read_json(scratch / "out" / adapters.CONFIG).keys() == LORA_KEYS
    found, expected = (peft_logits(models["llama-gqa"], scratch / name) for name in ("out", "flax"))
    for logits, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(logits, wanted)


@pytest.mark.skipif(not OLD_PEFT, reason="CAST_PEFT13 names no Python that has peft 0.13")
def test_an_old_peft_answers_the_same(made, models, scratch):
    """`CAST_PEFT13=/path/to/python`, of an environment with peft==0.13.2 and 'transformers<4.50'."""
    _, folder = made
    base = Path(shutil.copytree(models["llama-gqa"], scratch / "base"))
    config = adapters.both_spellings(
        read_json(base / "config.json")
    )  # that of its time knows the older alone
    (base / "config.json").write_text(json.dumps(config))
    adapters.write_adapter(folder, scratch / "out", str(base), None)
    code = (
        "import sys, numpy, peft, torch, transformers\n"
        "assert peft.__version__.startswith('0.13.'), peft.__version__\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "logits = model(input_ids=torch.arange(3, 12)[None]).logits[0, -1]\n"
        "numpy.save(sys.argv[3], logits.detach().numpy())\n"
    )
    arguments = [base, scratch / "out", scratch / "logits.npy"]
    done = subprocess.run([OLD_PEFT, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    now = transformers.AutoModelForCausalLM.from_pretrained(models["llama-gqa"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(now, scratch / "out").eval()
    wanted = model(input_ids=torch.arange(3, 12)[None]).logits[0, -1].detach().numpy()
    np.testing.assert_allclose(np.load(scratch / "logits.npy"), wanted, rtol=0, atol=1e-5)


@pytest.fixture(params=["float32", "bfloat16", "sharded"])
def base(request, models, scratch) -> Path:
    """A base model in float32, in bfloat16, and in two files."""
    folder = Path(shutil.copytree(models["llama-gqa"], scratch / "base"))
    weights = folder / "model.safetensors"
    if request.param != "float32":
        tensors = {name: own.astype(ml_dtypes.bfloat16) for name, own in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        config = read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    if request.param == "sharded":
        names = sorted(tensors)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, own in parts.items():
            save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        where = {name: file for file, own in parts.items() for name in own}
        (folder / adapters.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
        weights.unlink()
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_a_merge_is_exact_in_float32_and_leaves_the_rest(made, base, scratch):
    kind, folder = made
    count = adapters.merge(base, folder, scratch / "merged")
    before, after = tensors_of(base), tensors_of(scratch / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    part = "q_proj" if kind == "lora" else "down_proj"
    layers = (0, 2) if kind == "lora" else range(LAYERS)
    assert len(changed) == count == len(layers)
    assert all(name.endswith(f"{part}.weight") and int(name.split(".")[2]) in layers for name in changed)
    for name in before:
        if name in changed:
            assert after[name].dtype == np.float32
            if kind == "lora":  # frozen rows of B: the base's rows of W_q, bit for bit
                wanted = before[name].astype(np.float32)[FROZEN]
                np.testing.assert_array_equal(after[name][FROZEN], wanted)
        else:
            assert after[name].dtype == before[name].dtype
    plain = transformers.AutoModelForCausalLM.from_pretrained(scratch / "merged")  # in config.json's type
    assert plain.dtype == torch.float32
    rows = make_examples(4)
    for logits, wanted in zip(reference.logits(plain.eval(), rows), peft_logits(base, folder), strict=True):
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    config = read_json(scratch / "merged" / "config.json")
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"] == {name: rope[name] for name in rope if name != "rope_theta"}
    if (base / adapters.INDEX).is_file():
        index = read_json(scratch / "merged" / adapters.INDEX)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert (scratch / "merged" / "tokenizer.json").is_file() == (base / "tokenizer.json").is_file()
    loaded = backends.load("torch", scratch / "merged", device="cpu")  # is a model folder like any other
    assert np.isfinite(loaded.logits(rows)).all()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_file_modes_follow_the_umask(mask, made, models, scratch):
    _, folder = made
    before = os.umask(mask)
    try:
        adapters.write_adapter(folder, scratch / "out", "someone/model", None)
        adapters.merge(models["llama-gqa"], folder, scratch / "merged")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in scratch.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}
    assert (scratch / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_runs_own_adapters_can_be_read_by_whom_the_umask_lets(tiny_run):
    for folder in (tiny_run / "04_align" / "adapters").iterdir():
        config, weights = ((folder / name).stat().st_mode for name in (adapters.CONFIG, adapters.WEIGHTS))
        assert config == weights


def change_config(folder: Path, **values: object) -> None:
    config = read_json(folder / adapters.CONFIG)
    (folder / adapters.CONFIG).write_text(json.dumps(config | values))


def test_an_adapter_that_is_more_or_another_models_is_refused(models, scratch):
    folder = random_adapter(models["llama-gqa"], scratch / "lora", "lora")
    for name, value in (("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("bias", "all")):
        own = Path(shutil.copytree(folder, scratch / name))
        change_config(own, **{name: value})
        with pytest.raises(InputError, match=f"{name} = .* is not handled"):
            adapters.minimal_config(own)
    own = Path(shutil.copytree(folder, scratch / "kind"))
    change_config(own, peft_type="LOHA")
    with pytest.raises(InputError, match="peft_type 'LOHA' is none of LORA, IA3"):
        adapters.minimal_config(own)
    with pytest.raises(InputError, match="cannot be read"):
        adapters.minimal_config(scratch / "nowhere")
    (own / adapters.CONFIG).write_text((folder / adapters.CONFIG).read_text())
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file({name: tensor[..., :-1].copy() for name, tensor in tensors.items()}, own / adapters.WEIGHTS)
    with pytest.raises(InputError, match="layers.0.*in the base model, which does not fit"):
        adapters.merge(models["llama-gqa"], own, scratch / "narrow")
    moved = {name.replace("layers.2", "layers.9"): tensor for name, tensor in tensors.items()}
    save_file(moved, own / adapters.WEIGHTS)
    with pytest.raises(InputError, match="layers.9.* which .* has not: it is another model's adapter"):
        adapters.merge(models["llama-gqa"], own, scratch / "deep")


# The command


def run_export(run: Path, arm: str, to: Path, merge: bool = False, push: str | None = None) -> None:
    export.main(run, arm, to, merge, push)


def test_an_arm_leaves_its_run_with_a_card_of_its_figures(tiny_run, scratch, capsys):
    run_export(tiny_run, "bucket4", scratch / "out")
    assert {path.name for path in (scratch / "out").iterdir()} == {
        adapters.CONFIG,
        adapters.WEIGHTS,
        "README.md",
    }
    assert "bucket4-sft-21" in capsys.readouterr().out
    card, run = (scratch / "out" / "README.md").read_text(), RunFolder(tiny_run)
    scores = run.read(SCORES)
    for row in scores[scores["arm"].isin(["base", "bucket4"])].to_dict("records"):
        figures = [100 * row[name] for name in ("score", "score_low", "score_high")]
        line = next(line for line in card.splitlines() if line.startswith(f"| {row['benchmark']} "))
        assert "{:.1f} % ({:.1f} to {:.1f})".format(*figures) in line
    table = run.read(RELIABILITY)
    wanted = table[(table["sensitivity"] == "counted") & (table["quantity"] == "conflict_score")].iloc[0]
    value = wanted["reliability"]
    assert ("is unknown" if np.isnan(value) else f"reliability is {value:.2f}") in card
    row = run.read(ARMS).set_index("arm").loc["bucket4"]
    assert f"{row['n_heads']} attention heads in {row['n_layers']} layers (bucket 4 (Safe Zone))" in card
    assert (
        "there is one training seed" in card and f"keyword matcher (version {KEYWORD_JUDGE_VERSION})" in card
    )
    assert "licence of the base model was not found" in card and "None" not in card
    assert str(Path.home()) not in card and str(tiny_run) not in card


def test_a_merged_arm_answers_as_the_run_did(tiny_run, scratch, capsys):
    run_export(tiny_run, "bucket4-sft-21", scratch / "out", merge=True)
    drift = re.findall(r"(\w+): (\d+) of (\d+) responses differ", capsys.readouterr().out)
    assert [dtype for dtype, _, _ in drift] == ["float32", "bfloat16"]
    assert drift[0][1] == "0" and {count for _, _, count in drift} == {"16"}
    card = (scratch / "out" / "README.md").read_text()
    for dtype, changed, count in drift:
        assert f"Loaded in {dtype}, {changed} of {count} responses differ" in card
    run = export.FinishedRun(tiny_run, export.COMPUTED)
    outputs = run.read(RESPONSES)
    outputs = outputs[(outputs["arm"] == "bucket4") & outputs["prediction"].isna()].set_index("example_id")
    model, new_tokens = backends.load("torch", scratch / "out", device="cpu"), 6
    rows = export.compared_rows(run)
    for example, tokens in zip(rows, model.generate(rows, new_tokens), strict=True):
        assert tokens.tolist() == outputs["token_ids"][example.example_id].tolist()


def test_arms_of_neurons_leave_too(neurons_run, scratch):
    name = next(path.name for path in (neurons_run / "04_align/adapters").glob("neurons16_lam0.9*"))
    run_export(neurons_run, name, scratch / "out")
    assert read_json(scratch / "out" / adapters.CONFIG).keys() == IA3_KEYS
    card = (scratch / "out" / "README.md").read_text()
    assert "MLP neurons" in card and "attributions" in card and "weight of the safety loss 0.9" in card
    run_export(neurons_run, name, scratch / "merged", merge=True)
    assert "0 of 12 responses differ" in (scratch / "merged" / "README.md").read_text()


@pytest.fixture()
def refused(capsys):
    """The one line that a command ends with; nothing is written."""

    def line(*arguments: object, **options: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            guarded(lambda: run_export(*arguments, **options))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return line


def test_what_cannot_be_exported_ends_in_one_line(tiny_run, copy_run, scratch, refused):
    out = scratch / "out"
    assert "bucket7 is no arm of this run: there are full-sft-21, " in refused(tiny_run, "bucket7", out)
    assert "is no run" in refused(scratch, "bucket4", out)
    assert "05_evaluate" in refused(copy_run("05_evaluate", "early"), "bucket4", out)
    (scratch / "full").mkdir()
    (scratch / "full" / "thing").touch()
    assert "there is something already" in refused(tiny_run, "bucket4", scratch / "full")
    (scratch / "file").touch()
    assert "cannot be made" in refused(tiny_run, "bucket4", scratch / "file" / "out")
    run = copy_run(name="damaged")
    (run / "04_align/adapters/bucket4-sft-21" / adapters.WEIGHTS).write_bytes(b"")
    assert "is not what its manifest says" in refused(run, "bucket4", out)
    run = copy_run(name="strange")
    edit_adapter(run, "bucket4-sft-21", lambda tensors: tensors.pop(next(iter(tensors))))
    assert "has not lora_A and lora_B" in refused(run, "bucket4", out, merge=True)
    assert not out.exists() and not list(scratch.glob(".*"))


def test_pushing_without_access_ends_in_one_line(tiny_run, scratch, refused, monkeypatch):
    import huggingface_hub

    out = scratch / "out"
    assert "wants USER/NAME" in refused(tiny_run, "bucket4", out, push="name", merge=True)
    assert "wants USER/NAME" in refused(tiny_run, "bucket4", out, push="a b/c", merge=True)
    assert "which nobody else has: add --merge" in refused(tiny_run, "bucket4", out, push="me/it")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "no Hugging Face token" in refused(tiny_run, "bucket4", out, push="me/it", merge=True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the hub is not reached" in refused(tiny_run, "bucket4", out, push="me/it", merge=True)
    assert not out.exists()


def test_a_push_uploads_the_folder_to_a_private_repository(scratch, refused, monkeypatch, capsys):
    import huggingface_hub

    done = []

    class Hub:
        def create_repo(self, name, **options):
            done.append((name, options))

        def upload_folder(self, **options):
            done.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export.push(scratch, "me/it")
    assert done[0] == ("me/it", {"private": True, "exist_ok": True})
    assert (done[1]["repo_id"], done[1]["folder_path"]) == ("me/it", scratch)
    assert "https://huggingface.co/me/it" in capsys.readouterr().out

    def fails(self, **options):
        raise OSError("connection reset\nby peer")

    monkeypatch.setattr(Hub, "upload_folder", fails)
    with pytest.raises(InputError, match=r"failed \(connection reset\); the folder is whole: `hf upload"):
        export.push(scratch, "me/it")


def test_the_licence_is_the_base_models(scratch):
    assert export.licence_of("embedded/smollm2-135m-instruct", None) == Licence("apache-2.0")
    assert export.licence_of("x/y", None) == export.licence_of("x/y", scratch) == Licence(None)
    (scratch / "README.md").write_text("Just words.\n")
    (scratch / "LICENSE.txt").touch()
    assert export.licence_of("x/y", scratch) == Licence("other", link="LICENSE.txt of the base model")
    (scratch / "README.md").write_text("---\nlicense: mit\n---\nWords.\n")
    assert export.licence_of("x/y", scratch) == Licence("mit")
    other = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    (scratch / "README.md").write_text(other)
    assert export.licence_of("x/y", scratch) == Licence("other", "own", "LICENSE")
