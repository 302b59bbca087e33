"""The public data sets of the paper (section 4.1, appendix A) and others, from the hub or a folder of yours.

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

A user's own data set on the hub is `hub:NAME:SPLIT`, with a configuration `hub:NAME:CONFIG:SPLIT`, at a
commit `hub:NAME@COMMIT:SPLIT`; without one it is the newest, and the provenance says which that was.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from backends.core.errors import InputError
from data.pools import POOLS, TRAIN_FILE, Pool, page
from data.records import Record

_STANDIN = "_schema_standin"
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


PREFIX = "hub:"
"""of a user's own data set on the hub"""
_NAME = r"[\w.-]+"
_SOURCE = re.compile(
    rf"{PREFIX}(?P<repository>({_NAME}/)?{_NAME})(@(?P<revision>{_NAME}))?:((?P<config>{_NAME}):)?"
    rf"(?P<split>{_NAME}(\[[\d:%-]+\])?)"
)


@dataclass(frozen=True)
class Source:
    """A user's own data set on the hub."""

    repository: str
    config: str | None
    split: str
    """may be a part of one: train[:500]"""
    revision: str
    """a commit, branch or tag"""


def parse_source(text: str) -> Source:
    """InputError where a text is not `hub:NAME:SPLIT`."""
    found = _SOURCE.fullmatch(text)
    if not found:
        raise InputError(
            f"{text}: a data set on the hub is hub:NAME:SPLIT, hub:NAME:CONFIG:SPLIT or hub:NAME@COMMIT:SPLIT"
        )
    return Source(found["repository"], found["config"], found["split"], found["revision"] or "main")


def table_of(source: Source) -> tuple[pa.Table, str]:
    """A data set's rows and the commit they are of. InputError where it cannot be loaded."""
    return _download(source.repository, source.config, source.split, source.revision, {})


def missing_source(source: Source) -> str | None:
    """Why a user's data set cannot be had, and what to do; None where it can. Downloads nothing."""
    split = source.split.partition("[")[0]
    if not (reason := _hub_reason(source.repository)):
        return None
    if _cached(source.repository, source.config, [split], source.revision):
        return None
    return reason


def load(pool: str) -> Loaded:
    """Every row of a pool, in its source's order. InputError where it cannot be read."""
    spec, folder = _spec(pool), _folder()
    parts = _file_parts(pool, spec, folder) if folder else _hub_parts(spec)
    labels = " + ".join(part.label for part in parts)
    standin = _STANDIN in labels
    source = f"{spec.repository} (stand-in)" if standin else spec.repository
    conditions = [spec.keep] if spec.keep else []
    notes = [f"only {labels} is there"] if len(parts) < len(spec.parts) else []
    if pool == "dan" and folder and _STANDIN in str(_file(folder, TRAIN_FILE)):
        conditions.append(("standin_half", "heldout"))
        notes.append("held-out half only: the training stand-in is built from the other half")

    records: dict[str, Record] = {}
    digest, empty = hashlib.sha256(), 0
    for part in parts:
        for index, row in _rows(part, (*spec.texts, *spec.others), conditions):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            try:
                if (column := _empty(row, spec.texts)) and not spec.skip_empty:
                    raise ValueError(f"column '{column}' is empty")
                if column:
                    empty += 1
                    continue
                fields = spec.fields(row)
            except ValueError as error:
                raise InputError(f"{part.label}: row {index}: {error}") from None
            example_id = f"{pool}/{part.stem}-{index:06d}"
            key = fields["prompt"] if spec.distinct else example_id
            records.setdefault(key, Record(example_id, source, split=pool, **fields))
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
    return Loaded(list(records.values()), origin)


def _spec(pool: str) -> Pool:
    if pool not in POOLS:
        raise InputError(f"unknown data pool '{pool}'; there are {', '.join(POOLS)}")
    return POOLS[pool]


def _rows(part: _Part, columns: Sequence[str], conditions: list[tuple]) -> Iterable[tuple[int, dict]]:
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


def _empty(row: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """The first of the columns that is empty. ValueError on one that holds no text."""
    for column in columns:
        value = row[column]
        if not isinstance(value, str | None):
            raise ValueError(f"column '{column}' is not text")
        if not value or not value.strip():
            return column
    return None


def _folder() -> Path | None:
    """The folder that CAST_DATA names; None: the hub."""
    name = os.environ.get("CAST_DATA", "").strip()
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"CAST_DATA names no folder: {folder}")
    return folder


def _file(folder: Path, stem: str) -> Path | None:
    """The file of a part, or its stand-in; None where neither is there."""
    paths = [folder / f"{stem}.parquet", folder / f"{stem}{_STANDIN}.parquet"]
    return next((path for path in paths if path.is_file()), None)


def _files(spec: Pool, folder: Path) -> dict[str, Path]:
    """The files that are there, by the name of their part."""
    found = {stem: _file(folder, stem) for stem in spec.parts.values()}
    return {stem: path for stem, path in found.items() if path}


def _file_parts(pool: str, spec: Pool, folder: Path) -> list[_Part]:
    parts = []
    for stem, path in _files(spec, folder).items():
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            parts.append(_Part(stem, path.name, pq.read_table(path), sha256=sha256))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path.name}: not a readable parquet file ({type(error).__name__})") from error
    if not parts:
        raise InputError(f"{pool}: {_missing_file(spec, folder)}")
    return parts


def _hub_parts(spec: Pool) -> list[_Part]:
    parts = []
    for split, stem in spec.parts.items():
        table, commit = _download(spec.repository, spec.config, split, spec.revision, spec.options)
        parts.append(_Part(stem, _label(spec.repository, spec.config, split), table, commit))
    return parts


def _label(repository: str, config: str | None, split: str) -> str:
    return f"{repository} ({config or 'default'}, {split})"


def _download(
    repository: str, config: str | None, split: str, revision: str, options: Mapping[str, Any]
) -> tuple[pa.Table, str]:
    """A split's rows and their commit."""
    import datasets

    label = _label(repository, config, split)
    try:
        dataset = datasets.load_dataset(repository, config, split=split, revision=revision, **options)
        table = dataset.with_format("arrow")[:]
    except Exception as error:  # of many libraries; `survey` tells the reasons apart
        raise InputError(f"{label}: cannot be loaded from the hub ({type(error).__name__})") from error
    # In the cache the folder's name is the commit. Without a network `datasets` takes any commit it has.
    names = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    commit = next((name for name in names if _COMMIT.fullmatch(name)), revision)
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise InputError(f"{label}: the cache has commit {commit}, not {revision}; connect to a network")
    return table, commit


@dataclass(frozen=True)
class Reach:
    """Whether a pool can be had."""

    pool: str
    state: Literal["there", "stand-in", "missing"]
    where: str
    how: str | None = None
    """to get it, where it is missing"""


def survey(pools: Iterable[str]) -> list[Reach]:
    """Where each pool would come from. Downloads nothing. InputError where CAST_DATA names no folder."""
    specs, folder = {pool: _spec(pool) for pool in pools}, _folder()
    if folder:
        return [_reach_file(pool, spec, folder) for pool, spec in specs.items()]
    repositories = dict.fromkeys(spec.repository for spec in specs.values())
    reasons = {repository: _hub_reason(repository) for repository in repositories}
    return [_reach_hub(pool, spec, reasons[spec.repository]) for pool, spec in specs.items()]


def _reach_hub(pool: str, spec: Pool, reason: str | None) -> Reach:
    where = f"{spec.url} at {spec.revision[:10]}"
    if not reason:
        return Reach(pool, "there", where)
    if _cached(spec.repository, spec.config, spec.parts, spec.revision):
        return Reach(pool, "there", f"the cache of datasets, {spec.revision[:10]}")
    return Reach(pool, "missing", where, f"{reason}, or set CAST_DATA to a folder with {spec.files}")


def _reach_file(pool: str, spec: Pool, folder: Path) -> Reach:
    found = _files(spec, folder)
    if not found:
        return Reach(pool, "missing", spec.files, _missing_file(spec, folder))
    names = " + ".join(path.name for path in found.values())
    lacking = ", ".join(f"{stem}.parquet" for stem in spec.parts.values() if stem not in found)
    state = "stand-in" if _STANDIN in names else "there"
    return Reach(pool, state, f"{names} (without {lacking})" if lacking else names)


def _missing_file(spec: Pool, folder: Path) -> str:
    return f"no {spec.files} in CAST_DATA={folder}: put it there, or unset CAST_DATA to load {spec.url}"


def _cached(repository: str, config: str | None, splits: Iterable[str], revision: str) -> bool:
    """Whether an earlier run left all splits in the cache of `datasets`, which then needs no network."""
    import datasets

    name, cache = repository.replace("/", "___").casefold(), Path(datasets.config.HF_DATASETS_CACHE)
    folders = [path for path in cache.glob("*") if path.name.casefold() == name]
    commit = revision if _COMMIT.fullmatch(revision) else "*"
    names = [name for split in splits for name in split.split("+")]
    patterns = [f"{config or 'default'}*/*/{commit}/*{name}*.arrow" for name in names]
    return all(any(any(path.glob(pattern)) for path in folders) for pattern in patterns)


def _hub_reason(name: str) -> str | None:
    """Why a repository cannot be read, and what to do about it; None if it can."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    url = page(name)
    login = "" if huggingface_hub.get_token() else "log in (`hf auth login`) and "
    try:
        huggingface_hub.HfApi().auth_check(name, repo_type="dataset")
    except GatedRepoError:
        return f"{name} is gated: {login}accept its terms at {url}"
    except RepositoryNotFoundError:
        return f"{name} is not on the hub or closed to this account: try `hf auth login`, see {url}"
    except HfHubHTTPError as error:
        return f"the hub refuses {name} ({type(error).__name__}): try `hf auth login` or wait"
    except Exception as error:  # connection errors: their classes differ between versions of the HTTP library
        return f"no connection to the hub for {name} ({type(error).__name__}): connect to a network"
    return None
