"""Correlations by family of buckets, each seed's beside the mean's, against computations by hand."""

import doctest

import numpy as np
import pandas as pd
import pytest

from stages.method.arms import ArmRun, parse
from stages.report import correlations

X = np.array([1.2, 0.9, 0.7, 0.5])
COSTS = np.array([[0.9, 0.7, 0.8, 0.2], [1.0, 0.5, 0.6, 0.3], [0.7, 0.8, 0.4, 0.1]])
"""[seeds, buckets]"""


def family(names: str, costs=COSTS[:1], x=X, optimizer: str = "sft", gain=0.5) -> pd.DataFrame:
    """Costs of every seed in a run of four buckets."""
    runs = [ArmRun(arm, optimizer, seed) for seed in range(len(costs)) for arm in parse([names], 4)]
    columns = {"ranked_mean": np.tile(x, len(costs)), "ucr": np.ravel(costs)}
    columns |= {"mean_optimization_conflict": 1 - columns["ranked_mean"], "mean_functional_sensitivity": 2.0}
    table = pd.DataFrame(columns, index=pd.Index(runs, dtype=object))
    return table.assign(safety_gain=np.broadcast_to(gain, costs.shape).ravel())


def found_in(costs: pd.DataFrame, m: int = 4, draws=lambda means: means) -> pd.DataFrame:
    """Correlations; `draws`: resampled costs [R, arms] from those of the means [40, arms]."""
    runs = pd.Series([ArmRun(run.arm, run.optimizer, None) for run in costs.index], index=costs.index)
    means = costs.groupby(runs, sort=False).mean()
    samples = draws(np.tile(means["ucr"], (40, 1)))
    return correlations.correlations(costs, means, {"ucr": pd.DataFrame(samples, columns=means.index)}, m)


def test_each_family_is_correlated_with_what_ranked_it():
    random = np.random.default_rng(0)
    tables = [family("buckets"), family("buckets", COSTS[1:2], optimizer="pcgrad")]
    wanted = {("sft", "C"): (X, COSTS[0]), ("pcgrad", "C"): (X, COSTS[1])}
    labels = {"buckets_O": "O", "buckets_S": "S", "buckets@m": "C by m"}
    for names, label in (labels | {"bucketsof8": "C of 8", "bucketsof16": "C of 16"}).items():
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


def test_without_buckets_of_o_and_s_those_of_c_stand_in():
    found = found_in(family("buckets"))
    assert list(found["measure"]) == ["C", "O", "S"] and set(found["family"]) == {"C"}
    assert found["pearson"][1] == pytest.approx(-found["pearson"][0]) and np.isnan(found["pearson"][2])
    assert found["all_equal"][2] == "values of S" and found["all_equal"][:2].isna().all()
    assert list(found_in(family("buckets"), m=2)["family"]) == ["C of 4"]  # no zones of two buckets


def test_every_seed_stands_by_itself():
    noise = np.random.default_rng(0).normal(0, 0.05, (40, 4))
    found = found_in(family("buckets", COSTS), draws=lambda means: means + noise)
    mean, *seeds = (row for row in found.itertuples() if row.measure == "C")
    assert (mean.n_seeds, mean.n_points, mean.n_dropped) == (3, 4, 0) and pd.isna(mean.seed)
    assert mean.pearson_low < mean.pearson < mean.pearson_high
    assert [(row.seed, row.n_seeds) for row in seeds] == [(0, 1), (1, 1), (2, 1)]
    for row, costs in zip((mean, *seeds), (COSTS.mean(axis=0), *COSTS), strict=True):
        assert row.pearson == pytest.approx(np.corrcoef(X, costs)[0, 1])
        assert np.isnan(row.pearson_low) == (row is not mean)


@pytest.mark.parametrize(
    ("gains", "costs", "x", "points", "equal"),
    [
        ((0.0, 0.5, 0.5, 0.5), COSTS[:1], X, 3, None),  # no gain: no point
        ((0.0, -0.1, 0.5, 0.5), COSTS[:1], X, 2, None),
        (0.5, 0 * COSTS[:1], X, 4, "costs"),
        (0.5, COSTS[:1], 0 * X + 0.1, 4, "values of C"),
        (0.5, 0 * COSTS[:1], 0 * X, 4, "values of C and costs"),
        ((0.0, 0.5, 0.5, 0.5), COSTS[:1], np.array([1.0, 0.5, 0.5, 0.5]), 3, "values of C"),
    ],
)
def test_buckets_that_are_points(gains, costs, x, points, equal):
    row = found_in(family("buckets", costs, x, gain=gains)).iloc[0]
    assert (row["n_points"], row["n_no_gain"]) == (points, 4 - points)
    r = np.nan if equal or points < 3 else np.corrcoef(x[-points:], costs[0, -points:])[0, 1]
    assert row["pearson"] == pytest.approx(r, nan_ok=True)
    assert pd.isna(row["pearson_low"]) == np.isnan(r) and pd.isna(row["critical_r"]) == (points < 3)
    assert row["all_equal"] == equal if equal else pd.isna(row["all_equal"])


def test_a_resample_without_a_gain_is_left_out_and_counted():
    some = np.where(np.arange(40)[:, None] < 10, [0, 0, np.inf, 0], 0)
    row = found_in(family("buckets"), draws=lambda means: means + some).iloc[0]
    assert row["n_dropped"] == 10
    assert row["pearson_low"] == pytest.approx(row["pearson"]) == row["pearson_high"]


def test_coefficients_of_many_rows_at_once():
    y = np.random.default_rng(0).integers(0, 4, (30, 6)).astype(float)
    y[0] = 2.0
    found = correlations.coefficients(np.arange(6.0), y)
    for method, values in zip(("pearson", "spearman"), found, strict=True):
        by_pandas = pd.DataFrame(y[1:].T).corrwith(pd.Series(np.arange(6.0)), method=method)
        assert np.isnan(values[0]) and values[1:] == pytest.approx(by_pandas.to_numpy(), rel=1e-9)


def test_doctests():
    assert doctest.testmod(correlations).failed == 0
