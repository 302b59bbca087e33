"""The two ways in which tuning breaks a model's answers (App. C), counted: `tables/failures.csv`.

Reasoning collapse: a worked problem whose answer came after steps in the base model and comes without any
now. Over-refusal: a benign request or a written utility question that is refused. Both are counted by arm,
optimizer and benchmark, in each seed, then averaged.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from stages.method.arms import BASE_RUN, ArmRun
from stages.report.costs import mean_and_spread
from stages.report.responses import Responses

MEASURES = ["refused", "collapsed", "bare", "steps", "strict", "flexible", "harmful"]


def measures(responses: Responses, run: ArmRun, benchmark: str, side: str) -> dict[str, float]:
    """MEASURES of one arm's responses to one benchmark, absent where a measure does not apply.

    - refused: share refused by the keyword judge, of a benign or utility benchmark's written answers
    - collapsed: share without a step, of the rows that had one in the base model; the base model has none
    - bare: of the same rows the share that are no refusals but answers without a step
    - steps: mean number of reasoning steps of the worked answers
    - strict, flexible: share right by the two other readings of an answer, of the rows that have them
    - harmful: share that the classifier calls harmful, of the rows that it judged
    """
    refused, steps, prediction, *others = (
        responses.of(name, run, benchmark) for name in ("refused", "steps", "prediction", *MEASURES[4:])
    )
    found = dict(zip(MEASURES[4:], others, strict=True)) | {"steps": steps}
    if side != "safety":
        found["refused"] = refused[np.isnan(prediction)]
    stepped = responses.of("steps", BASE_RUN, benchmark) >= 1
    if run != BASE_RUN and stepped.any():
        gone = steps[stepped] == 0
        found |= {"collapsed": gone, "bare": gone & (refused[stepped] != 1)}
    return {name: float(np.nanmean(values)) for name, values in found.items() if not np.isnan(values).all()}


def count_failures(responses: Responses, sides: Mapping[str, str]) -> pd.DataFrame:
    """Every arm, optimizer and benchmark that has any of MEASURES: means over seeds, `<measure>_std` beside.

    `n` counts the benchmark's rows, `n_stepped` those that had steps in the base model: what `collapsed` and
    `bare` are shares of.
    """
    rows = []
    for run in responses.cells:
        for name, side in sides.items():
            steps = responses.of("steps", BASE_RUN, name)
            row = {"run": replace(run, seed=None), "benchmark": name, "side": side}
            row |= {"n": len(steps), "n_stepped": int((steps >= 1).sum())}
            rows.append(row | measures(responses, run, name, side))
    seeds = pd.DataFrame(rows, columns=["run", "benchmark", "side", "n", "n_stepped", *MEASURES])
    cells = [f"{row.run.name}/{row.benchmark}" for row in seeds.itertuples()]
    means = mean_and_spread(seeds[MEASURES], cells)
    first = seeds.set_axis(cells).drop(columns=MEASURES).loc[lambda table: ~table.index.duplicated()]
    labels = pd.DataFrame([run.labels for run in first["run"]], index=first.index)[["arm", "optimizer"]]
    labels["n_seeds"] = pd.Series(cells).value_counts()
    table = pd.concat([labels, first.drop(columns="run"), means], axis=1)
    return table.dropna(how="all", subset=MEASURES).reset_index(drop=True)
