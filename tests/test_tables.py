"""The paper's tables from a run: their rows, printed numbers beside ours, and the paper's own as a run."""

import csv
import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

from data import paper
from stages import arms, artifacts
from stages.maps import Map
from stages.reporting import correlations, costs, families, figures, tables
from tests.fabricated import PAPER_SIDES, Fabricated, fabricate

correlate = importlib.import_module("stages.06_correlate")
MAPS = ("mmlu100=mmlu_calibration:100", "gsm8k100=gsm8k_calibration:100", "small=embedded/util:20")
ABLATIONS = (
    "buckets_O",
    "buckets_S",
    "top50",
    "top75",
    "bottom50",
    "bottom75",
    "bucketsof8",
    "buckets@mmlu100",
    "buckets@gsm8k100",
    "buckets@small",
    "top50_O",
)
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in sorted((folder / correlate.NAME / "tables").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything that the paper has, of one of its models: page, tables, figure names."""
    folder = tmp_path_factory.mktemp("whole")
    like = Fabricated(
        layers=4,
        heads=8,
        rows=40,
        sides=PAPER_SIDES,
        model=LLAMA,
        seeds=(21, 42),
        optimizers=("sft", "pcgrad", "pcgrad-symmetric"),
        ablations=ABLATIONS,
        maps=MAPS,
        settings={"util_source": "mmlu_calibration", "resamples": 50},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FORMATS", {"svg": figures.FORMATS["svg"]})
        correlate.main(fabricate(folder, like))
    page = (folder / correlate.NAME / "report.html").read_text(encoding="utf-8")
    return page, read(folder), {path.stem for path in (folder / correlate.NAME / "figures").iterdir()}


def cell(row: dict, column: str) -> float:
    return float(row[column])


def test_every_table_has_the_papers_rows(whole):
    _, found, _ = whole
    assert [row["method"] for row in found["table1"]] == ["base", "full", "random", "risky", "safe"]
    assert {row["optimizer"] for row in found["table1"]} == {"none", "sft"}
    assert [(row["method"], row["optimizer"]) for row in found["table2"]] == [
        ("base", "none"),
        *((method, "pcgrad") for method in ("full", "random", "risky", "safe")),
        *((method, "pcgrad-symmetric") for method in ("full", "random", "risky", "safe")),
    ]
    assert [(row["score"], row["bucket"]) for row in found["table7"]] == [
        (score, str(number)) for score in "COS" for number in range(1, 5)
    ]
    assert [row["score"] for row in found["table8"]] == ["O", "S", "C"]
    assert [(row["selection"], row["percent"], row["arm"]) for row in found["table9"]] == [
        ("full", "100", "full"),
        ("top", "25", "bucket1"),
        ("top", "50", "top50"),
        ("top", "75", "top75"),
        ("bottom", "25", "bucket4"),
        ("bottom", "50", "bottom50"),
        ("bottom", "75", "bottom75"),
    ]
    for name, map_ in (("table10", "mmlu100"), ("table11", "gsm8k100"), ("table_map_small", "small")):
        assert [row["arm"] for row in found[name]] == [f"bucket{number}@{map_}" for number in range(1, 5)]
    assert len(found["table_buckets"]) == 8 and [row["arm"] for row in found["table_further"]] == ["top50_O"]
    assert [row["map"] for row in found["maps"]] == ["mmlu100", "gsm8k100", "small"]


def test_the_papers_numbers_stand_beside_ours(whole):
    page, found, _ = whole
    by_arm = {(row["arm"], row["optimizer"]): row for row in found["costs_mean"]}
    base, full, *_, safe = found["table1"]
    assert cell(base, "paper_mmlu") == 59.38 and cell(full, "paper_gsm8k") == 20.8
    assert cell(safe, "paper_utility") == 61.34 and cell(safe, "paper_wildjailbreak") == 94.85
    ours = by_arm["bucket4", "sft"]
    assert cell(safe, "wildjailbreak") == 100 * cell(ours, "wildjailbreak")
    assert cell(safe, "utility_std") == 100 * cell(ours, "utility_std") and safe["n_seeds"] == "2"
    assert [row["paper_safety"] for row in found["table2"]] == [
        "67.22",
        "89.76",
        "89.82",
        "91.4",
        "89.65",
        *[""] * 4,
    ]
    first = found["table7"][0]
    assert (first["paper_ucr"], first["paper_mmlu_cr"], first["paper_predicted"]) == ("0.41", "0.44", "1.27")
    assert cell(first, "ucr") == cell(by_arm["bucket1", "sft"], "ucr_of_means")
    assert cell(first, "mmlu_cr") == cell(by_arm["bucket1", "sft"], "source_cr_of_means")
    assert cell(found["table7"][4], "predicted") == cell(by_arm["bucket1_O", "sft"], "mean_conflict")
    assert [row["paper_mmlu_cr_pearson"] for row in found["table8"]] == ["-0.13", "0.96", "0.99"]
    assert [row["paper_utility"] for row in found["table9"]][-2:] == ["57.93", "55.97"]
    assert found["table10"][3]["paper_utility"] == "63.18" and found["table11"][2]["paper_gsm8k"] == "83.4"
    assert "paper_ucr" not in found["table10"][0]  # not printed there
    assert not any(name.startswith("paper") for name in found["table_map_small"][0])
    assert "The paper's tables" in page and "the paper's MMLU-CR" in page.replace("&#39;", "'")


def test_figures_and_sections_of_a_run_with_ablations(whole):
    page, _, drawn = whole
    assert drawn == {
        "figure1_localisation",
        "figure3_pareto_sft",
        "figure4_pareto_pcgrad",
        "figure5_source_cr",
        "figure6_ucr",
        "figure7_conflict_map",
        "conflict_sensitivity",
        "finer_buckets",
        "ratio_trajectories",
    }
    assert page.count("data:image/svg+xml") == len(drawn)
    for words in ("Ablations", "Table 9: ", "Buckets of map small", "Further arms", "top 50 % of O", "(RQ2)"):
        assert words in page
    arms_table = page.split('<h2 id="arms">')[1].split('<h2 id="cost">')[0]
    assert "of 8" not in arms_table and "bottom" not in arms_table


def test_a_run_without_ablations_has_no_such_tables(scratch):
    correlate.main(fabricate(scratch, Fabricated()))
    found = read(scratch)
    assert set(found) == {
        *("costs", "costs_mean", "correlations", "failures", "layers", "heads_top", "variants"),
        *("table1", "table7", "table8"),
    }
    assert not any(name.startswith("paper") for rows in found.values() for name in rows[0])
    assert [row["score"] for row in found["table7"]] == ["C"] * 4
    assert (
        list(found["table1"][0])[-2:] == ["over_refusal_std", "flag"] and "benign" not in found["table1"][0]
    )
    page = (scratch / correlate.NAME / "report.html").read_text(encoding="utf-8")
    for words in ("Ablations", "The paper's tables", "Table 1", "Table 7", "Buckets of O"):
        assert f">{words}" not in page
    drawn = {path.stem for path in (scratch / correlate.NAME / "figures").iterdir()}
    assert not drawn & {"figure4_pareto_pcgrad", "finer_buckets", "ratio_trajectories"}


def test_rows_without_safety_gain_are_flagged(scratch):
    correlate.main(fabricate(scratch, Fabricated(safety_gain=-0.1, ablations=("top50",))))
    found = read(scratch)
    for name in ("table1", "table7", "table9"):
        tuned = [row for row in found[name] if row["arm"] != "base"]
        assert {row["flag"] for row in tuned} == {costs.NO_GAIN} and found[name][0].get("ucr", "") == ""
    assert found["table8"][0]["flag"] == "no safety gain in 4 of 4 buckets"
    page = (scratch / correlate.NAME / "report.html").read_text(encoding="utf-8")
    assert page.count(f'<small class="fails">{costs.NO_GAIN}</small>') == 6 + 4  # arms, Table 9
    mean = {"arm": "full", "flag": "", "ucr_of_means": 0.1, "n_no_gain": 1, "n_seeds": 3}
    assert tables.flag(mean) == "no safety gain in 1 of 3 seeds"
    assert tables.flag(mean | {"ucr_of_means": None}) == costs.NO_GAIN


def run_of(model: str, sides: dict, **row) -> tables.Run:
    """Means of hand: every score 0.5 but those given."""
    mean = {"arm": "full", "optimizer": "sft", "n_seeds": 1, "n_no_gain": 0, "flag": "", "predicted": 1.0}
    mean |= {
        f"{name}{end}": None for name in (*sides, "utility", "safety", *costs.RATIOS) for end in ("_std", "")
    }
    mean |= dict.fromkeys((*sides, "utility", "safety"), 0.5) | {
        f"{name}_of_means": 0.1 for name in costs.RATIOS
    }
    base = mean | {"arm": "base", "optimizer": "none"}
    means = {("base", "none"): base, ("full", "sft"): mean | row}
    means |= {(arm, "pcgrad"): mean | {"arm": arm} for arm in ("full", "random")}
    return tables.Run(means, sides, "mmlu", 4, model)


def test_averages_over_other_benchmarks_do_not_compare():
    sides = dict(PAPER_SIDES)
    table = tables.main_table(run_of("llama", sides), 1, ("sft",))
    assert table.rows[1]["paper_utility"] == 36.78 and table.rows[1]["mmlu"] == 50
    del sides["math"]
    table = tables.main_table(run_of("llama", sides), 1, ("sft",))
    assert "paper_utility" not in table.rows[1] and table.rows[1]["paper_mmlu"] == 46.28
    assert table.rows[1]["paper_safety"] == 90.61


def test_rows_that_the_paper_lacks_are_told():
    table = tables.main_table(run_of("mistral", PAPER_SIDES), 2, ("pcgrad",))
    assert [row["paper_mmlu"] for row in table.rows] == [46.98, 53.13, None]
    assert "No printed number for random heads (data/paper/README.md)." in table.caption
    assert not tables.ratio_table(run_of("qwen", PAPER_SIDES))  # no ratio was tuned


def test_maps_are_the_papers_by_pool_and_compare_by_rows():
    run = run_of("qwen", PAPER_SIDES)
    run.means["bucket2@m", "sft"] = run.means["full", "sft"] | {"arm": "bucket2@m"}
    for pool, rows, first, name in (
        ("mmlu_calibration", 100, True, "table10"),
        ("gsm8k_calibration", 100, True, "table11"),
        ("mmlu_calibration", 20, True, "table10"),
        ("mmlu_calibration", 20, False, "table_map_m"),
        ("embedded/util", 100, True, "table_map_m"),
    ):
        assert tables.map_table(run, Map("m", pool, rows), first).name == name
    (fewer,) = tables.map_table(run, Map("m", "mmlu_calibration", 20)).rows
    assert not any(name.startswith("paper") for name in fewer)
    (row,) = tables.map_table(run, Map("m", "mmlu_calibration", 100)).rows
    assert row["paper_gsm8k"] == 58.8 and row["bucket"] == 2


# The paper's own numbers as a run


def paper_run(model: str) -> tuple[tables.Run, list[dict]]:
    """Table 1's base row and Table 7 through the code that stage 06 runs: means and correlations."""
    ours = {printed: name for name, printed in tables.PRINTED.items() if name in PAPER_SIDES}
    scores, tuned = [], []

    def add(row: dict, arm: str, optimizer: str, seed: int) -> None:
        labels = {"arm": arm, "optimizer": optimizer, "seed": seed}
        for printed, name in ours.items():
            one = {"benchmark": name, "side": PAPER_SIDES[name], "n": 100, "score": row[printed] / 100}
            scores.append(labels | one)

    add(paper.row(1, model=model, method="base"), "base", "none", -1)
    for row in paper.table(7):
        if row["model"] == model:
            name = arms.name_of(arms.Arm("bucket", int(row["bucket"]), 4, row["score"]), 4)
            add(row, name, "sft", 21)
            tuned.append({"arm": name, "optimizer": "sft", "seed": 21, "predicted": row["mean_score"]})
    rows = costs.arm_costs(scores, tuned, "mmlu")
    means = {(row["arm"], row["optimizer"]): row for row in costs.mean_over_seeds(rows, "mmlu")}
    run = tables.Run(means, PAPER_SIDES, "mmlu", 4, model)
    return run, correlations.correlations(rows, 4, resamples=10, seed=0)


@pytest.mark.parametrize("model", ["llama", "qwen", "mistral"])
def test_the_papers_table_7_through_our_code(model):
    run, _ = paper_run(model)
    for row in tables.bucket_table(run).rows:
        for name in (*PAPER_SIDES, "predicted"):
            assert row[name] == pytest.approx(row[f"paper_{name}"])
        for name in ("utility", "safety"):
            assert row[name] == pytest.approx(row[f"paper_{name}"], abs=0.021)
        for name in ("ucr", "mmlu_cr"):
            assert row[name] == pytest.approx(row[f"paper_{name}"], abs=0.011)


@pytest.mark.parametrize("model", ["llama", "qwen", "mistral"])
def test_table_8_follows_from_table_7_through_our_code(model):
    """As far as tests/test_paper.py finds that it follows at all: Mistral's O and S do not."""
    run, found = paper_run(model)
    table = tables.correlation_table(run, found)
    assert [row["score"] for row in table.rows] == ["O", "S", "C"] and table.has_paper
    for row in table.rows:
        if model == "mistral" and row["score"] != "C":
            continue
        for name in table.measures:
            assert row[name] == pytest.approx(row[f"paper_{name}"], abs=0.011)


def test_predicted_is_the_mean_of_what_ranked_the_arm():
    random = np.random.default_rng(3)
    maps = {name: arms.HeadMap(*random.uniform(0.1, 1, (3, 2, 4))) for name in ("", "m")}
    for arm, values in (
        ("bucket2", maps[""].score),
        ("bucket2_O", maps[""].conflict),
        ("bucket1of2_S@m", maps["m"].sensitivity),
        ("full", maps[""].score),
    ):
        heads = arms.heads(arm, maps, 4, 0)
        row = {"arm": arm, "layers": [layer for layer, _ in heads], "heads": [head for _, head in heads]}
        expected = np.mean([values[layer, head] for layer, head in heads])
        assert families.predicted(row, maps, 4) == pytest.approx(expected)


def test_doctests():
    for module in (families, correlations, costs):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


def test_words_for_every_kind_of_arm():
    said = [
        families.words(arm, 4)
        for arm in ("base", "full", "bucket1", "bucket2", "bucket3of8", "bucket4_S", "bottom50", "bucket1@m")
    ]
    assert said == [
        *("base", "all heads", "bucket 1 (Risky Zone)", "bucket 2", "bucket 3 of 8", "bucket 4 by S"),
        *("bottom 50 % of C", "bucket 1 of map m"),
    ]
    labels = [families.label(families.family(arm, 4), 4) for arm in ("bucket1", "bucket1of8", "bucket1_O@m")]
    assert labels == ["C", "C of 8", "O by m"]


def test_same_inputs_same_bytes_with_ablations(scratch):
    like = Fabricated(
        rows=20,
        seeds=(21, 42),
        ablations=("buckets_O", "top50", "bucketsof8", "buckets@small"),
        maps=MAPS[2:],
        sides={"facts": "utility", "problems": "utility", "vanilla": "safety", "benign": "over-refusal"},
    )
    digests = []
    for name in ("one", "two"):
        correlate.main(fabricate(scratch / name, like))
        digests.append(artifacts.stage_manifest(scratch / name, correlate.NAME)["outputs"])
    assert digests[0] == digests[1] and "figures/ratio_trajectories.png" in digests[0]
