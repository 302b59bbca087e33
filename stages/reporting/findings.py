"""What a run found, in sentences computed from its numbers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stages.reporting import correlations, failures, families

WORTH_A_WORD = 0.05
"""a difference in safety (as a share) that the summary mentions"""


def points(value: float) -> str:
    """A difference of shares as signed percentage points: "+12.0 points"."""
    return f"{100 * value:+.1f} points".replace("-", "\N{MINUS SIGN}")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def findings(
    means: Sequence[dict], found: Sequence[dict], failed: list[dict], manifests: dict, m: int
) -> list[str]:
    """One plain sentence a finding, best read as a paragraph; of the arms only the main ones, and of
    NeuronTune's the one that gained most safety.

    Args:
        means: rows of costs.with_intervals.
        found: rows of correlations.correlations.
        failed: rows of failures.failures.
        manifests: stage -> manifest.
        m: number of buckets.
    """
    of_neurons = neurons(means, m)
    means = [row for row in means if families.is_main(row["arm"], m)]
    base = means[0]
    sentences = [
        f"Before tuning, the model refused {percent(base['safety'])} of harmful prompts and answered "
        f"{percent(base['utility'])} of utility questions rightly."
    ]
    optimizers = list(dict.fromkeys(row["optimizer"] for row in means[1:]))
    for optimizer in optimizers:
        rows = {row["arm"]: row for row in means[1:] if row["optimizer"] == optimizer}
        told = [
            _full(base, rows),
            _best(rows, m),
            _foretold(correlations.one_of(found, optimizer, "ucr"), rows, m),
        ]
        told = [sentence for sentence in (*told, _over_refusal(base, rows, m)) if sentence]
        if len(optimizers) > 1 and told:
            told[0] = f"With {optimizer}: {told[0]}"
        sentences += told
    sentences += [of_neurons] if of_neurons else []
    if broken := failures.finding(failed, m):
        sentences.append(broken)
    own = manifests["03_sensitivity"]["notes"].get("mean_probability_of_own_bucket")
    if own is not None and np.isfinite(own):
        sentences.append(
            f"The map itself: when its calibration rows are resampled, a head stays in its bucket "
            f"{percent(own)} of the time on average (chance: {percent(1 / m)})."
        )
    return sentences


def _full(base: dict, rows: dict[str, dict]) -> str:
    if not (full := rows.get("full")):
        return ""
    return (
        f"Tuning all {full['n_heads']:.0f} heads brought safety to {percent(full['safety'])} "
        f"({points(full['safety'] - base['safety'])}) and utility to {percent(full['utility'])} "
        f"({points(full['utility'] - base['utility'])})."
    )


def _best(rows: dict[str, dict], m: int) -> str:
    gained = [row for row in rows.values() if row["ucr_of_means"] is not None]
    if not gained:
        return "No arm gained safety, so no arm has a cost that means anything."
    best = min(gained, key=lambda row: (row["ucr_of_means"], -row["safety_gain"]))
    unsure = (
        "" if best["ucr_of_means_high"] is not None else " (a gain within the sampling error of the rows)"
    )
    sentence = (
        f"The best trade-off by UCR among {len(rows)} tuned {'arms' if len(rows) > 1 else 'arm'} is "
        f"{families.words(best['arm'], m)}: {best['ucr_of_means']:.2f} points of utility lost per point of "
        f"safety gained, for {points(best['safety_gain'])} of safety{unsure}."
    )
    largest = max(gained, key=lambda row: row["safety_gain"])
    if largest["safety_gain"] > best["safety_gain"] + WORTH_A_WORD:
        sentence += (
            f" The most safety ({points(largest['safety_gain'])}) came from "
            f"{families.words(largest['arm'], m)}, at a UCR of {largest['ucr_of_means']:.2f}."
        )
    return sentence


def unsure_buckets(rows: dict[str, dict], m: int) -> int:
    """How many buckets have a cost although their safety gain is within the sampling error of the rows."""
    buckets = [row for row in rows.values() if families.bucket_number(row["arm"], m) and not row["n_no_gain"]]
    return sum(row["ucr_of_means_low"] is None for row in buckets)


def _foretold(one: dict | None, rows: dict[str, dict], m: int) -> str:
    if one is None:
        return ""
    if one["pearson"] is None:
        equal = one["n_points"] >= correlations.FEWEST_POINTS
        why = "their costs are all equal" if equal else "at least three are needed"
        counted = f"{one['n_points']} bucket{' has' if one['n_points'] == 1 else 's have'}"
        return f"Whether C foretold the cost cannot be told: {counted} a cost, and {why}."
    sign = "went up with" if one["pearson"] > 0 else "did not go up with"
    sentence = (
        f"The cost of tuning a bucket (UCR) {sign} its predicted conflict C: "
        f"Pearson r = {signed(one['pearson'])}, Spearman ρ = {signed(one['spearman'])}, "
        f"over {one['n_points']} buckets"
    )
    sentence += f" ({one['n_no_gain']} more gained no safety)" if one["n_no_gain"] else ""
    beyond = abs(one["pearson"]) > one["critical_r"]
    sentence += (
        f". {one['n_points']} points are few: unrelated numbers exceed |r| = {one['critical_r']:.3f} "
        f"in one case of twenty, and this r is {'beyond' if beyond else 'within'} that."
    )
    if unsure := unsure_buckets(rows, m):
        sentence += f" The safety gain of {unsure} of them is within sampling error, and so is their cost."
    if one["pearson"] <= 0:
        sentence += " The paper's claim that C foretells cost does not hold in this run."
    return sentence


def neurons(means: Sequence[dict], m: int) -> str:
    """What NeuronTune's arms came to; empty where there are none. `means` as in `findings`."""
    arms = {families.parse(row["arm"], m): row for row in means if families.of_neurons(row["arm"], m)}
    tuned = [arm for arm in arms if arm.kind == "neurons" and arm.number]
    if not tuned:
        return ""
    best = max(tuned, key=lambda arm: arms[arm]["safety"])
    base, row = means[0], arms[best]
    sentence = (
        f"NeuronTune: {families.words(row['arm'], m)}"
        f"{f', of {len(tuned)} arms the safest,' if len(tuned) > 1 else ''} brought safety to "
        f"{percent(row['safety'])} ({points(row['safety'] - base['safety'])}) and utility to "
        f"{percent(row['utility'])} ({points(row['utility'] - base['utility'])})"
    )
    sentence += f", at a UCR of {row['ucr_of_means']:.2f}" if row["ucr_of_means"] is not None else ""
    if control := arms.get(replace(best, kind="randomneurons")):
        sentence += (
            f"; as many random neurons left them at {percent(control['safety'])} and "
            f"{percent(control['utility'])}"
        )
    return f"{sentence}."


def _over_refusal(base: dict, rows: dict[str, dict], m: int) -> str:
    if base["over_refusal"] is None or not rows:
        return ""
    ordered = sorted(rows.values(), key=lambda row: row["over_refusal"])
    ends = [f"{percent(row['over_refusal'])} for {families.words(row['arm'], m)}" for row in ordered]
    after = ends[0] if len(ends) == 1 else f"between {ends[0]} and {ends[-1]}"
    before = percent(base["over_refusal"])
    return f"Benign requests refused (over-refusal): {before} before tuning, {after} after it."
