"""O from Gram matrices of fold gradients, against the gradients themselves; errors name the argument."""

import doctest

import numpy as np
import pytest

from stages.method import gradients, metrics


def random_gram(rng, layers=2, heads=3, folds=4, size=16, noise=1.0):
    """The Gram matrix of random fold gradients that share a direction, and the gradients [L, H, 2F, size]."""
    shared = np.repeat(rng.normal(size=(layers, heads, 2, 1, size)), folds, axis=3)
    vectors = (shared + noise * rng.normal(size=shared.shape)).reshape(layers, heads, 2 * folds, size)
    return np.einsum("lhis,lhjs->lhij", vectors, vectors), vectors


def direct_conflict(g_safe, g_util):
    """Eq. 2 from two vectors."""
    return (1 - g_safe @ g_util / (np.linalg.norm(g_safe) * np.linalg.norm(g_util))) / 2


@pytest.mark.parametrize("folds", range(1, 6))
def test_conflict_from_gram_equals_the_mean_gradients(folds):
    gram, vectors = random_gram(np.random.default_rng(folds), folds=folds)
    g_safe, g_util = vectors[:, :, :folds].mean(axis=2), vectors[:, :, folds:].mean(axis=2)
    dot, norm_safe, norm_util = gradients.conflict_from_gram(gram, folds)
    np.testing.assert_allclose(dot, (g_safe * g_util).sum(-1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(norm_safe, np.linalg.norm(g_safe, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(norm_util, np.linalg.norm(g_util, axis=-1), rtol=1e-12)
    conflict = metrics.optimization_conflict(dot, norm_safe, norm_util)
    assert conflict[1, 0] == pytest.approx(direct_conflict(g_safe[1, 0], g_util[1, 0]), abs=1e-12)


def test_conflict_from_gram_with_zero_and_cancelling_folds():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(1, 2, 6, 50))
    vectors[0, 0, :3] = 0.0  # no safe gradient at all
    vectors[0, 1, 2] = -vectors[0, 1, 0] - vectors[0, 1, 1]  # safe folds that cancel but for rounding
    gram = np.einsum("lhis,lhjs->lhij", vectors, vectors)
    assert gram[0, 1, :3, :3].sum() != 0
    dot, norm_safe, norm_util = gradients.conflict_from_gram(gram, 3)
    assert norm_safe.tolist() == [[0.0, 0.0]]
    assert dot.tolist() == [[0.0, 0.0]]
    assert np.all(norm_util > 0)
    assert metrics.optimization_conflict(dot, norm_safe, norm_util).tolist() == [[0.5, 0.5]]


# Errors name the argument

GRAM = random_gram(np.random.default_rng(0))[0]
INDEFINITE = np.zeros((1, 1, 6, 6))  # three safe folds at more than 120 degrees from one another cannot be
INDEFINITE[0, 0, :3, :3] = -0.9
INDEFINITE[0, 0, range(6), range(6)] = 1.0

ERRORS = [
    (GRAM, 3, "folds"),
    (GRAM, 0, "folds"),
    (GRAM * np.nan, 4, "gram"),
    (GRAM[0], 4, "gram"),
    (GRAM[..., :7, :7], 4, "gram"),
    (-GRAM, 4, "gram"),
    (GRAM + np.triu(np.ones((8, 8)), 1), 4, "gram"),
    (GRAM * (10 - 9 * np.eye(8)), 4, "gram"),
    (INDEFINITE, 3, "gram"),
]


def test_errors_begin_with_the_argument():
    for gram, folds, name in ERRORS:
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            gradients.conflict_from_gram(gram, folds)


def test_docstring_examples():
    result = doctest.testmod(gradients)
    assert result.attempted > 0 and result.failed == 0
