"""The sweep of stage 03: its units, and how one part of it runs over layers."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from backends.base import Example, Head
from backends.core.progress import TIME_LEFT, progress
from data.rendering import example
from stages.method.heads import Sensitivity
from stages.run.job import Job
from stages.run.schemas import (
    PREDICTIONS,
    SWEEP_ANSWERS,
    SWEEP_CHOICES,
    SWEEP_GENERATIONS,
    SWEEP_GRADED,
    TEXTS,
)

TABLES = {
    "choices": SWEEP_CHOICES,
    "answers": SWEEP_ANSWERS,
    "generations": SWEEP_GENERATIONS,
    "graded": SWEEP_GRADED,
}
"""part of the sweep -> its table: next tokens of utility rows, their answers in writing, responses; and the
graded outcomes of all rows"""
OUTPUTS = {"choices": PREDICTIONS, "answers": TEXTS, "generations": TEXTS, "graded": SWEEP_GRADED.schema}
"""part -> columns of a unit"""


@dataclass(frozen=True)
class Ablation:
    """A unit: one part of the sweep with each head of a layer ablated; layer None: with none."""

    part: str
    layer: int | None

    @property
    def unit(self) -> str:
        return f"{self.part}-{'clean' if self.layer is None else f'layer{self.layer:03d}'}"


def part_units(part: str, layers: int) -> dict[str, Ablation]:
    """The units of a part, the clean model first."""
    return {work.unit: work for work in (Ablation(part, layer) for layer in (None, *range(layers)))}


def swept_rows(
    calibration: pd.DataFrame, map_names: Sequence[str], sensitivity: Sensitivity
) -> dict[str, pd.DataFrame]:
    """The calibration rows of each part that has any; a row that several maps have stands once. Gradients
    need no sweep."""
    util = calibration[calibration["split"].isin(map_names)].drop_duplicates("example_id")
    chosen = util["scoring"] == "choice"
    safe = calibration[calibration["split"] == "safe"]
    counted = {"choices": util[chosen], "answers": util[~chosen], "generations": safe}
    graded = {"graded": pd.concat([util, safe])}
    parts = {"counted": counted | graded, "graded": graded, "gradient": {}}[sensitivity]
    return {part: own for part, own in parts.items() if len(own)}


def sweep(job: Job, part: str, rows: pd.DataFrame, layers: list[int | None]) -> None:
    """Runs one part of the sweep over layers (None: the clean model) and keeps each."""
    examples, shape = [example(row) for row in rows.to_dict("records")], job.shape
    decode = cache(lambda tokens: job.tokenizer.decode(tokens, skip_special_tokens=True))

    def frame(head: tuple, outcome: Sequence) -> pd.DataFrame:
        columns = {"layer": head[0], "head": head[1], "example_id": rows["example_id"].to_numpy()}
        if part == "choices":
            return pd.DataFrame(columns | {"prediction": outcome})
        if part == "graded":
            return pd.DataFrame(columns | {"graded": outcome})
        texts = [decode(tuple(tokens.tolist())) for tokens in outcome]
        return pd.DataFrame(columns | {"token_ids": outcome, "text": texts})

    if None in layers:
        job.keep(
            Ablation(part, None).unit, frame((None, None), answer_clean(job, part, examples)), OUTPUTS[part]
        )
    heads = [(layer, head) for layer in layers if layer is not None for head in range(shape.heads)]
    ablated = answer_ablated(job, part, examples, heads) if heads else ()
    frames, began = [], time.monotonic()
    total = sum(relative_cost(part, layer, shape.layers) for layer, _ in heads)
    with progress(total=total, desc=part, bar_format=TIME_LEFT) as bar:
        for number, (head, outcome) in enumerate(ablated, 1):
            frames.append(frame(head, outcome))
            bar.set_postfix_str(f"head {number} of {len(heads)}", refresh=False)
            bar.update(relative_cost(part, head[0], shape.layers))
            if head[1] == shape.heads - 1:
                now = time.monotonic()
                layer, seconds = pd.concat(frames, ignore_index=True), round(now - began, 2)
                job.keep(Ablation(part, head[0]).unit, layer, OUTPUTS[part], seconds=seconds)
                frames, began = [], now


def new_tokens(job: Job, part: str) -> int:
    return job.settings.map.util_tokens if part == "answers" else job.settings.map.sweep_tokens


def answer_clean(job: Job, part: str, examples: list[Example]) -> Sequence:
    """Predictions, token ids of responses, or graded outcomes, of the clean model."""
    if part == "choices":
        return job.backend.choices(examples)[0]
    if part == "graded":
        return job.backend.grade(examples).outcome
    return job.backend.generate(examples, new_tokens(job, part))


def answer_ablated(
    job: Job, part: str, examples: list[Example], heads: list[Head]
) -> Iterable[tuple[Head, Sequence]]:
    """The same with each head ablated, in order."""
    mask = job.settings.map.mask
    if part == "choices":
        return job.backend.sweep_choices(examples, heads, mask)
    if part == "graded":
        return job.backend.sweep_grades(examples, heads, mask)
    return job.backend.sweep_generations(examples, heads, new_tokens(job, part), mask)


def relative_cost(part: str, layer: int, layers: int) -> int:
    """What ablating a head of a layer costs, beside other layers: the layers from the ablated one up; for a
    response what departs from the clean one costs all of them besides."""
    return layers - layer if part in ("choices", "graded") else 2 * layers - layer
