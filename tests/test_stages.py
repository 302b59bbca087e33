"""Stages 01 to 05 on the tiny model, as a user calls them: artifacts, skips, repeats, judging again."""

import doctest
import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import transformers
from safetensors.torch import load_file

from backends import models
from backends.core.errors import InputError
from data import refusal_judge, scoring
from stages.run import judging
from stages.run.job import Job
from stages.run.pipeline import declaration
from stages.run.runner import unit_states
from stages.run.schemas import (
    ALIGNMENT,
    ARMS,
    BENCHMARKS,
    CALIBRATION,
    HEADS,
    RESPONSES,
    SCORES,
    SWEEP_CHOICES,
    TRAINING,
)
from stages.run.store import MANIFEST, STARTED, RunFolder
from stages.scale import plan
from tests.runs import COMPUTED, NEURONS, TINY, assert_same, contents, make_run

SWEEP, ALIGN, EVALUATE = COMPUTED[2:]


def test_declarations_say_what_a_run_has(tiny_run, neurons_run):
    for run, settings in ((tiny_run, TINY), (neurons_run, NEURONS)):
        for name in COMPUTED:
            stage = declaration(name)
            job = Job(stage, settings.replace(run=str(run)))
            found = {path.relative_to(run / name) for path in (run / name).rglob("*") if path.is_file()}
            required = {Path(table.file()) for table in stage.writes if not table.optional} | {Path(MANIFEST)}
            may_be = {Path(table.file()) for table in stage.writes if table.optional}
            beside = {path for path in found if any(path.match(pattern) for pattern in stage.also_writes)}
            assert required <= found <= required | may_be | beside, name
            assert job.rests_on == job.run.manifest(name)["settings"]
            assert job.inputs == job.run.manifest(name)["inputs"]


def test_clean_rows_of_the_sweep_are_the_base_model(tiny_run):
    run = RunFolder(tiny_run)
    sweep, notes = run.read(SWEEP_CHOICES), run.manifest(SWEEP)["notes"]
    clean = sweep[sweep["layer"].isna()]
    assert len(clean) == TINY.data.util_rows and notes["base"]["accuracy"] == clean["correct"].mean()
    assert any("floor or ceiling" in warning for warning in notes["warnings"]), "random weights know nothing"


def test_adapters_are_pefts_and_touch_only_their_heads(tiny_run):
    run, folder = RunFolder(tiny_run), models.local_folder("random/tiny")
    arms, bucket = run.read(ARMS), run.read(HEADS)["bucket"].to_numpy().reshape(3, 4)
    assert list(arms["arm"]) == list(TINY.tuning.arms) and list(arms["n_heads"]) == [12, 3, 3, 3]
    for arm in arms.to_dict("records"):
        chosen = np.zeros((3, 4), bool)
        chosen[arm["layers"], arm["heads"]] = True
        if arm["kind"] == "bucket":
            np.testing.assert_array_equal(chosen, bucket == arm["bucket"])
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        before = {name: weight.clone() for name, weight in base.named_parameters()}
        adapter = tiny_run / ALIGN / arm["adapter"]
        tensors = load_file(adapter / "adapter_model.safetensors")
        trained = sum(
            tensor.numel() if "lora_A" in name else int((tensor != 0).sum())
            for name, tensor in tensors.items()
        )
        assert trained == arm["trainable_parameters"]
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "random/tiny"
        merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
        changed = np.zeros((3, 4), bool)
        for name, weight in merged.named_parameters():
            rows = (weight != before[name]).reshape(len(weight), -1).any(dim=1)
            if "q_proj" in name:
                changed[int(name.split("layers.")[1].split(".")[0])] = rows.reshape(4, -1).any(dim=1).numpy()
            else:
                assert not rows.any()
        np.testing.assert_array_equal(changed, chosen)


def test_arms_differ_only_in_what_is_trained(tiny_run):
    training = RunFolder(tiny_run).read(TRAINING)
    schedules = {
        tuple(map(tuple, rows[["step", "tokens", "lr"]].to_numpy())) for _, rows in training.groupby("arm")
    }
    assert len(schedules) == 1
    assert training[training["step"] == 0]["loss"].nunique() == 1, "all start at the base model"


def test_responses_and_scores_agree(tiny_run):
    run = RunFolder(tiny_run)
    responses, scores = run.read(RESPONSES), run.read(SCORES)
    assert len(scores) == 5 * 6 and set(scores["side"]) == {"utility", "safety", "over-refusal"}
    assert scores["optimizer"].isna().sum() == 6, "the untouched model has none"
    passed = responses.groupby(["arm", "benchmark"], sort=False)["verdict"].agg(["mean", "size"])
    np.testing.assert_array_equal(passed["mean"].to_numpy(float), scores["score"])
    np.testing.assert_array_equal(passed["size"], scores["n"])
    answered = responses.merge(run.read(BENCHMARKS), on="example_id")
    assert (answered["prediction"].isna() == (answered["scoring"] != "choice")).all()


def test_again_skips_and_changes_nothing(copy_run, capsys):
    run = copy_run()
    before = contents(run)
    make_run(run)
    assert capsys.readouterr().out.count("skipped") == len(COMPUTED)
    assert contents(run) == before


def test_the_same_seed_twice_gives_the_same_artifacts(tiny_run, scratch):
    assert_same(make_run(scratch / "again"), tiny_run)


# A new version of the judge


@pytest.fixture()
def stricter(monkeypatch):
    """The keyword judge is a new version, which takes responses of an odd length for refusals."""

    def refuses(response: str) -> bool:
        return len(response) % 2 == 1

    monkeypatch.setattr(refusal_judge, "KEYWORD_JUDGE_VERSION", "odd")
    monkeypatch.setattr(judging, "keyword_refusal", refuses)
    monkeypatch.setattr(scoring, "keyword_refusal", refuses)


@pytest.mark.parametrize("name", [SWEEP, EVALUATE])
def test_judged_again_without_generating(name, copy_run, stricter, monkeypatch):
    """It ends as if that judge had made it; killed in between, it goes on."""
    fresh = make_run(copy_run(before=name, name="fresh"), stages=(name,))
    run = copy_run()
    assert contents(run / name) != contents(fresh / name)
    monkeypatch.setattr("stages.run.job._load", lambda *_: pytest.fail("the model is loaded"))
    written, write = [], Job.write

    def dying(job: Job, *arguments) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(write(job, *arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "write", dying)
        make_run(run, stages=(name,))
    assert (run / name / STARTED).exists() and not (run / name / MANIFEST).exists()
    states = unit_states(declaration(name), TINY.replace(run=str(run)))
    assert states == {}, "there is nothing for an engine to share out"
    assert declaration(name).units(Job(declaration(name), TINY.replace(run=str(run)))) == {}, "nor to plan"
    make_run(run, stages=(name,))
    assert_same(run / name, fresh / name)


# Data


def test_too_few_rows_are_balanced_to_what_there_is(scratch, capsys):
    settings = TINY.replace(util_rows=100_000, align_rows=40_000, benchmarks=("facts=99999", "vanilla=4:6"))
    run = RunFolder(make_run(scratch / "run", settings, COMPUTED[:1]))
    notes = run.manifest(COMPUTED[0])["notes"]
    short, counts = {row["split"]: row["drawn"] for row in notes["short"]}, notes["counts"]
    assert short == {"facts": counts["facts"], "util": counts["util"], "alignment": counts["alignment"] // 4}
    assert counts["util"] % TINY.data.folds == 0
    assert set(run.read(ALIGNMENT)["split"].value_counts()) == {short["alignment"]}
    assert capsys.readouterr().out.count("warning: too few rows: ") == 3


def test_rows_that_are_too_long_are_counted(scratch):
    """Those of each table that exceed the model's positions, and those that lose their end."""
    folder = Path(shutil.copytree(models.local_folder("random/tiny"), scratch / "short"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    settings = TINY.replace(model=str(folder), max_length=60)
    run = RunFolder(make_run(scratch / "run", settings, COMPUTED[:1]))
    warnings = run.manifest(COMPUTED[0])["notes"]["warnings"]
    for table, what in ((CALIBRATION, "calibration"), (ALIGNMENT, "alignment")):
        rows = run.read(table)
        lengths = rows["prompt_ids"].map(len) + rows["target_ids"].map(len)
        long = f"{(lengths > 40).sum()} {what} prompts and targets are longer than the model's 40 positions"
        assert (lengths > 40).any() and long in warnings
    whole, left = rows["target_ids"].map(len), 60 - rows["prompt_ids"].map(len)
    cut = left < whole
    less, one = (cut & (left < whole / 2)).sum(), (cut & (left == 1)).sum()
    assert 0 < cut.sum() < len(cut)
    assert (
        f"{cut.sum()} of {len(rows)} alignment rows are cut to --max-length 60: they do not teach their end, "
        f"{less} keep less than half of their target, {one} one token of it"
    ) in warnings
    assert any(re.fullmatch(r"\d+ benchmark prompts and answers are longer .*", each) for each in warnings)


def test_own_model_and_rows(scratch):
    folder = Path(shutil.copytree(models.local_folder("random/tiny"), scratch / "my-model"))
    rows = []
    for number in range(40):
        question = {"prompt": f"What is {number} plus one?", "prefix": "It is", "target": f" {number + 1}"}
        rows.append({"role": "util", **question})
        worked = {"prompt": f"Add {number} and 2.", "target": str(number + 2), "scoring": "number"}
        rows.append({"role": "util", **worked})
        rows.append({"role": "safe", "prompt": f"Break rule number {number}.", "target": "No, I will not."})
    mine = scratch / "my.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = TINY.replace(preset=str(folder), model=str(folder), util=str(mine), safe=str(mine))
    run = make_run(scratch / "own", settings, COMPUTED[:2])
    counts = RunFolder(run).manifest(COMPUTED[0])["notes"]["counts"]
    assert counts["own_util"] == 80 - TINY.data.util_rows and counts["own_safe"] == 40 - TINY.data.safe_rows
    assert "facts" not in counts and counts["benign"] == 4
    mine.write_text(mine.read_text() + '{"role": "util", "prompt": "x"}\n')
    with pytest.raises(InputError, match="util sha256"):
        make_run(run, settings, COMPUTED[:1])
    with pytest.raises(InputError, match=r"--util: .*my.jsonl.*121"):
        make_run(scratch / "bad", settings, COMPUTED[:1])


# The plan


def test_a_plan_counts_units_and_writes_nothing(copy_run, scratch, capsys):
    settings = NEURONS.replace(run=str(scratch / "never"), maps=("small=embedded/util:8",))
    plan.main(settings)
    output = capsys.readouterr().out
    rows = dict(re.findall(r"^(0\d\w+  +\w.*?)  +(\d+ +\d+)  ", output, re.MULTILINE))
    work = {re.sub(" +", " ", what): tuple(map(int, counts.split())) for what, counts in rows.items()}
    assert work == {
        "02_conflict gradients of 8 + 16 rows, 2 maps": (2, 0),
        "02_conflict attributions of 384 neurons, 8 pairs": (2, 0),
        "03_sensitivity each of 12 heads ablated: next tokens of 16 rows": (4, 0),
        "03_sensitivity each of 12 heads ablated: responses to 8 rows, 4 tokens": (4, 0),
        "03_sensitivity each of 12 heads ablated: graded outcomes of 24 rows": (4, 0),
        "04_align 2 arms by sft, 48 rows, 1 epochs": (2, 0),
        "04_align 5 arms of neurons, 3 outer steps": (5, 0),
        "05_evaluate facts: 8 next tokens, 8 models": (8, 0),
        "05_evaluate problems: 4 answers of up to 8 tokens, 8 models": (8, 0),
        "05_evaluate adversarial: 4 answers of up to 8 tokens, 8 models": (8, 0),
        "05_evaluate benign: 4 answers of up to 8 tokens, 8 models": (8, 0),
    }
    assert not (scratch / "never").exists()
    run = copy_run(before=EVALUATE)
    before = contents(run)
    plan.main(TINY.replace(run=str(run)))
    output = capsys.readouterr().out
    counts = re.findall(r"^(0\d).*?  (\d+) +(\d+)  ", output, re.MULTILINE)
    assert all((done == units) == (stage < "05") and int(units) for stage, units, done in counts)
    assert len(counts) == 11 and contents(run) == before and "warning" not in output


def test_a_plan_warns_of_a_small_disk():
    works = [plan.Work("04_align", "arms", 4, 1, 400.0, 3 * 2**30)]
    assert plan.report(works, 2**30).splitlines()[1:] == [
        "04_align  arms          4       1         6.7 min  3.0 GiB",
        "pending: 5.0 min on one such device, spread evenly by --shard; 3.0 GiB of disk in all",
        "warning: 1.0 GiB are free",
    ]
    assert doctest.testmod(plan).failed == 0
