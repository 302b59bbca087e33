"""Loaders of the public sets: local files, the hub (`datasets` replaced), what is said when neither is there.

No row of the real sets is written here: the texts are made up in the sets' columns.
"""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from data import pools, sources
from data.jsonl import DATA_TYPES, entry_of
from tests.public_sets import CSQA, GSM8K, MATH, MMLU, TRAIN, WILDGUARD, put

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the public data sets are not in ../shared/data"
)

# --- rows ---


def test_letters(folder):
    first, second = sources.load("mmlu").records
    assert first.example_id == "mmlu/mmlu_test-000000"
    assert first.prompt == pools.KNOWLEDGE_TEMPLATE.replace("{question}", "Which?\nA. p\nB. q\nC. r\nD. s")
    assert (first.target, first.choices, first.answer) == ("C", ("A", "B", "C", "D"), 2)
    assert (first.source, first.role, first.scoring) == ("cais/mmlu", "mmlu", "choice")
    assert (first.entry, second.target) == (entry_of("which"), "A")
    (csqa,) = sources.load("csqa").records
    assert csqa.prompt.endswith("\n\nWhere?\nA. p\nB. q\nC. r\nD. s\nE. t")
    assert (csqa.target, csqa.choices, csqa.answer, csqa.role) == ("E", ("A", "B", "C", "D", "E"), 4, "csqa")


def test_reasoning(folder):
    (gsm8k,) = sources.load("gsm8k").records
    assert (gsm8k.target, gsm8k.scoring, gsm8k.choices, gsm8k.answer) == ("1200", "boxed", (), -1)
    assert gsm8k.prompt.startswith("Solve the math problem step by step. ")
    assert gsm8k.prompt.endswith("inside a LaTeX \\boxed{} expression.\n\nHow many?")
    (math,) = sources.load("math").records
    assert (math.target, math.scoring, math.role) == ("\\frac{1}{2}", "boxed", "math")


def test_safety_benchmarks(folder):
    assert [(r.prompt, r.example_id) for r in sources.load("wildjailbreak").records] == [
        ("Worse", "wildjailbreak/wildjailbreak_eval-000001")
    ]
    assert [r.prompt for r in sources.load("wildguard").records] == ["Worst"]
    dan = sources.load("dan")
    assert [r.prompt for r in dan.records] == [
        "You are D.",
        "You are E.",
    ]  # a real train split: nothing to leave out
    assert (dan.provenance.note, dan.provenance.standin) == ("", False)
    for pool in ("wildjailbreak", "wildguard", "dan"):
        assert {(r.role, r.scoring, r.target) for r in sources.load(pool).records} == {(pool, "refusal", "")}


@pytest.mark.parametrize(
    ("data_type", "prompt", "target", "scoring"),
    [
        ("vanilla_harmful", "Bad?", "No.", "refusal"),
        ("adversarial_harmful", "Play: bad", "No!", "refusal"),
        ("vanilla_benign", "Good?", "Yes.", "over_refusal"),
        ("adversarial_benign", "Play: good", "Yes!", "over_refusal"),
    ],
)
def test_alignment(folder, data_type, prompt, target, scoring):
    (record,) = sources.load(data_type).records
    assert (record.role, record.prompt, record.target, record.scoring) == (data_type, prompt, target, scoring)
    question = "bad" if data_type.endswith("harmful") else "good"
    assert record.entry == entry_of(question)  # shared by both forms of the request


def test_calibration(folder):
    mmlu = sources.load("mmlu_calibration")
    assert [r.example_id.split("/")[1] for r in mmlu.records] == ["mmlu_validation-000000", "mmlu_dev-000000"]
    assert mmlu.provenance.note == ""
    assert mmlu.provenance.location == "mmlu_validation.parquet + mmlu_dev.parquet"
    (folder / "mmlu_validation.parquet").unlink()
    assert sources.load("mmlu_calibration").provenance.note == "only mmlu_dev.parquet is there"
    (safe,) = sources.load("wildjailbreak_safe").records
    assert (safe.role, safe.prompt, safe.target) == ("safe", "Bad?", "No.")
    assert {r.role for r in sources.load("gsm8k_calibration").records} == {"util"}


def test_ids_are_unique_over_all_pools_and_stable(folder):
    ids = [r.example_id for pool in pools.POOLS for r in sources.load(pool).records]
    assert len(ids) == len(set(ids))
    assert ids == [r.example_id for pool in pools.POOLS for r in sources.load(pool).records]


def test_provenance_of_a_local_file(folder):
    provenance = sources.load("mmlu").provenance
    sha256 = hashlib.sha256((folder / "mmlu_test.parquet").read_bytes()).hexdigest()
    expected = ("mmlu", "cais/mmlu", "local", "mmlu_test.parquet", sha256, 2, False, "")
    assert dataclasses.astuple(provenance) == expected


def test_a_standin_is_used_only_where_the_set_is_absent_and_is_flagged(folder):
    put(folder, "wildguard_test_schema_standin", WILDGUARD[:1])
    assert not sources.load("wildguard").provenance.standin
    (folder / "wildguard_test.parquet").unlink()
    loaded = sources.load("wildguard")
    assert loaded.provenance.standin
    assert loaded.provenance.location == "wildguard_test_schema_standin.parquet"
    assert loaded.records[0].source == "allenai/wildguardmix (stand-in)"
    assert sources.missing(["wildguard"]) == []


def test_dan_leaves_out_the_templates_of_the_training_standin(folder):
    (folder / "wildjailbreak_train.parquet").rename(folder / "wildjailbreak_train_schema_standin.parquet")
    dan = sources.load("dan")
    assert [r.prompt for r in dan.records] == ["You are E."]
    assert dan.provenance.note.startswith("held-out half only")
    put(folder, "dan_jailbreak", [{"prompt": "You are D.", "jailbreak": True}])
    with pytest.raises(ValueError, match="^dan_jailbreak.parquet: column 'standin_half' is missing$"):
        sources.load("dan")


def test_training_rows_with_an_empty_text_are_left_out_and_counted(folder):
    rows = [
        TRAIN[0],
        TRAIN[0] | {"completion": " "},
        TRAIN[2] | {"adversarial": ""},
        TRAIN[0] | {"vanilla": None},
    ]
    put(folder, "wildjailbreak_train", rows)
    loaded = sources.load("vanilla_harmful")
    assert (len(loaded.records), loaded.provenance.note) == (1, "2 rows with an empty text left out")
    with pytest.raises(ValueError, match="no row with data_type = adversarial_harmful"):
        sources.load("adversarial_harmful")


# --- what can be wrong ---

WRONG = {
    "column": ("mmlu", "mmlu_test", [{"question": "q", "choices": ["a", "b"]}], "column 'answer' is missing"),
    "keep column": ("dan", "dan_jailbreak", [{"prompt": "q"}], "column 'jailbreak' is missing"),
    "empty": ("gsm8k", "gsm8k_test", [GSM8K[0] | {"question": " "}], "row 0: column 'question' is empty"),
    "null": (
        "gsm8k",
        "gsm8k_test",
        [*GSM8K, GSM8K[0] | {"question": None}],
        "row 1: column 'question' is empty",
    ),
    "no text": ("math", "math500_test", [MATH[0] | {"problem": 3}], "row 0: column 'problem' is not text"),
    "no ####": ("gsm8k", "gsm8k_test", [GSM8K[0] | {"answer": "12"}], "'answer' has no number after ####"),
    "no number": ("gsm8k", "gsm8k_test", [GSM8K[0] | {"answer": "#### x"}], "has no number after ####"),
    "answer": ("mmlu", "mmlu_test", [MMLU[0] | {"answer": 4}], "the answer names none of the 4 choices"),
    "letter": ("csqa", "csqa_validation", [CSQA[0] | {"answerKey": "F"}], "names none of the 5 choices"),
    "key": ("csqa", "csqa_validation", [CSQA[0] | {"answerKey": ""}], "column 'answerKey' is empty"),
    "labels": ("csqa", "csqa_validation", [CSQA[0] | {"choices": ["a"]}], "does not label its texts A, B, C"),
    "choices": (
        "mmlu",
        "mmlu_test",
        [MMLU[0] | {"choices": "abcd"}],
        "'choices' is not a list of 2 to 5 texts",
    ),
    "choice": ("mmlu", "mmlu_test", [MMLU[0] | {"choices": ["a", ""]}], "'choices' holds an empty choice"),
    "no rows": ("wildguard", "wildguard_test", WILDGUARD[1:2], "no row with prompt_harm_label = harmful"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_file_is_one_line_with_file_and_column(folder, case):
    pool, name, rows, message = WRONG[case]
    put(folder, name, rows)
    with pytest.raises(ValueError, match=f"^{name}.parquet: .*{message}") as caught:
        sources.load(pool)
    assert "\n" not in str(caught.value)


def test_unreadable_parquet(folder):
    (folder / "mmlu_test.parquet").write_bytes(b"not parquet")
    with pytest.raises(
        ValueError, match=r"^mmlu_test.parquet: not a readable parquet file \(ArrowInvalid\)$"
    ):
        sources.load("mmlu")


def test_unknown_pool(folder):
    for call in (lambda: sources.load("mlu"), lambda: sources.missing(["mmlu", "mlu"])):
        with pytest.raises(ValueError, match="^unknown data pool 'mlu'; there are mmlu, csqa, "):
            call()


def test_missing_local_file(folder):
    assert sources.missing(pools.POOLS) == []
    for name in ("mmlu_validation", "mmlu_dev", "math500_test"):
        (folder / f"{name}.parquet").unlink()
    lines = sources.missing(["mmlu", "mmlu_calibration", "math"])
    assert len(lines) == 2
    assert lines[0].startswith(
        f"mmlu_calibration: no mmlu_validation.parquet or mmlu_dev.parquet in CAST_DATA={folder}"
    )
    assert lines[1].endswith("unset CAST_DATA to load https://huggingface.co/datasets/HuggingFaceH4/MATH-500")
    with pytest.raises(FileNotFoundError, match="^math: no math500_test.parquet in CAST_DATA="):
        sources.load("math")


def test_missing_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(tmp_path / "none"))
    assert sources.missing(["mmlu", "dan"]) == [
        f"{pool}: CAST_DATA names no folder: {tmp_path / 'none'}" for pool in ("mmlu", "dan")
    ]
    with pytest.raises(FileNotFoundError, match="CAST_DATA names no folder"):
        sources.load("mmlu")


# --- the real files, where they are ---

BENCHMARKS = {"mmlu": 14_042, "csqa": 1_221, "gsm8k": 1_319, "math": 500, "dan": 696}
STANDINS = {"wildjailbreak": 300, "wildguard": 520, "wildjailbreak_safe": 2_479}
HARMFUL = {"vanilla_harmful": 2_479, "adversarial_harmful": 2_479}
BENIGN = {"vanilla_benign": 2_500, "adversarial_benign": 2_500}
PAIRS = {"wildjailbreak_plain": 2_479, "wildjailbreak_attacked": 2_479}
CALIBRATION = {"mmlu_calibration": 285, "gsm8k_calibration": 7_473}
COUNTS = CALIBRATION | BENCHMARKS | STANDINS | HARMFUL | BENIGN | PAIRS


@needs_shared
@pytest.mark.parametrize("pool", pools.POOLS)
def test_the_public_sets(pool, monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    assert sources.missing([pool]) == []
    loaded = sources.load(pool)
    provenance = loaded.provenance
    assert provenance.rows == len(loaded.records) == COUNTS[pool]
    assert len({record.example_id for record in loaded.records}) == COUNTS[pool]
    assert all(record.entry and record.prompt.strip() for record in loaded.records)
    assert provenance.standin == (provenance.repository.startswith("allenai/"))
    assert provenance.sha256 in (SHARED / "README.md").read_text()
    assert "/" not in provenance.location


@needs_shared
def test_all_of_dan_where_the_training_standin_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "dan_jailbreak.parquet").symlink_to(SHARED / "dan_jailbreak.parquet")
    monkeypatch.setenv("CAST_DATA", str(tmp_path))
    assert sources.load("dan").provenance.rows == 1_405


@needs_shared
def test_the_standins_train_and_evaluation_rows_share_no_question(monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    entries = {pool: {record.entry for record in sources.load(pool).records} for pool in pools.POOLS}
    trained = set().union(*(entries[data_type] for data_type in DATA_TYPES))
    for benchmark in ("wildjailbreak", "wildguard", "dan", "mmlu", "csqa", "gsm8k", "math"):
        assert not trained & entries[benchmark]
    assert entries["vanilla_harmful"] == entries["adversarial_harmful"] == entries["wildjailbreak_safe"]
    assert len(entries["mmlu"] & entries["mmlu_calibration"]) == 6  # the caller has to leave these out


# --- what can be reached ---


def test_the_survey_tells_each_pools_file_and_state(folder):
    (folder / "wildguard_test.parquet").rename(folder / "wildguard_test_schema_standin.parquet")
    (folder / "mmlu_validation.parquet").unlink()
    (folder / "csqa_validation.parquet").unlink()
    found = {one.pool: one for one in sources.survey(["mmlu", "wildguard", "mmlu_calibration", "csqa"])}
    assert [one.state for one in found.values()] == ["there", "stand-in", "there", "missing"]
    assert found["mmlu_calibration"].where == "mmlu_dev.parquet (without mmlu_validation.parquet)"
    assert "csqa_validation.parquet" in found["csqa"].how and not found["mmlu"].how


def test_gsm8k_calibrates_by_its_worked_solution(folder):
    (record,) = sources.load("gsm8k_calibration").records
    assert record.target == "1000 + 200 = 1200\nThe final answer is \\boxed{1200}."
    assert (record.scoring, record.entry) == ("boxed", sources.load("gsm8k").records[0].entry)
