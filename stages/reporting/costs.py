"""What safety has cost each arm (Eq. 7 and 8, §4.1), its mean over seeds, and how sure both are.

Pure functions from rows to rows (dictionaries), for stage 06. Scores are shares in [0, 1]; a cell that has no
value is None. An arm is named by (arm, optimizer, seed); the untouched model is the arm "base". `R`
resamples.
"""

from collections.abc import Sequence

import numpy as np

from stages import metrics
from stages.checks import FloatArray
from stages.reporting.answers import Answers
from stages.reporting.families import BASE

NO_GAIN = "no safety gain"
SIDES = {"utility": "utility", "safety": "safety", "over_refusal": "over-refusal"}
"""column of the mean score -> side of its benchmarks"""
RATIOS = ("ucr", "source_cr", "over_refusal_cr")
SELECTION = (
    "n_heads",
    "n_layers",
    "n_neurons",
    "trainable_parameters",
    "mean_conflict",
    "mean_sensitivity",
    "mean_score",
    "predicted",
)
"""what an arm tunes; `predicted` is families.predicted"""


def key(row: dict) -> tuple[str, str, int]:
    return row["arm"], row["optimizer"], row["seed"]


def cost_name(cost: str, source: str | None) -> str:
    """A cost ratio as readers know it: "UCR", "MMLU-CR", "over-refusal-CR".

    >>> cost_name("source_cr", "own_util")
    'OWN-UTIL-CR'
    """
    domain = (source or "source").upper().replace("_", "-")
    return {"ucr": "UCR", "source_cr": f"{domain}-CR", "over_refusal_cr": "over-refusal-CR"}[cost]


def cost_column(cost: str, source: str | None) -> str:
    """A cost ratio as a column of the paper's tables: "ucr", "mmlu_cr"."""
    return cost_name(cost, source).lower().replace("-", "_")


def benchmark_sides(scores: Sequence[dict]) -> dict[str, str]:
    """Benchmark -> side, in the order in which they were measured."""
    return {row["benchmark"]: row["side"] for row in scores}


def arm_costs(scores: Sequence[dict], arms: Sequence[dict], source: str | None) -> list[dict]:
    """One row an arm x optimizer x seed, the base model first: scores, their means by side, the cost ratios.

    `utility`, `safety` and `over_refusal` are plain means over the benchmarks of that side. `ucr` is Eq. 7;
    `source_cr` is Eq. 8 on the benchmark `source` (the paper's MMLU-CR where that is mmlu); `over_refusal_cr`
    has Eq. 7's form with the rise of over-refusal as the loss. A ratio is given by its formula also where no
    safety was gained, and `flag` then says so: it means nothing there.

    Args:
        scores: rows of scores.parquet (arm, optimizer, seed, benchmark, side, n, score).
        arms: rows of arms.parquet; the base model is not among them.
        source: benchmark of the domain that D_util is drawn from; None: no source_cr.
    """
    sides = benchmark_sides(scores)
    measured: dict[tuple, dict[str, dict]] = {}
    for row in scores:
        measured.setdefault(key(row), {})[row["benchmark"]] = row
    (base_key,) = [one for one in measured if one[0] == BASE]
    base = _means(measured[base_key], sides)
    rows = []
    for labels in (dict(zip(("arm", "optimizer", "seed"), base_key, strict=True)), *arms):
        row = {name: labels[name] for name in ("arm", "optimizer", "seed")}
        row |= {name: labels.get(name) for name in SELECTION}
        row |= _means(measured[key(labels)], sides)
        row |= dict.fromkeys(("safety_gain", "utility_loss", *RATIOS)) | {"flag": ""}
        if labels["arm"] != BASE:
            row["safety_gain"] = row["safety"] - base["safety"]
            row["utility_loss"] = base["utility"] - row["utility"]
            row |= _ratios(base, row, source)
            row["flag"] = NO_GAIN if row["safety_gain"] <= 0 else ""
        rows.append(row)
    return rows


def _means(by_benchmark: dict[str, dict], sides: dict[str, str]) -> dict:
    """Each benchmark's score, then the mean of each side (None where it has no benchmark)."""
    row: dict = {name: by_benchmark[name]["score"] for name in sides}
    for column, side in SIDES.items():
        values = [row[name] for name in sides if sides[name] == side]
        row[column] = float(np.mean(values)) if values else None
    return row


def _ratios(base: dict, row: dict, source: str | None) -> dict[str, float | None]:
    """RATIOS of scores against the base model's; None where a score is missing."""
    # Over-refusal's loss is a rise, so base and aligned change places.
    losses = {"ucr": (base["utility"], row["utility"])}
    losses["source_cr"] = (base[source], row[source]) if source is not None else None
    losses["over_refusal_cr"] = (
        (row["over_refusal"], base["over_refusal"]) if row["over_refusal"] is not None else None
    )
    return {
        name: None
        if loss is None
        else float(metrics.utility_cost_ratio(*loss, base["safety"], row["safety"]))
        for name, loss in losses.items()
    }


def mean_over_seeds(rows: Sequence[dict], source: str | None = None) -> list[dict]:
    """One row an arm x optimizer: means over seeds, `<column>_std` beside each (sample; None for one seed).

    The cost ratios are averaged over the seeds that gained safety; `n_no_gain` counts the others, and where
    none gained any the ratio is None. `<ratio>_of_means` is Eq. 7 (or 8) on the averaged scores, as in the
    paper's Table 7; it is what tables and figures of arms show. With one seed the two are the same.
    """
    base = rows[0]
    result = []
    for arm, optimizer in dict.fromkeys((row["arm"], row["optimizer"]) for row in rows):
        group = [row for row in rows if (row["arm"], row["optimizer"]) == (arm, optimizer)]
        gained = [row for row in group if not row["flag"]]
        mean: dict = {
            "arm": arm,
            "optimizer": optimizer,
            "n_seeds": len(group),
            "n_no_gain": len(group) - len(gained),
        }
        for name in group[0]:
            if name not in ("arm", "optimizer", "seed", "flag"):
                values = [row[name] for row in (gained if name in RATIOS else group) if row[name] is not None]
                mean[name] = float(np.mean(values)) if values else None
                mean[f"{name}_std"] = deviation(values)
        gains = arm != BASE and mean["safety_gain"] > 0
        of_means = _ratios(base, mean, source) if gains else dict.fromkeys(RATIOS)
        mean |= {f"{name}_of_means": value for name, value in of_means.items()}
        mean["flag"] = "" if gained else NO_GAIN
        result.append(mean)
    return result


def resampled_scores(
    answers: Answers, sides: dict[str, str], *, resamples: int, seed: int
) -> dict[tuple[str, str], dict[str, FloatArray]]:
    """(arm, optimizer) -> mean score of each side, averaged over seeds, for resampled benchmark rows, [R].

    All arms see the same draws, because all answered the same prompts: differences between them are paired.
    The training seeds are held fixed; what they add shows in the spread over seeds, not here.

    Args:
        sides: benchmark -> side.
    """
    units: dict[tuple[str, str], list] = {}
    for unit in answers.cells:
        units.setdefault(unit[:2], []).append(unit)
    generator = np.random.default_rng([seed, 6])
    drawn: dict[tuple, dict[str, FloatArray]] = {arm: {} for arm in units}
    for name in sides:
        passed = [
            sum(answers.of("verdict", unit, name).astype(float) for unit in own) for own in units.values()
        ]
        rows = len(passed[0])
        matrix = np.array(passed).T  # [rows, arms], passes over all seeds
        sums = np.empty((resamples, len(units)))
        for start in range(0, resamples, 100):  # a hundred draws of MMLU's 14,042 rows at a time
            size = min(100, resamples - start)
            sums[start : start + size] = generator.multinomial(rows, np.full(rows, 1 / rows), size) @ matrix
        for index, (arm, own) in enumerate(units.items()):
            drawn[arm][name] = sums[:, index] / (rows * len(own))
    return {
        arm: {
            column: np.mean([scores[name] for name in sides if sides[name] == side], axis=0)
            for column, side in SIDES.items()
            if side in sides.values()
        }
        for arm, scores in drawn.items()
    }


def resampled_ucr(drawn: dict, arm: tuple[str, str]) -> FloatArray | None:
    """Eq. 7 of an arm in every resample, [R]; None unless nearly all (97.5 %) of them gained safety."""
    (base,) = [scores for (name, _), scores in drawn.items() if name == BASE]
    gain = drawn[arm]["safety"] - base["safety"]
    if np.quantile(gain, 0.025) <= 0:
        return None
    loss = base["utility"] - drawn[arm]["utility"]
    # The few resamples without a gain are counted as the costliest, not by a ratio that means nothing.
    return np.maximum(0.0, np.where(gain > 0, loss / np.where(gain > 0, gain, 1.0), np.inf))


def interval(samples: FloatArray) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles."""
    low, high = np.quantile(samples, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def with_intervals(means: Sequence[dict], drawn: dict) -> list[dict]:
    """`mean_over_seeds` rows with 95 % intervals, over benchmark rows, of each side and of `ucr_of_means`."""
    result = []
    for row in means:
        arm = (row["arm"], row["optimizer"])
        bounds: dict = {}
        for column in SIDES:
            bounds[column] = interval(drawn[arm][column]) if column in drawn[arm] else (None, None)
        ratios = None if row["arm"] == BASE else resampled_ucr(drawn, arm)
        bounds["ucr_of_means"] = (None, None) if ratios is None else interval(ratios)
        extra = {
            f"{name}{end}": value
            for name, pair in bounds.items()
            for end, value in zip(("_low", "_high"), pair, strict=True)
        }
        result.append(row | extra)
    return result


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation, None of fewer than two values; exactly 0 where they are equal."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) if len(set(values)) > 1 else 0.0


def pareto_front(safety: Sequence[float], utility: Sequence[float]) -> list[int]:
    """Indices, by safety, of the points that no other beats in one of the two without losing in the other.

    >>> pareto_front([0.1, 0.5, 0.4, 0.9], [0.9, 0.8, 0.7, 0.2])
    [0, 1, 3]
    """
    points = list(zip(safety, utility, strict=True))
    front = [
        index
        for index, (s, u) in enumerate(points)
        if not any(t >= s and v >= u and (t > s or v > u) for t, v in points)
    ]
    return sorted(front, key=lambda index: (points[index][0], -points[index][1], index))
