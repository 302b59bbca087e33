"""Whether the conflict map repeats itself: the map of one half of its rows against that of the other half.

The halves are halves of the folds of stage 02, since O is known of whole folds; every quantity follows from
the same halves. The correlation between halves is that of maps of half the rows; Spearman-Brown steps it up
to all of them, 2 rho / (1 + rho) (Spearman 1910; Brown 1910), and says how many rows would give more.

Axes: L layers, H heads, F folds.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from stages.method.arrays import FloatArray, IntArray
from stages.method.metrics import SensitivityVariant
from stages.method.uncertainty import Effects, draw_maps

QUANTITIES = ("optimization_conflict", "h_gen", "h_safe", "functional_sensitivity", "conflict_score")
SPLITS = 20
"""pairs of halves at most; fewer where there are no more"""
WANTED = 0.9
"""a reliability at which a map can be relied on"""
ENOUGH = 0.5
"""below it no conclusion can rest on a map"""


class Reliability(NamedTuple):
    """Of one quantity of every head. None: it cannot be computed (a half is constant, or there are no two
    halves)."""

    quantity: str
    halves: float | None
    """Spearman's rho between the heads of two halves, mean over splits; of "bucket" Cohen's kappa"""
    reliability: float | None
    """stepped up to all rows; at least 0. Of "bucket" that of `halves` is not stepped up: kappa has no such
    formula"""
    more_rows: float | None
    """how many times as many rows would give WANTED; None also where nothing repeats itself"""


def half_counts(folds: int, generator: np.random.Generator) -> IntArray:
    """Which folds are in the first half of each split, 0 or 1, [S, F]: F // 2 of them. Every split once, or
    SPLITS drawn ones; of an odd number of folds one is in neither half."""
    size = folds // 2
    every = [set(half) for half in combinations(range(folds), size)]
    if folds == 2 * size:  # a half and its complement are one split
        every = [half for half in every if 0 in half]
    if len(every) > SPLITS:
        every = [every[at] for at in generator.choice(len(every), SPLITS, replace=False)]
    return np.array([[int(fold in half) for fold in range(folds)] for half in every])


def other_halves(first: IntArray) -> IntArray:
    """The folds of the second halves, [S, F]: the first F // 2 that the first half does not have."""
    free = 1 - first
    return free * (np.cumsum(free, axis=1) <= first.sum(axis=1, keepdims=True))


def spearman_brown(halves: float) -> float:
    """Reliability of all rows from the correlation of two halves; 0 where they do not agree at all."""
    return max(0.0, 2 * halves / (1 + halves)) if halves > -1 else 0.0


def rows_wanted(reliability: float) -> float | None:
    """How many times as many rows would give WANTED (Spearman-Brown's prophecy)."""
    if reliability <= 0:
        return None
    return WANTED / (1 - WANTED) * (1 - reliability) / reliability


def kappa(one: IntArray, other: IntArray, m: int) -> float:
    """Cohen's kappa of two divisions into buckets 1..m: 0 is chance, 1 the same buckets."""
    agree = float((one == other).mean())
    chance = sum(float((one == bucket).mean() * (other == bucket).mean()) for bucket in range(1, m + 1))
    return (agree - chance) / (1 - chance) if chance < 1 else 1.0


def map_reliability(
    gram: FloatArray,
    effects: Effects,
    variant: SensitivityVariant,
    m: int,
    generator: np.random.Generator,
) -> list[Reliability]:
    """Of O, H_gen, H_safe, S, C and of the buckets (arguments as in `uncertainty.draw_maps`)."""
    folds = gram.shape[-1] // 2
    if folds < 2:
        return [Reliability(name, None, None, None) for name in (*QUANTITIES, "bucket")]
    first = [half_counts(folds, generator) for _ in range(2)]
    count = len(first[0])
    sides = [
        draw_maps(gram, effects, tuple(halves), variant, m)._asdict()
        for halves in (first, [other_halves(half) for half in first])
    ]
    found = []
    for name in QUANTITIES:
        pairs = [[np.abs(side[name][split]).ravel() for side in sides] for split in range(count)]
        if any(np.ptp(values) == 0 for pair in pairs for values in pair):
            found.append(Reliability(name, None, None, None))
            continue
        halves = float(np.mean([stats.spearmanr(*pair).statistic for pair in pairs]))
        whole = spearman_brown(halves)
        found.append(Reliability(name, halves, whole, rows_wanted(whole)))
    agreement = [kappa(*(side["bucket"][split] for side in sides), m) for split in range(count)]
    return [*found, Reliability("bucket", float(np.mean(agreement)), None, None)]


def in_words(found: list[Reliability]) -> str:
    """One line for the log."""
    names = dict(zip(QUANTITIES, ("O", "H_gen", "H_safe", "S", "C"), strict=True))
    words = [f"{names[each.quantity]} {number(each.reliability)}" for each in found if each.quantity in names]
    return (
        f"reliability {', '.join(words)}; buckets of two halves agree with kappa {number(found[-1].halves)}"
    )


def doubt_of(found: list[Reliability]) -> str | None:
    """Why no conclusion can rest on the map, if none can."""
    score = found[QUANTITIES.index("conflict_score")]
    if score.reliability is None:
        return (
            "whether C repeats itself is unknown: a half of the rows gives a constant, or there is one fold"
        )
    if score.reliability >= ENOUGH:
        return None
    more = "more rows would not help"
    if score.more_rows is not None:
        more = f"{score.more_rows:.0f} times as many rows would give {WANTED}"
    return f"C repeats itself with {score.reliability:.2f} only, no conclusion can rest on it; {more}"


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
