"""Drift of the map and re-diagnosed buckets: whole runs of the tiny model, and the numbers by hand."""

import doctest
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import backends
from backends import models
from backends.core.errors import InputError
from data.rendering import example
from stages import audit
from stages.checks import comparison
from stages.checks.finished import FinishedRun
from stages.method import drift as method
from stages.method.conflict_map import head_map
from stages.method.heads import HeadMap
from stages.run import drift as units
from stages.run import schemas
from stages.run.diagnosis import measures
from stages.run.job import Job
from stages.run.pipeline import STAGES, declaration, make
from stages.run.settings import check
from stages.run.store import RunFolder
from stages.scale import plan
from tests.runs import TINY, assert_same, contents, made_once
from tests.tampering import edit, reseal

EVALUATE = schemas.DRIFT.stage
SETTINGS = TINY.replace(
    benchmarks=("facts=6", "words=6", "adversarial=4:4", "benign=4:4"),
    arms=("full", "bucket1"),
    ablations=("buckets-rediagnosed",),
    sensitivity="gradient",
    rediagnose=2,
    align_rows=32,  # four steps
    lr=0.3,
    drift=True,
)


@pytest.fixture(scope="module")
def drifted(tmp_path_factory) -> Path:
    """All stages."""
    return made_once(tmp_path_factory, "drifted", SETTINGS, STAGES)


def copied(drifted: Path, scratch: Path, **changes: object):
    """A copy of stages 01 to 05, and its settings."""
    folder = Path(shutil.copytree(drifted, scratch / "copy"))
    shutil.rmtree(folder / "06_correlate")
    return folder, SETTINGS.replace(run=str(folder), **changes)


def test_docstring_examples():
    result = doctest.testmod(method)
    assert result.attempted and not result.failed


def scores(conflict, h_gen, h_safe) -> HeadMap:
    return head_map(*map(np.array, (conflict, h_gen, h_safe)), "rank-difference", 2)


def test_drift_by_hand():
    base = scores([[0.1, 0.2], [0.3, 0.4]], [[0.0, 1.0], [2.0, 3.0]], [[3.0, 2.0], [1.0, 0.5]])
    turned = scores([[0.4, 0.3], [0.2, 0.2]], [[0.0, 1.0], [2.0, 3.0]], [[3.0, 2.0], [1.0, 0.5]])
    heads = np.array([[True, False], [False, False]])
    same, other = (method.map_drift(base, tuned, heads) for tuned in (base, turned))
    assert set(same.correlations.values()) == {1.0} and same[1:] == (0.0, 0.0, 0.0, 0.0)
    assert other.correlations["h_gen"] == 1 and other.correlations["optimization_conflict"] < -0.9
    assert other.conflict_change == pytest.approx(0.025)
    everything = method.map_drift(base, turned, np.ones((2, 2), bool))
    assert everything.changed_others is None
    layers = method.by_layer(base, turned, heads)
    assert [layer.conflict_change for layer in layers] == pytest.approx([0.2, -0.15])
    assert layers[0].changed_tuned in (0.0, 1.0) and layers[1].changed_tuned is None
    assert set(layers[0].correlations.values()) == {None}, "two heads have no order worth a number"
    assert np.mean([layer.changed for layer in layers]) == other.changed


def test_the_run_passes_its_audit_and_shows_what_moved(drifted, capsys):
    assert audit.main(drifted) == 0, capsys.readouterr().out
    page = (drifted / "06_correlate" / "report.html").read_text()
    assert 'id="drift"' in page and "were drawn anew while they were tuned" in page
    assert "After tuning, on the same rows, C has a rank correlation of" in page
    for name in ("svg", "png"):
        assert (drifted / "06_correlate" / "figures" / f"drift.{name}").is_file()


def test_drift_is_the_map_of_each_model_against_that_of_the_base(drifted):
    run = RunFolder(drifted)
    rows, arms = run.read(schemas.DRIFT), run.read(schemas.ARMS)
    assert len(rows) == len(arms) * 12 and set(rows["arm"]) == set(arms["arm"])
    backend = backends.load("torch", models.local_folder("random/tiny"), device="cpu", dtype="float32")
    calibration = run.read(schemas.CALIBRATION)
    sides = (
        [example(row) for row in calibration[calibration["split"] == split].to_dict("records")]
        for split in ("safe", "util")
    )
    adapter = drifted / "04_align" / "adapters" / "bucket1-sft-21"
    found = measures(backend.head_gradients(*sides, SETTINGS.data.folds, adapter=adapter))
    own = rows[rows["arm"] == "bucket1"]
    for name, values in found.items():
        np.testing.assert_allclose(own[name], values.ravel(), rtol=1e-12)
    base, table = run.read(schemas.HEADS), pd.read_csv(drifted / "06_correlate" / "tables" / "drift.csv")
    row = table.set_index("arm").loc["bucket1"]
    for name in ("optimization_conflict", "h_gen", "conflict_score"):
        expected = pd.Series(own[name].to_numpy()).corr(base[name], method="spearman")
        assert row[f"rho_{name}"] == pytest.approx(expected, abs=1e-9) and expected < 1
    changed = own["bucket"].to_numpy() != base["bucket"].to_numpy()
    tuned = (base["bucket"] == 1).to_numpy()
    assert row["changed"] == changed.mean() > 0
    assert row["changed_tuned"] == changed[tuned].mean() and row["changed_others"] == changed[~tuned].mean()
    layers = pd.read_csv(drifted / "06_correlate" / "tables" / "drift_layers.csv")
    np.testing.assert_allclose(layers[layers["arm"] == "bucket1"]["changed"], changed.reshape(3, 4).mean(1))


def test_a_rediagnosed_bucket_starts_as_the_bucket_and_is_drawn_every_n_steps(drifted):
    run = RunFolder(drifted)
    training, arms = run.read(schemas.TRAINING), run.read(schemas.ARMS).set_index("arm")
    heads = run.read(schemas.HEADS)
    entered = []
    for number in range(1, 5):
        own = training[training["arm"] == f"bucket{number}-rediagnosed"]
        draws = {
            step: {tuple(head) for head in drawn}
            for step, drawn in zip(own["step"], own["drawn"], strict=True)
            if drawn is not None
        }
        first = heads[heads["bucket"] == number]
        assert set(draws) == {0, 2} and draws[0] == set(zip(first["layer"], first["head"], strict=True))
        row = arms.loc[f"bucket{number}-rediagnosed"]
        assert row["entered"].tolist() == [len(draws[2] - draws[0])] and len(draws[2]) == len(draws[0])
        assert set(zip(row["layers"], row["heads"], strict=True)) == draws[0] | draws[2]
        entered += row["entered"].tolist()
    assert max(entered) > 0, "some bucket must change"
    assert training[~training["arm"].str.contains("rediagnosed")]["drawn"].isna().all()
    losses = {
        arm: training[training["arm"] == arm]["loss"].tolist() for arm in ("bucket1", "bucket1-rediagnosed")
    }
    np.testing.assert_allclose(*(own[:2] for own in losses.values()), rtol=1e-6)
    table = pd.read_csv(drifted / "06_correlate" / "tables" / "redraws.csv")
    assert table["entered"].tolist() == entered and set(table["step"]) == {2}


def test_a_finished_stage_gets_its_drift_and_answers_nothing_again(drifted, scratch, monkeypatch, capsys):
    """Without --drift, then with it and killed after two units: it ends as if asked for at first."""
    folder, settings = copied(drifted, scratch)
    plain = settings.replace(drift=False)
    shutil.rmtree(folder / EVALUATE)
    make(EVALUATE, plain)
    assert not RunFolder(folder).has(schemas.DRIFT)
    for call in ("generate", "choices", "grade"):
        monkeypatch.setattr(f"backends.core.loaded.Loaded.{call}", lambda *_, **__: pytest.fail("answered"))
    kept, keep = [], Job.keep

    def dying(job: Job, *arguments, **info) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(keep(job, *arguments, **info))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "keep", dying)
        make(EVALUATE, settings)
    make(EVALUATE, settings)
    assert_same(folder / EVALUATE, drifted / EVALUATE)
    capsys.readouterr()
    make(EVALUATE, settings)
    make(EVALUATE, plain)  # what is there stays
    assert capsys.readouterr().out.count("skipped") == 2


def test_shards_and_engines_see_a_unit_for_each_tuned_model(drifted, scratch, capsys):
    folder, settings = copied(drifted, scratch)
    shutil.rmtree(folder / EVALUATE)
    found = declaration(EVALUATE).units(Job(declaration(EVALUATE), settings))
    named = [name for name, work in found.items() if isinstance(work, units.Diagnosis)]
    assert len(named) == 6 and named[1] == "bucket1-sft-21-drift000-002"
    for number in (1, 2):
        make(EVALUATE, settings.replace(shard=f"{number}/2"))
    make(EVALUATE, settings)
    assert_same(folder / EVALUATE, drifted / EVALUATE)
    capsys.readouterr()
    plan.main(settings)
    output = capsys.readouterr().out
    assert "drift: maps of 6 tuned models" in output and "drawn anew 1 times" in output


def test_a_killed_tuning_draws_again_what_it_drew(drifted, scratch, monkeypatch):
    """Killed in the steps after a re-draw, whatever had been kept."""
    from backends.core import checkpoint, tuning

    folder, settings = copied(drifted, scratch)
    for stage in ("04_align", EVALUATE):
        shutil.rmtree(folder / stage)
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    take, taken = tuning.LoraPlan.take, []

    def dying(plan, engine, number: int) -> dict:
        if plan.redraw is not None and number == 3 and not taken:
            taken.append(number)
            raise KeyboardInterrupt
        return take(plan, engine, number)

    monkeypatch.setattr(tuning.LoraPlan, "take", dying)
    with pytest.raises(KeyboardInterrupt):
        make("04_align", settings)
    make("04_align", settings)
    assert taken and contents(folder / "04_align") == contents(drifted / "04_align")


def test_the_audit_finds_what_was_changed(drifted, scratch, capsys):
    folder = Path(shutil.copytree(drifted, scratch / "copy"))

    def failed() -> str:
        capsys.readouterr()
        audit.main(folder)
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))

    reseal(folder)
    assert failed() == ""
    edit(folder, schemas.DRIFT, lambda rows: rows.assign(conflict_score=rows["conflict_score"] * 1.01))
    assert "05_evaluate joined again: drift.parquet: layer 0, head 0" in failed().replace(
        "arm full, optimizer sft, seed 21, ", ""
    )
    edit(folder, schemas.TRAINING, lambda rows: rows.assign(drawn=rows["drawn"].shift(1)))
    assert "steps: bucket1-rediagnosed-sft-21: heads were drawn before steps [1, 3]" in failed()


def test_the_comparison_holds_the_map_of_every_tuned_model(drifted, scratch):
    def compared(other: Path) -> dict:
        pair = comparison.Comparison(*(FinishedRun(run, STAGES[:-1]) for run in (drifted, other)))
        return {row.quantity: row for row in pair.rows()}

    names = [f"{name}, tuned" for name in comparison.DRIFTED]
    rows = compared(drifted)
    assert all(rows[name].ok and (rows[name].compared, rows[name].rank) == ("72", 1) for name in names)
    assert rows["buckets, tuned"].equal == 1 and comparison.DRIFT_RANK == 0.99
    folder, settings = copied(drifted, scratch)

    def other_map(table: pd.DataFrame) -> None:
        """Of one model of six."""
        own = table["arm"] == "bucket1"
        table.loc[own, "conflict_score"] = np.roll(table.loc[own, "conflict_score"], 5)

    edit(folder, schemas.DRIFT, other_map)
    rows = compared(folder)
    assert [name for name in names if rows[name].ok is False] == ["C, tuned"]
    shutil.rmtree(folder / EVALUATE)
    make(EVALUATE, settings.replace(drift=False))
    rows = compared(folder)
    assert {(rows[name].ok, rows[name].note) for name in names} == {(None, "in one run only")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rediagnose": 0}, "bucket1-rediagnosed needs --rediagnose N"),
        ({"ablations": ()}, "--rediagnose: no arm is re-diagnosed"),
        ({"sensitivity": "graded"}, "--sensitivity gradient, not graded"),
        ({"rediagnose": 4}, "--rediagnose 4: a tuning has 4 steps"),
        ({"rediagnose": -1}, "--rediagnose must not be negative"),
        ({"ablations": ("bucket1@x-rediagnosed",)}, "@x needs --maps"),
    ],
)
def test_bad_input_is_refused_before_any_work(changes, message):
    check(SETTINGS)
    with pytest.raises(InputError, match=message.replace("(", "\\(")):
        check(SETTINGS.replace(**changes))
