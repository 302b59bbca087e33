"""What of the paper's claims holds in a run, each with its evidence.

A comparison of two arms holds or not where its paired 95 % interval over benchmark rows and training seeds
excludes zero. Utility is compared at equal safety: who refuses less keeps more in any case. A correlation has
to be beyond what unrelated points give in one case of twenty, and its interval without zero. With one
training seed nothing holds or fails: another seed may say the opposite.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from stages.method.arms import BASE_RUN, ArmRun, head_arm
from stages.method.arrays import FloatArray
from stages.report.correlations import coefficients
from stages.report.costs import interval
from stages.report.results import FULL, RANDOM, Results
from stages.report.words import (
    AGAINST_BY_ONE,
    FAILS,
    FOR_BY_ONE,
    HOLDS,
    NOISE,
    UNKNOWN,
    cost_name,
    percent,
    signed,
)

WORKED_POOLS = ("gsm8k_calibration", "gsm8k", "embedded/problems")
"""pools of worked problems (App. F.4)"""
PREDICTS = "C predicts"
"""the claim that a correlation decides, as a key: with its cost"""


Outcome = tuple[str, str]
"""evidence of a claim, and the verdict that follows from it"""


def claims(results: Results) -> pd.DataFrame:
    """The paper's claims and what this run says of each: key, optimizer, claim, evidence, verdict.

    Those about ablations (App. F) only where their arms were tuned.
    """
    rows = []
    for optimizer in results.optimizers:
        rows += [(key, optimizer, claim, *outcome) for key, claim, outcome in main_claims(results, optimizer)]
    rows += [("", "sft", claim, *outcome) for claim, outcome in ablation_claims(results)]
    found = pd.DataFrame(rows, columns=["key", "optimizer", "claim", "evidence", "verdict"])
    if not results.several_seeds:
        found["verdict"] = found["verdict"].replace({HOLDS: FOR_BY_ONE, FAILS: AGAINST_BY_ONE})
    return found


def main_claims(results: Results, optimizer: str) -> list[tuple[str, str, Outcome]]:
    """(key, claim, outcome) of the main comparison by one optimizer."""
    m, found = results.m, []
    safe, risky = (results.bucket(number, optimizer) if m > 1 else None for number in (m, 1))
    full, random = (results.find(arm, optimizer) for arm in (FULL, RANDOM))
    for other, words in ((risky, "the Risky Zone"), (random, "as many heads drawn at random")):
        claim = f"Tuning the Safe Zone costs less utility per safety gained (UCR) than {words}"
        found.append(("", claim, cheaper(results, safe, other)))
    claim = "At equal safety, tuning the Safe Zone keeps more utility than tuning"
    found.append(("", f"{claim} all heads", keeps_more(results, safe, full)))
    if optimizer != "sft" and safe and risky:
        found.append(("", f"{claim} the Risky Zone (RQ2)", keeps_more(results, safe, risky)))
    for cost, printed in (("ucr", "0.73 to 0.95"), ("source_cr", "0.94 to 1.00, MMLU-CR")):
        if results.correlation(optimizer, cost):
            claim = f"C predicts the cost of tuning a bucket, {cost_name(cost, results.source)}"
            outcome = predicts(results, optimizer, cost)
            found.append((f"{PREDICTS} {cost}", f"{claim} (paper: r = {printed})", outcome))
    return found


def ablation_claims(results: Results) -> list[tuple[str, Outcome]]:
    """(claim, outcome) of appendix F, by plain fine-tuning."""
    m, found = results.m, []
    quarter, half = (results.find(head_arm("bottom", share, m), "sft") for share in (25, 50))
    if quarter and half:
        claim = "At equal safety, the 25 % of heads of lowest C keep more utility than the lowest 50 % (F.2)"
        found.append((claim, keeps_more(results, quarter, half)))
    if all(results.correlation("sft", "ucr", score) for score in "COS"):
        found.append(("C predicts UCR better than O alone and than S alone (F.1)", predicts_better(results)))
    own, *others = results.maps
    for spec in others:
        buckets = results.buckets("sft", map_name=spec.name)
        if m < 2 or len(buckets) < m:
            continue
        what = f"At equal safety, of the buckets of the map from {spec.rows} rows of {spec.pool},"
        if spec.pool == own.pool:
            found.append((f"{what} the Safe Zone keeps most utility (F.3)", best(results, buckets, {m})))
        elif spec.pool in WORKED_POOLS and m > 2:
            claim = f"{what} an inner one keeps most utility (inverted U, F.4)"
            found.append((claim, best(results, buckets, range(2, m))))
    return found


def decide(advantage: FloatArray) -> str:
    """What resamples of an advantage say of the claim that there is one."""
    low, high = interval(advantage)
    return HOLDS if low > 0 else FAILS if high < 0 else NOISE


# Two arms, or all buckets


def cheaper(results: Results, one: ArmRun | None, other: ArmRun | None) -> Outcome:
    """Whether one arm has a lower UCR than another."""
    if one is None or other is None:
        return "not all of these arms were tuned", UNKNOWN
    means = results.means.loc[[one, other]]
    if means["ucr"].isna().any():
        return "one of the two gained no safety", UNKNOWN
    evidence = "{:.2f} against {:.2f}".format(*means["ucr"])
    if results.several_seeds:
        ratios = results.costs["ucr"].where(results.costs["safety_gain"] > 0)  # NaN is lower than nothing
        seeds = [run.seed for run in ratios.index if replace(run, seed=None) == one]
        lower = sum(ratios[replace(one, seed=seed)] < ratios[replace(other, seed=seed)] for seed in seeds)
        evidence += f"; lower in {lower} of {len(seeds)} seeds"
    if means["ucr_low"].isna().any():
        return f"{evidence}; a gain in safety is within noise", NOISE
    samples = results.draws["ucr"][[one, other]].to_numpy().T
    samples = np.where(np.isinf(samples).all(axis=0), 0.0, samples)  # no gain in either: neither is cheaper
    return evidence, decide(samples[1] - samples[0])


def keeps_more(results: Results, one: ArmRun | None, other: ArmRun | None) -> Outcome:
    """Whether one arm keeps more utility than another at equal safety."""
    if one is None or other is None:
        return "not both arms were tuned", UNKNOWN
    means = results.means.loc[[one, other]]
    utility, safety = (" against ".join(map(percent, means[side])) for side in ("utility", "safety"))
    evidence = f"utility {utility}, at safety {safety}"
    if not (means["safety_gain"] > 0).all():
        return f"{evidence}; one of the two gained no safety", UNKNOWN
    equal, samples = at_equal_safety(results, [one, other])
    if equal != list(means["utility"]):
        evidence += f"; at equal safety {' against '.join(map(percent, equal))}"
    return evidence, decide(samples[0] - samples[1])


def best(results: Results, buckets: Sequence[ArmRun], claimed: Collection[int]) -> Outcome:
    """Whether the bucket of highest utility at equal safety is one of those claimed (numbers from 1)."""
    gained = results.means.loc[list(buckets), "safety_gain"] > 0
    if not gained.all():
        return "not every bucket gained safety", UNKNOWN
    utility, samples = at_equal_safety(results, buckets)
    evidence = f"utility of buckets 1 to {len(buckets)}: {', '.join(map(percent, utility))}"
    inside = np.array([run.arm.bucket in claimed for run in buckets])
    return evidence, decide(samples[inside].max(axis=0) - samples[~inside].max(axis=0))


def at_equal_safety(results: Results, runs: Sequence[ArmRun]) -> tuple[list[float], FloatArray]:
    """Utility of arms at the safety of the least safe of them: of the means, and resampled, [arms, R].

    An arm whose safety differs from that one's within noise only is taken as it is.
    """
    means, draws = results.means, results.draws
    least = means.loc[list(runs), "safety"].idxmin()
    utility, samples = [], []
    for run in runs:
        alike = decide((draws["safety"][run] - draws["safety"][least]).to_numpy()) == NOISE
        for table, found in ((means, utility), (draws, samples)):
            found.append(table["utility"][run] if alike else on_line(table, run, table["safety"][least]))
    return utility, np.array(samples)


def on_line(table: Mapping, run: ArmRun, safety: FloatArray) -> FloatArray:
    """Utility where the line from the base model to an arm reaches this safety.

    Args:
        table: means, or draws: "utility" and "safety" of each arm.
    """
    utility, start = table["utility"], table["safety"][BASE_RUN]
    gain = table["safety"][run] - start
    share = np.clip((safety - start) / np.where(gain > 0, gain, np.inf), 0.0, 1.0)
    return utility[BASE_RUN] + share * (utility[run] - utility[BASE_RUN])


# Correlations


def predicts(results: Results, optimizer: str, cost: str) -> Outcome:
    """Whether a cost ratio goes up with mean C over the run's own buckets."""
    row = results.correlation(optimizer, cost)
    if pd.isna(row["pearson"]):
        why = f": the {row['all_equal']} are all equal" if row["all_equal"] else ""
        return f"{row['n_points']} usable buckets, no correlation{why}", UNKNOWN
    evidence = f"r = {signed(row['pearson'])}, ρ = {signed(row['spearman'])}, {row['n_points']} points"
    if not pd.isna(row["pearson_low"]):
        evidence += f"; 95 %: {signed(row['pearson_low'])} to {signed(row['pearson_high'])}"
    for count in sorted({run.arm.of for run in results.tuned if run.arm.of} - {results.m}):
        finer = results.correlation(optimizer, cost, of=count)
        if finer and not pd.isna(finer["pearson"]):
            evidence += f"; over {finer['n_points']} finer buckets r = {signed(finer['pearson'])}"
    if unclear := unclear_buckets(results, optimizer):
        return f"{evidence}; the safety gain of {unclear} buckets is within noise", NOISE
    ends = row["pearson_low"], row["pearson_high"]
    if abs(row["pearson"]) <= row["critical_r"] or None in ends or ends[0] <= 0 <= ends[1]:
        return evidence, NOISE
    return evidence, HOLDS if row["pearson"] > 0 else FAILS


def unclear_buckets(results: Results, optimizer: str) -> int:
    """How many of the run's own buckets have a cost although their gain in safety is within noise."""
    means = results.means.loc[results.buckets(optimizer)]
    return int((means["ucr"].notna() & means["ucr_low"].isna()).sum())


def predicts_better(results: Results) -> Outcome:
    """Pearson of C with UCR against those of O and of S, in every resample."""
    rows = {score: results.correlation("sft", "ucr", score) for score in "COS"}
    if any(pd.isna(row["pearson"]) for row in rows.values()):
        return "not every one of the three has a correlation", UNKNOWN
    evidence = ", ".join(f"r = {signed(row['pearson'])} for {score}" for score, row in rows.items())
    samples = {}
    for score in rows:
        means = results.means.loc[results.buckets("sft", ranked_by=score)]
        means = means[means["safety_gain"] > 0]
        if means["ucr_low"].isna().any():
            return f"{evidence}; a gain in safety is within noise", NOISE
        costs = results.draws["ucr"][list(means.index)].to_numpy()
        samples[score] = coefficients(means["ranked_mean"], np.where(np.isinf(costs), np.nan, costs))[0]
    usable = np.isfinite(list(samples.values())).all(axis=0)
    if not usable.any():
        return evidence, NOISE
    verdicts = [decide((samples["C"] - samples[score])[usable]) for score in "OS"]
    if FAILS in verdicts:
        return evidence, FAILS
    beyond = rows["C"]["pearson"] > rows["C"]["critical_r"]
    return evidence, HOLDS if beyond and verdicts == [HOLDS, HOLDS] else NOISE
