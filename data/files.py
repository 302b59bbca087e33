"""Files of rows as people have them, as dictionaries: `.jsonl`, `.json` (a list, or one object a line),
`.csv`, `.tsv` and `.parquet`; text is UTF-8.

What is null, and an empty cell of a CSV, counts as absent. A CSV's cells are texts, but for the columns of
`STRUCTURED`, which hold JSON. Errors name the file and the line or row, never its text, which may be harmful.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from backends.core.errors import InputError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
STRUCTURED = ("messages", "conversations", "choices", "answer")
"""columns that a CSV holds as JSON"""
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    number: int
    """its line in the file, from 1; of parquet, the hub and a JSON list, its place"""
    kind: str
    """"line" or "row" """
    columns: dict[str, Any]
    """those that hold something"""
    empty: frozenset[str] = frozenset()
    """those that hold nothing"""

    @property
    def place(self) -> str:
        return f"{self.kind} {self.number}"


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, in its order. InputError where it, or a line of it, cannot be read."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        content = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"{path.name}: rows are read from files that end in {', '.join(ENDINGS)}")
    if ending == ".parquet":
        try:
            return of_table(pq.read_table(io.BytesIO(content)))
        except pa.ArrowException as error:
            raise InputError(f"{path.name}: not a readable parquet file ({type(error).__name__})") from error
    if ending in (".csv", ".tsv"):
        return _cells(path.name, content, "," if ending == ".csv" else "\t")
    if ending == ".json" and content.lstrip().startswith(b"["):
        return _items(path.name, content)
    return _lines(path.name, content)


def of_table(table: pa.Table) -> Iterator[Row]:
    """The rows of an Arrow table."""
    number = 0
    for batch in table.to_batches(max_chunksize=1000):  # a large table is not made Python objects at once
        for columns in batch.to_pylist():
            number += 1
            yield _row(number, "row", columns)


def _row(number: int, kind: str, cells: Mapping[str, Any]) -> Row:
    there = {column: value for column, value in cells.items() if value is not None}
    return Row(number, kind, there, frozenset(cells.keys() - there.keys()))


def _json(text: bytes) -> Any:
    """ValueError in one line."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets too deep
        raise ValueError("not JSON that can be read") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _lines(name: str, content: bytes) -> Iterator[Row]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            columns = _object(_json(line))
        except ValueError as error:
            raise InputError(f"{name}, line {number}: {error}") from None
        yield _row(number, "line", columns)


def _items(name: str, content: bytes) -> Iterator[Row]:
    try:
        items = _json(content)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    for number, item in enumerate(items, start=1):
        try:
            columns = _object(item)
        except ValueError as error:
            raise InputError(f"{name}, row {number}: {error}") from None
        yield _row(number, "row", columns)


def _cells(name: str, content: bytes, delimiter: str) -> Iterator[Row]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise InputError(f"{name}, line {number}: not UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, start = None, 1  # a row may have several lines
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{name}, line {start}: not a row of a table ({error})") from None
        if cells is None:
            return
        try:
            if header is None:
                header = _header(cells)
            elif cells:
                yield _row(start, "line", _columns(header, cells))
        except ValueError as error:
            raise InputError(f"{name}, line {start}: {error}") from None
        start = reader.line_num + 1


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError("the header names a column twice")
    return names


def _columns(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells, the header names {len(header)}")
    columns: dict[str, Any] = {column: cell or None for column, cell in zip(header, cells, strict=True)}
    for column in (column for column in STRUCTURED if columns.get(column)):
        try:
            columns[column] = _json(columns[column].encode())
        except ValueError as error:
            raise ValueError(f"column '{column}': {error}") from None
    return columns
