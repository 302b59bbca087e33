"""Stage 03: the ablation sweep and the conflict map: H_gen, H_safe, S(h), C(h), buckets (§3.3-3.5, Eq. 3-6).

    python -m stages.03_sensitivity --run outputs/smollm

With --sensitivity counted, as in the paper, every head is ablated once: the utility rows are answered again
(next token; worked problems in writing), and the harmful prompts (generation, keyword judge). From the same
heads, counted or graded, also how likely the right answers are (log p) and a refusal is (log-odds that one
begins); nothing is decoded for it.
With gradient nothing is ablated: stage 02 has the gradients in the heads' gates.

Reads calibration.parquet and gradients.parquet. Writes sweep_choices, sweep_generations, sweep_answers (where
answers are written) and sweep_graded.parquet, every head x example (null layer and head: the clean model);
heads.parquet, the map; and reliability.parquet, whether the map of one half of the rows is that of the other.
Every other map (--maps) has its own heads-<map>.parquet and shares the sweep: a row that two maps have is
answered once. A layer is a unit. With another version of the judge a finished sweep is judged again, and
nothing is generated.
"""

import numpy as np
import pandas as pd

from backends.core import seeds
from data import refusal_judge
from stages.method.conflict_map import change_columns, map_columns, map_notes
from stages.method.heads import Sensitivity
from stages.method.reliability import doubt_of, in_words, map_reliability
from stages.method.uncertainty import Effects, Resampling
from stages.run import cli, judging, unread
from stages.run.effects import base_rates, effects_of, read_gradients
from stages.run.job import Job, Stage, Units
from stages.run.schemas import (
    CALIBRATION,
    GRADIENTS,
    HEADS,
    OWN_MAP,
    RELIABILITY,
    SWEEP_ANSWERS,
    SWEEP_CHOICES,
    SWEEP_GENERATIONS,
    SWEEP_GRADED,
)
from stages.run.sweep import OUTPUTS, TABLES, part_units, sweep, swept_rows

FLOOR, CEILING = 0.05, 0.95


def parts_of(job: Job) -> dict[str, pd.DataFrame]:
    """The rows of each part of the sweep."""
    names = [spec.name for spec in job.settings.maps]
    return swept_rows(job.read(CALIBRATION), names, job.settings.map.sensitivity)


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
    if "generations" in judged:
        unread.warn_of_sweep(job, judged["generations"]["text"])
    notes, repeats = {}, []
    for spec in job.settings.maps:
        gradients = read_gradients(job, spec.name)
        effects = effects_of(job, spec.name, judged, gradients)
        notes[spec.name] = join_map(job, spec.name, gradients["gram"], effects)
        if "counted" in effects:
            notes[spec.name]["base"] = base_rates(job, spec.name, judged)
            say_base(job, spec.name, notes[spec.name]["base"])
        repeats += reliability_rows(job, spec.name, gradients["gram"], effects)
    job.write(RELIABILITY, pd.DataFrame(repeats))
    if parts:
        seconds = ", ".join(f"{part} {seconds_per_head(job, part):.2f} s" for part in parts)
        job.say(f"a head took: {seconds} (App. F.5: 7 s and 60 s for 100 rows of an 8B model on an H800)")
    own = notes.pop(OWN_MAP)
    return own | ({"maps": notes} if notes else {})


def join_map(job: Job, map_name: str, gram: np.ndarray, effects: dict[Sensitivity, Effects]) -> dict:
    """Writes a map and says how much its ranks rest on."""
    settings = job.settings
    columns = map_columns(
        gram,
        effects[settings.map.sensitivity],
        settings.map.variant,
        settings.map.buckets,
        Resampling(seeds.stream(settings.data.seed, "map", "resamples", map_name), settings.map.resamples),
    )
    frame = pd.DataFrame(columns | change_columns(effects))
    job.write(HEADS, frame.reindex(columns=HEADS.schema.names), map_name)
    return map_notes(columns)


def say_base(job: Job, map_name: str, base: dict[str, float]) -> None:
    """Warns where accuracy or refusal rate make a map of ties."""
    label = "" if map_name == OWN_MAP else f"map {map_name}: "
    for kind, rate in base.items():
        if not FLOOR <= rate <= CEILING and (kind == "accuracy" or map_name == OWN_MAP):
            job.warn(f"{label}base {kind} {rate:.2f} is at its floor or ceiling: a map of ties is no map")
    job.say(f"{label}base accuracy {base['accuracy']:.3f}, refusal rate {base['refusal_rate']:.3f}")


def reliability_rows(
    job: Job, map_name: str, gram: np.ndarray, effects: dict[Sensitivity, Effects]
) -> list[dict]:
    """Whether a map repeats itself, by every kind of outcome; warns where the one that is used does not."""
    settings, found = job.settings, []
    label = "map" if map_name == OWN_MAP else f"map {map_name}"
    for kind, own in effects.items():
        generator = seeds.stream(settings.data.seed, "map", "halves", map_name, kind)
        repeats = map_reliability(gram, own, settings.map.variant, settings.map.buckets, generator)
        labels = {"map": map_name, "sensitivity": kind}
        labels |= {"rows_util": own.util.shape[-1], "rows_safe": own.safe.shape[-1]}
        found += [labels | each._asdict() for each in repeats]
        job.say(f"{label}, {kind}: {in_words(repeats)}")
        if kind == settings.map.sensitivity and (doubt := doubt_of(repeats)):
            job.warn(f"{label}: {doubt}")
    return found


def seconds_per_head(job: Job, part: str) -> float:
    """What ablating a head took on average (App. F.5)."""
    spent = [job.info[unit].get("seconds", 0.0) for unit in part_units(part, job.shape.layers)]
    return sum(spent) / (job.shape.layers * job.shape.heads)


STAGE = Stage(
    name="03_sensitivity",
    rests_on=("model", "data", "map"),
    reads=(CALIBRATION, GRADIENTS),
    writes=(SWEEP_CHOICES, SWEEP_ANSWERS, SWEEP_GENERATIONS, SWEEP_GRADED, HEADS, RELIABILITY),
    units=units,
    compute=compute,
    join=join,
    judged_by=lambda settings: {"judge": refusal_judge.KEYWORD_JUDGE_VERSION},
)


if __name__ == "__main__":
    cli.run(STAGE)
