"""Benchmarks as a command line names them."""

import pytest

from backends.core.errors import InputError
from data.benchmarks import parse_benchmarks
from data.embedded.generate import SPLITS
from data.pools import POOLS


def test_rows_and_lengths_are_read_and_default():
    facts, problems, math, vanilla = parse_benchmarks(
        ("facts=5", "problems=7", "math=0:12", "vanilla=9:8"), False, False
    )
    assert (facts.rows, facts.new_tokens, facts.source_domain) == (5, 0, True)
    assert (problems.rows, problems.new_tokens) == (7, 48)
    assert (math.rows, math.new_tokens, math.pool in POOLS) == (0, 12, True)
    assert vanilla.pool.removeprefix("embedded/") in SPLITS


def test_own_rows_replace_the_others_of_their_side_and_come_last():
    chosen = parse_benchmarks(("facts=5", "own_util=9", "words=5", "vanilla=5", "benign=5"), True, True)
    assert [(one.name, one.rows) for one in chosen] == [("benign", 5), ("own_util", 9), ("own_safe", 0)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("nope=5",), "unknown benchmark 'nope', there are facts, "),
        (("facts=5:x", "vanilla=5"), "'facts=5:x' should be name=rows"),
        (("facts=5",), "needs at least one safety benchmark"),
        (("vanilla=5",), "needs at least one utility benchmark"),
        (("facts=5", "facts=6", "vanilla=5"), "names one twice: facts facts vanilla"),
        (("facts=5", "mmlu=5", "vanilla=5"), "only one of mmlu, facts and own_util"),
        (("own_util=5", "vanilla=5"), r"own_util needs rows of your own \(--util FILE\)"),
    ],
)
def test_bad_benchmarks_are_named(texts, message):
    with pytest.raises(InputError, match=f"^--benchmarks:? .*{message}|^--benchmarks {message}"):
        parse_benchmarks(texts, False, False)
