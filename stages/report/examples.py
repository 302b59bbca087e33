"""Responses before and after tuning, side by side: a few rows by fixed rule, cut to a readable length."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.method.arms import BASE_RUN, ArmRun
from stages.report.responses import Responses
from stages.report.results import FULL, Results

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
Place = tuple[str, int]
"""benchmark, row within it"""


@dataclass(frozen=True)
class Group:
    """Rows of one kind and how each arm answered them."""

    kind: str
    """empty: rows whose verdict did not change"""
    side: str
    runs: tuple[ArmRun, ...]
    """the base model first"""
    places: Sequence[Place]
    """the rows shown"""
    count: int = 0
    """rows of this kind"""
    kept: int = 0
    """of these, how many the Safe Zone answers as the base model does"""
    of: int = 0
    """rows looked at"""
    rows: tuple[dict, ...] = ()
    """the places' texts: benchmark, example_id, prompt, target, answers (one an arm)"""


def shown_text(text: str) -> str:
    """`text` cut to a readable length, without control characters."""
    text = UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").strip())
    return text if len(text) <= LENGTH else f"{text[:LENGTH].rstrip()} …"


def in_turn(rows: Mapping[str, np.ndarray]) -> list[Place]:
    """Up to MOST of these rows (bool [rows]): the first of each benchmark, then the second."""
    chosen = {name: np.flatnonzero(own) for name, own in rows.items()}
    turns = [(turn, name) for turn in range(MOST) for name in chosen]
    return [(name, int(chosen[name][turn])) for turn, name in turns if turn < len(chosen[name])][:MOST]


def first_seeds(responses: Responses) -> dict[ArmRun, ArmRun]:
    """Each tuned arm -> the same with its first seed."""
    return {replace(run, seed=None): run for run in reversed(responses.cells) if run != BASE_RUN}


def samples(responses: Responses, results: Results, targets: Mapping[str, str]) -> list[Group]:
    """For each main arm (first seed) a few prompts whose verdict tuning changed, with the base model's
    response.

    An arm that changed no verdict shows the first row of each side instead. `targets`: example_id -> the
    benchmark's reference.
    """
    first, shown = first_seeds(responses), []
    for run in (first[run] for run in results.main):
        groups = []
        for kind, (side, *verdicts) in KINDS.items():
            changed = {}
            for name in results.benchmarks(side):
                before, after = (responses.of("verdict", each, name) for each in (BASE_RUN, run))
                changed[name] = (before == verdicts[0]) & (after == verdicts[1])
            if count := sum(rows.sum() for rows in changed.values()):
                groups.append(Group(kind, side, (BASE_RUN, run), in_turn(changed), count))
        for side in () if groups else dict.fromkeys(results.sides.values()):
            groups.append(Group("", side, (BASE_RUN, run), [(results.benchmarks(side)[0], 0)]))
        shown += groups
    return quote(responses, targets, shown)


def failure_modes(responses: Responses, results: Results, targets: Mapping[str, str]) -> list[Group]:
    """Examples of both failures of App. C: question, base model, all heads (or the Risky Zone), Safe Zone.

    As in the paper's Tables 5 and 6, rows that the Safe Zone answers as the base model did come first; then
    the other rows, always in the benchmark's order and in turn from each benchmark. First seed of the first
    optimizer; the Risky Zone where tuning all heads shows no such failure or was not done. None where the
    arms were not tuned.
    """
    optimizer, first = next(iter(results.optimizers), ""), first_seeds(responses)
    broken = [results.find(FULL, optimizer), results.bucket(1, optimizer)]
    safe = results.bucket(results.m, optimizer) if results.m > 1 else None
    if safe is None or not any(broken):
        return []
    found = []
    for kind in (COLLAPSE, REFUSAL):
        groups = [failure(responses, results, kind, first[run], first[safe]) for run in broken if run]
        found.append(next((group for group in groups if group.count), groups[0]))
    return quote(responses, targets, found)


def failure(responses: Responses, results: Results, kind: str, broken: ArmRun, safe: ArmRun) -> Group:
    """Where an arm fails in one way, and in how many of these rows the Safe Zone does not."""
    kept, lost, looked_at = {}, {}, 0
    for name in (name for name, side in results.sides.items() if side != "safety"):
        before, other = (sound(responses, run, name, kind) for run in (BASE_RUN, safe))
        refused = responses.of("refused", broken, name) == 1
        # A refusal has no steps either, but is no collapse.
        collapsed = (responses.of("steps", broken, name) == 0) & ~refused
        rows = before & (collapsed if kind == COLLAPSE else refused)
        kept[name], lost[name] = rows & other, rows & ~other
        looked_at += int(before.sum())
    counts = [int(sum(rows.sum() for rows in found.values())) for found in (kept, lost)]
    places = (in_turn(kept) + in_turn(lost))[:MOST]
    return Group(kind, "", (BASE_RUN, broken, safe), places, sum(counts), counts[0], looked_at)


def sound(responses: Responses, run: ArmRun, benchmark: str, kind: str) -> np.ndarray:
    """Rows answered with steps, or not refused; bool [rows]. A choice cannot be refused."""
    if kind == COLLAPSE:
        return responses.of("steps", run, benchmark) >= 1
    return responses.of("refused", run, benchmark) == 0


def quote(responses: Responses, targets: Mapping[str, str], groups: Sequence[Group]) -> list[Group]:
    """The groups with their texts, all read in one pass."""

    def row_of(run: ArmRun, place: Place) -> int:
        return int(responses.cells[run][place[0]][place[1]])

    wanted = {row_of(run, place) for group in groups for run in group.runs for place in group.places}
    texts = responses.texts(wanted)
    quoted = []
    for group in groups:
        rows = []
        for place in group.places:
            first, *_ = own = [texts[row_of(run, place)] for run in group.runs]
            target = shown_text(targets.get(first["example_id"], ""))
            row = {"benchmark": place[0], "example_id": first["example_id"], "target": target}
            answers = [shown_text(text["output"]) for text in own]
            rows.append(row | {"prompt": shown_text(first["prompt"]), "answers": answers})
        quoted.append(replace(group, rows=tuple(rows)))
    return quoted
