"""Tables, parts, manifests: what is written is complete, what is damaged or changed is named."""

import os
import subprocess
import sys

import pyarrow as pa
import pytest

from backends import files
from backends.errors import InputError
from stages import artifacts, schemas
from tests.conftest import ROOT

ROWS = [
    {"layer": 0, "head": number, "example_id": "a", "prediction": 5, "correct": True} for number in range(3)
]
SCHEMA = schemas.SWEEP_CHOICES
SETTINGS = {"seed": 1, "rank": 4}


def make(run, name="03_sensitivity", settings=SETTINGS, reads=()):
    with artifacts.open_stage(run, name, settings, reads) as stage:
        if not stage.finished:
            stage.begin({"dtype": "float32"})
            stage.write("table.parquet", ROWS, SCHEMA)
            stage.finish(note=1)
        return stage


def test_a_finished_stage_is_skipped_and_a_table_comes_back(scratch, capsys):
    assert not make(scratch).finished
    assert make(scratch).finished
    assert "skipped" in capsys.readouterr().out
    assert artifacts.read_input(scratch, "03_sensitivity/table.parquet", SCHEMA).to_pylist() == ROWS
    manifest = artifacts.stage_manifest(scratch, "03_sensitivity")
    assert manifest["outputs"] == {
        "table.parquet": artifacts.sha256(scratch / "03_sensitivity/table.parquet")
    }
    assert manifest["settings"] == SETTINGS and manifest["notes"] == {"note": 1}
    for field in (
        "versions",
        "git",
        "wall_seconds",
        "peak_memory_bytes",
        "units",
        "inputs",
        "schema",
        "model",
    ):
        assert field in manifest
    assert not (scratch / "03_sensitivity" / artifacts.STARTED).exists()


def test_other_settings_are_named(scratch):
    make(scratch)
    with pytest.raises(InputError, match="rank 4 -> 8"):
        make(scratch, settings={"seed": 1, "rank": 8})


def test_other_settings_are_named_also_before_the_end(scratch):
    with artifacts.open_stage(scratch, "03_sensitivity", SETTINGS) as stage:
        stage.begin({"dtype": "float32"})
    with pytest.raises(InputError, match="seed 1 -> 2"):
        make(scratch, settings={"seed": 2, "rank": 4})
    with (
        artifacts.open_stage(scratch, "03_sensitivity", SETTINGS) as stage,
        pytest.raises(InputError, match="'float32' -> 'bfloat16'"),
    ):
        stage.begin({"dtype": "bfloat16"})


def test_other_inputs_are_named(scratch):
    make(scratch, "02_conflict")
    make(scratch, reads=["02_conflict/table.parquet"])
    artifacts.write_table(scratch / "02_conflict/table.parquet", ROWS[:1], SCHEMA)
    manifest = artifacts.stage_manifest(scratch, "02_conflict")
    manifest["outputs"]["table.parquet"] = artifacts.sha256(scratch / "02_conflict/table.parquet")
    artifacts.write_json(scratch / "02_conflict/manifest.json", manifest)
    with pytest.raises(InputError, match="made from another 02_conflict/table.parquet"):
        make(scratch, reads=["02_conflict/table.parquet"])


def test_a_missing_stage_names_its_command(scratch):
    with pytest.raises(InputError, match=r"python -m stages.02_conflict --run .* first"):
        make(scratch, reads=["02_conflict/table.parquet"])
    assert not (scratch / "03_sensitivity").exists(), "nothing is made before inputs are known to be there"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(scratch, damage):
    make(scratch)
    path = scratch / "03_sensitivity/table.parquet"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-5])
    else:
        path.unlink()
    with pytest.raises(InputError, match="table.parquet is"):
        make(scratch)
    with pytest.raises(InputError, match="table.parquet is"):
        artifacts.read_input(scratch, "03_sensitivity/table.parquet", SCHEMA)


def test_unreadable_manifest_and_wrong_schema_are_named(scratch):
    make(scratch)
    with pytest.raises(InputError, match="has not the columns of cast-1/heads"):
        artifacts.read_input(scratch, "03_sensitivity/table.parquet", schemas.HEADS)
    (scratch / "03_sensitivity/manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json cannot be read"):
        make(scratch)


def test_a_row_that_does_not_fit_is_refused(scratch):
    with pytest.raises((pa.ArrowException, ValueError)):
        artifacts.write_table(scratch / "t.parquet", [{**ROWS[0], "prediction": "five"}], SCHEMA)
    with pytest.raises((pa.ArrowException, ValueError)):
        artifacts.write_table(scratch / "t.parquet", [{**ROWS[0], "prediction": None}], SCHEMA)
    assert list(scratch.iterdir()) == [], "neither the table nor its temporary file is left"


def test_parts_outlive_a_death_and_gather_in_order(scratch):
    with pytest.raises(KeyboardInterrupt), artifacts.open_stage(scratch, "03_sensitivity", SETTINGS) as stage:
        stage.begin()
        stage.write_part("b", ROWS[1:], SCHEMA, seconds=2.0)
        raise KeyboardInterrupt
    with artifacts.open_stage(scratch, "03_sensitivity", SETTINGS) as stage:
        stage.begin()
        assert stage.has_part("b") and not stage.has_part("a")
        with pytest.raises(InputError, match="unit a of"):
            stage.gather("all.parquet", ["a", "b"], SCHEMA)
        stage.write_part("a", ROWS[:1], SCHEMA, seconds=1.0)
        table = stage.gather("all.parquet", ["a", "b"], SCHEMA)
        stage.finish()
    assert table.to_pylist() == ROWS
    assert artifacts.stage_manifest(scratch, "03_sensitivity")["units"] == {
        "a": {"seconds": 1.0},
        "b": {"seconds": 2.0},
    }
    assert not (scratch / "03_sensitivity/parts").exists()


def test_what_a_kill_at_the_very_end_left_behind_is_tidied(scratch):
    make(scratch)
    folder = scratch / "03_sensitivity"
    before = sorted(folder.rglob("*"))
    (folder / artifacts.STARTED).write_text("{}")
    (folder / "parts").mkdir()
    (folder / "parts/a.parquet").write_text("x")
    (folder / ".table.parquet.tmp").write_text("half")
    (folder / "adapters/.one.tmp").mkdir(parents=True)
    (folder / "adapters/.one.tmp/.inner.tmp").write_text("half")
    assert make(scratch).finished
    (folder / "adapters").rmdir()
    assert sorted(folder.rglob("*")) == before


def test_same_rows_same_bytes(scratch):
    for name in ("one", "two"):
        artifacts.write_table(scratch / name, ROWS, SCHEMA)
    assert (scratch / "one").read_bytes() == (scratch / "two").read_bytes()


def test_one_process_a_run_folder(scratch):
    program = f"""
from pathlib import Path
from stages import artifacts
with artifacts.open_stage(Path({str(scratch)!r}), "02_conflict", {{}}) as stage:
    print("open", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="in use by another process"):
            make(scratch)
        other.communicate("\n")
    make(scratch)


def test_no_room_and_no_right_to_write_are_said_before_work(scratch, monkeypatch):
    with (
        pytest.raises(InputError, match="GiB free, stage 02_conflict wants"),
        artifacts.open_stage(scratch, "02_conflict", {}, needed_gib=1e9),
    ):
        pass
    blocked = scratch / "file"
    blocked.write_text("")
    with (
        pytest.raises(InputError, match="cannot be written"),
        artifacts.open_stage(blocked / "run", "02_conflict", {}),
    ):
        pass
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_text(scratch / "full", "text")
    assert not list(scratch.glob(".*tmp")) and not (scratch / "full").exists()
