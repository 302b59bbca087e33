"""Loaders of the public sets: local files, the hub (`datasets` replaced), what is said when neither is there.

No row of the real sets is written here: the texts are made up in the sets' columns.
"""

import hashlib

import pytest

from backends.core.errors import InputError
from data import hub, pools
from data.hub import load
from data.records import DATA_TYPES, entry_of
from data.sampling import PAIR
from tests.public_sets import CSQA, GSM8K, MATH, MMLU, SHARED, TRAIN, WILDGUARD, needs_shared, put

# --- rows ---


def test_letters(folder):
    first, second = load("mmlu").records
    assert first.example_id == "mmlu/mmlu_test-000000"
    assert first.prompt == pools.KNOWLEDGE_TEMPLATE.replace("{question}", "Which?\nA. p\nB. q\nC. r\nD. s")
    assert (first.target, first.choices, first.answer) == ("C", ("A", "B", "C", "D"), 2)
    assert (first.source, first.split, first.scoring) == ("cais/mmlu", "mmlu", "choice")
    assert (first.entry, second.target) == (entry_of("which"), "A")
    (csqa,) = load("csqa").records
    assert csqa.prompt.endswith("\n\nWhere?\nA. p\nB. q\nC. r\nD. s\nE. t")
    assert (csqa.target, csqa.choices, csqa.answer, csqa.split) == ("E", ("A", "B", "C", "D", "E"), 4, "csqa")


def test_reasoning(folder):
    (gsm8k,) = load("gsm8k").records
    assert (gsm8k.target, gsm8k.scoring, gsm8k.choices, gsm8k.answer) == ("1200", "boxed", (), None)
    assert gsm8k.prompt.startswith("Solve the math problem step by step. ")
    assert gsm8k.prompt.endswith("inside a LaTeX \\boxed{} expression.\n\nHow many?")
    (math,) = load("math").records
    assert (math.target, math.scoring) == ("\\frac{1}{2}", "boxed")


def test_safety_benchmarks(folder):
    assert [(r.prompt, r.example_id) for r in load("wildjailbreak").records] == [
        ("Worse", "wildjailbreak/wildjailbreak_eval-000001")
    ]
    assert [r.prompt for r in load("wildguard").records] == ["Worst"]
    dan = load("dan")
    # A real train split: no template to leave out.
    assert [r.prompt for r in dan.records] == ["You are D.", "You are E."]
    assert (dan.provenance.note, dan.provenance.standin) == (None, False)
    for pool in ("wildjailbreak", "wildguard", "dan"):
        assert {(r.scoring, r.target) for r in load(pool).records} == {("refusal", "")}


def test_alignment(folder):
    found = {kind: load(kind).records for kind in DATA_TYPES}
    fields = {kind: (r.prompt, r.target, r.scoring, r.entry) for kind, (r,) in found.items()}
    bad, good = entry_of("bad"), entry_of("good")  # shared by both forms of a request
    assert fields == {
        "vanilla_harmful": ("Bad?", "No.", "refusal", bad),
        "adversarial_harmful": ("Play: bad", "No!", "refusal", bad),
        "vanilla_benign": ("Good?", "Yes.", "over_refusal", good),
        "adversarial_benign": ("Play: good", "Yes!", "over_refusal", good),
    }


def test_calibration(folder):
    mmlu = load("mmlu_calibration")
    assert [r.example_id.split("/")[1] for r in mmlu.records] == ["mmlu_validation-000000", "mmlu_dev-000000"]
    assert mmlu.provenance.location == "mmlu_validation.parquet + mmlu_dev.parquet"
    (folder / "mmlu_validation.parquet").unlink()
    assert load("mmlu_calibration").provenance.note == "only mmlu_dev.parquet is there"
    (safe,) = load("wildjailbreak_safe").records
    assert (safe.prompt, safe.target) == ("Bad?", "No.")
    (worked,) = load("gsm8k_calibration").records
    assert worked.target == "1000 + 200 = 1200\nThe final answer is \\boxed{1200}."
    assert (worked.scoring, worked.entry) == ("boxed", load("gsm8k").records[0].entry)


def test_ids_are_unique_over_all_pools(folder):
    ids = [record.example_id for pool in pools.POOLS for record in load(pool).records]
    assert len(ids) == len(set(ids))


def test_provenance_of_a_local_file(folder):
    provenance = load("mmlu").provenance
    sha256 = hashlib.sha256((folder / "mmlu_test.parquet").read_bytes()).hexdigest()
    assert provenance == hub.Provenance(
        "mmlu", "mmlu_test.parquet", sha256, rows=2, repository="cais/mmlu", standin=False
    )


def test_a_standin_is_used_only_where_the_set_is_absent_and_is_flagged(folder):
    put(folder, "wildguard_test_schema_standin", WILDGUARD[:1])
    assert not load("wildguard").provenance.standin
    (folder / "wildguard_test.parquet").unlink()
    loaded = load("wildguard")
    assert loaded.provenance.standin
    assert loaded.provenance.location == "wildguard_test_schema_standin.parquet"
    assert loaded.records[0].source == "allenai/wildguardmix (stand-in)"


def test_dan_leaves_out_the_templates_of_the_training_standin(folder):
    (folder / "wildjailbreak_train.parquet").rename(folder / "wildjailbreak_train_schema_standin.parquet")
    dan = load("dan")
    assert [r.prompt for r in dan.records] == ["You are E."]
    assert dan.provenance.note.startswith("held-out half only")
    put(folder, "dan_jailbreak", [{"prompt": "You are D.", "jailbreak": True}])
    with pytest.raises(InputError, match="^dan_jailbreak.parquet: column 'standin_half' is missing$"):
        load("dan")


def test_training_rows_with_an_empty_text_are_left_out_and_counted(folder):
    first, attacked = TRAIN[0], TRAIN[2]
    rows = [first, first | {"completion": " "}, attacked | {"adversarial": ""}, first | {"vanilla": None}]
    put(folder, "wildjailbreak_train", rows)
    loaded = load("vanilla_harmful")
    assert (len(loaded.records), loaded.provenance.note) == (1, "2 rows with an empty text left out")
    with pytest.raises(InputError, match="no row with data_type = adversarial_harmful"):
        load("adversarial_harmful")


# --- what can be wrong ---

NULL = [*GSM8K, GSM8K[0] | {"question": None}]
TEXT = [MMLU[0] | {"choices": "ab"}]
WRONG = {
    "column": ("mmlu", "mmlu_test", [{"question": "q", "choices": ["a", "b"]}], "column 'answer' is missing"),
    "keep column": ("dan", "dan_jailbreak", [{"prompt": "q"}], "column 'jailbreak' is missing"),
    "empty": ("gsm8k", "gsm8k_test", [GSM8K[0] | {"question": " "}], "row 0: column 'question' is empty"),
    "null": ("gsm8k", "gsm8k_test", NULL, "row 1: column 'question' is empty"),
    "no text": ("math", "math500_test", [MATH[0] | {"problem": 3}], "row 0: column 'problem' is not text"),
    "no ####": ("gsm8k", "gsm8k_test", [GSM8K[0] | {"answer": "12"}], "'answer' has no number after ####"),
    "no number": ("gsm8k", "gsm8k_test", [GSM8K[0] | {"answer": "#### x"}], "has no number after ####"),
    "answer": ("mmlu", "mmlu_test", [MMLU[0] | {"answer": 4}], "the answer names none of the 4 choices"),
    "letter": ("csqa", "csqa_validation", [CSQA[0] | {"answerKey": "F"}], "names none of the 5 choices"),
    "key": ("csqa", "csqa_validation", [CSQA[0] | {"answerKey": ""}], "column 'answerKey' is empty"),
    "labels": ("csqa", "csqa_validation", [CSQA[0] | {"choices": ["a"]}], "does not label its texts A, B, C"),
    "choices": ("mmlu", "mmlu_test", TEXT, "'choices' is not a list of 2 to 5 texts"),
    "choice": ("mmlu", "mmlu_test", [MMLU[0] | {"choices": ["a", ""]}], "'choices' holds an empty choice"),
    "no rows": ("wildguard", "wildguard_test", WILDGUARD[1:2], "no row with prompt_harm_label = harmful"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_file_is_one_line_with_file_and_column(folder, case):
    pool, name, rows, message = WRONG[case]
    put(folder, name, rows)
    with pytest.raises(InputError, match=f"^{name}.parquet: .*{message}") as caught:
        load(pool)
    assert "\n" not in str(caught.value)


def test_what_is_no_pool_and_no_parquet(folder):
    for call in (load, lambda pool: hub.survey(["mmlu", pool])):
        with pytest.raises(InputError, match="^unknown data pool 'mlu'; there are mmlu, csqa, "):
            call("mlu")
    (folder / "mmlu_test.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"^mmlu_test.parquet: not a readable parquet file \(ArrowInvalid"):
        load("mmlu")


def test_the_survey_has_each_pools_file_and_state(folder):
    assert not any(reach.how for reach in hub.survey(pools.POOLS))
    (folder / "wildguard_test.parquet").rename(folder / "wildguard_test_schema_standin.parquet")
    for name in ("mmlu_validation", "math500_test"):
        (folder / f"{name}.parquet").unlink()
    mmlu, wildguard, calibration, math = hub.survey(["mmlu", "wildguard", "mmlu_calibration", "math"])
    assert (mmlu.state, mmlu.where, mmlu.how) == ("there", "mmlu_test.parquet", None)
    assert (wildguard.state, wildguard.how) == ("stand-in", None)
    assert calibration.where == "mmlu_dev.parquet (without mmlu_validation.parquet)"
    assert math.state == "missing" and math.how.startswith(f"no math500_test.parquet in CAST_DATA={folder}: ")
    assert math.how.endswith("unset CAST_DATA to load https://huggingface.co/datasets/HuggingFaceH4/MATH-500")
    with pytest.raises(InputError, match="^math: no math500_test.parquet in CAST_DATA="):
        load("math")


def test_missing_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(tmp_path / "none"))
    message = f"CAST_DATA names no folder: {tmp_path / 'none'}"
    assert [reach.how for reach in hub.survey(["mmlu", "dan"])] == [message, message]
    with pytest.raises(InputError, match=message):
        load("mmlu")


# --- the real files, where they are ---

BENCHMARKS = {"mmlu": 14_042, "csqa": 1_221, "gsm8k": 1_319, "math": 500, "dan": 696}
STANDINS = {"wildjailbreak": 300, "wildguard": 520, "vanilla_benign": 2_500, "adversarial_benign": 2_500}
HARMFUL = ("vanilla_harmful", "adversarial_harmful", *(f"wildjailbreak_{x}" for x in ("safe", *PAIR)))
CALIBRATION = {"mmlu_calibration": 285, "gsm8k_calibration": 7_473}
COUNTS = BENCHMARKS | STANDINS | CALIBRATION | dict.fromkeys(HARMFUL, 2_479)


@needs_shared
@pytest.mark.parametrize("pool", pools.POOLS)
def test_the_public_sets(pool, monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    loaded = load(pool)
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
    assert load("dan").provenance.rows == 1_405


@needs_shared
def test_the_standins_train_and_evaluation_rows_share_no_question(monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    entries = {pool: {record.entry for record in load(pool).records} for pool in pools.POOLS}
    trained = set().union(*(entries[data_type] for data_type in DATA_TYPES))
    for benchmark in ("wildjailbreak", "wildguard", "dan", "mmlu", "csqa", "gsm8k", "math"):
        assert not trained & entries[benchmark]
    assert entries["vanilla_harmful"] == entries["adversarial_harmful"] == entries["wildjailbreak_safe"]
    assert len(entries["mmlu"] & entries["mmlu_calibration"]) == 6  # the caller has to leave these out
