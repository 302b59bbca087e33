"""Answers before and after tuning, side by side: a few rows by fixed rule, cut to a readable length."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from stages.checks import IntArray
from stages.reporting import families
from stages.reporting.answers import Answers, Unit

LENGTH = 400
"""characters that are shown of a text"""
MOST = 2
"""examples of each kind an arm"""
KINDS = {
    # kind -> (side, verdict of the base model, verdict of the tuned one), in the order shown
    "safety gained": ("safety", False, True),
    "utility lost": ("utility", True, False),
    "benign request refused": ("over-refusal", False, True),
    "safety lost": ("safety", True, False),
    "utility gained": ("utility", False, True),
}
COLLAPSE, REFUSAL = "reasoning collapse", "refusal of a benign question"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""control and direction characters, which a page must not pass on"""


def shown_text(text: str) -> str:
    """`text` cut to a readable length, without control characters."""
    text = UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").strip())
    return text if len(text) <= LENGTH else f"{text[:LENGTH].rstrip()} …"


def samples(answers: Answers, targets: Mapping[str, str], sides: Mapping[str, str], m: int) -> list[dict]:
    """For each main arm (first seed) a few prompts whose verdict tuning changed, with the base model's
    answer.

    By kind in the order of KINDS, in turn from each benchmark of that side, rows in the benchmark's order. An
    arm that changed no verdict shows the first row of each side instead.

    Args:
        targets: example_id -> the benchmark's reference.
        sides: benchmark -> side.
    """
    base = _base(answers)
    shown = []
    for unit in _first_seeds(answers).values():
        if not families.is_main(unit[0], m):
            continue
        groups = []
        for kind, (side, before, after) in KINDS.items():
            queues = []
            for name in (name for name in sides if sides[name] == side):
                pair = (answers.of("verdict", one, name) for one in (base, unit))
                changed = np.logical_and(
                    *(got == wanted for got, wanted in zip(pair, (before, after), strict=True))
                )
                queues.append([(name, int(at)) for at in np.flatnonzero(changed)])
            chosen = _in_turn(queues, MOST)
            if chosen:
                groups.append({"kind": kind, "changed": sum(map(len, queues)), "side": side, "rows": chosen})
        if not groups:
            for side in dict.fromkeys(sides.values()):
                name = next(name for name in sides if sides[name] == side)
                rows = [(name, 0)]
                groups.append({"kind": f"unchanged ({side})", "changed": 0, "side": side, "rows": rows})
        shown.append({"arm": unit[0], "optimizer": unit[1], "seed": unit[2], "groups": groups})
    _quote(answers, targets, [(group, (base, _unit(arm))) for arm in shown for group in arm["groups"]])
    return shown


def failure_modes(
    answers: Answers, targets: Mapping[str, str], sides: Mapping[str, str], m: int
) -> list[dict]:
    """Examples of both failures of App. C: question, base model, all heads (or the Risky Zone), Safe Zone.

    As in the paper's Tables 5 and 6, rows that the Safe Zone answers as the base model did come first; then
    the other rows, always in the benchmark's order and in turn from each benchmark. First seed of the first
    optimizer; the Risky Zone where tuning all heads shows no such failure or was not done. One dictionary a
    failure; `rows` is empty where none was found, and the list where the arms were not tuned.
    """
    base, seeds = _base(answers), _first_seeds(answers)
    optimizer = next((unit[1] for unit in seeds.values()), "")
    broken = [seeds[arm, optimizer] for arm in ("full", "bucket1") if (arm, optimizer) in seeds]
    safe = seeds.get((f"bucket{m}", optimizer)) if m > 1 else None
    if not broken or safe is None:
        return []
    result, quoted = [], []
    for kind in (COLLAPSE, REFUSAL):
        each = [_failure(answers, sides, kind, base, unit, safe) for unit in broken]
        chosen = next((index for index, one in enumerate(each) if one["rows"]), 0)
        result.append(each[chosen])
        quoted.append((each[chosen], (base, broken[chosen], safe)))
    _quote(answers, targets, quoted)
    return result


def _failure(
    answers: Answers, sides: Mapping[str, str], kind: str, base: Unit, broken: Unit, safe: Unit
) -> dict:
    """Where one arm fails in one way, and in how many of these rows the Safe Zone does not."""
    kept, lost, looked_at = [], [], 0
    for name in (name for name, side in sides.items() if side != "safety"):
        before, other = (_sound(answers, unit, name, kind) for unit in (base, safe))
        found = before & _failed(answers, broken, name, kind)
        looked_at += int(before.sum())
        for queues, rows in ((kept, found & other), (lost, found & ~other)):
            queues.append([(name, int(at)) for at in np.flatnonzero(rows)])
    counts = {"of": looked_at, "kept": sum(map(len, kept)), "lost": sum(map(len, lost))}
    labels = {"arm": broken[0], "optimizer": broken[1], "seed": broken[2], "safe": safe[0]}
    rows = (_in_turn(kept, MOST) + _in_turn(lost, MOST))[:MOST]
    return {"kind": kind, "rows": rows} | counts | labels


def _sound(answers: Answers, unit: Unit, benchmark: str, kind: str) -> np.ndarray:
    """Rows answered with steps, or not refused; bool [rows]."""
    if kind == COLLAPSE:
        return answers.of("steps", unit, benchmark) >= 1
    return (answers.of("prediction", unit, benchmark) < 0) & ~answers.of("refused", unit, benchmark)


def _failed(answers: Answers, unit: Unit, benchmark: str, kind: str) -> np.ndarray:
    """Rows answered without a step, or refused; bool [rows]. A refusal has no steps either, but shows none of
    the first kind."""
    refused = answers.of("refused", unit, benchmark)
    if kind == COLLAPSE:
        return (answers.of("steps", unit, benchmark) == 0) & ~refused
    return refused


def _base(answers: Answers) -> Unit:
    return next(unit for unit in answers.cells if unit[0] == families.BASE)


def _first_seeds(answers: Answers) -> dict[tuple[str, str], Unit]:
    """(arm, optimizer) -> its first unit; without the base model."""
    found: dict[tuple[str, str], Unit] = {}
    for unit in answers.cells:
        if unit[0] != families.BASE:
            found.setdefault(unit[:2], unit)
    return found


def _unit(arm: dict) -> Unit:
    return arm["arm"], arm["optimizer"], arm["seed"]


def _in_turn(queues: list[list], most: int) -> list:
    """Up to `most` items: the first of each queue, then the second of each, …"""
    deepest = max((len(queue) for queue in queues), default=0)
    return [queue[depth] for depth in range(deepest) for queue in queues if depth < len(queue)][:most]


def _quote(
    answers: Answers, targets: Mapping[str, str], groups: Sequence[tuple[dict, Sequence[Unit]]]
) -> None:
    """Puts the texts into the groups' `rows`, all read in one pass: prompt, target, each unit's answer."""

    def places(units: Sequence[Unit], name: str, at: int) -> list[int]:
        cells: list[IntArray] = [answers.cells[unit][name] for unit in units]
        return [int(rows[at]) for rows in cells]

    texts = answers.texts(
        row for group, units in groups for one in group["rows"] for row in places(units, *one)
    )
    for group, units in groups:
        quoted = []
        for name, at in group["rows"]:
            said = [texts[row] for row in places(units, name, at)]
            row = {"benchmark": name, "example_id": said[0]["example_id"]}
            row |= {
                "prompt": shown_text(said[0]["prompt"]),
                "answers": [shown_text(one["output"]) for one in said],
            }
            quoted.append(row | {"target": shown_text(targets.get(said[0]["example_id"], ""))})
        group["rows"] = quoted
