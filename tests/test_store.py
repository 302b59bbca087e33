"""Tables, parts, manifests, run by run: what is written is complete, what is kept outlives a death."""

import os

import pandas as pd
import pyarrow as pa
import pytest

from backends.core import files
from backends.core.errors import InputError
from stages.run.job import Job, Stage
from stages.run.presets import preset_settings
from stages.run.runner import run_stage
from stages.run.schemas import PREDICTIONS, SWEEP_CHOICES
from stages.run.store import MANIFEST, PARTS, STARTED, RunFolder, read_table, write_table

UNITS = {"b": [1, 2], "a": [0]}
"""unit -> heads"""
MODEL = {"weights_sha256": "0" * 64, "dtype": "float32"}


def frame(heads) -> pd.DataFrame:
    """Rows of predictions; head 0 stands for the clean model."""
    layers = [0 if head else None for head in heads]
    return pd.DataFrame(
        {"layer": layers, "head": [head or None for head in heads], "example_id": "x", "prediction": heads}
    )


def compute(job, pending) -> None:
    job.start(MODEL)
    for unit, heads in pending.items():
        job.keep(unit, frame(heads), PREDICTIONS, seconds=1.0)


def join(job) -> dict:
    job.write(SWEEP_CHOICES, job.parts(UNITS, PREDICTIONS).assign(correct=True))
    return {"note": 1}


def toy(**changes) -> Stage:
    """A stage of two units that needs no model."""
    declared = {"units": lambda job: UNITS, "compute": compute, "join": join} | changes
    return Stage("03_sensitivity", ("map",), reads=(), writes=(SWEEP_CHOICES,), **declared)


@pytest.fixture()
def settings(scratch):
    return preset_settings("tiny").replace(run=str(scratch))


def test_a_finished_stage_is_skipped_and_its_table_comes_back(settings, scratch, capsys):
    run_stage(toy(), settings)
    folder = scratch / "03_sensitivity"
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "sweep_choices.parquet"]
    run_stage(toy(compute=None, join=None), settings)
    assert "skipped" in capsys.readouterr().out
    run = RunFolder(scratch)
    rows, manifest = run.read(SWEEP_CHOICES), run.manifest("03_sensitivity")
    assert rows["prediction"].tolist() == [1, 2, 0] and rows["layer"].isna().tolist() == [False, False, True]
    assert manifest["outputs"] == {"sweep_choices.parquet": files.sha256(run.path(SWEEP_CHOICES))}
    assert manifest["settings"] == settings.group("map") and manifest["model"] == MODEL
    assert manifest["notes"] == {"note": 1} and manifest["units"] == dict.fromkeys(UNITS, {"seconds": 1.0})
    assert manifest.keys() >= {"versions", "git", "wall_seconds", "peak_memory_bytes", "inputs", "schema"}


def test_parts_outlive_a_death_and_join_in_order(settings, scratch):
    done = []

    def dying(job, pending) -> None:
        done.extend(pending)
        compute(job, {unit: pending[unit] for unit in list(pending)[:1]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(toy(compute=dying), settings)
    with pytest.raises(InputError, match="unit a of .* is missing"):
        run_stage(toy(compute=lambda job, pending: None), settings)
    with pytest.raises(KeyboardInterrupt):
        run_stage(toy(compute=dying), settings)
    assert done == ["b", "a", "a"]
    run_stage(toy(compute=None), settings)
    assert RunFolder(scratch).read(SWEEP_CHOICES)["prediction"].tolist() == [1, 2, 0]
    assert not (scratch / "03_sensitivity" / PARTS).exists()


@pytest.mark.parametrize("shard", ["units=b", "3/3"])
def test_a_part_that_another_shard_finishes_after_this_one_looked_is_sound(
    shard, settings, monkeypatch, capsys
):
    Job(toy(), settings).remember()
    find = Job.find

    def overtaken(job: Job) -> bool:
        found = find(job)
        with monkeypatch.context() as patch:
            patch.setattr(Job, "find", find)
            run_stage(toy(), settings.replace(shard="1/2"))  # computes b
        return found

    monkeypatch.setattr(Job, "find", overtaken)
    run_stage(toy(compute=None), settings.replace(shard=shard))
    assert capsys.readouterr().out.count("1 of 2 units of the stage are") == 2


def test_what_a_kill_at_the_very_end_left_is_tidied(settings, scratch):
    run_stage(toy(), settings)
    folder = scratch / "03_sensitivity"
    before = sorted(folder.rglob("*"))
    for file in (STARTED, f"{PARTS}/a.parquet", ".table.parquet.tmp", "adapters/.b.tmp/.inner.tmp"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("half")
    run_stage(toy(), settings)
    (folder / "adapters").rmdir()
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [{"prediction": ["five"]}, {"prediction": [None]}, {"correct": ["yes"]}, {"example_id": [None]}, {}],
)
def test_rows_that_do_not_fit_are_refused(change, scratch):
    rows = frame([1]).assign(correct=True).assign(**change)
    rows = rows if change else rows.drop(columns="layer")
    with pytest.raises((pa.ArrowException, ValueError)):
        write_table(scratch / "table.parquet", rows, SWEEP_CHOICES.schema)
    assert list(scratch.iterdir()) == [], "neither the table nor its temporary file is there"


def test_same_rows_same_bytes_and_nulls_stay(scratch):
    one, two = scratch / "one", scratch / "two"
    for path in (one, two):
        write_table(path, frame([0, 1]), PREDICTIONS)
    assert one.read_bytes() == two.read_bytes()
    rows = read_table(one, PREDICTIONS)
    assert rows["layer"].tolist() == [None, 0] and rows["head"].tolist() == [None, 1]
    write_table(one, rows, PREDICTIONS)
    assert one.read_bytes() == two.read_bytes()


def test_a_full_disk_leaves_nothing_half_written(scratch, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_text(scratch / "full", "text")
    assert list(scratch.iterdir()) == []
