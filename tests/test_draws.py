"""Does the map predict the cost of drawn arms: a planted effect is found, and none where there is none."""

import doctest

import numpy as np
import pytest

from stages.method import prediction
from stages.method.prediction import predict, smallest_r


def test_docstring_examples():
    result = doctest.testmod(prediction)
    assert result.attempted and not result.failed


def test_a_planted_effect_is_found_and_a_confounder_is_held_fixed():
    generator = np.random.default_rng(0)
    depth, noise = generator.random((2, 32))
    score = 0.5 * depth + generator.random(32)
    planted = predict(score, 2 * score + 0.3 * noise, {}, {"depth": depth}, generator)
    assert planted.r > 0.8 and planted.low > 0.5 and planted.p < 0.001 and planted.partial > 0.8
    assert planted.slope == pytest.approx(2, abs=0.2)
    only_depth = predict(score, depth + 0.05 * noise, {}, {"depth": depth}, generator)
    assert only_depth.p < 0.1 and abs(only_depth.partial) < 0.4
    held = predict(score, depth + 0.05 * noise, {"safety": depth}, {}, generator)
    assert abs(held.r) < 0.4


def test_no_effect_is_seen_in_one_case_of_twenty():
    generator = np.random.default_rng(1)
    found = [predict(*generator.normal(size=(2, 24)), {}, {}, generator).p for _ in range(200)]
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.1


def test_an_r_of_the_smallest_size_is_seen_four_times_of_five():
    generator, size = np.random.default_rng(2), smallest_r(32)
    x = generator.normal(size=(300, 32))
    y = size * x + np.sqrt(1 - size**2) * generator.normal(size=x.shape)
    seen = [predict(one, other, {}, {}, generator).p < 0.05 for one, other in zip(x, y, strict=True)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.07)


def test_what_cannot_be_told_is_none():
    generator = np.random.default_rng(0)
    x = generator.random(10)
    for pair, fixed in (((x[:5], x[:5]), {}), ((x, np.ones(10)), {}), ((x, x**2), {"safety": x})):
        assert predict(*pair, fixed, {}, generator)[1:] == (None,) * 6
