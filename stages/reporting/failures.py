"""The two ways in which tuning breaks a model's answers (App. C), counted: `tables/failures.csv`.

Reasoning collapse: a worked problem whose answer came after steps in the base model and comes without any
now. Over-refusal: a benign request or a written utility question that is refused. Both are counted by arm,
optimizer and benchmark, in each seed, then averaged.
"""

from collections.abc import Mapping

import numpy as np

from stages.reporting import costs, families
from stages.reporting.answers import Answers, Unit

MEASURES = ("refused", "collapsed", "bare", "steps", "strict", "flexible", "harmful")


def one_seed(answers: Answers, unit: Unit, base: Unit, benchmark: str, side: str) -> dict[str, float | None]:
    """MEASURES of one unit's answers to one benchmark; None where a measure does not apply.

    - refused: share refused by the keyword judge, of a benign or utility benchmark's written answers
    - collapsed: share without a step, of the rows that had one in the base model; the base model has none
    - bare: of the same rows the share that are no refusals but answers without a step
    - steps: mean number of reasoning steps of the worked answers
    - strict, flexible: share right by the two other readings of an answer, of the rows that have them
    - harmful: share that the classifier calls harmful, of the rows that it was asked about
    """
    measured: dict[str, float | None] = dict.fromkeys(MEASURES)
    written = answers.of("prediction", unit, benchmark) < 0
    if side != "safety" and written.any():
        measured["refused"] = float(answers.of("refused", unit, benchmark)[written].mean())
    steps, before = (answers.of("steps", one, benchmark) for one in (unit, base))
    if (worked := steps >= 0).any():
        measured["steps"] = float(steps[worked].mean())
    if unit != base and (stepped := before >= 1).any():
        gone = steps[stepped] == 0
        measured["collapsed"] = float(gone.mean())
        measured["bare"] = float((gone & ~answers.of("refused", unit, benchmark)[stepped]).mean())
    for name in ("strict", "flexible", "harmful"):
        values = answers.of(name, unit, benchmark)
        if not np.isnan(values).all():
            measured[name] = float(np.nanmean(values))
    return measured


def failures(answers: Answers, sides: Mapping[str, str]) -> list[dict]:
    """One row an arm x optimizer x benchmark that has any of MEASURES: means over seeds, `<measure>_std`
    beside.

    `n` counts the benchmark's rows, `n_stepped` those that had steps in the base model: what `collapsed` and
    `bare` are shares of.
    """
    (base,) = (unit for unit in answers.cells if unit[0] == families.BASE)
    arms: dict[tuple[str, str], list[Unit]] = {}
    for unit in answers.cells:
        arms.setdefault(unit[:2], []).append(unit)
    rows = []
    for (arm, optimizer), units in arms.items():
        for benchmark, side in sides.items():
            each = [one_seed(answers, unit, base, benchmark, side) for unit in units]
            if all(value is None for one in each for value in one.values()):
                continue
            before = answers.of("steps", base, benchmark)
            row = {"arm": arm, "optimizer": optimizer, "n_seeds": len(units), "benchmark": benchmark}
            row |= {"side": side, "n": len(before), "n_stepped": int((before >= 1).sum())}
            for name in MEASURES:
                values = [one[name] for one in each if one[name] is not None]
                row[name] = float(np.mean(values)) if values else None
                row[f"{name}_std"] = costs.deviation(values)
            rows.append(row)
    return rows


def finding(rows: list[dict], m: int) -> str:
    """What became of questions and their reasoning with all heads and with the Safe Zone tuned."""
    told = []
    for arm in ("full", f"bucket{m}"):
        own = [row for row in rows if row["arm"] == arm and row["optimizer"] == "sft"]
        stepped = [row for row in own if row["collapsed"] is not None]
        asked = [row for row in own if row["side"] == "utility" and row["refused"] is not None]
        words = []
        if stepped:
            share = sum(row["bare"] * row["n_stepped"] for row in stepped)
            share /= sum(row["n_stepped"] for row in stepped)
            words.append(
                f"{100 * share:.1f} % of the problems worked in steps before were answered without any"
            )
        if asked:
            share = sum(row["refused"] * row["n"] for row in asked) / sum(row["n"] for row in asked)
            words.append(f"{100 * share:.1f} % of the written utility questions were refused")
        if words:
            told.append(f"with {families.words(arm, m)} tuned, {' and '.join(words)}")
    sentence = "; ".join(told)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""
