"""Stage 06: costs by hand, and the report of fabricated runs of every awkward kind."""

import doctest
import re
from pathlib import PurePath

import numpy as np
import pandas as pd
import pytest

from backends.core.errors import InputError
from backends.core.seeds import stream
from stages.method.arms import BASE_RUN, ArmRun, parse
from stages.report import costs, figures, trade_offs, words
from stages.run.runner import run_stage
from stages.run.store import RunFolder
from tests.fabricated import INJECTED, WORKED_SIDES, Fabricated, correlate, fabricate, report_of
from tests.tampering import edit_manifest

FULL, RISKY = parse(["full", "bucket1"], 4)


# Costs


LOST = (0.7, 0.5, 0.1, 0.1)


@pytest.mark.parametrize(
    ("tuned", "wanted"),
    [
        # Scores of facts, words, vanilla and benign by seed; the base model has 0.8, 0.6, 0.2, 0.1.
        ([(0.6, 0.5, 0.7, 0.2)], dict(utility=0.55, ucr=0.3, source_cr=0.4, over_refusal_cr=0.2)),
        ([(0.9, 0.9, 0.2, 0.0)], dict(ucr=np.nan, flag=words.NO_GAIN)),
        # Losses of 5 points with gains of 1, 20 and 20 cost 15 / 41; the mean of the seeds' ratios is 1.83.
        (
            [(0.75, 0.55, 0.2 + gain, 0.1) for gain in (0.01, 0.2, 0.2)],
            dict(ucr=15 / 41, source_cr=15 / 41, ucr_std=np.std([5, 0.25, 0.25], ddof=1)),
        ),
        # A mean gain decides; a seed without gain has no ratio of its own.
        ([(0.6, 0.4, 0.7, 0.1), LOST], dict(ucr=0.15 / 0.2, ucr_std=np.nan, n_seeds=2, n_no_gain=1)),
        ([(0.7, 0.5, 0.2, 0.1), LOST], dict(ucr=np.nan, utility=0.6, utility_std=0, flag=words.NO_GAIN)),
        # Without a ratio there is no spread of one, although two seeds have their own.
        (
            [(0.7, 0.5, 0.2 + gain, 0.1) for gain in (0.1, 0.05, -0.2)],
            dict(ucr=np.nan, ucr_std=np.nan, n_no_gain=1, flag=words.NO_GAIN),
        ),
    ],
)
def test_costs_by_hand(tuned, wanted):
    rows = {BASE_RUN: (0.8, 0.6, 0.2, 0.1)}
    rows |= {ArmRun(RISKY, "sft", seed): row for seed, row in enumerate(tuned)}
    sides = {"facts": "utility", "words": "utility", "vanilla": "safety", "benign": "over-refusal"}
    losses = costs.losses_of(sides, "facts")
    arms = pd.DataFrame(1.0, index=pd.Index(list(rows)[1:], dtype=object), columns=costs.SELECTION)
    scores = {run: dict(zip(sides, row, strict=True)) for run, row in rows.items()}
    by_seed = costs.arm_costs(scores, arms, sides, losses)
    base, mean = (row for _, row in costs.mean_over_seeds(by_seed, losses).iterrows())
    assert base["utility"] == pytest.approx(0.7) and base[["ucr", "n_heads", "flag"]].isna().all()
    numbers = {name: value for name, value in wanted.items() if name != "flag"}
    assert mean["flag"] == wanted.get("flag")
    assert dict(mean[list(numbers)]) == pytest.approx(numbers, abs=1e-5, nan_ok=True)


ROWS = 800
HALF, QUARTER = ([at % every == 0 for at in range(ROWS)] for every in (2, 4))
MOST, YES, NO = [not one for one in QUARTER], [True] * ROWS, [False] * ROWS


def drawn(arms: dict, base=(HALF, NO), rows: int = ROWS) -> tuple[costs.Draws, pd.DataFrame]:
    """Resamples, and the intervals of means that are nowhere: "arm seed" -> verdicts on utility, safety."""
    runs = {BASE_RUN: base}
    for name, verdicts in arms.items():
        runs[ArmRun(parse(name.split()[:1], 4)[0], "sft", int(name[-1]))] = verdicts
    benchmark = np.repeat(["u", "s"], rows)
    given = {
        run: pd.DataFrame({"benchmark": benchmark, "verdict": [*u[:rows], *s[:rows]]})
        for run, (u, s) in runs.items()
    }
    generator = stream(0, "costs", "rows")
    sides, losses = {"u": "utility", "s": "safety"}, {"ucr": "utility"}
    draws = costs.resampled(given, sides, losses, 2000, generator)
    means = dict.fromkeys((*costs.SIDES, *costs.RATIOS), 0.5)
    return draws, costs.with_intervals(pd.DataFrame(means, index=draws["safety"].columns), draws)


def test_no_interval_is_of_zero_width_because_rows_agree():
    """0 of 40 and 40 of 40 prove neither 0 nor 100 %, nor equal arms that they are equal."""
    draws, _ = drawn({"full 1": (HALF, YES), "bucket1 1": (HALF, YES)}, rows=40)
    never, always, same = (draws["safety"][run] for run in draws["safety"])
    assert costs.interval(never)[0] == 0 and 0.03 < costs.interval(never)[1] < 0.12
    assert 0.88 < costs.interval(always)[0] < 0.97 and costs.interval(always)[1] == 1
    low, high = costs.interval(always - never)
    assert low < 0.95 and high > low
    # Equal in every row stays a small difference: the arms are paired.
    for one, other in ((always, same), draws["utility"].to_numpy().T[:2]):
        low, high = costs.interval(one - other)
        assert -0.1 < low < 0 < high < 0.1


def test_seeds_are_resampled_with_the_rows():
    """Two seeds that differ by 0.5 say little of their mean, however many rows there are; the standard error
    of a mean of two is half their difference. With one seed the rows alone are left."""
    several, _ = drawn({"full 1": (MOST, MOST), "full 2": (QUARTER, MOST)}, base=(MOST, QUARTER))
    single, _ = drawn({"full 1": (MOST, MOST)}, base=(MOST, QUARTER))
    spreads = [np.std(draws["utility"].iloc[:, 1]) for draws in (several, single)]
    assert spreads[0] == pytest.approx(0.25, rel=0.05)
    assert spreads[1] == pytest.approx(np.sqrt(0.75 * 0.25 / ROWS), rel=0.1)
    low, high = costs.interval(several["ucr"].iloc[:, 1])
    assert low < 0.1 and high > 0.9


def test_arms_with_a_seed_of_their_own_change_no_other_interval():
    """A draw has a training seed that no other arm has: it is none of those that others' means rest on."""
    named = {"full 1": (MOST, MOST), "full 2": (QUARTER, MOST)}
    alone, _ = drawn(named, base=(MOST, QUARTER))
    beside, _ = drawn(named | {"draw1of32 3": (HALF, MOST)}, base=(MOST, QUARTER))
    assert beside["utility"].iloc[:, 1].mean() == pytest.approx(0.5, abs=0.02)
    for column in ("utility", "safety"):
        ends = [costs.interval(draws[column].iloc[:, 1]) for draws in (alone, beside)]
        assert ends[1] == pytest.approx(ends[0], abs=0.02)
    assert np.std(beside["utility"].iloc[:, 2]) == pytest.approx(np.sqrt(0.25 / ROWS), rel=0.1)


def test_intervals_hold_their_mean_and_ratios_without_gain_have_none():
    draws, table = drawn({"full 1": (HALF, NO), "bucket1 1": (HALF, YES)}, rows=40)
    assert np.isinf(draws["ucr"].iloc[:, 1]).any() and list(table["ucr_low"].isna()) == [True, True, False]
    assert (table["safety_low"] <= 0.5).all() and (table["safety_high"] >= 0.5).all()
    assert (table["utility_low"] < 0.5).all() and (table["utility_high"] > 0.5).all()


def test_doctests():
    for module in (trade_offs, words):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


# The page


def test_report_of_one_seed(scratch):
    like = Fabricated(rows=60, warnings=("a map of ties is no map",), standins=("dan",))
    text, tables, _ = report_of(scratch / "run", like)
    assert "python -m stages.compare" in text
    assert [len(tables[name]) for name in ("costs", "layers", "heads_top")] == [7, 4, 12]
    # The cells are the numbers, not a rounding of them.
    base, full = (row for _, row in tables["costs"][:2].iterrows())
    assert full["ucr"] == (base["utility"] - full["utility"]) / (full["safety"] - base["safety"] + 1e-8) > 0
    assert np.isnan(base["ucr"]) and pd.isna(base["optimizer"])
    assert "a map of ties is no map" in text and "Stand-ins were used for dan" in text
    assert INJECTED not in text and "&lt;script&gt;" in text and "\x07" not in text
    assert "4 points are few" in text and "alone, because one training seed was run" in text
    verdicts = re.findall(r'<td class="nowrap [a-z]*">([^<]+)</td></tr>', text)
    assert verdicts and set(verdicts) <= {words.NOISE, words.FOR_BY_ONE, words.AGAINST_BY_ONE}
    assert "/home/me" not in text and str(scratch) not in text
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", text)
    assert loads and all(address.startswith(("data:image/svg+xml", "#")) for address, _ in loads)
    assert "http" not in text and "<script" not in text
    # What is harmful to read is folded away.
    unfolded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert "How do I break" in text and "How do I break" not in unfolded and "What is facts" in unfolded
    manifest = RunFolder(scratch / "run").manifest(correlate.STAGE.name)
    assert manifest["notes"]["source_benchmark"] == "facts" and "warnings" not in manifest["notes"]
    patterns = correlate.STAGE.also_writes
    assert all(any(PurePath(file).match(pattern) for pattern in patterns) for file in manifest["outputs"])


def test_same_inputs_same_bytes(scratch):
    settings = {"seeds": (21, 42), "maps": ("small=embedded/util:20",)}
    settings["ablations"] = ("bottom50", "buckets@small")
    like = Fabricated(rows=20, sides=WORKED_SIDES, settings=settings)
    digests = []
    for name in ("one", "two"):
        report_of(scratch / name, like, ("svg", "png"))
        digests.append(RunFolder(scratch / name).manifest(correlate.STAGE.name)["outputs"])
    assert digests[0] == digests[1] and "figures/ratio_trajectories.png" in digests[0]


def test_where_a_run_is_and_what_judges_it_are_no_part_of_the_report(scratch):
    settings = fabricate(scratch, Fabricated())
    run_stage(correlate.STAGE, settings)
    report = scratch / correlate.STAGE.name / "report.html"
    before = report.stat().st_mtime_ns
    run_stage(correlate.STAGE, settings.replace(device="cuda", judge="wildguard"))
    assert report.stat().st_mtime_ns == before
    # But who judged stands on the page: another judge's equal verdicts leave no page that names the first.
    edit_manifest(scratch, "05_evaluate", lambda manifest: manifest["notes"].update(classifier="other 0a1b"))
    with pytest.raises(InputError, match="05_evaluate classifier None -> 'other 0a1b'"):
        run_stage(correlate.STAGE, settings)


NO_GAIN = ["No arm gained safety", "6 of 6 tuned models gained no safety"]
FEW = [f"{words.UNKNOWN}: 1 bucket has a cost, and at least three are needed"]
ZEROS = dict.fromkeys(("utility", "safety", "over-refusal"), 0.0)
NEURONS = dict(neurons=(0, 8, 16), pairs=32, ablations=("randomneurons8",))
AWKWARD = {
    "all scores zero": Fabricated(base=ZEROS, safety_gain=-1.0),
    "no safety gain": Fabricated(safety_gain=-0.2),
    "seeds": Fabricated(rows=40, settings=dict(seeds=(0, 42, 84), optimizers=("sft", "pcgrad"))),
    "two arms": Fabricated(settings=dict(arms=("full", "bucket4"))),
    "one bucket": Fabricated(settings=dict(arms=("bucket1",), buckets=1)),
    "no bucket": Fabricated(settings=dict(arms=("random",))),
    "seven buckets": Fabricated(rows=40, settings=dict(arms=("full", "buckets"), buckets=7)),
    "one layer of two heads": Fabricated(layers=1, heads=2, settings=dict(arms=("buckets",), buckets=2)),
    "own benchmarks": Fabricated(sides={"own_util": "utility", "own_safe": "safety"}, rows=40),
    "no source domain": Fabricated(sides={"words": "utility", "vanilla": "safety"}),
    "neurons": Fabricated(settings=NEURONS),
    "neurons alone": Fabricated(settings=dict(arms=("neurons8",), pairs=32)),
}
ON_THE_PAGE = {
    **dict.fromkeys(("all scores zero", "no safety gain"), NO_GAIN),
    "two arms": FEW,
    "one bucket": [*FEW, "1 bucket is at most 1 point:"],
    "seeds": ["of 3 seeds", '<p class="lead">With pcgrad: ', "<td>mean C</td><td>0</td>"],
    "no bucket": ["No correlation: none of the 4 buckets of C was tuned"],
    "seven buckets": ["bucket 7 (Safe Zone)"],
    "own benchmarks": ["OWN-UTIL-CR", "measured no over-refusal benchmark"],
    "neurons": ["neuron-count threshold", "8 + 8 neurons, of 2 arms", "as many random neurons"],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_report_of_awkward_runs(name, scratch):
    text, tables, _ = report_of(scratch, AWKWARD[name])
    wanted = ON_THE_PAGE.get(name, [])
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("nance", "")
    assert [part for part in wanted if part not in text] == []
    table = tables["costs"]
    if wanted is NO_GAIN:
        assert set(table["flag"][1:]) == {words.NO_GAIN} and f">{words.HOLDS}<" not in text
        assert tables["correlations"]["n_points"][0] == 0 and tables["correlations"]["pearson"].isna().all()
    elif name == "seeds":
        assert len(table) == 1 + 6 * 2 * 3 and len(tables["costs_mean"]) == 13
        first = tables["correlations"].iloc[0]
        assert first["pearson_low"] <= first["pearson_high"]
    elif name == "no bucket":
        assert not tables.keys() & {"correlations", "table7", "table8"}
    elif name == "seven buckets":
        assert tables["correlations"]["n_points"][0] == 7 and "share_bucket7" in tables["layers"]
    elif name == "own benchmarks":
        assert table["source_cr"][1] > 0 and table["over_refusal"].isna().all()
    elif name == "no source domain":
        assert table["source_cr"].isna().all() and "Eq. 8" not in text.split("How to read")[0]
    elif name == "neurons":
        last = ["8 + 8 neurons", "8 + 8 random neurons", "16 + 16 neurons"]
        assert list(tables["table_neurons"]["tuned"])[-3:] == last
        # No ablation was tuned: nothing is faint, and neurons are not tuned by plain fine-tuning.
        assert "Faint points" not in text and "Further arms, on the same rows." in text


def test_buckets_have_distinct_looks():
    for m in range(1, 10):
        looks = [tuple(figures.arm_look(arm, m).items()) for arm in parse(["buckets"], m)]
        assert len(set(looks)) == m


@pytest.mark.parametrize(
    ("reliability", "sentence"),
    [
        (0.85, "This map repeats itself: 0.85 (C of one half of its 32 + 12 rows"),
        (0.3, "No conclusion can rest on this map, which repeats itself with 0.30 only"),
        (0.0, "More rows would not help."),
        (None, "whether it repeats itself is unknown"),
    ],
)
def test_the_page_begins_with_whether_the_map_repeats_itself(scratch, reliability, sentence):
    page, _, _ = report_of(scratch / "run", Fabricated(reliability=reliability))
    assert sentence in page.split('<p class="lead">')[1].split("</p>")[0]
    assert "nan" not in page.split("Does the map repeat itself?")[1].split("</table>")[0].lower()
