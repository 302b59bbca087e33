"""A run's files: atomic writes, parts, manifests, and the rule when a stage is skipped.

A run is one folder, a stage one folder in it. A stage's tables are parquet under the schemas below;
`manifest.json` is written last, so its existence says that the stage is complete, and it names the sha256
of all that was read and written. Long stages write one part a unit under `parts/`; whatever was finished
when a process died is kept.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from backends.errors import InputError
from backends.files import sha256, write_atomic, write_json
from stages import schemas
from stages.locks import Shard, run_lock
from stages.provenance import git_state, package_versions, peak_memory_bytes

MANIFEST = "manifest.json"
STARTED = "started.json"
PLAN = ".units.json"


# Files


def write_table(path: Path, rows: Sequence[dict] | pa.Table, schema: pa.Schema) -> None:
    """Writes rows under `schema`; a row with a missing or wrongly typed field is an error here, not at the
    reader."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=schema)
    write_atomic(path, lambda temporary: pq.write_table(table.cast(schema), temporary, compression="zstd"))


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads a table and checks its schema. InputError names the file if it is damaged or of another kind."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): make its stage again"
        ) from None
    if not table.schema.equals(schema) or table.schema.metadata[b"schema"] != schema.metadata[b"schema"]:
        raise InputError(f"{path} has not the columns of {schema.metadata[b'schema'].decode()}")
    return table


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): make its stage again") from None


def files_below(folder: Path) -> list[Path]:
    """All finished files of a stage folder but the manifest, sorted; temporary files and parts are not
    finished."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and relative.parts[0] not in (MANIFEST, STARTED, "parts"):
            found.append(path)
    return found


# A stage


def planned(folder: Path) -> tuple[list[str], set[str]]:
    """The units of a stage that is being made, in order, and which of them are finished; both empty before
    the first process has said what they are."""
    path = folder / "parts" / PLAN
    units = read_json(path) if path.is_file() else []
    return units, {unit for unit in units if (folder / "parts" / f"{unit}.parquet").is_file()}


def stage_manifest(run: Path, name: str) -> dict:
    """The manifest of a finished stage. InputError says which command makes it."""
    path = run / name / MANIFEST
    if not path.is_file():
        raise InputError(f"{path} is missing: run `python -m stages.{name} --run {run}` first")
    return read_json(path)


def read_input(run: Path, relative: str, schema: pa.Schema) -> pa.Table:
    """A table of a finished stage, checked against that stage's manifest."""
    name, file = relative.split("/", 1)
    outputs = stage_manifest(run, name)["outputs"]
    path = run / relative
    if not path.is_file():
        raise InputError(
            f"{path} is missing, though its manifest lists it: delete {run / name}, run it again"
        )
    if sha256(path) != outputs.get(file):
        raise InputError(f"{path} is not what its manifest says (sha256): delete {run / name}, run it again")
    return read_table(path, schema)


def _differences(old: dict, new: dict) -> str:
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


class Stage:
    """One stage's folder while it is made. Use `open_stage`; see `main` of any stage for the order of
    calls."""

    def __init__(
        self, run: Path, name: str, settings: dict, inputs: dict[str, str], shard: Shard | None = None
    ):
        self.run, self.name, self.folder = run, name, run / name
        self.settings, self.inputs, self.shard = settings, inputs, shard
        self.model: dict = {}
        self.notes: dict = {}
        self.units: dict[str, dict] = {}
        self.planned: list[str] = []
        self.started_at = time.monotonic()
        self.outdated = ""
        """what a finished stage notes otherwise than it would now"""
        self.finished = self._matches()
        if self.finished:
            self._tidy()

    def _head(self) -> dict:
        return {"settings": self.settings, "inputs": self.inputs}

    def _matches(self) -> bool:
        """True: complete and unchanged. InputError: made by other settings, from other inputs, or damaged."""
        done, begun = self.folder / MANIFEST, self.folder / STARTED
        if not done.is_file() and not begun.is_file():
            return False
        old = read_json(done if done.is_file() else begun)
        again = f"delete {self.folder} to make it again, or choose another --run"
        if changed := _differences(old["settings"], self.settings):
            raise InputError(f"{self.folder} was made with other settings ({changed}): {again}")
        if changed := [path for path in self.inputs if old["inputs"].get(path) != self.inputs[path]]:
            raise InputError(f"{self.folder} was made from another {' and '.join(changed)}: {again}")
        if not done.is_file():
            self.model = old["model"]  # what the parts were computed by; `begin` compares
            return False
        for relative, digest in old["outputs"].items():
            path = self.folder / relative
            if not path.is_file():
                raise InputError(f"{path} is missing, though the manifest lists it: {again}")
            if sha256(path) != digest:
                raise InputError(f"{path} is not what its manifest says (sha256): {again}")
        return True

    def reopen(self, parts: Iterable[tuple[str, pa.Table]], schema: pa.Schema, file: str) -> None:
        """Makes a finished stage an unfinished one whose units are all computed, from its own table `file`.

        For a step after the units that is to be done again. Killed at any moment, either the stage is still
        finished or all its parts are there.
        """
        done = read_json(self.folder / MANIFEST)
        self.model = done["model"]
        write_json(self.folder / STARTED, {**self._head(), "model": self.model})
        for unit, table in parts:
            self.write_part(unit, table, schema, **done["units"].get(unit, {}))
        for name in (MANIFEST, file):
            (self.folder / name).unlink()
        self.finished = False

    def begin(self, model: dict | None = None) -> None:
        """Marks the folder as this run's. `model` says what was loaded, as resolved (dtype, device,
        weights)."""
        self.model = model or {}
        started = self.folder / STARTED
        if started.is_file():
            old = read_json(started)["model"]
            if changed := _differences(old, self.model):
                raise InputError(
                    f"the parts in {self.folder} were computed otherwise ({changed}): pass the old "
                    f"value, or delete it"
                )
        write_json(started, {**self._head(), "model": self.model})

    def _tidy(self) -> None:
        """Drops what a finished stage no longer needs, and what a killed process left half written."""
        (self.folder / STARTED).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        for left_over in sorted(self.folder.rglob(".*.tmp")):
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                left_over.unlink(missing_ok=True)

    # Parts: one finished unit each

    def part(self, unit: str) -> Path:
        return self.folder / "parts" / f"{unit}.parquet"

    def _made_from(self, unit: str) -> bytes:
        """What a unit's rows follow from, as a digest that its part carries."""
        origin = {"stage": self.name, "unit": unit, **self._head(), "model": self.model}
        return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest().encode()

    def has_part(self, unit: str) -> bool:
        """Whether a unit is finished. InputError if what is there is damaged or was made from something
        else."""
        path = self.part(unit)
        if not path.is_file():
            return False
        try:
            origin = pq.read_schema(path).metadata[b"made_from"]
        except (OSError, pa.ArrowException, KeyError, TypeError):
            raise InputError(f"{path} is damaged: delete it, and its unit is computed again") from None
        if origin != self._made_from(unit):
            raise InputError(f"{path} was made from something else: delete it, or choose another --run")
        return True

    def plan(self, units: Sequence[str]) -> None:
        """Says which units the stage has, here and to whoever shares them out or watches (`planned`).

        Raises InputError where the shard names one that there is not.
        """
        self.planned = list(units)
        if isinstance(self.shard, frozenset) and (unknown := sorted(self.shard - set(units))):
            raise InputError(f"--shard: {self.name} has no unit {unknown[0]}; it has {', '.join(units)}")
        write_json(self.folder / "parts" / PLAN, self.planned)

    def left(self, units: Sequence[str]) -> list[str]:
        """Of a stage's units, those that this process is to compute."""
        if isinstance(self.shard, tuple):
            number, count = self.shard
            units = units[number - 1 :: count]
        elif self.shard is not None:
            units = [unit for unit in units if unit in self.shard]
        return [unit for unit in units if not self.has_part(unit)]

    def gathers(self) -> bool:
        """False in a shard, which says what is still to do and leaves the joining to a whole run."""
        if self.shard is None:
            return True
        done = sum(self.has_part(unit) for unit in self.planned)
        told = f"{self.shard[0]}/{self.shard[1]}" if isinstance(self.shard, tuple) else "of named units"
        self.say(
            f"shard {told} is done; {done} of {len(self.planned)} units of the stage are. "
            f"When all are, `python -m stages.{self.name} --run {self.run}` joins them"
        )
        return False

    def write_part(
        self, unit: str, rows: Sequence[dict] | pa.Table, schema: pa.Schema, **times: float
    ) -> None:
        """Keeps a unit's rows; `times` (seconds, tokens a second) go to the manifest, never into a table."""
        write_json(self.folder / "parts" / f"{unit}.json", times)
        bound = schema.with_metadata({**schema.metadata, b"made_from": self._made_from(unit)})
        write_table(self.part(unit), rows, bound)

    def read_parts(self, units: Iterable[str], schema: pa.Schema) -> pa.Table:
        """The parts in order of `units` as one table. InputError names a unit that is missing."""
        tables = []
        for unit in units:
            if not self.has_part(unit):
                raise InputError(f"unit {unit} of {self.folder} is missing: run the stage again")
            tables.append(read_table(self.part(unit), schema).replace_schema_metadata(schema.metadata))
            self.units[unit] = read_json(self.folder / "parts" / f"{unit}.json")
        return pa.concat_tables(tables)

    def gather(self, file: str, units: Iterable[str], schema: pa.Schema) -> pa.Table:
        """`read_parts`, written as the stage's table."""
        table = self.read_parts(units, schema)
        write_table(self.folder / file, table, schema)
        return table

    def write(self, file: str, rows: Sequence[dict] | pa.Table, schema: pa.Schema) -> None:
        write_table(self.folder / file, rows, schema)

    def warn(self, message: str) -> None:
        """A warning that the log, the manifest and the report all show."""
        self.notes.setdefault("warnings", []).append(message)
        print(f"[{self.name}] warning: {message}", flush=True)

    def say(self, message: str) -> None:
        print(f"[{self.name}] {message}", flush=True)

    def finish(self, **notes: object) -> None:
        """Writes the manifest, then drops the parts that the tables now hold."""
        self.notes |= notes
        wall = time.monotonic() - self.started_at
        manifest = {
            "schema": schemas.SCHEMA_VERSION,
            "stage": self.name,
            **self._head(),
            "model": self.model,
            "outputs": {
                str(path.relative_to(self.folder)): sha256(path) for path in files_below(self.folder)
            },
            "notes": self.notes,
            "units": self.units,
            "versions": package_versions(),
            "git": git_state(),
            "wall_seconds": round(wall, 2),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(self.folder / MANIFEST, manifest)
        self._tidy()
        self.say(f"done in {wall:.0f} s, peak memory {peak_memory_bytes() / 2**30:.1f} GiB -> {self.folder}")


@contextmanager
def open_stage(
    run: Path,
    name: str,
    settings: dict,
    reads: Sequence[str] = (),
    needed_gib: float = 0.1,
    shard: Shard | None = None,
    noted: dict | None = None,
):
    """Locks the run folder, checks the inputs' chain and the disk, and yields a `Stage`.

    Args:
        settings: the resolved settings that this stage's result depends on.
        reads: inputs as "<stage>/<file>"; their sha256 must be what their own manifests say.
        needed_gib: free space that the stage wants on the disk of `run`.
        shard: compute only this share of the stage's units.
        noted: what a finished stage's manifest has to note; where it notes something else the stage is
            yielded finished, and `outdated`.
    """
    inputs = {}
    for relative in reads:
        producer, file = relative.split("/", 1)
        outputs = stage_manifest(run, producer)["outputs"]
        if file not in outputs:
            raise InputError(
                f"{run / producer / MANIFEST} does not list {file}: delete {run / producer}, run it again"
            )
        inputs[relative] = outputs[file]
    with run_lock(run, shard):
        free = shutil.disk_usage(run).free / 2**30
        if free < needed_gib:
            raise InputError(
                f"{run} has {free:.2f} GiB free, stage {name} wants {needed_gib:.2f}: make space"
            )
        stage = Stage(run, name, settings, inputs, shard)
        if stage.finished and noted:
            told = read_json(stage.folder / MANIFEST)["notes"]
            stage.outdated = _differences({key: told.get(key) for key in noted}, noted)
        if stage.finished and not stage.outdated:
            stage.say("is done and unchanged: skipped")
        yield stage
