"""Correlations by family of buckets, and with every seed as a point, against computations by hand."""

import numpy as np
import pytest

from stages.reporting import correlations, costs, families
from stages.reporting.correlations import BUCKETS, POOLED


def row(arm: str, seed: int, predicted: float, ucr: float, flag: str = "", optimizer: str = "sft") -> dict:
    values = {"predicted": predicted, "mean_conflict": 1 - predicted, "mean_sensitivity": 2.0, "ucr": ucr}
    labels = {"arm": arm, "optimizer": optimizer, "seed": seed, "flag": flag}
    return labels | values | {"source_cr": None, "over_refusal_cr": None}


def family(suffix: str, costs_by_seed: np.ndarray, x: np.ndarray, **labels) -> list[dict]:
    """Rows of a family, `costs_by_seed` [seeds, buckets]."""
    return [
        row(f"bucket{number + 1}{suffix}", seed, float(x[number]), float(one[number]), **labels)
        for seed, one in enumerate(costs_by_seed)
        for number in range(len(x))
    ]


X = np.array([1.2, 0.9, 0.7, 0.5])
COSTS = np.array([[0.9, 0.7, 0.8, 0.2], [1.0, 0.5, 0.6, 0.3], [0.7, 0.8, 0.4, 0.1]])


def test_each_family_is_correlated_with_what_ranked_it():
    random = np.random.default_rng(0)
    rows = [row("base", -1, 0.0, 0.0) | {"optimizer": "none"}, row("full", 0, 1.0, 0.5)]
    rows += family("", COSTS[:1], X) + family("", COSTS[1:2], X, optimizer="pcgrad")
    wanted = {("sft", "C"): (X, COSTS[0]), ("pcgrad", "C"): (X, COSTS[1])}
    for suffix, name in (("_O", "O"), ("_S", "S"), ("@m", "C by m"), ("of8", "C of 8"), ("of16", "C of 16")):
        count = int(suffix.removeprefix("of")) if suffix.startswith("of") else 4
        x, y = random.uniform(0, 1, (2, count))
        rows += family(suffix, y[None], x)
        wanted["sft", name] = (x, y)
    found = correlations.correlations(rows, 4, resamples=20, seed=0)
    assert {(one["optimizer"], one["family"]) for one in found} == wanted.keys()
    assert len(found) == len(wanted)  # one seed: no points of seeds; buckets of O and S there: no stand-ins
    for one in found:
        x, y = wanted[one["optimizer"], one["family"]]
        assert one["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert (one["n_points"], one["measure"]) == (len(x), one["family"][0])
        assert one["critical_r"] == correlations.critical_r(len(x)) and one["pearson_low"] is None
    assert found[0]["family"] == "C"
    assert correlations.one_of(found, "pcgrad", "ucr")["pearson"] == found[-1]["pearson"]
    assert correlations.one_of(found, "pcgrad", "ucr", "C of 8") is None


def test_without_buckets_of_o_and_s_those_of_c_stand_in():
    found = correlations.correlations(family("", COSTS[:1], X), 4, resamples=20, seed=0)
    assert [(one["family"], one["measure"]) for one in found] == [("C", "C"), ("C", "O"), ("C", "S")]
    assert found[1]["pearson"] == pytest.approx(-found[0]["pearson"]) and found[2]["pearson"] is None


def test_pooled_by_hand():
    rows = family("", COSTS, X)
    over, pooled = [
        one for one in correlations.correlations(rows, 4, resamples=300, seed=0) if one["measure"] == "C"
    ]
    assert (over["points"], over["n_points"], over["n_seeds"]) == (BUCKETS, 4, 3)
    assert over["pearson"] == pytest.approx(np.corrcoef(X, COSTS.mean(axis=0))[0, 1])
    assert (pooled["points"], pooled["n_points"], pooled["n_no_gain"]) == (POOLED, 12, 0)
    assert pooled["pearson"] == pytest.approx(np.corrcoef(np.tile(X, 3), COSTS.ravel())[0, 1])
    # More points, no more buckets: what chance gives is not smaller, and the interval is wider.
    assert pooled["critical_r"] == over["critical_r"] == correlations.critical_r(4)
    assert pooled["pearson_low"] < pooled["pearson"] < pooled["pearson_high"]
    assert pooled["pearson_high"] - pooled["pearson_low"] > over["pearson_high"] - over["pearson_low"]


def test_pooled_interval_draws_whole_buckets_and_seeds():
    """The same draws by a plain loop."""
    buckets = [[row(f"bucket{b + 1}", seed, X[b], COSTS[seed, b]) for seed in range(3)] for b in range(4)]
    found = correlations.pooled(buckets, "predicted", "ucr", resamples=50, seed=5)
    generator, drawn = np.random.default_rng([5, 7]), []
    for _ in range(50):
        own, of = generator.integers(4, size=4), generator.integers(3, size=3)
        if len(set(own.tolist())) >= 3:
            points = [(X[b], COSTS[seed, b]) for b in own for seed in of]
            drawn.append(np.corrcoef(np.array(points).T)[0, 1])
    assert (found["pearson_low"], found["pearson_high"]) == pytest.approx(np.percentile(drawn, [2.5, 97.5]))


def test_pooled_leaves_out_seeds_without_gain_one_by_one():
    rows = family("", COSTS, X)
    rows[0]["flag"] = costs.NO_GAIN
    over, pooled, *_ = correlations.correlations(rows, 4, resamples=20, seed=0)
    assert (over["n_points"], over["n_no_gain"]) == (3, 1)
    assert (pooled["n_points"], pooled["n_no_gain"]) == (11, 1)
    expected = np.corrcoef(np.tile(X, 3)[1:], COSTS.ravel()[1:])[0, 1]
    assert pooled["pearson"] == pytest.approx(expected)
    for one in rows:
        one["flag"] = costs.NO_GAIN if one["arm"] in ("bucket1", "bucket2") else ""
    over, pooled, *_ = correlations.correlations(rows, 4, resamples=20, seed=0)
    assert over["pearson"] is None is pooled["pearson"] and pooled["n_points"] == 6


def test_equal_costs_have_no_correlation():
    over, pooled, *_ = correlations.correlations(family("", 0 * COSTS, X), 4, resamples=20, seed=0)
    assert over["pearson"] is None is pooled["pearson"] and pooled["pearson_low"] is None


def test_families_of_another_m():
    rows = family("", COSTS[:1, :2], X[:2]) + family("of4", COSTS[:1], X)
    found = correlations.correlations(rows, 2, resamples=20, seed=0)
    assert [one["family"] for one in found] == ["C", "C", "C", "C of 4"]
    assert families.own(2) == families.family("bucket2", 2)
