"""Correlations by family of buckets, each seed's beside the mean's, against computations by hand."""

import doctest

import numpy as np
import pandas as pd
import pytest

from stages.method.arms import ArmRun, parse
from stages.report import correlations

X = np.array([1.2, 0.9, 0.7, 0.5])
COSTS = np.array([[0.9, 0.7, 0.8, 0.2], [1.0, 0.5, 0.6, 0.3], [0.7, 0.8, 0.4, 0.1]])


def family(names: str, costs: np.ndarray, x: np.ndarray, optimizer: str = "sft", m: int = 4) -> pd.DataFrame:
    """Costs of every seed, `costs` [seeds, buckets]; every seed of a bucket gains the same safety."""
    rows = {}
    for seed, own in enumerate(costs):
        for arm, cost, ranked_mean in zip(parse([names], m), own, x, strict=True):
            row = {"arm": arm.name, "optimizer": optimizer, "ranked_mean": ranked_mean, "ucr": cost}
            row |= {"mean_optimization_conflict": 1 - ranked_mean, "mean_functional_sensitivity": 2.0}
            rows[ArmRun(arm, optimizer, seed)] = row | {"safety_gain": 0.5}
    return pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), dtype=object))


def found_in(costs: pd.DataFrame, m: int = 4, spread: float = 0.0, resamples: int = 50) -> pd.DataFrame:
    """Correlations of costs, whose resamples are the means with noise."""
    runs = pd.Series([ArmRun(run.arm, run.optimizer, None) for run in costs.index], index=costs.index)
    means = (
        costs[["ranked_mean", "ucr", "safety_gain", "mean_optimization_conflict"]]
        .groupby(runs, sort=False)
        .mean()
    )
    means["mean_functional_sensitivity"] = 2.0
    noise = np.random.default_rng(0).normal(0, spread, (resamples, len(means)))
    draws = {"ucr": pd.DataFrame(means["ucr"].to_numpy() + noise, columns=means.index)}
    return correlations.correlations(costs, means, draws, m)


def test_each_family_is_correlated_with_what_ranked_it():
    random = np.random.default_rng(0)
    tables = [family("buckets", COSTS[:1], X), family("buckets", COSTS[1:2], X, optimizer="pcgrad")]
    wanted = {("sft", "C"): (X, COSTS[0]), ("pcgrad", "C"): (X, COSTS[1])}
    for names, label in (
        *(("buckets_O", "O"), ("buckets_S", "S"), ("buckets@m", "C by m")),
        *(("bucketsof8", "C of 8"), ("bucketsof16", "C of 16")),
    ):
        x, y = random.uniform(0, 1, (2, len(parse([names], 4))))
        tables.append(family(names, y[None], x))
        wanted["sft", label] = (x, y)
    found = found_in(pd.concat(tables))
    assert len(found) == len(wanted)  # one seed: no rows of seeds; buckets of O and S there: no stand-ins
    assert found["family"].iloc[0] == "C" and found["seed"].isna().all()
    for row in found.itertuples():
        x, y = wanted[row.optimizer, row.family]
        assert row.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert (row.n_points, row.measure) == (len(x), row.family[0])
        assert row.critical_r == correlations.critical_r(len(x))


def test_without_buckets_of_o_and_s_those_of_c_stand_in():
    found = found_in(family("buckets", COSTS[:1], X))
    assert list(found["measure"]) == ["C", "O", "S"] and set(found["family"]) == {"C"}
    assert found["pearson"][1] == pytest.approx(-found["pearson"][0]) and np.isnan(found["pearson"][2])


def test_every_seed_stands_by_itself():
    found = found_in(family("buckets", COSTS, X), spread=0.05)
    mean, *seeds = (row for row in found.itertuples() if row.measure == "C")
    assert mean.pearson == pytest.approx(np.corrcoef(X, COSTS.mean(axis=0))[0, 1])
    assert (mean.n_seeds, mean.n_points, mean.n_dropped) == (3, 4, 0) and pd.isna(mean.seed)
    assert mean.pearson_low < mean.pearson < mean.pearson_high
    assert [row.seed for row in seeds] == [0, 1, 2]
    for row, costs in zip(seeds, COSTS, strict=True):
        assert row.pearson == pytest.approx(np.corrcoef(X, costs)[0, 1])
        assert np.isnan(row.pearson_low) and row.n_seeds == 1


def test_a_bucket_without_mean_gain_is_no_point():
    costs = family("buckets", COSTS[:1], X)
    costs.iloc[0, costs.columns.get_loc("safety_gain")] = 0.0
    row = found_in(costs).iloc[0]
    assert (row["n_points"], row["n_no_gain"]) == (3, 1)
    assert row["pearson"] == pytest.approx(np.corrcoef(X[1:], COSTS[0, 1:])[0, 1])
    costs.iloc[1, costs.columns.get_loc("safety_gain")] = -0.1
    row = found_in(costs).iloc[0]
    assert row["n_points"] == 2 and pd.isna(row["pearson"]) and pd.isna(row["critical_r"])


def test_a_resample_without_a_gain_is_left_out_and_counted():
    costs = family("buckets", COSTS[:1], X)
    means = costs.set_axis([ArmRun(run.arm, run.optimizer, None) for run in costs.index])
    samples = np.tile(COSTS[0], (40, 1))
    samples[:10, 2] = np.inf
    draws = {"ucr": pd.DataFrame(samples, columns=means.index)}
    row = correlations.over_buckets(means, "ranked_mean", "ucr", draws)
    assert row["n_dropped"] == 10
    assert row["pearson_low"] == pytest.approx(row["pearson"]) == row["pearson_high"]


def test_equal_costs_have_no_correlation():
    row = found_in(family("buckets", 0 * COSTS[:1], X)).iloc[0]
    assert np.isnan(row["pearson"]) and np.isnan(row["pearson_low"])


def test_families_of_another_m():
    tables = [family("buckets", COSTS[:1, :2], X[:2], m=2), family("bucketsof4", COSTS[:1], X, m=2)]
    found = found_in(pd.concat(tables), m=2)
    assert list(found["family"]) == ["C", "C", "C", "C of 4"]


def test_coefficients_of_many_rows_at_once():
    y = np.random.default_rng(0).integers(0, 4, (30, 6)).astype(float)
    y[0] = 2.0
    x = np.arange(6.0)
    pearson, spearman = correlations.coefficients(x, y)
    frame = pd.DataFrame(y[1:].T)
    assert np.isnan([pearson[0], spearman[0]]).all()
    np.testing.assert_allclose(pearson[1:], frame.corrwith(pd.Series(x)), rtol=1e-9)
    np.testing.assert_allclose(spearman[1:], frame.corrwith(pd.Series(x), method="spearman"), rtol=1e-9)


def test_doctests():
    assert doctest.testmod(correlations).failed == 0
