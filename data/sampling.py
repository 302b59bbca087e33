"""Draws the rows of a run: benchmarks, then calibration, then alignment, so that no row is in two of them.

A draw that finds too few rows takes what there is and adds a `Shortfall`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from tabulate import tabulate

from backends.core import seeds
from backends.core.errors import InputError
from data import hub, own_rows
from data.benchmarks import Benchmark
from data.embedded import generate as embedded
from data.records import DATA_TYPES, Record, identities, without_repeats

PAIR = ("plain", "attacked")
"""splits of the two forms of a request"""
PRESET_SEED = 0
"""of the draws of every preset, whose scores are reported"""


class MapRows(Protocol):
    """Rows of another map than the run's own."""

    name: str
    pool: str
    rows: int


@dataclass(frozen=True)
class Wanted:
    """So many rows of a pool."""

    pool: str
    rows: int


@dataclass(frozen=True)
class Plan:
    """What is to be drawn. Pools as `Pools.records` takes them."""

    seed: int
    folds: int
    """calibration rows are cut to a multiple of them"""
    util: Wanted
    safe: Wanted
    align: Wanted
    """pool "embedded", "wildjailbreak" or "own/align"; see `rows_of_types`"""
    benchmarks: tuple[Benchmark, ...]
    maps: Sequence[MapRows] = ()
    """with the pool of `util`, a map gets the first rows of D_util, whose sweep is there already"""
    pairs: int = 0
    """harmful requests in two forms (`PAIR`) that neurons are attributed by, beside as many rows of D_util"""
    benign_share: float = 0.5
    """of the alignment rows"""
    max_length: int = 1024
    """tokens; an alignment row whose prompt alone has as many is left out"""
    development: bool = False
    """benchmarks get other rows: none that a run with this seed scores, calibrates or tunes on, and none that
    a run with `PRESET_SEED` scores. No row is free of all seeds (ten of them score every embedded fact): what
    is chosen on these rows is to be reported under one of the two"""


@dataclass(frozen=True)
class Shortfall:
    """A draw that got fewer rows than requested."""

    split: str
    """as in the tables, or "alignment": the type that lacks most, all have fewer in proportion; "pairs": both
    forms; "util for attribution": D_util has fewer rows than there are to be pairs"""
    requested: int
    drawn: int
    pool: str
    pool_rows: int
    """rows used elsewhere included"""

    def __str__(self) -> str:
        what = "alignment, each data type" if self.split == "alignment" else self.split
        return f"{what}: {self.drawn} of {self.requested} rows, {self.pool} has {self.pool_rows} in all"


@dataclass(frozen=True)
class Drawn:
    """The rows of a run in the order of its tables, with their splits."""

    calibration: list[Record]
    """split by split: util, safe, each other map, plain, attacked"""
    alignment: list[Record]
    benchmarks: list[Record]
    short: list[Shortfall]
    doubts: list[str] = field(default_factory=list)
    """what was left out, or is scored twice, a line each"""


class Pools:
    """Loads each pool once: "embedded/<split>", "own/<role>" (a user's rows) or a name of `data.pools`.

    Args:
        util, safe, align: the user's files, or data sets on the hub.
    """

    def __init__(self, util: str = "", safe: str = "", align: str = ""):
        self.provenance: dict[str, dict] = {}
        """fields of `hub.Provenance` by pool"""
        self.readings: dict[str, own_rows.Reading] = {}
        """what was read of a user's rows, by option"""
        self._sources = {"util": util, "safe": safe, "align": align}
        self._records: dict[str, list[Record]] = {}

    def records(self, pool: str) -> list[Record]:
        """InputError where the pool cannot be read."""
        if pool not in self._records:
            loaded = self._load(pool)
            self.provenance[pool] = asdict(loaded.provenance)
            self._records[pool] = loaded.records
        return self._records[pool]

    def _load(self, pool: str) -> hub.Loaded:
        kind, _, name = pool.partition("/")
        if kind == "embedded":
            if name not in embedded.SPLITS:
                raise InputError(f"no embedded pool {name!r}, there are {', '.join(embedded.SPLITS)}")
            records = embedded.records(name)
            return hub.Loaded(records, hub.Provenance(pool, "embedded", embedded.sha256(), len(records)))
        if kind == "own":
            try:
                loaded = own_rows.load(self._sources[name], name)
            except InputError as error:
                raise InputError(f"--{name}: {error}") from None
            self.readings[name] = loaded.reading
            return hub.Loaded(loaded.records, loaded.provenance)
        return hub.load(pool)


def needed_pools(plan: Plan) -> list[str]:
    """Every pool that the plan draws from."""
    pools = [benchmark.pool for benchmark in plan.benchmarks]
    pools += [plan.util.pool, plan.safe.pool, *(other.pool for other in plan.maps)]
    pools += _pair_pools(plan) if plan.pairs else ()
    pools += _alignment_pools(plan).values()
    return list(dict.fromkeys(pools))


def _alignment_pools(plan: Plan) -> dict[str, str]:
    """The pool of each data type."""
    prefixes = {"embedded": "embedded/", "wildjailbreak": ""}
    if plan.align.pool == "own/align":
        return dict.fromkeys(DATA_TYPES, plan.align.pool)
    if plan.align.pool not in prefixes:
        raise InputError(f'--align-source: "embedded" or "wildjailbreak", not {plan.align.pool!r}')
    return {kind: prefixes[plan.align.pool] + kind for kind in DATA_TYPES}


def rows_of_types(rows: int, benign_share: float) -> dict[str, int]:
    """How many of `rows` alignment rows each data type has: plain and attacked ones are as many.

    >>> rows_of_types(240, 0.75)["vanilla_benign"], rows_of_types(240, 0.75)["adversarial_harmful"]
    (90, 30)
    """
    benign = round(rows * benign_share / 2)
    each = {"harmful": rows // 2 - benign, "benign": benign}
    return {kind: each[kind.rpartition("_")[2]] for kind in DATA_TYPES}


def _pair_pools(plan: Plan) -> tuple[str, str]:
    """Pools of the two forms of harmful requests: WildJailbreak's where the safety rows are from there, else
    embedded ones (attacks of the families that alignment has, none of them scored)."""
    if plan.safe.pool.startswith("wildjailbreak"):
        return "wildjailbreak_plain", "wildjailbreak_attacked"
    return "embedded/plain", "embedded/attacked"


def check_reachable(pools: Sequence[str], *problems_of_models: str | None) -> None:
    """Prints where each public pool comes from. InputError lists all that cannot be had, and how to get it.

    Args:
        problems_of_models: why a model cannot be had; None where it can.
    """
    public = [pool for pool in pools if pool.partition("/")[0] not in ("embedded", "own")]
    problems = [problem for problem in problems_of_models if problem]
    if public:
        found = hub.survey(public)
        rows = [("", reach.pool, reach.state, reach.where) for reach in found]
        print(f"public data:\n{tabulate(rows, tablefmt='plain')}", flush=True)
        problems += [f"{reach.pool}: {reach.how}" for reach in found if reach.how]
    if problems:
        raise InputError("what this run needs cannot be had:\n  " + "\n  ".join(problems))


def draw_all(plan: Plan, pools: Pools, prompt_length: Callable[[Record], int]) -> Drawn:
    """All rows of a run, drawn the scarcest and most public first. InputError where there is no row to draw.

    Args:
        prompt_length: tokens of a record's rendered prompt.
    """
    draws = _Draws(plan, pools)
    scored, util, safe = draws.scored_and_calibrating()
    maps = draws.maps(util)
    pairs = draws.pairs()
    aligned = draws.alignment(prompt_length)
    if plan.development:
        reported = _Draws(replace(plan, seed=PRESET_SEED), pools).scored_and_calibrating()[0]
        draws.take(*reported.values())
        scored = draws.benchmarks(plan.benchmarks, "development")
    if len(util) < plan.pairs:
        draws.note("util for attribution", plan.pairs, util, plan.util.pool)
    return Drawn(
        calibration=_with_splits({"util": util, "safe": safe, **maps, **pairs}),
        alignment=_with_splits(aligned),
        benchmarks=_with_splits(scored),
        short=draws.short,
        doubts=list(dict.fromkeys(draws.doubts)),
    )


def _with_splits(drawn: dict[str, list[Record]]) -> list[Record]:
    return [replace(record, split=split) for split, records in drawn.items() for record in records]


class _Draws:
    """The draws of one plan: each leaves out what shares an identity with a row that was taken before it."""

    def __init__(self, plan: Plan, pools: Pools):
        self.plan, self.pools = plan, pools
        self.short: list[Shortfall] = []
        self.doubts: list[str] = []
        self._taken: set[str] = set()

    def scored_and_calibrating(self) -> tuple[dict[str, list[Record]], list[Record], list[Record]]:
        """Benchmarks, D_util, D_safe. A user's own benchmarks get what calibration leaves of their rows."""
        own = [benchmark for benchmark in self.plan.benchmarks if benchmark.pool.startswith("own/")]
        scored = self.benchmarks([each for each in self.plan.benchmarks if each not in own])
        util = self.calibration("util", self.plan.util)
        safe = self.calibration("safe", self.plan.safe)
        return scored | self.benchmarks(own), util, safe

    def benchmarks(
        self, benchmarks: Sequence[Benchmark], purpose: str = "benchmark"
    ) -> dict[str, list[Record]]:
        """The rows of each; they may share rows with one another."""
        drawn = {}
        for benchmark in benchmarks:
            name, records = benchmark.name, self.pools.records(benchmark.pool)
            drawn[name] = rows = self._draw(records, benchmark.rows, purpose, name)
            if not rows:
                raise InputError(
                    f"benchmark {name}: no row is left ({len(records)} less those used): calibrate with "
                    f"fewer (--util-rows, --safe-rows)"
                )
            if benchmark.new_tokens == 0 and any(record.scoring != "choice" for record in rows):
                raise InputError(f"--benchmarks: {name} writes its answers, give {name}=rows:new-tokens")
            self.note(name, benchmark.rows, rows, benchmark.pool)
            if repeats := len(rows) - len(without_repeats(rows)):
                self.doubts.append(
                    f"{repeats} of {len(rows)} rows of {name} repeat another one, as the set has them"
                )
        self.take(*drawn.values())
        return drawn

    def calibration(self, split: str, wanted: Wanted) -> list[Record]:
        """D_util or D_safe."""
        records = self._distinct(wanted.pool)
        if wanted.pool.startswith("own/"):
            # A user's worked problems only serve as benchmark: the sweep scores rows by the next token.
            records = [record for record in records if record.scoring != "number"]
        rows = self._draw(records, wanted.rows, split)
        self.take(rows)
        return self._whole_folds(split, wanted, rows)

    def maps(self, util: list[Record]) -> dict[str, list[Record]]:
        """The utility rows of each other map; maps may share rows with one another."""
        drawn = {}
        for other in self.plan.maps:
            if other.pool == self.plan.util.pool:
                rows = util[: other.rows]
            else:
                rows = self._draw(self._distinct(other.pool), other.rows, "map", other.name)
            drawn[other.name] = self._whole_folds(other.name, other, rows)
        self.take(*drawn.values())
        return drawn

    def pairs(self) -> dict[str, list[Record]]:
        """Harmful requests plainly and, row by row, inside an attack."""
        if not self.plan.pairs:
            return {}
        plain_pool, attacked_pool = _pair_pools(self.plan)
        # A form is missing where its text is empty.
        plain = {_within(record): record for record in self.pools.records(plain_pool)}
        pairs = [
            (plain[_within(record)], record)
            for record in self.pools.records(attacked_pool)
            if _within(record) in plain
        ]
        free = [pair for pair in pairs if not identities(pair) & self._taken]
        order = seeds.stream(self.plan.seed, "rows", "pairs").permutation(len(free))
        drawn = [free[at] for at in order[: self.plan.pairs]]
        if not drawn:
            raise InputError(f"--pairs: none of {len(pairs)} pairs is left")
        self.note("pairs", self.plan.pairs, drawn, attacked_pool)
        self.take(*drawn)
        return {split: [pair[at] for pair in drawn] for at, split in enumerate(PAIR)}

    def alignment(self, prompt_length: Callable[[Record], int]) -> dict[str, list[Record]]:
        """The rows of each data type; in proportion fewer of all where a type has fewer. Types may share
        identities."""
        pools = _alignment_pools(self.plan)
        wanted = rows_of_types(self.plan.align.rows, self.plan.benign_share)
        drawn = {}
        for kind, pool in pools.items():
            records = [record for record in self._distinct(pool) if record.split == kind]
            shuffled = self._draw(records, len(records), "alignment", kind)
            drawn[kind] = self._fitting(kind, shuffled, wanted[kind], prompt_length)
            if not drawn[kind]:
                raise InputError(
                    f"alignment {kind}: no row is left ({len(records)} less those used elsewhere or too long)"
                )
        fewest = min(drawn, key=lambda kind: len(drawn[kind]) / wanted[kind])
        self.note("alignment", wanted[fewest], drawn[fewest], pools[fewest])
        self.take(*drawn.values())
        share = len(drawn[fewest]) / wanted[fewest]
        return {kind: records[: round(wanted[kind] * share)] for kind, records in drawn.items()}

    def _distinct(self, pool: str) -> list[Record]:
        """A pool's records to learn from or to calibrate with: what says the same is taken once."""
        records = self.pools.records(pool)
        distinct = without_repeats(records)
        if repeats := len(records) - len(distinct):
            self.doubts.append(
                f"{repeats} of {len(records)} rows of {pool} repeat an earlier one: taken once"
            )
        return distinct

    def _fitting(
        self, kind: str, records: list[Record], wanted: int, prompt_length: Callable[[Record], int]
    ) -> list[Record]:
        """The first records whose prompt leaves room for a target; of others nothing would be learned."""
        fitting, passed_over = [], 0
        for record in records:
            if len(fitting) == wanted:
                break
            if prompt_length(record) < self.plan.max_length:
                fitting.append(record)
            else:
                passed_over += 1
        if passed_over:
            self.doubts.append(
                f"{passed_over} {kind} rows are left out: their prompt alone has --max-length "
                f"{self.plan.max_length} tokens or more"
            )
        return fitting

    def note(self, split: str, requested: int, drawn: Sequence, pool: str) -> None:
        """Keeps a shortfall, if it is one."""
        if len(drawn) < requested:
            self.short.append(Shortfall(split, requested, len(drawn), pool, len(self.pools.records(pool))))

    def _draw(self, records: list[Record], rows: int, *purpose: str) -> list[Record]:
        """`rows` of the records that share nothing with those taken, or as many as there are; 0: all of them,
        in their source's order."""
        free = [record for record in records if not identities([record]) & self._taken]
        if not rows:
            return free
        order = seeds.stream(self.plan.seed, "rows", *purpose).permutation(len(free))
        return [free[at] for at in order[:rows]]

    def take(self, *drawn: Sequence[Record]) -> None:
        for records in drawn:
            self._taken |= identities(records)

    def _whole_folds(self, split: str, wanted: Wanted | MapRows, rows: list[Record]) -> list[Record]:
        """As many of the calibration rows as divide into folds. InputError where they cannot calibrate."""
        folds = self.plan.folds
        if len(rows) < folds:
            raise InputError(f"{split}: {len(rows)} rows are there, --folds {folds} needs as many at least")
        rows = rows[: len(rows) // folds * folds]
        if any(not record.target for record in rows):
            raise InputError(
                f"{split}: rows of {wanted.pool} without a target have neither gradient nor log p: choose "
                f"another pool"
            )
        scorings = {"choice", "boxed"}
        if embedded.GROUPS.get(wanted.pool.removeprefix("embedded/")) == "calibration":
            scorings.add("number")  # worked problems that no benchmark scores
        if split != "safe" and not {record.scoring for record in rows} <= scorings:
            raise InputError(
                f"{split}: calibration rows are scored by the next token or a boxed answer, or are "
                f"embedded/sums"
            )
        self.note(split, wanted.rows, rows, wanted.pool)
        return rows


def _within(record: Record) -> str:
    """A record's id without its pool: the same for both forms of a request."""
    return record.example_id.split("/", 2)[-1]
