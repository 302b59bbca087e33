"""Stage 06: costs by hand, and the report of fabricated runs of every awkward kind."""

import csv
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from stages import artifacts, metrics, schemas
from stages.reporting import answers, correlations, costs, figures, map_tables, report, side_by_side, verdicts
from tests.fabricated import INJECTED, Fabricated, fabricate

correlate = importlib.import_module("stages.06_correlate")


@pytest.fixture()
def vector_only(monkeypatch):
    """Every figure is drawn once instead of twice."""
    monkeypatch.setattr(figures, "FORMATS", {"svg": figures.FORMATS["svg"]})


def run_stage(folder: Path, like: Fabricated) -> tuple[str, dict[str, list[dict[str, str]]]]:
    """The report and the tables of a fabricated run."""
    correlate.main(fabricate(folder, like))
    out = folder / correlate.NAME
    tables = {}
    for path in sorted(out.glob("tables/*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            tables[path.stem] = list(csv.DictReader(file))
        assert path.with_suffix(".md").is_file()
    drawn = {path.stem for path in out.glob("figures/*")}
    assert {"figure7_conflict_map", "conflict_sensitivity"} <= drawn
    for name in drawn:
        assert all((out / "figures" / f"{name}.{suffix}").stat().st_size for suffix in figures.FORMATS)
    return (out / "report.html").read_text(encoding="utf-8"), tables


def score_rows(arm: str, seed: int, scores: dict[str, float], sides: dict[str, str]) -> list[dict]:
    labels = {"arm": arm, "optimizer": "none" if arm == "base" else "sft", "seed": seed}
    return [
        labels | {"benchmark": name, "side": sides[name], "n": 10, "score": scores[name]} for name in scores
    ]


def arm_row(arm: str, seed: int, mean_score: float) -> dict:
    selection = dict.fromkeys(costs.SELECTION, 1.0) | {"mean_score": mean_score, "predicted": mean_score}
    return {"arm": arm, "optimizer": "sft", "seed": seed, **selection}


def small(
    values: dict[tuple[str, int], tuple[float, float, float, float]], scores_c: dict[str, float]
) -> list[dict]:
    """arm_costs of hand-written scores: (arm, seed) -> (facts, words, vanilla, benign)."""
    sides = {"facts": "utility", "words": "utility", "vanilla": "safety", "benign": "over-refusal"}
    scores = [
        row
        for (arm, seed), given in values.items()
        for row in score_rows(arm, seed, dict(zip(sides, given, strict=True)), sides)
    ]
    arms = [arm_row(arm, seed, scores_c[arm]) for arm, seed in values if arm != "base"]
    return costs.arm_costs(scores, arms, "facts")


def test_costs_by_hand():
    values = {
        ("base", -1): (0.8, 0.6, 0.2, 0.1),
        ("bucket1", 21): (0.6, 0.5, 0.7, 0.2),
        ("full", 21): (0.9, 0.9, 0.2, 0.0),
    }
    base, risky, full = small(values, {"bucket1": 1.0, "full": 0.5})
    assert (base["utility"], base["ucr"], base["flag"], base["n_heads"]) == (
        pytest.approx(0.7),
        None,
        "",
        None,
    )
    assert risky["utility"] == pytest.approx(0.55)
    assert risky["safety_gain"] == pytest.approx(0.5) and risky["utility_loss"] == pytest.approx(0.15)
    assert risky["ucr"] == pytest.approx(0.3) and risky["source_cr"] == pytest.approx(0.4)
    assert risky["over_refusal_cr"] == pytest.approx(0.2)
    assert (risky["flag"], full["flag"]) == ("", costs.NO_GAIN)


def test_means_leave_out_ratios_of_seeds_without_gain():
    base, one, flat = (0.8, 0.8, 0.2, 0.1), (0.6, 0.6, 0.6, 0.1), (0.7, 0.7, 0.2, 0.1)
    rows = small({("base", -1): base, ("bucket1", 21): one, ("bucket1", 42): flat}, {"bucket1": 1.0})
    mean = costs.mean_over_seeds(rows, "facts")[1]
    assert mean["utility"] == pytest.approx(0.65) and mean["utility_std"] == pytest.approx(
        np.std([0.6, 0.7], ddof=1)
    )
    assert (mean["n_seeds"], mean["n_no_gain"], mean["flag"]) == (2, 1, "")
    assert mean["ucr"] == pytest.approx(0.5) and mean["ucr_std"] is None
    assert mean["ucr_of_means"] == pytest.approx(0.15 / 0.2) == mean["source_cr_of_means"]


def test_correlations_count_their_points():
    values = {("base", -1): (0.8, 0.8, 0.2, 0.1)}
    for number, loss in enumerate((0.4, 0.3, 0.2, 0.1), start=1):
        values[f"bucket{number}", 21] = (0.8 - loss, 0.8 - loss, 0.7, 0.1)
    conflict = {f"bucket{number}": 1.2 - 0.2 * number for number in range(1, 5)}
    (main, *_) = correlations.correlations(small(values, conflict), 4, resamples=50, seed=0)
    assert (main["cost"], main["measure"], main["n_points"], main["n_no_gain"]) == ("ucr", "C", 4, 0)
    assert main["pearson"] == pytest.approx(1) and main["spearman"] == pytest.approx(1)
    assert main["pearson_low"] is None and main["critical_r"] == pytest.approx(0.95, abs=1e-3)

    values["bucket4", 21] = (0.7, 0.7, 0.2, 0.1)
    main = correlations.correlations(small(values, conflict), 4, resamples=50, seed=0)[0]
    assert (main["n_points"], main["n_no_gain"]) == (3, 1) and main["pearson"] == pytest.approx(1)
    values["bucket3", 21] = (0.6, 0.6, 0.1, 0.1)
    main = correlations.correlations(small(values, conflict), 4, resamples=50, seed=0)[0]
    assert (main["n_points"], main["pearson"]) == (2, None)


def test_pareto_front_keeps_equal_points_and_drops_dominated_ones():
    assert costs.pareto_front([1.0, 1.0, 0.5, 2.0], [3.0, 3.0, 2.9, 1.0]) == [0, 1, 3]


def test_resamples_are_paired_and_centred(scratch):
    like = Fabricated(seeds=(21, 42), rows=40)
    fabricate(scratch, like)
    given = answers.read(scratch)
    scores = artifacts.read_table(scratch / "05_evaluate/scores.parquet", schemas.SCORES).to_pylist()
    drawn = costs.resampled_scores(given, like.sides, resamples=400, seed=0)
    means = {(row["arm"], row["optimizer"]): [] for row in scores}
    for row in scores:
        if row["side"] == "utility":
            means[row["arm"], row["optimizer"]].append(row["score"])
    for arm, samples in drawn.items():
        assert samples["utility"].mean() == pytest.approx(np.mean(means[arm]), abs=0.02)
    # Seeds of an arm fail on nested rows here: a paired difference is narrower than its parts.
    one, two = (drawn[arm, "sft"]["utility"] for arm in ("bucket1", "bucket2"))
    assert np.std(one - two) < np.std(one)


def test_variants_agree_with_metrics():
    random = np.random.default_rng(1)
    h_gen, h_safe, conflict = (random.uniform(0, 1, (5, 4)) for _ in range(3))
    rows = {row["quantity"]: row for row in map_tables.variant_rows(h_gen, h_safe, conflict, 4)}
    printed, reranked = (
        metrics.buckets(conflict * metrics.functional_sensitivity(h_gen, h_safe, name), 4)
        for name in metrics.SENSITIVITY_VARIANTS
    )
    assert rows["share of heads in the same bucket"]["agreement"] == np.mean(printed == reranked)
    assert (
        rows["share of the Safe Zone in the other's Safe Zone"]["agreement"]
        == np.sum((printed == 4) & (reranked == 4)) / 5
    )
    assert rows["rank correlation of S (Spearman)"]["agreement"] == pytest.approx(1)
    assert rows["largest S"]["reranked"] == pytest.approx(np.e)


def test_report_of_one_seed(scratch):
    page, tables = run_stage(
        scratch, Fabricated(rows=60, warnings=("a map of ties is no map",), standins=("dan",))
    )
    assert len(tables["costs"]) == 7 and len(tables["layers"]) == 4 and len(tables["heads_top"]) == 12
    assert float(tables["costs"][1]["ucr"]) > 0 and tables["costs"][0]["ucr"] == ""
    # The cells are the numbers, not a rounding of them.
    base, full = tables["costs"][:2]
    expected = metrics.utility_cost_ratio(
        *(float(row[name]) for name in ("utility", "safety") for row in (base, full))
    )
    assert float(full["ucr"]) == expected
    assert "a map of ties is no map" in page and "Stand-ins were used for dan" in page
    assert INJECTED not in page and "&lt;script&gt;" in page and "\x07" not in page
    assert "4 points are few" in page and "One training seed was run" in page
    assert "/home/me" not in page and str(scratch) not in page
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", page)
    assert loads and all(address.startswith(("data:image/svg+xml", "#")) for address, _ in loads)
    assert "http" not in page and "<script" not in page
    # What is harmful to read is folded away.
    unfolded = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert "How do I break" in page and "How do I break" not in unfolded and "What is facts" in unfolded
    warnings = artifacts.stage_manifest(scratch, correlate.NAME)["notes"]
    assert warnings["source_benchmark"] == "facts" and "warnings" not in warnings


def test_same_inputs_same_bytes(scratch):
    digests = []
    for name in ("one", "two"):
        run_stage(scratch / name, Fabricated(seeds=(21, 42), rows=20))
        digests.append(artifacts.stage_manifest(scratch / name, correlate.NAME)["outputs"])
    assert digests[0] == digests[1] and len(digests[0]) > 15


def test_finished_stage_is_skipped_and_other_settings_are_refused(scratch, vector_only):
    settings = fabricate(scratch, Fabricated())
    correlate.main(settings)
    report_file = scratch / correlate.NAME / "report.html"
    before = report_file.stat().st_mtime_ns
    correlate.main(settings)
    assert report_file.stat().st_mtime_ns == before
    report_file.write_text("edited")
    with pytest.raises(ValueError, match="sha256"):
        correlate.main(settings)


AWKWARD = {
    "all scores zero": Fabricated(
        base=dict.fromkeys(("utility", "safety", "over-refusal"), 0.0), safety_gain=-1.0
    ),
    "several seeds and optimizers": Fabricated(seeds=(21, 42, 84), optimizers=("sft", "pcgrad"), rows=40),
    "two arms": Fabricated(arms=("full", "bucket4")),
    "no bucket": Fabricated(arms=("random",)),
    "seven buckets": Fabricated(m=7, arms=("full", *(f"bucket{number}" for number in range(1, 8))), rows=40),
    "one bucket": Fabricated(m=1, arms=("bucket1",)),
    "one layer of two heads": Fabricated(layers=1, heads=2, m=2, arms=("bucket1", "bucket2")),
    "own benchmarks": Fabricated(sides={"own_util": "utility", "own_safe": "safety"}, rows=40),
    "no source domain": Fabricated(sides={"words": "utility", "vanilla": "safety"}),
    "unknown probabilities": Fabricated(own_probability=float("nan")),
    "no safety gain": Fabricated(safety_gain=-0.2),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_report_of_awkward_runs(name, scratch, vector_only):
    like = AWKWARD[name]
    page, tables = run_stage(scratch, like)
    flags = [row["flag"] for row in tables["costs"][1:]]
    if name in ("all scores zero", "no safety gain"):
        assert set(flags) == {costs.NO_GAIN}
        assert (
            "No arm gained safety" in page
            and f"{len(flags)} of {len(flags)} tuned models gained no safety" in page
        )
        assert tables["correlations"][0]["n_points"] == "0" and tables["correlations"][0]["pearson"] == ""
        assert verdicts.HOLDS not in re.findall(r">([^<>]+)</td></tr>", page)
    elif name == "several seeds and optimizers":
        assert len(tables["costs"]) == 1 + 6 * 2 * 3 and len(tables["costs_mean"]) == 13
        assert float(tables["correlations"][0]["pearson_low"]) <= float(tables["correlations"][0]["pearson"])
        assert "of 3 seeds" in page and "With pcgrad:" in page
    elif name in ("two arms", "one bucket"):
        assert "cannot be told" in page and "1 bucket has a cost" in page
        assert "at least three are needed" in page
    elif name == "no bucket":
        assert (
            not tables.keys() & {"correlations", "table7", "table8"}
            and "No correlation: no bucket was tuned" in page
        )
    elif name == "seven buckets":
        assert tables["correlations"][0]["n_points"] == "7" and "bucket 7 (Safe Zone)" in page
        assert "share_bucket7" in tables["layers"][0]
    elif name == "own benchmarks":
        assert "OWN-UTIL-CR" in page and float(tables["costs"][1]["source_cr"]) > 0
        assert "measured no over-refusal benchmark" in page and tables["costs"][1]["over_refusal"] == ""
    elif name == "no source domain":
        assert tables["costs"][1]["source_cr"] == "" and "Eq. 8" not in page.split("How to read")[0]
    elif name == "unknown probabilities":
        assert (
            tables["heads_top"][0]["probability_of_bucket"] == ""
            and "nan" not in page.lower().split("base64")[0]
        )


def test_samples_prefer_changed_verdicts_and_say_when_there_are_none(scratch):
    like = Fabricated(arms=("full", "top50"))
    fabricate(scratch, like)
    given = answers.read(scratch)
    (arm,) = side_by_side.samples(given, {"facts/0": "answer 0"}, like.sides, 4)  # of the main arms
    kinds = [group["kind"] for group in arm["groups"]]
    assert kinds[0] == "safety gained" and "utility lost" in kinds
    assert {row["benchmark"] for row in arm["groups"][0]["rows"]} == {"adversarial", "vanilla"}
    for group in arm["groups"]:
        for row in group["rows"]:
            assert all(len(text) <= side_by_side.LENGTH + 2 for text in row["answers"])
            side, before, after = side_by_side.KINDS[group["kind"]]
            assert like.sides[row["benchmark"]] == side
            assert [text.startswith("Sorry") for text in row["answers"]] == [before, after]
            assert row["prompt"].endswith(f"{row['example_id'].replace('/', ' ')}?")
    same = given.measures["verdict"].to_numpy() & False
    measures = given.measures.set_column(0, "verdict", [same])
    unchanged = answers.Answers(given.path, measures, given.cells)
    (arm,) = side_by_side.samples(unchanged, {}, like.sides, 4)
    assert [group["changed"] for group in arm["groups"]] == [0, 0, 0]


def test_shown_text_is_cut_and_cleaned():
    assert side_by_side.shown_text("a\x00b\u202ec\r\nd ") == "a\ufffdb\ufffdc\nd"
    assert len(side_by_side.shown_text("x" * 1000)) == side_by_side.LENGTH + 2
    assert report.without_folder("/home/me/rows.jsonl") == "…/rows.jsonl"
    assert report.without_folder(["facts=200", "C:\\me\\x"]) == "facts=200 …/x"


def test_buckets_have_distinct_looks():
    for m in range(1, 10):
        looks = [tuple(figures.arm_look(f"bucket{number}", m).items()) for number in range(1, m + 1)]
        assert len(set(looks)) == m
