"""What a run would do: its units, the time they take and the disk they fill, from a short measured probe.

    bash run_all.sh llama --dry-run          # or: python -m stages.dry_run --preset llama
    python -m stages.dry_run --run outputs/llama        # what is left of a run that has begun

Draws and tokenizes the run's real rows (or reads those of a finished stage 01), loads the model, times a few
rows of each kind of work in the middle of the network, and scales by tokens, heads and layers. Nothing is
written. Generated answers are counted at full length, so their time is an upper bound; the probe's small
batches make it a loose one on an accelerator.
"""

import importlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import backends
from backends import models
from backends.base import Backend, Recipe, Shape
from backends.errors import InputError
from backends.neurons import GainRecipe, Selection, outer_steps
from data import benchmarks as registry
from data.examples import Example
from data.rendering import example
from stages import arms, artifacts, drawing, maps, neurons, presets, schemas

ROWS = 8
"""examples that are timed, of each kind"""
STEPS = 2
"""tuning steps that are timed, after one that is not"""
TOKENS = 32
"""new tokens that are timed"""
BYTES_PER_TOKEN = 8
"""of generated text on disk: its id and its letters, compressed"""


class Work(NamedTuple):
    """One line of the plan."""

    stage: str
    what: str
    units: int
    done: int
    seconds: float
    """for all units"""
    disk: float
    """bytes, for all units"""


class Rows(NamedTuple):
    """The run's rows as a backend sees them."""

    util: dict[str, list[dict]]
    """by map"""
    safe: list[dict]
    pairs: tuple[list[dict], list[dict]]
    """plain and attacked"""
    aligned: list[dict]
    scored: dict[str, list[dict]]


def run_rows(settings: presets.Settings) -> Rows:
    """The rows of a finished stage 01, or those it would draw."""
    if (settings.folder / "01_calibrate" / artifacts.MANIFEST).is_file():
        names = ("calibration", "alignment", "benchmarks")
        tables = {
            name: artifacts.read_input(
                settings.folder, f"01_calibrate/{name}.parquet", schemas.EXAMPLES
            ).to_pylist()
            for name in names
        }
    else:
        calibrate = importlib.import_module("stages.01_calibrate")
        _, renderer = calibrate.prepare(settings)
        drawn = calibrate.collect(settings, drawing.Pools(settings), renderer)
        for one in drawn.short:
            print(f"too few rows: {one}")
        tables = calibrate.tables(renderer, drawn)
    util = {
        name: [row for row in tables["calibration"] if row["role"] == (name or "util")]
        for name in (maps.OWN, *maps.asked(settings.maps, settings.folds))
    }
    scored: dict[str, list[dict]] = {}
    for row in tables["benchmarks"]:
        scored.setdefault(row["role"], []).append(row)
    safe, *pairs = (
        [row for row in tables["calibration"] if row["role"] == role] for role in ("safe", *drawing.PAIR)
    )
    return Rows(util, safe, tuple(pairs), tables["alignment"], scored)


def done(settings: presets.Settings, stage: str, total: int, prefixes: tuple[str, ...] = ("",)) -> int:
    """How many units of a stage are finished."""
    folder = settings.folder / stage
    if (folder / artifacts.MANIFEST).is_file():
        return total
    return sum(path.name.startswith(prefixes) for path in (folder / "parts").glob("*.parquet"))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes the second time: the first may compile."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tokens(rows: Sequence[dict], target: bool = False) -> int:
    return sum(len(row["prompt_ids"]) + (len(row["target_ids"]) if target else 0) for row in rows)


def typical(rows: Sequence[dict]) -> list[dict]:
    """A few rows spread over the lengths there are."""
    ordered = sorted(rows, key=lambda row: len(row["prompt_ids"]))
    step = max(1, len(ordered) // ROWS)
    return ordered[step // 2 :: step][:ROWS]


def examples(rows: Sequence[dict]) -> list[Example]:
    return [example(row) for row in rows]


def plan_gradients(settings: presets.Settings, backend: Backend, rows: Rows) -> Work:
    conflict = importlib.import_module("stages.02_conflict")
    some = typical(rows.safe), typical(rows.util[maps.OWN])
    count = min(map(len, some))
    blocks = conflict.units(backend.shape, settings.folds, maps.OWN)
    first = next(iter(blocks.values()))
    safe, util = (examples(each[:count]) for each in some)
    took = seconds(lambda: backend.gradient_gram(safe, util, 1, first))
    rate = took / (tokens(some[0][:count], True) + tokens(some[1][:count], True))
    each = [tokens(util, True) + tokens(rows.safe, True) for util in rows.util.values()]
    units = len(blocks) * len(rows.util)
    disk = len(rows.util) * backend.shape.layers * backend.shape.heads * (2 * settings.folds) ** 2 * 8
    what = f"gradients of {len(rows.safe)} + {len(rows.util[maps.OWN])} rows, {len(rows.util)} maps"
    return Work(
        "02_conflict", what, units, done(settings, "02_conflict", units), rate * sum(each) * len(blocks), disk
    )


def plan_neurons(settings: presets.Settings, backend: Backend, rows: Rows) -> Work:
    shape, steps = backend.shape, settings.attribution_steps
    plain, attacked = (examples(some[:1]) for some in rows.pairs)
    util = examples(rows.util[maps.OWN][:1])
    took = seconds(lambda: backend.attribute_neurons(attacked, plain, steps))
    took += seconds(lambda: backend.attribute_neurons(util, None, steps))
    count, disk = len(rows.pairs[0]), shape.layers * shape.mlp_dim * 32
    what = f"attributions of {shape.layers * shape.mlp_dim} neurons, {count} pairs"
    return Work("02_conflict", what, 2, done(settings, "02_conflict", 2, ("neurons-",)), took * count, disk)


def plan_gains(settings: presets.Settings, backend: Backend, rows: Rows) -> list[Work]:
    own = [unit for unit in arms.units(settings) if unit["optimizer"] == arms.MAML]
    tasks = neurons.tasks(rows.aligned, examples(rows.aligned))
    recipe = GainRecipe(batch=settings.batch * settings.accumulation, max_length=settings.max_length)
    found = []
    if own:
        one = Selection(((0, 0),), ())
        tuning, times = backend.tune_gains(tasks, one, recipe), []
        began = time.perf_counter()
        for _, _ in zip(range(STEPS + 1), tuning, strict=False):
            times.append(time.perf_counter() - began)
        each = (times[-1] - times[0]) / max(1, len(times) - 1) * (1 + settings.gain_inner_steps) / 2
        steps = outer_steps(tasks, one, recipe) * settings.epochs
        names = tuple(f"{unit['arm']}-{arms.MAML}-{unit['seed']}." for unit in own)
        disk = backend.shape.layers * backend.shape.mlp_dim * 4 * len(own)
        what = f"{len(own)} arms of neurons, {steps} outer steps"
        finished = done(settings, "04_align", len(own), names)
        found.append(Work("04_align", what, len(own), finished, each * steps * len(own), disk))
    return found


def plan_sweep(settings: presets.Settings, backend: Backend, rows: Rows) -> list[Work]:
    shape, middle = backend.shape, backend.shape.layers // 2
    heads = [(middle, head) for head in range(shape.heads)]
    distinct = {row["example_id"]: row for own in rows.util.values() for row in own}.values()
    chosen = [row for row in distinct if row["scoring"] == "choice"]
    written = [row for row in distinct if row["scoring"] != "choice"]
    found = []
    if chosen:
        some = typical(chosen)
        asked = examples(some)
        took = seconds(lambda: list(backend.sweep_choices(asked, heads, settings.mask)))
        layers = sum(shape.layers - layer for layer in range(shape.layers)) / (shape.layers - middle)
        all_ = took * tokens(chosen) / tokens(some) * layers
        found.append(("choices", f"next tokens of {len(chosen)} rows", all_, len(chosen) * 8))
    for part, own, new in (
        ("answers", written, settings.util_tokens),
        ("generations", rows.safe, settings.sweep_tokens),
    ):
        if own:
            some = typical(own)
            asked, timed = examples(some), min(new, TOKENS)
            took = seconds(
                lambda asked=asked, timed=timed: list(
                    backend.sweep_generations(asked, heads, timed, settings.mask)
                )
            )
            layers = sum(2 * shape.layers - layer for layer in range(shape.layers)) / (
                2 * shape.layers - middle
            )
            all_ = took * len(own) / len(some) * layers * new / timed
            found.append(
                (part, f"responses to {len(own)} rows, {new} tokens", all_, len(own) * new * BYTES_PER_TOKEN)
            )
    count = shape.layers + 1
    return [
        Work(
            "03_sensitivity",
            f"each of {shape.layers * shape.heads} heads silenced: {what}",
            count,
            done(settings, "03_sensitivity", count, (f"{part}-",)),
            time_,
            disk * shape.layers * shape.heads,
        )
        for part, what, time_, disk in found
    ]


def plan_tuning(settings: presets.Settings, backend: Backend, rows: Rows) -> list[Work]:
    shape = backend.shape
    units = [unit for unit in arms.units(settings) if unit["optimizer"] != arms.MAML]
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    size = settings.batch * settings.accumulation
    ordered = sorted(rows.aligned, key=lambda row: len(row["prompt_ids"]))
    some = [ordered[len(ordered) * at // (size * (STEPS + 1))] for at in range(size * (STEPS + 1))]
    length = settings.max_length
    read = sum(min(length, len(row["prompt_ids"]) + len(row["target_ids"])) for row in rows.aligned)
    found = []
    for optimizer in dict.fromkeys(unit["optimizer"] for unit in units):
        recipe = Recipe(
            rank=settings.rank,
            alpha=settings.alpha,
            lr=settings.lr,
            batch=settings.batch,
            accumulation=settings.accumulation,
            max_length=length,
            optimizer=optimizer,
        )
        util = None if optimizer == "sft" else examples(rows.util[maps.OWN])
        tuning, times, counted = backend.tune(examples(some), heads, recipe, util), [], []
        began = time.perf_counter()
        for record in tuning:
            times.append(time.perf_counter() - began)
            counted.append(record["tokens"])
        shutil.rmtree(tuning.adapter)
        own = [unit for unit in units if unit["optimizer"] == optimizer]
        rate = (times[-1] - times[0]) / sum(counted[1:])
        adapter = settings.rank * (shape.model_dim + shape.heads * shape.head_dim) * shape.layers * 4
        names = tuple(f"{unit['arm']}-{optimizer}-{unit['seed']}." for unit in own)
        what = f"{len(own)} arms by {optimizer}, {len(rows.aligned)} rows, {settings.epochs} epochs"
        found.append(
            Work(
                "04_align",
                what,
                len(own),
                done(settings, "04_align", len(own), names),
                rate * read * settings.epochs * len(own),
                adapter * len(own),
            )
        )
    return found


def plan_benchmarks(settings: presets.Settings, backend: Backend, rows: Rows) -> list[Work]:
    named = registry.asked(settings.benchmarks, bool(settings.util), bool(settings.safe))
    models_ = len(arms.units(settings)) + 1
    found = []
    for one in named:
        own = rows.scored[one.name]
        some = typical(own)
        asked = examples(some)
        if one.new_tokens:
            timed = min(one.new_tokens, TOKENS)
            took = seconds(lambda asked=asked, timed=timed: backend.generate(asked, timed))
            each = took * len(own) / len(some) * one.new_tokens / timed
            what = f"{one.name}: {len(own)} answers of up to {one.new_tokens} tokens"
        else:
            took = seconds(lambda asked=asked: backend.choices(asked))
            each, what = took * tokens(own) / tokens(some), f"{one.name}: {len(own)} next tokens"
        disk = sum(len(row["prompt"]) for row in own) / 3 + len(own) * one.new_tokens * BYTES_PER_TOKEN
        finished = done(settings, "05_evaluate", models_)
        if finished != models_:
            finished = len(list((settings.folder / "05_evaluate/parts").glob(f"*-{one.name}.parquet")))
        found.append(
            Work(
                "05_evaluate", f"{what}, {models_} models", models_, finished, each * models_, disk * models_
            )
        )
    return found


def duration(seconds_: float) -> str:
    """
    >>> duration(40), duration(600), duration(90000)
    ('40 s', '10.0 min', '25.0 h')
    """
    if seconds_ < 120:
        return f"{seconds_:.0f} s"
    return f"{seconds_ / 60:.1f} min" if seconds_ < 7200 else f"{seconds_ / 3600:.1f} h"


def size(bytes_: float) -> str:
    return f"{bytes_ / 2**20:.0f} MiB" if bytes_ < 2**30 else f"{bytes_ / 2**30:.1f} GiB"


def table(plan: Sequence[Work]) -> list[str]:
    """The plan as lines: a line of work each, then the sum."""
    cells = [("stage", "work", "units", "done", "time for all", "disk")]
    cells += [
        (one.stage, one.what, str(one.units), str(one.done), duration(one.seconds), size(one.disk))
        for one in plan
    ]
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    left = sum(one.seconds * (1 - one.done / one.units) for one in plan)
    disk = sum(one.disk for one in plan)
    return [
        *lines,
        f"left: {duration(left)} on one such device, spread evenly by --shard; {size(disk)} of disk in all",
    ]


def main(settings: presets.Settings) -> None:
    rows = run_rows(settings)
    folder = models.local_folder(settings.model, settings.revision)
    backend = backends.load(
        settings.backend,
        folder,
        dtype=settings.dtype,
        device=settings.device,
        model_parallel=settings.model_parallel,
    )
    shape: Shape = backend.shape
    print(
        f"{settings.model}: {shape.layers} layers of {shape.heads} heads, {backend.name}, {backend.dtype} on "
        f"{backend.device}; run folder {settings.folder}"
    )
    plan = [plan_gradients(settings, backend, rows)]
    plan += [plan_neurons(settings, backend, rows)] if settings.pairs else []
    plan += plan_sweep(settings, backend, rows)
    plan += plan_tuning(settings, backend, rows)
    plan += plan_gains(settings, backend, rows)
    plan += plan_benchmarks(settings, backend, rows)
    print("\n".join(table(plan)))
    place = next(
        path for path in (settings.folder, *settings.folder.resolve().parents) if Path(path).exists()
    )
    free = shutil.disk_usage(place).free
    if sum(one.disk for one in plan) > free:
        print(f"warning: {place} has {size(free)} free")


if __name__ == "__main__":
    try:
        main(presets.parse())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
