"""What the report says of drawn arms: every map predicts their costs, and a null is said to be one."""

import re

import numpy as np
import pandas as pd
import pytest

from stages.method import prediction
from stages.report import drawn_arms
from stages.report.drawn_arms import EQUAL, MEASURED, Family, MapBy, predictions
from tests.fabricated import Fabricated, report_of

MAPS = ("sums=embedded/sums:16", "small=embedded/util:8")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(prediction, "PERMUTATIONS", 200)
    monkeypatch.setattr(prediction, "RESAMPLES", 100)


def by(name: str) -> MapBy:
    return MapBy(name, "gradient")


def family(draws: str, *maps: str, slope: float = 0.0) -> Family:
    """30 arms that share no heads, whose cost is `slope` times C of the last map, and noise."""
    random = np.random.default_rng(len(draws))
    names, found = ("C", "O", "S", "depth"), {}
    for name in maps:
        found[by(name)] = dict(zip(names, random.random((4, 30)), strict=True))
    lost = slope * found[by(maps[-1])]["C"] + 0.1 * random.normal(size=30)
    return Family(by(draws), found, random.random(30), np.eye(30), [("facts", "graded", lost)])


def test_numbers_of_the_map_along_which_arms_were_drawn_do_not_depend_on_other_maps():
    alone = [family("util", "util"), family("sums", "sums")]
    beside = [
        Family(one.along, one.predictors | other.predictors, one.gained, one.overlap, one.lost)
        for one, other in (alone, alone[::-1])
    ]
    few, many = (predictions(drawn, np.random.default_rng(1)) for drawn in (alone, beside))
    own = many["draws"] == many["map"]
    pd.testing.assert_frame_equal(many[own].reset_index(drop=True), few, check_exact=True)
    others = many[~own]
    assert set(zip(others["draws"], others["map"], strict=True)) == {("util", "sums"), ("sums", "util")}
    assert set(others["predictor"]) == {"C", "O", "S"} and set(others["at"]) == {MEASURED, EQUAL}


def test_the_map_that_costs_follow_is_the_one_that_predicts_them():
    found = predictions([family("util", "util", "sums", slope=1.0)], np.random.default_rng(1))
    own = found[(found["predictor"] == "C") & (found["at"] == MEASURED)].set_index("map")
    assert own["p_heads"]["sums"] < 0.001 and own["r"]["sums"] > 0.8 and own["p_heads"]["util"] > 0.05


def words_of(figure) -> list[str]:
    return [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]


def test_the_figure_says_a_relation_a_null_and_what_cannot_be_told():
    found = [family("util", "util", slope=slope) for slope in (2.0, 0.0)]
    lost = [(name, "graded", one.lost[0][2]) for name, one in zip(("facts", "words"), found, strict=True)]
    lost += [("flat", "graded", np.ones(30)), ("facts", "counted", np.ones(30))]
    drawn = [Family(by("util"), found[0].predictors, found[0].gained, found[0].overlap, lost)]
    predicted = predictions(drawn, np.random.default_rng(1))
    figure = drawn_arms.figure(drawn, predicted)
    relation, null, flat = words_of(figure)
    assert relation.startswith("facts\n$r$ = +0.9") and relation.endswith(":\na relation")
    assert null.startswith("words\n") and null.endswith("no relation that can be told from chance")
    assert flat == "flat\ncannot be told"
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 0]
    # The line is the correlation's: through the means, with its slope, in the cloud of residuals.
    row = predicted[(predicted["predictor"] == "C") & (predicted["at"] == EQUAL)].iloc[0]
    x, y = figure.axes[0].lines[0].get_data()
    points = figure.axes[0].collections[0].get_offsets()
    assert np.diff(y) / np.diff(x) == pytest.approx(row["slope"])
    assert np.corrcoef(points.T)[0, 1] == pytest.approx(row["r"])
    np.testing.assert_allclose(
        points.mean(axis=0), (drawn[0].predictors[by("util")]["C"].mean(), lost[0][2].mean())
    )
    assert drawn_arms.figure([], predicted[:0]) is None


def test_report_of_drawn_arms_and_two_more_maps(scratch):
    settings = {"maps": MAPS, "ablations": ("draws8", "draws8@sums")}
    sides = {"facts": "utility", "problems": "utility", "vanilla": "safety"}
    like = Fabricated(sides=sides, rows=12, settings=settings, kinds=("counted", "gradient"))
    page, tables, figures = report_of(scratch, like)
    every = tables["drawn_arms"]
    table = every[every["sensitivity"] == "counted"]
    assert "drawn_arms" in figures and "What each drawn arm lost" in page
    assert set(table["draws"]) == {"util", "sums"} and set(table["map"]) == {"util", "sums", "small"}
    # Means over an arm's heads are those of the map that predicts.
    heads = pd.read_parquet(scratch / "03_sensitivity" / "heads-small.parquet").set_index(["layer", "head"])
    arms = pd.read_parquet(scratch / "04_align" / "arms.parquet")
    arms = arms[(arms["kind"] == "draw") & (arms["map"] == "util")]
    means = [
        heads["conflict_score"].loc[[*zip(row["layers"], row["heads"], strict=True)]].mean()
        for row in arms.to_dict("records")
    ]
    costs = pd.read_parquet(scratch / "05_evaluate" / "responses.parquet")
    lost = -costs[costs["benchmark"] == "problems"].groupby("arm")["graded"].mean()[arms["arm"]]
    same = (table["draws"] == "util") & (table["map"] == "small") & (table["benchmark"] == "problems")
    same &= (table["predictor"] == "C") & (table["outcome"] == "graded") & (table["at"] == MEASURED)
    assert table[same]["r"].item() == pytest.approx(np.corrcoef(means, lost)[0, 1])
    # By gradient S is another, and so C; O is the same and is not asked again.
    own = every[
        (every["benchmark"] == "problems") & (every["predictor"] == "C") & (every["outcome"] == "graded")
    ]
    one = own.set_index(["draws", "map", "at", "sensitivity"])["r"].unstack()
    assert one.notna().all(axis=None) and (one["counted"] != one["gradient"]).all()
    assert set(every[every["sensitivity"] == "gradient"]["predictor"]) == {"C", "S"}
    # A sentence and a line a family and map, with each map's own domain first.
    lead = re.sub(r"<[^>]+>", "", page.split("<nav>")[0])
    assert "C of this map (128 rows of embedded/util) at equal safety: r = facts, its own domain, " in lead
    along = ", over arms drawn along map sums: r = problems, its own domain, "
    assert f"C of map sums (16 rows of embedded/sums) at equal safety{along}" in lead
    assert "C of map small (8 rows of embedded/util) at equal safety: r = facts, its own domain, " in lead
    second = page.split("Does another C predict")[1].split("</table>")[0]
    assert second.count("<tr>") == 1 + 2 * 3 * 2 and second.count("] own domain") == 12
    assert second.count("<td>counted</td>") == second.count("<td>gradient</td>") == 6
    assert "gradient" not in lead
    first = page.split('<h2 id="drawn">')[1].split("</table>")[0]
    assert first.count("<tr>") == 1 + (table["draws"] == table["map"]).sum()


def test_a_run_with_one_map_has_no_second_table(scratch):
    page, tables, figures = report_of(scratch, Fabricated(settings={"ablations": ("draws8",)}))
    assert "drawn_arms" in figures and "Does another C predict" not in page
    assert set(tables["drawn_arms"]["map"]) == {"util"}
    assert "C of this map (128 rows of embedded/util) at equal safety: r = facts, its own domain, " in page
