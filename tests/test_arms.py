"""Arms: names read once, typed from there; which heads and neurons each tunes."""

import doctest
from dataclasses import asdict

import numpy as np
import pytest

from stages.method import arms, neurons
from stages.method.arms import Arm, ArmRun, arm_from_row, arm_runs, parse, select_heads
from stages.method.heads import HeadMap

GENERATOR = np.random.default_rng(0)


def head_map(score: np.ndarray) -> HeadMap:
    m = 4
    bucket = arms.buckets(score, m)
    zeros = np.zeros_like(score)
    return HeadMap(1 - score, zeros, zeros, score, score, bucket)


@pytest.mark.parametrize("module", [arms, neurons])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("full", {"kind": "full", "ranked_by": "C", "map": "util"}),
        ("random", {"kind": "random", "ranked_by": "C", "map": "util"}),
        ("bucket2_O", {"kind": "bucket", "bucket": 2, "of": 4, "ranked_by": "O", "map": "util"}),
        ("bucket3of8", {"kind": "bucket", "bucket": 3, "of": 8, "ranked_by": "C", "map": "util"}),
        ("bucket1@mmlu100", {"kind": "bucket", "bucket": 1, "of": 4, "ranked_by": "C", "map": "mmlu100"}),
        (
            "bucket4-rediagnosed",
            {"kind": "rediagnosed", "bucket": 4, "of": 4, "ranked_by": "C", "map": "util"},
        ),
        (
            "bucket1of8_O@x-rediagnosed",
            {"kind": "rediagnosed", "bucket": 1, "of": 8, "ranked_by": "O", "map": "x"},
        ),
        ("draw7of32", {"kind": "draw", "draw": 7, "of": 32, "ranked_by": "C", "map": "util"}),
        ("draw4of9@x", {"kind": "draw", "draw": 4, "of": 9, "ranked_by": "C", "map": "x"}),
        ("top50", {"kind": "top", "share": 50, "ranked_by": "C", "map": "util"}),
        ("bottom75_S@x", {"kind": "bottom", "share": 75, "ranked_by": "S", "map": "x"}),
        ("neurons256", {"kind": "neurons", "neurons": 256, "lam": 0.5}),
        ("randomneurons8_lam0.8", {"kind": "randomneurons", "neurons": 8, "lam": 0.8}),
        ("neurons0", {"kind": "neurons", "neurons": 0, "lam": 0.5}),
    ],
)
def test_names(name, fields):
    (arm,) = parse([name], 4)
    assert arm == Arm(name, **fields)
    # As pandas gives it back: missing numbers are NaN, whole ones floats.
    row = {key: np.nan if value is None else value for key, value in asdict(arm).items()}
    row |= {key: float(row[key]) for key in ("bucket", "of", "share", "neurons", "draw")}
    assert arm_from_row(row | {"arm": name}) == arm


UNKNOWN = (
    "Full bucket bucket0 bucket5 bucket9of8 buckets2 top top30 top50of8 full_O random@x bucket1_C neurons"
)
UNKNOWN += " full-rediagnosed top50-rediagnosed draws32-rediagnosed bucket5-rediagnosed bucket1-"
UNKNOWN += " draw7 draws7 draw9of8 draws32_O draw0of4 neurons01 neurons8_lam2 base bucket1/"


@pytest.mark.parametrize("name", ["", *UNKNOWN.split()])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="^unknown arm"):
        parse([name], 4)


def test_heads_of_arms():
    score = np.arange(12.0).reshape(3, 4) / 12
    ranked = head_map(score)

    def heads(name: str, m: int = 4) -> list:
        return select_heads(parse([name], m)[0], ranked, m, GENERATOR)

    assert heads("full") == [(layer, head) for layer in range(3) for head in range(4)]
    assert heads("bucket1") == heads("top25") == [(2, 1), (2, 2), (2, 3)]
    assert heads("bucket4") == heads("bottom25") == heads("bucket1_O") == [(0, 0), (0, 1), (0, 2)]
    assert heads("bucket1-rediagnosed") == heads("bucket1"), "that is where it starts"
    assert heads("bottom50") == sorted(heads("bucket3") + heads("bucket4"))
    assert heads("top75") == sorted(set(heads("full")) - set(heads("bucket4")))
    assert heads("bucket2of2") == heads("bottom50")
    drawn = heads("random")
    assert len(drawn) == len(set(drawn)) == 3 and drawn == sorted(drawn) != heads("random")


def test_runs():
    main, ablations = parse(["full", "bucket1"], 4), parse(["bucket1", "top50", "neurons2"], 4)
    runs = arm_runs(main, ablations, ["sft", "pcgrad"], [21, 42])
    assert [run.name for run in runs if run.seed == 42] == [
        "full-sft-42",
        "bucket1-sft-42",
        "full-pcgrad-42",
        "bucket1-pcgrad-42",
        "top50-sft-42",
        "neurons2-maml-42",
    ]
    assert ArmRun(arms.BASE, None, None).name == "base"
    zones = [arm.name for arm in parse(["buckets", "bucket1_O", "bucket1of8"], 4) if arm.is_zone(4)]
    assert zones == ["bucket1", "bucket2", "bucket3", "bucket4"]


def test_random_neurons_are_as_many_of_each_kind():
    generator = np.random.default_rng(1)
    safety, utility = (neurons.ranks(generator.random((3, 16))) for _ in range(2))
    (chosen,), (random,) = (parse([name], 4) for name in ("neurons6", "randomneurons6"))
    found = neurons.choose_neurons(chosen, safety, utility, generator)
    drawn = neurons.choose_neurons(random, safety, utility, generator)
    assert [len(part) for part in drawn] == [len(part) for part in found]
    assert not set(drawn.safety) & set(drawn.utility) and drawn != found


def test_tasks_of_few_rows_join():
    types = ["vanilla_harmful", "vanilla_benign"] + ["adversarial_harmful"] * 9 + ["adversarial_benign"] * 9
    sources = ["plain", "plain"] + ["role-play"] * 5 + ["format"] * 4 + ["role-play"] * 6 + ["format"] * 3
    found = {task.name: (len(task.harmful), len(task.benign)) for task in neurons.task_rows(types, sources)}
    assert found == {"adversarial": (4, 3), "role-play": (5, 6), "vanilla": (1, 1)}


def test_draws_are_a_grid_with_seeds_of_their_own():
    draws = parse(["draws32"], 4)
    grid = [arms.preferences(arm.draw, arm.of) for arm in draws]
    assert len(set(grid)) == 32 and np.corrcoef(np.array(grid).T)[0, 1] == pytest.approx(0, abs=1e-12)
    runs = arm_runs(parse(["full"], 4), draws, ("sft",), (21, 42))
    assert [run.seed for run in runs if run.arm.draw is None] == [21, 42]
    assert len({run.seed for run in runs if run.arm.draw}) == 32 == len(runs) - 2


def test_a_draw_prefers_what_it_is_to_and_keeps_every_layers_share():
    generator = np.random.default_rng(0)
    conflict, sensitivity = generator.random((2, 10, 8))
    own = HeadMap(conflict, *np.zeros((2, 10, 8)), sensitivity, conflict, np.ones((10, 8), int))
    means = []
    for arm in parse(["draws36"], 4):
        heads = np.array(select_heads(arm, own, 4, np.random.default_rng(arm.draw)))
        assert len(heads) == 20 and (np.bincount(heads[:, 0], minlength=10) == 2).all()
        assert len({tuple(head) for head in heads}) == 20
        at = tuple(heads.T)
        means.append([*arms.preferences(arm.draw, 36), conflict[at].mean(), sensitivity[at].mean()])
    related = np.corrcoef(np.array(means).T)
    assert related[0, 2] > 0.9 and related[1, 3] > 0.9 and abs(related[2, 3]) < 0.3
