"""Losses and scores in a tracker (--track): through stand-ins, and TensorBoard's own files
where it is. A tracker that fails ends nothing."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from backends.core.errors import InputError
from stages.run import tracking
from stages.run.schemas import SCORES, TRAINING
from stages.run.settings import check
from stages.run.store import RunFolder, read_json
from tests.runs import COMPUTED, TINY, assert_same, make_run

ALIGN, EVALUATE = COMPUTED[3:5]
NAMES = {"base", "full-sft-21", "random-sft-21", "bucket1-sft-21", "bucket4-sft-21"}


class Run:
    """What a tracker's `init` returns."""

    def __init__(self, options: dict, fails: str):
        self.options, self.fails, self.points, self.finished = options, fails, [], False

    def log(self, values, step=None):
        if self.fails == "log":
            raise OSError("no network\nat all")
        self.points.append((step, values))

    def finish(self):
        self.finished = True


class Module(types.ModuleType):
    """A stand-in for wandb or trackio."""

    def __init__(self, name: str, fails: str = ""):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.runs, self.fails = [], fails

    def init(self, **options):
        if self.fails == "init":
            raise RuntimeError("no account")
        self.runs.append(Run(options, self.fails))
        return self.runs[-1]


@pytest.fixture()
def stand_in(monkeypatch):
    def put(name: str, fails: str = "") -> Module:
        module = Module(name, fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


def test_losses_of_every_step_and_all_scores_are_logged_and_change_nothing(copy_run, stand_in, tiny_run):
    wandb, run = stand_in("wandb"), copy_run(ALIGN)
    make_run(run, TINY.replace(track="wandb"), (ALIGN, EVALUATE))
    assert_same(run, tiny_run)
    assert "track" not in read_json(run / "run.json")
    assert all(own.finished for own in wandb.runs)
    tuned, scored = wandb.runs[: len(NAMES) - 1], wandb.runs[len(NAMES) - 1 :]
    assert {own.options["name"] for own in scored} == NAMES and len(scored) == len(NAMES)
    for own in wandb.runs:
        assert (own.options["project"], own.options["group"]) == ("cast", run.resolve().name)
        assert own.options["resume"] == "allow"
    ids = {own.options["name"]: own.options["id"] for own in scored}
    assert all(ids[own.options["name"]] == own.options["id"] for own in tuned)  # scores go where losses are
    assert len(set(ids.values())) == len(NAMES)
    training = RunFolder(run).read(TRAINING).groupby("arm", sort=False)
    for own, (_, steps) in zip(tuned, training, strict=True):
        assert [step for step, _ in own.points] == steps["step"].tolist()
        assert [values["train/loss"] for _, values in own.points] == steps["loss"].tolist()
        assert all(values.keys() == {"train/loss", "train/lr"} for _, values in own.points)
    scores = RunFolder(run).read(SCORES).groupby("arm", sort=False)
    for own, (_, rows) in zip(scored, scores, strict=True):
        wanted = {f"score/{row.benchmark}": row.score for row in rows.itertuples()}
        assert own.points == [(None, wanted)]


def test_trackio_gets_the_same(stand_in, scratch):
    trackio = stand_in("trackio")
    with tracking.tracked("trackio", scratch / "mine", "full-sft-21", pytest.fail) as tracker:
        tracker.log({"train/loss": 2.0}, 3)
        tracker.log({"score/facts": 0.5})
    (own,) = trackio.runs
    assert own.finished and own.points == [(3, {"train/loss": 2.0}), (None, {"score/facts": 0.5})]
    wanted = {
        "project": "cast",
        "name": "mine/full-sft-21",
        "group": "mine",
        "resume": "allow",
        "embed": False,
    }
    assert own.options == wanted


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_tracker_that_fails_is_warned_of_once_and_ends_nothing(fails, stand_in, scratch):
    module, said = stand_in("wandb", fails), []
    with tracking.tracked("wandb", scratch, "full-sft-21", said.append) as tracker:
        for step in range(3):
            tracker.log({"train/loss": 1.0}, step)
    cause = "no account" if fails == "init" else "no network"
    assert said == [f"--track wandb failed on full-sft-21 ({cause}): it goes on without"]
    assert all(own.points == [] for own in module.runs)


def test_no_tracker_is_none(scratch, monkeypatch):
    monkeypatch.setattr(tracking, "TRACKERS", {})
    with tracking.tracked("", scratch, "base", pytest.fail) as tracker:
        tracker.log({"score/facts": 1.0})
    assert not list(scratch.iterdir())


def test_what_is_missing_is_left_out(stand_in, scratch):
    module = stand_in("trackio")
    with tracking.tracked("trackio", scratch, "base", pytest.fail) as tracker:
        tracker.log({"a": None, "b": np.nan, "c": np.float64(0.5)}, 2)
    assert module.runs[0].points == [(2, {"c": 0.5})]
    record = {"step": 1, "loss": 2.0, "util_loss": None, "cos": np.nan, "lr": 0.1, "tokens": 9}
    assert tracking.of_step(record).keys() == {"train/loss", "train/util_loss", "train/cos", "train/lr"}


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_one_that_is_not_installed_is_refused_in_one_line(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda own, *rest: None if own == name else found(own))
    with pytest.raises(InputError, match=f"--track {name} needs {name}.*requirements-{name}.txt"):
        check(TINY.replace(track=name))
    assert (Path(tracking.__file__).parents[2] / f"requirements-{name}.txt").is_file()


def test_tensorboard_reads_what_was_written(scratch):
    """`pip install -r requirements-tensorboard.txt`."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking.tracked("tensorboard", scratch, "full-sft-21", pytest.fail) as tracker:
        for step in range(3):
            tracker.log({"train/loss": 3.0 - step, "train/cos": None}, step)
    with tracking.tracked("tensorboard", scratch, "full-sft-21", pytest.fail) as tracker:
        tracker.log({"score/facts": 0.75})
    files = EventAccumulator(str(scratch / "tracking" / "full-sft-21")).Reload()
    assert files.Tags()["scalars"] == ["train/loss", "score/facts"]
    assert [(point.step, point.value) for point in files.Scalars("train/loss")] == [(0, 3), (1, 2), (2, 1)]
    assert [(point.step, point.value) for point in files.Scalars("score/facts")] == [(0, 0.75)]
