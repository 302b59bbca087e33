"""Resamples of the map: whole folds, the same ones for O and H, and what intervals and probabilities mean."""

import doctest

import numpy as np
import pytest

from stages.method import metrics, uncertainty
from stages.method.conflict_map import gradient_columns, map_columns, map_notes
from stages.method.gradients import conflict_from_gram
from stages.method.uncertainty import (
    Effects,
    Outcomes,
    Resampling,
    fold_counts,
    map_intervals,
    resampled_changes,
)
from tests.test_gradients import random_gram

SHAPE = (2, 3)


def random_outcomes(seed: int, rows: int) -> Outcomes:
    generator = np.random.default_rng(seed)
    return Outcomes(generator.random(rows) < 0.6, generator.random((*SHAPE, rows)) < 0.5)


def intervals(gram, correct, refused, resamples=400, seed=0):
    resampling = Resampling(np.random.default_rng(seed), resamples)
    return map_intervals(gram, Effects(correct, refused), "rank-difference", 2, resampling)


def test_docstring_examples():
    result = doctest.testmod(uncertainty)
    assert result.attempted and not result.failed


def test_fold_draws_have_the_variance_of_a_mean():
    """A resampled mean of F folds has the variance of the mean, s^2 / F with s^2 over F - 1."""
    folds = 4
    values = np.array([1.0, 2.0, 4.0, 9.0])
    counts = fold_counts(folds, np.random.default_rng(0), 40_000)
    assert (counts.sum(axis=1) == folds - 1).all()
    means = counts @ values / (folds - 1)
    assert means.mean() == pytest.approx(values.mean(), rel=0.02)
    assert means.var() == pytest.approx(values.var(ddof=1) / folds, rel=0.03)
    assert (fold_counts(1, np.random.default_rng(0), 3) == 1).all()


def test_changes_are_those_of_the_drawn_rows():
    outcomes = random_outcomes(1, rows=12)
    counts = fold_counts(4, np.random.default_rng(2), 50)
    drawn = resampled_changes(outcomes.effects, counts)
    for resample in (0, 17):
        # Row n is in fold n mod F, as in backend.gradient_gram.
        rows = np.concatenate(
            [np.repeat(np.arange(fold, 12, 4), times) for fold, times in enumerate(counts[resample])]
        )
        expected = outcomes.ablated[..., rows].mean(axis=-1) - outcomes.clean[rows].mean()
        np.testing.assert_allclose(drawn[resample], expected, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="^counts: 12 rows do not divide into 5 folds"):
        resampled_changes(outcomes.effects, fold_counts(5, np.random.default_rng(0), 2))


def test_equal_changes_stay_ties():
    """Three right of ten lost and gained: |change| is one number in every resample, not two by rounding."""
    clean = np.arange(12) < 6
    ablated = np.stack([np.arange(12) < 9, np.arange(12) < 3])[None]
    drawn = np.abs(resampled_changes(Outcomes(clean, ablated).effects, np.full((1, 3), 1)))
    assert drawn[0, 0, 0] == drawn[0, 0, 1]


def test_o_and_h_see_the_same_draws():
    """Fold 0 of D_util alone makes accuracy change, and alone opposes safety: so in every resample O is high
    just where H_gen is. With draws of their own the two would be unrelated."""
    folds, rows = 4, 8
    vectors = np.zeros((1, 2, 2 * folds, 3))
    vectors[..., :folds, 0] = 1.0  # safe
    vectors[..., folds:, 1] = 1.0  # util: at right angles, but for fold 0
    vectors[..., folds, :] = [-3.0, 1.0, 0.0]
    gram = np.einsum("lhis,lhjs->lhij", vectors, vectors)
    ablated = np.ones((1, 2, rows), dtype=bool)
    ablated[..., 0::folds] = False
    correct = Outcomes(np.ones(rows, dtype=bool), ablated).effects
    generator = np.random.default_rng(3)
    safe, util = (fold_counts(folds, generator, 200) for _ in range(2))
    h_gen = np.abs(resampled_changes(correct, util))[:, 0, 0]
    weights = util / util.sum(axis=1, keepdims=True)
    dot = np.einsum("rf,fg,rg->r", np.full((200, folds), 1 / folds), gram[0, 0, :folds, folds:], weights)
    assert np.corrcoef(h_gen, -dot)[0, 1] == pytest.approx(1.0)
    # The map's own resamples are made by those draws: O's interval is that of these weights.
    found = intervals(gram, correct, correct, resamples=200, seed=3)
    norms = np.sqrt(np.einsum("rf,fg,rg->r", weights, gram[0, 0, folds:, folds:], weights))
    conflict = (1 - dot / norms) / 2
    assert found.low["optimization_conflict"][0, 0] == pytest.approx(np.quantile(conflict, 0.025))
    assert found.high["optimization_conflict"][0, 0] == pytest.approx(np.quantile(conflict, 0.975))


def test_intervals_hold_the_estimates_and_repeat():
    gram, _ = random_gram(np.random.default_rng(4), *SHAPE, folds=4, noise=0.3)
    correct, refused = random_outcomes(5, 24).effects, random_outcomes(6, 16).effects
    resampling = Resampling(np.random.default_rng(0), 400)
    columns = map_columns(gram, Effects(correct, refused), "rank-difference", 2, resampling)
    for name in ("optimization_conflict", "h_gen", "h_safe", "bucket"):
        assert (columns[f"{name}_low"] <= columns[name]).all() and (
            columns[name] <= columns[f"{name}_high"]
        ).all()
    probability = np.stack(columns["bucket_probability"])
    np.testing.assert_allclose(probability.sum(axis=1), 1.0)
    again = intervals(gram, correct, refused)
    np.testing.assert_array_equal(again.bucket_probability.reshape(-1, 2), probability)
    assert 0.5 <= map_notes(columns)["mean_probability_of_own_bucket"] <= 1


def test_one_fold_or_no_gradient_does_not_move():
    outcomes = Outcomes(np.array([True, False]), np.zeros((*SHAPE, 2), dtype=bool)).effects
    gram, _ = random_gram(np.random.default_rng(4), *SHAPE, folds=1)
    found = intervals(gram, outcomes, outcomes, resamples=7)
    estimate = metrics.optimization_conflict(*conflict_from_gram(gram, 1))
    for end in (found.low, found.high):
        np.testing.assert_allclose(end["optimization_conflict"], estimate, rtol=0, atol=1e-15)
    found = intervals(np.zeros((*SHAPE, 4, 4)), outcomes, outcomes, resamples=7)
    assert (found.high["optimization_conflict"] == 0.5).all()


def test_columns_stand_by_layer_and_head():
    gram, _ = random_gram(np.random.default_rng(7), *SHAPE, folds=2)
    columns = gradient_columns(gram)
    assert list(zip(columns["layer"], columns["head"], strict=True)) == list(np.ndindex(*SHAPE))
    assert columns["norm_safe"][4] == conflict_from_gram(gram, 2)[1][1, 1]
