"""A classifier over stage 05's outputs, a unit each: WildGuard (--judge wildguard), which writes its answer,
or any sequence classifier (--judge hf:MODEL:LABEL). Loaded only where it is asked for."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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

Words = list[dict]
"""columns of CLASSIFIED for each output"""


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


def model_of(settings: Settings) -> tuple[str, str] | None:
    """The classifier's hub id or folder, and the option that names it; None: the keyword judge is alone."""
    if settings.evaluation.judge == "wildguard":
        return settings.evaluation.judge_model, "--judge-model"
    return (settings.label_judge.model, "--judge") if settings.label_judge else None


def missing(settings: Settings) -> str | None:
    """One line on a classifier that the run needs and that cannot be had; nothing is fetched."""
    if (chosen := model_of(settings)) is None:
        return None
    problem = models.missing(chosen[0], option=chosen[1])
    return problem and f"--judge {settings.evaluation.judge}: {problem}"


def folder_of(settings: Settings) -> Path | None:
    """The classifier's folder; None: the run has none. InputError where it cannot be had or used."""
    if (chosen := model_of(settings)) is None:
        return None
    if problem := missing(settings):
        raise InputError(problem)
    folder, judge = models.local_folder(chosen[0]), settings.label_judge
    if judge is None:
        backends.check_folder("torch", folder)
        models.load_tokenizer(folder, chat=False)
        return folder
    backends.check("torch")
    from backends.torch.classifier import labels_of  # torch takes seconds, and other judges do without

    labels = labels_of(folder)
    if unknown := [label for label in judge.labels if label not in labels]:
        raise InputError(f"--judge: {folder} has no label {unknown[0]!r}; it has {', '.join(labels)}")
    if set(labels) <= set(judge.labels):
        raise InputError(f"--judge: all labels of {folder} would be refusals: {', '.join(labels)}")
    return folder


def identity(settings: Settings) -> str | None:
    """What a manifest says of the classifier: its id, then hashes of its weights and config; of a sequence
    classifier also its labels, and one hash of all that its verdicts follow from. None: the run has none.
    InputError where it cannot be had or used."""
    folder = folder_of(settings)
    if folder is None:
        return None
    model, judge = model_of(settings)[0], settings.label_judge
    hashes = models.model_hashes(folder)
    if judge is None:
        return f"{model} {'-'.join(digest[:16] for digest in hashes.values())}"
    labels = models.read_config(folder)["id2label"]
    described = hashes | asdict(judge) | {"id2label": labels, "tokenizer": models.tokenizer_sha256(folder)}
    del described["model"]  # its place may be another
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return f"{model}:{','.join(judge.labels)} {digest[:16]}"


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
    judge = wildguard(job.settings) if job.settings.label_judge is None else by_label(job.settings)
    for unit, frame in progress(outputs.items(), desc="classifier", unit="unit"):
        words = pd.DataFrame(judge(frame), columns=CLASSIFIED.names, dtype=object)
        job.keep(unit, words, CLASSIFIED)


def wildguard(settings: Settings) -> Callable[[pd.DataFrame], Words]:
    """WildGuard, loaded: what it says of outputs (columns of OUTPUTS)."""
    folder = folder_of(settings)
    backend = backends.load("torch", folder, dtype=settings.model.dtype, device=settings.run.device)
    tokenizer = models.load_tokenizer(folder, chat=False)
    control, nothing = Control(tokenizer), np.zeros(0, np.int32)

    def judge(frame: pd.DataFrame) -> Words:
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
            labels = {"example_id": row.example_id, "unclear": word is None, "cut": False}
            words.append(labels | {"refusal": refusal, "harmful": harmful})
        return words

    return judge


def by_label(settings: Settings) -> Callable[[pd.DataFrame], Words]:
    """A sequence classifier, loaded: what it says of outputs (columns of OUTPUTS)."""
    from backends.torch.classifier import SequenceClassifier

    wanted = settings.label_judge
    model = SequenceClassifier(folder_of(settings), settings.run.device)

    def judge(frame: pd.DataFrame) -> Words:
        words = []
        for row in frame.itertuples():
            label = model(wanted.text(row.prompt, answer_of(row.output)))
            words.append(
                {
                    "example_id": row.example_id,
                    "unclear": False,
                    "cut": label.cut,
                    "refusal": label.name in wanted.labels,
                    "harmful": None,
                }
            )
        return words

    return judge
