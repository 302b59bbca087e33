"""Sequence classifiers as judges of refusals (--judge hf:MODEL:LABEL), through a real class: that
of protectai/distilroberta-base-rejection-v1, with random weights, whose labels are NORMAL and REJECTION."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import backends
from backends import models
from backends.core.errors import InputError
from backends.torch.classifier import SequenceClassifier
from data.classifier import parse_judge
from stages import audit
from stages.method.arms import BASE_RUN, ArmRun, head_arm
from stages.report import agreement
from stages.report.responses import Responses
from stages.run import classify
from stages.run.schemas import RESPONSES
from stages.run.store import RunFolder, read_json
from tests.runs import TINY, make_run

EVALUATE, REPORT = RESPONSES.stage, "06_correlate"
POSITIONS = 66
"""of the table, whose first two RoBERTa does not use"""
FORM = "{prompt} // {response}"
TEXTS = ["I cannot help with that.", "Sure, here it is.", "No.", "Sorry", "Take the bus. " * 40, ""]


@pytest.fixture(scope="module")
def rejection(tmp_path_factory, tiny_run) -> Path:
    """The published classifier's class and labels, tiny, with random weights, and a bias by which half of the
    tiny run's responses are refusals."""
    folder = tmp_path_factory.mktemp("judges") / "rejection"
    config = transformers.RobertaConfig(
        vocab_size=1024,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        id2label={0: "NORMAL", 1: "REJECTION"},
        label2id={"NORMAL": 0, "REJECTION": 1},
        initializer_range=0.5,
    )
    tokenizer = models.load_tokenizer(models.local_folder("random/tiny"))
    torch.manual_seed(1)
    model = transformers.RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        rows = [
            torch.tensor([tokenizer(text, verbose=False).input_ids[: POSITIONS - 2]])
            for text in read(tiny_run)
        ]
        logits = torch.cat([model(ids).logits for ids in rows])
        model.classifier.out_proj.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = read_json(folder / "tokenizer_config.json") | {"model_max_length": POSITIONS - 2}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def read(run: Path) -> list[str]:
    """What the classifier reads of a run's responses, by FORM."""
    rows = RunFolder(run).read(RESPONSES)
    return [FORM.format(prompt=row.prompt, response=row.output) for row in rows.itertuples()]


def direct_labels(folder: Path, texts: list[str]) -> list[str]:
    """By transformers alone, cut to what the model's table of positions has."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, verbose=False).input_ids[: POSITIONS - 2]])
        found.append(model.config.id2label[int(model(ids).logits.argmax())])
    return found


def test_labels_are_those_of_transformers_and_long_texts_are_cut(rejection, scratch):
    judge = SequenceClassifier(rejection, "cpu")
    found = [judge(text) for text in TEXTS[:-1]]
    assert [label.name for label in found] == direct_labels(rejection, TEXTS[:-1])
    assert [label.cut for label in found] == [False, False, False, False, True]
    other = Path(shutil.copytree(rejection, scratch / "unlimited"))
    written = read_json(other / "tokenizer_config.json")
    del written["model_max_length"]
    (other / "tokenizer_config.json").write_text(json.dumps(written))
    unlimited = SequenceClassifier(other, "cpu")  # RoBERTa's first two positions are not for texts
    assert unlimited.limit == judge.limit == POSITIONS - 2
    assert [unlimited(text) for text in TEXTS[:-1]] == found


def test_a_classifier_without_its_head_is_refused(rejection, scratch):
    folder = Path(shutil.copytree(rejection, scratch / "headless"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: own for name, own in tensors.items() if not name.startswith("classifier.out_proj")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks classifier.out_proj.*drawn? at random"):
        SequenceClassifier(folder, "cpu")
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="the classifier cannot be loaded"):
        SequenceClassifier(folder, "cpu")


def test_options():
    assert parse_judge("keyword") is parse_judge("wildguard") is None
    judge = parse_judge("hf:/models/a:b/mine:REFUSAL,PARTIAL REFUSAL", "{prompt}|{response}")
    assert (judge.model, judge.labels) == ("/models/a:b/mine", ("REFUSAL", "PARTIAL REFUSAL"))
    assert judge.text("{response}", "{prompt}") == "{response}|{prompt}"
    for text in ("", "hf", "hf:model", "hf:model:", "hf::LABEL", "hf:model:A,,B", "gpt:model:A", "hf:"):
        with pytest.raises(InputError, match="--judge .*hf:MODEL:LABEL"):
            parse_judge(text)
    with pytest.raises(InputError, match="--judge-input 'text' has no {response}"):
        parse_judge("hf:a/b:C", "text")


def test_what_cannot_judge_is_refused_before_any_work(rejection, models, scratch):
    def line(judge: str) -> str:
        with pytest.raises(InputError) as error:
            classify.folder_of(TINY.replace(judge=judge))
        return str(error.value)

    assert "no model folder /no/such (--judge)" in line("hf:/no/such:REFUSAL")
    assert "no label 'REFUSAL'; it has NORMAL, REJECTION" in line(f"hf:{rejection}:REFUSAL")
    assert "all labels" in line(f"hf:{rejection}:NORMAL,REJECTION")
    assert "LlamaForCausalLM is no sequence classifier" in line(f"hf:{models['llama-gqa']}:REFUSAL")
    folder = Path(shutil.copytree(rejection, scratch / "other"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "other formats are not read" in line(f"hf:{folder}:REJECTION")


def identity(judge: str, form: str = "{response}") -> str:
    return classify.identity(TINY.replace(judge=judge, judge_input=form))


def test_its_identity_is_all_that_verdicts_follow_from(rejection, scratch):
    own = identity(f"hf:{rejection}:REJECTION")
    assert own.startswith(f"{rejection}:REJECTION ")
    moved = Path(shutil.copytree(rejection, scratch / "moved"))
    assert identity(f"hf:{moved}:REJECTION").split()[-1] == own.split()[-1]
    others = [
        identity(f"hf:{rejection}:NORMAL"),
        identity(f"hf:{rejection}:REJECTION", "{prompt} {response}"),
    ]
    config = read_json(moved / "config.json")
    config["id2label"] = {"0": "REJECTION", "1": "NORMAL"}
    (moved / "config.json").write_text(json.dumps(config))
    others.append(identity(f"hf:{moved}:REJECTION"))
    assert len({name.split()[-1] for name in (own, *others)}) == 4


def test_its_labels_are_the_verdicts_on_requests_and_nothing_is_answered_again(
    rejection, copy_run, monkeypatch, capsys
):
    run = copy_run()
    before = RunFolder(run).read(RESPONSES)
    monkeypatch.setattr(backends, "load", lambda *_, **__: pytest.fail("the run's model was loaded"))
    settings = TINY.replace(judge=f"hf:{rejection}:REJECTION", judge_input=FORM)
    make_run(run, settings, (EVALUATE, REPORT))
    after = RunFolder(run).read(RESPONSES)
    pd.testing.assert_frame_equal(before.drop(columns="verdict"), after.drop(columns="verdict"))
    judged = after["benchmark"].isin(["adversarial", "vanilla", "benign"])
    assert (before["verdict"] == after["verdict"])[~judged].all()
    texts = read(run)
    labels = pd.Series(direct_labels(rejection, texts), index=after.index)
    assert (after["verdict"] == (labels == "REJECTION"))[judged].all()
    assert set(labels[judged]) == {"NORMAL", "REJECTION"}
    notes = RunFolder(run).manifest(EVALUATE)["notes"]
    assert notes["classifier"].startswith(f"{rejection}:REJECTION ")
    tokenizer = transformers.AutoTokenizer.from_pretrained(rejection)
    long = sum(
        len(tokenizer(text, verbose=False).input_ids) > POSITIONS - 2 for text in np.array(texts)[judged]
    )
    said = [warning for warning in notes.get("warnings", []) if "longer than the classifier reads" in warning]
    assert len(said) == (long > 0) and (not long or said[0].startswith(f"{long} responses"))
    agree = (after["verdict"] == after["refused"])[judged].mean()
    text = (run / REPORT / "report.html").read_text(encoding="utf-8")
    assert f"agree on {100 * agree:.1f} % of {judged.sum()} responses" in text
    assert "Two judges of refusals" in text and str(rejection) not in text
    assert len(pd.read_csv(run / REPORT / "tables" / "judges.csv")) == 1 + len(after["arm"].unique())
    capsys.readouterr()
    assert audit.main(run) == 0, capsys.readouterr().out


def test_agreement_is_counted(scratch):
    lines = pd.DataFrame(
        {
            "side": ["utility", "safety", "safety", "safety", "over-refusal"],
            "verdict": [1.0, 1.0, 1.0, 0.0, 0.0],
            "refused": [np.nan, 1.0, 0.0, 1.0, 0.0],
        }
    )
    full = ArmRun(head_arm("full", None, 4), "sft", 21)
    responses = Responses(scratch, {BASE_RUN: lines, full: lines.assign(refused=lines["verdict"])})
    found = agreement.table(responses, "someone/refusals:YES 0a1b")
    assert found["arm"].tolist() == ["all", "base", "full"] and found["n"].tolist() == [8, 4, 4]
    assert found["agreement"].tolist() == [0.75, 0.5, 1.0] and found["kappa"].tolist() == [0.5, 0.0, 1.0]
    base = found.set_index("arm").loc["base"]
    assert [base[name] for name in ("both", "only_classifier", "only_keyword", "neither")] == [1, 1, 1, 1]
    assert "agree on 75.0 % of 8 responses (kappa 0.50); 1 are refusals" in agreement.sentence(found)
    assert (
        agreement.table(responses, None).empty and agreement.sentence(agreement.table(responses, None)) == ""
    )
