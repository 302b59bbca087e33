"""Stage 04: budget-matched sparse tuning, every arm x optimizer x seed (§3.5, §4.2, App. B).

    python -m stages.04_align --run outputs/smollm --seeds 21 42 84

An arm is a set of heads: all (`full`), one bucket of the conflict map (`bucket1` risky … `bucketM` safe),
as many heads drawn at random, or another selection (stages/method/arms.py). Only the location of what is
trained differs; rows, order, steps and LoRA's start do not. `pcgrad` projects against gradients of D_util
(§4.2). NeuronTune's arms tune gains of MLP neurons on the same rows, by meta-learning over families of
attacks (stages/method/neurons.py).

With --rediagnose N the arms bucketM-rediagnosed draw their bucket anew every N steps, by the map by gradients
of the model as it is then (backends.base.Redraw says how rows leave and enter).

Reads alignment.parquet, calibration.parquet, the maps and neurons.parquet; writes
adapters/<arm>-<optimizer>-<seed>/ (PEFT's format), training.parquet (a row a step) and arms.parquet. Each arm
x optimizer x seed is a unit.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from backends.base import Example, Head, Selection, Shape, Task, Tuning
from backends.core import seeds
from backends.core.schedules import outer_steps
from data.rendering import example
from stages.method.arms import ARM_FIELDS, ArmRun, select_heads
from stages.method.heads import COLUMN, HeadMap, read_map
from stages.method.neurons import choose_neurons
from stages.run import cli
from stages.run.adapters import drawn_heads, gain_recipe, lora_recipe, redraw_of, run_tuning, tasks_of
from stages.run.diagnosis import calibration_examples
from stages.run.job import Job, Stage, Units
from stages.run.schemas import ALIGNMENT, ARMS, CALIBRATION, HEADS, NEURONS, OWN_MAP, TRAINING

ADAPTER_FILES = ("adapters/*/adapter_config.json", "adapters/*/adapter_model.safetensors")


def units(job: Job) -> Units:
    return {run.name: run for run in job.settings.arm_runs}


def heads_of(job: Job, run: ArmRun, maps: Mapping[str, HeadMap]) -> list[Head]:
    """What an arm of heads tunes."""
    generator = seeds.stream(run.seed, "arm", "random heads")
    return select_heads(run.arm, maps[run.arm.map], job.settings.map.buckets, generator)


def neurons_of(job: Job, run: ArmRun) -> Selection:
    """What an arm of neurons tunes."""
    scored, layers = job.read(NEURONS), job.shape.layers
    ranks = (scored[f"{side}_rank"].to_numpy().reshape(layers, -1) for side in ("safety", "utility"))
    generator = seeds.stream(run.seed, "arm", "random neurons")
    return Selection(*choose_neurons(run.arm, *ranks, generator))


def head_maps(job: Job) -> dict[str, HeadMap]:
    """Every map of the run by name."""
    return {spec.name: read_map(job.read(HEADS, spec.name)) for spec in job.settings.maps}


def compute(job: Job, pending: Units) -> None:
    rows, maps = job.read(ALIGNMENT), head_maps(job)
    examples = [example(row) for row in rows.to_dict("records")]
    util = calibration_examples(job, OWN_MAP)
    tasks = tasks_of(rows, examples)
    for run in pending.values():
        if run.arm.of_neurons:
            tune_gains(job, run, tasks)
        else:
            tune_heads(job, run, heads_of(job, run, maps), examples, util)


def tune_heads(
    job: Job, run: ArmRun, heads: list[Head], examples: list[Example], util: list[Example]
) -> None:
    """LoRA on the rows of W_q of an arm's heads."""
    recipe = lora_recipe(job.settings, run)
    reference = None if run.optimizer == "sft" else util
    redraw = redraw_of(job, run) if run.arm.rediagnosed else None
    steps = -(-len(examples) // (recipe.batch * recipe.accumulation)) * recipe.epochs

    def start(folder: Path, checkpoint: Path) -> Tuning:
        own = replace(recipe, folder=folder, checkpoint=checkpoint)
        return job.backend.tune(examples, heads, own, reference, redraw)

    run_tuning(job, run, f"{len(heads)} heads", steps, start)


def tune_gains(job: Job, run: ArmRun, tasks: list[Task]) -> None:
    """Gains of an arm's neurons."""
    recipe, neurons = gain_recipe(job.settings, run), neurons_of(job, run)
    count = f"{len(neurons.safety)} safety and {len(neurons.utility)} utility neurons"
    steps = outer_steps(tasks, neurons, recipe)

    def start(folder: Path, checkpoint: Path) -> Tuning:
        return job.backend.tune_gains(tasks, neurons, replace(recipe, folder=folder, checkpoint=checkpoint))

    run_tuning(job, run, count, steps, start)


def arm_row(job: Job, run: ArmRun, maps: Mapping[str, HeadMap], draws: list[list[Head]]) -> dict:
    """An arm in arms.parquet. The heads of a re-diagnosed one are all that it ever drew.

    Args:
        draws: `drawn_heads`.
    """
    arm = {name: value for name, value in asdict(run.arm).items() if name in ARM_FIELDS}
    row = dict.fromkeys(ARMS.schema.names) | run.labels | arm | {"adapter": f"adapters/{run.name}"}
    if run.arm.of_neurons:
        chosen = neurons_of(job, run)
        neurons = [*chosen.safety, *chosen.utility]
        return row | {
            "layers": [],
            "heads": [],
            "n_heads": 0,
            "n_layers": len({layer for layer, _ in neurons}),
            "safety_neurons": [list(neuron) for neuron in chosen.safety],
            "utility_neurons": [list(neuron) for neuron in chosen.utility],
            "n_neurons": len(neurons),
            "trainable_parameters": len(neurons),
        }
    heads, head_map = heads_of(job, run, maps), maps[run.arm.map]
    if draws:
        heads = sorted({head for drawn in draws for head in drawn})
        entered = [len(set(new) - set(old)) for old, new in pairwise(draws)]
        row |= {"entered": entered}
    at = tuple(np.array(heads).T)
    means = {ranking: float(head_map.by(ranking)[at].mean()) for ranking in COLUMN}
    return row | {
        "layers": [layer for layer, _ in heads],
        "heads": [head for _, head in heads],
        "n_heads": len(heads),
        "n_layers": len({layer for layer, _ in heads}),
        "safety_neurons": [],
        "utility_neurons": [],
        "n_neurons": 0,
        "trainable_parameters": trainable_parameters(heads, job.shape, job.settings.tuning.rank),
        "ranked_mean": means[run.arm.ranked_by],
        **{f"mean_{COLUMN[ranking]}": mean for ranking, mean in means.items()},
    }


def trainable_parameters(heads: list[Head], shape: Shape, rank: int) -> int:
    """What an arm trains: A of every layer it touches (a layer's heads share it), and its heads' rows of
    B."""
    return len({layer for layer, _ in heads}) * rank * shape.model_dim + len(heads) * shape.head_dim * rank


def join(job: Job) -> dict:
    """Writes what each arm tunes, and every step of it."""
    runs, maps = job.settings.arm_runs, head_maps(job)
    training = job.outputs(TRAINING, (run.name for run in runs), TRAINING.schema)
    job.write(TRAINING, training)
    arms = [arm_row(job, run, maps, drawn_heads(training, run)) for run in runs]
    job.write(ARMS, pd.DataFrame(arms))
    return {"arms": len(runs), "steps": len(training), "tokens": int(training["tokens"].sum())}


STAGE = Stage(
    name="04_align",
    rests_on=("model", "data", "map", "tuning"),
    reads=(ALIGNMENT, CALIBRATION, HEADS, NEURONS),
    writes=(ARMS, TRAINING),
    units=units,
    compute=compute,
    join=join,
    few_rows=True,
    also_writes=ADAPTER_FILES,
    needed_gib=0.5,
)


if __name__ == "__main__":
    cli.run(STAGE)
