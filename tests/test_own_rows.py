"""A user's own rows: what is read of them in other people's formats, what is said of it, and one clear line
for whatever is wrong."""

import json
import re

import datasets
import pytest

from backends.core.errors import InputError
from data import own_rows
from data.records import DATA_TYPES, entry_of

UTIL = {"prompt": "What is 2 + 2?", "target": " 4"}
ALIGN = {"prompt": "Look at this", "target": "No.", "data_type": "vanilla_harmful"}


def rows_of(path, role):
    return own_rows.read(path, role)[0]


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        coded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(coded) + b"\n")
        return path

    return write


def test_the_documented_example_is_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(re.findall(r"^    (\{.*\})$", own_rows.__doc__, flags=re.MULTILINE)))
    (util,) = rows_of(path, "util")
    (safe,) = rows_of(str(path), "safe")
    assert (util.example_id, util.split, util.source) == ("mine/1", "util", "mine.jsonl")
    assert (util.prefix, util.target, util.scoring) == ("2 + 2 =", " 4", "number")
    assert (safe.example_id, safe.split, safe.scoring) == ("mine/2", "safe", "refusal")
    assert util.entry != safe.entry


def test_optional_columns_have_defaults_and_null_counts_as_absent(write):
    (record,) = rows_of(write(UTIL), "util")
    assert (record.prefix, record.choices, record.answer, record.scoring) == ("", (), None, "choice")
    assert record.entry == entry_of("what is 2  2")
    row = UTIL | {"choices": ["3", "4"], "answer": 1, "prefix": None, "more": [1], "id": "a", "entry": "2+2"}
    (record,) = rows_of(write(row), "util")
    assert (record.choices, record.answer) == (("3", "4"), 1)
    assert (record.example_id, record.entry, record.prefix) == ("a", "2+2", "")
    records = rows_of(write(*(ALIGN | {"data_type": kind} for kind in DATA_TYPES)), "align")
    assert [record.split for record in records] == list(DATA_TYPES)
    assert [record.scoring for record in records] == 2 * ["refusal"] + 2 * ["over_refusal"]


def test_one_file_serves_several_roles(write):
    asked = [UTIL | {"prompt": f"What is {n} + 2?"} for n in range(3)]
    rows = asked[0] | {"role": "util"}, asked[1], ALIGN | {"role": "align"}, asked[2] | {"role": "safe"}
    path = write(*rows)
    assert [record.example_id for record in rows_of(path, "util")] == ["rows/1", "rows/2"]
    assert [record.example_id for record in rows_of(path, "safe")] == ["rows/2", "rows/4"]


def test_blank_lines_bom_and_windows_line_ends(write):
    first, second = (json.dumps(UTIL | {"target": target}).encode() + b"\r" for target in ("4", "four"))
    records = rows_of(write(b"\xef\xbb\xbf" + first, b"  \r", second), "util")
    assert [record.example_id for record in records] == ["rows/1", "rows/3"]


NUMBER = UTIL | {"scoring": "number"}
CHOICES = UTIL | {"choices": ["3", "4"], "answer": 1}
HALF = b'{"prompt": "\\ud800", "target": "a"}'
WRONG = [
    ("util", b'{"prompt": "\xff", "target": "a"}', "not UTF-8"),
    ("util", b'{"prompt": ', "not JSON \\(Expecting value, column 12\\)"),
    ("util", b'{"answer": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    ("util", b"[" * 100_000, "not JSON that can be read"),
    ("util", ["prompt", "target"], "not a JSON object"),
    ("util", {"target": "a"}, "column 'prompt' is missing"),
    ("safe", {"prompt": "a", "target": None}, "column 'target' is missing"),
    ("util", UTIL | {"prompt": " \n"}, "column 'prompt' is empty"),
    ("util", UTIL | {"prompt": 3}, "column 'prompt' is not a text"),
    ("util", HALF, "column 'prompt' holds a broken character"),
    ("util", UTIL | {"role": "utility"}, "unknown role; there are util, safe, align"),
    ("align", UTIL, "column 'data_type' is missing"),
    ("align", UTIL | {"data_type": "harmful"}, "unknown data_type; there are vanilla_"),
    ("util", UTIL | {"scoring": "exact"}, "unknown scoring; there are choice, number"),
    ("safe", NUMBER, "'scoring' is for util rows"),
    ("util", NUMBER | {"target": "four"}, "'target' is no number"),
    ("util", CHOICES | {"scoring": "number"}, "exclude each other"),
    ("util", UTIL | {"choices": ["3", "4"]}, "column 'answer' is missing"),
    ("util", UTIL | {"answer": 0}, "column 'choices' is missing"),
    ("util", CHOICES | {"choices": "34"}, "not a list of two or more texts"),
    ("util", CHOICES | {"choices": ["", "4"]}, "a choice is empty"),
    ("util", CHOICES | {"choices": ["4", "4"]}, "one text twice"),
    ("util", CHOICES | {"answer": 2}, "'answer' is no index into 'choices' \\(0 to 1\\)"),
    ("util", CHOICES | {"answer": "B"}, "'answer' is no index"),
    ("util", CHOICES | {"answer": True}, "'answer' is no index"),
    ("util", CHOICES | {"answer": 0}, "'target' does not begin with the choice"),
    ("util", UTIL | {"id": "rows/1"}, "its id is that of line 1"),
]


@pytest.mark.parametrize(("role", "line", "message"), WRONG, ids=[case[2] for case in WRONG])
def test_a_bad_row_is_one_line_with_file_and_line_number(write, role, line, message):
    good = ALIGN if role == "align" else UTIL
    with pytest.raises(InputError, match=f"^rows.jsonl, line 3: .*{message}") as caught:
        rows_of(write(good, b"", line), role)
    assert "\n" not in str(caught.value)
    assert "2 + 2" not in str(caught.value)


def test_files_without_rows_that_can_be_read(write, tmp_path):
    for path, role, message in (
        (write(UTIL | {"role": "util"}, name="my.jsonl"), "safe", "^my.jsonl: no rows for role 'safe'$"),
        (write(name="empty.jsonl"), "util", "no rows for role 'util'"),
        (write(UTIL), "utility", "unknown role 'utility'; there are util, safe, align"),
        (tmp_path / "none.jsonl", "util", "none.jsonl: no such file"),
        (tmp_path, "util", r"cannot be read \(IsADirectoryError\)"),
    ):
        with pytest.raises(InputError, match=message):
            rows_of(path, role)


# --- other people's columns ---

HI, YO, MORE, END = "Hi, who are you?", "I am a model.", "Then add 2 and 2.", "4."
ASKED = [{"role": "user", "content": HI}]
ANSWERED = [{"role": "assistant", "content": YO}]
TWO = [*ASKED, *ANSWERED, {"role": "user", "content": MORE}, {"role": "assistant", "content": END}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHARED = [{"from": "human", "value": HI}, {"from": "gpt", "value": YO}]
PARTS = [ASKED[0] | {"content": [{"type": "text", "text": HI}]}, *ANSWERED]
EARLIER = (("user", HI), ("assistant", YO))
LAYOUTS = [
    # what it is, a row, prompt, target, earlier turns, columns used
    ("messages", {"messages": [*ASKED, *ANSWERED]}, HI, YO, (), "messages"),
    ("several turns", {"messages": TWO}, MORE, END, EARLIER, "messages"),
    ("a system turn", {"messages": [SYSTEM, *TWO[:2]]}, HI, YO, (("system", "Be brief."),), "messages"),
    ("parts of text", {"messages": PARTS}, HI, YO, (), "messages"),
    ("messages beside a prompt (UltraChat)", {"prompt": HI, "messages": TWO[:2]}, HI, YO, (), "messages"),
    ("no tool is called", {"messages": [*ASKED, ANSWERED[0] | {"tool_calls": None}]}, HI, YO, (), "messages"),
    ("ShareGPT", {"conversations": SHARED}, HI, YO, (), "conversations"),
    (
        "ShareGPT, system",
        {"conversations": SHARED, "system": "X"},
        HI,
        YO,
        (("system", "X"),),
        "conversations system",
    ),
    ("prompt and completion", {"prompt": HI, "completion": YO}, HI, YO, (), "prompt completion"),
    ("both as turns", {"prompt": ASKED, "completion": ANSWERED}, HI, YO, (), "prompt completion"),
    (
        "several turns before",
        {"prompt": TWO[:3], "completion": TWO[3:]},
        MORE,
        END,
        EARLIER,
        "prompt completion",
    ),
    ("Alpaca", {"instruction": HI, "input": "", "output": YO}, HI, YO, (), "instruction output input"),
    (
        "Alpaca, input",
        {"instruction": HI, "input": "At once.", "output": YO},
        f"{HI}\n\nAt once.",
        YO,
        (),
        "instruction output input",
    ),
    ("ours before others", {"prompt": HI, "target": YO, "completion": "no"}, HI, YO, (), "prompt target"),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=[case[0] for case in LAYOUTS])
def test_other_peoples_columns(write, case):
    _, row, prompt, target, earlier, used = case
    (record,), reading = own_rows.read(write(row | {"source": "x"}), "safe")
    assert (record.prompt, record.target, record.earlier) == (prompt, target, earlier)
    assert set(reading.used) == set(used.split()) and reading.passed_over["source"] == 1
    assert set(reading.passed_over) == {*row, "source"} - set(reading.used)
    assert reading.several_turns == (earlier == EARLIER)


WRONG_LAYOUTS = [
    ({"messages": ASKED}, "the last turn is not the assistant's, which would be the target"),
    ({"messages": [SYSTEM]}, "the last turn is not the assistant's"),
    ({"messages": []}, "column 'messages' is not a list of turns"),
    ({"messages": HI}, "column 'messages' is not a list of turns"),
    ({"messages": [HI, YO]}, "turn 1 of 'messages' is not an object with role and content"),
    ({"messages": ANSWERED + ASKED}, "user and assistant do not take turns, the user first"),
    ({"messages": ASKED + ASKED + ANSWERED}, "user and assistant do not take turns"),
    ({"messages": [*ASKED, SYSTEM, *ANSWERED]}, "user and assistant do not take turns"),
    (
        {"messages": [*ASKED, {"role": "tool", "content": "4"}]},
        "turn 2 of 'messages' is of none of the roles sys",
    ),
    ({"messages": [*ASKED, ANSWERED[0] | {"tool_calls": [1]}]}, "turn 2 of 'messages' calls a tool"),
    (
        {"messages": [ASKED[0] | {"content": [{"type": "image"}]}, *ANSWERED]},
        "turn 1 .* something else than text",
    ),
    ({"messages": [*ASKED, {"role": "assistant"}]}, "turn 2 of 'messages' is not a text"),
    ({"messages": [SYSTEM, *TWO], "system": "x"}, "a column 'system' and a system turn in 'messages'"),
    ({"prompt": ASKED, "completion": YO}, "column 'completion' is not a list of turns"),
    ({"prompt": HI, "completion": ANSWERED}, "column 'completion' is not a text"),
    ({"prompt": HI, "completions": YO}, "column 'completion' is missing: is 'completions' meant for it"),
    ({"message": TWO}, "column 'messages' is missing: is 'message' meant for it"),
    ({"Prompt": HI, "target": YO}, "column 'prompt' is missing: is 'Prompt' meant for it"),
    ({"instruction": HI}, "column 'output' is missing"),
    ({"instruction": HI, "input": 3, "output": YO}, "column 'input' is not a text"),
    ({"question": HI, "answer": YO}, "there is question, answer, and none of prompt and target; messages; "),
    ({}, "there is no column, and none of prompt and target"),
    ({"messages": TWO, "id": 1.5}, "column 'id' is not a text"),
    ({"messages": TWO, "id": True}, "column 'id' is not a text"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_LAYOUTS, ids=[case[1] for case in WRONG_LAYOUTS])
def test_a_bad_conversation_is_one_line(write, row, message):
    with pytest.raises(InputError, match=f"^rows.jsonl, line 2: .*{message}") as caught:
        own_rows.read(write(UTIL, row), "safe")
    assert "\n" not in str(caught.value) and YO not in str(caught.value)


def test_a_number_is_an_id_and_two_rows_may_not_have_the_same(write):
    (record,), _ = own_rows.read(write({"messages": TWO, "id": 7}), "safe")
    assert record.example_id == "7"
    with pytest.raises(InputError, match="line 2: its id is that of line 1"):
        own_rows.read(write(UTIL | {"id": 7}, ALIGN | {"id": "7"}), "safe")


# --- what is said of them ---

READINGS = [
    (
        "a near miss",
        [UTIL | {"choice": ["3", "4"]}, UTIL | {"prompt": "b"}],
        "column 'choice' (1 rows) is passed over: is 'choices' meant?",
    ),
    ("another case", [UTIL | {"Prefix": "a"}], "column 'Prefix' (1 rows) is passed over: is 'prefix' meant?"),
    (
        "in some rows only",
        [UTIL | {"prefix": "a"}, UTIL | {"prefx": "a"}],
        "column 'prefx' (1 rows) is passed over: is 'prefix' meant?",
    ),
    (
        "a repeat",
        [UTIL, UTIL | {"id": "b"}, UTIL | {"note": 1}],
        "2 rows repeat an earlier one and are left out",
    ),
    (
        "a contradiction",
        [UTIL, UTIL | {"target": "5"}, UTIL | {"prompt": "b"}],
        "2 rows share their prompt with a row of another target",
    ),
    (
        "an empty answer",
        [UTIL, {"instruction": HI, "output": " "}],
        "1 rows have an empty text and are left out",
    ),
    ("no answer", [UTIL, {"prompt": HI, "completion": None}], "1 rows have an empty text and are left out"),
    (
        "an empty turn",
        [UTIL, {"messages": [*ASKED, {"role": "assistant", "content": ""}]}, {"messages": None}],
        "2 rows have an empty text and are left out",
    ),
    ("nothing", [UTIL, UTIL | {"prompt": "b", "idx": 1, "prompt_id": "x", "category": "y"}], None),
    (
        "the same word after other turns",
        [{"messages": TWO}, {"messages": [*TWO[:3], ANSWERED[0]]}, {"messages": TWO[2:]}],
        "2 rows share their prompt with a row of another target",
    ),
]


@pytest.mark.parametrize(
    ("rows", "doubt"), [case[1:] for case in READINGS], ids=[case[0] for case in READINGS]
)
def test_what_is_doubtful_is_counted(write, rows, doubt):
    _, reading = own_rows.read(write(*rows), "util")
    assert reading.doubts() == ([doubt] if doubt else [])


def test_the_report_of_what_was_read(write):
    rows = [
        UTIL | {"role": "safe"},
        {"messages": TWO, "source": "x"},
        {"messages": TWO},
        {"instruction": HI, "output": YO},
    ]
    records, reading = own_rows.read(write(*rows), "util")
    assert reading.lines() == [
        "2 rows taken of 2 as messages, 1 as instruction and output",
        "columns used: messages, instruction, output",
        "columns passed over: source (1)",
        "longest: rows/2, 48 characters",
        "repeats left out: 1",
        "of several turns: 1",
        "for other options: 1",
    ]
    assert [record.example_id for record in records] == ["rows/2", "rows/4"]


# --- the hub ---


def test_a_data_set_on_the_hub_is_read_as_its_file_would_be(write, monkeypatch):
    calls = []

    def load_dataset(repository, config, *, split, revision):
        calls.append((repository, config, split, revision))
        return datasets.Dataset.from_list([{"messages": TWO, "n": 1}, {"messages": TWO[:2], "n": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = "a" * 40
    for source, call in {
        "hub:trl-lib/chat:train": ("trl-lib/chat", None, "train", "main"),
        "hub:trl-lib/chat:sft:train[:50]": ("trl-lib/chat", "sft", "train[:50]", "main"),
        f"hub:squad@{commit}:dev": ("squad", None, "dev", commit),
    }.items():
        assert own_rows.problem(source) == ""
        loaded = own_rows.load(source, "safe")
        assert calls.pop() == call and loaded.provenance.repository == call[0]
        assert loaded.provenance.revision == call[-1] and loaded.provenance.location == "hub"
        assert (
            loaded.reading.passed_over == {"n": 2} and "columns passed over: n (2)" in loaded.provenance.note
        )
    plain = own_rows.read(write({"messages": TWO, "n": 1}, {"messages": TWO[:2], "n": 2}), "safe")[0]
    assert [row.prompt for row in loaded.records] == [row.prompt for row in plain]
    assert [row.example_id for row in loaded.records] == ["dev/1", "dev/2"]
    for source in ("hub:", "hub:name", "hub:a/b/c:train", "hub:name:train test"):
        assert own_rows.problem(source).startswith(f"{source}: a data set on the hub is hub:NAME:SPLIT")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"^trl-lib/chat \(default, train\): cannot be loaded from the hub"):
        own_rows.load("hub:trl-lib/chat:train", "safe")
