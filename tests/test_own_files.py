"""A user's files: every format gives the same rows, and a bad file is one clear line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backends.core.errors import InputError
from data import own_rows
from tests.test_own_rows import END, HI, MORE, SHARED, SYSTEM, TWO, UTIL, YO


def as_csv(path, rows, delimiter=","):
    header = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column, "") for column in header] for row in rows]
    quoted = [[json.dumps(cell) if not isinstance(cell, str) else cell for cell in line] for line in cells]
    lines = [
        delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [header, *quoted]
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())


FORMATS = {
    "a.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "b.json": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "a.csv": as_csv,
    "a.tsv": lambda path, rows: as_csv(path, rows, "\t"),
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "A.PARQUET": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}
KINDS = {
    "messages": [{"messages": TWO}, {"messages": [SYSTEM, *TWO[:2]]}],
    "conversations": [{"conversations": SHARED}],
    "completions": [
        {"prompt": HI, "completion": 'Two\nlines, "quoted", and é.'},
        {"prompt": MORE, "completion": END},
    ],
    "alpaca": [
        {"instruction": HI, "input": "", "output": YO},
        {"instruction": MORE, "input": "Now.", "output": END},
    ],
    "choices": [UTIL | {"choices": ["3", "4"], "answer": 1}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name, kind):
    role = "util" if kind == "choices" else "safe"
    FORMATS["a.jsonl"](tmp_path / "rows.jsonl", KINDS[kind])
    FORMATS[name](tmp_path / name, KINDS[kind])
    expected, found = (own_rows.read(tmp_path / file, role)[0] for file in ("rows.jsonl", name))
    texts = [(row.earlier, row.prompt, row.target, row.choices, row.answer, row.entry) for row in expected]
    assert [
        (row.earlier, row.prompt, row.target, row.choices, row.answer, row.entry) for row in found
    ] == texts


WRONG_FILES = [
    ("a.csv", b"prompt,target\na,b\nc\n", "a.csv, line 3: 1 cells, the header names 2"),
    ("a.csv", b'prompt,target\n"a\nb",c\nd,e,f\n', "a.csv, line 4: 3 cells, the header names 2"),
    ("a.csv", b"prompt,prompt,target\n", "a.csv, line 1: the header names a column twice"),
    ("a.csv", b'prompt,target\n"a,b\n', "a.csv, line 2: not a row of a table .unexpected end of data"),
    ("a.csv", b"prompt,target\na,\xff\n", "a.csv, line 2: not UTF-8"),
    (
        "a.csv",
        b"prompt;target\na;b\n",
        "a.csv, line 2: there is prompt;target, and none of prompt and target",
    ),
    ("a.csv", b"messages\nhello\n", r"a.csv, line 2: column 'messages': not JSON .Expecting value"),
    ("a.csv", b"prompt,target\n", "a.csv: no rows for role 'safe'"),
    ("a.csv", b"", "a.csv: no rows for role 'safe'"),
    ("a.csv", b"prompt,target\na,\n", "a.csv, line 2: column 'target' is missing"),
    (
        "a.csv",
        b"instruction,output\na,\n",
        "a.csv: no rows for role 'safe' .1 with an empty text are left out",
    ),
    ("a.json", b'[{"prompt": "a", "target": "b"}, 3]', "a.json, row 2: not a JSON object"),
    ("a.json", b"[{", "a.json: not JSON .Expecting property name"),
    ("a.json", b'{"data": [1]}', "a.json, line 1: there is data, and none of prompt and target"),
    ("a.parquet", b"prompt", "a.parquet: not a readable parquet file .ArrowInvalid"),
    ("a.xlsx", b"PK", "a.xlsx: rows are read from files that end in .jsonl, .json, .csv, .tsv, .parquet"),
    ("a.jsonl.gz", b"PK", "a.jsonl.gz: rows are read from files that end in"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_FILES, ids=[case[2] for case in WRONG_FILES])
def test_a_bad_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{message}") as caught:
        own_rows.read(tmp_path / name, "safe")
    assert "\n" not in str(caught.value)
