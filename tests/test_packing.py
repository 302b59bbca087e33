"""How prompts are joined and memory planned: what the sweeps of both backends rest on."""

import numpy as np
import pytest

from backends.base import Shape
from backends.core import budgets, packing
from backends.core.errors import InputError


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("tokens", "most", "multiple"), [(10**6, 0, 1), (12, 0, 1), (30, 3, 1), (30, 0, 4)])
def test_lines_hold_every_beginning_once(seed, tokens, most, multiple):
    """Of sequences of few different tokens, so that beginnings of all lengths are shared, and some wholly."""
    generator, start = np.random.default_rng(seed), np.array([7, 7], np.int32)
    sequences = [
        np.concatenate([start, generator.integers(0, 2, generator.integers(1, 9)).astype(np.int32)])
        for _ in range(1 + seed)
    ]
    lines = packing.lines(sequences, tokens, min(map(len, sequences)), most, multiple)
    assert sorted(np.concatenate([line.rows for line in lines])) == list(range(len(sequences)))
    for line in lines:
        own = [sequences[row] for row in line.rows]
        beginnings = {tuple(prompt[:end]) for prompt in own for end in range(1, len(prompt) + 1)}
        assert len(line.ids) == len(beginnings), "a beginning stands there twice"
        assert len(line.rows) == 1 or len(line.ids) <= tokens
        assert not most or len(line.rows) <= most
        for prompt, columns, length in zip(own, line.columns, line.lengths, strict=True):
            assert length == len(prompt)
            np.testing.assert_array_equal(line.ids[columns[:length]], prompt)
            np.testing.assert_array_equal(line.positions[columns[:length]], np.arange(length))
            assert (columns[length:] == columns[length - 1]).all()
        assert line.prefix % multiple == 0 and line.prefix < line.lengths.min()
        np.testing.assert_array_equal(line.columns[:, : line.prefix], [np.arange(line.prefix)] * len(own))
        np.testing.assert_array_equal(
            line.columns[:, line.prefix :].ravel()[line.picks], np.arange(line.prefix, len(line.ids))
        )


SHAPE = Shape(layers=10, heads=4, kv_heads=2, head_dim=8, model_dim=32, mlp_dim=64, vocab=100)


def test_memory_is_planned_before_it_is_used():
    # A token's keys and values: 2 * 10 * 2 * 8 * 4 = 1280 bytes; a response of 100: 128,000, logits 800 more.
    plan = budgets.plan_responses(SHAPE, 4, 10**9, prompts=50, tokens=100, most=512)
    assert plan == budgets.Plan(rows=512, prompts=50, keep=True)
    plan = budgets.plan_responses(SHAPE, 4, 10**7, prompts=50, tokens=100, most=512)
    assert plan.rows == int(0.6 * 10**7 / 128_800) == 46 and plan.prompts == 14 and not plan.keep
    with pytest.raises(InputError, match="two responses of 100 tokens take 0.00 GiB"):
        budgets.plan_responses(SHAPE, 4, 10**5, prompts=50, tokens=100, most=512)
    assert budgets.keeps_choices(SHAPE, 4, 10**6, 3000) and not budgets.keeps_choices(SHAPE, 4, 10**6, 4000)


def test_a_containers_limit_counts(monkeypatch, scratch):
    limit = scratch / "memory.max"
    monkeypatch.setattr(budgets, "CONTROL_GROUP", (str(limit),))
    whole = budgets.machine_bytes()
    for text, expected in (("max\n", whole), (f"{2**30}\n", 2**30)):
        limit.write_text(text)
        assert budgets.machine_bytes() == expected
