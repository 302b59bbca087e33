"""Stage 03: the ablation sweep and the conflict map: H_gen, H_safe, S(h), C(h), buckets (§3.3-3.5, Eq. 3-6).

    python -m stages.03_sensitivity --run outputs/smollm

Every head is ablated once; the utility rows are answered again (next token; worked problems in writing) and
the harmful prompts (generation, keyword judge). Reads calibration.parquet and gradients.parquet; writes
sweep_choices.parquet, sweep_generations.parquet and, where answers are written, sweep_answers.parquet (every
head x example; null layer and head: the clean model) and heads.parquet, the map. Every other map (--maps) has
its own heads-<map>.parquet and shares the sweep: a row that two maps have is answered once. A layer is a
unit. With another version of the judge a finished sweep is judged again, and nothing is generated.
"""

import numpy as np
import pandas as pd

from backends.core import seeds
from backends.core.errors import InputError
from data import refusal_judge
from stages.method.conflict_map import map_columns, map_notes
from stages.method.uncertainty import Outcomes, Resampling
from stages.run import cli, judging
from stages.run.job import Job, Stage, Units
from stages.run.schemas import (
    CALIBRATION,
    GRADIENTS,
    HEADS,
    OWN_MAP,
    SWEEP_ANSWERS,
    SWEEP_CHOICES,
    SWEEP_GENERATIONS,
)
from stages.run.sweep import OUTPUTS, TABLES, part_units, sweep, swept_rows

FLOOR, CEILING = 0.05, 0.95


def parts_of(job: Job) -> dict[str, pd.DataFrame]:
    """The rows of each part of the sweep."""
    return swept_rows(job.read(CALIBRATION), [spec.name for spec in job.settings.maps])


def units(job: Job) -> Units:
    if job.judging_again:
        return {}
    layers = job.shape.layers
    return {unit: work for part in parts_of(job) for unit, work in part_units(part, layers).items()}


def compute(job: Job, pending: Units) -> None:
    shape, rows = job.shape, parts_of(job)
    counts = ", ".join(f"{len(own)} {part}" for part, own in rows.items())
    job.say(f"ablating each of {shape.layers * shape.heads} heads: {counts}")
    for part, own in rows.items():
        layers = [work.layer for work in pending.values() if work.part == part]
        if layers:
            sweep(job, part, own, layers)


def join(job: Job) -> dict:
    """Judges the sweep, and makes each map of it."""
    rows, judged = job.read(CALIBRATION), {}
    parts = list(parts_of(job))
    for part in parts:
        outputs = job.outputs(TABLES[part], part_units(part, job.shape.layers), OUTPUTS[part])
        judged[part] = judging.judge_sweep(part, outputs, rows)
        job.write(TABLES[part], judged[part])
    heads = (job.shape.layers, job.shape.heads)
    safe = rows["example_id"][rows["split"] == "safe"]
    refused = judging.outcomes([judged.pop("generations")], "refused", safe, heads)
    notes = {}
    for spec in job.settings.maps:
        util = rows["example_id"][rows["split"] == spec.name]
        correct = judging.outcomes(list(judged.values()), "correct", util, heads)
        notes[spec.name] = join_map(job, spec.name, correct, refused)
    seconds = ", ".join(f"{part} {seconds_per_head(job, part):.2f} s" for part in parts)
    job.say(f"a head took: {seconds} (App. F.5: 7 s and 60 s for 100 rows of an 8B model on an H800)")
    own = notes.pop(OWN_MAP)
    return own | ({"maps": notes} if notes else {})


def join_map(job: Job, map_name: str, correct: Outcomes, refused: Outcomes) -> dict:
    """Writes a map and says how much its ranks rest on."""
    settings, gradients = job.settings, job.read(GRADIENTS, map_name)
    shape = refused.ablated.shape[:2]
    if len(gradients) != shape[0] * shape[1]:
        file = GRADIENTS.path(map_name)
        raise InputError(f"{file} has {len(gradients)} heads, the model another number: other --run")
    generator = seeds.stream(settings.data.seed, "map", "resamples", map_name)
    columns = map_columns(
        gram_of(gradients, shape),
        correct,
        refused,
        settings.map.variant,
        settings.map.buckets,
        Resampling(generator, settings.map.resamples),
    )
    job.write(HEADS, pd.DataFrame(columns), map_name)
    notes = map_notes(columns, correct, refused)
    label, base = "" if map_name == OWN_MAP else f"map {map_name}: ", notes["base"]
    for kind, rate in base.items():
        if not FLOOR <= rate <= CEILING and (kind == "accuracy" or map_name == OWN_MAP):
            job.warn(f"{label}base {kind} {rate:.2f} is at its floor or ceiling: a map of ties is no map")
    job.say(
        f"{label}base accuracy {base['accuracy']:.3f}, refusal rate {base['refusal_rate']:.3f}; ranks "
        f"rest on {notes['ranks_rest_on']}"
    )
    return notes


def gram_of(gradients: pd.DataFrame, shape: tuple[int, int]) -> np.ndarray:
    """Gram matrices [L, H, 2F, 2F] of gradients.parquet."""
    matrices = np.stack(gradients["gram"])
    side = int(np.sqrt(matrices.shape[1]))
    return matrices.reshape(*shape, side, side)


def seconds_per_head(job: Job, part: str) -> float:
    """What ablating a head took on average (App. F.5)."""
    spent = [job.info[unit].get("seconds", 0.0) for unit in part_units(part, job.shape.layers)]
    return sum(spent) / (job.shape.layers * job.shape.heads)


STAGE = Stage(
    name="03_sensitivity",
    rests_on=("model", "data", "map"),
    reads=(CALIBRATION, GRADIENTS),
    writes=(SWEEP_CHOICES, SWEEP_ANSWERS, SWEEP_GENERATIONS, HEADS),
    units=units,
    compute=compute,
    join=join,
    judged_by=lambda settings: {"judge": refusal_judge.KEYWORD_JUDGE_VERSION},
)


if __name__ == "__main__":
    cli.run(STAGE)
