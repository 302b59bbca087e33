"""A user's own rows: what is read, and one clear line for whatever is wrong with them."""

import json
import re

import pytest

from backends.core.errors import InputError
from data import jsonl
from data.records import DATA_TYPES, entry_of

UTIL = {"prompt": "What is 2 + 2?", "target": " 4"}
ALIGN = {"prompt": "Look at this", "target": "No.", "data_type": "vanilla_harmful"}


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
    path.write_text("\n".join(re.findall(r"^    (\{.*\})$", jsonl.__doc__, flags=re.MULTILINE)))
    (util,) = jsonl.read(path, "util")
    (safe,) = jsonl.read(str(path), "safe")
    assert (util.example_id, util.split, util.source) == ("mine/1", "util", "mine.jsonl")
    assert (util.prefix, util.target, util.scoring) == ("2 + 2 =", " 4", "number")
    assert (safe.example_id, safe.split, safe.scoring) == ("mine/2", "safe", "refusal")
    assert util.entry != safe.entry


def test_optional_columns_have_defaults_and_null_counts_as_absent(write):
    (record,) = jsonl.read(write(UTIL), "util")
    assert (record.prefix, record.choices, record.answer, record.scoring) == ("", (), None, "choice")
    assert record.entry == entry_of("what is 2  2")
    row = UTIL | {"choices": ["3", "4"], "answer": 1, "prefix": None, "more": [1], "id": "a", "entry": "2+2"}
    (record,) = jsonl.read(write(row), "util")
    assert (record.choices, record.answer) == (("3", "4"), 1)
    assert (record.example_id, record.entry, record.prefix) == ("a", "2+2", "")
    records = jsonl.read(write(*(ALIGN | {"data_type": kind} for kind in DATA_TYPES)), "align")
    assert [record.split for record in records] == list(DATA_TYPES)
    assert [record.scoring for record in records] == 2 * ["refusal"] + 2 * ["over_refusal"]


def test_one_file_serves_several_roles(write):
    path = write(UTIL | {"role": "util"}, UTIL, ALIGN | {"role": "align"}, UTIL | {"role": "safe"})
    assert [record.example_id for record in jsonl.read(path, "util")] == ["rows/1", "rows/2"]
    assert [record.example_id for record in jsonl.read(path, "safe")] == ["rows/2", "rows/4"]


def test_blank_lines_bom_and_windows_line_ends(write):
    line = json.dumps(UTIL).encode() + b"\r"
    records = jsonl.read(write(b"\xef\xbb\xbf" + line, b"  \r", line), "util")
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
        jsonl.read(write(good, b"", line), role)
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
            jsonl.read(path, role)
