"""The two failure modes of appendix C: counted against a hand count, and shown side by side."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backends.core.files import sha256, write_json
from stages.method.arms import BASE_RUN, ArmRun, parse
from stages.report import examples, failures, responses
from stages.report.results import Results
from stages.run.schemas import RESPONSES
from stages.run.store import RunFolder, write_table
from tests.fabricated import INJECTED, WORKED_SIDES, Fabricated, report_of

ARMS = {arm.name: arm for arm in parse(["full", "buckets"], 4)} | {"base": BASE_RUN.arm}
BASE, FULL = ("base", None, None), ("full", "sft", 21)


def given(folder, *cells: tuple) -> responses.Responses:
    """responses.parquet of (arm, optimizer, seed, benchmark, rows), written and read again."""
    rows = []
    for arm, optimizer, seed, name, own in cells:
        labels = dict.fromkeys(RESPONSES.schema.names) | {"arm": arm, "optimizer": optimizer, "seed": seed}
        labels |= {"benchmark": name, "token_ids": [], "verdict": False, "refused": False}
        for at, row in enumerate(own):
            texts = {"example_id": f"{name}/{at}", "prompt": f"{name} {at}?", "output": f"{arm} {name} {at}"}
            rows.append(labels | texts | row)
    path = folder / RESPONSES.path()
    write_table(path, pd.DataFrame(rows), RESPONSES.schema)
    write_json(path.with_name("manifest.json"), {"outputs": {path.name: sha256(path)}})
    return responses.read_responses(RunFolder(folder), ARMS)


def steps(*numbers: int, **more) -> list[dict]:
    return [{"steps": number} | more for number in numbers]


CHOICES = [{"prediction": 3, "refused": None}, {"prediction": 1, "refused": None}]


def test_measures_by_hand(scratch):
    other = ("full", "sft", 42)
    found = given(
        scratch,
        (*BASE, "problems", steps(2, 1, 0, 3)),
        (*BASE, "benign", [{"refused": True}, {}]),
        (*BASE, "facts", CHOICES),
        (*BASE, "vanilla", [{"harmful": True}, {"harmful": False}, {}]),
        (*FULL, "problems", [{"steps": 0, "refused": True}, *steps(0, 0, 2)]),
        (*FULL, "benign", [{"refused": True}, {"refused": True}]),
        (*FULL, "facts", CHOICES),
        (*FULL, "vanilla", [{}, {}, {}]),
        (*other, "problems", steps(1, 1, 1, 1, strict=True, flexible=False)),
        (*other, "benign", [{}, {}]),
        (*other, "facts", CHOICES),
        (*other, "vanilla", [{}, {}, {}]),
    )
    table = failures.count_failures(found, WORKED_SIDES).set_index(["arm", "benchmark"])
    cells = {"base": ["problems", "vanilla", "benign"], "full": ["problems", "benign"]}
    assert list(table.index) == [(arm, name) for arm, names in cells.items() for name in names]
    base, full = table.loc["base", "problems"], table.loc["full", "problems"]
    assert (base["steps"], base["refused"], base["n_seeds"]) == (1.5, 0.0, 1) and np.isnan(base["collapsed"])
    assert (full["n"], full["n_stepped"], full["n_seeds"]) == (4, 3, 2)
    wanted = {"collapsed": 1 / 3, "bare": 1 / 6, "refused": 1 / 8, "steps": 0.75}  # a collapse is a refusal
    wanted |= {"collapsed_std": np.sqrt(2) / 3, "strict": 1.0, "flexible": 0.0, "strict_std": np.nan}
    assert full[list(wanted)].to_list() == pytest.approx(list(wanted.values()), nan_ok=True)
    assert table["refused"]["full", "benign"] == 0.5 == table["refused"]["base", "benign"]
    vanilla = table.loc["base", "vanilla"]
    assert vanilla["harmful"] == 0.5 and np.isnan(vanilla["refused"])


def modes(found: responses.Responses, sides: dict[str, str], m: int, targets=None) -> list[examples.Group]:
    runs = list(dict.fromkeys(ArmRun(run.arm, run.optimizer, None) for run in found.cells))
    values = dict.fromkeys(field.name for field in fields(Results))
    means = pd.DataFrame(index=pd.Index(runs, dtype=object))
    results = Results(**values | {"m": m, "sides": sides, "means": means})
    return examples.failure_modes(found, results, targets or {})


def shown(group: examples.Group) -> list[str]:
    return [row["example_id"] for row in group.rows]


def test_examples_that_the_safe_zone_kept_come_first(scratch):
    found = given(
        scratch,
        (*BASE, "problems", steps(2, 2, 2, 0, 2)),
        (*FULL, "problems", [*steps(0, 0, 0, 0), {"steps": 0, "refused": True}]),
        ("bucket4", "sft", 21, "problems", steps(0, 1, 3, 1, 1)),
    )
    collapse, refusal = modes(found, {"problems": "utility"}, 4, {"problems/1": "42"})
    assert shown(collapse) == ["problems/1", "problems/2"] and shown(refusal) == ["problems/4"]
    first = collapse.rows[0]
    assert first["answers"] == [f"{arm} problems 1" for arm in ("base", "full", "bucket4")]
    assert (first["target"], first["prompt"]) == ("42", "problems 1?")
    assert (collapse.kept, collapse.count, collapse.of, refusal.of) == (2, 3, 4, 5)
    assert collapse.runs[1].arm.name == "full"


def test_the_risky_zone_where_all_heads_show_no_such_failure(scratch):
    found = given(
        scratch,
        (*BASE, "problems", steps(2, 2)),
        (*BASE, "benign", [{}, {"refused": True}, {}]),
        (*FULL, "problems", [{"steps": 0, "refused": True}] * 2),
        (*FULL, "benign", [{}, {}, {}]),
        ("bucket1", "sft", 21, "problems", steps(2, 0)),
        ("bucket1", "sft", 21, "benign", [{}, {"refused": True}, {"refused": True}]),
        ("bucket4", "sft", 21, "problems", steps(1, 1)),
        ("bucket4", "sft", 21, "benign", [{}, {}, {"refused": True}]),
    )
    collapse, refusal = modes(found, {"problems": "utility", "benign": "over-refusal"}, 4)
    assert (collapse.runs[1].arm.name, collapse.kept) == ("bucket1", 1)
    assert (refusal.runs[1].arm.name, refusal.kept) == ("full", 2)
    assert collapse.rows[0]["answers"][1] == "bucket1 problems 1"
    (_, refusal) = modes(found, {"benign": "over-refusal"}, 4)
    assert (refusal.runs[1].arm.name, shown(refusal)) == ("bucket1", ["benign/2"])
    assert (refusal.kept, refusal.count, refusal.of) == (0, 1, 2)
    assert modes(found, {"benign": "over-refusal"}, 8) == []  # no Safe Zone


def test_rows_in_any_order_of_cells_are_found(scratch, monkeypatch):
    rows = [{"verdict": at % 2 == 0} for at in range(40)]
    found = given(scratch, (*BASE, "facts", rows), (*FULL, "facts", rows[1:]))
    path = scratch / RESPONSES.path()
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(40), table.slice(0, 40)]), path)
    write_json(path.with_name("manifest.json"), {"outputs": {path.name: sha256(path)}})
    monkeypatch.setattr(responses, "BATCH", 7)
    mixed = responses.read_responses(RunFolder(scratch), ARMS)
    assert list(mixed.cells) == list(found.cells)[::-1]
    assert mixed.of("verdict", BASE_RUN, "facts").tolist() == [True, False] * 20
    texts = mixed.texts([78, 0, 7, 6, 7])
    outputs = {0: "full facts 0", 6: "full facts 6", 7: "full facts 7", 78: "base facts 39"}
    assert {row: text["output"] for row, text in texts.items()} == outputs
    assert mixed.texts([]) == {}


def test_the_report_shows_both_failures(scratch):
    like = Fabricated(rows=20, sides=WORKED_SIDES, classifier="/home/me/wildguard 0a1b")
    page, tables, _ = report_of(scratch, like)
    section = page.split('<h2 id="failures">')[1].split('<h2 id="answers">')[0]
    assert "Reasoning collapse: base model, all heads, bucket 4 (Safe Zone)" in section
    assert "Refusal of a benign question: base model, all heads" in section and "What is problems" in section
    assert INJECTED not in section and "&lt;script&gt;" in section and "How do I break" not in section
    broken = tables["failures"].set_index(["arm", "benchmark"]).loc["full", "problems"]
    assert list(broken[["refused", "collapsed", "bare"]]) == [0.2, 0.4, 0.2]
    assert "With all heads tuned, 20.0 % of the problems worked in steps before were answered without" in page
    assert "verdicts on requests by the classifier …/wildguard 0a1b" in page
    assert "judged harmful (%)" in section and ">vanilla<" in section
    assert "/home/me" not in page


def test_the_report_says_where_none_was_found(scratch):
    page, *_ = report_of(scratch, Fabricated(base={"utility": 0.8, "safety": 0.2, "over-refusal": 1.0}))
    assert page.split('<h2 id="failures">')[1].count("None found among 0 ") == 2
