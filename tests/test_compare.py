"""The comparison passes two backends' runs of one method, names what is past its tolerance, traces ties."""

import dataclasses
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends.errors import InputError
from stages import artifacts, audit, compare, schemas
from stages.auditing import comparison
from tests.conftest import ROOT, optimized
from tests.tampering import (
    ADAPTER,
    CALIBRATION,
    CHOICES,
    GENERATIONS,
    HEADS,
    RESPONSES,
    SCORES,
    SETTINGS,
    edit,
    edit_manifest,
    finished_run,
)

GRADIENTS, TRAINING = "02_conflict/gradients.parquet", "04_align/training.parquet"
ALIGNMENT, ARMS = "01_calibrate/alignment.parquet", "04_align/arms.parquet"


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def flax_run(torch_run) -> Path:
    """The same settings by the other backend, in the folder that a sibling has."""
    folder = torch_run.with_name(torch_run.name + comparison.SUFFIX)
    if not folder.exists():
        settings = dataclasses.replace(SETTINGS, run=str(folder), backend="flax")
        with optimized():
            for name in audit.STAGES:
                importlib.import_module(f"stages.{name}").main(settings)
    return folder


@pytest.fixture()
def changed(flax_run, tmp_path) -> Path:
    return Path(shutil.copytree(flax_run, tmp_path / "run"))


def lines_of(one: Path, other: Path, capsys) -> tuple[int, dict[str, str]]:
    """Exit code, and the line of each quantity. No prompt may be in what is printed."""
    capsys.readouterr()
    code = compare.main(one, other)
    printed = capsys.readouterr().out
    for row in artifacts.read_table(one / CALIBRATION, schemas.EXAMPLES).to_pylist():
        assert row["prompt"] not in printed
    lines = printed.splitlines()[3:-1]
    return code, {line[6:].split("  ")[0]: line for line in lines}


def test_torch_and_flax_agree(torch_run, flax_run, capsys):
    code, lines = lines_of(torch_run, flax_run, capsys)
    assert code == 0, lines
    assert set(lines) == {
        "gradients",
        "predictions",
        "generations",
        "O",
        "H_gen",
        "H_safe",
        "S",
        "C",
        "buckets",
        "training losses",
        "adapters' ΔW",
        "responses, base",
        "responses, tuned",
        "scores",
        "near-ties",
    }
    assert all(line.startswith("ok") for name, line in lines.items() if name != "responses, tuned")


def test_the_flax_run_passes_the_audit_and_reports_the_comparison(flax_run, capsys):
    assert audit.main(flax_run) == 0
    page = (flax_run / "06_correlate" / "report.html").read_text(encoding="utf-8")
    assert "Torch and Flax" in page and "audited (torch, float32 on cpu)" in page
    assert page.count('<td class="nowrap holds">yes</td>') == 13
    notes = artifacts.stage_manifest(flax_run, "06_correlate")["notes"]["compared_with"]
    assert notes["run"] == "audited" and len(notes["manifests"]) == 5
    assert artifacts.stage_manifest(flax_run, "03_sensitivity")["model"]["backend"] == "flax"


def test_a_run_against_itself_differs_by_nothing(flax_run, capsys):
    code, lines = lines_of(flax_run, flax_run, capsys)
    assert code == 0 and "0 differences" in lines["near-ties"]
    assert all("0.0000  0.0000" in " ".join(lines[name].split()).replace(" ", "  ") for name in ("O", "C"))


def nudge(column: str, by: float):
    def change(rows):
        for row in rows:
            row[column] += by

    return change


def every(column: str, step: int, value):
    """Sets a column of every `step`th row."""

    def change(rows):
        for row in rows[::step]:
            row[column] = value(row[column])

    return change


def gram(rows):
    rows[3]["gram"][1] += 1e-3 * rows[3]["gram"][0]


def mirror(column: str):
    def change(rows):
        values = [row[column] for row in rows]
        for row in rows:
            row[column] = max(values) + min(values) - row[column]

    return change


@pytest.mark.parametrize(
    ("quantity", "file", "change"),
    [
        ("gradients", GRADIENTS, gram),
        ("predictions", CHOICES, every("prediction", 20, lambda old: old + 1)),
        ("generations", GENERATIONS, every("token_ids", 20, lambda old: [*old[:-1], old[-1] + 1])),
        ("O", HEADS, nudge("conflict", 2e-5)),
        ("H_gen", HEADS, nudge("h_gen", 0.01)),
        ("H_safe", HEADS, nudge("h_safe", 0.01)),
        ("C", HEADS, mirror("score")),
        ("S", HEADS, every("sensitivity", 2, lambda old: old + 1)),
        ("buckets", HEADS, every("bucket", 12, lambda old: 5 - old)),
        ("training losses", TRAINING, nudge("loss", 0.05)),
        ("responses, base", RESPONSES, every("output", 4, lambda old: old + "!")),
        ("scores", SCORES, every("score", 5, lambda old: old + 0.1)),
    ],
)
def test_what_is_past_its_tolerance_is_named(torch_run, changed, quantity, file, change, capsys):
    edit(changed, file, change)
    code, lines = lines_of(torch_run, changed, capsys)
    assert code == 1 and lines[quantity].startswith("FAIL")


def test_an_adapter_that_differs_is_named(torch_run, changed, capsys):
    tensors = load_file(changed / ADAPTER)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, changed / ADAPTER)
    code, lines = lines_of(torch_run, changed, capsys)
    assert code == 1 and lines["adapters' ΔW"].startswith("FAIL")


def test_a_difference_that_is_no_near_tie_is_named_with_its_place(torch_run, changed, capsys):
    def change(rows):
        rows[-1]["token_ids"][2] = (rows[-1]["token_ids"][2] + 1) % 900

    edit(changed, GENERATIONS, change)
    code, lines = lines_of(torch_run, changed, capsys)
    row = artifacts.read_table(changed / GENERATIONS, schemas.SWEEP_GENERATIONS).to_pylist()[-1]
    place = f"{row['example_id']}, layer 2 head 3 silenced, after 2 tokens"
    assert code == 1 and lines["near-ties"].startswith("FAIL") and place in lines["near-ties"]


def test_a_near_tie_passes(torch_run, changed, capsys, monkeypatch):
    """What is no tie here becomes one where the tolerance is wide: then only the equal share may be short."""
    edit(changed, CHOICES, every("prediction", 200, lambda old: old + 1))
    wide = dataclasses.replace(comparison.FLOAT32, near=1e3)
    monkeypatch.setattr(comparison, "FLOAT32", wide)
    code, lines = lines_of(torch_run, changed, capsys)
    assert code == 0 and "1 differences" in lines["near-ties"]
    assert lines["near-ties"].startswith("ok") and "all of them are" in lines["near-ties"]


def test_without_the_model_differences_stay_untraced(torch_run, changed, capsys, monkeypatch):
    edit(changed, CHOICES, every("prediction", 200, lambda old: old + 1))
    monkeypatch.setattr(comparison.Run, "model_folder", None)
    code, lines = lines_of(torch_run, changed, capsys)
    assert code == 0 and lines["near-ties"].startswith("-") and "not on this machine" in lines["near-ties"]


def test_other_rows_are_compared_by_what_does_not_depend_on_them(torch_run, changed, capsys):
    for file in (CALIBRATION, ALIGNMENT):
        edit(changed, file, lambda rows: rows[0]["prompt_ids"].append(5))
    edit(changed, CALIBRATION, lambda rows: rows[-1]["prompt_ids"].append(5))
    code, lines = lines_of(torch_run, changed, capsys)
    assert code == 0
    for name in ("gradients", "predictions", "generations", "training losses", "adapters' ΔW"):
        assert "not compared" in lines[name]
    assert lines["O"].startswith("ok") and lines["scores"].startswith("ok")


def test_arms_with_other_heads_are_not_compared(torch_run, changed, capsys):
    edit(changed, ARMS, every("heads", 1, lambda old: [(head + 1) % 4 for head in old]))
    _, lines = lines_of(torch_run, changed, capsys)
    assert "no arm with the same heads" in lines["adapters' ΔW"]


def test_half_precision_has_tolerances_of_its_own(torch_run, changed, capsys):
    for stage in comparison.STAGES[1:]:
        edit_manifest(changed, stage, lambda manifest: manifest["model"].update(dtype="bfloat16"))
    edit(changed, HEADS, nudge("conflict", 1e-3))
    code, lines = lines_of(torch_run, changed, capsys)
    assert code == 0 and "largest 0.1" in lines["O"]


def call(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "stages.compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stderr


def test_the_command_ends_with_2_on_what_cannot_be_compared(torch_run, changed):
    assert call(torch_run, changed.parent / "none") == (
        2,
        f"error: {changed.parent}/none/01_calibrate/manifest.json is missing: run `python -m "
        f"stages.01_calibrate --run {changed.parent}/none` first\n",
    )
    edit_manifest(changed, "02_conflict", lambda manifest: manifest["model"].update(weights_sha256="0"))
    code, told = call(torch_run, changed)
    assert code == 2 and told.endswith("are runs of different models: nothing to compare\n")
    with pytest.raises(InputError):
        compare.main(torch_run, changed)
    assert call(torch_run)[0] == 2


def test_the_table_of_a_damaged_run_ends_with_a_line(torch_run, changed):
    edit(changed, CHOICES, lambda rows: rows.pop())
    rows = comparison.compare(comparison.open_run(torch_run), comparison.open_run(torch_run))
    assert len(rows) == 14 and all(row.ok is not False for row in rows)
    code, told = call(torch_run, changed)
    assert code == 2 and told.startswith("error: ") and told.count("\n") == 1


def test_gaps_are_infinite_where_one_run_was_cut_short(torch_run, flax_run):
    one = comparison.open_run(torch_run)
    from stages.auditing import near_ties

    row = one.calibration["safe"][0]
    found = near_ties._first((0, 1), row, [5, 6, 7], [5, 6])
    assert found.before == [5, 6] and found.tokens == (-1, -1)

    class Silent:
        def logits(self, *_, **__):
            raise AssertionError("there is nothing to ask")

    assert near_ties.gaps(Silent(), [found], "output") == [float("inf")]
    assert np.isinf(near_ties.gaps(Silent(), [found], "output")).all()
