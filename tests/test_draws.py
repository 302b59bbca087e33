"""Does the map predict the cost of drawn arms: a planted effect is found, and none where there is none."""

import doctest

import numpy as np
import pytest

from stages.method import prediction
from stages.method.arms import draw_heads, preferences
from stages.method.conflict_map import head_map
from stages.method.prediction import predict, smallest_r

APART = np.eye(32)
"""arms that share no heads"""


def test_docstring_examples():
    result = doctest.testmod(prediction)
    assert result.attempted and not result.failed


def test_a_planted_effect_is_found_and_a_confounder_is_held_fixed():
    generator = np.random.default_rng(0)
    depth, noise = generator.random((2, 32))
    score = 0.5 * depth + generator.random(32)
    planted = predict(score, 2 * score + 0.3 * noise, {}, {"depth": depth}, generator, APART)
    assert planted.r > 0.8 and planted.low > 0.5 and planted.p < 0.001 and planted.partial > 0.8
    assert planted.slope == pytest.approx(2, abs=0.2)
    only_depth = predict(score, depth + 0.05 * noise, {}, {"depth": depth}, generator, APART)
    assert only_depth.p < 0.1 and abs(only_depth.partial) < 0.4
    held = predict(score, depth + 0.05 * noise, {"safety": depth}, {}, generator, APART)
    assert abs(held.r) < 0.4


def test_no_effect_is_seen_in_one_case_of_twenty():
    generator = np.random.default_rng(1)
    found = [predict(*generator.normal(size=(2, 24)), {}, {}, generator, np.eye(24)) for _ in range(200)]
    for name in ("p", "p_heads"):  # of arms that share nothing both are right
        assert 0.01 < np.mean([getattr(each, name) < 0.05 for each in found]) < 0.1


def test_an_r_of_the_smallest_size_is_seen_four_times_of_five():
    generator, size = np.random.default_rng(2), smallest_r(32)
    x = generator.normal(size=(300, 32))
    y = size * x + np.sqrt(1 - size**2) * generator.normal(size=x.shape)
    seen = [predict(one, other, {}, {}, generator, APART).p < 0.05 for one, other in zip(x, y, strict=True)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.07)


def test_what_cannot_be_told_is_none():
    generator = np.random.default_rng(0)
    x = generator.random(10)
    for pair, fixed in (((x[:5], x[:5]), {}), ((x, np.ones(10)), {}), ((x, x**2), {"safety": x})):
        assert predict(*pair, fixed, {}, generator, np.eye(len(pair[0])))[1:] == (None,) * 7


def drawn(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """C of 270 heads, and which of them 32 draws have, [32, 270]."""
    shape = 30, 9
    conflict, h_gen, h_safe = generator.random((3, *shape))
    scores = head_map(0.4 + 0.2 * conflict, h_gen, h_safe, "rank-difference", 4)
    has = np.zeros((32, *shape))
    for draw in range(32):
        chosen = draw_heads(scores, 67, preferences(draw + 1, 32), generator)
        has[draw][tuple(chosen.T)] = 1
    return scores.conflict_score.ravel(), has.reshape(32, -1)


def test_heads_that_differ_are_no_relation_of_c_and_a_planted_one_is_found():
    """Effects of heads that have nothing to do with C, and such that correlate with it by 0.4."""
    generator, found = np.random.default_rng(4), []
    for _ in range(40):
        score, has = drawn(generator)
        own, noise = generator.normal(size=270), generator.normal(size=32)
        standard = (score - score.mean()) / score.std()
        for planted in (0.0, 0.4):
            cost = has @ (planted * standard + np.sqrt(1 - planted**2) * own)
            cost = cost + (has @ own).std() * noise
            found.append((planted, *predict(has @ score, cost, {}, {}, generator, has @ has.T)))
    none, some = (np.array([row[5:7] for row in found if row[0] == planted], float) for planted in (0.0, 0.4))
    assert (none[:, 0] < 0.05).mean() > 0.1, "permutation of arms takes heads for C"
    assert (none[:, 1] < 0.05).mean() <= 0.1
    assert (some[:, 1] < 0.05).mean() >= 0.7
