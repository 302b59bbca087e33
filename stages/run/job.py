"""What a stage is, and one stage of one run while it is made: what it rests on, its parts, its manifest."""

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import backends
from backends import models
from backends.base import Backend, Shape
from backends.core.errors import InputError
from backends.core.files import sha256, write_json
from stages.run.locks import parse_shard, units_of_shard
from stages.run.provenance import git_state, package_versions, peak_memory_bytes
from stages.run.schemas import OWN_MAP, SCHEMA_VERSION, Table
from stages.run.settings import OF_ONE_START, OF_RESULTS, ModelSettings, Settings, option
from stages.run.store import (
    MANIFEST,
    PARTS,
    RUN_FILE,
    STARTED,
    RunFolder,
    computed_by,
    differences,
    read_json,
    read_table,
    stage_files,
    write_table,
)

Units = dict[str, Any]
"""name of a unit -> whatever its stage's `compute` needs to know of it, in order"""


@dataclass(frozen=True)
class Stage:
    """A stage, declared once by its numbered script: runner, dry run, engines and audit read it here."""

    name: str
    rests_on: tuple[str, ...]
    """groups of settings that its result depends on"""
    reads: tuple[Table, ...]
    """an optional table is read where its stage wrote it; one of every map, for each map of the run"""
    writes: tuple[Table, ...]
    join: Callable[["Job"], dict]
    """writes the tables, and returns what the manifest is to note"""
    units: Callable[["Job"], Units] = lambda job: {}
    """from settings, inputs and the model's shape; nothing is loaded for it. While the stage is judged again,
    only those of the judging"""
    compute: Callable[["Job", Units], None] = lambda job, pending: None
    """computes those units and keeps each by `job.keep`"""
    also_reads: str = ""
    """a folder all of whose files are inputs too"""
    also_writes: tuple[str, ...] = ()
    """patterns of files beside the tables"""
    also_rests_on: Callable[[Settings], dict] = lambda settings: {}
    """more that its result depends on, as settings are (the content of a user's files)"""
    judged_by: Callable[[Settings], dict] = lambda settings: {}
    """notes of the judge: where a finished stage has others, only `join` is done again, and units that
    belong to them"""
    before: Callable[[Settings], None] = lambda settings: None
    """checks to be made before anything is written"""
    few_rows: bool = False
    """its products are of few rows (stages.run.threads)"""
    needed_gib: float = 0.1
    """free space wanted on the run's disk"""


@lru_cache(maxsize=1)
def _load(
    chosen: ModelSettings, folder: Path, hashes: tuple[str, ...], device: str, model_parallel: int
) -> Backend:
    """Kept for the next stage of a process that makes several, as long as the model has these hashes."""
    return backends.load(
        chosen.backend,
        folder,
        dtype=chosen.dtype,
        device=device,
        model_parallel=model_parallel,
        quantize=chosen.quantize,
    )


class Job:
    """One stage of one run while it is made: what the functions of a stage are given.

    Args:
        run: where inputs are read, and the outputs of a finished stage that is joined again; None: the run's
            own folder.
        write: takes a table, its rows and its map's name; None: they go into the stage's folder.

    Raises InputError where the folder was made by other settings, from other inputs, or is damaged.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        run: RunFolder | None = None,
        write: Callable[[Table, pd.DataFrame, str], object] | None = None,
    ):
        self.stage, self.settings = stage, settings
        self.run = run or RunFolder(settings.folder)
        self.folder = settings.folder / stage.name
        self._write = write or self._write_file
        self.shard = parse_shard(settings.run.shard)
        self.model: dict = {}
        self.notes: dict = {}
        self.info: dict[str, dict] = {}
        """what was noted of each unit that was read: seconds, and the like"""
        done, started = self.folder / MANIFEST, self.folder / STARTED
        unfinished = started.is_file() and not done.is_file()
        self.judging_again = unfinished and read_json(started)["judging_again"]
        """a finished stage's outputs are kept and only judged again"""
        self.began = time.monotonic()

    # What it is made from

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Path within the run -> sha256 as manifests say. InputError names a stage that is missing."""
        found = {}
        for table in self.stage.reads:
            outputs = self.run.manifest(table.stage)["outputs"]
            for spec in self.settings.maps if table.per_map else self.settings.maps[:1]:
                file = table.file(spec.name)
                if file in outputs:
                    found[table.path(spec.name)] = outputs[file]
                elif not table.optional:
                    folder = self.run.folder / table.stage
                    raise InputError(
                        f"{folder / MANIFEST} does not list {file}: delete {folder}, run it again"
                    )
        if self.stage.also_reads:
            stage, folder = self.stage.also_reads.split("/", 1)
            outputs = self.run.manifest(stage)["outputs"]
            found |= {f"{stage}/{file}": outputs[file] for file in outputs if file.startswith(f"{folder}/")}
        return found

    @cached_property
    def rests_on(self) -> dict:
        """The settings that the result depends on."""
        return self.settings.group(*self.stage.rests_on) | self.stage.also_rests_on(self.settings)

    def read(self, table: Table, map_name: str = OWN_MAP) -> pd.DataFrame:
        """A table of an earlier stage."""
        return self.run.read(table, map_name)

    @cached_property
    def model_folder(self) -> Path:
        return models.local_folder(self.settings.model.model, self.settings.model.revision)

    @cached_property
    def tokenizer(self):
        return models.load_tokenizer(self.model_folder)

    @cached_property
    def shape(self) -> Shape:
        """Of the model, from its config: nothing is loaded."""
        return models.folder_shape(self.model_folder)

    @cached_property
    def backend(self) -> Backend:
        """The run's model, loaded at first use. InputError if the model or its tokenizer has changed."""
        chosen, place, folder = self.settings.model, self.settings.run, self.model_folder
        if models.tokenizer_sha256(folder) != self.run.manifest("01_calibrate")["notes"]["tokenizer"]:
            raise InputError(f"the tokenizer in {folder} is not the one stage 01 used: choose another --run")
        hashes = models.model_hashes(folder)
        for earlier in sorted(self.run.folder.glob(f"*/{MANIFEST}")):
            other = read_json(earlier)["model"]
            if other and (changed := [name for name in hashes if other.get(name) != hashes[name]]):
                raise InputError(
                    f"the model in {folder} is not that of {earlier.parent} (another {changed[0]}): choose "
                    f"another --run"
                )
        known = tuple(hashes.values())
        backend = _load(chosen, folder, known, place.device, place.model_parallel)
        model = {"id": chosen.model, "revision": chosen.revision} | hashes
        model |= {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
        model |= {"quantize": backend.quantize}
        if (started := self.folder / STARTED).is_file() and (
            changed := differences(read_json(started)["model"], model)
        ):
            raise InputError(
                f"the parts in {self.folder} were computed otherwise ({changed}): pass the old value, or "
                f"delete it"
            )
        self.start(model)
        self.remember()
        shape = backend.shape
        self.say(f"{model['id']}: {shape.layers} layers of {shape.heads} heads, {computed_by(model)}")
        return backend

    def release(self) -> None:
        """Frees the place of the run's model."""
        self.__dict__.pop("backend", None)
        _load.cache_clear()
        gc.collect()

    # Where it stands

    def find(self) -> bool:
        """Whether the stage is complete and unchanged."""
        done, begun = self.folder / MANIFEST, self.folder / STARTED
        if not done.is_file() and not begun.is_file():
            return False
        old = read_json(done if done.is_file() else begun)
        again = f"delete {self.folder} to make it again, or choose another --run"
        if changed := differences(old["settings"], self.rests_on):
            raise InputError(f"{self.folder} was made with other settings ({changed}): {again}")
        if changed := [path for path in self.inputs if old["inputs"].get(path) != self.inputs[path]]:
            raise InputError(f"{self.folder} was made from another {' and '.join(changed)}: {again}")
        self.model = old["model"]
        if not done.is_file():
            self.info = old["units"]
            return False
        for relative, digest in old["outputs"].items():
            path = self.folder / relative
            if not path.is_file():
                raise InputError(f"{path} is missing, though the manifest lists it: {again}")
            if sha256(path) != digest:
                raise InputError(f"{path} is not what its manifest says (sha256): {again}")
        judge = self.stage.judged_by(self.settings)
        if changed := differences({name: old["notes"].get(name) for name in judge}, judge):
            self.say(f"joined otherwise ({changed}): of what was kept, nothing is computed again")
            self._judge_again(old)
            return False
        self._tidy()
        return True

    def _judge_again(self, manifest: dict) -> None:
        """Makes a finished stage an unfinished one whose outputs are there. Killed at any moment, it is
        finished still or known to be judged again."""
        self.judging_again, self.info = True, manifest["units"]
        self.start(manifest["model"])
        (self.folder / MANIFEST).unlink()

    def start(self, model: dict) -> None:
        """Marks the folder with what its parts are made from; `model` says what was loaded."""
        self.model = model
        head = {"settings": self.rests_on, "inputs": self.inputs, "model": model}
        state = {"judging_again": self.judging_again, "units": self.info if self.judging_again else {}}
        write_json(self.folder / STARTED, head | state)

    def check_settings(self) -> None:
        """InputError where a stage of the run rests on another value, or a shard has another than the run."""
        values = self.settings.flat()
        for folder in sorted(self.run.folder.glob("0*_*")):
            found = [folder / name for name in (MANIFEST, STARTED) if (folder / name).is_file()]
            rests_on = read_json(found[0])["settings"] if found else {}
            for name in (name for name in rests_on if name in values and rests_on[name] != values[name]):
                raise InputError(
                    f"{option(name)}: {folder} rests on {rests_on[name]!r}, not {values[name]!r}: choose "
                    f"another --run"
                )
        if self.shard is not None:
            stored = read_json(self.run.folder / RUN_FILE)
            for name, value in self.settings.group(*OF_RESULTS).items():
                if stored.get(name, value) != value:
                    raise InputError(
                        f"{option(name)}: a shard takes the run's own settings, {stored[name]!r} and not "
                        f"{value!r}: set it by a start without --shard"
                    )

    def remember(self) -> None:
        """Keeps the settings as the run's own. A shard is one of several and leaves them as they are."""
        if self.shard is not None:
            return
        values = {name: value for name, value in self.settings.flat().items() if name not in OF_ONE_START}
        path = self.run.folder / RUN_FILE
        if not path.is_file() or read_json(path) != values:
            write_json(path, values)

    # Parts: one finished unit each

    def part_path(self, unit: str) -> Path:
        return self.folder / PARTS / f"{unit}.parquet"

    def _made_from(self, unit: str) -> str:
        """What a unit's rows follow from, as a digest that its part carries."""
        if not self.model and (started := self.folder / STARTED).is_file():
            self.model = read_json(started)["model"]  # another shard began after `find`
        origin = {"stage": self.stage.name, "unit": unit, "settings": self.rests_on, "inputs": self.inputs}
        return hashlib.sha256(json.dumps(origin | {"model": self.model}, sort_keys=True).encode()).hexdigest()

    def _metadata(self, unit: str) -> dict[bytes, bytes] | None:
        """What a unit's part says of itself; None: the unit is not finished. InputError if it is damaged or
        was made from something else."""
        path = self.part_path(unit)
        if not path.is_file():
            return None
        try:
            metadata = pq.read_schema(path).metadata
            origin, _ = metadata[b"made_from"].decode(), metadata[b"info"]
        except (OSError, pa.ArrowException, KeyError, TypeError):
            raise InputError(f"{path} is damaged: delete it, and its unit is computed again") from None
        if origin != self._made_from(unit):
            raise InputError(f"{path} was made from something else: delete it, or choose another --run")
        return metadata

    def has_part(self, unit: str) -> bool:
        """Whether a unit is finished. InputError if its part is damaged or was made from something else."""
        return self._metadata(unit) is not None

    def keep(self, unit: str, frame: pd.DataFrame, schema: pa.Schema, **info: object) -> None:
        """Keeps a unit's rows. `info` (seconds, tokens a second) goes to the manifest, never into a table."""
        notes = {"made_from": self._made_from(unit), "info": json.dumps(info)}
        write_table(self.part_path(unit), frame, schema, **notes)

    def parts(self, units: Iterable[str], schema: pa.Schema) -> pd.DataFrame:
        """The rows of units in order. InputError names a unit that is missing."""
        frames = []
        for unit in units:
            if (metadata := self._metadata(unit)) is None:
                raise InputError(f"unit {unit} of {self.folder} is missing: run the stage again")
            frames.append(read_table(self.part_path(unit), schema))
            self.info[unit] = json.loads(metadata[b"info"])
        return pd.concat(frames, ignore_index=True)

    def outputs(
        self, table: Table, units: Iterable[str], schema: pa.Schema, map_name: str = OWN_MAP
    ) -> pd.DataFrame:
        """What units put out, under `schema`: from the parts, or from the table that a finished stage made of
        them where it is joined again."""
        if self.judging_again:
            return read_table(self.run.path(table, map_name), table.schema, schema.names)
        return self.parts(units, schema)

    def pending(self, units: Units) -> Units:
        """Of a stage's units, those that this process is to compute. InputError where the shard names one
        that there is not."""
        names = units_of_shard(self.shard, list(units), self.stage.name)
        return {name: units[name] for name in names if not self.has_part(name)}

    # What it says and writes

    def say(self, message: str) -> None:
        print(f"[{self.stage.name}] {message}", flush=True)

    def warn(self, message: str) -> None:
        """A warning that the log, the manifest and the report all show."""
        self.notes.setdefault("warnings", []).append(message)
        print(f"[{self.stage.name}] warning: {message}", flush=True)

    def write(self, table: Table, frame: pd.DataFrame, map_name: str = OWN_MAP) -> None:
        self._write(table, frame, map_name)

    def _write_file(self, table: Table, frame: pd.DataFrame, map_name: str) -> None:
        write_table(self.folder / table.file(map_name), frame, table.schema)

    def finish(self, notes: Mapping) -> None:
        """Writes the manifest, then drops the parts that the tables now hold."""
        self.notes |= notes | self.stage.judged_by(self.settings)
        wall = time.monotonic() - self.began
        files = stage_files(self.folder)
        manifest = {
            "schema": SCHEMA_VERSION,
            "stage": self.stage.name,
            "settings": self.rests_on,
            "inputs": self.inputs,
            "model": self.model,
            "outputs": {file: sha256(self.folder / file) for file in files},
            "notes": self.notes,
            "units": self.info,
            "versions": package_versions(),
            "git": git_state(),
            "wall_seconds": round(wall, 2),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(self.folder / MANIFEST, manifest)
        self._tidy()
        self.say(f"done in {wall:.0f} s, peak memory {peak_memory_bytes() / 2**30:.1f} GiB -> {self.folder}")

    def _tidy(self) -> None:
        """Drops what a finished stage no longer needs, and what a killed process left half written."""
        (self.folder / STARTED).unlink(missing_ok=True)
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        for scratch in sorted(self.folder.rglob(".*.tmp")):
            if scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)
            else:
                scratch.unlink(missing_ok=True)
