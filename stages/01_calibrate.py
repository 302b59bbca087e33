"""Stage 01: draws D_util, D_safe, D_align and the benchmarks, renders and tokenizes them (§4.1, App. A).

    python -m stages.01_calibrate --preset smollm
    python -m stages.01_calibrate --preset tiny --run /tmp/tiny         # a second on a CPU

Benchmarks are drawn first, then the calibration sets, then alignment; each leaves out the entries of those
before it, so no row that is trained on or calibrated with is scored. Writes calibration.parquet (role util,
safe, another map's name, or plain and attacked: a request's two forms, row by row), alignment.parquet (role =
data type) and benchmarks.parquet (role = benchmark), all under schemas.EXAMPLES.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from backends import models
from backends.errors import InputError
from data import benchmarks as registry
from data.examples import Record
from data.jsonl import DATA_TYPES
from data.rendering import Renderer
from stages import arms, artifacts, cli, drawing, maps, presets, schemas

NAME = "01_calibrate"
USES = [
    "model",
    "revision",
    "seed",
    "util",
    "safe",
    "align",
    "util_source",
    "safe_source",
    "align_source",
    "util_rows",
    "safe_rows",
    "align_rows",
    "folds",
    "maps",
    "pairs",
    "benchmarks",
    "date",
    "system",
    "max_length",
]


class Drawn(NamedTuple):
    """The rows of a run."""

    util: dict[str, list[Record]]
    """of each map by name; maps.OWN is D_util"""
    safe: list[Record]
    pairs: list[tuple[Record, Record]]
    """a request plainly, and inside an attack"""
    aligned: list[Record]
    scored: dict[str, list[Record]]
    """by benchmark"""
    short: list[drawing.Short]


def collect(settings: presets.Settings, pools: drawing.Pools, renderer: Renderer) -> Drawn:
    """Draws all rows of a run. Benchmarks, then calibration, then alignment: the scarcest and most public
    first."""
    asked = registry.asked(settings.benchmarks, bool(settings.util), bool(settings.safe))
    seed, taken, short = settings.seed, set(), []
    util: dict[str, list[Record]] = {}
    safe: list[Record] = []
    scored: dict[str, list[Record]] = {}
    for number, one in enumerate(asked):
        pool, draws = one.benchmark.pool, [seed, 1, number]
        records = pools.records(pool)
        if pool.startswith("own/"):
            role = pool.removeprefix("own/")
            rows = getattr(settings, f"{role}_rows")
            own, rest = drawing.draw_own(records, rows, taken, draws, f"--{role}")
            short += drawing.shortage(f"{role} from {pool}", rows, own, records)
            if role == "util":
                util[maps.OWN] = own
            else:
                safe = own
            drawn = rest[: one.rows or None]
            taken |= drawing.identities(own)
        else:
            # Benchmarks may share rows with one another.
            free_of = drawing.identities([*util.get(maps.OWN, []), *safe])
            drawn = drawing.draw(records, one.rows, free_of, draws)
        if not drawn:
            raise InputError(f"benchmark {one.name}: no row is left ({len(records)} less those used)")
        short += drawing.shortage(f"benchmark {one.name}", one.rows, drawn, records)
        taken |= drawing.identities(drawn)
        scored[one.name] = [dataclasses.replace(record, role=one.name) for record in drawn]
    if maps.OWN not in util:
        records = pools.records(settings.util_source)
        util[maps.OWN] = drawing.draw(records, settings.util_rows, taken, [seed, 2, 0])
        taken |= drawing.identities(util[maps.OWN])
        short += drawing.shortage("util", settings.util_rows, util[maps.OWN], records)
    if not safe:
        records = pools.records(settings.safe_source)
        safe = drawing.draw(records, settings.safe_rows, taken, [seed, 2, 1])
        taken |= drawing.identities(safe)
        short += drawing.shortage("safe", settings.safe_rows, safe, records)
    for number, other in enumerate(maps.asked(settings.maps, settings.folds).values()):
        own = "own/util" if settings.util else settings.util_source
        records = pools.records(other.pool)
        if other.pool == own:
            # A part of D_util, so that its sweep is there already.
            util[other.name] = util[maps.OWN][: other.rows]
        else:
            util[other.name] = drawing.draw(records, other.rows, taken, [seed, 5, number])
        short += drawing.shortage(f"map {other.name}", other.rows, util[other.name], records)
    safe = drawing.whole_folds(safe, settings.folds, "safe")
    util = {
        name: drawing.whole_folds(records, settings.folds, name or "util") for name, records in util.items()
    }
    for name, records in util.items():
        taken |= drawing.identities(records)
        drawing.check_calibration(name or "util", records)
    drawing.check_calibration("safe", safe)
    pairs, less = drawing.draw_pairs(settings, pools, taken, [seed, 2, 2])
    short += less
    for pair in pairs:
        taken |= drawing.identities(pair)
    drawing.check_benchmarks(scored, asked)
    aligned, less = drawing.draw_balanced(
        {kind: drawing.alignment_records(settings, pools, kind) for kind in DATA_TYPES},
        settings.align_rows // len(DATA_TYPES),
        taken,
        {kind: [seed, 3, number] for number, kind in enumerate(DATA_TYPES)},
        # Of a prompt that fills the whole length nothing would be learned.
        lambda record: len(renderer.ids(renderer.prompt(record))) < settings.max_length,
    )
    return Drawn(util, safe, pairs, aligned, scored, short + less)


def tables(renderer: Renderer, drawn: Drawn) -> dict[str, list[dict]]:
    """The rows of the three files, rendered and tokenized."""

    def as_rows(records: list[Record], role: str) -> list[dict]:
        return [renderer.row(dataclasses.replace(record, role=role)) for record in records]

    calibration = as_rows(drawn.util[maps.OWN], "util") + as_rows(drawn.safe, "safe")
    for name, records in drawn.util.items():
        calibration += as_rows(records, name) if name else []
    for at, role in enumerate(drawing.PAIR):
        calibration += as_rows([pair[at] for pair in drawn.pairs], role)
    return {
        "calibration": calibration,
        "alignment": [renderer.row(record) for record in drawn.aligned],
        "benchmarks": [renderer.row(record) for records in drawn.scored.values() for record in records],
    }


def prepare(settings: presets.Settings) -> tuple[Path, Renderer]:
    """The model's folder and a renderer for it, after checking that model and data can be had, and saying
    which cannot and how to get them. InputError before anything is downloaded."""
    asked = registry.asked(settings.benchmarks, bool(settings.util), bool(settings.safe))
    drawing.check_reachable(settings, drawing.needed_pools(settings, asked))
    folder = models.local_folder(settings.model, settings.revision)
    models.check_folder(folder)
    config = models.read_config(folder)
    heads = config["num_hidden_layers"] * config["num_attention_heads"]
    most = max(arms.parse(arm["arm"], settings.buckets).of for arm in arms.units(settings))
    if max(settings.buckets, most) > heads:
        raise InputError(f"--buckets {max(settings.buckets, most)}: the model has {heads} heads")
    return folder, Renderer(models.load_tokenizer(folder), settings.date, settings.system)


def warn_of_length(
    stage: artifacts.Stage, settings: presets.Settings, folder: Path, rows: list[dict]
) -> None:
    """Says how many benchmark rows do not fit with their answers into the positions that the model knows."""
    asked = registry.asked(settings.benchmarks, bool(settings.util), bool(settings.safe))
    tokens = {one.name: one.new_tokens for one in asked}
    positions = models.read_config(folder).get("max_position_embeddings", 0)
    long = [row for row in rows if len(row["prompt_ids"]) + tokens[row["role"]] > positions]
    if positions and long:
        stage.warn(
            f"{len(long)} benchmark prompts and answers are longer than the model's {positions} positions"
        )


def main(settings: presets.Settings) -> None:
    own = {option: getattr(settings, option) for option in drawing.OWN_OPTION.values()}
    files = {f"{option} sha256": artifacts.sha256(path) for option, path in own.items() if path}
    uses = settings.subset(*USES) | files
    with artifacts.open_stage(settings.folder, NAME, uses) as stage:
        if stage.finished:
            return
        folder, renderer = prepare(settings)
        presets.remember(settings)
        stage.begin()
        pools = drawing.Pools(settings)
        drawn = collect(settings, pools, renderer)
        written = tables(renderer, drawn)
        for name, rows in written.items():
            stage.write(f"{name}.parquet", rows, schemas.EXAMPLES)
        standins = sorted(pool for pool, source in pools.provenance.items() if source["standin"])
        if standins:
            stage.warn(f"stand-ins, not the published sets: {', '.join(standins)}; no score on them compares")
        for one in drawn.short:
            stage.warn(f"too few rows: {one}")
        warn_of_length(stage, settings, folder, written["benchmarks"])
        counts = {name: len(rows) for name, rows in written.items()}
        counts |= Counter(row["role"] for row in written["calibration"])
        counts |= {name: len(records) for name, records in drawn.scored.items()}
        stage.say(", ".join(f"{name} {count}" for name, count in counts.items()))
        stage.finish(
            counts=counts,
            short=[one._asdict() for one in drawn.short],
            tokens={name: sum(len(row["prompt_ids"]) for row in rows) for name, rows in written.items()},
            sources=pools.provenance,
            standins=standins,
            tokenizer=models.tokenizer_sha256(folder),
            model_folder=str(folder),
        )


if __name__ == "__main__":
    cli.run(main)
