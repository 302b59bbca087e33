"""What of the paper's claims holds in a run, each with its evidence.

A comparison of two arms "holds" or not where the paired 95 % interval over benchmark rows excludes zero, and
is "within noise" where it does not. A correlation has to be beyond what unrelated points give in one case of
twenty.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from stages import arms, metrics
from stages.checks import FloatArray
from stages.maps import Map
from stages.reporting import correlations, costs, families
from stages.reporting.findings import percent, signed, unsure_buckets

HOLDS, FAILS, NOISE, UNKNOWN = "holds", "does not hold", "within noise", "cannot be told"
Outcome = tuple[str, str]
"""evidence, verdict"""


def claims(
    means: Sequence[dict],
    rows: Sequence[dict],
    found: Sequence[dict],
    drawn: dict,
    m: int,
    source: str | None,
    others: Mapping[str, Map],
    util_source: str,
) -> list[dict]:
    """The paper's claims and what this run says of each: optimizer, claim, evidence, verdict.

    Those about ablations (App. F) only where their arms were tuned.

    Args:
        means: rows of costs.with_intervals; rows: of costs.arm_costs; found: of correlations.correlations.
        drawn: costs.resampled_scores.
        others: the run's other maps; util_source: the pool of its own.
    """
    result = []

    def add(optimizer: str, claim: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            labels = {"optimizer": optimizer, "claim": claim}
            result.append(labels | {"evidence": outcome[0], "verdict": outcome[1]})

    main = [row for row in means[1:] if families.is_main(row["arm"], m)]
    for optimizer in dict.fromkeys(row["optimizer"] for row in main):
        by_arm = {row["arm"]: row for row in main if row["optimizer"] == optimizer}
        safe = by_arm.get(f"bucket{m}") if m > 1 else None
        seeds = {
            arm: {row["seed"]: row for row in rows if (row["arm"], row["optimizer"]) == (arm, optimizer)}
            for arm in by_arm
        }
        for other, words in (("bucket1", "the Risky Zone"), ("random", "as many heads drawn at random")):
            claim = f"Tuning the Safe Zone costs less utility per safety gained (UCR) than {words}"
            add(optimizer, claim, _cheaper(safe, by_arm.get(other), seeds, drawn))
        claim = "Tuning the Safe Zone keeps more utility than tuning"
        add(optimizer, f"{claim} all heads", _keeps(safe, by_arm.get("full"), drawn))
        if optimizer != "sft" and safe and "bucket1" in by_arm:
            add(optimizer, f"{claim} the Risky Zone (RQ2)", _keeps(safe, by_arm["bucket1"], drawn))
        for cost, printed in (("ucr", "0.73 to 0.95"), ("source_cr", "0.94 to 1.00, MMLU-CR")):
            if one := correlations.one_of(found, optimizer, cost):
                claim = f"C foretells the cost of tuning a bucket, {costs.cost_name(cost, source)}"
                finer = [row for row in found if _is_finer(row, optimizer, cost)]
                add(optimizer, f"{claim} (paper: r = {printed})", _sign(one, by_arm, m, finer))

    tuned = {row["arm"]: row for row in means[1:] if row["optimizer"] == "sft"}
    quarter, half = (arms.name_of(arms.parse(name, m), m) for name in ("bottom25", "bottom50"))
    if {quarter, half} <= tuned.keys():
        claim = "Tuning the 25 % of heads of lowest C keeps more utility than tuning the lowest 50 % (F.2)"
        add("sft", claim, _keeps(tuned[quarter], tuned[half], drawn))
    claim = "C foretells UCR better than O alone and than S alone (F.1)"
    add("sft", claim, _better_foretold(tuned, found, drawn, m))
    for one in others.values():
        buckets = [tuned.get(f"bucket{number}@{one.name}") for number in range(1, m + 1)]
        if m < 2 or not all(buckets):
            continue
        what = f"the map from {one.rows} rows of {one.pool}"
        if one.pool == util_source:
            claim = f"Of the buckets of {what}, the Safe Zone keeps most utility (F.3)"
            add("sft", claim, _best_is(buckets, {m}, drawn))
        elif any(word in one.pool for word in families.REASONING) and m > 2:
            claim = f"Of the buckets of {what}, an inner one keeps most utility (inverted U, F.4)"
            add("sft", claim, _best_is(buckets, set(range(2, m)), drawn))
    return result


def _is_finer(row: dict, optimizer: str, cost: str) -> bool:
    own = (row["optimizer"], row["cost"], row["points"]) == (optimizer, cost, correlations.BUCKETS)
    return own and row["family"].startswith("C of ") and " by " not in row["family"]


def _cheaper(safe: dict | None, other: dict | None, seeds: dict, drawn: dict) -> Outcome:
    if safe is None or other is None:
        return "not all of these arms were tuned", UNKNOWN
    if safe["ucr_of_means"] is None or other["ucr_of_means"] is None:
        return "one of the two gained no safety", UNKNOWN
    evidence = f"{safe['ucr_of_means']:.2f} against {other['ucr_of_means']:.2f}"
    pairs = [(row, seeds[other["arm"]].get(seed)) for seed, row in seeds[safe["arm"]].items()]
    pairs = [(one, two) for one, two in pairs if two and not one["flag"] and not two["flag"]]
    if safe["n_seeds"] > 1:
        evidence += (
            f"; lower in {sum(one['ucr'] < two['ucr'] for one, two in pairs)} of {safe['n_seeds']} seeds"
        )
    samples = [costs.resampled_ucr(drawn, (row["arm"], row["optimizer"])) for row in (safe, other)]
    if any(sample is None for sample in samples):
        return f"{evidence}; a gain in safety is within noise", NOISE
    # Both without a gain in a resample: neither is the cheaper.
    both = np.isinf(samples[0]) & np.isinf(samples[1])
    difference = np.where(both, 0.0, samples[0] - np.where(both, 0.0, samples[1]))
    return evidence, _verdict(*costs.interval(-difference))


def _keeps(safe: dict | None, other: dict | None, drawn: dict) -> Outcome:
    if safe is None or other is None:
        return "not both arms were tuned", UNKNOWN
    if safe["safety_gain"] <= 0:
        return "the first gained no safety", UNKNOWN
    evidence = (
        f"utility {percent(safe['utility'])} against {percent(other['utility'])}, "
        f"at safety {percent(safe['safety'])} against {percent(other['safety'])}"
    )
    one, two = (_drawn(row, drawn)["utility"] for row in (safe, other))
    return evidence, _verdict(*costs.interval(one - two))


def _drawn(row: dict, drawn: dict) -> dict[str, FloatArray]:
    return drawn[row["arm"], row["optimizer"]]


def _best_is(buckets: Sequence[dict], claimed: set[int], drawn: dict) -> Outcome:
    """Whether the bucket of highest utility is one of those claimed (numbers from 1)."""
    best = max(range(len(buckets)), key=lambda index: buckets[index]["utility"])
    evidence = "utility of buckets 1 to {}: {}".format(
        len(buckets), ", ".join(percent(row["utility"]) for row in buckets)
    )
    if buckets[best]["safety_gain"] <= 0:
        return f"{evidence}; bucket {best + 1} gained no safety", UNKNOWN
    utility = np.array([_drawn(row, drawn)["utility"] for row in buckets])  # [M, R]
    inside = np.array([number in claimed for number in range(1, len(buckets) + 1)])
    advantage = utility[inside].max(axis=0) - utility[~inside].max(axis=0)
    return evidence, _verdict(*costs.interval(advantage))


def _better_foretold(tuned: Mapping[str, dict], found: Sequence[dict], drawn: dict, m: int) -> Outcome | None:
    """Pearson of C with UCR against those of O and of S, in every resample of the benchmark rows."""
    each = {score: correlations.one_of(found, "sft", "ucr", score) for score in "COS"}
    if any(one is None for one in each.values()):
        return None
    if any(one["pearson"] is None for one in each.values()):
        return "not every one of the three has a correlation", UNKNOWN
    evidence = ", ".join(f"r = {signed(one['pearson'])} for {score}" for score, one in each.items())
    samples = {}
    for score in "COS":
        family = families.Family(score, m, "")
        rows = [
            row for arm, row in tuned.items() if families.family(arm, m) == family and not row["n_no_gain"]
        ]
        ratios = [costs.resampled_ucr(drawn, (row["arm"], row["optimizer"])) for row in rows]
        if any(one is None for one in ratios):
            return f"{evidence}; a gain in safety is within noise", NOISE
        x = np.array([row["predicted"] for row in rows])
        samples[score] = _resampled_pearson(x, np.array(ratios))
    usable = np.all([~np.isnan(one) for one in samples.values()], axis=0)
    if not usable.any():
        return evidence, NOISE
    verdicts = [_verdict(*costs.interval((samples["C"] - samples[one])[usable])) for one in "OS"]
    if FAILS in verdicts:
        return evidence, FAILS
    beyond = each["C"]["pearson"] > each["C"]["critical_r"]
    return evidence, HOLDS if beyond and verdicts == [HOLDS, HOLDS] else NOISE


def _resampled_pearson(x: FloatArray, ratios: FloatArray) -> FloatArray:
    """Pearson of x [M] with every resample of ratios [M, R]; NaN where one is infinite or all are equal."""
    result = np.full(ratios.shape[1], np.nan)
    for index in np.flatnonzero(np.isfinite(ratios).all(axis=0)):
        result[index] = metrics.correlation(x, ratios[:, index]).pearson
    return result


def _verdict(low: float, high: float) -> str:
    """What the interval of an advantage says of a claim that there is one."""
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else NOISE


def _sign(one: dict, rows: dict[str, dict], m: int, finer: Sequence[dict]) -> Outcome:
    if one["pearson"] is None:
        return f"{one['n_points']} usable buckets, no correlation", UNKNOWN
    evidence = f"r = {signed(one['pearson'])}, ρ = {signed(one['spearman'])}, {one['n_points']} points"
    if one["pearson_low"] is not None:
        evidence += f"; r over seeds {signed(one['pearson_low'])} to {signed(one['pearson_high'])}"
    for row in finer:
        if row["pearson"] is not None:
            evidence += f"; over {row['n_points']} finer buckets r = {signed(row['pearson'])}"
    if one["pearson"] <= 0:
        return evidence, FAILS
    if unsure := unsure_buckets(rows, m):
        return f"{evidence}; the safety gain of {unsure} buckets is within noise", NOISE
    return evidence, HOLDS if one["pearson"] > one["critical_r"] else NOISE
