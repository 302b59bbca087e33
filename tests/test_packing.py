"""How prompts are joined, responses guessed and memory planned: what the sweeps of both backends rest on."""

import numpy as np
import pytest

from backends.base import Example, Shape
from backends.core import budgets, packing
from backends.core.drafts import Trie
from backends.core.errors import InputError


def prompts(seed: int, count: int) -> list[np.ndarray]:
    """Few different tokens, so that beginnings of all lengths are shared, and some whole prompts."""
    generator = np.random.default_rng(seed)
    made = [generator.integers(0, 2, generator.integers(1, 9)).astype(np.int32) for _ in range(count)]
    start = np.array([7, 7], np.int32)
    return [np.concatenate([start, prompt]) for prompt in made]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("tokens", "most", "multiple"), [(10**6, 0, 1), (12, 0, 1), (30, 3, 1), (30, 0, 4)])
def test_lines_hold_every_beginning_once(seed, tokens, most, multiple):
    sequences = prompts(seed, 1 + seed)
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


def test_a_long_prompt_does_not_widen_the_grid_of_many_short_ones():
    short = [np.array([1, number], np.int32) for number in range(2, 60)]
    long = [np.arange(1000, 1400, dtype=np.int32)]
    lines = packing.lines([*short, *long], 500, 2)
    assert [len(line.rows) for line in lines] == [58, 1]
    assert len(packing.join([*short, *long], 2).rows) == 59


def test_the_commonest_way_on_is_guessed():
    known = Trie()
    for tokens in ([1, 2, 3], [1, 4, 5, 6], [1, 4, 7]):
        known.add(0, tokens)
    assert known.guess(0, 9) == [1, 4, 5, 6], "of two as common, the first seen"
    assert known.guess(0, 2) == [1, 4]
    node = known.add(0, [1, 2])
    assert known.guess(node, 5) == [3] and known.guess(known.add(node, [9]), 5) == []


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


def test_passes_keep_every_row_with_neighbours_in_length():
    generator = np.random.default_rng(3)
    for _ in range(50):
        lengths = generator.integers(1, 200, int(generator.integers(1, 12)))
        rows = [
            Example(str(at), np.zeros(size, np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32), 0)
            for at, size in enumerate(lengths)
        ]
        found = packing.passes(rows, 4)
        assert sorted(int(row.example_id) for some in found for row in some) == list(range(len(rows)))
        assert [len(some) for some in found[:-1]] == [4] * (-(-len(rows) // 4) - 1) and len(found[-1]) <= 4
        own = [len(row.prompt_ids) for some in found for row in some]
        assert own == sorted(own, reverse=True)
