"""The paper's result tables from a run's numbers, its printed numbers beside ours (Tables 1, 2, 7 to 11).

A table has a row for each of its arms that was tuned, and is not made where none was. Scores are in percent,
as the paper prints them; each has its standard deviation over seeds (`<column>_std`) and, where the run's
model is one of the paper's and that number was printed, `paper_<column>`. A row that gained no safety has no
cost ratio and says so in `flag`.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from backends.core.files import write_text
from data import paper
from stages.method.arms import BASE_RUN, SHARES, ArmRun, head_arm
from stages.report.correlations import STATISTICS
from stages.report.costs import SIDES
from stages.report.results import FULL, RANDOM, Results
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
UNITS = "Scores and their standard deviations over seeds (_std) in percent."
RATIO_UNITS = "Cost ratios: Eq. 7 and 8 on the averaged scores; their _std is that of the seeds' own ratios."


@dataclass(frozen=True)
class Plan:
    """A table to be: of `rows` those that were tuned."""

    name: str
    title: str
    rows: Mapping[ArmRun, dict]
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
    plans += own_plans(results, {run for plan in plans for run in plan.rows})
    tables = [build(results, plan) for plan in plans]
    tables.insert(3, correlation_table(results))
    return [table for table in tables if table]


# What stands in each table


def buckets(results: Results, **of: str) -> list[ArmRun]:
    """All buckets of a ranking by plain fine-tuning, tuned or not (`of` as in `head_arm`)."""
    numbers = range(1, results.m + 1)
    return [ArmRun(head_arm("bucket", number, results.m, **of), "sft", None) for number in numbers]


def main_plans(results: Results) -> list[Plan]:
    """Tables 1 and 2: the base model, all heads, random heads, the Risky and the Safe Zone. Table 7: buckets
    by C, by O and by S, what they were ranked by and what they cost."""
    methods = {FULL: "full", RANDOM: "random"}
    if results.m > 1:
        zones = buckets(results)
        methods |= {zones[0].arm: "risky", zones[-1].arm: "safe"}
    plans = []
    for number, words, optimizers in (
        (1, "plain fine-tuning", ["sft"]),
        (2, "PCGrad", ["pcgrad", "pcgrad-symmetric"]),
    ):
        rows = {BASE_RUN: {"method": "base"}}
        for optimizer in optimizers:
            rows |= {ArmRun(arm, optimizer, None): {"method": name} for arm, name in methods.items()}
        title = f"Table {number}: all heads, random heads and zones of C by {words}"
        plans.append(Plan(f"table{number}", title, rows, number, costly=False, ablation=False))
    ranked = [run for score in "COS" for run in buckets(results, ranked_by=score)]
    rows = {run: {"score": run.arm.ranked_by, "bucket": run.arm.bucket} for run in ranked}
    title = "Table 7: buckets by C, by O alone and by S alone"
    return [*plans, Plan("table7", title, rows, 7, ablation=False)]


def ratio_plan(results: Results) -> Plan:
    """Table 9: more and more heads, from those of highest C (top) and of lowest C (bottom)."""
    rows = {ArmRun(FULL, "sft", None): {"selection": "full", "percent": 100}}
    for kind in ("top", "bottom"):
        for share in SHARES:
            rows[ArmRun(head_arm(kind, share, results.m), "sft", None)] = {
                "selection": kind,
                "percent": share,
            }
    if not any(run.arm.share for run in rows if run in results.means.index):
        rows = {}
    title = "Table 9: share of heads tuned, from the top and from the bottom of C"
    return Plan("table9", title, rows, 9, costly=False)


def map_plans(results: Results) -> list[Plan]:
    """Tables 10 and 11, and their like: buckets of the maps from other utility rows. Of the maps from one
    pool the first alone takes the paper's number."""
    plans, numbers = [], dict(MAP_TABLES)
    for spec in results.maps[1:]:
        number = numbers.pop(spec.pool, None)
        name, head = (f"table{number}", f"Table {number}: b") if number else (f"table_map_{spec.name}", "B")
        title = f"{head}uckets of map {spec.name} ({spec.rows} rows of {spec.pool})"
        own = buckets(results, map_name=spec.name)
        rows = {run: {"map": spec.name, "bucket": run.arm.bucket} for run in own}
        plans.append(Plan(name, title, rows, number if spec.rows == MAP_ROWS else None))
    return plans


def own_plans(results: Results, shown: Set[ArmRun]) -> list[Plan]:
    """No tables of the paper: buckets of C of any other number than the run's own; NeuronTune's arms beside
    the base model, all heads and the Safe Zone; whatever else was tuned and is not `shown`."""
    finer = [run for run in results.tuned if run.arm.of != results.m and run.arm.is_zone(run.arm.of)]
    finer.sort(key=lambda run: (run.arm.of, run.arm.bucket, run.optimizer))
    neurons = [run for run in results.tuned if run.arm.of_neurons]
    neurons.sort(key=lambda run: (run.arm.lam, run.arm.neurons, run.arm.kind))
    beside = [BASE_RUN, ArmRun(FULL, "sft", None), buckets(results)[-1]] if neurons else []
    rest = [run for run in results.tuned if run not in shown | {*results.main, *finer, *neurons}]
    by_number = {run: {"buckets": run.arm.of, "bucket": run.arm.bucket} for run in finer}
    tuned = {run: {"tuned": arm_words(run.arm, results.m)} for run in (*beside, *neurons, *rest)}
    title = "NeuronTune beside CAST, on the same rows and seeds"
    return [
        Plan("table_buckets", "Buckets of C in other numbers (not in the paper)", by_number),
        Plan("table_neurons", title, {run: tuned[run] for run in (*beside, *neurons)}, note=NEURON_NOTE),
        Plan("table_further", "Further arms (not in the paper)", {run: tuned[run] for run in rest}),
    ]


def build(results: Results, plan: Plan) -> Table | None:
    """The table of the arms that were tuned; None where only the base model would be in it."""
    runs = [run for run in plan.rows if run in results.means.index]
    if all(run == BASE_RUN for run in runs):
        return None
    means = results.means.loc[runs].reset_index(drop=True)
    labels = pd.DataFrame([plan.rows[run] for run in runs])
    rows = pd.concat([labels, means[["arm", "optimizer", "n_seeds"]]], axis=1)
    # PCGrad as the paper describes it projects the alignment's gradient alone: no number for the other.
    known = [run for run in runs if run.optimizer != "pcgrad-symmetric"]
    printed = {run: printed_row(results, plan.number, plan.rows[run]) for run in known}
    theirs = pd.DataFrame([printed.get(run, {}) for run in runs], index=means.index)
    headings, compared = {}, comparable(results)
    for name, column, heading in measures(results, plan.costly):
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


def measures(results: Results, costly: bool) -> list[tuple[str, str, str]]:
    """(name, column of the means, heading): benchmarks by side, the means of the sides and, where `costly`,
    what was ranked by and cost ratios."""
    shown = [name for side in ("utility", "safety") for name in results.benchmarks(side)]
    found = [(name, name, name) for name in shown]
    headings = {"utility": "mean utility", "safety": "mean safety", "over_refusal": "over-refusal"}
    found += [(side, side, heading) for side, heading in headings.items() if side in results.draws]
    if not costly:
        return found
    named = {cost: cost_name(cost, results.source) for cost in costs_of(results)}
    ratios = [(cost_column(cost, results.source), cost, name) for cost, name in named.items()]
    return [("ranked_mean", "ranked_mean", "mean score"), *found, *ratios]


def costs_of(results: Results) -> list[str]:
    """The paper's cost ratios that the run has."""
    return [cost for cost in ("ucr", "source_cr") if cost in results.losses]


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
        row["flag"] = f"{NO_GAIN} in {without} of {without + ucr['n_points']} buckets" if without else None
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


# Files


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table with None for every missing value."""
    return table.astype(object).where(table.notna(), None)


def write(folder: Path, name: str, table: pd.DataFrame, note: str = "") -> None:
    """Writes <name>.csv (floats in full) and .md (four digits, `note` above); missing values are empty."""
    write_text(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    markdown = plain(table).to_markdown(index=False, floatfmt=".4g", missingval="")
    write_text(folder / f"{name}.md", f"{note}\n\n{markdown}\n" if note else f"{markdown}\n")
