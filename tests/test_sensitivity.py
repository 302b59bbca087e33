"""What S is made of: counted, graded and gradient maps, whole runs; and arms drawn to test them."""

import numpy as np
import pandas as pd
import pytest

from stages import audit
from stages.run.pipeline import STAGES
from stages.run.schemas import (
    ARMS,
    GRADIENTS,
    HEADS,
    RELIABILITY,
    RESPONSES,
    SWEEP_CHOICES,
    SWEEP_GENERATIONS,
    SWEEP_GRADED,
)
from stages.run.store import RunFolder
from tests.runs import TINY, make_run

SMALL = TINY.replace(benchmarks=("facts=6", "words=6", "adversarial=4:4", "benign=4:4"), arms=("full",))


def has(run: RunFolder, table) -> bool:
    return run.path(table).is_file()


def test_a_counted_map_has_the_other_two_beside_it(tiny_run):
    run = RunFolder(tiny_run)
    heads, graded, gradients = run.read(HEADS), run.read(SWEEP_GRADED), run.read(GRADIENTS)
    np.testing.assert_array_equal(heads["h_gen"], heads["h_gen_counted"])
    # By hand, of one head: log p of its rows against the clean model's.
    calibration = pd.read_parquet(tiny_run / "01_calibrate" / "calibration.parquet")
    util = list(calibration["example_id"][calibration["split"] == "util"])
    clean, ablated = (
        graded[rows].set_index("example_id")["graded"][util]
        for rows in (graded["layer"].isna(), (graded["layer"] == 1) & (graded["head"] == 2))
    )
    at = (heads["layer"] == 1) & (heads["head"] == 2)
    assert heads["h_gen_graded"][at].item() == pytest.approx(abs((ablated - clean).mean()), rel=1e-9)
    gates = np.stack(gradients["gate_safe"])
    np.testing.assert_allclose(heads["h_safe_gradient"], np.abs(gates.mean(axis=1)), rtol=1e-12)
    found = run.read(RELIABILITY)
    assert list(found["sensitivity"].unique()) == ["counted", "graded", "gradient"]
    assert len(found) == 18 and found["reliability"].dropna().between(0, 1).all()
    assert run.read(RESPONSES)["graded"].notna().all()


def test_a_graded_map_writes_no_response(scratch):
    run = RunFolder(make_run(scratch / "run", SMALL.replace(sensitivity="graded"), STAGES[:3]))
    heads = run.read(HEADS)
    assert has(run, SWEEP_GRADED) and not has(run, SWEEP_CHOICES) and not has(run, SWEEP_GENERATIONS)
    np.testing.assert_array_equal(heads["h_safe"], heads["h_safe_graded"])
    assert heads["h_gen_counted"].isna().all() and "base" not in run.manifest("03_sensitivity")["notes"]


def test_a_map_of_gradients_needs_no_sweep_and_draws_test_it(scratch, capsys):
    settings = SMALL.replace(sensitivity="gradient", ablations=("draws9",))
    folder = make_run(scratch / "run", settings, STAGES)
    run = RunFolder(folder)
    heads, arms = run.read(HEADS), run.read(ARMS)
    assert not has(run, SWEEP_GRADED) and run.manifest("03_sensitivity")["model"] == {}
    np.testing.assert_array_equal(heads["h_gen"], heads["h_gen_gradient"])
    drawn = arms[arms["kind"] == "draw"]
    assert len(drawn) == 9 == drawn["seed"].nunique() and set(drawn["n_heads"]) == {3}
    table = pd.read_csv(folder / "06_correlate" / "tables" / "drawn_arms.csv")
    assert set(table["predictor"]) == {"C", "O", "S", "depth"} and set(table["n"]) == {9}
    assert set(table["benchmark"]) == {"facts", "words", "utility"}
    page = (folder / "06_correlate" / "report.html").read_text(encoding="utf-8")
    assert "Did the map predict what drawn arms lost?" in page and "Over 9 arms drawn for it" in page
    assert audit.main(folder) == 0, capsys.readouterr().out
