"""Checks that make tables again from what they rest on, with the functions that made them: they find what was
changed, not errors of the method. Prompts and answers, which may be harmful, are never shown."""

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache

import numpy as np
import pandas as pd

from backends.base import Shape
from data.refusal_judge import KEYWORD_JUDGE_VERSION
from data.rendering import conversations_of
from stages.checks.finished import NO_FOLDER, FinishedRun, Result, place, unequal
from stages.method import metrics
from stages.method.arms import BASE_RUN
from stages.run import judging, schemas
from stages.run.job import Job
from stages.run.pipeline import declaration
from stages.run.schemas import Table
from stages.run.sweep import TABLES, swept_rows


def models(run: FinishedRun) -> pd.DataFrame:
    """Labels of the base model and of all that the settings tune."""
    return pd.DataFrame([tuned.labels for tuned in (BASE_RUN, *run.settings.arm_runs)], dtype=object)


def judges(run: FinishedRun) -> Result:
    """Verdicts can only be judged again by the judge that gave them."""
    used = {stage: notes["judge"] for stage in run.manifests if "judge" in (notes := run.notes(stage))}
    faults = [f"{stage}: version {judge}" for stage, judge in used.items() if judge != KEYWORD_JUDGE_VERSION]
    classifier = run.notes("05_evaluate").get("classifier")
    return faults, f"version {KEYWORD_JUDGE_VERSION}{f'; {classifier} is believed' if classifier else ''}"


def keys(run: FinishedRun) -> Result:
    """Sweep and responses hold every head x calibration row, every model x benchmark row, once, in order."""
    parts = swept_rows(run.read(schemas.CALIBRATION), run.map_names, run.settings.map.sensitivity)
    heads = pd.DataFrame([(None, None), *np.ndindex(*run.heads)], columns=["layer", "head"], dtype=object)
    wanted = {TABLES[part]: heads.merge(rows[["example_id"]], how="cross") for part, rows in parts.items()}
    rows = run.read(schemas.BENCHMARKS).rename(columns={"split": "benchmark"})
    rows["prompt"] = conversations_of(rows)
    wanted[schemas.RESPONSES] = models(run).merge(rows[["benchmark", "example_id", "prompt"]], how="cross")
    others = [table for table in TABLES.values() if table not in wanted and run.has(table)]
    faults = [f"{table.file()} is not needed" for table in others]
    for table, expected in wanted.items():
        faults += [f"{table.file()}: {fault}" for fault in unequal(run.read(table), expected)]
    return faults, ", ".join(f"{len(expected)} in {table.file()}" for table, expected in wanted.items())


def joined(run: FinishedRun, stage: str) -> Result:
    """A stage's tables and notes, joined again from what it kept of its units and from earlier stages."""
    classified, settings = run.notes(stage).get("classifier") is not None, run.settings
    if classified:  # believed, because it need not be on this machine
        settings = settings.replace(judge="keyword")
    written = []
    job = Job(declaration(stage), settings, run, write=lambda *table: written.append(table))
    job.judging_again, job.info = True, run.manifest(stage)["units"]
    job.shape = Shape(*run.heads, 1, 1, 1, 1, 1)
    with redirect_stdout(None):  # it has said it all when it was made
        notes, faults = job.stage.join(job), []
    for table, again, name in written:
        stored = run.read(table, name)
        again = believed(run, table, stored, again, classified)
        faults += [f"{table.file(name)}: {fault}" for fault in unequal(stored, again)]
    recorded = pd.json_normalize({name: run.notes(stage).get(name) for name in notes})
    faults += [f"notes: {fault}" for fault in unequal(recorded, pd.json_normalize(notes))]
    return faults, f"{', '.join(table.file(name) for table, name in run.tables(stage))} and notes"


def believed(
    run: FinishedRun, table: Table, stored: pd.DataFrame, again: pd.DataFrame, classified: bool
) -> pd.DataFrame:
    """A table as it is joined again, with what cannot be had again: of a stored table, or left out."""
    if table is schemas.HEADS:  # by stored scores, compared too: a last bit must not move a tie
        score = stored["conflict_score"].to_numpy().reshape(run.heads)
        again = again.assign(bucket=metrics.buckets(score, run.settings.map.buckets).ravel())
    if table is schemas.DRIFT:
        scores = stored["conflict_score"].to_numpy().reshape(-1, *run.heads)
        bucket = [metrics.buckets(score, run.settings.map.buckets) for score in scores]
        again = again.assign(bucket=np.ravel(bucket))
    sides = {benchmark.name: benchmark.side for benchmark in run.settings.benchmarks}
    if classified and table is schemas.RESPONSES:
        columns, requests = ["verdict", "harmful"], again["benchmark"].map(sides) != "utility"
        again.loc[requests, columns] = stored.loc[requests, columns]
    if classified and table is schemas.SCORES:
        again = judging.score_rows(run.read(schemas.RESPONSES), sides)
    # `texts` checks texts; parameters are counted in the adapters, where the model need not be here.
    others = ["text", "token_ids", "output", "prompt", "graded", "gram", "trainable_parameters"]
    return again.drop(columns=others, errors="ignore")


def texts(run: FinishedRun) -> Result:
    """Every text is what its token ids decode to, every choice's output the choice."""
    if run.tokenizer is None:
        return None, NO_FOLDER
    decode = cache(lambda ids, skip: run.tokenizer.decode(ids, skip_special_tokens=skip))
    known = {row["example_id"]: row for row in run.read(schemas.BENCHMARKS).to_dict("records")}
    tables = [table for table in (*TABLES.values(), schemas.RESPONSES) if run.has(table)]
    faults, count = [], 0
    for table in (table for table in tables if "token_ids" in table.schema.names):
        rows = run.read(table)
        for number, row in enumerate(each._asdict() for each in rows.itertuples(index=False)):
            text = said(row, known.get(row["example_id"]), decode)
            if text != row.get("output", row.get("text")):
                faults.append(f"{table.file()}: {place(rows, number)}: not what its tokens or prediction say")
        count += len(rows)
    return faults, f"{count} follow from token ids and predictions"


def said(answer: dict, row: dict | None, decode: Callable[[tuple, bool], str]) -> str | None:
    """The text of what was generated, or predicted for a benchmark row, where a special token is shown; None
    where columns do not fit."""
    tokens, prediction = tuple(answer["token_ids"].tolist()), answer.get("prediction")
    if row is None or row["scoring"] != "choice":
        return decode(tokens, True) if prediction is None and pd.isna(answer.get("probability")) else None
    if prediction is None or tokens or not 0 <= answer["probability"] <= 1 + 1e-6:
        return None
    return row["choices"][prediction] if len(row["choices"]) else decode((prediction,), False)


def costs(run: FinishedRun) -> Result:
    """Means by side, cost ratios (Eq. 7 and 8) and the flag of every model, from scores.parquet."""
    benchmarks = run.settings.benchmarks
    names = [benchmark.name for benchmark in benchmarks]
    found = pd.DataFrame(run.read(schemas.SCORES)["score"].to_numpy().reshape(-1, len(names)), columns=names)
    for side in ("utility", "safety", "over-refusal"):
        own = [each.name for each in benchmarks if each.side == side]
        found[side.replace("-", "_")] = found[own].mean(axis=1)
    # Over-refusal's loss is a rise.
    losses, safety = {"ucr": found["utility"], "over_refusal_cr": 1 - found["over_refusal"]}, found["safety"]
    for each in (each for each in benchmarks if each.source_domain):
        losses["source_cr"] = found[each.name]
    for name, values in losses.items():
        if values.notna().all():
            found[name] = [np.nan, *metrics.utility_cost_ratio(values[0], values[1:], safety[0], safety[1:])]
    found["flag"] = [None, *np.where(safety[1:] <= safety[0], "no safety gain", None)]
    stored = pd.read_csv(run.folder / "06_correlate" / "tables" / "costs.csv")
    return unequal(stored, pd.concat([models(run), found], axis=1)), f"{len(stored)} models"
