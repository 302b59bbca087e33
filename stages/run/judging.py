"""Verdicts and scores from kept outputs: no model, nothing generated. For stages 03 and 05, and the audit."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from data.benchmarks import Benchmark
from data.refusal_judge import keyword_refusal
from data.scoring import Judgement, judge, verdict
from data.thoughts import answer_of
from stages.method.metrics import wilson_interval
from stages.method.uncertainty import Outcomes
from stages.run.schemas import OUTPUTS, RESPONSES

JUDGED = [name for name in RESPONSES.schema.names if name not in OUTPUTS.names]
"""columns that judging adds to an output"""
LABELS = ["arm", "optimizer", "seed", "benchmark"]


# Stage 03: the sweep


def judge_sweep(part: str, outputs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A part's outputs (stages.run.sweep) with `correct`, or where they are responses with `refused`.

    Args:
        rows: calibration rows; one that several maps have may stand several times.
    """
    if part == "graded":
        return outputs
    if part == "generations":  # ablated models mostly say the same
        refused = cache(lambda text: keyword_refusal(answer_of(text)))
        return outputs.assign(refused=outputs["text"].map(refused).astype(bool))
    by_id = rows.drop_duplicates("example_id").set_index("example_id")
    if part == "choices":
        answer = outputs["example_id"].map(by_id["answer"])
        return outputs.assign(correct=(outputs["prediction"] == answer).astype(bool))
    right = cache(verdict)
    scoring, target = (outputs["example_id"].map(by_id[name]) for name in ("scoring", "target"))
    each = zip(scoring, outputs["text"], target, strict=True)
    return outputs.assign(correct=[right(*answer) for answer in each])


def outcomes(
    sweeps: Sequence[pd.DataFrame], column: str, rows: Sequence[str], heads: tuple[int, int]
) -> Outcomes:
    """What sweeps found on some of their rows.

    Args:
        sweeps: judged sweep tables, each the clean model first, then every head in order, with the same rows.
        column: "correct", "refused" or "graded".
        rows: example ids, in the order wanted.
        heads: (L, H).

    Raises ValueError where a table does not hold every head x row once.
    """
    count = heads[0] * heads[1] + 1
    every = list(np.ndindex(*heads))
    found: dict[str, np.ndarray] = {}  # example id -> [1 + L * H]
    for sweep in sweeps:
        if len(sweep) % count:
            raise ValueError(f"a sweep has {len(sweep)} rows, which is no multiple of {count} (heads + 1)")
        ids = sweep["example_id"].to_numpy().reshape(count, -1)
        labels = sweep[["layer", "head"]].to_numpy()[ids.shape[1] :: ids.shape[1]]
        if (ids != ids[0]).any() or [tuple(label) for label in labels] != every:
            raise ValueError("a sweep does not hold every head x row once, in order")
        found |= dict(zip(ids[0], sweep[column].to_numpy().reshape(count, -1).T, strict=True))
    if missing := [name for name in rows if name not in found]:
        raise ValueError(f"no sweep holds {missing[0]}")
    values = np.stack([found[name] for name in rows], axis=1)  # (1 + L * H, N)
    return Outcomes(values[0], values[1:].reshape(*heads, len(rows)))


# Stage 05: benchmarks


def judge_outputs(
    outputs: pd.DataFrame, rows: pd.DataFrame, benchmark: Benchmark, classified: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One model's outputs on one benchmark, judged: the columns of RESPONSES.

    Args:
        outputs: columns of OUTPUTS, a row for each of `rows` (columns of EXAMPLES), in their order.
        classified: the classifier's words (columns of CLASSIFIED), whose refusals are then the verdicts. What
            it gave no clear answer to is no refusal.
    """
    judged = []
    words = classified.to_dict("records") if classified is not None else [None] * len(outputs)
    for output, row, word in zip(outputs.to_dict("records"), rows.to_dict("records"), words, strict=True):
        if row["scoring"] == "choice":
            judgement = Judgement(verdict=output["prediction"] == row["answer"])
        else:
            judgement = judge(row["scoring"], output["output"], row["target"], benchmark.numeric)
        values = {
            name: getattr(judgement, name) for name in ("verdict", "refused", "steps", "strict", "flexible")
        }
        if word is not None:
            values["verdict"] = word["refusal"] is True
        judged.append(values | {"harmful": None if word is None else word["harmful"]})
    columns = pd.DataFrame(judged, columns=JUDGED, index=outputs.index, dtype=object)
    return pd.concat([outputs, columns], axis=1)[RESPONSES.schema.names]


def score_rows(responses: pd.DataFrame, sides: dict[str, str]) -> pd.DataFrame:
    """Share of passes of every model and benchmark with Wilson's interval, in order of appearance.

    Args:
        sides: benchmark -> side.
    """
    scores = []
    for labels, verdicts in responses.groupby(LABELS, sort=False, dropna=False)["verdict"]:
        passed, count = int(np.sum(verdicts.to_numpy(dtype=bool))), len(verdicts)
        low, high = wilson_interval(passed, count)
        row = dict(zip(LABELS, (None if label != label else label for label in labels), strict=True))
        row |= {"side": sides[row["benchmark"]], "n": count}
        scores.append(row | {"score": passed / count, "score_low": low, "score_high": high})
    return pd.DataFrame(scores)
