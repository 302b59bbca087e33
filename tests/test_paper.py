"""The formulas, run on the numbers that the paper printed, give the numbers that the paper printed.

Where they do not, the deviation is pinned here and described in data/paper/README.md.
"""

import doctest

import numpy as np
import pandas as pd
import pytest

import data.paper
from data.paper import table
from stages.method import metrics

UTILITY = ["mmlu", "csqa", "gsm8k", "math"]
SAFETY = ["adv_harm", "wildguard", "dan"]
MODELS = ("llama", "qwen", "mistral")
TABLES = {number: pd.DataFrame(table(number)) for number in data.paper.TABLES}


def rows_of(number, **where) -> pd.DataFrame:
    frame = TABLES[number]
    return frame[np.logical_and.reduce([frame[name] == value for name, value in where.items()])]


def ratios(rows, utility, clip=True) -> np.ndarray:
    """Eq. 7 (utility="gen") or Eq. 8 ("mmlu") of rows of one model; unclipped: without the max(0, .)."""
    base = data.paper.row(1, model=rows["model"].iloc[0], method="base")
    if clip:
        return metrics.utility_cost_ratio(base[utility], rows[utility], base["safe"], rows["safe"])
    return ((base[utility] - rows[utility]) / (rows["safe"] - base["safe"])).to_numpy()


# The tables as data


def test_docstring_examples_and_unknown_tables():
    assert doctest.testmod(data.paper).failed == 0
    with pytest.raises(ValueError, match="^number: "):
        table(3)


@pytest.mark.parametrize(
    ("number", "count", "keys"),
    [
        (1, 15, ["model", "method"]),
        (2, 12, ["model", "method"]),
        (7, 36, ["model", "score", "bucket"]),
        (8, 9, ["model", "score"]),
        (9, 7, ["model", "selection", "percent"]),
        (10, 8, ["model", "bucket"]),
        (11, 8, ["model", "bucket"]),
    ],
)
def test_rows_are_complete_and_unique(number, count, keys):
    rows = TABLES[number]
    assert len(rows) == count == len(rows[keys].drop_duplicates())
    assert set(rows["model"]) <= set(MODELS) and rows.notna().all(axis=None)


def test_averages_are_the_means_of_their_columns():
    wrong = {}
    for number in (1, 2, 7, 9, 10, 11):
        for average, columns in (("gen", UTILITY), ("safe", SAFETY)):
            difference = TABLES[number][columns].mean(axis=1) - TABLES[number][average]
            wrong |= {(number, at): value for at, value in difference.items() if abs(value) > 0.02}
    (place, value), *others = wrong.items()
    assert not others and value == pytest.approx(0.2, abs=0.005)
    assert TABLES[2].loc[place[1], ["model", "method"]].tolist() == ["mistral", "full"] and place[0] == 2


def test_rows_that_tables_share_are_equal():
    """An arm that is in two tables has the same scores, so rows stand under the right model."""

    def scores(number, **where):
        return [data.paper.row(number, **where)[name] for name in (*UTILITY, *SAFETY, "gen", "safe")]

    for model in MODELS:
        assert scores(2, model=model, method="base") == scores(1, model=model, method="base")
        for method, bucket in (("risky", 1), ("safe", 4)):
            assert scores(1, model=model, method=method) == scores(7, model=model, score="C", bucket=bucket)
    for method, selection, percent in (("full", "full", 100), ("risky", "top", 25), ("safe", "bottom", 25)):
        same = scores(9, selection=selection, percent=percent)
        assert scores(1, model="llama", method=method) == same


# Eq. 7 and 8 on Table 7, Table 8 from Table 7


@pytest.mark.parametrize("score", ["C", "O", "S"])
@pytest.mark.parametrize("model", MODELS)
def test_table_7_cost_ratios(model, score):
    """They follow within rounding, but for one number."""
    rows = rows_of(7, model=model, score=score)
    assert rows["bucket"].tolist() == [1, 2, 3, 4] and rows["mean_score"].is_monotonic_decreasing
    off = [
        np.abs(ratios(rows, name) - rows[printed]) for name, printed in (("gen", "ucr"), ("mmlu", "mmlu_cr"))
    ]
    assert np.max(off) < 0.006
    found = np.argwhere(np.array(off) > 0.0051).tolist()
    assert found == ([[0, 0]] if (model, score) == ("qwen", "O") else []), "(ratio, bucket)"


DEVIATIONS = {
    # Larger than the rounding of Table 7 explains; the paper does not say why.
    ("mistral", "O"): [-0.041, 0.0, -0.034, 0.0],
    # The printed MMLU-CR was not clipped at zero, see below.
    ("mistral", "S"): [0.002, 0.0, 0.038, 0.149],
}


@pytest.mark.parametrize("score", ["C", "O", "S"])
@pytest.mark.parametrize("model", MODELS)
def test_table_8_follows_from_table_7(model, score):
    rows, printed = rows_of(7, model=model, score=score), data.paper.row(8, model=model, score=score)
    computed = []
    for utility in ("gen", "mmlu"):
        result = metrics.correlation(rows["mean_score"], ratios(rows, utility))
        computed += [result.pearson, result.spearman]
    names = ("ucr_pearson", "ucr_spearman", "mmlu_cr_pearson", "mmlu_cr_spearman")
    deviation = np.array(computed) - [printed[name] for name in names]
    known = DEVIATIONS.get((model, score))
    np.testing.assert_allclose(deviation, known or np.zeros(4), rtol=0, atol=0.0006 if known else 0.01)


def test_table_8_mistral_sensitivity_row_was_computed_without_clipping():
    rows, printed = rows_of(7, model="mistral", score="S"), data.paper.row(8, model="mistral", score="S")
    found = metrics.correlation(rows["mean_score"], ratios(rows, "mmlu", clip=False))
    assert found.pearson == pytest.approx(printed["mmlu_cr_pearson"], abs=0.002)
    assert found.spearman == pytest.approx(printed["mmlu_cr_spearman"], abs=0.002)


# Which sensitivity the authors computed


def test_table_7_sensitivities_need_an_exponent_that_is_a_percentile_rank():
    """Any exp(percentile rank) has the printed averages, whatever was ranked; Eq. 5 as printed has not."""
    printed = np.mean([rows_of(7, model=model, score="S")["mean_score"] for model in MODELS], axis=0)
    # The mean of exp(u) over the quarters of u uniform on [0, 1], highest first: 4 (e^(b/4) - e^((b-1)/4))
    quarters = 4 * -np.diff(np.exp([1.0, 0.75, 0.5, 0.25, 0.0]))
    np.testing.assert_allclose(printed, quarters, rtol=0, atol=0.04)
    # As many heads as Llama has, ranks without ties.
    h_gen, h_safe = np.random.default_rng(0).random((2, 32, 32))

    def bucket_means(values):
        return np.array([values[metrics.buckets(values) == bucket].mean() for bucket in (1, 2, 3, 4)])

    reranked = metrics.functional_sensitivity(h_gen, h_safe, "reranked")
    for values in (reranked, np.exp(metrics.percentile_rank(h_gen))):
        np.testing.assert_allclose(bucket_means(values), quarters, rtol=0, atol=0.005)
    assert np.all(printed - bucket_means(metrics.functional_sensitivity(h_gen, h_safe)) > 0.5)


@pytest.mark.parametrize("model", MODELS)
def test_table_7_conflict_scores_need_it_too(model):
    """Mean C = mean O x mean S where the two are nearly independent: 0.82 = 0.48 x 1.70, not 0.48 x 1.09."""
    c, o, s = (rows_of(7, model=model, score=score)["mean_score"].mean() for score in "COS")
    assert c == pytest.approx(o * s, abs=0.01)
    assert c > 1.5 * o * 1.086
