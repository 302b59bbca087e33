"""Stages 01 to 05 on the tiny model, as a user calls them: artifacts, skips, repeats, resumes, bad input."""

import dataclasses
import importlib
import json
import shutil
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import transformers
from safetensors.torch import load_file

from backends import models as folders
from backends.errors import InputError
from stages import artifacts, metrics, presets, schemas

STAGES = ["01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate"]
SETTINGS = dataclasses.replace(
    presets.preset_settings("tiny"),
    benchmarks=("facts=12", "words=12", "problems=4:6", "adversarial=4:6", "vanilla=4:6", "benign=4:6"),
    arms=("full", "random", "bucket1", "bucket4"),
    align_rows=16,
    sweep_tokens=5,
)


def stage(name):
    return importlib.import_module(f"stages.{name}")


def run(folder, settings=SETTINGS, names=STAGES) -> Path:
    for name in names:
        stage(name).main(dataclasses.replace(settings, run=str(folder)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture()
def copy(finished, scratch) -> Path:
    return Path(shutil.copytree(finished, scratch / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but manifests' times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".lock", presets.RUN_FILE):
            content = path.read_bytes()
            if path.name == artifacts.MANIFEST:
                manifest = json.loads(content)
                timed = ("wall_seconds", "peak_memory_bytes", "units", "git")
                content = json.dumps(
                    {key: value for key, value in manifest.items() if key not in timed}
                ).encode()
            files[str(path.relative_to(folder))] = content
    return files


def test_artifacts_are_all_there(finished):
    base = artifacts.read_input
    for file, schema in {
        "01_calibrate/calibration.parquet": schemas.EXAMPLES,
        "01_calibrate/alignment.parquet": schemas.EXAMPLES,
        "01_calibrate/benchmarks.parquet": schemas.EXAMPLES,
        "02_conflict/gradients.parquet": schemas.GRADIENTS,
        "03_sensitivity/sweep_choices.parquet": schemas.SWEEP_CHOICES,
        "03_sensitivity/sweep_generations.parquet": schemas.SWEEP_GENERATIONS,
        "03_sensitivity/heads.parquet": schemas.HEADS,
        "04_align/training.parquet": schemas.TRAINING,
        "04_align/arms.parquet": schemas.ARMS,
        "05_evaluate/responses.parquet": schemas.RESPONSES,
        "05_evaluate/scores.parquet": schemas.SCORES,
    }.items():
        assert base(finished, file, schema).num_rows > 0
    assert not list(finished.rglob("parts")) and not list(finished.rglob("*.tmp"))


def test_the_map_follows_from_its_artifacts(finished):
    heads = artifacts.read_input(finished, "03_sensitivity/heads.parquet", schemas.HEADS)
    column = {
        name: heads[name].to_numpy().reshape(3, 4)
        for name in heads.column_names
        if name != "bucket_probability"
    }
    sensitivity = metrics.functional_sensitivity(column["h_gen"], column["h_safe"])
    np.testing.assert_array_equal(column["sensitivity"], sensitivity)
    np.testing.assert_array_equal(column["score"], metrics.conflict_score(column["conflict"], sensitivity))
    np.testing.assert_array_equal(column["bucket"], metrics.buckets(column["score"], 4))
    chance = np.array(heads["bucket_probability"].to_pylist())
    np.testing.assert_allclose(chance.sum(axis=1), 1)
    for name in ("conflict", "h_gen", "score", "bucket"):
        assert (column[f"{name}_low"] <= column[f"{name}_high"]).all()


def test_clean_rows_of_the_sweep_are_the_base_model(finished):
    notes = artifacts.stage_manifest(finished, "03_sensitivity")["notes"]
    table = artifacts.read_input(finished, "03_sensitivity/sweep_choices.parquet", schemas.SWEEP_CHOICES)
    clean = [row["correct"] for row in table.to_pylist() if row["layer"] == -1]
    assert notes["base"]["accuracy"] == np.mean(clean) and len(clean) == SETTINGS.util_rows
    assert any("floor or ceiling" in warning for warning in notes["warnings"]), "random weights know nothing"


def test_adapters_are_pefts_and_touch_only_their_heads(finished):
    arms = artifacts.read_input(finished, "04_align/arms.parquet", schemas.ARMS).to_pylist()
    assert [arm["arm"] for arm in arms] == list(SETTINGS.arms)
    bucket = artifacts.read_input(finished, "03_sensitivity/heads.parquet", schemas.HEADS)[
        "bucket"
    ].to_numpy()
    assert {arm["arm"]: arm["n_heads"] for arm in arms} == {
        "full": 12,
        "random": 3,
        "bucket1": 3,
        "bucket4": 3,
    }
    model = folders.local_folder("random/tiny")
    for arm in arms:
        chosen = set(zip(arm["layers"], arm["heads"], strict=True))
        if arm["arm"].startswith("bucket"):
            number = int(arm["arm"][-1])
            assert chosen == {divmod(int(index), 4) for index in np.flatnonzero(bucket == number)}
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        before = {name: weight.clone() for name, weight in base.named_parameters()}
        folder = finished / "04_align" / arm["adapter"]
        trained = sum(
            tensor.numel() if "lora_A" in name else int((tensor != 0).sum())
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        )
        assert trained == arm["trainable_parameters"]
        assert (
            json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            == "random/tiny"
        )
        merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
        for name, weight in merged.named_parameters():
            rows = (weight != before[name]).reshape(len(weight), -1).any(dim=1)
            if "q_proj" in name:
                layer = int(name.split("layers.")[1].split(".")[0])
                heads = rows.reshape(4, -1)
                assert [(layer, head) in chosen for head in range(4)] == heads.any(dim=1).tolist()
            else:
                assert not rows.any()


def test_arms_differ_only_in_what_is_trained(finished):
    training = artifacts.read_input(finished, "04_align/training.parquet", schemas.TRAINING).to_pylist()
    by_arm = {}
    for row in training:
        by_arm.setdefault(row["arm"], []).append((row["step"], row["tokens"], row["lr"]))
    assert len({tuple(rows) for rows in by_arm.values()}) == 1
    assert len({row["loss"] for row in training if row["step"] == 0}) == 1, "all start at the base model"


def test_responses_and_scores_agree(finished):
    responses = artifacts.read_input(finished, "05_evaluate/responses.parquet", schemas.RESPONSES).to_pylist()
    scores = artifacts.read_input(finished, "05_evaluate/scores.parquet", schemas.SCORES).to_pylist()
    assert len(scores) == 5 * 6 and {row["side"] for row in scores} == {"utility", "safety", "over-refusal"}
    for score in scores:
        of = [
            row for row in responses if row["arm"] == score["arm"] and row["benchmark"] == score["benchmark"]
        ]
        assert len(of) == score["n"] and np.mean([row["verdict"] for row in of]) == score["score"]
        assert score["score_low"] <= score["score"] <= score["score_high"]


def test_no_row_is_shared(finished):
    entries = {}
    for name in ("calibration", "alignment", "benchmarks"):
        table = artifacts.read_input(finished, f"01_calibrate/{name}.parquet", schemas.EXAMPLES)
        entries[name] = set(table["entry"].to_pylist())
    assert not entries["calibration"] & entries["alignment"]
    assert not entries["calibration"] & entries["benchmarks"]
    assert not entries["alignment"] & entries["benchmarks"]


def test_again_skips_and_changes_nothing(copy, capsys):
    before = contents(copy)
    run(copy)
    assert capsys.readouterr().out.count("skipped") == len(STAGES)
    assert contents(copy) == before


def test_the_same_seed_twice_gives_the_same_artifacts(finished, scratch):
    again = contents(run(scratch / "again"))
    before = contents(finished)
    assert again.keys() == before.keys()
    assert [name for name in before if again[name] != before[name]] == []


@pytest.mark.parametrize("name", ["03_sensitivity", "04_align", "05_evaluate"])
def test_a_stage_that_died_goes_on_to_the_same_result(copy, name, monkeypatch):
    before = contents(copy)
    shutil.rmtree(copy / name)
    written = []
    whole = artifacts.Stage.write_part

    def dying(self, unit, *arguments, **options):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(unit)
        whole(self, unit, *arguments, **options)

    monkeypatch.setattr(artifacts.Stage, "write_part", dying)
    with pytest.raises(KeyboardInterrupt):
        run(copy, names=[name])
    monkeypatch.setattr(artifacts.Stage, "write_part", whole)
    kept = {unit: (copy / name / "parts" / f"{unit}.parquet").stat().st_mtime_ns for unit in written}
    assert len(kept) == 3
    keeping = types.SimpleNamespace(rmtree=lambda *_, **__: None, disk_usage=shutil.disk_usage)
    monkeypatch.setattr(artifacts, "shutil", keeping)  # parts stay, to see that they are not made again
    run(copy, names=[name])
    for unit, when in kept.items():
        assert (copy / name / "parts" / f"{unit}.parquet").stat().st_mtime_ns == when
    monkeypatch.undo()
    shutil.rmtree(copy / name / "parts")
    after = contents(copy)
    assert [file for file in before if after[file] != before[file]] == []


# Bad input


def test_stages_before_their_inputs(scratch):
    for name in STAGES[1:]:
        with pytest.raises(
            InputError, match=r"manifest.json is missing: run `python -m stages.0[14]_\w+ --run"
        ):
            run(scratch / "none", names=[name])


def test_a_corrupted_input_is_named(copy):
    path = copy / "03_sensitivity/heads.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    shutil.rmtree(copy / "04_align")
    with pytest.raises(InputError, match="heads.parquet is not what its manifest says"):
        run(copy, names=["04_align"])


def test_changed_settings_are_named(copy):
    with pytest.raises(InputError, match="lr 0.1 -> 0.5"):
        run(copy, dataclasses.replace(SETTINGS, lr=0.5), names=["04_align"])


def test_another_model_is_refused(copy, scratch):
    other = Path(shutil.copytree(folders.local_folder("random/tiny"), scratch / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(copy / "03_sensitivity")
    with pytest.raises(InputError, match="are not those of"):
        run(copy, dataclasses.replace(SETTINGS, model=str(other)), names=["03_sensitivity"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"util_source": "embedded/nothing"}, "no embedded pool 'nothing'"),
        ({"align_source": "nothing"}, "--align-source"),
        ({"benchmarks": ("facts=4", "vanilla=4:0")}, "vanilla writes its answers"),
        ({"max_length": 4}, "vanilla_harmful: no row is left .* too long"),
        ({"model": "/no/such/model"}, "no model folder"),
        ({"buckets": 13}, "--buckets 13: the model has 12 heads"),
    ],
)
def test_bad_data_settings_are_named_before_any_work(scratch, change, message):
    with pytest.raises(InputError, match=message):
        run(scratch / "run", dataclasses.replace(SETTINGS, **change), names=["01_calibrate"])
    assert not (scratch / "run/01_calibrate/manifest.json").exists()


def test_too_few_rows_are_balanced_to_what_there_is_and_said(scratch, capsys):
    settings = dataclasses.replace(
        SETTINGS, util_rows=100_000, align_rows=40_000, benchmarks=("facts=99999", "vanilla=4:6")
    )
    folder = run(scratch / "run", settings, names=["01_calibrate"])
    notes = artifacts.stage_manifest(folder, "01_calibrate")["notes"]
    counts, short = notes["counts"], {one["what"]: one for one in notes["short"]}
    kinds = [one for one in short if one.startswith("alignment, each of 4 types")]
    assert set(short) == {"util", "benchmark facts", *kinds} and len(kinds) == 1
    assert short["benchmark facts"]["got"] == counts["facts"] < 99999
    assert (
        counts["util"] % settings.folds == 0 and 0 <= short["util"]["got"] - counts["util"] < settings.folds
    )
    roles = artifacts.read_input(folder, "01_calibrate/alignment.parquet", schemas.EXAMPLES)["role"]
    sizes = {one["counts"] for one in roles.value_counts().to_pylist()}
    assert sizes == {short[kinds[0]]["got"]} and counts["alignment"] == 4 * sizes.pop()
    told = capsys.readouterr().out
    for one in notes["short"]:
        assert f"too few rows: {one['what']}: {one['got']} of {one['asked']} rows" in told


def test_more_buckets_than_heads_is_told_before_the_sweep(copy):
    shutil.rmtree(copy / "03_sensitivity")
    with pytest.raises(InputError, match="--buckets 13: the model has 12 heads"):
        run(copy, dataclasses.replace(SETTINGS, buckets=13, arms=("full",)), names=["03_sensitivity"])


# A user's own model and rows


def test_own_model_and_rows(scratch):
    model = Path(shutil.copytree(folders.local_folder("random/tiny"), scratch / "my-model"))
    rows = []
    for number in range(40):
        question = {"prompt": f"What is {number} plus one?", "prefix": "It is", "target": f" {number + 1}"}
        rows.append({"role": "util", **question})
        counted = {"prompt": f"Add {number} and 2.", "target": str(number + 2), "scoring": "number"}
        rows.append({"role": "util", **counted})
        rows.append(
            {"role": "safe", "prompt": f"Please break rule number {number}.", "target": "No, I will not."}
        )
    mine = scratch / "my.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = dataclasses.replace(
        SETTINGS, preset=str(model), model=str(model), util=str(mine), safe=str(mine)
    )
    folder = run(scratch / "own", settings, names=["01_calibrate", "02_conflict"])
    counts = artifacts.stage_manifest(folder, "01_calibrate")["notes"]["counts"]
    assert counts["own_util"] == 80 - SETTINGS.util_rows and counts["own_safe"] == 40 - SETTINGS.safe_rows
    assert "facts" not in counts and counts["benign"] == 4
    mine.write_text(mine.read_text() + '{"role": "util", "prompt": "x"}\n')
    with pytest.raises(InputError, match="util sha256"):
        run(folder, settings, names=["01_calibrate"])
    with pytest.raises(InputError, match=r"my.jsonl.*121"):
        run(scratch / "bad", settings, names=["01_calibrate"])
