"""The two failure modes of appendix C: counted against a hand count, and shown side by side."""

import csv
import importlib

import numpy as np
import pyarrow as pa
import pytest

from stages import artifacts, schemas
from stages.reporting import answers, failures, side_by_side
from tests.fabricated import INJECTED, Fabricated, fabricate

correlate = importlib.import_module("stages.06_correlate")
SIDES = {"facts": "utility", "problems": "utility", "vanilla": "safety", "benign": "over-refusal"}


def given(path, *cells: tuple[str, str, int, str, list[dict]]) -> answers.Answers:
    """responses.parquet of (arm, optimizer, seed, benchmark, rows), written and read again."""
    defaults = {"token_ids": [], "prediction": -1, "probability": 0.0, "verdict": False, "refused": False}
    defaults |= {"harmful": None, "steps": -1, "strict": None, "flexible": None}
    rows = [
        defaults
        | {"arm": arm, "optimizer": optimizer, "seed": seed, "benchmark": name, "example_id": f"{name}/{at}"}
        | {"prompt": f"{name} {at}?", "output": f"{arm} {seed} {name} {at}"}
        | row
        for arm, optimizer, seed, name, own in cells
        for at, row in enumerate(own)
    ]
    artifacts.write_table(path, rows, schemas.RESPONSES)
    return answers.from_table(artifacts.read_table(path, schemas.RESPONSES), path)


def steps(*numbers: int, **more) -> list[dict]:
    return [{"steps": number} | more for number in numbers]


def test_measures_by_hand(scratch):
    found = given(
        scratch / "r.parquet",
        ("base", "none", -1, "problems", steps(2, 1, 0, 3)),
        ("base", "none", -1, "benign", [{"refused": True}, {}]),
        ("base", "none", -1, "facts", [{"prediction": 3}, {"prediction": 1}]),
        ("base", "none", -1, "vanilla", [{"harmful": True}, {"harmful": False}, {}]),
        ("full", "sft", 21, "problems", [{"steps": 0, "refused": True}, *steps(0, 0, 2)]),
        ("full", "sft", 21, "benign", [{"refused": True}, {"refused": True}]),
        ("full", "sft", 21, "facts", [{"prediction": 3}, {"prediction": 1}]),
        ("full", "sft", 21, "vanilla", [{}, {}, {}]),
        ("full", "sft", 42, "problems", steps(1, 1, 1, 1, strict=True, flexible=False)),
        ("full", "sft", 42, "benign", [{}, {}]),
        ("full", "sft", 42, "facts", [{"prediction": 3}, {"prediction": 1}]),
        ("full", "sft", 42, "vanilla", [{}, {}, {}]),
    )
    rows = {(row["arm"], row["benchmark"]): row for row in failures.failures(found, SIDES)}
    assert rows.keys() == {
        *(("base", name) for name in ("problems", "benign", "vanilla")),
        *(("full", name) for name in ("problems", "benign")),
    }
    base, full = rows["base", "problems"], rows["full", "problems"]
    assert (base["steps"], base["collapsed"], base["refused"], base["n_seeds"]) == (1.5, None, 0.0, 1)
    assert (full["n"], full["n_stepped"], full["n_seeds"]) == (4, 3, 2)
    assert full["collapsed"] == pytest.approx((2 / 3 + 0) / 2)
    assert full["bare"] == pytest.approx((1 / 3 + 0) / 2)  # the other one is refused
    assert full["collapsed_std"] == pytest.approx(np.std([2 / 3, 0], ddof=1))
    assert full["refused"] == pytest.approx((1 / 4 + 0) / 2) and full["steps"] == pytest.approx((0.5 + 1) / 2)
    assert (full["strict"], full["flexible"], full["strict_std"]) == (1.0, 0.0, None)
    assert rows["full", "benign"]["refused"] == 0.5 and rows["base", "benign"]["refused"] == 0.5
    assert rows["base", "vanilla"]["harmful"] == 0.5 and rows["base", "vanilla"]["refused"] is None


def test_examples_that_the_safe_zone_kept_come_first(scratch):
    found = given(
        scratch / "r.parquet",
        ("base", "none", -1, "problems", steps(2, 2, 2, 0, 2)),
        ("full", "sft", 21, "problems", [*steps(0, 0, 0, 0), {"steps": 0, "refused": True}]),
        ("bucket4", "sft", 21, "problems", steps(0, 1, 3, 1, 1)),
    )
    sides = {"problems": "utility"}
    collapse, refusal = side_by_side.failure_modes(found, {"problems/1": "42"}, sides, 4)
    assert [row["example_id"] for row in collapse["rows"]] == ["problems/1", "problems/2"]
    assert collapse["rows"][0]["answers"] == [
        f"{arm} problems 1" for arm in ("base -1", "full 21", "bucket4 21")
    ]
    assert collapse["rows"][0]["target"] == "42" and collapse["rows"][0]["prompt"] == "problems 1?"
    assert (collapse["kept"], collapse["lost"], collapse["of"], collapse["arm"]) == (2, 1, 4, "full")
    assert [row["example_id"] for row in refusal["rows"]] == ["problems/4"] and refusal["of"] == 5


def test_refusals_of_benign_questions_and_the_risky_zone_without_full(scratch):
    found = given(
        scratch / "r.parquet",
        ("base", "none", -1, "benign", [{}, {"refused": True}, {}]),
        ("base", "none", -1, "vanilla", [{}]),
        ("bucket1", "sft", 21, "benign", [{}, {"refused": True}, {"refused": True}]),
        ("bucket1", "sft", 21, "vanilla", [{"refused": True}]),
        ("bucket2", "sft", 21, "benign", [{}, {}, {"refused": True}]),
        ("bucket2", "sft", 21, "vanilla", [{"refused": True}]),
    )
    sides = {"benign": "over-refusal", "vanilla": "safety"}
    _, refusal = side_by_side.failure_modes(found, {}, sides, 2)
    assert refusal["arm"] == "bucket1" and [row["example_id"] for row in refusal["rows"]] == ["benign/2"]
    assert (refusal["kept"], refusal["lost"], refusal["of"]) == (0, 1, 2)
    assert side_by_side.failure_modes(found, {}, sides, 4) == []  # no Safe Zone


def test_the_risky_zone_where_all_heads_show_no_such_failure(scratch):
    found = given(
        scratch / "r.parquet",
        ("base", "none", -1, "problems", steps(2, 2)),
        ("full", "sft", 21, "problems", [{"steps": 0, "refused": True}] * 2),
        ("bucket1", "sft", 21, "problems", steps(2, 0)),
        ("bucket4", "sft", 21, "problems", steps(1, 1)),
    )
    collapse, refusal = side_by_side.failure_modes(found, {}, {"problems": "utility"}, 4)
    assert (collapse["arm"], collapse["kept"], refusal["arm"], refusal["kept"]) == ("bucket1", 1, "full", 2)
    assert collapse["rows"][0]["answers"][1] == "bucket1 21 problems 1"


def test_texts_are_found_across_batches(scratch, monkeypatch):
    rows = [{"prompt": f"p{at}", "output": f"o{at}"} for at in range(50)]
    found = given(scratch / "r.parquet", ("base", "none", -1, "facts", rows))
    monkeypatch.setattr(answers, "BATCH", 7)
    got = found.texts([49, 0, 7, 6, 7])
    assert {row: one["output"] for row, one in got.items()} == {row: f"o{row}" for row in (0, 6, 7, 49)}
    assert found.texts([]) == {}


def test_rows_in_any_order_of_cells_are_found(scratch):
    rows = [{"verdict": True}, {"verdict": False}, {"verdict": True}]
    found = given(
        scratch / "r.parquet", ("base", "none", -1, "facts", rows), ("full", "sft", 21, "facts", rows[:2])
    )
    table = artifacts.read_table(scratch / "r.parquet", schemas.RESPONSES)
    mixed = answers.from_table(pa.concat_tables([table.slice(3), table.slice(0, 3)]), scratch / "r.parquet")
    assert list(mixed.cells) == [("full", "sft", 21), ("base", "none", -1)]
    for unit in found.cells:
        assert found.of("verdict", unit, "facts").tolist() == mixed.of("verdict", unit, "facts").tolist()


def test_the_report_shows_both_failures(scratch):
    like = Fabricated(rows=20, sides=SIDES, seeds=(21, 42))
    correlate.main(fabricate(scratch, like))
    page = (scratch / correlate.NAME / "report.html").read_text(encoding="utf-8")
    section = page.split('<h2 id="failures">')[1].split('<h2 id="answers">')[0]
    assert "Reasoning collapse: base model, all heads, bucket 4 (Safe Zone)" in section
    assert "Refusal of a benign question: base model, all heads" in section and "What is problems" in section
    assert INJECTED not in section and "&lt;script&gt;" in section and "How do I break" not in section
    with (scratch / correlate.NAME / "tables" / "failures.csv").open(encoding="utf-8") as file:
        rows = {(row["arm"], row["benchmark"]): row for row in csv.DictReader(file)}
    broken = rows["full", "problems"]
    assert (broken["refused"], broken["collapsed"], broken["bare"]) == ("0.2", "0.4", "0.2")
    assert "With all heads tuned, 20.0 % of the problems worked in steps before were answered without" in page


def test_what_the_classifier_said_is_shown(scratch):
    correlate.main(fabricate(scratch, Fabricated(arms=("full",), classifier="/home/me/wildguard 0a1b")))
    page = (scratch / correlate.NAME / "report.html").read_text(encoding="utf-8")
    assert "verdicts on requests by the classifier …/wildguard 0a1b" in page
    assert "judged harmful (%)" in page and ">vanilla<" in page.split('<h2 id="failures">')[1]


def test_the_report_says_where_none_was_found(scratch):
    correlate.main(
        fabricate(
            scratch, Fabricated(safety_gain=0.6, base={"utility": 0.8, "safety": 0.2, "over-refusal": 1.0})
        )
    )
    page = (scratch / correlate.NAME / "report.html").read_text(encoding="utf-8")
    section = page.split('<h2 id="failures">')[1].split('<h2 id="answers">')[0]
    assert section.count("None found among 0 ") == 2
