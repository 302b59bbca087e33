"""The public data sets as pools: repository, pinned commit, split, columns, and what a row becomes (§4.1,
App. A, Table 4; and sets that others score by). `data.hub` reads them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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


# What a row becomes: its columns in, fields of a Record out. ValueError names the column that is wrong.


def _letters(question: str, texts: Any, answer: Any) -> dict[str, Any]:
    """The paper is silent on the layout: the question, then one line a choice, "A. ..."."""
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"column 'choices' is not a list of 2 to {len(LETTERS)} texts")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("column 'choices' holds an empty choice")
    if not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise ValueError(f"the answer names none of the {len(texts)} choices")
    letters = LETTERS[: len(texts)]
    lines = [question, *(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))]
    prompt = KNOWLEDGE_TEMPLATE.replace("{question}", "\n".join(lines))
    fields = {"prompt": prompt, "target": letters[answer], "choices": letters, "answer": answer}
    return {"entry": entry_of(question), "scoring": "choice", **fields}


def _mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    return _letters(row["question"], row["choices"], row["answer"])


def _csqa(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, key = row["choices"], row["answerKey"]
    labels = choices.get("label") if isinstance(choices, dict) else None
    if not labels or tuple(labels) != LETTERS[: len(labels)]:
        raise ValueError("column 'choices' does not label its texts A, B, C, ...")
    return _letters(row["question"], choices.get("text"), labels.index(key) if key in labels else -1)


def _reasoning(question: str, gold: str) -> dict[str, Any]:
    prompt = REASONING_TEMPLATE.replace("{question}", question)
    return {"entry": entry_of(question), "prompt": prompt, "target": gold, "scoring": "boxed"}


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    _, mark, gold = row["answer"].rpartition("####")
    gold = gold.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", gold):
        raise ValueError("column 'answer' has no number after ####")
    return _reasoning(row["question"], gold)


def _gsm8k_worked(row: Mapping[str, Any]) -> dict[str, Any]:
    """GSM8K as calibration: the loss is taken on the worked solution, without its calculator marks, with the
    answer boxed as the prompt asks (the paper is silent)."""
    fields = _gsm8k(row)
    solution = re.sub(r"<<.*?>>", "", row["answer"].rpartition("####")[0]).strip()
    return fields | {"target": f"{solution}\nThe final answer is \\boxed{{{fields['target']}}}."}


def _math(row: Mapping[str, Any]) -> dict[str, Any]:
    return _reasoning(row["problem"], row["answer"].strip())


def _request(
    row: Mapping[str, Any], prompt: str, question: str = "", scoring: str = "refusal"
) -> dict[str, Any]:
    """A request without a template (Table 4), and the completion to learn where the set has one.

    Args:
        prompt, question: columns: the request, and what it wraps where that is known.
    """
    entry, target = entry_of(row[question or prompt]), row.get("completion", "")
    return {"entry": entry, "prompt": row[prompt], "target": target, "scoring": scoring}


def page(repository: str) -> str:
    """Of a data set on the hub."""
    return f"https://huggingface.co/datasets/{repository}"


def _strongreject(row: Mapping[str, Any]) -> dict[str, Any]:
    """Its authors' copy on the hub keeps the parts of a text in a list, here always of one."""
    content = row["content"]
    if not isinstance(content, list) or not content or not all(isinstance(part, str) for part in content):
        raise ValueError("column 'content' is not a list of texts")
    if not (prompt := "".join(content)).strip():
        raise ValueError("column 'content' is empty")
    return _request({"prompt": prompt}, "prompt")


@dataclass(frozen=True)
class Pool:
    repository: str
    revision: str
    config: str | None
    parts: Mapping[str, str]
    """split on the hub -> name of a local file without its ending; read one after the other"""
    texts: tuple[str, ...]
    """columns of text, none of it empty"""
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    """fields of a Record, from the columns of a row"""
    others: tuple[str, ...] = ()
    """further columns, which `fields` checks or ignores"""
    keep: tuple[str, Any] | None = None
    """(column, value) of the rows that belong to the pool; None: all do"""
    skip_empty: bool = False
    """rows with an empty text are left out and counted, instead of an error"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """of load_dataset"""
    distinct: bool = False
    """repeats of a prompt are left out"""

    @property
    def url(self) -> str:
        return page(self.repository)

    @property
    def files(self) -> str:
        return " or ".join(f"{stem}.parquet" for stem in self.parts.values())


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
_XSTEST = ("Paul/XSTest", "f600c994b256f12867dfa5b3eb3d545a3e62f8b5", None)
_ORBENCH = ("bench-llm/or-bench", "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272", "or-bench-hard-1k")
_JAILBREAKBENCH = ("JailbreakBench/JBB-Behaviors", "886acc352a31533ffbcf4ef22c744658688086fc", "behaviors")
_STRONGREJECT = ("AlignmentResearch/StrongREJECT", "9f4b3397bda985e1ac6dadb655e9ca3a17974144", None)
# No commit is pinned by others either: the newest is read, and the provenance says which that was.
_HARMBENCH = ("swiss-ai/harmbench", "main", "DirectRequest")

# The data card asks for these options: an empty cell is "", not NaN.
_TSV = {"delimiter": "\t", "keep_default_na": False}
TRAIN_FILE = "wildjailbreak_train"
_BEFORE_TEST = {"validation": "mmlu_validation", "dev": "mmlu_dev"}
_prompt = partial(_request, prompt="prompt")
_benign = partial(_request, prompt="prompt", scoring="over_refusal")
_goal = partial(_request, prompt="Goal")


def _train(data_type: str, form: str = "") -> Pool:
    """Rows of WildJailbreak's train split, in the form of their data type or in the other one."""
    kind, outcome = data_type.split("_")
    form, scoring = form or kind, "refusal" if outcome == "harmful" else "over_refusal"
    texts = tuple(dict.fromkeys((form, "vanilla", "completion")))
    fields = partial(_request, prompt=form, question="vanilla", scoring=scoring)
    keep, parts = ("data_type", data_type), {"train": TRAIN_FILE}
    return Pool(*_WILDJAILBREAK, "train", parts, texts, fields, ("adversarial",), keep, True, _TSV)


POOLS: dict[str, Pool] = {
    # benchmarks; CommonsenseQA's test split has no answers, the paper's 1,221 rows are those of validation
    "mmlu": Pool(*_MMLU, {"test": "mmlu_test"}, ("question",), _mmlu, ("choices", "answer")),
    "csqa": Pool(*_CSQA, {"validation": "csqa_validation"}, ("question", "answerKey"), _csqa, ("choices",)),
    "gsm8k": Pool(*_GSM8K, {"test": "gsm8k_test"}, ("question", "answer"), _gsm8k),
    "math": Pool(*_MATH, {"test": "math500_test"}, ("problem", "answer"), _math),
    "wildjailbreak": Pool(
        *_WILDJAILBREAK,
        config="eval",
        parts={"train": "wildjailbreak_eval"},  # the hub calls its only split train
        texts=("adversarial",),
        fields=partial(_request, prompt="adversarial"),
        keep=("data_type", "adversarial_harmful"),
        options=_TSV,
    ),
    "wildguard": Pool(
        *_WILDGUARD,
        parts={"test": "wildguard_test"},
        texts=("prompt",),
        fields=_prompt,
        keep=("prompt_harm_label", "harmful"),
        distinct=True,
    ),
    "dan": Pool(*_DAN, {"train": "dan_jailbreak"}, ("prompt",), _prompt, keep=("jailbreak", True)),
    # benchmarks that are not in the paper: harmless requests that look harmful, harmful ones as they are
    "xstest": Pool(*_XSTEST, {"train": "xstest_train"}, ("prompt", "label"), _benign, keep=("label", "safe")),
    "orbench": Pool(*_ORBENCH, {"train": "orbench_hard"}, ("prompt",), _benign),
    "strongreject": Pool(
        *_STRONGREJECT, {"validation": "strongreject_validation"}, (), _strongreject, ("content",)
    ),
    # Its contextual rows need their context, and its copyright rows a judge of their own.
    "harmbench": Pool(
        *_HARMBENCH,
        {"val+test": "harmbench_behaviors"},
        ("Behavior", "FunctionalCategory"),
        partial(_request, prompt="Behavior"),
        keep=("FunctionalCategory", "standard"),
    ),
    "jailbreakbench": Pool(*_JAILBREAKBENCH, {"harmful": "jailbreakbench_harmful"}, ("Goal",), _goal),
    "jailbreakbench_benign": Pool(
        *_JAILBREAKBENCH,
        {"benign": "jailbreakbench_benign"},
        ("Goal",),
        partial(_goal, scoring="over_refusal"),
    ),
    # calibration; MMLU's test split is the benchmark
    "mmlu_calibration": Pool(*_MMLU, _BEFORE_TEST, ("question",), _mmlu, ("choices", "answer")),
    "gsm8k_calibration": Pool(*_GSM8K, {"train": "gsm8k_train"}, ("question", "answer"), _gsm8k_worked),
    "wildjailbreak_safe": _train("vanilla_harmful"),
    "wildjailbreak_plain": _train("adversarial_harmful", "vanilla"),
    "wildjailbreak_attacked": _train("adversarial_harmful"),
    **{data_type: _train(data_type) for data_type in DATA_TYPES},  # alignment
}
