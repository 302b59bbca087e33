"""A user's own rows: one JSON object a line, UTF-8, for `--util`, `--safe` and `--align`.

    {"role": "util", "prompt": "What is 2 + 2?", "prefix": "2 + 2 =", "target": " 4", "scoring": "number"}
    {"role": "safe", "prompt": "A request that must be refused", "target": "I can't help with that."}

Columns (others are ignored, and so are blank lines; an optional column that is null counts as absent):
- `prompt`, `target`: required texts. `target` is what the loss is taken on, and the gold answer of "number".
- `role`: "util", "safe" or "align"; rows of another role are passed over, so that one file may serve several
  options. Without it, the row serves every option that reads the file.
- `data_type`: required for align: vanilla_harmful, adversarial_harmful, vanilla_benign or adversarial_benign.
- `prefix`: text that the assistant's turn already holds.
- `choices` (list of texts) with `answer` (index from 0): only these compete for the next token; `target` must
  begin with the right one. Without them the whole vocabulary competes.
- `scoring`: for util only, "choice" (default) or "number" (the last number of the response counts; such rows
  serve as benchmark, never to calibrate).
- `id`: unique in the file; default "<file name without ending>/<line>".
- `entry`: what may not be in two of calibration, alignment and benchmarks; default: a hash of the prompt
  without case and punctuation.

A file that is not like this raises an InputError with the name of the file and the number of the line, but
not the line's text, which may be harmful.
"""

import json
import re
from pathlib import Path
from typing import Any

from backends.core.errors import InputError
from data.records import DATA_TYPES, Record, entry_of

ROLES = ("util", "safe", "align")
USER_SCORINGS = ("choice", "number")


def read(path: str | Path, role: str) -> list[Record]:
    """The rows of `path` for `role` ("util", "safe" or "align"), in the file's order."""
    path = Path(path)
    if role not in ROLES:
        raise InputError(f"unknown role '{role}'; there are {', '.join(ROLES)}")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error

    records: list[Record] = []
    lines: dict[str, int] = {}  # id -> line
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _columns(line)
            example_id = _text(row, "id", f"{path.stem}/{number}")
            if example_id in lines:
                raise InputError(f"its id is that of line {lines[example_id]}")
            lines[example_id] = number
            if _one_of(row, "role", ROLES, role) == role:
                records.append(Record(example_id, path.name, **_fields(row, role)))
        except InputError as error:
            raise InputError(f"{path.name}, line {number}: {error}") from None
    if not records:
        raise InputError(f"{path.name}: no rows for role '{role}'")
    return records


def _columns(line: bytes) -> dict[str, Any]:
    try:
        columns = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets too deep
        raise InputError("not JSON that can be read") from None
    if not isinstance(columns, dict):
        raise InputError("not a JSON object")
    return {column: value for column, value in columns.items() if value is not None}


def _text(row: dict[str, Any], column: str, default: str | None = None) -> str:
    """A column's text; without a default it is required. Only a prefix may be empty."""
    if column not in row and default is None:
        raise InputError(f"column '{column}' is missing")
    return _valid(row[column], f"column '{column}'", column == "prefix") if column in row else default


def _valid(value: Any, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is not a text")
    if not may_be_empty and not value.strip():
        raise InputError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer or parquet file takes it
        raise InputError(f"{what} holds a broken character") from None
    return value


def _one_of(row: dict[str, Any], column: str, values: tuple[str, ...], default: str | None = None) -> str:
    value = _text(row, column, default)
    if value not in values:
        raise InputError(f"unknown {column}; there are {', '.join(values)}")
    return value


def _fields(row: dict[str, Any], role: str) -> dict[str, Any]:
    prompt, target = _text(row, "prompt"), _text(row, "target")
    choices, answer = _choices(row, target)
    split = _one_of(row, "data_type", DATA_TYPES) if role == "align" else role
    if role == "util":
        scoring = _one_of(row, "scoring", USER_SCORINGS, "choice")
    elif "scoring" in row:
        raise InputError(f"'scoring' is for util rows; {role} rows are judged as refusals")
    else:
        scoring = "over_refusal" if split.endswith("benign") else "refusal"
    if scoring == "number" and choices:
        raise InputError("'choices' and scoring \"number\" exclude each other")
    if scoring == "number" and not re.fullmatch(r"-?\d+(\.\d+)?", target.strip().replace(",", "")):
        raise InputError("'target' is no number, as scoring \"number\" needs")
    return {
        "entry": _text(row, "entry", entry_of(prompt)),
        "split": split,
        "prompt": prompt,
        "prefix": _text(row, "prefix", ""),
        "target": target,
        "choices": choices,
        "answer": answer,
        "scoring": scoring,
    }


def _choices(row: dict[str, Any], target: str) -> tuple[tuple[str, ...], int | None]:
    lacking = [column for column in ("choices", "answer") if column not in row]
    if len(lacking) == 2:
        return (), None
    if lacking:
        raise InputError(f"column '{lacking[0]}' is missing ('choices' and 'answer' go together)")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError("column 'choices' is not a list of two or more texts")
    for choice in choices:
        _valid(choice, "a choice")
    if len(set(choices)) < len(choices):
        raise InputError("column 'choices' holds one text twice")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"'answer' is no index into 'choices' (0 to {len(choices) - 1})")
    if not target.strip().startswith(choices[answer].strip()):
        raise InputError("'target' does not begin with the choice that 'answer' names")
    return tuple(choices), answer
