"""The tables of stage 06: the paper's (1, 2, 7 to 11), its printed numbers beside ours, and those of the map.

A table of arms has a row for each that was tuned, and is not made where none was. Scores are in percent, as
the paper prints them; each has its standard deviation over seeds (`<column>_std`) and, where the run's model
is one of the paper's and that number was printed, `paper_<column>`. A row that gained no safety has no cost
ratio and says so in `flag`.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from backends.core.files import write_text
from data import paper
from stages.method import metrics
from stages.method.arms import BASE_RUN, SHARES, ArmRun, head_arm
from stages.method.heads import COLUMN, HeadMap
from stages.report.correlations import STATISTICS
from stages.report.costs import SIDES
from stages.report.results import FULL, RANDOM, Results, plain
from stages.report.words import NO_GAIN, arm_words, cost_column, cost_name

PRINTED = {
    # Our column -> the paper's.
    **{name: name for name in ("mmlu", "csqa", "gsm8k", "math", "wildguard", "dan")},
    "wildjailbreak": "adv_harm",
    "utility": "gen",
    "safety": "safe",
    "ranked_mean": "mean_score",
    "ucr": "ucr",
    "mmlu_cr": "mmlu_cr",
}
AVERAGED = {
    "utility": {"mmlu", "csqa", "gsm8k", "math"},
    "safety": {"wildjailbreak", "wildguard", "dan"},
}
"""benchmarks of the paper's averages: no other average compares with them"""
RESTS_ON = {"utility": {"utility"}, "safety": {"safety"}, "ucr": {"utility", "safety"}, "mmlu_cr": {"safety"}}
"""column -> the averages that it is made of"""
M = 4
"""buckets of the paper"""
MAP_TABLES = {"mmlu_calibration": 10, "gsm8k_calibration": 11}
"""pool of another map -> the paper's table of its buckets"""
MAP_ROWS = 100
"""rows of the paper's other maps: with another number its printed scores do not compare"""
NEURON_NOTE = (
    "NeuronTune's abstract fixes neurons of all layers, attribution to safety and to utility, meta-learning "
    "that amplifies the first and suppresses the second, and a neuron-count threshold. Integrated gradients "
    "and a split of the data for two loops are a third party's reading; paths, losses, selection, bounds and "
    "first-order MAML are ours (README), so that these are no numbers of that paper's method. "
    "K + K neurons: the K of highest safety and of highest utility score, those of both once."
)
MOST_HEADS = 10
UNITS = "Scores and their standard deviations over seeds (_std) in percent."
RATIO_UNITS = "Cost ratios: Eq. 7 and 8 on the averaged scores; their _std is that of the seeds' own ratios."


@dataclass(frozen=True)
class Plan:
    """A table to be: of `arms` those that were tuned."""

    name: str
    title: str
    arms: Mapping[ArmRun, dict]
    """arm as tuned -> the columns that name its row"""
    number: int | None = None
    """the paper's table, whose rows have the same labels; None: it has none"""
    costly: bool = True
    """with what the arms were ranked by, and the cost ratios"""
    ablation: bool = True
    """its arms are no part of the paper's main comparison"""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table: label columns, then measures with their `_std` and `paper_` columns."""

    name: str
    title: str
    labels: tuple[str, ...]
    headings: dict[str, str]
    """of each measure"""
    rows: pd.DataFrame
    units: str = ""
    note: str = ""
    ablation: bool = False

    @property
    def caption(self) -> str:
        return " ".join(part for part in (f"{self.title}.", self.units, self.note) if part)

    @property
    def has_paper(self) -> bool:
        return any(f"paper_{name}" in self.rows for name in self.headings)


def paper_tables(results: Results) -> list[Table]:
    """Every table whose arms were tuned, the paper's first."""
    plans = [*main_plans(results), ratio_plan(results), *map_plans(results)]
    plans += own_plans(results, {run for plan in plans for run in plan.arms})
    tables = [build(results, plan) for plan in plans]
    tables.insert(3, correlation_table(results))
    return [table for table in tables if table]


# What stands in each table


def main_plans(results: Results) -> list[Plan]:
    """Tables 1 and 2: the base model, all heads, random heads, the Risky and the Safe Zone. Table 7: buckets
    by C, by O and by S, what they were ranked by and what they cost."""
    m, plans = results.m, []
    methods = {"full": FULL, "random": RANDOM}
    if m > 1:
        methods |= {"risky": head_arm("bucket", 1, m), "safe": head_arm("bucket", m, m)}
    for number, words, optimizers in (
        (1, "plain fine-tuning", ["sft"]),
        (2, "PCGrad", ["pcgrad", "pcgrad-symmetric"]),
    ):
        rows = [(BASE_RUN, "base")]
        rows += [(ArmRun(arm, by, None), name) for by in optimizers for name, arm in methods.items()]
        arms = {run: {"method": name} for run, name in rows}
        title = f"Table {number}: all heads, random heads and zones of C by {words}"
        plans.append(Plan(f"table{number}", title, arms, number, costly=False, ablation=False))
    ranked = [run for score in "COS" for run in results.buckets("sft", ranked_by=score)]
    arms = {run: {"score": run.arm.ranked_by, "bucket": run.arm.bucket} for run in ranked}
    title = "Table 7: buckets by C, by O alone and by S alone"
    return [*plans, Plan("table7", title, arms, 7, ablation=False)]


def ratio_plan(results: Results) -> Plan:
    """Table 9: more and more heads, from those of highest C (top) and of lowest C (bottom)."""
    arms = {ArmRun(FULL, "sft", None): {"selection": "full", "percent": 100}}
    for kind, share in product(("top", "bottom"), SHARES):
        run = ArmRun(head_arm(kind, share, results.m), "sft", None)
        arms[run] = {"selection": kind, "percent": share}
    if not any(run.arm.share for run in arms if run in results.means.index):
        arms = {}
    title = "Table 9: share of heads tuned, from the top and from the bottom of C"
    return Plan("table9", title, arms, 9, costly=False)


def map_plans(results: Results) -> list[Plan]:
    """Tables 10 and 11, and their like: buckets of the maps from other utility rows. Of the maps from one
    pool the first alone takes the paper's number."""
    plans, numbers = [], dict(MAP_TABLES)
    for spec in results.maps[1:]:
        number = numbers.pop(spec.pool, None)
        name, head = (f"table{number}", f"Table {number}: b") if number else (f"table_map_{spec.name}", "B")
        title = f"{head}uckets of map {spec.name} ({spec.rows} rows of {spec.pool})"
        own = results.buckets("sft", map_name=spec.name)
        arms = {run: {"map": spec.name, "bucket": run.arm.bucket} for run in own}
        plans.append(Plan(name, title, arms, number if spec.rows == MAP_ROWS else None))
    return plans


def own_plans(results: Results, shown: Set[ArmRun]) -> list[Plan]:
    """No tables of the paper: buckets of C of any other number than the run's own; NeuronTune's arms beside
    the base model, all heads and the Safe Zone; whatever else was tuned and is not `shown`."""
    finer = [run for run in results.ablations if run.arm.is_zone(run.arm.of)]
    finer.sort(key=lambda run: (run.arm.of, run.arm.bucket, run.optimizer))
    neurons = sorted(results.neurons, key=lambda run: (run.arm.lam, run.arm.neurons, run.arm.kind))
    if neurons:
        zones = FULL, head_arm("bucket", results.m, results.m)
        neurons = [BASE_RUN, *(ArmRun(arm, "sft", None) for arm in zones), *neurons]
    rest = [run for run in results.ablations if run not in shown and run not in finer]
    by_number = {run: {"buckets": run.arm.of, "bucket": run.arm.bucket} for run in finer}
    beside, further = (
        {run: {"tuned": arm_words(run.arm, results.m)} for run in runs} for runs in (neurons, rest)
    )
    title = "NeuronTune beside CAST, on the same rows and seeds"
    return [
        Plan("table_buckets", "Buckets of C in other numbers (not in the paper)", by_number),
        Plan("table_neurons", title, beside, note=NEURON_NOTE),
        Plan("table_further", "Further arms (not in the paper)", further),
    ]


def build(results: Results, plan: Plan) -> Table | None:
    """The table of the arms that were tuned; None where only the base model would be in it."""
    runs = [run for run in plan.arms if run in results.means.index]
    if all(run == BASE_RUN for run in runs):
        return None
    means = results.means.loc[runs].reset_index(drop=True)
    labels = pd.DataFrame([plan.arms[run] for run in runs])
    rows = pd.concat([labels, means[["arm", "optimizer", "n_seeds"]]], axis=1)
    # PCGrad as the paper describes it projects the alignment's gradient alone: no number for the other.
    known = [run for run in runs if run.optimizer != "pcgrad-symmetric"]
    printed = {run: printed_row(results, plan.number, plan.arms[run]) for run in known}
    theirs = pd.DataFrame([printed.get(run, {}) for run in runs], index=means.index)
    headings, compared = {}, comparable(results)
    for column, (name, heading) in measures(results, plan.costly).items():
        headings[name] = heading
        scale = 100 if is_score(results, column) else 1
        rows[name] = scale * means[column]
        if column != "ranked_mean":
            rows[f"{name}_std"] = scale * means[f"{column}_std"]
        if name in compared and PRINTED[name] in theirs:
            rows[f"paper_{name}"] = theirs[PRINTED[name]]
    rows["flag"] = flags(means)
    note = plan.note
    lacking = [arm_words(run.arm, results.m) for run, row in printed.items() if not row]
    if lacking and any(printed.values()):
        note = f"No printed number for {', '.join(lacking)} (data/paper/README.md)."
    names = (*labels, *(["optimizer"] if plan.name == "table2" else []))
    units = f"{UNITS} {RATIO_UNITS}" if plan.costly else UNITS
    return Table(plan.name, plan.title, names, headings, rows, units, note, plan.ablation)


def is_score(results: Results, column: str) -> bool:
    """Whether a column is a score, which tables show in percent."""
    return column in results.sides or column in SIDES


def measures(results: Results, costly: bool) -> dict[str, tuple[str, str]]:
    """Column of the means -> its name in a table, its heading: benchmarks by side, the means of the sides
    and, where `costly`, what was ranked by and cost ratios."""
    headings = {name: name for side in ("utility", "safety") for name in results.benchmarks(side)}
    headings |= {"utility": "mean utility", "safety": "mean safety", "over_refusal": "over-refusal"}
    found = {column: (column, heading) for column, heading in headings.items() if column in results.draws}
    if not costly:
        return found
    names = {cost: cost_name(cost, results.source) for cost in costs_of(results)}
    ratios = {cost: (cost_column(cost, results.source), name) for cost, name in names.items()}
    return {"ranked_mean": ("ranked_mean", "mean score")} | found | ratios


def costs_of(results: Results) -> list[str]:
    """The paper's cost ratios that the run has."""
    return [cost for cost in ("ucr", "source_cr") if cost in results.draws]


def printed_row(results: Results, number: int | None, where: dict) -> dict:
    """The paper's row; empty: it has none. With another number of buckets than the paper's none compares."""
    if number is None or results.paper is None or results.m != M:
        return {}
    where = {name: value for name, value in where.items() if name != "map"}  # the paper names none
    return paper.row(number, model=results.paper, **where) or {}


def comparable(results: Results) -> set[str]:
    """Our columns that compare with the paper's: averages only where they are over the same benchmarks."""
    same = {side for side, names in AVERAGED.items() if set(results.benchmarks(side)) == names}
    return {name for name in PRINTED if RESTS_ON.get(name, set()) <= same}


def flags(means: pd.DataFrame) -> list[str | None]:
    """Of each arm: no safety gain, or in how many of the seeds there was none."""
    counts = means[["safety_gain", "n_no_gain", "n_seeds"]].itertuples(index=False)
    some = [f"{NO_GAIN} in {without} of {seeds} seeds" if without else None for _, without, seeds in counts]
    return [NO_GAIN if gain <= 0 else words for gain, words in zip(means["safety_gain"], some, strict=True)]


def correlation_table(results: Results) -> Table | None:
    """Table 8: Pearson and Spearman of buckets by O, by S and by C with UCR and with Eq. 8's ratio."""
    rows, headings = [], {}
    for score in "OSC":
        found = {cost: results.correlation("sft", cost, score) for cost in costs_of(results)}
        if not (ucr := found["ucr"]):
            continue
        printed = printed_row(results, 8, {"score": score})
        row = {"score": score} | {
            name: ucr[name] for name in ("n_points", "n_seeds", "n_dropped", "critical_r")
        }
        for cost, values in found.items():
            name = cost_column(cost, results.source)
            for statistic in STATISTICS:
                column = f"{name}_{statistic}"
                headings[column] = f"{cost_name(cost, results.source)} {statistic}"
                row |= {f"{column}{end}": values[f"{statistic}{end}"] for end in ("", "_low", "_high")}
                if printed and name in comparable(results):
                    row[f"paper_{column}"] = printed[column]
        without = ucr["n_no_gain"]
        flags = [f"{NO_GAIN} in {without} of {without + ucr['n_points']} buckets"] if without else []
        flags += [
            f"{cost_name(cost, results.source)}: the {values['all_equal']} are all equal"
            for cost, values in found.items()
            if values["all_equal"]
        ]
        row["flag"] = "; ".join(flags) or None
        rows.append(row)
    if not rows:
        return None
    seeds = "and training seeds" if results.several_seeds else "alone: one training seed was run"
    note = (
        f"A point is a bucket. _low and _high: 95 % over resamples of benchmark rows {seeds}. Resamples in "
        "which a bucket gained no safety are left out (n_dropped). critical_r: what |r| of as many unrelated "
        "points exceeds once in twenty times."
    )
    title = "Table 8: how far O, S and C predict the cost of a bucket"
    return Table("table8", title, ("score",), headings, pd.DataFrame(rows), note=note)


# The map itself: layers, extreme heads, the two readings of Eq. 5, other maps beside it


def layer_table(heads: HeadMap) -> pd.DataFrame:
    """Per layer the means of O, S and C, and the share of its heads in each bucket."""
    columns = {f"mean_{name}": getattr(heads, name).mean(axis=1) for name in map(COLUMN.get, "OSC")}
    shares = {f"share_bucket{n}": (heads.bucket == n).mean(axis=1) for n in range(1, heads.m + 1)}
    return pd.DataFrame({"layer": np.arange(heads.shape[0])} | columns | shares)


def extreme_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """The ten heads of highest and of lowest C (fewer of a small model), highest first, with intervals.

    Args:
        heads: heads.parquet.
    """
    ranked = heads.sort_values(["conflict_score", "layer", "head"], ascending=[False, True, True])
    ranked["probability_of_bucket"] = [
        row[bucket - 1]
        for row, bucket in zip(ranked.pop("bucket_probability"), ranked["bucket"], strict=True)
    ]
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    most = min(MOST_HEADS, len(ranked) // 2)
    return pd.concat([ranked[:most], ranked[len(ranked) - most :]])


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Of two maps; NaN where one is constant or has a single head."""
    return metrics.correlation(one.ravel(), other.ravel()).spearman if one.size > 1 else np.nan


def variant_table(heads: HeadMap) -> pd.DataFrame:
    """How far Eq. 5 as printed and its re-ranked variant give the same map."""
    names, readings = metrics.SENSITIVITY_VARIANTS, ["as_printed", "reranked"]
    sensitivity = [metrics.functional_sensitivity(heads.h_gen, heads.h_safe, name) for name in names]
    score = [metrics.conflict_score(heads.optimization_conflict, values) for values in sensitivity]
    printed, reranked = bucket = [metrics.buckets(values, heads.m) for values in score]
    rows = [
        {"quantity": "rank correlation of S (Spearman)", "agreement": spearman(*sensitivity)},
        {"quantity": "rank correlation of C (Spearman)", "agreement": spearman(*score)},
        {"quantity": "share of heads in the same bucket", "agreement": (printed == reranked).mean()},
    ]
    for zone, number in (("Risky", 1), ("Safe", heads.m)):
        quantity = f"share of the {zone} Zone in the other's {zone} Zone"
        rows.append({"quantity": quantity, "agreement": (reranked == number)[printed == number].mean()})
    for label, function in (("smallest", np.min), ("mean", np.mean), ("largest", np.max)):
        rows.append({"quantity": f"{label} S"} | dict(zip(readings, map(function, sensitivity), strict=True)))
    for number in range(1, heads.m + 1):
        means = [values[own == number].mean() for values, own in zip(score, bucket, strict=True)]
        rows.append({"quantity": f"mean C of bucket {number}"} | dict(zip(readings, means, strict=True)))
    return pd.DataFrame(rows, columns=["quantity", *readings, "agreement"])


def other_maps_table(own: HeadMap, others: Mapping[str, HeadMap]) -> pd.DataFrame:
    """How far each other map is the run's own (F.3, F.4): rank correlations, heads in the same bucket."""
    rows = []
    for name, other in others.items():
        alike = {f"spearman_{score}": spearman(own.by(score), other.by(score)) for score in "OSC"}
        same, safe = own.bucket == other.bucket, own.bucket == own.m
        rows.append({"map": name} | alike | {"same_bucket": same.mean(), "same_safe_zone": same[safe].mean()})
    return pd.DataFrame(rows)


# Files


def write(folder: Path, name: str, table: pd.DataFrame, note: str = "") -> None:
    """Writes <name>.csv (floats in full) and .md (four digits, `note` above); missing values are empty."""
    write_text(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    markdown = plain(table).to_markdown(index=False, floatfmt=".4g", missingval="")
    write_text(folder / f"{name}.md", f"{note}\n\n{markdown}\n" if note else f"{markdown}\n")
