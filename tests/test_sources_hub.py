"""Loading the public sets from the hub (`datasets` replaced), and what is said when they cannot be had."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from data import pools, sources
from data.examples import SCORINGS
from tests.public_sets import MMLU, SPLITS

# --- the hub ---


@pytest.mark.parametrize("pool", pools.POOLS)
def test_the_hub_gives_the_same_records_as_a_folder(folder, hub, pool, monkeypatch):
    loaded, spec = sources.load(pool), pools.POOLS[pool]
    options = (
        {"delimiter": "\t", "keep_default_na": False} if spec.repository == "allenai/wildjailbreak" else {}
    )
    assert hub == [(spec.repository, spec.config, split, spec.revision, options) for split, _ in spec.parts]
    provenance = loaded.provenance
    assert (provenance.location, provenance.revision) == ("hub", spec.revision)
    assert (len(provenance.sha256), provenance.rows, provenance.standin) == (64, len(loaded.records), False)
    assert all(record.scoring in SCORINGS for record in loaded.records)
    monkeypatch.setenv("CAST_DATA", str(folder))
    assert sources.load(pool).records == loaded.records


def test_every_pool_pins_a_commit_and_gated_ones_say_where_access_is_granted():
    for spec in pools.POOLS.values():
        assert len(spec.revision) == 40
        assert spec.gated == spec.repository.startswith("allenai/")
        assert spec.url == f"https://huggingface.co/datasets/{spec.repository}"


def test_the_hash_of_hub_rows_follows_their_content(hub, monkeypatch):
    before = sources.load("mmlu").provenance.sha256
    assert sources.load("mmlu").provenance.sha256 == before
    monkeypatch.setitem(SPLITS, ("cais/mmlu", "all", "test"), ("", [MMLU[0], MMLU[1] | {"answer": 1}]))
    assert sources.load("mmlu").provenance.sha256 != before


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
        assert sources.load("mmlu").provenance.revision == commit
    else:
        with pytest.raises(
            ValueError, match=rf"^cais/mmlu \(all, test\): the cache has commit {commit}, not "
        ):
            sources.load("mmlu")


def test_bad_hub_data_is_one_line_with_repository_and_column(hub, monkeypatch):
    monkeypatch.setitem(SPLITS, ("openai/gsm8k", "main", "test"), ("", [{"question": "q"}]))
    with pytest.raises(ValueError, match=r"^openai/gsm8k \(main, test\): column 'answer' is missing$"):
        sources.load("gsm8k")


def test_a_failing_hub_is_one_line(hub, monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"^cais/mmlu \(all, test\): cannot be loaded from the hub \(Conn"
    ) as caught:
        sources.load("mmlu")
    assert "\n" not in str(caught.value)


# --- what the hub refuses ---


@pytest.fixture
def access(hub, monkeypatch, tmp_path):
    """What `HfApi.auth_check` raises for a repository (by default nothing); empty cache, no login."""
    import datasets
    import huggingface_hub

    errors: dict[str, Exception] = {}
    asked = []

    def auth_check(self, repository, *, repo_type):
        assert repo_type == "dataset"
        asked.append(repository)
        if repository in errors:
            raise errors[repository]

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    errors["asked"] = asked
    return errors


def refusal(name):
    from huggingface_hub import errors

    return getattr(errors, name)("a\nb", response=SimpleNamespace(headers={}, request=None))


def test_nothing_is_missing_and_each_repository_is_asked_once(access, hub):
    assert sources.missing(pools.POOLS) == []
    assert len(access["asked"]) == len(set(access["asked"])) == 7
    assert hub == []  # nothing was downloaded


def test_gated_without_access(access, monkeypatch):
    import huggingface_hub

    access["allenai/wildjailbreak"] = refusal("GatedRepoError")
    lines = sources.missing(["mmlu", "wildjailbreak", "vanilla_benign"])
    assert lines[0] == (
        "wildjailbreak: allenai/wildjailbreak is gated: log in (`hf auth login`) and accept its terms at "
        "https://huggingface.co/datasets/allenai/wildjailbreak, or set CAST_DATA to a folder with "
        "wildjailbreak_eval.parquet"
    )
    assert len(lines) == 2
    assert lines[1].startswith("vanilla_benign: ")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    assert "is gated: accept its terms at https://" in sources.missing(["wildjailbreak"])[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "RepositoryNotFoundError",
            "dan: .* is not on the hub or closed to this account: try `hf auth login`",
        ),
        ("HfHubHTTPError", r"dan: the hub refuses .* \(HfHubHTTPError\): try `hf auth login` or wait"),
    ],
)
def test_refused(access, name, message):
    access[pools.POOLS["dan"].repository] = refusal(name)
    (line,) = sources.missing(["dan"])
    assert re.match(message, line)
    assert "\n" not in line


def test_no_network_and_what_an_earlier_run_left_in_the_cache(access, tmp_path):
    for pool in pools.POOLS.values():
        access[pool.repository] = OSError("a\nb")
    names = ["mmlu", "math", "wildjailbreak"]
    lines = sources.missing(names)
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
    assert [line.split(":")[0] for line in sources.missing(names)] == ["wildjailbreak"]


def test_the_libraries_of_the_hub_are_not_imported_for_a_folder(folder):
    code = (
        "import sys; from data import sources; sources.load('mmlu'); sources.missing(['mmlu', 'dan']);"
        "assert not {'datasets', 'huggingface_hub'} & set(sys.modules)"
    )
    root = Path(sources.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
