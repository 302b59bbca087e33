"""Random streams: each purpose has one of its own, and a purpose always the same."""

import ast
import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from backends.base import GainRecipe, Recipe, Task
from backends.core import schedules, seeds
from tests.conftest import ROOT, make_examples
from tests.test_sampling import PLAN, draw


def purposes() -> list[tuple[str, tuple[object, ...]]]:
    """Where `stream(seed, *purpose)` is called, and the purpose's leading constants. `data.sampling` draws by
    names that a call tells it; those are compared as it draws."""
    found = []
    rooms = (ROOT / room for room in ("backends", "data", "stages"))
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "func", None)
            if not isinstance(node, ast.Call) or getattr(name, "attr", getattr(name, "id", "")) != "stream":
                continue
            fixed = itertools.takewhile(lambda argument: isinstance(argument, ast.Constant), node.args[1:])
            if not isinstance(node.args[-1], ast.Starred):
                found.append((f"{path}:{node.lineno}", tuple(argument.value for argument in fixed)))
    return found


def test_no_two_purposes_share_a_stream():
    found = purposes()
    assert len(found) >= 5
    for where, purpose in found:
        assert purpose, f"{where}: the purpose begins with no constant"
        same = [other for other, theirs in found if theirs[: len(purpose)] == purpose]
        assert same == [where], f"{purpose} is the purpose, or its beginning, of {same}"


def test_what_a_run_draws_has_streams_of_its_own(monkeypatch):
    drawn, real = Counter(), seeds.stream

    def counted(seed, *purpose):
        drawn["/".join(map(str, (seed, *purpose)))] += 1
        return real(seed, *purpose)

    monkeypatch.setattr(seeds, "stream", counted)
    other = SimpleNamespace(name="other", pool="embedded/words", rows=8)
    draw(replace(PLAN, maps=(other,), development=True))
    seeds.lora_a(3, 2, 2, 4)
    seeds.batch_order(5, Recipe(epochs=2))
    rows = tuple(make_examples(4))
    for step in range(3):
        seeds.reference_rows(step, 5, 2, Recipe())
        schedules.draw_task_rows([Task("one", rows, rows)], step, GainRecipe())
    assert {
        "3/rows/pairs",
        "3/rows/map/other",
        "3/rows/development/facts",
        "0/rows/benchmark/facts",
    } <= drawn.keys()
    assert set(drawn.values()) == {1}, drawn.most_common(3)


def test_a_seed_alone_is_no_stream_and_streams_never_change():
    """numpy pads a list with zeros: default_rng([s, 2]) is default_rng([s, 2, 0])."""
    streams = [(21, "a"), (21, "a", 0), (21, "a", "b"), (21, "b", "a"), (22, "a")]
    draws = [seeds.stream(*stream).integers(2**62) for stream in streams]
    draws.append(np.random.default_rng([21]).integers(2**62))
    assert len(set(draws)) == len(draws)
    assert seeds.stream(21, "lora", "A").integers(10**6, size=3).tolist() == [586098, 927741, 572768]
