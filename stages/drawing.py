"""Drawing rows from pools without a row seen twice; what stage 01 is made of.

A draw that finds too few rows takes what there is, balanced where classes are to be equal, and says so:
`Short` becomes a warning in the log, the manifest and the report.
"""

import dataclasses
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from backends import models
from backends.errors import InputError
from data import benchmarks as registry
from data import jsonl, sources
from data.embedded import generate as embedded
from data.examples import Record
from data.jsonl import DATA_TYPES, normalise
from stages import artifacts, maps
from stages.settings import Settings

OWN_OPTION = {"own/util": "util", "own/safe": "safe", "own/align": "align"}


class Short(NamedTuple):
    """A draw that got fewer rows than were asked for."""

    what: str
    asked: int
    got: int
    pool: int
    """rows of the pool, those used elsewhere included"""

    def __str__(self) -> str:
        return f"{self.what}: {self.got} of {self.asked} rows, the pool has {self.pool} in all"


class Pools:
    """Loads each pool of records once and remembers where it came from."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.provenance: dict[str, dict] = {}
        self._records: dict[str, list[Record]] = {}

    def records(self, pool: str) -> list[Record]:
        if pool not in self._records:
            self._records[pool] = self._load(pool)
        return self._records[pool]

    def _load(self, pool: str) -> list[Record]:
        kind, _, name = pool.partition("/")
        if kind == "embedded":
            if name not in embedded.ROLES:
                raise InputError(f"no embedded pool {name!r}, there are {', '.join(embedded.ROLES)}")
            records = embedded.records(name)
            digest = embedded.sha256()
            self.provenance[pool] = {
                "location": "embedded",
                "sha256": digest,
                "rows": len(records),
                "standin": False,
            }
        elif kind == "own":
            path = getattr(self.settings, OWN_OPTION[pool])
            try:
                records = jsonl.read(path, name)
            except (ValueError, FileNotFoundError) as error:
                raise InputError(f"--{name}: {error}") from None
            digest = artifacts.sha256(Path(path))
            self.provenance[pool] = {
                "location": path,
                "sha256": digest,
                "rows": len(records),
                "standin": False,
            }
        else:
            try:
                loaded = sources.load(pool)
            except (ValueError, FileNotFoundError) as error:
                raise InputError(str(error)) from None
            records = loaded.records
            self.provenance[pool] = dataclasses.asdict(loaded.provenance)
        return records


def identities(records: Iterable[Record]) -> set[str]:
    """What may not be seen twice: entries, and the prompts' words."""
    return {name for one in records for name in (one.entry, f"prompt {normalise(one.prompt) or one.prompt}")}


def draw(
    records: list[Record], rows: int, taken: set[str], seed: list[int], shuffled: bool = False
) -> list[Record]:
    """`rows` of the records that share no identity with `taken`, by a seeded permutation; fewer where there
    are not so many. 0: all, in their source's order unless `shuffled`."""
    free = [record for record in records if not identities([record]) & taken]
    if not rows and not shuffled:
        return free
    order = np.random.default_rng(seed).permutation(len(free))
    return [free[index] for index in (order[:rows] if rows else order)]


def whole_folds(records: list[Record], folds: int, what: str) -> list[Record]:
    """As many of the records as divide into folds. InputError where not one row a fold is left."""
    if len(records) < folds:
        raise InputError(f"{what}: {len(records)} rows are there, --folds {folds} needs as many at least")
    return records[: len(records) // folds * folds]


def shortage(what: str, asked: int, drawn: list[Record], pool: list[Record]) -> list[Short]:
    """What to say where a draw got fewer rows than asked for (0: all there are); else nothing."""
    return [Short(what, asked, len(drawn), len(pool))] if len(drawn) < asked else []


def draw_balanced(
    classes: dict[str, list[Record]],
    rows: int,
    taken: set[str],
    seeds: dict[str, list[int]],
    fits: Callable[[Record], bool],
) -> tuple[list[Record], list[Short]]:
    """`rows` of each class that fit, all of one size: that of the smallest class where it has fewer.

    Classes may share identities with one another, not with `taken`. InputError names a class without a row.
    """
    drawn = {}
    for name, records in classes.items():
        in_order = draw(records, 0, taken, seeds[name], shuffled=True)
        drawn[name] = list(islice(filter(fits, in_order), rows))
        if not drawn[name]:
            raise InputError(
                f"alignment {name}: no row is left ({len(records)} less those used elsewhere or too long)"
            )
    fewest = min(drawn, key=lambda name: len(drawn[name]))
    size = len(drawn[fewest])
    what = f"alignment, each of {len(classes)} types (fewest: {fewest})"
    short = shortage(what, rows, drawn[fewest], classes[fewest])
    return [one for records in drawn.values() for one in records[:size]], short


def draw_own(
    records: list[Record], calibration: int, taken: set[str], seed: list[int], what: str
) -> tuple[list[Record], list[Record]]:
    """A user's rows, split by identity: `calibration` rows, and all others as the benchmark.

    Rows scored by the number they end on only serve as benchmark: the sweep answers by the next token.
    """
    fit = [record for record in records if record.scoring != "number"]
    drawn = draw(fit, calibration, taken, seed)
    used = taken | identities(drawn)
    rest = [record for record in records if not identities([record]) & used]
    if not rest:
        raise InputError(f"{what}: {len(records)} rows, all asked for calibration: none is left as benchmark")
    return drawn, rest


PAIR = ("plain", "attacked")
"""roles of a pair's rows"""


def draw_pairs(
    settings: Settings, pools: Pools, taken: set[str], seed: list[int]
) -> tuple[list[tuple[Record, Record]], list[Short]]:
    """`pairs` harmful requests, each plainly and inside an attack, that share no identity with `taken`."""
    if not settings.pairs:
        return [], []
    plain, attacked = (pools.records(pool) for pool in pair_pools(settings))
    # One record of a pair may have been left out, where a text is empty.
    other = {_within(record): record for record in plain}
    pairs = [(other[_within(record)], record) for record in attacked if _within(record) in other]
    free = [pair for pair in pairs if not identities(pair) & taken]
    drawn = [free[at] for at in np.random.default_rng(seed).permutation(len(free))[: settings.pairs]]
    if not drawn:
        raise InputError(f"--pairs: none of {len(pairs)} pairs is left")
    return drawn, shortage("pairs (plain and attacked)", settings.pairs, drawn, pairs)


def _within(record: Record) -> str:
    """A record's id without its pool: the same for both forms of a request."""
    return record.example_id.split("/", 2)[-1]


def pair_pools(settings: Settings) -> tuple[str, str]:
    """Pools of the two forms of harmful requests, whose ids differ in the pool only: of WildJailbreak where
    the run's safety rows are, else embedded (attacks of the families that alignment has, none scored)."""
    if settings.safe_source.startswith("wildjailbreak") and not settings.safe:
        return "wildjailbreak_plain", "wildjailbreak_attacked"
    return "embedded/plain", "embedded/attacked"


def needed_pools(settings: Settings, asked: list[registry.Asked]) -> list[str]:
    """Every pool that this run draws from, for the check before any work."""
    align = "own/align" if settings.align else settings.align_source
    pools = [one.benchmark.pool for one in asked]
    pools += ["own/util" if settings.util else settings.util_source]
    pools += ["own/safe" if settings.safe else settings.safe_source]
    pools += [one.pool for one in maps.asked(settings.maps, settings.folds).values()]
    pools += pair_pools(settings) if settings.pairs else ()
    if align == "embedded":
        pools += [f"embedded/{kind}" for kind in DATA_TYPES]
    elif align == "wildjailbreak":
        pools += DATA_TYPES
    elif align == "own/align":
        pools.append(align)
    else:
        raise InputError(f'--align-source: "embedded" or "wildjailbreak", not {align!r}')
    return list(dict.fromkeys(pools))


def check_reachable(settings: Settings, pools: list[str]) -> None:
    """Prints where each public pool comes from, before any work. InputError names all that cannot be had,
    and how to get it."""
    public = [pool for pool in pools if pool.partition("/")[0] not in ("embedded", "own")]
    lines = [line for line in (models.missing(settings.model, settings.revision),) if line]
    if public:
        found = sources.survey(public)
        width = max(len(one.pool) for one in found)
        print("public data:", flush=True)
        for one in found:
            print(f"  {one.pool:{width}}  {one.state:9}  {one.where}", flush=True)
        lines += [f"{one.pool}: {one.how}" for one in found if one.how]
    if lines:
        raise InputError("what this run needs cannot be had:\n  " + "\n  ".join(lines))


def check_calibration(what: str, records: list[Record]) -> None:
    """InputError where rows cannot be used as what they were chosen for."""
    if any(not record.target for record in records):
        raise InputError(f"{what}: rows without a target have no gradient")
    if what != "safe" and any(record.scoring not in ("choice", "boxed") for record in records):
        raise InputError(f"{what}: calibration rows are scored by the next token or a boxed answer")


def check_benchmarks(scored: dict[str, list[Record]], asked: list[registry.Asked]) -> None:
    for one in asked:
        if one.new_tokens == 0 and any(record.scoring != "choice" for record in scored[one.name]):
            raise InputError(f"--benchmarks: {one.name} writes its answers, give {one.name}=rows:new-tokens")


def alignment_records(settings: Settings, pools: Pools, kind: str) -> list[Record]:
    """The records of one data type, from wherever this run takes them."""
    if settings.align:
        return [record for record in pools.records("own/align") if record.role == kind]
    return pools.records(f"embedded/{kind}" if settings.align_source == "embedded" else kind)
