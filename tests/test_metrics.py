"""The paper's formulas: pinned values, invariances on random input, and errors that name the argument."""

import doctest
import inspect
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from stages.method import metrics
from tests.test_gradients import direct_conflict

TRIALS = range(20)


def test_docstring_examples():
    result = doctest.testmod(metrics)
    assert result.attempted > 8 and result.failed == 0


def test_public_functions_document_their_errors():
    for name, function in inspect.getmembers(metrics, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == metrics.__name__:
            assert "Raises ValueError" in function.__doc__, name


# Eq. 2


def test_conflict_pinned():
    # cos = 1, -1, 0, 0.6
    conflict = metrics.optimization_conflict(
        [[6.0, -6.0], [0.0, 3.0]], [[2.0, 2.0], [2.0, 5.0]], [[3.0, 3.0], [3.0, 1.0]]
    )
    np.testing.assert_allclose(conflict, [[0.0, 1.0], [0.5, 0.2]], rtol=0, atol=1e-15)
    assert conflict.dtype == np.float64


def test_conflict_of_a_zero_gradient_is_one_half():
    conflict = metrics.optimization_conflict([[0.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]], [[3.0, 0.0, 0.0]])
    assert conflict.tolist() == [[0.5, 0.5, 0.5]]


def test_conflict_clips_rounding_and_rejects_more():
    above = 1 + 1e-9
    assert metrics.optimization_conflict([[above, -above]], [[1.0, 1.0]], [[1.0, 1.0]]).tolist() == [
        [0.0, 1.0]
    ]
    with pytest.raises(ValueError, match=r"^dot: .*index \(0, 1\)"):
        metrics.optimization_conflict([[0.0, 1.01]], [[1.0, 1.0]], [[1.0, 1.0]])


@pytest.mark.parametrize("seed", TRIALS)
def test_conflict_invariances(seed):
    rng = np.random.default_rng(seed)
    safe, util = rng.normal(size=(2, 3, 4, 8))  # (L, H, size) each

    def conflict(a, b):
        return metrics.optimization_conflict(
            (a * b).sum(-1), np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        )

    expected = conflict(safe, util)
    assert expected[1, 2] == pytest.approx(direct_conflict(safe[1, 2], util[1, 2]), abs=1e-14)
    assert np.all((expected >= 0) & (expected <= 1))
    # any positive scale of either gradient, even where the product of the norms would underflow
    np.testing.assert_allclose(conflict(safe * 1e-120, util * 1e-140), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(conflict(safe * 1e5, util), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(conflict(util, safe), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(conflict(-safe, util), 1 - expected, rtol=0, atol=1e-14)
    order = rng.permutation(4)
    np.testing.assert_array_equal(conflict(safe[:, order], util[:, order]), expected[:, order])


# Percentile rank, Eq. 5, Eq. 6


def test_percentile_rank_pinned():
    np.testing.assert_array_equal(metrics.percentile_rank([10.0, 30.0, 20.0]), [0.0, 1.0, 0.5])
    # ranks 1.5, 1.5, 3, 4, 5
    np.testing.assert_array_equal(
        metrics.percentile_rank([7.0, 7.0, 8.0, 9.0, 10.0]), [0.125, 0.125, 0.5, 0.75, 1]
    )
    np.testing.assert_array_equal(metrics.percentile_rank(np.full((2, 3), 4.2)), np.full((2, 3), 0.5))
    np.testing.assert_array_equal(metrics.percentile_rank([[3.0]]), [[0.5]])


@pytest.mark.parametrize("seed", TRIALS)
def test_percentile_rank_invariances(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 8, size=(4, 5)).astype(float)  # many ties
    rank = metrics.percentile_rank(x)
    assert rank.mean() == pytest.approx(0.5)
    np.testing.assert_array_equal(
        metrics.percentile_rank(np.exp(x)), rank
    )  # monotone transforms change nothing
    np.testing.assert_allclose(metrics.percentile_rank(-x), 1 - rank, rtol=0, atol=1e-15)
    order = rng.permutation(x.size)
    np.testing.assert_array_equal(metrics.percentile_rank(x.ravel()[order]), rank.ravel()[order])
    np.testing.assert_array_equal(metrics.percentile_rank(x.T), rank.T)


def test_sensitivity_pinned():
    h_gen = [[0.0, 0.3], [0.1, 0.2]]  # percentile ranks 0, 1, 1/3, 2/3
    h_safe = [[0.9, 0.0], [0.5, 0.5]]  # percentile ranks 1, 0, 1/2, 1/2
    difference = np.array([[-1.0, 1.0], [1 / 3 - 1 / 2, 2 / 3 - 1 / 2]])
    expected = np.exp(difference)
    np.testing.assert_allclose(metrics.functional_sensitivity(h_gen, h_safe), expected, rtol=1e-15)
    reranked = metrics.functional_sensitivity(h_gen, h_safe, variant="reranked")
    np.testing.assert_allclose(reranked, np.exp([[0.0, 1.0], [1 / 3, 2 / 3]]), rtol=1e-15)


def test_reranked_sensitivity_keeps_ties():
    # All heads' ranks but one's differ by 1 (2-1, 3-2, …); as percentiles, by 1/100 and unequal rounding.
    n = 101
    h_gen = np.arange(1.0, n + 1) / (2 * n)
    h_safe = np.roll(h_gen, 1)
    reranked = metrics.functional_sensitivity(h_gen[None], h_safe[None], "reranked")
    assert len(np.unique(reranked)) == 2


def test_sensitivity_of_one_head():
    assert metrics.functional_sensitivity([[0.3]], [[0.1]]).tolist() == [[1.0]]


@pytest.mark.parametrize("variant", metrics.SENSITIVITY_VARIANTS)
@pytest.mark.parametrize("seed", TRIALS)
def test_sensitivity_invariances(seed, variant):
    rng = np.random.default_rng(seed)
    h_gen = rng.integers(0, 20, size=(4, 6)) / 100
    h_safe = rng.integers(0, 20, size=(4, 6)) / 100
    sensitivity = metrics.functional_sensitivity(h_gen, h_safe, variant)
    low = 1.0 if variant == "reranked" else np.exp(-1)
    assert np.all((sensitivity >= low) & (sensitivity <= np.e))
    # only ranks matter
    np.testing.assert_array_equal(metrics.functional_sensitivity(h_gen**2, h_safe / 3, variant), sensitivity)
    order = rng.permutation(24)
    shuffled = metrics.functional_sensitivity(
        h_gen.ravel()[order].reshape(4, 6), h_safe.ravel()[order].reshape(4, 6), variant
    )
    np.testing.assert_array_equal(shuffled.ravel(), sensitivity.ravel()[order])
    if variant == "rank-difference":
        swapped = metrics.functional_sensitivity(h_safe, h_gen, variant)
        np.testing.assert_allclose(swapped, 1 / sensitivity, rtol=1e-14)


def test_variants_order_the_heads_alike():
    rng = np.random.default_rng(0)
    h_gen, h_safe = rng.random((2, 6, 6))
    plain = metrics.functional_sensitivity(h_gen, h_safe)
    reranked = metrics.functional_sensitivity(h_gen, h_safe, "reranked")
    np.testing.assert_array_equal(
        metrics.percentile_rank(plain.round(12)), metrics.percentile_rank(reranked.round(12))
    )


def test_conflict_score_pinned():
    score = metrics.conflict_score([[0.5, 0.2], [0.0, 1.0]], [[2.0, 1.5], [2.7, 0.4]])
    np.testing.assert_allclose(score, [[1.0, 0.3], [0.0, 0.4]], rtol=1e-15)


# Buckets


def test_buckets_pinned():
    score = [[8.0, 1.0, 7.0, 2.0], [6.0, 3.0, 5.0, 4.0]]
    assert metrics.buckets(score).tolist() == [[1, 4, 1, 4], [2, 3, 2, 3]]
    assert metrics.buckets(score, m=1).tolist() == [[1] * 4] * 2
    assert metrics.buckets(score, m=8).tolist() == [[1, 8, 2, 7], [3, 6, 4, 5]]


def test_bucket_ties_go_by_layer_then_head():
    assert metrics.buckets(np.zeros((2, 4)), m=4).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert metrics.buckets([[0.0, 1.0], [1.0, 0.0]], m=4).tolist() == [[3, 1], [2, 4]]
    assert metrics.buckets([[-0.0, 0.0]], m=2).tolist() == [[1, 2]]
    score = np.arange(1024).reshape(32, 32) % 2  # large enough that an unstable sort would mix ties
    expected = np.where(score.ravel() == 1, 1, 5) + np.arange(1024) // 256
    assert metrics.buckets(score, m=8).ravel().tolist() == expected.tolist()


@pytest.mark.parametrize("seed", TRIALS)
def test_bucket_sizes_and_order(seed):
    rng = np.random.default_rng(seed)
    layers, heads = rng.integers(1, 9, size=2)
    score = rng.random((layers, heads))
    for m in range(1, score.size + 1):
        bucket = metrics.buckets(score, m)
        sizes = np.bincount(bucket.ravel(), minlength=m + 1)[1:]
        assert sizes.sum() == score.size
        assert sizes.max() - sizes.min() <= 1
        assert np.all(np.diff(sizes) <= 0)  # the first buckets hold the extra heads
        for b in range(1, m):
            assert score[bucket == b].min() > score[bucket == b + 1].max()
        np.testing.assert_array_equal(metrics.buckets(3 * score - 7, m), bucket)
        order = rng.permutation(score.size)
        shuffled = score.ravel()[order].reshape(score.shape)
        np.testing.assert_array_equal(metrics.buckets(shuffled, m).ravel(), bucket.ravel()[order])


# Eq. 7, 8


def test_cost_ratio_pinned():
    assert metrics.utility_cost_ratio(70.0, 60.0, 50.0, 90.0) == pytest.approx(0.25, abs=1e-9)
    assert metrics.utility_cost_ratio(60.0, 70.0, 50.0, 90.0) == 0.0  # utility rose
    assert metrics.utility_cost_ratio(70.0, 60.0, 90.0, 50.0) == 0.0  # safety fell
    assert metrics.utility_cost_ratio(60.0, 70.0, 90.0, 50.0) == pytest.approx(
        0.25, abs=1e-9
    )  # both signs flip
    assert metrics.utility_cost_ratio(0.7, 0.6, 0.5, 0.5) == pytest.approx(0.1 / 1e-8)
    assert metrics.utility_cost_ratio(0.7, 0.6, 0.5, 0.5, eps=0.1) == pytest.approx(1.0)


def test_cost_ratio_broadcasts():
    ratio = metrics.utility_cost_ratio(70.0, [60.0, 65.0, 75.0], 50.0, [[90.0], [70.0]])
    np.testing.assert_allclose(ratio, [[0.25, 0.125, 0.0], [0.5, 0.25, 0.0]], atol=1e-8)


# Correlation


@pytest.mark.parametrize("seed", TRIALS)
def test_correlation_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, size=9).astype(float)
    y = x + rng.integers(-3, 4, size=9)
    result = metrics.correlation(x, y)
    assert result.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert result.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert result.pearson_interval is None
    assert result.spearman_interval is None
    scaled = metrics.correlation(1e200 * x, 5 - y)
    assert scaled.pearson == pytest.approx(-result.pearson, abs=1e-12)
    assert scaled.spearman == pytest.approx(-result.spearman, abs=1e-12)


def test_correlation_bounds_are_exact():
    result = metrics.correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 100.0])
    assert result.spearman == 1.0
    assert metrics.correlation([1.0, 2.0, 3.0], [0.3, 0.2, 0.1]).pearson == pytest.approx(-1.0, abs=1e-15)


def test_correlation_interval_over_seeds():
    rng = np.random.default_rng(5)
    x = np.array([1.27, 0.88, 0.67, 0.47])
    y = 0.4 * x + rng.normal(scale=0.05, size=(5, 4))
    result = metrics.correlation(x, y, seed=3)
    mean = metrics.correlation(x, y.mean(axis=0))
    assert result.pearson == pytest.approx(mean.pearson, abs=1e-12)
    assert result.spearman == mean.spearman
    low, high = result.pearson_interval
    assert -1 <= low < result.pearson < high <= 1
    assert result.spearman_interval[0] <= result.spearman <= result.spearman_interval[1]
    assert asdict(metrics.correlation(x, y, seed=3)) == asdict(result)  # the seed decides
    assert metrics.correlation(x, y, seed=4).pearson_interval != result.pearson_interval
    assert metrics.correlation(x, y[:1]).pearson_interval is None


def test_correlation_resamples_x_and_y_together():
    y = np.random.default_rng(0).random((4, 6))
    result = metrics.correlation(2 * y, y)  # each resample is a perfect line only if the same seeds are drawn
    assert result.pearson_interval == pytest.approx((1.0, 1.0), abs=1e-12)


def test_correlation_ranks_small_costs_beside_a_huge_one():
    """A row without safety gain has a ratio near 1e9; the others must not become ties for that."""
    result = metrics.correlation([1.0, 2.0, 3.0, 4.0], [0.1101, 0.1102, 0.1103, 1e9])
    assert result.spearman == 1.0


@pytest.mark.filterwarnings("error")
def test_correlation_of_a_constant_is_nan_without_warnings():
    for x, y in (([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])):
        result = metrics.correlation(x, y)
        assert np.isnan(result.pearson)
        assert np.isnan(result.spearman)
        assert result.pearson_interval is None
    # equal means but for the order of summation: still constant
    y = np.array([[0.1, 0.3], [0.2, 0.1], [0.3, 0.2]])
    assert np.isnan(metrics.correlation([1.0, 2.0], y).pearson)
    # some resamples constant, others not
    assert metrics.correlation([1.0, 2.0], [[0.1, 0.2], [0.1, 0.1]]).pearson_interval == (1.0, 1.0)


# Eq. 3, 4 and the rest


def test_mean_change_pinned():
    effects = [[[0, 0, 0, 0], [-1, -1, 0, 0]], [[0, 0, 0, 1], [-1, -1, -1, 0]]]
    assert metrics.mean_change(effects).tolist() == [[0.0, 0.5], [0.25, 0.75]]


def test_mean_change_keeps_ties_exact():
    # One of ten lost or gained is the same change, though |0.2 - 0.3| and |0.4 - 0.3| differ.
    lost, gained = -(np.arange(10) == 2).astype(int), (np.arange(10) == 3).astype(int)
    change = metrics.mean_change([[lost, gained]])
    assert change[0, 0] == change[0, 1] == 0.1
    assert abs(0.2 - 0.3) != abs(0.4 - 0.3)


def test_unit_range_keeps_ranks_and_what_is_small():
    assert metrics.unit_range(np.array([0.0, 2.0, 5.0])).tolist() == [0.0, 0.4, 1.0]
    assert metrics.unit_range(np.array([0.0, 0.3])).tolist() == [0.0, 0.3]


def test_wilson_interval_pinned():
    # 8 of 10, z = 1.959964: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert metrics.wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    low, high = metrics.wilson_interval(0, 20)
    assert low == 0.0
    assert high == pytest.approx(0.161125, abs=1e-6)
    assert metrics.wilson_interval(np.int64(20), np.int64(20))[1] == 1.0
    narrow = metrics.wilson_interval(8, 10, confidence=0.5)
    assert 0.490162 < narrow[0] < 0.8 < narrow[1] < 0.943318


def test_map_statistics_pinned():
    result = metrics.map_statistics([[0.0, 0.0, 0.1], [0.1, 0.1, 0.3]], np.zeros((2, 3)))
    assert asdict(result) == {"distinct_gen": 3, "distinct_safe": 1, "tied_gen": 5 / 6, "tied_safe": 1.0}


# Errors name the argument

ONE = np.ones((2, 3))
NAN = np.array([[1.0, np.nan, 0.5], [0.1, 0.2, 0.3]])
INF = np.array([[1.0, np.inf, 0.5], [0.1, 0.2, 0.3]])

ERRORS = [
    ("optimization_conflict", (NAN, ONE, ONE), "dot"),
    ("optimization_conflict", (ONE, INF, ONE), "norm_safe"),
    ("optimization_conflict", (ONE, ONE, ONE[:1]), "norm_util"),
    ("optimization_conflict", (ONE, ONE.T, ONE), "norm_safe"),
    ("optimization_conflict", (ONE, ONE, -ONE), "norm_util"),
    ("optimization_conflict", (-1.1 * ONE, ONE, ONE), "dot"),
    ("optimization_conflict", (ONE, 0 * ONE, ONE), "dot"),
    ("optimization_conflict", (ONE[:0], ONE[:0], ONE[:0]), "dot"),
    ("optimization_conflict", ("words", ONE, ONE), "dot"),
    ("percentile_rank", (NAN,), "x"),
    ("percentile_rank", ([],), "x"),
    ("percentile_rank", ([[1.0], [1.0, 2.0]],), "x"),
    ("functional_sensitivity", (NAN, ONE), "h_gen"),
    ("functional_sensitivity", (ONE, NAN), "h_safe"),
    ("functional_sensitivity", (ONE, ONE.T), "h_safe"),
    ("functional_sensitivity", (ONE[0], ONE[0]), "h_gen"),
    ("functional_sensitivity", (1.01 * ONE, ONE), "h_gen"),
    ("functional_sensitivity", (ONE, -0.01 * ONE), "h_safe"),
    ("functional_sensitivity", (ONE, ONE, "squared"), "variant"),
    ("conflict_score", (NAN, ONE), "conflict"),
    ("conflict_score", (1.1 * ONE, ONE), "conflict"),
    ("conflict_score", (ONE, INF), "sensitivity"),
    ("conflict_score", (ONE, 0 * ONE), "sensitivity"),
    ("conflict_score", (ONE, ONE[0]), "sensitivity"),
    ("buckets", (NAN,), "score"),
    ("buckets", (ONE[0],), "score"),
    ("buckets", (ONE, 0), "m"),
    ("buckets", (ONE, 7), "m"),
    ("buckets", (ONE, 2.0), "m"),
    ("buckets", (ONE, True), "m"),
    ("utility_cost_ratio", (np.nan, 1.0, 1.0, 1.0), "utility_base"),
    ("utility_cost_ratio", (1.0, -1.0, 1.0, 1.0), "utility_aligned"),
    ("utility_cost_ratio", (1.0, 1.0, 100.5, 1.0), "safety_base"),
    ("utility_cost_ratio", (1.0, 1.0, 1.0, np.inf), "safety_aligned"),
    ("utility_cost_ratio", (1.0, 1.0, 1.0, 1.0, 0.0), "eps"),
    ("utility_cost_ratio", (1.0, 1.0, 1.0, 0.5, 0.5), "safety_aligned"),
    ("utility_cost_ratio", ([1.0, 1.0], 1.0, [1.0, 1.0, 1.0], 1.0), "utility_base"),
    ("correlation", ([1.0, np.nan], [1.0, 2.0]), "x"),
    ("correlation", ([1.0, 2.0], [1.0, np.inf]), "y"),
    ("correlation", ([1.0], [1.0]), "x"),
    ("correlation", ([1.0, 2.0], [1.0, 2.0, 3.0]), "y"),
    ("correlation", (np.ones((2, 3)), np.ones((3, 3))), "y"),
    ("correlation", (np.ones((1, 2, 3)), np.ones(3)), "x"),
    ("mean_change", (ONE,), "effects"),
    ("mean_change", (NAN[None],), "effects"),
    ("mean_change", (np.ones((1, 1, 0)),), "effects"),
    ("unit_range", (NAN,), "change"),
    ("wilson_interval", (0, 0), "n"),
    ("wilson_interval", (6, 5), "successes"),
    ("wilson_interval", (-1, 5), "successes"),
    ("wilson_interval", (2.5, 5), "successes"),
    ("wilson_interval", (2, 5, 1.0), "confidence"),
    ("map_statistics", (NAN, ONE), "h_gen"),
    ("map_statistics", (ONE, ONE[:1]), "h_safe"),
]


@pytest.mark.parametrize(("function", "arguments", "name"), ERRORS)
def test_errors_begin_with_the_argument(function, arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        getattr(metrics, function)(*arguments)


def test_every_public_function_has_an_error_case():
    public = {
        name
        for name, function in inspect.getmembers(metrics, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == metrics.__name__
    }
    assert public == {function for function, _, _ in ERRORS}
