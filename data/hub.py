"""The public data sets of the paper (section 4.1, appendix A), from the hub or from a folder of your own.

    survey(["mmlu", "wildguard"])     # where each pool would come from; downloads nothing
    load("mmlu").records              # every row, in the source's order

`CAST_DATA=DIR` reads `DIR/<name>_<split>.parquet` with the hub's columns; where there is only a
`<name>_<split>_schema_standin.parquet`, that is read and `provenance.standin` is set. Without CAST_DATA the
pinned revision is loaded from the hub; only then are the hub's libraries imported. Decisions to know of:
- `entry` is a hash of the normalised question; for WildJailbreak's train split, of the *vanilla* question, so
  that its two forms share it. MMLU repeats questions across splits, and `wildjailbreak_safe` has the rows of
  `vanilla_harmful` (the paper takes both from there): compare entries before drawing.
- `dan`: the stand-in for WildJailbreak's train split is built from half of the DAN prompts. Where CAST_DATA
  offers that stand-in, `dan` holds only rows with standin_half = "heldout", and `provenance.note` says so.
- `wildguard` leaves out repeats of a prompt. WildJailbreak's train split is machine-written: rows without a
  question or completion are left out and counted in `provenance.note`. Elsewhere an empty text is an error.
- Error messages name file, row (from 0) and column, never a row's text.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from backends.core.errors import InputError
from data.pools import POOLS, TRAIN, EmptyTextError, Pool, Row
from data.records import Record


@dataclass(frozen=True)
class Provenance:
    """Where a pool's rows came from; a path is in it only where a user gave one."""

    pool: str
    location: str
    """"hub", "embedded", a user's own file, or the file names in CAST_DATA, joined by " + " """
    sha256: str
    """of the file(s), joined alike; from the hub, of the rows that were read"""
    rows: int
    standin: bool = False
    """the rows only have the set's columns: no score on them compares with a published one"""
    repository: str | None = None
    revision: str | None = None
    """commit on the hub; None for files, whose identity is `sha256`"""
    note: str | None = None
    """what a table that rests on this pool has to say"""


@dataclass(frozen=True)
class Loaded:
    records: list[Record]
    provenance: Provenance


@dataclass(frozen=True)
class _Part:
    """A split or a file."""

    stem: str
    """local file name without its ending: names the part in ids, from wherever it was read"""
    label: str
    """the file, or repository and split; for messages"""
    table: pa.Table
    revision: str | None = None
    sha256: str | None = None
    standin: bool = False


def load(pool: str) -> Loaded:
    """Every row of a pool, in its source's order. InputError where it cannot be read."""
    spec, folder = _spec(pool), _folder()
    parts = _hub_parts(spec) if folder is None else _local_parts(pool, spec, folder)
    labels = " + ".join(part.label for part in parts)
    standin = any(part.standin for part in parts)
    conditions = [spec.keep] if spec.keep else []
    notes = [f"only {labels} is there"] if len(parts) < len(spec.parts) else []
    if pool == "dan" and folder and _local_file(folder, TRAIN[0][1])[1]:
        conditions.append(("standin_half", "heldout"))
        notes.append("held-out half only: the training stand-in is built from the other half")

    records: list[Record] = []
    seen: set[str] = set()
    digest, empty = hashlib.sha256(), 0
    for part in parts:
        for index, values in _rows(part, spec.columns, conditions):
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
            try:
                fields = spec.fields(Row(values, f"{part.label}: row {index}"))
            except EmptyTextError:
                if not spec.skip_empty:
                    raise
                empty += 1
                continue
            if spec.distinct and fields["prompt"] in seen:
                continue
            seen.add(fields["prompt"])
            example_id = f"{pool}/{part.stem}-{index:06d}"
            source = spec.repository + (" (stand-in)" if standin else "")
            records.append(Record(example_id=example_id, source=source, split=pool, **fields))
    if not records:
        wanted = " and ".join(f"{column} = {value}" for column, value in conditions) or "a text"
        raise InputError(f"{labels}: no row with {wanted}")
    if empty:
        notes.append(f"{empty} rows with an empty text left out")
    origin = Provenance(
        pool=pool,
        location=labels if folder else "hub",
        sha256=" + ".join(part.sha256 for part in parts) if folder else digest.hexdigest(),
        rows=len(records),
        standin=standin,
        repository=spec.repository,
        revision=parts[0].revision,
        note="; ".join(notes) or None,
    )
    return Loaded(records, origin)


def _spec(pool: str) -> Pool:
    if pool not in POOLS:
        raise InputError(f"unknown data pool '{pool}'; there are {', '.join(POOLS)}")
    return POOLS[pool]


def _rows(part: _Part, columns: Iterable[str], conditions: list[tuple]) -> Iterable[tuple[int, dict]]:
    """(index in the source, row) of the rows that meet all conditions."""
    wanted = list(dict.fromkeys([*columns, *(column for column, _ in conditions)]))
    for column in wanted:
        if column not in part.table.column_names:
            raise InputError(f"{part.label}: column '{column}' is missing")
    table, indices = part.table.select(wanted), list(range(part.table.num_rows))
    # Filtered before any text becomes a Python object: the train split of WildJailbreak is half a gigabyte.
    for column, value in conditions:
        cells = table[column].to_pylist()
        indices = [index for index in indices if cells[index] == value]
    return zip(indices, table.take(pa.array(indices, pa.int64())).to_pylist(), strict=True)


def _folder() -> Path | None:
    """The folder that CAST_DATA names; None: the hub."""
    name = os.environ.get("CAST_DATA", "").strip()
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"CAST_DATA names no folder: {folder}")
    return folder


def _local_file(folder: Path, stem: str) -> tuple[Path | None, bool]:
    """(file, stand-in?); (None, False) where neither file is there."""
    real, standin = folder / f"{stem}.parquet", folder / f"{stem}_schema_standin.parquet"
    if real.is_file():
        return real, False
    return (standin, True) if standin.is_file() else (None, False)


def _local_parts(pool: str, spec: Pool, folder: Path) -> list[_Part]:
    parts = []
    for _, stem in spec.parts:
        path, standin = _local_file(folder, stem)
        if path is None:
            continue
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path.name}: not a readable parquet file ({type(error).__name__})") from error
        parts.append(_Part(stem, path.name, table, sha256=sha256, standin=standin))
    if not parts:
        raise InputError(f"{pool}: {_missing_file(spec, folder)}")
    return parts


def _hub_parts(spec: Pool) -> list[_Part]:
    import datasets

    parts = []
    for split, stem in spec.parts:
        label = f"{spec.repository} ({spec.config or 'default'}, {split})"
        source = {"split": split, "revision": spec.revision, **spec.options}
        try:
            dataset = datasets.load_dataset(spec.repository, spec.config, **source)
            table = dataset.with_format("arrow")[:]
        except Exception as error:  # of many libraries; `survey` tells the reasons apart
            raise InputError(f"{label}: cannot be loaded from the hub ({type(error).__name__})") from error
        # In the cache the folder's name is the commit. Without a network `datasets` takes any commit it has.
        names = [Path(file["filename"]).parent.name for file in dataset.cache_files]
        commit = next((name for name in names if re.fullmatch(r"[0-9a-f]{40}", name)), spec.revision)
        if commit != spec.revision:
            raise InputError(
                f"{label}: the cache has commit {commit}, not {spec.revision}; connect to a network"
            )
        parts.append(_Part(stem, label, table, commit))
    return parts


@dataclass(frozen=True)
class Reach:
    """Whether a pool can be had."""

    pool: str
    state: Literal["there", "stand-in", "missing"]
    where: str
    how: str | None = None
    """to get it, where it is missing"""


def survey(pools: Iterable[str]) -> list[Reach]:
    """Where each pool would come from. Downloads nothing."""
    specs = {pool: _spec(pool) for pool in pools}
    try:
        folder = _folder()
    except InputError as error:
        return [Reach(pool, "missing", spec.repository, str(error)) for pool, spec in specs.items()]
    if folder:
        return [_reach_file(pool, spec, folder) for pool, spec in specs.items()]
    repositories = {spec.repository: spec for spec in specs.values()}
    reasons = {repository: _hub_reason(spec) for repository, spec in repositories.items()}
    found = []
    for pool, spec in specs.items():
        where, reason = f"{spec.url} at {spec.revision[:10]}", reasons[spec.repository]
        if not reason:
            found.append(Reach(pool, "there", where))
        elif _cached(spec):
            found.append(Reach(pool, "there", f"the cache of datasets, {spec.revision[:10]}"))
        else:
            how = f"{reason}, or set CAST_DATA to a folder with {spec.files}"
            found.append(Reach(pool, "missing", where, how))
    return found


def _reach_file(pool: str, spec: Pool, folder: Path) -> Reach:
    found = [_local_file(folder, stem) for _, stem in spec.parts]
    there = [(path.name, standin) for path, standin in found if path is not None]
    if not there:
        return Reach(pool, "missing", spec.files, _missing_file(spec, folder))
    state = "stand-in" if any(standin for _, standin in there) else "there"
    names = " + ".join(name for name, _ in there)
    lacking = [
        f"{stem}.parquet" for (_, stem), (path, _) in zip(spec.parts, found, strict=True) if path is None
    ]
    return Reach(pool, state, f"{names} (without {', '.join(lacking)})" if lacking else names)


def _missing_file(spec: Pool, folder: Path) -> str:
    return f"no {spec.files} in CAST_DATA={folder}: put it there, or unset CAST_DATA to load {spec.url}"


def _cached(spec: Pool) -> bool:
    """Whether an earlier run left all splits in the cache of `datasets`, which then needs no network."""
    import datasets

    name, cache = spec.repository.replace("/", "___").casefold(), Path(datasets.config.HF_DATASETS_CACHE)
    folders = [path for path in cache.glob("*") if path.name.casefold() == name]
    patterns = [f"{spec.config or 'default'}*/*/{spec.revision}/*{split}*.arrow" for split, _ in spec.parts]
    return all(any(any(path.glob(pattern)) for path in folders) for pattern in patterns)


def _hub_reason(spec: Pool) -> str | None:
    """Why a repository cannot be read, and what to do about it; None if it can."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name, login = spec.repository, "" if huggingface_hub.get_token() else "log in (`hf auth login`) and "
    try:
        huggingface_hub.HfApi().auth_check(name, repo_type="dataset")
    except GatedRepoError:
        return f"{name} is gated: {login}accept its terms at {spec.url}"
    except RepositoryNotFoundError:
        return f"{name} is not on the hub or closed to this account: try `hf auth login`, see {spec.url}"
    except HfHubHTTPError as error:
        return f"the hub refuses {name} ({type(error).__name__}): try `hf auth login` or wait"
    except Exception as error:  # connection errors: their classes differ between versions of the HTTP library
        return f"no connection to the hub for {name} ({type(error).__name__}): connect to a network"
    return None
