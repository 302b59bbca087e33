"""The model card of an arm that leaves its run: what was tuned, what it cost, how far that can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
from tabulate import tabulate

from stages.method.arms import BASE_RUN, ArmRun
from stages.method.heads import COLUMN
from stages.method.reliability import ENOUGH
from stages.report.examples import UNSEEN
from stages.report.page import without_folder
from stages.report.words import arm_words, percent
from stages.run.schemas import ARMS, RELIABILITY, SCORES
from stages.run.settings import Settings
from stages.run.store import RunFolder, computed_by

SIDES = {
    "utility": "utility: right answers",
    "safety": "safety: harmful prompts refused",
    "over-refusal": "over-refusal: harmless prompts refused",
}
COMPUTED = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate")
UNRANKED = ("full", "random")
"""kinds of arms that no map chose"""


@dataclass(frozen=True)
class Licence:
    """Of the base model, as its publisher names it."""

    name: str | None
    """the hub's short name ("apache-2.0", "other"); None: it was not found"""
    title: str | None = None
    """of another one than the hub knows"""
    link: str | None = None
    """where its text is, if it is no well-known one"""


@dataclass(frozen=True)
class Drift:
    """How many responses a merged model gives that the unmerged one does not."""

    dtype: str
    """in which both computed"""
    changed: int
    responses: int


@dataclass(frozen=True)
class Export:
    """What is exported."""

    base: str
    """hub id of the base model; else the last name of its folder"""
    on_hub: bool
    revision: str | None
    licence: Licence
    matrices: int
    """that were merged; 0: an adapter"""
    drift: Sequence[Drift]
    """of a merge"""


def score_table(scores: pd.DataFrame, tuned: ArmRun) -> str:
    """Every benchmark: rows, score of the base model and of the arm, each with its 95 % interval."""
    rows = []
    for _, own in scores.groupby("benchmark", sort=False):
        base, after = (_of(own, run) for run in (BASE_RUN, tuned))
        rows.append([base["benchmark"], SIDES[base["side"]], base["n"], _interval(base), _interval(after)])
    heads = ["benchmark", "what is counted", "rows", "base model (95 %)", "this model (95 %)"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _of(table: pd.DataFrame, run: ArmRun) -> dict:
    """The only row of an arm as tuned."""
    same = [
        table[name].isna() if value is None else table[name] == value for name, value in run.labels.items()
    ]
    return table[pd.concat(same, axis=1).all(axis=1)].iloc[0].to_dict()


def _interval(row: dict) -> str:
    return f"{percent(row['score'])} ({100 * row['score_low']:.1f} to {100 * row['score_high']:.1f})"


def map_sentences(run: RunFolder, settings: Settings, tuned: ArmRun) -> list[str]:
    """What chose the arm's heads or neurons, and how far that repeats itself."""
    arm = tuned.arm
    if arm.kind == "randomneurons":
        return ["The neurons were drawn at random: this is a control."]
    if arm.of_neurons:
        return [
            "The neurons were chosen by their attributions to safety and to utility (NeuronTune). How well "
            "these repeat themselves on other rows was not measured."
        ]
    if arm.kind in UNRANKED:
        how = "All heads were tuned" if arm.kind == "full" else "The heads were drawn at random"
        return [f"{how}: no conflict map chose them."]
    table = run.read(RELIABILITY)
    quantity = COLUMN[arm.ranked_by]
    own = (table["map"] == arm.map) & (table["sensitivity"] == settings.map.sensitivity)
    row = table[own & (table["quantity"] == quantity)].iloc[0]
    rows = f"{row['rows_util']} utility and {row['rows_safe']} safety rows"
    if pd.isna(row["reliability"]):
        return [
            f"Whether the map that chose the heads repeats itself is unknown ({rows}): do not rest on it."
        ]
    found = [
        f"The heads were chosen by {arm.ranked_by} ({quantity.replace('_', ' ')}) in a map of {rows}, whose "
        f"reliability is {row['reliability']:.2f} (split halves, Spearman-Brown; 1 is perfect)."
    ]
    if row["reliability"] < ENOUGH:
        found.append("That is too little: a map of other rows would have chosen other heads.")
    return found


def warnings_of(run: RunFolder) -> list[str]:
    """What the stages warned of that the figures rest on."""
    found = [warning for stage in COMPUTED for warning in run.manifest(stage)["notes"].get("warnings", [])]
    return [UNSEEN.sub("", warning) for warning in dict.fromkeys(found)]


def render(run: RunFolder, settings: Settings, tuned: ArmRun, export: Export) -> str:
    """README.md of an exported arm, with the front matter that the hub reads."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    evaluation = run.manifest("05_evaluate")
    notes = run.manifest("01_calibrate")["notes"]
    model = run.manifest("04_align")["model"]
    return environment.get_template("model_card.md.jinja").render(
        arm=tuned.arm,
        tuned=tuned,
        export=export,
        rows=notes["counts"]["alignment"],
        benign_share=settings.data.benign_share,
        tuning=settings.tuning,
        row=_of(run.read(ARMS), tuned),
        label=arm_words(tuned.arm, settings.map.buckets),
        scores=score_table(run.read(SCORES), tuned),
        map_sentences=map_sentences(run, settings, tuned),
        judge=evaluation["notes"]["judge"],
        classifier=evaluation["notes"].get("classifier"),
        standins=notes["standins"],
        align_source=without_folder(settings.data.align or settings.data.align_source),
        revisions={
            name: source["revision"] for name, source in notes["sources"].items() if source.get("revision")
        },
        several_seeds=len(settings.tuning.seeds) > 1,
        warnings=warnings_of(run),
        model=model,
        computed_by=computed_by(model),
        git=evaluation["git"],
    )
