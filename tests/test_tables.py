"""The paper's tables from a run: their rows, printed numbers beside ours, and the paper's own as a run."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data import paper
from stages.method.arms import BASE_RUN, OWN, ArmRun, head_arm, parse
from stages.report import costs, tables, words
from stages.report.results import Results
from stages.run.maps import MapSpec
from tests.fabricated import PAPER_SIDES, Fabricated, report_of, results_of

MAPS = ("mmlu100=mmlu_calibration:100", "gsm8k100=gsm8k_calibration:100", "small=embedded/util:20")
SPECS = tuple(MapSpec(*text.replace(":", "=").split("=")[:2], int(text.split(":")[1])) for text in MAPS)
ABLATIONS = (
    *("buckets_O", "buckets_S", "top50", "top75", "bottom50", "bottom75", "bucketsof8", "top50_O"),
    *("buckets@mmlu100", "buckets@gsm8k100", "buckets@small"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything that the paper has. Its model is a folder: whose columns they are, the preset
    says."""
    settings = {"model": "/models/a-copy-of-llama", "paper": "llama", "seeds": (21, 42), "maps": MAPS}
    settings |= {"optimizers": ("sft", "pcgrad", "pcgrad-symmetric"), "ablations": ABLATIONS}
    settings |= {"util_source": "mmlu_calibration", "resamples": 50}
    like = Fabricated(layers=4, heads=8, rows=40, sides=PAPER_SIDES, settings=settings)
    return report_of(tmp_path_factory.mktemp("whole"), like)


def test_every_table_has_the_papers_rows(whole):
    _, found, _ = whole
    methods, numbers = ["full", "random", "risky", "safe"], [1, 2, 3, 4]
    for name, column, wanted in (
        ("table1", "method", ["base", *methods]),
        ("table2", "method", ["base", *methods, *methods]),
        ("table7", "score", [*"CCCCOOOOSSSS"]),
        ("table7", "bucket", numbers * 3),
        ("table8", "score", [*"OSC"]),
        ("table9", "selection", ["full", *["top"] * 3, *["bottom"] * 3]),
        ("table9", "percent", [100, 25, 50, 75, 25, 50, 75]),
        ("table9", "arm", ["full", "bucket1", "top50", "top75", "bucket4", "bottom50", "bottom75"]),
        ("table10", "arm", [f"bucket{number}@mmlu100" for number in numbers]),
        ("table11", "arm", [f"bucket{number}@gsm8k100" for number in numbers]),
        ("table_map_small", "arm", [f"bucket{number}@small" for number in numbers]),
        ("table_buckets", "bucket", list(range(1, 9))),
        ("table_further", "arm", ["top50_O"]),
        ("maps", "map", ["mmlu100", "gsm8k100", "small"]),
    ):
        assert list(found[name][column]) == wanted, (name, column)
    assert found["table1"]["optimizer"].isna()[0] and set(found["table1"]["optimizer"][1:]) == {"sft"}
    assert list(found["table2"]["optimizer"][1:]) == ["pcgrad"] * 4 + ["pcgrad-symmetric"] * 4


def test_the_papers_numbers_stand_beside_ours(whole):
    text, found, _ = whole
    means = found["costs_mean"].set_index(["arm", "optimizer"])
    base, full, *_, safe = (row for _, row in found["table1"].iterrows())
    assert base["paper_mmlu"] == 59.38 and full["paper_gsm8k"] == 20.8
    assert safe["paper_utility"] == 61.34 and safe["paper_wildjailbreak"] == 94.85
    ours = means.loc["bucket4", "sft"]
    assert safe["wildjailbreak"] == pytest.approx(100 * ours["wildjailbreak"]) and safe["n_seeds"] == 2
    assert safe["utility_std"] == pytest.approx(100 * ours["utility_std"])
    printed = [67.22, 89.76, 89.82, 91.4, 89.65]
    assert found["table2"]["paper_safety"].fillna(0).to_list() == [*printed, *[0] * 4]
    first = found["table7"].iloc[0]
    assert list(first[["paper_ucr", "paper_mmlu_cr", "paper_ranked_mean"]]) == [0.41, 0.44, 1.27]
    # One UCR, in every table.
    assert first["ucr"] == means.loc[("bucket1", "sft"), "ucr"]
    assert first["mmlu_cr"] == means.loc[("bucket1", "sft"), "source_cr"]
    by_o = means.loc[("bucket1_O", "sft"), "mean_optimization_conflict"]
    assert found["table7"]["ranked_mean"][4] == by_o
    assert list(found["table8"]["paper_mmlu_cr_pearson"]) == [-0.13, 0.96, 0.99]
    assert list(found["table9"]["paper_utility"])[-2:] == [57.93, 55.97]
    assert found["table10"]["paper_utility"][3] == 63.18 and found["table11"]["paper_gsm8k"][2] == 83.4
    assert "paper_ucr" not in found["table10"]  # not printed there
    assert not found["table_map_small"].columns.str.startswith("paper").any()
    assert "The paper's tables" in text and "the paper's MMLU-CR" in text.replace("&#39;", "'")


def test_figures_and_sections_of_a_run_with_ablations(whole):
    text, _, drawn = whole
    papers = "figure1_localisation figure3_pareto_sft figure4_pareto_pcgrad figure5_source_cr figure6_ucr"
    ours = "figure7_conflict_map conflict_sensitivity finer_buckets ratio_trajectories"
    assert drawn == {*papers.split(), *ours.split()}
    assert text.count("data:image/svg+xml") == len(drawn)
    for part in ("Ablations", "Table 9: ", "Buckets of map small", "Further arms", "top 50 % of O"):
        assert part in text
    assert "(RQ2)" in text and "Faint points" in text
    arms_table = text.split('<h2 id="arms">')[1].split('<h2 id="cost">')[0]
    assert "of 8" not in arms_table and "bottom" not in arms_table
    assert "any exp(percentile rank) gives them" in text and "only reading" not in text


def test_a_run_without_ablations_has_no_such_tables(scratch):
    text, found, drawn = report_of(scratch, Fabricated())
    always = "costs costs_mean correlations failures layers heads_top variants table1 table7 table8"
    assert set(found) == {*always.split()}
    assert not any(table.columns.str.startswith("paper").any() for table in found.values())
    assert list(found["table7"]["score"]) == ["C"] * 4 and list(found["table8"]["score"]) == ["C"]
    assert list(found["table1"])[-2:] == ["over_refusal_std", "flag"] and "benign" not in found["table1"]
    for title in ("Ablations", "The paper's tables", "Table 1", "Table 7", "Buckets of O"):
        assert f">{title}" not in text
    assert not drawn & {"figure4_pareto_pcgrad", "finer_buckets", "ratio_trajectories"}


def test_rows_without_safety_gain_are_flagged(scratch):
    text, found, _ = report_of(scratch, Fabricated(safety_gain=-0.1, settings={"ablations": ("top50",)}))
    for name in ("table1", "table7", "table9"):
        tuned = found[name][found[name]["arm"] != "base"]
        assert set(tuned["flag"]) == {words.NO_GAIN} and tuned.get("ucr", pd.Series()).isna().all()
    assert found["table8"]["flag"][0] == "no safety gain in 4 of 4 buckets"
    assert text.count(f'<small class="fails">{words.NO_GAIN}</small>') == 6 + 4  # arms, Table 9
    means = pd.DataFrame({"safety_gain": [np.nan, 0.1, 0.0], "n_no_gain": [0, 1, 3], "n_seeds": [1, 3, 3]})
    assert tables.flags(means) == [None, "no safety gain in 1 of 3 seeds", words.NO_GAIN]


# The paper's own numbers as a run


def test_table_8_correlates_what_table_7_prints(whole):
    _, found, _ = whole
    for score, rows in found["table7"].groupby("score"):
        eighth = found["table8"].set_index("score").loc[score]
        for cost in ("ucr", "mmlu_cr"):
            r = np.corrcoef(rows["ranked_mean"], rows[cost])[0, 1]
            assert eighth[f"{cost}_pearson"] == pytest.approx(r)
            assert eighth[f"{cost}_pearson_low"] < eighth[f"{cost}_pearson_high"]


def paper_run(model: str, arms: dict[ArmRun, dict], sides: dict[str, str] = PAPER_SIDES) -> Results:
    """Table 1's base row and `arms` (rows of the paper's tables) through the code that stage 06 runs."""
    ours = {printed: name for name, printed in tables.PRINTED.items() if name in sides}
    measured = {BASE_RUN: paper.row(1, model=model, method="base")} | arms
    scores = {
        run: {name: row[printed] / 100 for printed, name in ours.items()} for run, row in measured.items()
    }
    tuned = pd.DataFrame(1.0, index=pd.Index(list(arms), dtype=object), columns=costs.SELECTION)
    tuned["ranked_mean"] = [row.get("mean_score", 1.0) for row in arms.values()]
    losses = costs.losses_of(sides, "mmlu")
    by_seed = costs.arm_costs(scores, tuned, sides, losses)
    maps = (MapSpec(OWN, "mmlu_calibration", 500), *SPECS)
    return results_of(by_seed, sides, losses, paper=model, maps=maps, source="mmlu")


def tables_of(results: Results) -> dict[str, tables.Table]:
    return {table.name: table for table in tables.paper_tables(results)}


def few(model: str, sides=PAPER_SIDES, optimizer: str = "sft", names=("full", "random")) -> Results:
    row = paper.row(1, model=model, method="full")
    return paper_run(model, {ArmRun(arm, optimizer, 21): row for arm in parse(names, 4)}, sides)


def table_7(model: str) -> dict[ArmRun, dict]:
    """Rows of the paper's Table 7 by arm."""
    rows = [row for row in paper.table(7) if row["model"] == model]
    arms = [head_arm("bucket", int(row["bucket"]), 4, ranked_by=row["score"]) for row in rows]
    return {ArmRun(arm, "sft", 21): row for arm, row in zip(arms, rows, strict=True)}


@pytest.mark.parametrize("model", ["llama", "qwen", "mistral"])
def test_the_papers_tables_7_and_8_through_our_code(model):
    """Table 8 as far as tests/test_paper.py finds that it follows at all: Mistral's O and S do not."""
    found = tables_of(paper_run(model, table_7(model)))
    seventh, eighth = found["table7"].rows, found["table8"]
    for name, apart in (
        *((name, 1e-6) for name in (*PAPER_SIDES, "ranked_mean")),
        *(("utility", 0.021), ("safety", 0.021), ("ucr", 0.011), ("mmlu_cr", 0.011)),
    ):
        assert seventh[name].to_numpy() == pytest.approx(seventh[f"paper_{name}"].to_numpy(), abs=apart)
    assert list(eighth.rows["score"]) == ["O", "S", "C"] and eighth.has_paper
    for row in eighth.rows.to_dict("records"):
        if model != "mistral" or row["score"] == "C":
            for name in eighth.headings:
                assert row[name] == pytest.approx(row[f"paper_{name}"], abs=0.011)


def test_only_what_compares_stands_beside_ours():
    full = tables_of(few("llama"))["table1"].rows.iloc[1]
    assert full["paper_utility"] == 36.78 and full["mmlu"] == pytest.approx(46.28)
    # An average over other benchmarks does not.
    sides = {name: side for name, side in PAPER_SIDES.items() if name != "math"}
    full = tables_of(few("llama", sides))["table1"].rows.iloc[1]
    assert "paper_utility" not in full and full["paper_mmlu"] == 46.28 and full["paper_safety"] == 90.61
    # Rows that the paper lacks are named.
    table = tables_of(few("mistral", optimizer="pcgrad"))["table2"]
    assert list(table.rows["paper_mmlu"].fillna(0)) == [46.98, 53.13, 0]
    assert "No printed number for random heads (data/paper/README.md)." in table.caption
    # Maps are the paper's by their pool, and compare by their rows.
    own = MapSpec(OWN, "mmlu_calibration", 500)
    again, fewer = (MapSpec(name, "mmlu_calibration", 20) for name in ("again", "mmlu100"))
    results = few("qwen", names=["bucket2@mmlu100", "bucket1@again"])
    both = tables_of(replace(results, maps=(own, *SPECS, again)))
    assert "table9" not in both  # no ratio was tuned
    (row,) = both["table10"].rows.to_dict("records")
    assert row["paper_gsm8k"] == 58.8 and row["bucket"] == 2 and "table_map_again" in both
    assert not tables_of(replace(results, maps=(own, fewer)))["table10"].has_paper


def test_words_for_every_kind_of_arm():
    names = ["full", "bucket1", "bucket2", "bucket3of8", "bucket4_S", "bottom50", "bucket1@m"]
    names.append("neurons8_lam0.8")
    assert [words.arm_words(arm, 4) for arm in parse(names, 4)] == [
        *("all heads", "bucket 1 (Risky Zone)", "bucket 2", "bucket 3 of 8", "bucket 4 by S"),
        *("bottom 50 % of C", "bucket 1 of map m", "8 + 8 neurons at lam 0.8"),
    ]
    buckets = parse(["bucket1", "bucket1of8", "bucket1_O@m"], 4)
    assert [words.family_words(arm, 4) for arm in buckets] == ["C", "C of 8", "O by m"]
