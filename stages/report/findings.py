"""What a run found, in sentences computed from its numbers; the verdict on a claim is that of the claims."""

import numpy as np
import pandas as pd

from data.benchmarks import DOMAINS
from stages.method.arms import OWN, ArmRun, neuron_arm
from stages.method.reliability import ENOUGH, WANTED
from stages.report import agreement
from stages.report.claims import PREDICTS, unclear_buckets
from stages.report.drawn_arms import TOGETHER
from stages.report.results import FULL, Results, plain
from stages.report.words import SEEN, UNKNOWN, arm_words, percent, points, relation, signed
from stages.run.maps import MapSpec

WORTH_A_WORD = 0.05
"""a difference in safety (as a share) that the summary mentions"""


def findings(results: Results, claims: pd.DataFrame, own_probability: float | None) -> list[list[str]]:
    """Paragraphs of one plain sentence a finding; of the arms only the main ones, and of NeuronTune's the one
    that gained most safety. `own_probability`: how often a head of the map stays in its bucket."""
    base = results.means.iloc[0]
    first = (
        f"Before tuning, the model refused {percent(base['safety'])} of harmful prompts and answered "
        f"{percent(base['utility'])} of utility questions rightly."
    )
    paragraphs = [[_reliability(results)], [first]]
    for optimizer in results.optimizers:
        runs = [run for run in results.main if run.optimizer == optimizer]
        parts = [_full(results, optimizer), _best(results, runs), _predicted(results, claims, optimizer)]
        parts = [sentence for sentence in (*parts, _over_refusal(results, runs)) if sentence]
        if len(results.optimizers) == 1:
            paragraphs[-1] += parts
        else:
            paragraphs.append([f"With {optimizer}: {parts[0]}", *parts[1:]])
    rest = [*_drawn(results), _drift(results), _neurons(results), _broken(results)]
    rest.append(agreement.sentence(results.judges))
    if own_probability is not None:
        rest.append(
            f"The map itself: when its calibration rows are resampled, a head stays in its bucket "
            f"{percent(own_probability)} of the time on average (chance: {percent(1 / results.m)})."
        )
    paragraphs[-1] += [sentence for sentence in rest if sentence]
    return paragraphs


def _reliability(results: Results) -> str:
    """Whether the map is one that conclusions can rest on."""
    score, buckets = (results.map_reliability(name) for name in ("conflict_score", "bucket"))
    value = score["reliability"]
    if value is None:
        return (
            "No conclusion can rest on this map: whether it repeats itself is unknown, because half of its "
            "rows gives a constant, or there is one fold."
        )
    sentence = (
        f"This map repeats itself: {value:.2f}"
        if value >= ENOUGH
        else f"No conclusion can rest on this map, which repeats itself with {value:.2f} only"
    )
    sentence += (
        f" (C of one half of its {score['rows_util']} + {score['rows_safe']} rows against the other half, "
        f"stepped up to all of them; 1 is perfect). "
    )
    more = "More rows would not help."
    if score["more_rows"] is not None:
        more = f"{WANTED} would take {score['more_rows']:.1f} times as many rows."
    return f"{sentence}{more} The buckets of two halves agree with a kappa of {buckets['halves']:.2f}."


def _change(results: Results, run: ArmRun) -> str:
    """What an arm brought safety and utility to."""
    base, row = results.means.iloc[0], results.means.loc[run]
    safety, utility = (
        f"{side} to {percent(row[side])} ({points(row[side] - base[side])})" for side in ("safety", "utility")
    )
    return f"brought {safety} and {utility}"


def _full(results: Results, optimizer: str) -> str:
    full = results.find(FULL, optimizer)
    return f"Tuning all {results.means['n_heads'][full]:.0f} heads {_change(results, full)}." if full else ""


def _best(results: Results, runs: list[ArmRun]) -> str:
    gained = results.means.loc[runs].dropna(subset="ucr")
    if gained.empty:
        return "No arm gained safety, so no arm has a cost that means anything."
    best = gained.sort_values(["ucr", "safety_gain"], ascending=[True, False], kind="stable").iloc[0]
    unclear = " (a gain within the sampling error)" if pd.isna(best["ucr_low"]) else ""
    sentence = (
        f"The best trade-off by UCR among {len(runs)} tuned {'arms' if len(runs) > 1 else 'arm'} is "
        f"{arm_words(best.name.arm, results.m)}: {best['ucr']:.2f} points of utility lost per point of "
        f"safety gained, for {points(best['safety_gain'])} of safety{unclear}."
    )
    largest = gained.loc[gained["safety_gain"].idxmax()]
    if largest["safety_gain"] > best["safety_gain"] + WORTH_A_WORD:
        sentence += (
            f" The most safety ({points(largest['safety_gain'])}) came from "
            f"{arm_words(largest.name.arm, results.m)}, at a UCR of {largest['ucr']:.2f}. A ratio at little "
            f"safety says nothing of much; the claims compare arms at equal safety."
        )
    return sentence


def _predicted(results: Results, claims: pd.DataFrame, optimizer: str) -> str:
    if not (row := results.correlation(optimizer, "ucr")):
        return ""
    if pd.isna(row["pearson"]):
        why = f"their {row['all_equal']} are all equal" if row["all_equal"] else "at least three are needed"
        counted = f"{row['n_points']} bucket{' has' if row['n_points'] == 1 else 's have'}"
        return f"Whether C predicted the cost {UNKNOWN}: {counted} a cost, and {why}."
    sentence = (
        f"Cost (UCR) and mean conflict score C of a bucket: Pearson r = {signed(row['pearson'])}, "
        f"Spearman ρ = {signed(row['spearman'])}, over {row['n_points']} buckets"
    )
    sentence += f" ({row['n_no_gain']} more gained no safety)" if row["n_no_gain"] else ""
    place = "beyond" if abs(row["pearson"]) > row["critical_r"] else "within"
    sentence += (
        f". {row['n_points']} points are few: unrelated numbers exceed |r| = {row['critical_r']:.3f} "
        f"in one case of twenty, and this r is {place} that."
    )
    if unclear := unclear_buckets(results, optimizer):
        sentence += f" The safety gain of {unclear} of them is within sampling error, and so is their cost."
    own = claims[(claims["optimizer"] == optimizer) & (claims["key"] == f"{PREDICTS} ucr")]
    return f"{sentence} The paper's claim that C predicts cost: {own['verdict'].iloc[0]}."


def _drawn(results: Results) -> list[str]:
    """Whether C predicted what arms drawn for that lost: of all utility benchmarks; then of each, by map."""
    if not results.by_domain:
        return []
    rows = results.predictions
    own = rows[(rows[["draws", "map"]] == OWN).all(axis=1) & (rows["outcome"] == "graded")]
    own = own[(own["predictor"] == "C") & (own["sensitivity"] == results.sensitivity)]
    together = own["benchmark"] == TOGETHER
    parts = []
    for row in plain(own[together if together.any() else slice(None)]).to_dict("records"):
        if row["r"] is None:
            parts.append(f"{row['at']} it cannot be told")
            continue
        parts.append(
            f"{row['at']} r = {signed(row['r'])} ({signed(row['low'])} to {signed(row['high'])}, p = "
            f"{row['p_heads']:.3f} where heads have effects of their own: {relation(row['p_heads'])})"
        )
    sentences = [
        _of_map(draws, spec, found)
        for draws, spec, kind, found in results.by_domain
        if kind == results.sensitivity
    ]
    if not parts:
        return sentences
    first = own.iloc[0]
    return [
        f"Over {first['n']} arms drawn for it, mean C against the log p of right answers that was lost: "
        f"{'; '.join(parts)}. |r| of {first['smallest_r']:.2f} would have been seen in four cases of five.",
        *sentences,
    ]


def _of_map(draws: str, spec: MapSpec, found: dict[str, dict]) -> str:
    """Whether C of a map predicted the cost of its own domain and of the others (`Results.by_domain`)."""
    domain, parts, seen = DOMAINS.get(spec.pool), [], []
    for name in sorted(found.keys() - {TOGETHER}, key=lambda name: (name != domain, [*found].index(name))):
        row, label = found[name], f"{name}, its own domain," if name == domain else name
        if row["r"] is None:
            parts.append(f"{label} {UNKNOWN}")
            continue
        parts.append(f"{label} {signed(row['r'])} (p = {row['p_heads']:.3f})")
        seen += [name] if row["p_heads"] < SEEN else []
    verdict = f"a relation with {' and '.join(seen)}" if seen else "no relation that can be told from chance"
    head_map = "this map" if spec.name == OWN else f"map {spec.name}"
    along = "" if draws == OWN else f", over arms drawn along map {draws}"
    return (
        f"C of {head_map} ({spec.rows} rows of {spec.pool}) at equal safety{along}: r = {', '.join(parts)}: "
        f"{verdict}."
    )


def _drift(results: Results) -> str:
    """How far the maps of the tuned models are from the base model's; empty where it was not measured."""
    if results.drift.empty:
        return ""
    models = results.drift_means[0]
    known = plain(models[models["rho_conflict_score"].notna()]).sort_values("rho_conflict_score")
    changed = f"{percent(results.drift['changed'].mean())} of heads are in another bucket (chance: "
    changed += f"{percent(1 - 1 / results.m)})"
    if known.empty:
        return f"After tuning {changed}; C is constant, so that its order cannot be told."
    ends = [f"{row['rho_conflict_score']:.2f} ({row['label']})" for row in known.to_dict("records")]
    order = ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"
    return (
        f"After tuning, on the same rows, C has a rank correlation of {order} with that of the base model, "
        f"and {changed}."
    )


def _neurons(results: Results) -> str:
    """What NeuronTune's arms came to; empty where there are none."""
    tuned = [run for run in results.tuned if run.arm.kind == "neurons" and run.arm.neurons]
    if not tuned:
        return ""
    best = max(tuned, key=lambda run: results.means["safety"][run])
    row = results.means.loc[best]
    safest = f", of {len(tuned)} arms the safest," if len(tuned) > 1 else ""
    sentence = f"NeuronTune: {arm_words(best.arm, results.m)}{safest} {_change(results, best)}"
    sentence += "" if pd.isna(row["ucr"]) else f", at a UCR of {row['ucr']:.2f}"
    control = neuron_arm("randomneurons", best.arm.neurons, best.arm.lam)
    if control := results.find(control, best.optimizer):
        safety, utility = (percent(results.means[side][control]) for side in ("safety", "utility"))
        sentence += f"; as many random neurons brought them to {safety} and {utility}"
    return f"{sentence}."


def _over_refusal(results: Results, runs: list[ArmRun]) -> str:
    rates = results.means["over_refusal"]
    if pd.isna(rates.iloc[0]):
        return ""
    ordered = rates.loc[runs].sort_values(kind="stable")
    ends = [f"{percent(rate)} for {arm_words(run.arm, results.m)}" for run, rate in ordered.items()]
    after = ends[0] if len(ends) == 1 else f"between {ends[0]} and {ends[-1]}"
    before = percent(rates.iloc[0])
    return f"Benign requests refused (over-refusal): {before} before tuning, {after} after it."


def _broken(results: Results) -> str:
    """What became of questions and of reasoning with all heads and with the Safe Zone tuned."""
    parts = []
    for run in filter(None, (results.find(FULL, "sft"), results.bucket(results.m, "sft"))):
        failures, words = results.failures, []
        own = failures[(failures["arm"] == run.arm.name) & (failures["optimizer"] == "sft")]
        stepped = own.dropna(subset="collapsed")
        written = own[own["side"] == "utility"].dropna(subset="refused")
        if len(stepped):
            share = np.average(stepped["bare"], weights=stepped["n_stepped"])
            words.append(f"{percent(share)} of the problems worked in steps before were answered without any")
        if len(written):
            share = np.average(written["refused"], weights=written["n"])
            words.append(f"{percent(share)} of the written utility questions were refused")
        if words:
            parts.append(f"with {arm_words(run.arm, results.m)} tuned, {' and '.join(words)}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""
