"""Made-up rows in the columns of the public sets, in a folder or behind a replaced `datasets`."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the public data sets are not in ../shared/data"
)

MMLU = [
    {"question": "Which?", "subject": "s", "choices": ["p", "q", "r", "s"], "answer": 2},
    {"question": "And which?", "subject": "s", "choices": ["t", "u", "v", "w"], "answer": 0},
]
CSQA_CHOICES = {"label": list("ABCDE"), "text": ["p", "q", "r", "s", "t"]}
CSQA = [{"id": "1", "question": "Where?", "question_concept": "c", "choices": CSQA_CHOICES, "answerKey": "E"}]
GSM8K = [{"question": "How many?", "answer": "1000 + 200 = 1200\n#### 1,200"}]
MATH = [{"problem": "Find $x$.", "solution": "s", "answer": "\\frac{1}{2}", "subject": "s", "level": 1}]
TRAIN = [
    {"vanilla": "Bad?", "adversarial": "", "completion": "No.", "data_type": "vanilla_harmful"},
    {"vanilla": "Good?", "adversarial": "", "completion": "Yes.", "data_type": "vanilla_benign"},
    {"vanilla": "bad", "adversarial": "Play: bad", "completion": "No!", "data_type": "adversarial_harmful"},
    {
        "vanilla": "Good!",
        "adversarial": "Play: good",
        "completion": "Yes!",
        "data_type": "adversarial_benign",
    },
]
EVAL = [
    {"adversarial": "Fine", "label": 0, "data_type": "adversarial_benign"},
    {"adversarial": "Worse", "label": 1, "data_type": "adversarial_harmful"},
]
WILDGUARD = [
    {"prompt": "Worst", "adversarial": False, "prompt_harm_label": "harmful"},
    {"prompt": "Fine", "adversarial": False, "prompt_harm_label": "unharmful"},
    {"prompt": "Worst", "adversarial": True, "prompt_harm_label": "harmful"},
    {"prompt": "Unsure", "adversarial": True, "prompt_harm_label": None},
]
DAN = [
    {"prompt": "You are D.", "jailbreak": True, "standin_half": "template"},
    {"prompt": "You are E.", "jailbreak": True, "standin_half": "heldout"},
    {"prompt": "You are nice.", "jailbreak": False, "standin_half": "heldout"},
]
XSTEST = [
    {"id": 1, "prompt": "Kill a process?", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
    {"id": 2, "prompt": "Bad?", "type": "contrast_homonyms", "label": "unsafe", "focus": "", "note": ""},
]
ORBENCH = [{"prompt": "Is it bad?", "category": "c"}]
STRONGREJECT = [{"content": ["How to do bad?"], "instructions": "", "clf_label": 0}]
HARMBENCH = [
    {
        "Behavior": behaviour,
        "FunctionalCategory": kind,
        "SemanticCategory": "s",
        "Tags": "",
        "ContextString": "",
    }
    | {"BehaviorID": kind}
    for behaviour, kind in (("Do bad", "standard"), ("Do it", "contextual"), ("Sing it", "copyright"))
]
JBB = {
    kind: [{"Index": 0, "Goal": goal, "Target": "Sure", "Behavior": "b", "Category": "c", "Source": "s"}]
    for kind, goal in (("harmful", "Write bad"), ("benign", "Write of bad"))
}
TRUSTAI = "TrustAIRLab/in-the-wild-jailbreak-prompts"
SPLITS = {  # repository, config and split on the hub; local file; rows
    ("cais/mmlu", "all", "test"): ("mmlu_test", MMLU),
    ("cais/mmlu", "all", "validation"): ("mmlu_validation", MMLU[:1]),
    ("cais/mmlu", "all", "dev"): ("mmlu_dev", MMLU[1:]),
    ("tau/commonsense_qa", None, "validation"): ("csqa_validation", CSQA),
    ("openai/gsm8k", "main", "test"): ("gsm8k_test", GSM8K),
    ("openai/gsm8k", "main", "train"): ("gsm8k_train", GSM8K),
    ("HuggingFaceH4/MATH-500", None, "test"): ("math500_test", MATH),
    ("allenai/wildjailbreak", "train", "train"): ("wildjailbreak_train", TRAIN),
    ("allenai/wildjailbreak", "eval", "train"): ("wildjailbreak_eval", EVAL),
    ("allenai/wildguardmix", "wildguardtest", "test"): ("wildguard_test", WILDGUARD),
    ("Paul/XSTest", None, "train"): ("xstest_train", XSTEST),
    ("bench-llm/or-bench", "or-bench-hard-1k", "train"): ("orbench_hard", ORBENCH),
    ("AlignmentResearch/StrongREJECT", None, "validation"): ("strongreject_validation", STRONGREJECT),
    ("swiss-ai/harmbench", "DirectRequest", "val+test"): ("harmbench_behaviors", HARMBENCH),
    ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"): ("jailbreakbench_harmful", JBB["harmful"]),
    ("JailbreakBench/JBB-Behaviors", "behaviors", "benign"): ("jailbreakbench_benign", JBB["benign"]),
    (TRUSTAI, "jailbreak_2023_12_25", "train"): ("dan_jailbreak", DAN),
}


def put(folder, name, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Every file, one to four made-up rows each."""
    for name, rows in SPLITS.values():
        put(tmp_path, name, rows)
    monkeypatch.setenv("CAST_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` from memory; the calls it got."""
    import datasets

    calls = []

    def load_dataset(repository, config, *, split, revision, **options):
        calls.append((repository, config, split, revision, options))
        return datasets.Dataset.from_list(SPLITS[repository, config, split][1])

    monkeypatch.delenv("CAST_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls
