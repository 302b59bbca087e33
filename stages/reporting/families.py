"""Which arms belong together, and what they are called: buckets of one ranking are a family (App. E, F).

An arm's name is taken apart by stages/arms.py; "base" is the untouched model and no arm. `m` is the run's own
number of buckets.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from stages import arms

BASE = "base"
REASONING = ("gsm8k", "problems")
"""what a pool of worked problems has in its name"""


class Family(NamedTuple):
    """All buckets of one ranking of the heads."""

    score: str
    """C, O or S"""
    of: int
    """how many buckets there are"""
    map: str
    """the map's name; empty: the run's own"""


def parse(name: str, m: int) -> arms.Arm | None:
    """An arm by its name; None for the base model."""
    return None if name == BASE else arms.parse(name, m)


def family(name: str, m: int) -> Family | None:
    """The family of a bucket; None for any other arm.

    >>> family("bucket3of8", 4)
    Family(score='C', of=8, map='')
    """
    arm = parse(name, m)
    return Family(arm.score, arm.of, arm.map) if arm and arm.kind == "bucket" else None


def own(m: int) -> Family:
    """The run's own buckets of C: the Risky Zone to the Safe Zone."""
    return Family("C", m, "")


def bucket_number(name: str, m: int) -> int | None:
    """3 for "bucket3", a bucket of the run's own; None for any other arm.

    >>> bucket_number("bucket3", 4), bucket_number("bucket3_O", 4)
    (3, None)
    """
    return arms.parse(name, m).number if family(name, m) == own(m) else None


def is_main(name: str, m: int) -> bool:
    """Whether an arm is of the paper's main comparison (Tables 1 and 2) and no ablation.

    >>> [is_main(name, 4) for name in ("base", "full", "bucket4", "bucket4_S", "top50")]
    [True, True, True, False, False]
    """
    arm = parse(name, m)
    return arm is None or arm.kind in ("full", "random") or family(name, m) == own(m)


def of_neurons(name: str, m: int) -> bool:
    """Whether an arm is NeuronTune's."""
    arm = parse(name, m)
    return arm is not None and arm.of_neurons


def predicted(row: Mapping, maps: Mapping[str, arms.HeadMap], m: int) -> float | None:
    """Mean over an arm's heads of what it was ranked by, in the map that ranked it: the x of Figures 5 and 6.

    Args:
        row: of arms.parquet (arm, layers, heads).
        maps: by name; "" is the run's own. All heads and random ones count as ranked by the run's own C; arms
            of neurons by none.
    """
    arm = arms.parse(row["arm"], m)
    if arm.of_neurons:
        return None
    return float(maps[arm.map].by(arm.score)[np.array(row["layers"]), np.array(row["heads"])].mean())


# Words


def label(one: Family, m: int) -> str:
    """A family for a table: "C", "O", "C of 8", "C by mmlu100"."""
    of = f" of {one.of}" if one.of != m else ""
    return f"{one.score}{of}{f' by {one.map}' if one.map else ''}"


def words(name: str, m: int) -> str:
    """An arm for a sentence: "bucket 4 (Safe Zone)", "bucket 2 of 8", "bottom 50 % of C"."""
    arm = parse(name, m)
    if arm is None or arm.kind in ("full", "random"):
        return {"full": "all heads", "random": "random heads"}.get(name, name)
    if arm.of_neurons:
        drawn = "random " if arm.kind == "randomneurons" else ""
        lam = f" at lam {arm.lam:g}" if arm.lam != arms.LAM else ""
        return f"{arm.number} + {arm.number} {drawn}neurons{lam}"
    if arm.kind != "bucket":
        where = f" of map {arm.map}" if arm.map else ""
        return f"{arm.kind} {arm.number} % of {arm.score}{where}"
    if (number := bucket_number(name, m)) is not None:
        zones = {1: " (Risky Zone)", m: " (Safe Zone)"} if m > 1 else {}
        return f"bucket {number}{zones.get(number, '')}"
    text = f"bucket {arm.number}{f' of {arm.of}' if arm.of != m else ''}"
    text += f" by {arm.score}" if arm.score != "C" else ""
    return f"{text} of map {arm.map}" if arm.map else text
