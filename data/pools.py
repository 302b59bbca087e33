"""The public data sets as pools: repository, pinned commit, split, columns, and what a row becomes (§4.1,
App. A, Table 4). `data.hub` reads them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from backends.core.errors import InputError
from data.records import DATA_TYPES, entry_of

# Table 4. The paper "appends" the input to the instruction and does not say by what: a blank line here.
REASONING_TEMPLATE = (
    "Solve the math problem step by step. Write the final answer inside a LaTeX \\boxed{} expression.\n\n"
    "{question}"
)
KNOWLEDGE_TEMPLATE = (
    "Read the multiple-choice question carefully and output only the capital letter (A, B, C, D, or E) that "
    "corresponds to the correct choice. Do not include any explanation or extra text.\n\n{question}"
)
LETTERS = ("A", "B", "C", "D", "E")


class EmptyTextError(InputError):
    pass


@dataclass(frozen=True)
class Row:
    values: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str:
        value = self.values[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise EmptyTextError(f"{self.where}: column '{column}' is empty")
        if not isinstance(value, str):
            raise InputError(f"{self.where}: column '{column}' is not text")
        return value


def _letters(row: Row, texts: Any, answer: Any) -> dict[str, Any]:
    """The paper is silent on the layout: the question, then one line a choice, "A. ..."."""
    question = row.text("question")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise InputError(f"{row.where}: column 'choices' is not a list of 2 to {len(LETTERS)} texts")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{row.where}: column 'choices' holds an empty choice")
    if not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise InputError(f"{row.where}: the answer names none of the {len(texts)} choices")
    letters = LETTERS[: len(texts)]
    lines = [question, *(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))]
    prompt = KNOWLEDGE_TEMPLATE.replace("{question}", "\n".join(lines))
    fields = {"prompt": prompt, "target": letters[answer], "choices": letters, "answer": answer}
    return {"entry": entry_of(question), "scoring": "choice", **fields}


def _mmlu(row: Row) -> dict[str, Any]:
    return _letters(row, row.values["choices"], row.values["answer"])


def _csqa(row: Row) -> dict[str, Any]:
    choices, key = row.values["choices"], row.text("answerKey")
    labels = choices.get("label") if isinstance(choices, dict) else None
    if not labels or tuple(labels) != LETTERS[: len(labels)]:
        raise InputError(f"{row.where}: column 'choices' does not label its texts A, B, C, ...")
    return _letters(row, choices.get("text"), labels.index(key) if key in labels else -1)


def _reasoning(question: str, gold: str) -> dict[str, Any]:
    prompt = REASONING_TEMPLATE.replace("{question}", question)
    return {"entry": entry_of(question), "prompt": prompt, "target": gold, "scoring": "boxed"}


def _gsm8k(row: Row) -> dict[str, Any]:
    _, mark, gold = row.text("answer").rpartition("####")
    gold = gold.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", gold):
        raise InputError(f"{row.where}: column 'answer' has no number after ####")
    return _reasoning(row.text("question"), gold)


def _gsm8k_worked(row: Row) -> dict[str, Any]:
    """GSM8K as calibration: the loss is taken on the worked solution, without its calculator marks, with the
    answer boxed as the prompt asks (the paper is silent)."""
    fields = _gsm8k(row)
    solution = re.sub(r"<<.*?>>", "", row.text("answer").rpartition("####")[0]).strip()
    return fields | {"target": f"{solution}\nThe final answer is \\boxed{{{fields['target']}}}."}


def _math(row: Row) -> dict[str, Any]:
    return _reasoning(row.text("problem"), row.text("answer").strip())


def _request(row: Row, column: str, question: str | None = None) -> dict[str, Any]:
    """A malicious prompt, without a template (Table 4); `question`: what it wraps, where that is known."""
    prompt = row.text(column)
    return {"entry": entry_of(question or prompt), "prompt": prompt, "scoring": "refusal"}


def _completed(row: Row) -> dict[str, Any]:
    """A row of WildJailbreak's train split, with the completion to learn."""
    form, kind = row.text("data_type").split("_")
    fields = _request(row, form, row.text("vanilla")) | {"target": row.text("completion")}
    return fields if kind == "harmful" else fields | {"scoring": "over_refusal"}


@dataclass(frozen=True)
class Pool:
    repository: str
    revision: str
    config: str | None
    parts: tuple[tuple[str, str], ...]
    """(split on the hub, name of a local file without its ending), read one after the other"""
    columns: tuple[str, ...]
    fields: Callable[[Row], dict[str, Any]]
    """fields of a Record"""
    keep: tuple[str, Any] | None = None
    """(column, value) of the rows that belong to the pool; None: all do"""
    distinct: bool = False
    """repeats of a prompt are left out"""
    skip_empty: bool = False
    """rows with an empty text are left out and counted, instead of an error"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """of load_dataset"""

    @property
    def url(self) -> str:
        return f"https://huggingface.co/datasets/{self.repository}"

    @property
    def files(self) -> str:
        return " or ".join(f"{stem}.parquet" for _, stem in self.parts)


# Repository, commit, config. Other public projects pin the same commits; the commit that was loaded is
# compared with them and recorded in the provenance.
_MMLU = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "all")
_CSQA = ("tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155", None)
_GSM8K = ("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", "main")
_MATH = ("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", None)
_WILDJAILBREAK = ("allenai/wildjailbreak", "5ddc12a7894f842b0619b8e1c7ee496b198af009")
_WILDGUARD = ("allenai/wildguardmix", "d29c47f41c8b51348b5c8e8c81c039b3132b66d1", "wildguardtest")
_IN_THE_WILD = ("TrustAIRLab/in-the-wild-jailbreak-prompts", "a10aab8eff1c73165a442d4464dce192bd28b9c5")
_DAN = (*_IN_THE_WILD, "jailbreak_2023_12_25")

# The data card asks for these options: an empty cell is "", not NaN.
_TSV = {"options": {"delimiter": "\t", "keep_default_na": False}}
_EVAL = ("eval", (("train", "wildjailbreak_eval"),))  # the hub calls its only split train
TRAIN = (("train", "wildjailbreak_train"),)
_TRAIN_COLUMNS = ("vanilla", "adversarial", "completion", "data_type")
_CALIBRATION = (("validation", "mmlu_validation"), ("dev", "mmlu_dev"))  # test is the benchmark
_MC, _QA = ("question", "choices", "answer"), ("question", "answer")
_ADVERSARIAL, _HARMFUL = ("data_type", "adversarial_harmful"), ("prompt_harm_label", "harmful")
_TEST = (("test", "wildguard_test"),)
_prompt, _adversarial = partial(_request, column="prompt"), partial(_request, column="adversarial")


def _train(data_type: str, fields: Callable[[Row], dict[str, Any]] = _completed) -> Pool:
    keep = ("data_type", data_type)
    return Pool(*_WILDJAILBREAK, "train", TRAIN, _TRAIN_COLUMNS, fields, keep, skip_empty=True, **_TSV)


def _form(row: Row, column: str) -> dict[str, Any]:
    """One of the two forms of a request, with the completion of the attacked one."""
    return _request(row, column, row.text("vanilla")) | {"target": row.text("completion")}


POOLS: dict[str, Pool] = {
    # benchmarks; CommonsenseQA's test split has no answers, the paper's 1,221 rows are those of validation
    "mmlu": Pool(*_MMLU, (("test", "mmlu_test"),), _MC, _mmlu),
    "csqa": Pool(*_CSQA, (("validation", "csqa_validation"),), ("question", "choices", "answerKey"), _csqa),
    "gsm8k": Pool(*_GSM8K, (("test", "gsm8k_test"),), _QA, _gsm8k),
    "math": Pool(*_MATH, (("test", "math500_test"),), ("problem", "answer"), _math),
    "wildjailbreak": Pool(*_WILDJAILBREAK, *_EVAL, ("adversarial",), _adversarial, _ADVERSARIAL, **_TSV),
    "wildguard": Pool(*_WILDGUARD, _TEST, ("prompt",), _prompt, _HARMFUL, distinct=True),
    "dan": Pool(*_DAN, (("train", "dan_jailbreak"),), ("prompt",), _prompt, ("jailbreak", True)),
    # calibration
    "mmlu_calibration": Pool(*_MMLU, _CALIBRATION, _MC, _mmlu),
    "gsm8k_calibration": Pool(*_GSM8K, (("train", "gsm8k_train"),), _QA, _gsm8k_worked),
    "wildjailbreak_safe": _train("vanilla_harmful"),
    "wildjailbreak_plain": _train("adversarial_harmful", partial(_form, column="vanilla")),
    "wildjailbreak_attacked": _train("adversarial_harmful", partial(_form, column="adversarial")),
    **{data_type: _train(data_type) for data_type in DATA_TYPES},  # alignment
}
