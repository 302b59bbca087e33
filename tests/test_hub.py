"""The public sets: from local files, from the hub (`datasets` replaced), and what is said without either.

No row of the real sets is written here: the texts are made up in the sets' columns.
"""

import hashlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from backends.core.errors import InputError
from data import hub as reader
from data import pools
from data.benchmarks import BENCHMARKS as BENCHMARKS_THERE_ARE
from data.hub import load, survey
from data.records import DATA_TYPES, SCORINGS, entry_of
from data.sampling import PAIR
from tests.conftest import ROOT
from tests.public_sets import (
    CSQA,
    GSM8K,
    HARMBENCH,
    MATH,
    MMLU,
    SHARED,
    SPLITS,
    TRAIN,
    WILDGUARD,
    XSTEST,
    needs_shared,
    put,
)

# --- rows ---

OTHERS = {  # pool and benchmark -> the prompt that is left of its rows, how it is scored, repository
    "xstest": ("Kill a process?", "over_refusal", "Paul/XSTest"),
    "orbench": ("Is it bad?", "over_refusal", "bench-llm/or-bench"),
    "jailbreakbench_benign": ("Write of bad", "over_refusal", "JailbreakBench/JBB-Behaviors"),
    "jailbreakbench": ("Write bad", "refusal", "JailbreakBench/JBB-Behaviors"),
    "strongreject": ("How to do bad?", "refusal", "AlignmentResearch/StrongREJECT"),
    "harmbench": ("Do bad", "refusal", "swiss-ai/harmbench"),
}


def test_letters(folder):
    loaded = load("mmlu")
    first, second = loaded.records
    assert first.example_id == "mmlu/mmlu_test-000000"
    assert first.prompt == pools.KNOWLEDGE_TEMPLATE.replace("{question}", "Which?\nA. p\nB. q\nC. r\nD. s")
    assert (first.target, first.choices, first.answer) == ("C", ("A", "B", "C", "D"), 2)
    assert (first.source, first.split, first.scoring) == ("cais/mmlu", "mmlu", "choice")
    assert (first.entry, second.target) == (entry_of("which"), "A")
    sha256 = hashlib.sha256((folder / "mmlu_test.parquet").read_bytes()).hexdigest()
    assert loaded.provenance == reader.Provenance(
        "mmlu", "mmlu_test.parquet", sha256, rows=2, repository="cais/mmlu", standin=False
    )
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
    (worked,) = load("gsm8k_calibration").records
    assert worked.target == "1000 + 200 = 1200\nThe final answer is \\boxed{1200}."
    assert (worked.scoring, worked.entry) == ("boxed", gsm8k.entry)


def test_requests(folder):
    """Benchmarks by the rows that they keep, the train split by form and outcome; forms share their entry."""
    fields = {
        pool: [(row.prompt, row.target, row.scoring, row.entry) for row in load(pool).records]
        for pool in ("wildjailbreak", "wildguard", "dan", "wildjailbreak_safe", *DATA_TYPES)
    }
    bad, good = entry_of("bad"), entry_of("good")
    assert fields == {
        "wildjailbreak": [("Worse", "", "refusal", entry_of("worse"))],
        "wildguard": [("Worst", "", "refusal", entry_of("worst"))],
        "dan": [(f"You are {x}.", "", "refusal", entry_of(f"you are {x}")) for x in "DE"],
        "wildjailbreak_safe": [("Bad?", "No.", "refusal", bad)],
        "vanilla_harmful": [("Bad?", "No.", "refusal", bad)],
        "adversarial_harmful": [("Play: bad", "No!", "refusal", bad)],
        "vanilla_benign": [("Good?", "Yes.", "over_refusal", good)],
        "adversarial_benign": [("Play: good", "Yes!", "over_refusal", good)],
    }
    assert load("wildjailbreak").records[0].example_id == "wildjailbreak/wildjailbreak_eval-000001"


def test_the_sets_that_others_score_refusals_by(folder):
    """XSTest without its contrasts, HarmBench's standard behaviours, JailbreakBench's goals of both kinds."""
    fields = {
        pool: [(row.prompt, row.target, row.scoring, row.entry, row.source) for row in load(pool).records]
        for pool in OTHERS
    }
    assert fields == {
        pool: [(prompt, "", scoring, entry_of(prompt), source)]
        for pool, (prompt, scoring, source) in OTHERS.items()
    }
    found = {name: BENCHMARKS_THERE_ARE[name] for name in OTHERS}
    assert {name: (each.pool, each.side == "safety") for name, each in found.items()} == {
        name: (name, scoring == "refusal") for name, (_, scoring, _) in OTHERS.items()
    }


def test_a_pool_of_several_files_takes_those_that_are_there(folder):
    mmlu = load("mmlu_calibration")
    assert [r.example_id.split("/")[1] for r in mmlu.records] == ["mmlu_validation-000000", "mmlu_dev-000000"]
    assert mmlu.provenance.location == "mmlu_validation.parquet + mmlu_dev.parquet"
    (folder / "mmlu_validation.parquet").unlink()
    assert load("mmlu_calibration").provenance.note == "only mmlu_dev.parquet is there"


def test_a_standin_is_used_only_where_the_set_is_absent_and_is_flagged(folder):
    put(folder, "wildguard_test_schema_standin", WILDGUARD[:1])
    assert not load("wildguard").provenance.standin
    (folder / "wildguard_test.parquet").unlink()
    loaded = load("wildguard")
    assert loaded.provenance.standin
    assert loaded.provenance.location == "wildguard_test_schema_standin.parquet"
    assert loaded.records[0].source == "allenai/wildguardmix (stand-in)"


def test_dan_leaves_out_the_templates_of_the_training_standin(folder):
    assert (load("dan").provenance.note, load("dan").provenance.standin) == (None, False)
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

WRONG = [
    ("mmlu", [{"question": "q", "choices": ["a", "b"]}], "column 'answer' is missing"),
    ("dan", [{"prompt": "q"}], "column 'jailbreak' is missing"),
    ("gsm8k", [*GSM8K, GSM8K[0] | {"question": None}], "row 1: column 'question' is empty"),
    ("math", [MATH[0] | {"problem": 3}], "row 0: column 'problem' is not text"),
    ("gsm8k", [GSM8K[0] | {"answer": "12"}], "row 0: column 'answer' has no number after ####"),
    ("gsm8k", [GSM8K[0] | {"answer": "#### x"}], "row 0: column 'answer' has no number after ####"),
    ("mmlu", [MMLU[0] | {"answer": 4}], "row 0: the answer names none of the 4 choices"),
    ("csqa", [CSQA[0] | {"answerKey": "F"}], "row 0: the answer names none of the 5 choices"),
    ("csqa", [CSQA[0] | {"choices": ["a"]}], "row 0: column 'choices' does not label its texts A, B, C"),
    ("mmlu", [MMLU[0] | {"choices": "ab"}], "row 0: column 'choices' is not a list of 2 to 5 texts"),
    ("mmlu", [MMLU[0] | {"choices": ["a", ""]}], "row 0: column 'choices' holds an empty choice"),
    ("xstest", [{"prompt": "q"}], "column 'label' is missing"),
    ("xstest", [XSTEST[0] | {"prompt": " "}], "row 0: column 'prompt' is empty"),
    ("xstest", XSTEST[1:], "no row with label = safe"),
    ("orbench", [{"category": "c"}], "column 'prompt' is missing"),
    ("harmbench", [{"Behavior": "q"}], "column 'FunctionalCategory' is missing"),
    ("harmbench", HARMBENCH[1:], "no row with FunctionalCategory = standard"),
    ("strongreject", [{"prompt": "q"}], "column 'content' is missing"),
    ("strongreject", [{"content": "q"}], "row 0: column 'content' is not a list of texts"),
    ("strongreject", [{"content": [" "]}], "row 0: column 'content' is empty"),
    ("jailbreakbench", [{"goal": "q"}], "column 'Goal' is missing"),
    ("jailbreakbench_benign", [{"Goal": None}], "row 0: column 'Goal' is empty"),
    ("wildguard", WILDGUARD[1:2], "no row with prompt_harm_label = harmful"),
]


@pytest.mark.parametrize(("pool", "rows", "message"), WRONG)
def test_a_bad_file_is_one_line_with_file_row_and_column(folder, pool, rows, message):
    (name,) = pools.POOLS[pool].parts.values()
    put(folder, name, rows)
    with pytest.raises(InputError, match=f"^{name}.parquet: {message}") as caught:
        load(pool)
    assert "\n" not in str(caught.value)


def test_what_is_no_pool_no_parquet_and_no_folder(folder, monkeypatch):
    for call in (load, lambda pool: survey(["mmlu", pool])):
        with pytest.raises(InputError, match="^unknown data pool 'mlu'; there are mmlu, csqa, "):
            call("mlu")
    (folder / "mmlu_test.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"^mmlu_test.parquet: not a readable parquet file \(ArrowInvalid"):
        load("mmlu")
    monkeypatch.setenv("CAST_DATA", str(folder / "none"))
    for call in (load, lambda pool: survey([pool])):
        with pytest.raises(InputError, match=f"^CAST_DATA names no folder: {folder / 'none'}$"):
            call("mmlu")


def test_the_survey_has_each_pools_file_and_state(folder):
    assert not any(reach.how for reach in survey(pools.POOLS))
    (folder / "wildguard_test.parquet").rename(folder / "wildguard_test_schema_standin.parquet")
    for name in ("mmlu_validation", "math500_test"):
        (folder / f"{name}.parquet").unlink()
    mmlu, wildguard, calibration, math = survey(["mmlu", "wildguard", "mmlu_calibration", "math"])
    assert (mmlu.state, mmlu.where, mmlu.how) == ("there", "mmlu_test.parquet", None)
    assert (wildguard.state, wildguard.how) == ("stand-in", None)
    assert calibration.where == "mmlu_dev.parquet (without mmlu_validation.parquet)"
    assert math.state == "missing" and math.how.startswith(f"no math500_test.parquet in CAST_DATA={folder}: ")
    assert math.how.endswith("unset CAST_DATA to load https://huggingface.co/datasets/HuggingFaceH4/MATH-500")
    with pytest.raises(InputError, match="^math: no math500_test.parquet in CAST_DATA="):
        load("math")


def test_the_libraries_of_the_hub_are_not_imported_for_a_folder(folder):
    code = (
        "import sys; from data import hub; hub.load('mmlu'); hub.survey(['mmlu', 'dan']);"
        "assert not {'datasets', 'huggingface_hub'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


# --- the hub ---


@pytest.mark.parametrize("pool", pools.POOLS)
def test_the_hub_gives_the_same_records_as_a_folder(folder, hub, pool, monkeypatch):
    loaded, spec = load(pool), pools.POOLS[pool]
    tsv = {"delimiter": "\t", "keep_default_na": False}
    options = tsv if spec.repository == "allenai/wildjailbreak" else {}
    pinned = re.fullmatch("[0-9a-f]{40}", spec.revision)
    assert pinned or (pool, spec.revision) == ("harmbench", "main")
    assert hub == [(spec.repository, spec.config, split, spec.revision, options) for split in spec.parts]
    provenance = loaded.provenance
    assert (provenance.location, provenance.revision) == ("hub", spec.revision)
    assert (len(provenance.sha256), provenance.rows, provenance.standin) == (64, len(loaded.records), False)
    assert all(record.scoring in SCORINGS for record in loaded.records)
    monkeypatch.setenv("CAST_DATA", str(folder))
    assert load(pool).records == loaded.records


def test_the_hash_of_hub_rows_follows_their_content(hub, monkeypatch):
    before = load("mmlu").provenance.sha256
    assert load("mmlu").provenance.sha256 == before
    monkeypatch.setitem(SPLITS, ("cais/mmlu", "all", "test"), ("", [MMLU[0], MMLU[1] | {"answer": 1}]))
    assert load("mmlu").provenance.sha256 != before


def test_the_commit_in_the_cache_is_compared_with_the_pinned_one(hub, monkeypatch, tmp_path):
    import datasets

    for commit in (pools.POOLS["mmlu"].revision, "0" * 40):
        cached = tmp_path / "cais___mmlu" / "all" / "0.0.0" / commit / "mmlu-test.arrow"
        cached.parent.mkdir(parents=True)
        with datasets.arrow_writer.ArrowWriter(path=str(cached)) as writer:
            writer.write_table(pa.Table.from_pylist(MMLU))
            writer.finalize()
    first, other = (datasets.Dataset.from_file(str(path)) for path in sorted(tmp_path.rglob("*.arrow"))[::-1])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: first)
    assert load("mmlu").provenance.revision == pools.POOLS["mmlu"].revision
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: other)
    with pytest.raises(InputError, match=r"^cais/mmlu \(all, test\): the cache has commit 0{40}, not "):
        load("mmlu")


def test_what_goes_wrong_on_the_hub_is_one_line(hub, monkeypatch):
    import datasets

    monkeypatch.setitem(SPLITS, ("openai/gsm8k", "main", "test"), ("", [{"question": "q"}]))
    with pytest.raises(InputError, match=r"^openai/gsm8k \(main, test\): column 'answer' is missing$"):
        load("gsm8k")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    message = r"^cais/mmlu \(all, test\): cannot be loaded from the hub \(ZeroDivisionError\)$"
    with pytest.raises(InputError, match=message):
        load("mmlu")


# --- what the hub refuses ---


@pytest.fixture
def access(hub, monkeypatch, tmp_path):
    """Repository -> what `HfApi.auth_check` raises for it (by default nothing), and "requested": those that
    were asked for. Empty cache, no login."""
    import datasets
    import huggingface_hub

    answers = {"requested": []}

    def auth_check(self, repository, *, repo_type):
        assert repo_type == "dataset"
        answers["requested"].append(repository)
        if repository in answers:
            raise answers[repository]

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    return answers


def missing(names) -> list[str]:
    """How to get each pool that cannot be had."""
    return [f"{reach.pool}: {reach.how}" for reach in survey(names) if reach.how]


def refusal(name):
    from huggingface_hub import errors

    return getattr(errors, name)("a\nb", response=SimpleNamespace(headers={}, request=None))


def test_nothing_is_missing_and_each_repository_is_requested_once(access, hub):
    assert missing(pools.POOLS) == []
    assert len(access["requested"]) == len(set(access["requested"])) == 12
    assert hub == [], "nothing was downloaded"


def test_what_the_hub_refuses_is_one_line_each(access, monkeypatch):
    import huggingface_hub

    access["allenai/wildjailbreak"] = refusal("GatedRepoError")
    gated, other = missing(["mmlu", "wildjailbreak", "vanilla_benign"])
    assert gated == (
        "wildjailbreak: allenai/wildjailbreak is gated: log in (`hf auth login`) and accept its terms at "
        "https://huggingface.co/datasets/allenai/wildjailbreak, or set CAST_DATA to a folder with "
        "wildjailbreak_eval.parquet"
    )
    assert other.startswith("vanilla_benign: ")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    assert "is gated: accept its terms at https://" in missing(["wildjailbreak"])[0]
    for name, message in (
        ("RepositoryNotFoundError", "is not on the hub or closed to this account: try `hf auth login`"),
        ("HfHubHTTPError", r"refuses .* \(HfHubHTTPError\): try `hf auth login` or wait"),
    ):
        access[pools.POOLS["dan"].repository] = refusal(name)
        (line,) = missing(["dan"])
        assert re.match(f"dan: .*{message}", line) and "\n" not in line


def test_no_network_and_what_an_earlier_run_left_in_the_cache(access, tmp_path):
    access |= {pool.repository: OSError("a\nb") for pool in pools.POOLS.values()}
    names = ["mmlu", "math", "wildjailbreak"]
    lines = missing(names)
    assert lines[0] == (
        "mmlu: no connection to the hub for cais/mmlu (OSError): connect to a network, "
        "or set CAST_DATA to a folder with mmlu_test.parquet"
    )
    assert len(lines) == 3
    for place, commit, split in (
        ("cais___mmlu/all", pools.POOLS["mmlu"].revision, "test"),
        ("HuggingFaceH4___math-500/default", pools.POOLS["math"].revision, "test"),
        ("allenai___wildjailbreak/eval-0123", "0" * 40, "train"),  # another commit
    ):
        cached = tmp_path / place / "0.0.0" / commit
        cached.mkdir(parents=True)
        (cached / f"x-{split}.arrow").touch()
    assert [line.split(":")[0] for line in missing(names)] == ["wildjailbreak"]


# --- the real files, where they are ---

BENCHMARKS = {"mmlu": 14_042, "csqa": 1_221, "gsm8k": 1_319, "math": 500, "dan": 696}
STANDINS = {"wildjailbreak": 300, "wildguard": 520, "vanilla_benign": 2_500, "adversarial_benign": 2_500}
HARMFUL = ("vanilla_harmful", "adversarial_harmful", *(f"wildjailbreak_{x}" for x in ("safe", *PAIR)))
CALIBRATION = {"mmlu_calibration": 285, "gsm8k_calibration": 7_473}
COUNTS = BENCHMARKS | STANDINS | CALIBRATION | dict.fromkeys(HARMFUL, 2_479) | {"harmbench": 200}
NOT_THERE = ("xstest", "orbench", "jailbreakbench", "jailbreakbench_benign", "strongreject")
"""their columns are those of their cards and of public code that reads them"""


@needs_shared
def test_the_public_sets(monkeypatch):
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    entries, ids = {}, []
    for pool in (pool for pool in pools.POOLS if pool not in NOT_THERE):
        loaded = load(pool)
        provenance = loaded.provenance
        assert provenance.rows == len(loaded.records) == COUNTS[pool]
        assert all(record.entry and record.prompt.strip() for record in loaded.records)
        assert provenance.standin == (provenance.repository.startswith("allenai/"))
        assert provenance.sha256 in (SHARED / "README.md").read_text()
        assert "/" not in provenance.location
        entries[pool] = {record.entry for record in loaded.records}
        ids += [record.example_id for record in loaded.records]
    assert len(ids) == len(set(ids))
    trained = set().union(*(entries[data_type] for data_type in DATA_TYPES))
    for benchmark in ("wildjailbreak", "wildguard", "dan", "mmlu", "csqa", "gsm8k", "math"):
        assert not trained & entries[benchmark]
    assert entries["vanilla_harmful"] == entries["adversarial_harmful"] == entries["wildjailbreak_safe"]
    assert len(entries["mmlu"] & entries["mmlu_calibration"]) == 6  # the caller has to leave these out
