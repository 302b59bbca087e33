"""Loading the public sets from the hub (`datasets` replaced), and what is said when they cannot be had."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from backends.core.errors import InputError
from data import pools
from data.hub import load, survey
from data.records import SCORINGS
from tests.public_sets import MMLU, SPLITS


def missing(names) -> list[str]:
    """How to get each pool that cannot be had."""
    return [f"{reach.pool}: {reach.how}" for reach in survey(names) if reach.how]


# --- the hub ---


@pytest.mark.parametrize("pool", pools.POOLS)
def test_the_hub_gives_the_same_records_as_a_folder(folder, hub, pool, monkeypatch):
    loaded, spec = load(pool), pools.POOLS[pool]
    tsv = {"delimiter": "\t", "keep_default_na": False}
    options = tsv if spec.repository == "allenai/wildjailbreak" else {}
    assert re.fullmatch("[0-9a-f]{40}", spec.revision)
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


@pytest.mark.parametrize("commit", [pools.POOLS["mmlu"].revision, "0" * 40])
def test_the_commit_in_the_cache_is_compared_with_the_pinned_one(hub, monkeypatch, tmp_path, commit):
    import datasets

    cached = tmp_path / "cais___mmlu" / "all" / "0.0.0" / commit / "mmlu-test.arrow"
    cached.parent.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(cached)) as writer:
        writer.write_table(pa.Table.from_pylist(MMLU))
        writer.finalize()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: datasets.Dataset.from_file(str(cached)))
    if commit == pools.POOLS["mmlu"].revision:
        assert load("mmlu").provenance.revision == commit
    else:
        with pytest.raises(
            InputError, match=rf"^cais/mmlu \(all, test\): the cache has commit {commit}, not "
        ):
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
    """What `HfApi.auth_check` raises for a repository (by default nothing); empty cache, no login."""
    import datasets
    import huggingface_hub

    errors: dict[str, Exception] = {}
    requested = []

    def auth_check(self, repository, *, repo_type):
        assert repo_type == "dataset"
        requested.append(repository)
        if repository in errors:
            raise errors[repository]

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    errors["requested"] = requested
    return errors


def refusal(name):
    from huggingface_hub import errors

    return getattr(errors, name)("a\nb", response=SimpleNamespace(headers={}, request=None))


def test_nothing_is_missing_and_each_repository_is_requested_once(access, hub):
    assert missing(pools.POOLS) == []
    assert len(access["requested"]) == len(set(access["requested"])) == 7
    assert hub == []  # nothing was downloaded


def test_gated_without_access(access, monkeypatch):
    import huggingface_hub

    access["allenai/wildjailbreak"] = refusal("GatedRepoError")
    lines = missing(["mmlu", "wildjailbreak", "vanilla_benign"])
    assert lines[0] == (
        "wildjailbreak: allenai/wildjailbreak is gated: log in (`hf auth login`) and accept its terms at "
        "https://huggingface.co/datasets/allenai/wildjailbreak, or set CAST_DATA to a folder with "
        "wildjailbreak_eval.parquet"
    )
    assert len(lines) == 2 and lines[1].startswith("vanilla_benign: ")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    assert "is gated: accept its terms at https://" in missing(["wildjailbreak"])[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "is not on the hub or closed to this account: try `hf auth login`"),
        ("HfHubHTTPError", r"refuses .* \(HfHubHTTPError\): try `hf auth login` or wait"),
    ],
)
def test_refused(access, name, message):
    access[pools.POOLS["dan"].repository] = refusal(name)
    (line,) = missing(["dan"])
    assert re.match(f"dan: .*{message}", line) and "\n" not in line


def test_no_network_and_what_an_earlier_run_left_in_the_cache(access, tmp_path):
    for pool in pools.POOLS.values():
        access[pool.repository] = OSError("a\nb")
    names = ["mmlu", "math", "wildjailbreak"]
    lines = missing(names)
    assert lines[0] == (
        "mmlu: no connection to the hub for cais/mmlu (OSError): connect to a network, "
        "or set CAST_DATA to a folder with mmlu_test.parquet"
    )
    assert len(lines) == 3
    for pool, place in (("mmlu", "cais___mmlu/all"), ("math", "HuggingFaceH4___math-500/default")):
        cached = tmp_path / place / "0.0.0" / pools.POOLS[pool].revision
        cached.mkdir(parents=True)
        (cached / "x-test.arrow").touch()
    other = tmp_path / "allenai___wildjailbreak" / "eval-0123" / "0.0.0" / ("0" * 40)  # another commit
    other.mkdir(parents=True)
    (other / "wildjailbreak-train.arrow").touch()
    assert [line.split(":")[0] for line in missing(names)] == ["wildjailbreak"]


def test_the_libraries_of_the_hub_are_not_imported_for_a_folder(folder):
    code = (
        "import sys; from data import hub; hub.load('mmlu'); hub.survey(['mmlu', 'dan']);"
        "assert not {'datasets', 'huggingface_hub'} & set(sys.modules)"
    )
    root = Path(pools.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
