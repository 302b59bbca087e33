"""Stage 05: the benchmarks, for the base model and every arm (§4.1, App. A).

    python -m stages.05_evaluate --run outputs/smollm
    python -m stages.05_evaluate --run outputs/llama --judge wildguard      # judges the kept responses again
    python -m stages.05_evaluate --run outputs/llama --judge hf:MODEL:LABEL   # so does a sequence classifier
    python -m stages.05_evaluate --run outputs/llama --drift                # and how far each arm's map moved

Knowledge is scored by the next token, all else by generated text (data/scoring.py). Reads
benchmarks.parquet and the adapters; writes responses.parquet (every prompt, output, verdict) and
scores.parquet. Each arm x benchmark is a unit. Judging comes after the units and reads their outputs only:
with another judge, or another version of it, a finished stage is judged again and nothing is generated.

With --drift also drift.parquet: the map by gradients of every tuned model, on the rows of
calibration.parquet; some layers of an arm are a unit. A finished stage computes only that.
"""

import time

import pandas as pd

from backends.base import Backend
from backends.core.progress import progress
from data import refusal_judge
from data.rendering import conversations_of, example
from stages.method.arms import BASE_RUN, ArmRun
from stages.run import candidates, classify, cli, drift, judging, tracking, unread
from stages.run.classify import Classification, Evaluation
from stages.run.drift import Diagnosis
from stages.run.job import Job, Stage, Units
from stages.run.schemas import ARMS, BENCHMARKS, CALIBRATION, CLASSIFIED, DRIFT, OUTPUTS, RESPONSES, SCORES
from stages.run.settings import Settings


def runs(settings: Settings) -> list[ArmRun]:
    """The base model and every arm."""
    return [BASE_RUN, *settings.arm_runs]


def evaluations(settings: Settings) -> list[Evaluation]:
    """Each of them on every benchmark."""
    return [Evaluation(run, benchmark) for run in runs(settings) for benchmark in settings.benchmarks]


def units(job: Job) -> Units:
    own = evaluations(job.settings)
    answering = {} if job.judging_again else {evaluation.unit: evaluation for evaluation in own}
    return answering | drift.units(job) | classify.units(job.settings, own)


def compute(job: Job, pending: Units) -> None:
    answering = {unit: work for unit, work in pending.items() if isinstance(work, Evaluation)}
    diagnosing = {unit: work for unit, work in pending.items() if isinstance(work, Diagnosis)}
    classifying = {unit: work for unit, work in pending.items() if isinstance(work, Classification)}
    if answering:
        answer(job, answering)
    if diagnosing:
        drift.compute(job, diagnosing)
    if classifying:
        classify.compute(job, classifying)


def answer(job: Job, pending: Units) -> None:
    """Answers benchmarks; the bar shows each one's score by the keyword judge."""
    rows, backend = job.read(BENCHMARKS), job.backend
    bar = progress(pending.items(), desc=job.stage.name, unit="unit")
    for unit, work in bar:
        requested = rows[rows["split"] == work.benchmark.name].reset_index(drop=True)
        began = time.monotonic()
        outputs = respond(job, backend, requested, work)
        job.keep(unit, outputs, OUTPUTS, seconds=round(time.monotonic() - began, 2))
        score = judging.judge_outputs(outputs, requested, work.benchmark)["verdict"].mean()
        bar.set_postfix_str(f"{unit} {score:.3f}")


def respond(job: Job, backend: Backend, rows: pd.DataFrame, work: Evaluation) -> pd.DataFrame:
    """One model's outputs on a benchmark's rows: next-token choices in one go, all others by generation; and
    how likely the targets are."""
    adapter = job.run.folder / "04_align" / "adapters" / work.run.name if work.run.optimizer else None
    outputs = pd.DataFrame(
        work.run.labels | {"benchmark": work.benchmark.name} | dict.fromkeys(OUTPUTS.names[4:]),
        index=rows.index,
        dtype=object,
    ).assign(example_id=rows["example_id"], prompt=conversations_of(rows))
    choice = rows["scoring"] == "choice"
    graded = (rows["target_ids"].map(len) + rows["refusal_ids"].map(len) > 0) & ~choice
    if choice.any():
        chosen = rows[choice].to_dict("records")
        outcome, found = backend.grade([example(row) for row in chosen], adapter)
        texts = [
            row["choices"][predicted] if len(row["choices"]) else job.tokenizer.decode([predicted])
            for row, predicted in zip(chosen, found.prediction.tolist(), strict=True)
        ]
        columns = {"output": texts, "token_ids": [[]] * len(texts), "graded": outcome.tolist()}
        columns |= {"prediction": found.prediction.tolist(), "probability": found.probability.tolist()}
        outputs.loc[choice, list(columns)] = pd.DataFrame(columns, index=rows.index[choice], dtype=object)
    if not choice.all():
        written = [example(row) for row in rows[~choice].to_dict("records")]
        generated = backend.generate(written, work.benchmark.new_tokens, adapter)
        texts = [job.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generated]
        columns = {"output": texts, "token_ids": [tokens.tolist() for tokens in generated]}
        outputs.loc[~choice, list(columns)] = pd.DataFrame(columns, index=rows.index[~choice], dtype=object)
    if graded.any():
        own = [example(row) for row in rows[graded].to_dict("records")]
        outputs.loc[graded, "graded"] = backend.grade(own, adapter).outcome
    return outputs


def join(job: Job) -> dict:
    """Judges all outputs and scores every model on every benchmark."""
    own, rows = evaluations(job.settings), job.read(BENCHMARKS)
    outputs = job.outputs(RESPONSES, (evaluation.unit for evaluation in own), OUTPUTS)
    classified = classify.units(job.settings, own)
    unit_of = {work.evaluation.unit: unit for unit, work in classified.items()}
    responses, unclear, cut, start = [], 0, 0, 0
    for evaluation in progress(own, desc="judging", unit="unit"):
        requested, words = rows[rows["split"] == evaluation.benchmark.name], None
        answered = outputs.iloc[start : start + len(requested)]
        start += len(requested)
        if evaluation.unit in unit_of:
            words = job.parts([unit_of[evaluation.unit]], CLASSIFIED)
            unclear += int(words["unclear"].sum())
            cut += int(words["cut"].sum())
        responses.append(judging.judge_outputs(answered, requested, evaluation.benchmark, words))
    judged = pd.concat(responses, ignore_index=True)
    sides = {benchmark.name: benchmark.side for benchmark in job.settings.benchmarks}
    scores = judging.score_rows(judged, sides)
    say_scores(job, scores, [*sides])
    if unclear:
        job.warn(f"the classifier gave no clear answer on {unclear} responses: they are no refusals")
    if cut:
        job.warn(f"{cut} responses are longer than the classifier reads: it judged what fits")
    likely = candidates.probability(own, responses, rows)
    candidates.say(job, likely)
    cannot_read = unread.of_responses(judged, sides)
    unread.say(job, cannot_read, decides=not classified)
    job.write(RESPONSES, judged)
    job.write(SCORES, scores)
    drift.join(job)
    return {"responses": len(judged), "candidate_probability": likely, "unread": cannot_read}


def say_scores(job: Job, scores: pd.DataFrame, benchmarks: list[str]) -> None:
    """Every model's scores, in the log and where they are tracked."""
    settings = job.settings
    by_model = scores["score"].to_numpy().reshape(-1, len(benchmarks)).tolist()
    for run, own in zip(runs(settings), by_model, strict=True):
        job.say(f"{run.name}: {', '.join(map('{} {:.3f}'.format, benchmarks, own))}")
        with tracking.tracked(settings.run.track, settings.folder, run.name, job.warn) as tracker:
            tracker.log({f"score/{name}": value for name, value in zip(benchmarks, own, strict=True)})


def judge(settings: Settings) -> dict:
    """What a manifest says of the judges, and of drift where that is asked for: a finished stage without it
    gets it, one with it keeps it."""
    judges = {"judge": refusal_judge.KEYWORD_JUDGE_VERSION, "classifier": classify.identity(settings)}
    return judges | ({"drift": True} if settings.evaluation.drift else {})


STAGE = Stage(
    name="05_evaluate",
    rests_on=("model", "data", "map", "tuning"),
    reads=(CALIBRATION, BENCHMARKS, ARMS),
    writes=(RESPONSES, SCORES, DRIFT),
    units=units,
    compute=compute,
    join=join,
    few_rows=True,
    also_reads="04_align/adapters",
    judged_by=judge,
)


if __name__ == "__main__":
    cli.run(STAGE)
