"""The audit passes a clean run; files, manifests and settings that were tampered with fail by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backends.errors import InputError
from stages import artifacts, audit, presets, schemas
from stages.auditing.audit_run import TABLES
from tests.conftest import ROOT
from tests.tampering import (
    ADAPTER,
    COSTS,
    HEADS,
    SCORES,
    copied,
    edit,
    edit_manifest,
    failures,
    finished_run,
    reseal,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture()
def run(finished, tmp_path) -> Path:
    return copied(finished, tmp_path)


def test_a_clean_run_passes(finished, capsys):
    assert audit.main(finished) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines[:-1]) and "0 failed, 0 not checked" in lines[-1]
    adapters = [line for line in lines if line.startswith("ok   adapter ")]
    assert len(adapters) == 3 and all("48 of 48 chosen rows of B moved" in line for line in adapters)


def test_a_resealed_run_still_passes(run, capsys):
    edit(run, SCORES, lambda rows: None)
    assert failures(run, capsys) == []


def test_the_command_ends_with_1_on_failure_and_with_2_on_no_run(run):
    def call(folder) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "stages.audit", str(folder)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        return done.returncode, done.stdout, done.stderr

    (run / "01_calibrate" / "notes.txt").write_text("mine")
    code, out, _ = call(run)
    assert code == 1 and "FAIL files of 01_calibrate: 01_calibrate/notes.txt is not in the manifest" in out
    code, out, error = call(run / "nowhere")
    assert (code, out) == (2, "") and len(error.splitlines()) == 1 and "is no run" in error


@pytest.mark.parametrize("stage", audit.STAGES)
def test_a_missing_stage_names_its_command(run, stage):
    shutil.rmtree(run / stage)
    with pytest.raises(InputError, match=f"python -m stages.{stage} --run"):
        audit.main(run)


def test_one_flipped_byte_in_any_file_fails(run, monkeypatch):
    paths = [path for stage in audit.STAGES for path in artifacts.files_below(run / stage)]
    kinds = {path.suffix for path in paths}
    assert {".parquet", ".safetensors", ".json", ".csv", ".md", ".svg", ".png", ".html"} <= kinds
    monkeypatch.setattr(audit, "CHECKS", (audit.files,))
    for path in paths:
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            (failed,) = [one for one in audit.files(audit.open_run(run)) if not one.ok]
            assert f"{path.relative_to(run)} is not what its manifest says" in failed.detail
            assert audit.main(run) == 1
        path.write_bytes(content)
    assert audit.main(run) == 0


@pytest.mark.parametrize("relative", [*TABLES, ADAPTER, COSTS])
def test_a_damaged_file_is_a_failure_not_a_traceback(run, relative, capsys):
    """Resealed, and every check that needs the file is still run."""
    path = run / relative
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reseal(run)
    assert audit.main(run) == 1
    printed = capsys.readouterr().out
    assert Path(relative).name in printed and "audit of" in printed


@pytest.mark.parametrize("stage", audit.STAGES)
def test_a_changed_hash_in_a_manifest_fails(run, stage, capsys):
    def change(manifest):
        file = min(manifest["outputs"])
        manifest["outputs"][file] = manifest["outputs"][file][::-1]

    edit_manifest(run, stage, change)
    assert any(f"files of {stage}" in line for line in failures(run, capsys))


def test_an_edited_manifest_fails(run, capsys):
    def change(manifest):
        manifest["schema"] = "cast-0"
        manifest["settings"]["seed"] = 7
        manifest["inputs"].popitem()
        manifest["notes"]["base"]["accuracy"] = 0.9
        del manifest["git"]

    edit_manifest(run, "03_sensitivity", change)
    failed = "\n".join(failures(run, capsys))
    assert "03_sensitivity/manifest.json has other fields: git" in failed
    assert "03_sensitivity: seed is 7, in run.json 0" in failed
    assert "03_sensitivity does not name its input 02_conflict/gradients.parquet" in failed
    assert "notes of the manifests: 03_sensitivity: base is" in failed


def test_an_edited_run_json_fails(run, capsys):
    stored = artifacts.read_json(run / presets.RUN_FILE)
    artifacts.write_json(run / presets.RUN_FILE, stored | {"lr": 0.5})
    assert any("04_align: lr is 0.1, in run.json 0.5" in line for line in failures(run, capsys))
    (run / presets.RUN_FILE).write_text(json.dumps(stored))
    assert any("run.json was edited" in line for line in failures(run, capsys))


def test_extra_and_missing_files_fail(run, capsys):
    (run / "03_sensitivity" / "parts").mkdir()
    (run / "03_sensitivity" / "parts" / "left.parquet").write_bytes(b"")
    (run / "06_correlate" / "tables" / ".hidden").write_bytes(b"")
    (run / "07_more").mkdir()
    (run / "06_correlate" / "report.html").unlink()
    failed = "\n".join(failures(run, capsys))
    assert "03_sensitivity/parts/left.parquet is not in the manifest" in failed
    assert "06_correlate/tables/.hidden is not in the manifest" in failed
    assert "07_more belongs to no stage" in failed
    assert "06_correlate/report.html is missing" in failed


def test_a_file_of_no_stage_fails_though_listed(run, capsys):
    (run / "02_conflict" / "more.parquet").write_bytes(b"PAR1")
    reseal(run)
    assert any("02_conflict/more.parquet is no file of this stage" in line for line in failures(run, capsys))


def test_a_stage_made_from_other_files_fails(run, capsys):
    """The manifest of 04 is right about its own files, but they come from another map."""
    path = run / HEADS
    rows = artifacts.read_table(path, schemas.HEADS).to_pylist()
    artifacts.write_table(path, rows[::-1], schemas.HEADS)
    digest = artifacts.sha256(path)
    edit_manifest(run, "03_sensitivity", lambda manifest: manifest["outputs"].update({path.name: digest}))
    failed = "\n".join(failures(run, capsys))
    assert f"04_align was made from another {HEADS}" in failed
    assert f"{HEADS} does not hold every head of 3 x 4 once" in failed


def test_another_model_in_one_stage_fails(run, capsys):
    edit_manifest(run, "04_align", lambda manifest: manifest["model"].update(weights_sha256="0" * 64))
    assert any("04_align: weights_sha256 is '000" in line for line in failures(run, capsys))
