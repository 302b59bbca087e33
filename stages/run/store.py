"""A run's files: parquet tables, manifests, and what a folder says of its stages.

A run is one folder, a stage one folder in it. `manifest.json` is written last, so its existence says that the
stage is complete; it names the sha256 of all that was read and written. `started.json` says what the parts of
an unfinished stage are made from. Nothing here computes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from backends.core.errors import InputError
from backends.core.files import sha256, write_atomic
from stages.run.schemas import OWN_MAP, Table

MANIFEST = "manifest.json"
STARTED = "started.json"
PARTS = "parts"
RUN_FILE = "run.json"
_AGAIN = "delete its folder and make that again, or choose another --run"


def write_table(path: Path, frame: pd.DataFrame, schema: pa.Schema, **metadata: str) -> None:
    """Writes a frame under `schema`, with more metadata; NaN and None become null.

    ValueError on a missing column, a wrong type, or a null where none may be.
    """
    if missing := [name for name in schema.names if name not in frame]:
        raise ValueError(f"{path.name}: the frame lacks {', '.join(missing)}")
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    for column in schema:
        if not column.nullable and table[column.name].null_count:
            raise ValueError(f"{path.name}: {column.name} is null somewhere")
    extra = {name.encode(): value.encode() for name, value in metadata.items()}
    table = table.replace_schema_metadata({**schema.metadata, **extra})
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads a table, whole or some columns. InputError names a file that is damaged or of another kind.

    A nullable whole number or truth is None where it is null, a nullable float NaN.
    """
    try:
        stored = pq.read_schema(path)
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        message = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({message}): {_AGAIN}") from None
    kind = schema.metadata[b"schema"]
    if not stored.equals(schema) or (stored.metadata or {}).get(b"schema") != kind:
        raise InputError(f"{path} has not the columns of {kind.decode()}")
    return table.to_pandas(integer_object_nulls=True)


def read_json(path: Path) -> dict:
    """InputError names a file that is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): {_AGAIN}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: {_AGAIN}")
    return content


def differences(old: Mapping, new: Mapping) -> str:
    """What differs between two mappings, in words; empty: nothing does."""
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def computed_by(model: Mapping) -> str:
    """What computed a run, in words, from the model of a manifest."""
    packed = f", base weights but W_q in {model['quantize']}" if model.get("quantize") else ""
    return f"{model['backend']}, {model['dtype']} on {model['device']}{packed}"


def stage_files(folder: Path) -> list[str]:
    """Finished files of a stage's folder but its manifest, sorted; temporary files and parts are none."""
    relative = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        str(path)
        for path in relative
        if path.parts[0] not in (MANIFEST, STARTED, PARTS)
        and not any(part.startswith(".") for part in path.parts)
    ]


class RunFolder:
    """A run on disk, as whoever reads it sees it. Tables are read once."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._tables: dict[str, pd.DataFrame] = {}
        self._checked: set[str] = set()

    def is_finished(self, stage: str) -> bool:
        return (self.folder / stage / MANIFEST).is_file()

    def manifest(self, stage: str) -> dict:
        """Of a finished stage. InputError says which command makes it."""
        if not self.is_finished(stage):
            raise InputError(
                f"{self.folder / stage / MANIFEST} is missing: run `python -m stages.{stage} --run "
                f"{self.folder}` first"
            )
        return read_json(self.folder / stage / MANIFEST)

    def has(self, table: Table, map_name: str = OWN_MAP) -> bool:
        """Whether its stage, which is finished, wrote it."""
        return table.file(map_name) in self.manifest(table.stage)["outputs"]

    def path(self, table: Table, map_name: str = OWN_MAP) -> Path:
        return self.folder / table.path(map_name)

    def read(
        self, table: Table, map_name: str = OWN_MAP, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """A table of a finished stage, checked against that stage's manifest; not to be changed.

        InputError names a file that is missing, damaged or not the manifest's.
        """
        relative = table.path(map_name)
        if relative in self._tables:
            whole = self._tables[relative]
            return whole if columns is None else whole[list(columns)]
        self.check(relative)
        frame = read_table(self.folder / relative, table.schema, columns)
        if columns is None:
            self._tables[relative] = frame
        return frame

    def preload(self, table: Table, frame: pd.DataFrame, map_name: str = OWN_MAP) -> None:
        """Gives a table that is not written yet, for a plan of a run that has not begun."""
        self._tables[table.path(map_name)] = frame

    def check(self, relative: str) -> None:
        """InputError unless "<stage>/<file>" is what its stage's manifest says; looked at once."""
        if relative in self._checked:
            return
        stage, file = relative.split("/", 1)
        path, again = self.folder / relative, f"delete {self.folder / stage}, run it again"
        if not path.is_file():
            raise InputError(f"{path} is missing, though its manifest lists it: {again}")
        if sha256(path) != self.manifest(stage)["outputs"].get(file):
            raise InputError(f"{path} is not what its manifest says (sha256): {again}")
        self._checked.add(relative)
