"""Arms by name: which heads are tuned (§3.5, §4.2, App. F.1 to F.4).

    full                        all heads
    random                      as many heads as the smallest bucket, drawn anew by each seed
    bucket1 .. bucketM          a bucket of C; 1 is the Risky Zone, M the Safe Zone (Tables 1, 2, 7)
    bucket1_O, bucket1_S        a bucket of heads ranked by O or by S alone (Tables 7, 8)
    bucket1of8                  a bucket of another number of buckets
    top50, bottom75             the 25, 50 or 75 % of heads of highest, of lowest C (Table 9)
    bucket1@mmlu100             by a map from other utility rows (--maps; Tables 10, 11)
    buckets, buckets_O, bucketsof8, buckets@mmlu100         all buckets of a kind
    neurons256, neurons256_lam0.8, randomneurons256         neurons: NeuronTune (stages/neurons.py)

Ratios are whole quarters, so that bottom25 is bucket4 (of four) and is not tuned twice.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from backends.base import Head
from backends.errors import InputError
from stages import metrics

QUARTERS = 4
_NAME = re.compile(
    r"(?P<kind>full|random|bucket|buckets|top|bottom)(?P<number>[1-9]\d*)?(?:of(?P<of>[1-9]\d*))?"
    r"(?:_(?P<score>[OS]))?(?:@(?P<map>[a-z0-9]+))?"
)
_NEURONS = re.compile(r"(?P<kind>neurons|randomneurons)(?P<number>0|[1-9]\d*)(?:_lam(?P<lam>0(?:\.\d+)?|1))?")
LAM = 0.5
"""weight of the safety loss in an arm of neurons that names none"""
MAML = "maml"
"""the optimizer of arms of neurons"""


@dataclass(frozen=True)
class Arm:
    """An arm, taken apart."""

    kind: Literal["full", "random", "bucket", "top", "bottom", "neurons", "randomneurons"]
    number: int = 0
    """of the bucket, from 1; of top and bottom the percentage; of neurons how many of each kind; else 0"""
    of: int = 0
    """how many buckets there are; 0 where it is none"""
    score: Literal["C", "O", "S"] = "C"
    """what heads are ranked by"""
    map: str = ""
    """the map's name; empty: the run's own"""
    lam: float = 0.0
    """of neurons: weight of the safety loss"""

    @property
    def of_neurons(self) -> bool:
        return self.kind in ("neurons", "randomneurons")


@dataclass(frozen=True)
class HeadMap:
    """What heads are ranked by, each [L, H]."""

    conflict: np.ndarray
    sensitivity: np.ndarray
    score: np.ndarray

    def by(self, score: str) -> np.ndarray:
        return {"C": self.score, "O": self.conflict, "S": self.sensitivity}[score]


def parse(name: str, m: int) -> Arm:
    """An arm by its name, in a run of `m` buckets. ValueError where it is none; "buckets…" has to be expanded
    before.

    >>> parse("bucket2_O", 4)
    Arm(kind='bucket', number=2, of=4, score='O', map='', lam=0.0)
    """
    if found := _NEURONS.fullmatch(name):
        return Arm(found["kind"], int(found["number"]), lam=float(found["lam"] or LAM))
    found = _NAME.fullmatch(name)
    if not found or found["kind"] == "buckets":
        raise ValueError(f"unknown arm {name!r}")
    kind, number, of = found["kind"], int(found["number"] or 0), int(found["of"] or 0)
    plain = not (number or of or found["score"] or found["map"])
    if kind in ("full", "random"):
        good = plain
    elif kind == "bucket":
        of = of or m
        good = 1 <= number <= of
    else:
        good = number in (25, 50, 75) and not of
    if not good:
        raise ValueError(f"unknown arm {name!r}")
    return Arm(kind, number, of, found["score"] or "C", found["map"] or "")


def name_of(arm: Arm, m: int) -> str:
    """The shortest name of an arm; the same heads by definition have the same name.

    >>> name_of(parse("bottom25", 4), 4), name_of(parse("bucket1of4", 4), 4), name_of(parse("top25", 8), 8)
    ('bucket4', 'bucket1', 'bucket1of4')
    """
    if arm.kind in ("top", "bottom") and arm.number == 100 // QUARTERS:
        arm = replace(arm, kind="bucket", number=1 if arm.kind == "top" else QUARTERS, of=QUARTERS)
    if arm.kind in ("full", "random"):
        return arm.kind
    if arm.of_neurons:
        return f"{arm.kind}{arm.number}{f'_lam{arm.lam:g}' if arm.lam != LAM else ''}"
    of = f"of{arm.of}" if arm.of not in (0, m) else ""
    score = f"_{arm.score}" if arm.score != "C" else ""
    return f"{arm.kind}{arm.number}{of}{score}{f'@{arm.map}' if arm.map else ''}"


def expand(names: Iterable[str], m: int) -> list[str]:
    """Every arm once, under its shortest name, in order; "buckets…" stands for all buckets of its kind.

    >>> expand(["full", "buckets", "top25", "top50"], 2)
    ['full', 'bucket1', 'bucket2', 'bucket1of4', 'top50']
    """
    found: list[str] = []
    for name in names:
        whole = _NAME.fullmatch(name)
        if whole and whole["kind"] == "buckets" and not whole["number"]:
            count = int(whole["of"] or m)
            each = [name.replace("buckets", f"bucket{number}", 1) for number in range(1, count + 1)]
        else:
            each = [name]
        found += [name_of(parse(one, m), m) for one in each]
    return list(dict.fromkeys(found))


def check(option: str, names: Iterable[str], m: int, maps: Iterable[str], pairs: int) -> None:
    """InputError names an arm that there is not, whose map is not asked for, or whose neurons are not
    attributed (`pairs` is 0)."""
    try:
        arms = [parse(name, m) for name in expand(names, m)]
    except ValueError as error:
        raise InputError(
            f"{option}: {error}: there are full, random, bucket1 to bucket{m} (also _O, _S, of8, …), top50, "
            f"bottom50, neurons256, … (stages/arms.py)"
        ) from None
    for arm in arms:
        if arm.map and arm.map not in set(maps):
            raise InputError(f"{option}: @{arm.map} needs --maps {arm.map}=POOL:ROWS")
        if arm.of_neurons and not pairs:
            raise InputError(f"{option}: arms of neurons need --pairs (32, say), which they are found by")


def units(settings) -> list[dict]:
    """What stage 04 tunes: arm, optimizer and seed of each, by seed; ablations by plain fine-tuning only, and
    neurons as they are tuned."""
    m = settings.buckets
    named = [(arm, optimizer) for optimizer in settings.optimizers for arm in expand(settings.arms, m)]
    named += [(arm, "sft") for arm in expand((*settings.ablations, *neuron_arms(settings)), m)]
    named = [(arm, MAML if parse(arm, m).of_neurons else optimizer) for arm, optimizer in named]
    return [
        {"arm": arm, "optimizer": optimizer, "seed": seed}
        for seed in settings.seeds
        for arm, optimizer in dict.fromkeys(named)
    ]


def neuron_arms(settings) -> list[str]:
    """The arms that --neurons and --lam ask for."""
    return [f"neurons{count}_lam{lam:g}" for count in settings.neurons for lam in settings.lam]


def heads(name: str, maps: Mapping[str, HeadMap], m: int, seed: int) -> list[Head]:
    """The heads of an arm, sorted.

    Args:
        maps: by name; "" is the run's own.
        m: the run's number of buckets.
        seed: of the random arm's draw, which is as large as the smallest bucket.
    """
    arm = parse(name, m)
    ranked = maps[arm.map].by(arm.score)
    every = np.argwhere(np.isfinite(ranked))
    if arm.kind == "full":
        chosen = every
    elif arm.kind == "random":
        size = np.bincount(metrics.buckets(ranked, m).ravel())[1:].min()
        chosen = every[np.random.default_rng([seed, 4]).choice(len(every), size, replace=False)]
    elif arm.kind == "bucket":
        chosen = np.argwhere(metrics.buckets(ranked, arm.of) == arm.number)
    else:
        quarter, share = metrics.buckets(ranked, QUARTERS), arm.number * QUARTERS // 100
        chosen = np.argwhere(quarter <= share if arm.kind == "top" else quarter > QUARTERS - share)
    return sorted((int(layer), int(head)) for layer, head in chosen)
