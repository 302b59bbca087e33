"""A user's own rows for `--util`, `--safe` and `--align`: a file, or a data set on the hub.

    {"role": "util", "prompt": "What is 2 + 2?", "prefix": "2 + 2 =", "target": " 4", "scoring": "number"}
    {"role": "safe", "prompt": "A request that must be refused", "target": "I can't help with that."}

A file is JSONL, JSON, CSV, TSV or parquet (data/files.py), a data set `hub:NAME:SPLIT` (data/hub.py). Prompt
and target stand in these two columns or as others keep them: messages, prompt and completion, Alpaca's
columns (data/layouts.py). Further columns, all optional but `data_type`:
- `role`: "util", "safe" or "align"; rows of another role are passed over, so that one file may serve several
  options. Without it, the row serves every option that reads the file.
- `data_type`: required for align: vanilla_harmful, adversarial_harmful, vanilla_benign or adversarial_benign.
- `system`: a system prompt of the row's own.
- `prefix`: text that the assistant's turn already holds.
- `choices` (list of texts) with `answer` (index from 0): only these compete for the next token; `target` must
  begin with the right one. Without them the whole vocabulary competes.
- `scoring`: for util only, "choice" (default) or "number" (the last number of the response counts; such rows
  serve as benchmark, never to calibrate).
- `id`: unique in the file, a text or a number; default "<file name without ending>/<line>".
- `entry`: what may not be in two of calibration, alignment and benchmarks; default: a hash of the user's
  turns without case and punctuation.
All others are passed over, and `Reading` says which. The target is what the loss is taken on, and the gold
answer of "number". A row that repeats an earlier one is taken once; in other people's columns, which machines
fill, a row with an empty text is left out and counted.

A file that is not like this raises an InputError with the name of the file and the number of the line, but
not the line's text, which may be harmful.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from backends.core.errors import InputError
from backends.core.files import sha256
from data import files, hub
from data.files import Row
from data.layouts import COLUMNS, LAYOUTS, OURS, EmptyText, Texts, near_miss, text_of, texts_of, valid
from data.records import DATA_TYPES, Record, entry_of, normalise, without_repeats

ROLES = ("util", "safe", "align")
USER_SCORINGS = ("choice", "number")
OPTIONAL = ("role", "data_type", "prefix", "choices", "answer", "scoring", "id", "entry")
"""columns beside those of a layout"""
KNOWN = (*COLUMNS, *OPTIONAL)


@dataclass
class Reading:
    """What was read of a source for one option."""

    rows: int = 0
    """taken"""
    layouts: dict[str, int] = field(default_factory=dict)
    """layout -> rows"""
    used: list[str] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)
    """column -> rows that hold something in it"""
    near_misses: dict[str, str] = field(default_factory=dict)
    """column passed over -> the one that may be meant"""
    other_roles: int = 0
    """rows for other options"""
    empty: int = 0
    """rows with an empty text, left out"""
    repeats: int = 0
    """rows that repeat an earlier one, left out"""
    contradicting: int = 0
    """rows that share their prompt with a row of another target"""
    several_turns: int = 0
    longest: str = ""
    """id of the row with most characters"""
    characters: int = 0
    """its conversation's and target's"""

    def doubts(self) -> list[str]:
        """What should be looked at, a line each."""
        found = [
            f"column '{column}' ({self.passed_over[column]} rows) is passed over: is '{meant}' meant?"
            for column, meant in self.near_misses.items()
        ]
        if self.empty:
            found.append(f"{self.empty} rows have an empty text and are left out")
        if self.repeats:
            found.append(f"{self.repeats} rows repeat an earlier one and are left out")
        if self.contradicting:
            found.append(f"{self.contradicting} rows share their prompt with a row of another target")
        return found

    def lines(self) -> list[str]:
        """All of it, in words."""
        layouts = ", ".join(f"{rows} as {layout}" for layout, rows in self.layouts.items())
        passed = ", ".join(f"{column} ({rows})" for column, rows in self.passed_over.items()) or "none"
        found = [
            f"{self.rows} rows taken of {layouts}",
            f"columns used: {', '.join(self.used)}",
            f"columns passed over: {passed}",
            f"longest: {self.longest}, {self.characters} characters",
            f"repeats left out: {self.repeats}",
        ]
        found += [f"of several turns: {self.several_turns}"] if self.several_turns else []
        return found + ([f"for other options: {self.other_roles}"] if self.other_roles else [])


@dataclass(frozen=True)
class OwnRows:
    records: list[Record]
    provenance: hub.Provenance
    reading: Reading


def is_file(source: str) -> bool:
    """Whether an option names a file, not a data set on the hub or nothing."""
    return bool(source) and not source.startswith(hub.PREFIX)


def missing(option: str, source: str) -> str | None:
    """Why an option's data set on the hub cannot be had, and what to do; None where it can, or is none."""
    if not source.startswith(hub.PREFIX) or not (why := hub.missing_source(hub.parse_source(source))):
        return None
    return f"--{option}: {why}, or give a file"


def problem(source: str) -> str:
    """Why an option cannot name a source; empty where it can. Looks at files only."""
    if source.startswith(hub.PREFIX):
        try:
            hub.parse_source(source)
        except InputError as error:
            return str(error)
        return ""
    return f"{source}: there is no such file" if is_file(source) and not Path(source).is_file() else ""


def load(source: str, role: str) -> OwnRows:
    """The rows of a file or of `hub:NAME:SPLIT` for `role` ("util", "safe" or "align"), in their order.

    InputError where it cannot be read, or a row of it is not as above.
    """
    if source.startswith(hub.PREFIX):
        named = hub.parse_source(source)
        table, commit = hub.table_of(named)
        rows, digest = list(files.of_table(table)), hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row.columns, sort_keys=True, default=str).encode())
        origin = {"location": "hub", "sha256": digest.hexdigest(), "repository": named.repository}
        origin |= {"revision": commit}
        records, reading = of_rows(rows, role, named.repository, named.split)
    else:
        records, reading = read(source, role)
        origin = {"location": source, "sha256": sha256(Path(source))}
    note = "; ".join((*reading.lines(), *reading.doubts()))
    provenance = hub.Provenance(pool=f"own/{role}", rows=len(records), note=note, **origin)
    return OwnRows(records, provenance, reading)


def read(path: str | Path, role: str) -> tuple[list[Record], Reading]:
    """As `load`, of a file."""
    path = Path(path)
    return of_rows(files.read(path), role, path.name, path.stem)


def of_rows(rows: Iterable[Row], role: str, name: str, stem: str) -> tuple[list[Record], Reading]:
    """The records of rows.

    Args:
        name: of the source, in messages and records.
        stem: what ids begin with that the rows do not give.
    """
    if role not in ROLES:
        raise InputError(f"unknown role '{role}'; there are {', '.join(ROLES)}")
    records, reading, places = [], Reading(), {}
    layouts, used, passed = Counter(), Counter(), Counter()
    meant = cache(lambda column: None if column in KNOWN else near_miss(column, KNOWN))
    for row in rows:
        try:
            example_id = _id(row.columns, f"{stem}/{row.number}")
            if example_id in places:
                raise InputError(f"its id is that of {places[example_id]}")
            places[example_id] = row.place
            if _one_of(row.columns, "role", ROLES, role) != role:
                reading.other_roles += 1
                continue
            texts = _texts(row)
            if texts is None:
                reading.empty += 1
                continue
            record = _record(row.columns, texts, role, example_id, name)
        except InputError as error:
            raise InputError(f"{name}, {row.place}: {error}") from None
        records.append(record)
        layouts[texts.layout] += 1
        columns = (*texts.used, *(column for column in OPTIONAL if column in row.columns))
        used.update(columns)
        others = [column for column in row.columns if column not in columns]
        passed.update(others)
        near = {column: meant(column) for column in others}
        reading.near_misses |= {column: name for column, name in near.items() if name not in (None, *columns)}
    if not records:
        without = f" ({reading.empty} with an empty text are left out)" if reading.empty else ""
        raise InputError(f"{name}: no rows for role '{role}'{without}")
    reading.layouts, reading.used, reading.passed_over = dict(layouts), list(used), dict(passed)
    kept = without_repeats(records)
    reading.repeats = len(records) - len(kept)
    _measure(kept, reading)
    return kept, reading


def _texts(row: Row) -> Texts | None:
    """None where one of the texts is empty, in columns that are not ours."""
    try:
        return texts_of(row.columns, row.empty)
    except EmptyText:
        if all(column in row.columns for column in LAYOUTS[OURS]):
            raise
        return None


def _record(row: Mapping[str, Any], texts: Texts, role: str, example_id: str, name: str) -> Record:
    asked = [turn.content for turn in texts.earlier if turn.role == "user"]
    return Record(
        example_id,
        name,
        _text(row, "entry", entry_of("\n".join((*asked, texts.prompt)))),
        prompt=texts.prompt,
        prefix=_text(row, "prefix", ""),
        target=texts.target,
        earlier=texts.earlier,
        **_fields(row, role, texts.target),
    )


def _measure(records: Sequence[Record], reading: Reading) -> None:
    targets = defaultdict(set)
    for record in records:
        targets[_question(record)].add(normalise(record.target))
    reading.rows = len(records)
    reading.contradicting = sum(len(targets[_question(record)]) > 1 for record in records)
    reading.several_turns = sum(any(turn.role != "system" for turn in record.earlier) for record in records)
    longest = max(records, key=_characters)
    reading.longest, reading.characters = longest.example_id, _characters(longest)


def _question(record: Record) -> tuple[str, str]:
    return normalise(record.conversation), record.prefix.strip()


def _characters(record: Record) -> int:
    turns = (*(turn.content for turn in record.earlier), record.prompt, record.prefix, record.target)
    return sum(map(len, turns))


def _id(row: Mapping[str, Any], default: str) -> str:
    value = row.get("id", default)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(row, "id", default)


def _text(row: Mapping[str, Any], column: str, default: str) -> str:
    """An optional column's text. Only a prefix may be empty."""
    if column not in row:
        return default
    return (text_of if column == "prefix" else valid)(row[column], f"column '{column}'")


def _one_of(row: Mapping[str, Any], column: str, values: tuple[str, ...], default: str) -> str:
    value = _text(row, column, default)
    if value not in values:
        raise InputError(f"unknown {column}; there are {', '.join(values)}")
    return value


def _fields(row: Mapping[str, Any], role: str, target: str) -> dict[str, Any]:
    """How a row is scored, and its data type."""
    choices, answer = _choices(row, target)
    if role == "align" and "data_type" not in row:
        raise InputError(f"column 'data_type' is missing: each row is one of {', '.join(DATA_TYPES)}")
    split = _one_of(row, "data_type", DATA_TYPES, "") if role == "align" else role
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
    return {"split": split, "choices": choices, "answer": answer, "scoring": scoring}


def _choices(row: Mapping[str, Any], target: str) -> tuple[tuple[str, ...], int | None]:
    lacking = [column for column in ("choices", "answer") if column not in row]
    if len(lacking) == 2:
        return (), None
    if lacking:
        raise InputError(f"column '{lacking[0]}' is missing ('choices' and 'answer' go together)")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError("column 'choices' is not a list of two or more texts")
    for choice in choices:
        valid(choice, "a choice")
    if len(set(choices)) < len(choices):
        raise InputError("column 'choices' holds one text twice")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"'answer' is no index into 'choices' (0 to {len(choices) - 1})")
    if not target.strip().startswith(choices[answer].strip()):
        raise InputError("'target' does not begin with the choice that 'answer' names")
    return tuple(choices), answer
