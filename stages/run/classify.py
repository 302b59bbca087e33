"""WildGuard's classifier over stage 05's outputs, a unit each: loaded only with --judge wildguard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import backends
from backends import models
from backends.base import Example
from backends.core.errors import InputError
from backends.core.progress import progress
from data import classifier
from data.benchmarks import Benchmark
from data.control import Control
from data.thoughts import answer_of
from stages.method.arms import ArmRun
from stages.run.job import Job
from stages.run.schemas import CLASSIFIED, OUTPUTS, RESPONSES
from stages.run.settings import Settings
from stages.run.store import read_table


@dataclass(frozen=True)
class Evaluation:
    """A unit of stage 05: one model's answers to one benchmark."""

    run: ArmRun
    benchmark: Benchmark

    @property
    def unit(self) -> str:
        return f"{self.run.name}-{self.benchmark.name}"


@dataclass(frozen=True)
class Classification:
    """A unit: the classifier's words on another unit's outputs."""

    evaluation: Evaluation


def missing(settings: Settings) -> str | None:
    """One line on a classifier that the run needs and that cannot be had; nothing is fetched."""
    if settings.evaluation.judge != "wildguard":
        return None
    problem = models.missing(settings.evaluation.judge_model, option="--judge-model")
    return problem and f"--judge wildguard: {problem}"


def folder_of(settings: Settings) -> Path | None:
    """The classifier's folder; None: the run has none. InputError where it cannot be had or used."""
    if settings.evaluation.judge != "wildguard":
        return None
    if problem := missing(settings):
        raise InputError(problem)
    folder = models.local_folder(settings.evaluation.judge_model)
    backends.check_folder("torch", folder)
    models.load_tokenizer(folder, chat=False)
    return folder


def identity(settings: Settings) -> str | None:
    """What a manifest says of the classifier: its id, weights and config; None: the run has none. InputError
    where it cannot be had or used."""
    folder = folder_of(settings)
    if folder is None:
        return None
    hashes = "-".join(digest[:16] for digest in models.model_hashes(folder).values())
    return f"{settings.evaluation.judge_model} {hashes}"


def units(settings: Settings, evaluations: Sequence[Evaluation]) -> dict[str, Classification]:
    """The units that classify responses to requests; none without a classifier."""
    which = identity(settings)
    if which is None:
        return {}
    hashes = which.rpartition(" ")[2]
    return {
        f"{evaluation.unit}-classified-{hashes}": Classification(evaluation)
        for evaluation in evaluations
        if evaluation.benchmark.side != "utility"
    }


def outputs_of(job: Job, evaluation: Evaluation) -> pd.DataFrame | None:
    """A unit's outputs: its part, or its rows of a finished table that is judged again; None: another shard
    has not answered yet."""
    if job.judging_again:
        whole = read_table(job.folder / RESPONSES.file(), RESPONSES.schema, OUTPUTS.names)
        labels = evaluation.run.labels | {"benchmark": evaluation.benchmark.name}
        chosen = [
            whole[name].isna() if value is None else whole[name] == value for name, value in labels.items()
        ]
        return whole[np.logical_and.reduce(chosen)]
    return job.parts([evaluation.unit], OUTPUTS) if job.has_part(evaluation.unit) else None


def compute(job: Job, pending: Mapping[str, Classification]) -> None:
    """Classifies the outputs of units that are answered."""
    outputs = {unit: outputs_of(job, work.evaluation) for unit, work in pending.items()}
    outputs = {unit: frame for unit, frame in outputs.items() if frame is not None}
    if not outputs:
        return
    job.release()  # the classifier wants the place of the run's model on the device
    settings = job.settings
    folder = folder_of(settings)
    backend = backends.load("torch", folder, dtype=settings.model.dtype, device=settings.run.device)
    tokenizer = models.load_tokenizer(folder, chat=False)
    control, nothing = Control(tokenizer), np.zeros(0, np.int32)
    for unit, frame in progress(outputs.items(), desc="classifier", unit="unit"):
        prompts = []
        for row in frame.itertuples():
            said = map(control.as_text, (row.prompt, answer_of(row.output)))
            ids = control.ids(classifier.prompt(*said))
            prompts.append(Example(row.example_id, np.array(ids, np.int32), nothing, nothing, -1))
        words = []
        for row, tokens in zip(
            frame.itertuples(), backend.generate(prompts, classifier.NEW_TOKENS), strict=True
        ):
            word = classifier.parse(tokenizer.decode(tokens, skip_special_tokens=True))
            refusal, harmful = (word.refusal, word.harmful_response) if word else (None, None)
            labels = {"example_id": row.example_id, "unclear": word is None}
            words.append(labels | {"refusal": refusal, "harmful": harmful})
        job.keep(unit, pd.DataFrame(words, columns=CLASSIFIED.names, dtype=object), CLASSIFIED)
