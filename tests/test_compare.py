"""The comparison passes two backends' runs of one method, and names what is past its tolerance."""

import re
import shutil
import subprocess
import sys
from functools import partial
from operator import add
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages import audit, compare
from stages.checks import comparison, near_ties
from stages.checks.finished import FinishedRun
from stages.run import schemas as t
from stages.run.store import read_table, write_table
from tests.conftest import ROOT, optimized
from tests.runs import COMPUTED, NEURONS, made_once, make_run
from tests.tampering import cell, copied, edit, edit_adapter, edit_manifest, edit_settings, reseal


@pytest.fixture(scope="module")
def flax_run(tmp_path_factory) -> Path:
    """The run of neurons by the other backend."""
    with optimized():
        return made_once(tmp_path_factory, "neurons-flax", NEURONS.replace(backend="flax"), COMPUTED)


@pytest.fixture()
def changed(flax_run, scratch) -> Path:
    return copied(flax_run, scratch)


def lines_of(first: Path, second: Path, capsys) -> tuple[int, dict[str, list[str]]]:
    """Exit code, and the cells of each quantity's line but its name: mark, how many, …"""
    capsys.readouterr()
    code, printed = compare.main(first, second), capsys.readouterr().out
    _, _, table = printed.partition("tolerance")
    cells = [re.split(r" {2,}", line.strip()) for line in table.splitlines()[1:-1]]
    return code, {name: [mark, *more] for mark, name, *more in cells}


def test_torch_and_flax_agree_and_flax_passes_the_audit(neurons_run, flax_run, capsys):
    code, lines = lines_of(neurons_run, flax_run, capsys)
    assert code == 0, lines
    measured = [quantity for quantity in comparison.QUANTITIES if quantity.table is not t.DRIFT]
    expected = {quantity.name for quantity in measured} - {"worked answers"}
    assert set(lines) == expected | {"updates", "near-ties"}
    assert all(line[0] == "ok" for name, line in lines.items() if name != "responses, tuned")
    run = FinishedRun(flax_run, COMPUTED)
    assert run.manifest("03_sensitivity")["model"]["backend"] == "flax"
    checks = [check for what, check in audit.CHECKS.items() if what != "costs"]
    assert [audit.result_of(check, run)[0] for check in checks] == [[]] * len(checks)
    code, lines = lines_of(flax_run, flax_run, capsys)
    assert code == 0 and all(lines[name][2] == "0" for name in ("O", "C", "gradients", "near-ties"))


def every(step: int, column: str, change):
    """Changes a column of every `step`th row."""

    def changed(rows: pd.DataFrame) -> None:
        for row in range(0, len(rows), step):
            rows.at[row, column] = change(rows.at[row, column])

    return changed


def other_token(tokens: np.ndarray) -> np.ndarray:
    return np.append(tokens[:-1], (tokens[-1] + 1) % 900)


PAST = [
    ("gradients", t.GRADIENTS, cell(3, "gram", lambda gram: gram * (1 + 1e-3 * (np.arange(len(gram)) == 0)))),
    ("gates, utility", t.GRADIENTS, cell(3, "gate_util", lambda gates: gates + 1)),
    ("gates, safety", t.GRADIENTS, cell(3, "gate_safe", lambda gates: gates + 1)),
    ("graded outcomes", t.SWEEP_GRADED, every(20, "graded", partial(add, 0.01))),
    ("predictions", t.SWEEP_CHOICES, every(20, "prediction", partial(add, 1))),
    ("generations", t.SWEEP_GENERATIONS, every(20, "token_ids", other_token)),
    ("O", t.HEADS, every(1, "optimization_conflict", partial(add, 2e-5))),
    ("H_gen", t.HEADS, every(1, "h_gen", partial(add, 0.01))),
    ("H_safe", t.HEADS, every(1, "h_safe", partial(add, 0.01))),
    ("C", t.HEADS, every(1, "conflict_score", lambda old: -old)),
    ("S", t.HEADS, every(2, "functional_sensitivity", partial(add, 1))),
    ("buckets", t.HEADS, every(12, "bucket", lambda old: 5 - old)),
    ("neurons' utility", t.NEURONS, every(9, "utility_score", lambda old: 1.1 * old)),
    ("training losses", t.TRAINING, every(1, "loss", partial(add, 0.05))),
    ("responses, base", t.RESPONSES, every(4, "output", lambda old: old + "!")),
    ("scores", t.SCORES, every(5, "score", partial(add, 0.1))),
]


def test_what_is_past_its_tolerance_is_named(neurons_run, changed, capsys):
    for _, table, change in PAST:
        edit(changed, table, change)
    code, lines = lines_of(neurons_run, changed, capsys)
    assert code == 1
    assert [quantity for quantity, _, _ in PAST if lines[quantity][0] != "FAIL"] == []
    edit(changed, t.SWEEP_GENERATIONS, lambda rows: rows[:-1])
    _, lines = lines_of(neurons_run, changed, capsys)
    assert lines["generations"][0] == "FAIL" and lines["generations"][-1] == "1 rows are in one run only"


@pytest.mark.parametrize("adapter", ["bucket4-sft-21", "neurons16-maml-21"])
def test_a_longer_update_is_named(neurons_run, changed, adapter, capsys):
    def longer(tensors):
        for name in tensors:
            gains = name.endswith("ia3_l")
            tensors[name] = 1.02 * tensors[name] - 0.02 if gains else 1.01 * tensors[name]

    edit_adapter(changed, adapter, longer)
    code, lines = lines_of(neurons_run, changed, capsys)
    assert code == 1 and lines["updates"][0] == "FAIL"


def test_signs_that_rounding_chooses_count_by_their_share_of_the_update():
    """A thousand components after Adam's first step, one of which went the other way."""
    update = np.random.default_rng(0).choice([-1.0, 1.0], 1000)
    other = update * np.where(np.arange(1000) == 7, -1, 1)
    found = comparison.update_difference(update @ update, update @ other, other @ other)
    assert found == pytest.approx(2 / 1000) and np.linalg.norm(update - other) > 0.05 * np.linalg.norm(update)
    assert comparison.update_difference(1.0, 1.01, 1.01**2) == pytest.approx(0.01)
    assert comparison.update_difference(0.0, 0.0, 0.0) == 0 and comparison.update_difference(1.0, 0, 0) == 1


def with_pcgrad(run: Path, order: list[tuple[str, str]]) -> None:
    """Arms of heads by a second optimizer, with the same results, in an order of (arm, optimizer)."""
    edit_settings(run, optimizers=list(dict(pair[::-1] for pair in order)), arms=list(dict(order)))
    for table in (t.ARMS, t.TRAINING, t.RESPONSES, t.SCORES):
        rows = read_table(run / table.path(), table.schema)
        sft, maml = rows[rows["optimizer"] == "sft"], rows[rows["optimizer"] == "maml"]
        parts = [sft[sft["arm"] == arm].assign(optimizer=optimizer) for arm, optimizer in order]
        whole = pd.concat([rows[rows["optimizer"].isna()], *parts, maml])
        write_table(run / table.path(), whole, table.schema)
    for arm in ("full", "bucket4"):
        adapter = run / "04_align" / "adapters" / f"{arm}-pcgrad-21"
        shutil.copytree(adapter.with_name(f"{arm}-sft-21"), adapter)
    reseal(run)


def test_arms_are_matched_by_optimizer_and_in_any_order(neurons_run, scratch, capsys):
    """Matched by arm and seed alone, the second optimizer's rows stood for the first's."""
    first, second = (copied(neurons_run, scratch, name) for name in ("first", "second"))
    pairs = [(arm, optimizer) for optimizer in ("sft", "pcgrad") for arm in ("full", "bucket4")]
    with_pcgrad(first, pairs)
    with_pcgrad(second, pairs[::-1])
    code, lines = lines_of(first, second, capsys)
    assert code == 0 and lines["updates"][1] == "9" and lines["responses, tuned"][-1] == "1"
    for column, table in (("loss", t.TRAINING), ("output", t.RESPONSES)):
        twice = {
            column: lambda rows, name=column: rows[name].where(rows["optimizer"] != "sft", 2 * rows[name])
        }
        edit(second, table, lambda rows, twice=twice: rows.assign(**twice))
    code, lines = lines_of(first, second, capsys)
    assert code == 1 and lines["training losses"][0] == "FAIL"
    assert 0.5 < float(lines["responses, tuned"][-1]) < 0.9


def test_a_difference_that_is_no_near_tie_is_named_with_its_place(neurons_run, changed, capsys):
    table = t.SWEEP_GENERATIONS
    last = len(read_table(changed / table.path(), table.schema)) - 1
    edit(changed, table, cell(last, "token_ids", lambda tokens: np.append(tokens[:2], (tokens[2] + 1) % 900)))
    code, lines = lines_of(neurons_run, changed, capsys)
    example_id = read_table(changed / table.path(), table.schema).at[last, "example_id"]
    place = f"{example_id}, layer 2 head 3 ablated, after 2 tokens"
    assert code == 1 and lines["near-ties"][0] == "FAIL" and place in lines["near-ties"][-1]


@pytest.mark.parametrize("here", [True, False])
def test_a_near_tie_passes_and_is_untraced_without_a_model(neurons_run, changed, here, capsys, monkeypatch):
    """What is no tie here becomes one where the tolerance is wide: then only the equal share may be short."""
    edit(changed, t.SWEEP_CHOICES, every(300, "prediction", partial(add, 1)))
    monkeypatch.setattr(near_ties, "NEAR_TIES", near_ties.NEAR_TIES._replace(full=1e3))
    if not here:
        monkeypatch.setattr(FinishedRun, "model_folder", None)
    code, lines = lines_of(neurons_run, changed, capsys)
    words = "all of them are" if here else "not on this machine"
    assert code == 0 and lines["near-ties"][0] == ("ok" if here else "-") and words in lines["near-ties"][-1]


def test_the_gap_is_infinite_where_one_run_was_cut_short(neurons_run):
    rows = read_table(neurons_run / t.CALIBRATION.path(), t.EXAMPLES).to_dict("records")
    found = near_ties.difference((0, 1), near_ties.example(rows[0]), [5, 6, 7], [5, 6])
    assert found.generated == 2 and found.prompt.prompt_ids[-2:].tolist() == [5, 6] and found.tokens is None
    assert near_ties.gap(None, found, "output") == float("inf"), "there is nothing to compute"


def test_other_rows_are_compared_by_what_does_not_depend_on_them(neurons_run, changed, capsys):
    for table in (t.CALIBRATION, t.ALIGNMENT):
        edit(changed, table, every(1, "prompt_ids", lambda ids: np.append(ids, 5)))
    code, lines = lines_of(neurons_run, changed, capsys)
    assert code == 0
    for name in ("gradients", "predictions", "generations", "neurons' safety", "training losses", "updates"):
        assert lines[name][:2] == ["-", "not compared"]
    assert lines["O"][0] == lines["scores"][0] == "ok"


def test_other_benchmark_rows_are_no_difference_of_the_runs(neurons_run, scratch):
    folder = make_run(scratch / "other", NEURONS.replace(split="development"))
    pair = comparison.Comparison(*(FinishedRun(run, COMPUTED) for run in (neurons_run, folder)))
    rows = {row.quantity: row for row in pair.rows()}
    assert pair.settings() == "split 'benchmark' -> 'development'"
    for quantity in ("responses, base", "responses, tuned", "scores"):
        assert (rows[quantity].ok, rows[quantity].note) == (None, "other benchmark rows")
    assert rows["training losses"].ok and rows["O"].ok


def test_other_folds_are_said(neurons_run, changed, capsys):
    edit_settings(changed, folds=2)
    capsys.readouterr()
    compare.main(neurons_run, changed)
    printed = capsys.readouterr().out
    assert "\nsettings that differ: backend 'torch' -> 'flax', folds 4 -> 2\n" in printed
    assert re.search("gradients +not compared .* other folds", printed)


def test_half_precision_has_tolerances_of_its_own(neurons_run, changed, capsys):
    for stage in COMPUTED[1:]:
        edit_manifest(changed, stage, lambda manifest: manifest["model"].update(dtype="bfloat16"))
    edit(changed, t.HEADS, every(1, "optimization_conflict", partial(add, 1e-3)))
    code, lines = lines_of(neurons_run, changed, capsys)
    assert code == 0 and "largest 0.1" in lines["O"] and lines["H_gen"][0] == "-"


def test_the_command_ends_with_2_on_what_cannot_be_compared(neurons_run, changed):
    none = changed.parent / "none"
    edit_manifest(changed, "02_conflict", lambda manifest: manifest["model"].update(config_sha256="0"))
    expected = {
        none: f"{none} is no run",
        changed: f"{neurons_run} and {changed} are runs of different models",
    }
    for other, message in expected.items():
        command = [sys.executable, "-m", "stages.compare", str(neurons_run), str(other)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1
