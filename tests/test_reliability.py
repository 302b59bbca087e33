"""Whether a map repeats itself: halves of folds, Spearman-Brown, kappa, and what is known of made-up maps."""

import numpy as np
import pytest

from stages.method import reliability
from stages.method.reliability import Reliability, doubt_of, half_counts, kappa, map_reliability, other_halves
from stages.method.uncertainty import Effects

SHAPE, FOLDS, ROWS = (4, 10), 8, 32


def made_up(noise: float, seed: int = 0) -> tuple[np.ndarray, Effects]:
    """Gram matrices and effects of heads that differ from one another, and of rows that differ by `noise`."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(*SHAPE, 2, 1, 12)).repeat(FOLDS, axis=3)
    vectors = (vectors + noise * generator.normal(size=vectors.shape)).reshape(*SHAPE, 2 * FOLDS, 12)
    own = generator.normal(size=(2, *SHAPE, 1))
    effects = own + 4 * noise * generator.normal(size=(2, *SHAPE, ROWS))
    return np.einsum("lhis,lhjs->lhij", vectors, vectors), Effects(*effects)


def found(gram, effects, seed=0) -> dict[str, Reliability]:
    generator = np.random.default_rng(seed)
    return {own.quantity: own for own in map_reliability(gram, effects, "rank-difference", 4, generator)}


@pytest.mark.parametrize(("folds", "splits"), [(2, 1), (4, 3), (5, 10), (8, 20)])
def test_halves_share_no_fold(folds, splits):
    first = half_counts(folds, np.random.default_rng(0))
    second = other_halves(first)
    assert first.shape == (splits, folds) and (first + second).max() == 1
    assert (first.sum(axis=1) == folds // 2).all() and (second.sum(axis=1) == folds // 2).all()
    if folds % 2 == 0:
        assert len({frozenset(map(tuple, pair)) for pair in zip(first, second, strict=True)}) == splits


def test_a_map_without_noise_repeats_itself_and_noise_does_not():
    clean, noisy = (found(*made_up(noise)) for noise in (0.0, 50.0))
    for name in reliability.QUANTITIES:
        assert clean[name].reliability == pytest.approx(1) and clean[name].more_rows == pytest.approx(0)
        assert noisy[name].reliability < 0.4
    assert clean["bucket"].halves == 1 and abs(noisy["bucket"].halves) < 0.15
    assert doubt_of([*clean.values()]) is None and "no conclusion can rest on it" in doubt_of(
        [*noisy.values()]
    )


def test_more_rows_are_as_reliable_as_foretold():
    """Spearman-Brown holds for the mean effect itself: with 4 times the rows, what it says of 4 times."""
    values = np.random.default_rng(1).normal(size=(200, 1)) + 3 * np.random.default_rng(2).normal(
        size=(200, 128)
    )
    few, many = (
        np.corrcoef(values[:, :n].mean(axis=1), values[:, n : 2 * n].mean(axis=1))[0, 1] for n in (16, 64)
    )
    assert reliability.spearman_brown(reliability.spearman_brown(few)) == pytest.approx(many, abs=0.05)
    times = reliability.rows_wanted(few)
    assert times * few / (1 + (times - 1) * few) == pytest.approx(reliability.WANTED)


def test_kappa_of_chance_and_of_equals():
    generator = np.random.default_rng(0)
    one, other = (generator.integers(1, 5, 40_000) for _ in range(2))
    assert kappa(one, one, 4) == 1 and abs(kappa(one, other, 4)) < 0.02
    assert kappa(np.ones(3, int), np.ones(3, int), 1) == 1


def test_what_cannot_be_computed_is_none():
    gram, effects = made_up(0.1)
    constant = found(gram, Effects(np.zeros_like(effects.util), effects.safe))
    assert constant["h_gen"].reliability is None and constant["h_safe"].reliability > 0.5
    single = found(gram[..., ::FOLDS, ::FOLDS], effects)
    assert {own.reliability for own in single.values()} == {None}
    assert "unknown" in doubt_of([*single.values()])
    assert reliability.spearman_brown(-0.3) == 0 and reliability.rows_wanted(0.0) is None


def test_the_same_stream_gives_the_same_splits():
    assert found(*made_up(1.0), seed=3) == found(*made_up(1.0), seed=3)
