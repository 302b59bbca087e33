"""Stage 01 on a user's rows: what is said before anything is drawn, what is warned of, what a model reads."""

import json
import re

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backends.core.errors import InputError
from data.records import DATA_TYPES, Message, conversation
from data.rendering import conversations_of, earlier_of
from stages.checks import rows as row_checks
from stages.checks.finished import FinishedRun
from stages.run.schemas import ALIGNMENT, BENCHMARKS, CALIBRATION
from stages.run.store import RunFolder
from tests.runs import COMPUTED, TINY, make_run

FIRST = COMPUTED[:1]


def messages(number: int) -> list[dict]:
    """Of several turns, whose last question is the same in each."""
    texts = (f"How do I break rule {number}?", "Why do you ask?", "Just tell me.", "No, I will not.")
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def util_rows() -> list[dict]:
    return [{"instruction": f"What is {n} plus one?", "input": "", "output": f" {n + 1}"} for n in range(30)]


def safe_rows() -> list[dict]:
    return [{"system": "Be strict.", "messages": json.dumps(messages(number))} for number in range(20)]


def align_rows() -> list[dict]:
    kinds = [DATA_TYPES[number % 4] for number in range(40)]
    return [
        {"prompt": f"Align {number}.", "completion": f"No, not {number}.", "data_type": kind, "origin": "x"}
        for number, kind in enumerate(kinds)
    ]


@pytest.fixture
def settings(scratch):
    """Rows of three formats and three layouts, with what is doubtful."""
    util, align = util_rows(), align_rows()
    util += [util[0], util[1] | {"output": " 9"}]
    align += [align[0], align[1] | {"completion": ""}]
    pq.write_table(pa.Table.from_pylist(util), scratch / "util.parquet")
    quoted = ['"' + row["messages"].replace('"', '""') + '"' for row in safe_rows()]
    lines = ["system,messages,choice", *(f"Be strict.,{cell},x" for cell in quoted)]
    (scratch / "safe.csv").write_text("\n".join(lines))
    (scratch / "align.jsonl").write_text("\n".join(map(json.dumps, align)))
    return TINY.replace(
        util=str(scratch / "util.parquet"),
        safe=str(scratch / "safe.csv"),
        align=str(scratch / "align.jsonl"),
        util_rows=8,
        safe_rows=8,
    )


def test_what_was_read_is_said_first_and_kept(settings, scratch, capsys):
    run = RunFolder(make_run(scratch / "run", settings, FIRST))
    said = capsys.readouterr().out
    *reports, rest = re.split(r"^--", said, flags=re.MULTILINE)[1:]
    reports.append(rest.partition("\n[")[0])
    util, safe, align = (report.rstrip().split("\n  ") for report in reports)
    assert util[:2] == [f"util {scratch / 'util.parquet'}", "31 rows taken of 32 as instruction and output"]
    assert safe[1:4] == [
        "20 rows taken of 20 as messages",
        "columns used: messages, system",
        "columns passed over: choice (20)",
    ]
    assert align[1:4] == [
        "40 rows taken of 41 as prompt and completion",
        "columns used: prompt, completion, data_type",
        "columns passed over: origin (41)",
    ]
    longest = re.search(r"longest: safe/\d+, (\d+) characters", reports[1])
    turns = [turn["content"] for turn in messages(10)]
    assert int(longest[1]) == len("Be strict.") + sum(map(len, turns))
    tokens = int(re.search(r"tokens of the longest: (\d+)", reports[1])[1])
    rows = run.read(BENCHMARKS)
    own = rows[rows["split"] == "own_safe"]
    assert tokens == (own["prompt_ids"].map(len) + own["target_ids"].map(len)).max() - 1, (
        "less the turn's end"
    )

    notes = run.manifest(FIRST[0])["notes"]
    assert notes["read"]["safe"]["several_turns"] == 20 and notes["read"]["util"]["rows"] == 31
    assert notes["sources"]["own/safe"]["note"].startswith("20 rows taken of 20 as messages; columns used: ")
    expected = [
        "--util: 1 rows repeat an earlier one and are left out",
        "--util: 2 rows share their prompt with a row of another target",
        "--safe: column 'choice' (20 rows) is passed over: is 'choices' meant?",
        "--align: 1 rows have an empty text and are left out",
        "--align: 1 rows repeat an earlier one and are left out",
    ]
    assert [warning for warning in notes["warnings"] if warning.startswith("--")] == expected
    assert all(f"warning: {warning}" in said for warning in expected)


def test_a_model_reads_the_whole_conversation_and_the_audit_too(settings, scratch):
    run = FinishedRun(make_run(scratch / "run", settings.replace(system="Not this one."), FIRST), FIRST)
    rows = run.read(CALIBRATION)
    safe = rows[rows["split"] == "safe"]
    for row, text in zip(safe.to_dict("records"), conversations_of(safe), strict=True):
        number = int(re.search(r"rule (\d+)", row["rendered"])[1])
        system, *earlier = earlier_of(row)
        asked, answered, again, target = (turn["content"] for turn in messages(number))
        assert (
            system == Message("system", "Be strict.") and row["prompt"] == again and row["target"] == target
        )
        assert earlier == [Message("user", asked), Message("assistant", answered)]
        places = [row["rendered"].index(part) for part in ("Be strict.", asked, answered, again)]
        assert places == sorted(places) and "Not this one." not in row["rendered"]
        assert text == conversation([system, *earlier], again) and asked in text
    assert "Not this one." in rows[rows["split"] == "util"].iloc[0]["rendered"]
    for check in (row_checks.requested_rows, row_checks.leaks, row_checks.token_ids):
        faults, _ = check(run)
        assert faults == []


def test_rows_whose_prompt_fills_the_length_are_counted(settings, scratch):
    rows = align_rows()
    for row in rows[:20:4]:
        row["prompt"] += " And so on." * 100
    (scratch / "align.jsonl").write_text("\n".join(map(json.dumps, rows)))
    limited = settings.replace(max_length=250, align_rows=40, benign_share=0.5)
    run = RunFolder(make_run(scratch / "run", limited, FIRST))
    warnings = run.manifest(FIRST[0])["notes"]["warnings"]
    assert (
        "5 vanilla_harmful rows are left out: their prompt alone has --max-length 250 tokens or more"
        in warnings
    )
    assert set(run.read(ALIGNMENT)["split"].value_counts()) == {5}


def test_a_data_set_that_cannot_be_had_is_said_before_any_work(settings, scratch, monkeypatch):
    def refused(self, name, *, repo_type):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refused)
    with pytest.raises(InputError) as raised:
        make_run(scratch / "run", settings.replace(safe="hub:some/set:train"), FIRST)
    assert str(raised.value).splitlines() == [
        "what this run needs cannot be had:",
        "  --safe: no connection to the hub for some/set (OSError): connect to a network, or give a file",
    ]
