"""Arms: which heads are tuned (§3.5, §4.2, App. F.1 to F.4), or which neurons (NeuronTune).

    full                        all heads
    random                      as many heads as the smallest bucket, drawn anew by each seed
    bucket1 .. bucketM          a bucket of C; 1 is the Risky Zone, M the Safe Zone (Tables 1, 2, 7)
    bucket1_O, bucket1_S        a bucket of heads ranked by O or by S alone (Tables 7, 8)
    bucket1of8                  a bucket of another number of buckets
    draws32                     32 quarters of the heads, drawn with preferences along O and along S, each
                                with a training seed of its own
    top50, bottom75             the 25, 50 or 75 % of heads of highest, of lowest C (Table 9)
    bucket1@mmlu100             by a map from other utility rows (--maps; Tables 10, 11)
    bucket4-rediagnosed         a bucket that is drawn anew every --rediagnose steps, by the map of the model
                                as it is then: rows of B that leave it keep what they have and stop moving,
                                rows that enter start to move
    buckets, buckets_O, bucketsof8, buckets@mmlu100, buckets-rediagnosed        all buckets of a kind
    neurons256, neurons256_lam0.8, randomneurons256         neurons: stages.method.neurons

Names are read here, from a command line or a preset; all else sees an `Arm`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from stages.method.arrays import FloatArray
from stages.method.heads import HeadMap, Ranking
from stages.method.metrics import buckets, percentile_rank

Kind = Literal[
    "base", "full", "random", "bucket", "rediagnosed", "top", "bottom", "draw", "neurons", "randomneurons"
]
SHARES = (25, 50, 75)
"""percentages of top and bottom: whole quarters, so that bottom25 is bucket 4 of 4 and is not tuned twice"""
QUARTERS = 4
LAM = 0.5
"""weight of the safety loss in an arm of neurons that names none"""
MAML = "maml"
"""the optimizer of arms of neurons"""
OWN = "util"
"""the run's own map"""
STRONGEST = 4.0
"""preference of a draw: a head at one end of a ranking is exp(4) times as likely as one at the other"""
DRAW_SEEDS = 100_000
"""a draw's training seed is its number beyond this"""

_HEADS = re.compile(
    r"(?P<kind>full|random|bucket|buckets|draw|draws|top|bottom)(?P<number>[1-9]\d*)?(?:of(?P<of>[1-9]\d*))?"
    r"(?:_(?P<ranked_by>[OS]))?(?:@(?P<map>[a-z0-9]+))?(?P<again>-rediagnosed)?"
)
_NEURONS = re.compile(r"(?P<kind>neurons|randomneurons)(?P<number>0|[1-9]\d*)(?:_lam(?P<lam>0(?:\.\d+)?|1))?")


@dataclass(frozen=True)
class Arm:
    """What is tuned. Fields that do not apply to a kind are None."""

    name: str
    """the shortest one; the same heads by definition have the same name"""
    kind: Kind
    bucket: int | None = None
    """its number, from 1 (riskiest)"""
    of: int | None = None
    """how many buckets, or draws, there are"""
    ranked_by: Ranking | None = None
    """of arms of heads; all heads, and heads at random, count as ranked by C"""
    map: str | None = None
    """the map that ranks the heads"""
    share: int | None = None
    """of top and bottom: percentage of heads"""
    neurons: int | None = None
    """of neurons: how many of each kind"""
    lam: float | None = None
    """of neurons: weight of the safety loss"""
    draw: int | None = None
    """its number, from 1, of `of` draws"""

    @property
    def of_neurons(self) -> bool:
        return self.neurons is not None

    @property
    def rediagnosed(self) -> bool:
        """A bucket that is drawn anew while it is tuned."""
        return self.kind == "rediagnosed"

    def is_zone(self, m: int) -> bool:
        """Whether it is one of the run's own `m` buckets of C: the Risky Zone to the Safe Zone."""
        return self.kind == "bucket" and (self.of, self.ranked_by, self.map) == (m, "C", OWN)

    def is_main(self, m: int) -> bool:
        """Whether it is part of the paper's main comparison (Tables 1 and 2) and no ablation."""
        return self.kind in ("base", "full", "random") or self.is_zone(m)


BASE = Arm("base", "base")
"""the untouched model"""
ARM_FIELDS = [field.name for field in fields(Arm) if field.name != "name"]
"""columns of arms.parquet that describe an arm"""


@dataclass(frozen=True)
class ArmRun:
    """An arm as it is tuned; the base model has neither optimizer nor seed."""

    arm: Arm
    optimizer: str | None
    seed: int | None

    @property
    def name(self) -> str:
        """Of its unit and its adapter: "bucket4-sft-21"; "base" is the untouched model."""
        return "-".join(str(part) for part in (self.arm.name, self.optimizer, self.seed) if part is not None)

    @property
    def labels(self) -> dict:
        """Its columns in every table."""
        return {"arm": self.arm.name, "optimizer": self.optimizer, "seed": self.seed}


BASE_RUN = ArmRun(BASE, None, None)


def arm_from_row(row: Mapping) -> Arm:
    """The arm of a row of arms.parquet, whose missing values pandas may have turned into NaN."""
    found = {name: None if row[name] is None or row[name] != row[name] else row[name] for name in ARM_FIELDS}
    whole = {
        name: int(found[name])
        for name in ("bucket", "of", "share", "neurons", "draw")
        if found[name] is not None
    }
    return Arm(row["arm"], **(found | whole))


def head_arm(
    kind: Kind,
    number: int | None,
    m: int,
    of: int | None = None,
    ranked_by: Ranking = "C",
    map_name: str = OWN,
) -> Arm:
    """An arm of heads, in a run of `m` buckets; ValueError where there is none such.

    Args:
        number: of the bucket or the draw; of top and bottom the percentage.
        of: how many buckets; None: `m`.

    >>> head_arm("bottom", 25, 4).name, head_arm("bucket", 1, 4, 4).name, head_arm("top", 25, 8).name
    ('bucket4', 'bucket1', 'bucket1of4')
    """
    suffix = ("" if ranked_by == "C" else f"_{ranked_by}") + ("" if map_name == OWN else f"@{map_name}")
    if kind in ("full", "random") and number is None and of is None and not suffix:
        return Arm(kind, kind, ranked_by="C", map=OWN)
    if kind in ("top", "bottom") and number == 100 // QUARTERS and of is None:
        kind, number, of = "bucket", 1 if kind == "top" else QUARTERS, QUARTERS
    if kind in ("top", "bottom") and number in SHARES and of is None:
        return Arm(f"{kind}{number}{suffix}", kind, ranked_by=ranked_by, map=map_name, share=number)
    if kind == "draw" and number is not None and of is not None and number <= of and ranked_by == "C":
        grid_of(of)
        return Arm(f"draw{number}of{of}{suffix}", kind, of=of, ranked_by="C", map=map_name, draw=number)
    of = of or m
    if kind in ("bucket", "rediagnosed") and number is not None and 1 <= number <= of:
        name = f"bucket{number}{f'of{of}' if of != m else ''}{suffix}"
        name += "-rediagnosed" if kind == "rediagnosed" else ""
        return Arm(name, kind, bucket=number, of=of, ranked_by=ranked_by, map=map_name)
    raise ValueError("no such arm")


def neuron_arm(kind: Literal["neurons", "randomneurons"], count: int, lam: float = LAM) -> Arm:
    """An arm of `count` neurons of each kind."""
    return Arm(f"{kind}{count}{f'_lam{lam:g}' if lam != LAM else ''}", kind, neurons=count, lam=lam)


def parse(names: Iterable[str], m: int) -> tuple[Arm, ...]:
    """Every arm once, in order; "buckets…" stands for all buckets of its kind. ValueError names one that
    there is not.

    >>> [arm.name for arm in parse(["full", "buckets", "top25", "top50"], 2)]
    ['full', 'bucket1', 'bucket2', 'bucket1of4', 'top50']
    """
    return tuple(dict.fromkeys(arm for name in names for arm in _parse(name, m)))


def _parse(name: str, m: int) -> list[Arm]:
    if found := _NEURONS.fullmatch(name):
        return [neuron_arm(found["kind"], int(found["number"]), float(found["lam"] or LAM))]
    if not (found := _HEADS.fullmatch(name)):
        raise ValueError(f"unknown arm {name!r}")
    kind = found["kind"]
    number, of = (int(found[part]) if found[part] else None for part in ("number", "of"))
    numbers = [number]
    if kind == "buckets" and number is None:
        kind, numbers = "bucket", range(1, (of or m) + 1)
    if kind == "draws" and number is not None and of is None:
        kind, of, numbers = "draw", number, range(1, number + 1)
    if found["again"]:
        if kind != "bucket":
            raise ValueError(f"unknown arm {name!r}")
        kind = "rediagnosed"
    try:
        return [
            head_arm(kind, each, m, of, found["ranked_by"] or "C", found["map"] or OWN) for each in numbers
        ]
    except ValueError:
        raise ValueError(f"unknown arm {name!r}") from None


def arm_runs(
    main: Sequence[Arm], ablations: Sequence[Arm], optimizers: Sequence[str], seeds: Sequence[int]
) -> list[ArmRun]:
    """What stage 04 tunes, by seed: `main` by each optimizer, ablations by plain fine-tuning only, arms of
    neurons by MAML; then every draw once."""
    pairs = [(arm, optimizer) for optimizer in optimizers for arm in main] + [
        (arm, "sft") for arm in ablations
    ]
    pairs = [(arm, MAML if arm.of_neurons else optimizer) for arm, optimizer in pairs]
    pairs = dict.fromkeys(pairs)
    named = [ArmRun(*pair, seed) for seed in seeds for pair in pairs if pair[0].draw is None]
    return named + [ArmRun(*pair, DRAW_SEEDS + pair[0].draw) for pair in pairs if pair[0].draw is not None]


def select_heads(
    arm: Arm, head_map: HeadMap, m: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """The heads of an arm, sorted.

    Args:
        head_map: the one that `arm.map` names.
        m: the run's number of buckets.
        generator: of the random arm's draw, and of the draws; both are as large as the smallest bucket.
    """
    ranked = head_map.by(arm.ranked_by)
    every = np.argwhere(np.isfinite(ranked))
    size = np.bincount(buckets(ranked, m).ravel())[1:].min()
    if arm.kind == "full":
        chosen = every
    elif arm.kind == "draw":
        chosen = draw_heads(head_map, size, preferences(arm.draw, arm.of), generator)
    elif arm.kind == "random":
        chosen = every[generator.choice(len(every), size, replace=False)]
    elif arm.bucket:
        chosen = bucket_heads(arm, ranked)
    else:
        quarter, count = buckets(ranked, QUARTERS), arm.share * QUARTERS // 100
        chosen = np.argwhere(quarter <= count if arm.kind == "top" else quarter > QUARTERS - count)
    return sorted((int(layer), int(head)) for layer, head in chosen)


def bucket_heads(arm: Arm, ranked: FloatArray) -> np.ndarray:
    """The heads of a bucket, [n, 2] of (layer, head), by what they are ranked by, [L, H]."""
    return np.argwhere(buckets(ranked, arm.of) == arm.bucket)


def grid_of(count: int) -> tuple[int, int]:
    """The grid on which draws stand, as square as may be. ValueError where `count` is no product.

    >>> grid_of(32), grid_of(9)
    ((4, 8), (3, 3))
    """
    side = next((side for side in range(int(count**0.5), 1, -1) if count % side == 0), None)
    if side is None:
        raise ValueError("no such arm")
    return side, count // side


def preferences(draw: int, count: int) -> tuple[float, float]:
    """How strongly a draw prefers heads of high O and of high S: the draws are a grid of both, so that
    neither follows from the other."""
    grid = grid_of(count)
    at = divmod(draw - 1, grid[1])
    return tuple(
        float(np.linspace(-STRONGEST, STRONGEST, side)[place]) for side, place in zip(grid, at, strict=True)
    )


def draw_heads(
    head_map: HeadMap, size: int, strengths: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """`size` heads, (layer, head) each, with weights exp(strength * rank), ranks from -1/2 to 1/2; every
    layer has its share of them, so that depth does not follow from the preferences."""
    layers, heads = head_map.shape
    of_layer = np.full(layers, size // layers)
    of_layer[generator.choice(layers, size % layers, replace=False)] += 1
    preference = sum(
        strength * (percentile_rank(head_map.by(ranking)) - 0.5)
        for strength, ranking in zip(strengths, ("O", "S"), strict=True)
    )
    weights = np.exp(preference)
    chosen = []
    for layer, count in enumerate(of_layer):
        share = weights[layer] / weights[layer].sum()
        chosen += [(layer, head) for head in generator.choice(heads, count, replace=False, p=share)]
    return np.array(chosen).reshape(-1, 2)


def required_heads(arms: Iterable[Arm]) -> int:
    """The largest number of buckets that an arm needs: a model has to have as many heads."""
    return max((arm.of if arm.bucket else QUARTERS if arm.share else 0 for arm in arms), default=0)
