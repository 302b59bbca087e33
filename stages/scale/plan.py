"""What a run would do: its units, the time they take and the disk they fill, from a short measured probe.

    bash run_all.sh llama --dry-run          # or: python -m stages.scale.plan --preset llama
    python -m stages.scale.plan --run outputs/llama        # what is pending of a run that has begun

Draws and tokenizes the run's real rows (or reads those of a finished stage 01), loads the model, times a few
rows of each kind of work in the middle of the network, and scales by tokens, heads and layers. Nothing is
written. Generated answers are counted at full length, so their time is an upper bound; the probe's small
batches make it a loose one on an accelerator.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

import backends
from backends import models
from backends.base import Backend, Example, Selection
from backends.core.schedules import outer_steps
from backends.core.seeds import batch_order
from data.rendering import example
from data.sampling import PAIR
from stages.method.arms import MAML, ArmRun
from stages.run import guard, presets, threads
from stages.run.adapters import gain_recipe, lora_recipe, tasks_of
from stages.run.diagnosis import layer_blocks
from stages.run.drift import Diagnosis
from stages.run.job import Job
from stages.run.pipeline import WITH_UNITS, declaration, planned_run
from stages.run.runner import unit_states
from stages.run.schemas import ALIGNMENT, BENCHMARKS, CALIBRATION, OWN_MAP, Table
from stages.run.settings import Settings
from stages.run.store import RunFolder
from stages.run.sweep import new_tokens, relative_cost, swept_rows

ROWS = 8
"""examples that are timed, of each kind"""
STEPS = 2
"""tuning steps that are timed, after one that is not"""
TOKENS = 32
"""new tokens that are timed"""
BYTES_PER_TOKEN = 8
"""of generated text on disk: its id and its letters, compressed"""


class Work(NamedTuple):
    """A line of the plan: the units of a kind."""

    stage: str
    what: str
    units: int
    done: int
    seconds: float  # for all
    disk: float  # bytes


Estimate = tuple[str, float, float]
"""what all units of a kind do, in words, their seconds, and bytes of disk"""


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes the second time: the first may compile."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_steps(records: Iterable[dict]) -> tuple[float, float]:
    """Seconds a tuning step after the first, which may compile, and the tokens that a step reads."""
    times, tokens = [], []
    for record in records:
        times.append(time.perf_counter())
        tokens.append(record["tokens"])
    steps = max(1, len(times) - 1)
    return (times[-1] - times[0]) / steps, sum(tokens[1:]) / steps


def rows_of(job: Job, table: Table, split: str | None = None) -> list[dict]:
    frame = job.read(table)
    return (frame if split is None else frame[frame["split"] == split]).to_dict("records")


def tokens_of(rows: Sequence[dict], target: bool = False) -> int:
    return sum(len(row["prompt_ids"]) + (len(row["target_ids"]) if target else 0) for row in rows)


def typical(rows: Sequence[dict], count: int = ROWS) -> list[dict]:
    """A few rows spread over the lengths there are."""
    ordered = sorted(rows, key=lambda row: len(row["prompt_ids"]))
    return [ordered[int((at + 0.5) * len(ordered) / count)] for at in range(count)]


def examples(rows: Iterable[dict]) -> list[Example]:
    return [example(row) for row in rows]


# Estimates, each of all units of a kind


def gradients(job: Job, backend: Backend, units: Sequence) -> Estimate:
    safe = rows_of(job, CALIBRATION, "safe")
    util = {spec.name: rows_of(job, CALIBRATION, spec.name) for spec in job.settings.maps}
    some = [typical(rows) for rows in (safe, util[OWN_MAP])]
    took = seconds_of(lambda: backend.gradient_gram(*map(examples, some), 1, units[0].layers))
    rate = took / sum(tokens_of(rows, target=True) for rows in some)
    # D_safe is differentiated once for the units of the same layers.
    tokens = len({unit.layers for unit in units}) * tokens_of(safe, target=True)
    tokens += sum(tokens_of(util[unit.map_name], target=True) for unit in units)
    what = f"gradients of {len(safe)} + {len(util[OWN_MAP])} rows, {len(util)} maps"
    matrix = (2 * job.settings.data.folds) ** 2 * 8
    return (what, rate * tokens, len(util) * job.shape.layers * job.shape.heads * matrix)


def diagnosis_seconds(job: Job, backend: Backend, map_name: str) -> float:
    """Of the gradients of a map, with an adapter in place or without."""
    rows = [rows_of(job, CALIBRATION, split) for split in ("safe", map_name)]
    some, blocks = [typical(own) for own in rows], layer_blocks(job.shape, job.settings.data.folds)
    took = seconds_of(lambda: backend.gradient_gram(*map(examples, some), 1, blocks[0]))
    timed, read = (sum(tokens_of(own, target=True) for own in each) for each in (some, rows))
    return took / timed * read * len(blocks)


def attributions(job: Job, backend: Backend, units: Sequence) -> Estimate:
    plain, attacked, util = (rows_of(job, CALIBRATION, split) for split in (*PAIR, OWN_MAP))
    neurons, steps = job.shape.layers * job.shape.mlp_dim, job.settings.map.attribution_steps
    attribute = backend.attribute_neurons
    took = seconds_of(lambda: attribute(examples(attacked[:1]), examples(plain[:1]), steps))
    took += seconds_of(lambda: attribute(examples(util[:1]), None, steps))
    what = f"attributions of {neurons} neurons, {len(plain)} pairs"
    return what, took * len(plain), neurons * 32


def sweep(job: Job, backend: Backend, units: Sequence) -> Estimate:
    part, shape, mask = units[0].part, job.shape, job.settings.map.mask
    names, sensitivity = [spec.name for spec in job.settings.maps], job.settings.map.sensitivity
    rows = swept_rows(job.read(CALIBRATION), names, sensitivity)[part]
    rows, middle = rows.to_dict("records"), shape.layers // 2
    heads = [(middle, head) for head in range(shape.heads)]
    some = examples(typical(rows))
    if part == "choices":
        what, disk = f"next tokens of {len(rows)} rows", 8
        took = seconds_of(lambda: list(backend.sweep_choices(some, heads, mask)))
        more = tokens_of(rows) / tokens_of(typical(rows))
    elif part == "graded":
        what, disk = f"graded outcomes of {len(rows)} rows", 8
        took = seconds_of(lambda: list(backend.sweep_grades(some, heads, mask)))
        more = tokens_of(rows, target=True) / tokens_of(typical(rows), target=True)
    else:
        new = new_tokens(job, part)
        timed = min(new, TOKENS)
        what, disk = f"responses to {len(rows)} rows, {new} tokens", new * BYTES_PER_TOKEN
        took = seconds_of(lambda: list(backend.sweep_generations(some, heads, timed, mask)))
        more = len(rows) / len(some) * new / timed
    costs = [relative_cost(part, layer, shape.layers) for layer in range(shape.layers)]
    count = shape.layers * shape.heads
    what = f"each of {count} heads ablated: {what}"
    return what, took * more * sum(costs) / costs[middle], len(rows) * disk * count


def adapters(job: Job, backend: Backend, runs: Sequence[ArmRun]) -> Estimate:
    """Arms of heads by one optimizer, timed with all heads."""
    recipe, shape, rows = lora_recipe(job.settings, runs[0]), job.shape, rows_of(job, ALIGNMENT)
    some = examples(typical(rows, recipe.batch * recipe.accumulation * (STEPS + 1)))
    util = None if recipe.optimizer == "sft" else examples(rows_of(job, CALIBRATION, OWN_MAP))
    tuning = backend.tune(some, list(np.ndindex(shape.layers, shape.heads)), recipe, util)
    seconds, tokens = time_steps(islice(tuning, STEPS + 1))
    read = sum(min(recipe.max_length, tokens_of([row], target=True)) for row in rows) * recipe.epochs
    adapter = recipe.rank * (shape.model_dim + shape.heads * shape.head_dim) * shape.layers * 4
    what = f"{len(runs)} arms by {recipe.optimizer}, {len(rows)} rows, {recipe.epochs} epochs"
    return what, seconds / tokens * read * len(runs), adapter * len(runs)


def rediagnosed(job: Job, backend: Backend, runs: Sequence[ArmRun]) -> Estimate:
    """Arms whose bucket is drawn anew."""
    recipe, every = lora_recipe(job.settings, runs[0]), job.settings.tuning.rediagnose
    what, seconds, disk = adapters(job, backend, runs)
    steps = len(batch_order(len(job.read(ALIGNMENT)), recipe))
    draws, maps = (steps - 1) // every, {run.arm.map for run in runs}
    took = {name: diagnosis_seconds(job, backend, name) for name in maps}
    seconds += draws * sum(took[run.arm.map] for run in runs)
    return f"{what}, drawn anew {draws} times", seconds, disk


def gains(job: Job, backend: Backend, runs: Sequence[ArmRun]) -> Estimate:
    """Arms of neurons, timed with one."""
    recipe, rows = gain_recipe(job.settings, runs[0]), job.read(ALIGNMENT)
    tasks, neuron = tasks_of(rows, examples(rows.to_dict("records"))), Selection(((0, 0),), ())
    seconds, _ = time_steps(islice(backend.tune_gains(tasks, neuron, recipe), STEPS + 1))
    steps, disk = outer_steps(tasks, neuron, recipe), job.shape.layers * job.shape.mlp_dim * 4
    what = f"{len(runs)} arms of neurons, {steps} outer steps"
    return what, seconds * steps * len(runs), disk * len(runs)


def answers(job: Job, backend: Backend, units: Sequence) -> Estimate:
    """One benchmark, by the base model."""
    name, new = units[0].benchmark.name, units[0].benchmark.new_tokens
    rows = rows_of(job, BENCHMARKS, name)
    some, timed = typical(rows), min(new, TOKENS)
    if new:
        what = f"{name}: {len(rows)} answers of up to {new} tokens"
        seconds = seconds_of(lambda: backend.generate(examples(some), timed))
        seconds *= len(rows) / len(some) * new / timed
    else:
        what = f"{name}: {len(rows)} next tokens"
        seconds = seconds_of(lambda: backend.choices(examples(some)))
        seconds *= tokens_of(rows) / tokens_of(some)
    disk = sum(len(row["prompt"]) for row in rows) / 3 + len(rows) * new * BYTES_PER_TOKEN
    return f"{what}, {len(units)} models", seconds * len(units), disk * len(units)


def drifts(job: Job, backend: Backend, units: Sequence) -> Estimate:
    """The map of every tuned model."""
    count = len(job.settings.arm_runs)
    seconds, heads = diagnosis_seconds(job, backend, OWN_MAP), job.shape.layers * job.shape.heads
    return f"drift: maps of {count} tuned models", seconds * count, count * heads * 9 * 8


def classifications(job: Job, backend: Backend, units: Sequence) -> Estimate:
    """By another model, which is not loaded for a plan."""
    return f"{job.settings.evaluation.judge}'s words (time not measured)", 0.0, 0.0


def kind_of(stage: str, unit) -> tuple[Callable[[Job, Backend, Sequence], Estimate], str | None]:
    """What estimates a unit of a stage, and the label of those that are estimated together with it."""
    if stage == "02_conflict":
        return (attributions if hasattr(unit, "side") else gradients), None
    if stage == "03_sensitivity":
        return sweep, unit.part
    if stage == "04_align":
        tuned = rediagnosed if unit.arm.rediagnosed else adapters
        return (gains if unit.optimizer == MAML else tuned), unit.optimizer
    if isinstance(unit, Diagnosis):
        return drifts, None
    return (answers, unit.benchmark.name) if hasattr(unit, "benchmark") else (classifications, None)


def plan(settings: Settings, run: RunFolder, backend: Backend) -> list[Work]:
    """The work of every stage that has units."""
    works = []
    for name in WITH_UNITS:
        job = Job(declaration(name), settings, run)
        units, states = job.stage.units(job), unit_states(job.stage, settings, run)
        count = min(threads.side_by_side(job), len(units)) or 1
        kinds: dict[tuple, list[str]] = {}
        for unit, value in units.items():
            kinds.setdefault(kind_of(name, value), []).append(unit)
        for (estimate, _), own in kinds.items():
            done = sum(states[unit] for unit in own)
            with threads.threads_of(job):
                what, seconds, disk = estimate(job, backend, [units[unit] for unit in own])
            works.append(Work(name, what, len(own), done, seconds / count, disk))
    return works


def duration(seconds: float) -> str:
    """
    >>> duration(40), duration(600), duration(90000)
    ('40 s', '10.0 min', '25.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def report(works: Sequence[Work], free: int) -> str:
    """The plan as a table, then what is pending; a warning where less disk is `free`."""
    rows = [(*work[:4], duration(work.seconds), size(work.disk)) for work in works]
    headers = ("stage", "work", "units", "done", "time for all", "disk")
    align = ("left", "left", *["right"] * 4)
    pending = sum(work.seconds * (1 - work.done / work.units) for work in works)
    disk = sum(work.disk for work in works)
    text = tabulate(rows, headers=headers, tablefmt="plain", colalign=align)
    text += f"\npending: {duration(pending)} on one such device, spread evenly by --shard; "
    text += f"{size(disk)} of disk in all"
    return text + (f"\nwarning: {size(free)} are free" if disk > free else "")


def main(settings: Settings) -> None:
    run = planned_run(settings)
    chosen, place = settings.model, settings.run
    backend = backends.load(
        chosen.backend,
        models.local_folder(chosen.model, chosen.revision),
        dtype=chosen.dtype,
        device=place.device,
        model_parallel=place.model_parallel,
        quantize=chosen.quantize,
    )
    print(
        f"{chosen.model}: {backend.shape.layers} layers of {backend.shape.heads} heads, {backend.name}, "
        f"{backend.dtype} on {backend.device}; run folder {settings.folder}"
    )
    folder = settings.folder.resolve()
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    print(report(plan(settings, run, backend), shutil.disk_usage(disk).free))


if __name__ == "__main__":
    guard.guarded(lambda: main(presets.parse()))
