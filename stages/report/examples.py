"""How responses change and how they fail (App. C): counted, and a few side by side, cut to a readable length.

Reasoning collapse: a worked problem whose answer came after steps in the base model and comes without any
now. Over-refusal: a benign request or a written utility question that is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from stages.method.arms import BASE_RUN, ArmRun
from stages.report.costs import mean_and_spread
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
MEASURES = ["refused", "collapsed", "bare", "steps", "strict", "flexible", "harmful"]


def count_failures(responses: Responses) -> pd.DataFrame:
    """MEASURES of every arm, optimizer and benchmark that has any: means over seeds, `<measure>_std` beside.

    - refused: share refused by the keyword judge, of a benign or utility benchmark's written answers
    - collapsed: share without a step, of the rows that had one in the base model; the base model has none
    - bare: of the same rows the share that are no refusals but answers without a step
    - steps: mean number of reasoning steps of the worked answers
    - strict, flexible: share right by the two other readings of an answer, of the rows that have them
    - harmful: share that the classifier calls harmful, of the rows that it judged

    `n` counts the benchmark's rows, `n_stepped` those that had steps in the base model.
    """
    stepped, seeds = responses.of[BASE_RUN]["steps"] >= 1, []
    for run, lines in responses.of.items():
        own = lines[["benchmark", "side", "steps", "strict", "flexible", "harmful"]].copy()
        own["refused"] = lines["refused"].where((lines["side"] != "safety") & lines["prediction"].isna())
        own["collapsed"] = (lines["steps"] == 0).astype(float).where(stepped & (run != BASE_RUN))
        own["bare"] = own["collapsed"] * (lines["refused"] != 1)
        cells = own.assign(n_stepped=stepped).groupby(["benchmark", "side"], sort=False)
        means = cells[MEASURES].mean().assign(n=cells.size(), n_stepped=cells["n_stepped"].sum())
        seeds.append(means.reset_index().assign(arm=run.arm.name, optimizer=run.optimizer))
    labels = ["arm", "optimizer", "benchmark", "side", "n", "n_stepped"]
    cells = pd.concat(seeds).groupby(labels, sort=False, dropna=False)[MEASURES]
    table = mean_and_spread(cells).dropna(how="all", subset=MEASURES).reset_index()
    table.insert(2, "n_seeds", cells.size().loc[pd.MultiIndex.from_frame(table[labels])].to_numpy())
    return table


@dataclass(frozen=True)
class Group:
    """Prompts of one kind and how each arm answered them."""

    kind: str
    """empty: rows whose verdict did not change"""
    side: str
    runs: tuple[ArmRun, ...]
    """the base model first"""
    lines: Sequence[int]
    """of `Responses.of` that are shown"""
    count: int = 0
    """rows of this kind"""
    kept: int = 0
    """of these, how many the Safe Zone answers as the base model does"""
    of: int = 0
    """rows looked at"""
    rows: tuple[dict, ...] = ()
    """the lines' texts: benchmark, example_id, prompt, target, answers (one an arm)"""


def shown_text(text: str) -> str:
    """`text` cut to a readable length, without control characters."""
    text = UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").strip())
    return text if len(text) <= LENGTH else f"{text[:LENGTH].rstrip()} …"


def in_turn(lines: pd.DataFrame) -> list[int]:
    """Up to MOST of these lines: the first of each benchmark, then the second."""
    turns = lines.groupby("benchmark", sort=False).cumcount()
    return list(turns.sort_values(kind="stable").index[:MOST])


def first_seeds(responses: Responses) -> dict[ArmRun, ArmRun]:
    """Each tuned arm -> the same with its first seed."""
    return {replace(run, seed=None): run for run in reversed(responses.of) if run != BASE_RUN}


def samples(responses: Responses, results: Results, targets: Mapping[str, str]) -> list[Group]:
    """For each main arm (first seed) a few prompts whose verdict tuning changed, with the base model's
    response.

    An arm that changed no verdict shows the first row of each side instead. `targets`: example_id -> the
    benchmark's reference.
    """
    first, base, shown = first_seeds(responses), responses.of[BASE_RUN], []
    for run in (first[run] for run in results.main):
        own, groups = responses.of[run], []
        for kind, (side, before, after) in KINDS.items():
            changed = (own["side"] == side) & (base["verdict"] == before) & (own["verdict"] == after)
            groups.append(Group(kind, side, (BASE_RUN, run), in_turn(own[changed]), changed.sum()))
        firsts = own.drop_duplicates("side")["side"].items()
        unchanged = [Group("", side, (BASE_RUN, run), [line]) for line, side in firsts]
        shown += [group for group in groups if group.count] or unchanged
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
        groups = [failure(responses, kind, first[run], first[safe]) for run in broken if run]
        found.append(next((group for group in groups if group.count), groups[0]))
    return quote(responses, targets, found)


def failure(responses: Responses, kind: str, broken: ArmRun, safe: ArmRun) -> Group:
    """Where an arm fails in one way, and in how many of these rows the Safe Zone does not."""
    runs = BASE_RUN, broken, safe
    base, own, kept = (lines[lines["side"] != "safety"] for lines in map(responses.of.get, runs))
    # A choice cannot be refused. A refusal has no steps either, but is no collapse.
    if kind == COLLAPSE:
        sound, kept = base["steps"] >= 1, kept["steps"] >= 1
        lost = sound & (own["steps"] == 0) & (own["refused"] != 1)
    else:
        sound, kept = base["refused"] == 0, kept["refused"] == 0
        lost = sound & (own["refused"] == 1)
    lines = (in_turn(own[lost & kept]) + in_turn(own[lost & ~kept]))[:MOST]
    return Group(kind, "", runs, lines, lost.sum(), (lost & kept).sum(), sound.sum())


def quote(responses: Responses, targets: Mapping[str, str], groups: Sequence[Group]) -> list[Group]:
    """The groups with their texts, all read in one pass."""
    rows = {run: lines["row"] for run, lines in responses.of.items()}
    texts = responses.texts({rows[run][at] for group in groups for run in group.runs for at in group.lines})
    quoted = []
    for group in groups:
        shown = []
        for at in group.lines:
            first, *_ = own = [texts[rows[run][at]] for run in group.runs]
            target = shown_text(targets.get(first["example_id"], ""))
            row = {"benchmark": responses.of[BASE_RUN]["benchmark"][at], "example_id": first["example_id"]}
            answers = [shown_text(text["output"]) for text in own]
            shown.append(row | {"prompt": shown_text(first["prompt"]), "target": target, "answers": answers})
        quoted.append(replace(group, rows=tuple(shown)))
    return quoted
