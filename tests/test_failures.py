"""Responses in the report: the two failure modes of appendix C against a hand count, and what is quoted."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backends.core.files import sha256, write_json
from stages.method.arms import BASE_RUN, parse
from stages.report import examples, page, responses
from stages.report.results import Results
from stages.run.schemas import RESPONSES
from stages.run.store import RunFolder, write_table
from tests.fabricated import INJECTED, WORKED_SIDES, Fabricated, correlate, fabricate, report_of

ARMS = {arm.name: arm for arm in parse(["full", "buckets"], 4)} | {"base": BASE_RUN.arm}
REFUSED, CHOICE = {"refused": True}, {"prediction": 3, "refused": None}


def finish(path, table: pa.Table) -> None:
    pq.write_table(table, path)
    write_json(path.with_name("manifest.json"), {"outputs": {path.name: sha256(path)}})


def given(folder, cells: dict[str, dict[str, list]]) -> responses.Responses:
    """responses.parquet, written and read again, of "arm seed" -> benchmark -> rows, each by its number of
    steps or by its columns."""
    rows = []
    for unit, benchmarks in cells.items():
        arm, _, seed = unit.partition(" ")
        labels = dict.fromkeys(RESPONSES.schema.names) | {"arm": arm, "token_ids": []}
        if seed:
            labels |= {"optimizer": "sft", "seed": int(seed)}
        for name, own in benchmarks.items():
            for at, row in enumerate(own):
                row = {"steps": row} if isinstance(row, int) else row
                texts = {"example_id": f"{name}/{at}", "prompt": f"{name} {at}?"}
                texts |= {"output": f"{arm} {name} {at}", "benchmark": name}
                rows.append(labels | {"verdict": False, "refused": False} | texts | row)
    path = folder / RESPONSES.path()
    write_table(path, pd.DataFrame(rows), RESPONSES.schema)
    finish(path, pq.read_table(path))
    return responses.read_responses(RunFolder(folder), ARMS, WORKED_SIDES)


def test_measures_by_hand(scratch):
    fixed = {"facts": [CHOICE] * 2, "vanilla": [{}] * 3}
    judged = {"vanilla": [{"harmful": True}, {"harmful": False}, {}]}
    marked = [{"steps": 1, "strict": True, "flexible": False}] * 4
    cells = {
        "base": {"problems": [2, 1, 0, 3], "benign": [REFUSED, {}]} | fixed | judged,
        "full 21": {"problems": [{"steps": 0} | REFUSED, 0, 0, 2], "benign": [REFUSED] * 2} | fixed,
        "full 42": {"problems": marked, "benign": [{}, {}]} | fixed,
    }
    table = examples.count_failures(given(scratch, cells)).set_index(["arm", "benchmark"])
    measured = {"base": ["problems", "vanilla", "benign"], "full": ["problems", "benign"]}
    assert list(table.index) == [(arm, name) for arm, names in measured.items() for name in names]
    base, full = table.loc["base", "problems"], table.loc["full", "problems"]
    assert (base["steps"], base["refused"], base["n_seeds"]) == (1.5, 0.0, 1) and np.isnan(base["collapsed"])
    assert (full["n"], full["n_stepped"], full["n_seeds"]) == (4, 3, 2)
    wanted = {"collapsed": 1 / 3, "bare": 1 / 6, "refused": 1 / 8, "steps": 0.75}  # a collapse is a refusal
    wanted |= {"collapsed_std": np.sqrt(2) / 3, "strict": 1.0, "flexible": 0.0, "strict_std": np.nan}
    assert full[list(wanted)].to_list() == pytest.approx(list(wanted.values()), nan_ok=True)
    assert table["refused"]["full", "benign"] == 0.5 == table["refused"]["base", "benign"]
    vanilla = table.loc["base", "vanilla"]
    assert vanilla["harmful"] == 0.5 and np.isnan(vanilla["refused"])


STOPS = {"steps": 0} | REFUSED


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        # Rows that the Safe Zone kept come first.
        (
            {
                "base": {"problems": [2, 2, 2, 0, 2]},
                "full 21": {"problems": [0, 0, 0, 0, STOPS]},
                "bucket4 21": {"problems": [0, 1, 3, 1, 1]},
            },
            [("full", ["problems/1", "problems/2"], 2, 3, 4), ("full", ["problems/4"], 1, 1, 5)],
        ),
        # The Risky Zone stands in where all heads show no such failure.
        (
            {
                "base": {"problems": [2, 2], "benign": [{}, REFUSED, {}]},
                "full 21": {"problems": [STOPS, STOPS], "benign": [{}] * 3},
                "bucket1 21": {"problems": [2, 0], "benign": [{}, REFUSED, REFUSED]},
                "bucket4 21": {"problems": [1, 1], "benign": [{}, {}, REFUSED]},
            },
            [("bucket1", ["problems/1"], 1, 1, 2), ("full", ["problems/0", "problems/1"], 2, 2, 4)],
        ),
    ],
)
def test_examples_of_failures(cells, wanted, scratch):
    """Of collapse and refusal: the arm that fails, rows shown, how many the Safe Zone kept, of how many."""
    found = given(scratch, cells)
    runs = dict.fromkeys(replace(run, seed=None) for run in found.of)
    values = dict.fromkeys(field.name for field in fields(Results))
    values["means"] = pd.DataFrame(index=pd.Index(list(runs), dtype=object))
    groups = examples.failure_modes(found, Results(**values | {"m": 4}), {"problems/1": "42"})
    for group, (arm, shown, *counts) in zip(groups, wanted, strict=True):
        assert [group.runs[1].arm.name, group.kept, group.count, group.of] == [arm, *counts]
        assert [row["example_id"] for row in group.rows] == shown
        for row in group.rows:
            place = row["example_id"].replace("/", " ")
            assert row["answers"] == [f"{run.arm.name} {place}" for run in group.runs]
            assert row["prompt"] == f"{place}?" and row["target"] == ("42" if place == "problems 1" else "")
    assert examples.failure_modes(found, Results(**values | {"m": 8}), {}) == []  # no Safe Zone


def test_rows_in_any_order_are_found(scratch, monkeypatch):
    rows = [{"verdict": at % 2 == 0} for at in range(40)]
    given(scratch, {"base": {"benign": rows, "facts": rows}, "full 21": {"facts": rows, "benign": rows}})
    path = scratch / RESPONSES.path()
    table = pq.read_table(path)
    finish(path, pa.concat_tables([table.slice(80), table.slice(0, 80)]))
    monkeypatch.setattr(responses, "BATCH", 7)
    found = responses.read_responses(RunFolder(scratch), ARMS, {"facts": "utility", "benign": "over-refusal"})
    assert list(found.of)[0] == BASE_RUN
    for own in found.of.values():
        assert own["verdict"].to_list() == [True, False] * 40
        assert own["benchmark"].to_list() == ["facts"] * 40 + ["benign"] * 40
    texts = found.texts(found.of[BASE_RUN]["row"][[78, 0, 7, 6, 7]])
    outputs = {text["output"] for text in texts.values()}
    assert outputs == {"base benign 38", "base facts 0", "base facts 6", "base facts 7"}
    assert found.texts([]) == {}


def test_the_report_shows_both_failures(scratch):
    like = Fabricated(rows=20, sides=WORKED_SIDES, classifier="/home/me/wildguard 0a1b")
    text, tables, _ = report_of(scratch, like)
    section = text.split('<h2 id="failures">')[1].split('<h2 id="answers">')[0]
    assert "Reasoning collapse: base model, all heads, bucket 4 (Safe Zone)" in section
    assert "Refusal of a benign question: base model, all heads" in section and "What is problems" in section
    assert INJECTED not in section and "&lt;script&gt;" in section and "How do I break" not in section
    broken = tables["failures"].set_index(["arm", "benchmark"]).loc["full", "problems"]
    assert list(broken[["refused", "collapsed", "bare"]]) == [0.2, 0.4, 0.2]
    assert "With all heads tuned, 20.0 % of the problems worked in steps before were answered without" in text
    assert "verdicts on requests by the classifier …/wildguard 0a1b" in text
    assert "judged harmful (%)" in section and ">vanilla<" in section
    assert "/home/me" not in text


def test_samples_prefer_changed_verdicts_and_say_when_there_are_none(scratch):
    like = Fabricated(settings=dict(arms=("full",), ablations=("top50",)))
    results, found = correlate.compute(correlate.Job(correlate.STAGE, fabricate(scratch, like)))
    groups = examples.samples(found, results, {"facts/0": "answer 0"})
    assert {group.runs[1].arm.name for group in groups} == {"full"}  # of the main arms
    assert groups[0].kind == "safety gained" and "utility lost" in {group.kind for group in groups}
    assert {row["benchmark"] for row in groups[0].rows} == {"adversarial", "vanilla"}
    for group in groups:
        side, before, after = examples.KINDS[group.kind]
        for row in group.rows:
            assert all(len(text) <= examples.LENGTH + 2 for text in row["answers"])
            assert like.sides[row["benchmark"]] == side
            assert [text.startswith("Sorry") for text in row["answers"]] == [before, after]
            assert row["prompt"].endswith(f"{row['example_id'].replace('/', ' ')}?")
    unchanged = {run: own.assign(verdict=0.0) for run, own in found.of.items()}
    groups = examples.samples(replace(found, of=unchanged), results, {})
    assert [(group.side, group.count) for group in groups] == [
        (side, 0) for side in ("utility", "safety", "over-refusal")
    ]


def test_shown_text_is_cut_and_cleaned():
    assert examples.shown_text("a\x00b\u202ec\r\nd ") == "a\ufffdb\ufffdc\nd"
    assert len(examples.shown_text("x" * 1000)) == examples.LENGTH + 2
    assert page.without_folder("/home/me/rows.jsonl") == "…/rows.jsonl"
    assert page.without_folder(["facts=200", "C:\\me\\x"]) == "facts=200 …/x"
