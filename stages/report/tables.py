"""The paper's result tables from a run's numbers, its printed numbers beside ours (Tables 1, 2, 7 to 11).

A table has a row for each of its arms that was tuned, and is not made where none was. Scores are in percent,
as the paper prints them; each has its standard deviation over seeds (`<column>_std`) and, where the run's
model is one of the paper's and that number was printed, `paper_<column>`. Cost ratios are Eq. 7 and 8 on the
averaged scores, `_std` that of the seeds' own ratios. A row that gained no safety has no ratio and says so in
`flag`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from backends.core.files import write_text
from data import paper
from stages.method.arms import BASE, BASE_RUN, OWN, SHARES, Arm, ArmRun, head_arm
from stages.report.correlations import STATISTICS
from stages.report.costs import SIDES
from stages.report.results import FULL, RANDOM, Results
from stages.report.words import NO_GAIN, arm_words, cost_column, cost_name
from stages.run.maps import MapSpec

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
    """A table to be: of `runs` those that were tuned."""

    name: str
    title: str
    runs: Sequence[ArmRun]
    labels: Callable[[Arm], dict]
    """columns that name a row"""
    number: int | None = None
    """the paper's table, whose rows have the same labels; None: it has none"""
    costly: bool = False
    """with what the arms were ranked by, and the cost ratios"""
    ablation: bool = False
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
    plans = [
        main_plan(results, 1, "plain fine-tuning", ["sft"]),
        main_plan(results, 2, "PCGrad", ["pcgrad", "pcgrad-symmetric"]),
        bucket_plan(results),
        ratio_plan(results),
        *(map_plan(results, spec) for spec in results.maps[1:]),
        *own_plans(results),
    ]
    shown = {run for plan in plans for run in plan.runs} | set(results.main)
    rest = [run for run in results.tuned if run not in shown]
    plans.append(further(results, "table_further", "Further arms (not in the paper)", rest))
    tables = [build(results, plan) for plan in plans]
    tables.insert(3, correlation_table(results))
    return [table for table in tables if table]


def buckets(results: Results, ranked_by: str = "C", map_name: str = OWN) -> list[ArmRun]:
    """All buckets of a ranking, by plain fine-tuning."""
    return [
        ArmRun(head_arm("bucket", number, results.m, ranked_by=ranked_by, map_name=map_name), "sft", None)
        for number in range(1, results.m + 1)
    ]


def main_plan(results: Results, number: int, words: str, optimizers: Sequence[str]) -> Plan:
    """Tables 1 and 2: the base model, all heads, random heads, the Risky and the Safe Zone."""
    methods = {BASE: "base", FULL: "full", RANDOM: "random"}
    if results.m > 1:
        zones = buckets(results)
        methods |= {zones[0].arm: "risky", zones[-1].arm: "safe"}
    runs = [ArmRun(arm, optimizer, None) for optimizer in optimizers for arm in methods if arm != BASE]
    title = f"Table {number}: all heads, random heads and zones of C by {words}"
    return Plan(f"table{number}", title, [BASE_RUN, *runs], lambda arm: {"method": methods[arm]}, number)


def bucket_plan(results: Results) -> Plan:
    """Table 7: buckets by C, by O and by S, what they were ranked by and what they cost."""
    runs = [run for score in "COS" for run in buckets(results, score)]
    title = "Table 7: buckets by C, by O alone and by S alone"
    return Plan(
        "table7", title, runs, lambda arm: {"score": arm.ranked_by, "bucket": arm.bucket}, 7, costly=True
    )


def ratio_plan(results: Results) -> Plan:
    """Table 9: more and more heads, from those of highest C (top) and of lowest C (bottom)."""
    arms = {FULL: ("full", 100)}
    arms |= {
        head_arm(kind, share, results.m): (kind, share) for kind in ("top", "bottom") for share in SHARES
    }
    runs = [ArmRun(arm, "sft", None) for arm in arms]
    if not any(run.arm.share for run in runs if run in results.means.index):
        runs = []
    title = "Table 9: share of heads tuned, from the top and from the bottom of C"
    labels = ("selection", "percent")
    return Plan(
        "table9", title, runs, lambda arm: dict(zip(labels, arms[arm], strict=True)), 9, ablation=True
    )


def map_plan(results: Results, spec: MapSpec) -> Plan:
    """Tables 10 and 11, and their like: buckets of the map from other utility rows. Of the run's maps from
    one pool the first alone takes the paper's number."""
    first = next(other for other in results.maps[1:] if other.pool == spec.pool)
    number = MAP_TABLES.get(spec.pool) if spec == first else None
    name, head = (f"table{number}", f"Table {number}: b") if number else (f"table_map_{spec.name}", "B")
    title = f"{head}uckets of map {spec.name} ({spec.rows} rows of {spec.pool})"
    runs, printed = buckets(results, map_name=spec.name), number if spec.rows == MAP_ROWS else None
    return Plan(
        name,
        title,
        runs,
        lambda arm: {"map": arm.map, "bucket": arm.bucket},
        printed,
        costly=True,
        ablation=True,
    )


def own_plans(results: Results) -> list[Plan]:
    """No tables of the paper: buckets of C of any other number than the run's own; NeuronTune's arms beside
    the base model, all heads and the Safe Zone."""
    finer = [run for run in results.tuned if run.arm.of != results.m and run.arm.is_zone(run.arm.of)]
    finer.sort(key=lambda run: (run.arm.of, run.arm.bucket, run.optimizer))
    neurons = [run for run in results.tuned if run.arm.of_neurons]
    neurons.sort(key=lambda run: (run.arm.lam, run.arm.neurons, run.arm.kind))
    beside = [BASE_RUN, ArmRun(FULL, "sft", None), buckets(results)[-1]] if neurons else []
    title = "Buckets of C in other numbers (not in the paper)"
    return [
        replace(
            further(results, "table_buckets", title, finer),
            labels=lambda arm: {"buckets": arm.of, "bucket": arm.bucket},
        ),
        replace(
            further(
                results,
                "table_neurons",
                "NeuronTune beside CAST, on the same rows and seeds",
                beside + neurons,
            ),
            note=NEURON_NOTE,
        ),
    ]


def further(results: Results, name: str, title: str, runs: Sequence[ArmRun]) -> Plan:
    """A table of arms by their words."""
    return Plan(
        name, title, runs, lambda arm: {"tuned": arm_words(arm, results.m)}, costly=True, ablation=True
    )


def build(results: Results, plan: Plan) -> Table | None:
    """The table of the arms that were tuned; None where only the base model would be in it."""
    runs = [run for run in plan.runs if run in results.means.index]
    if all(run == BASE_RUN for run in runs):
        return None
    means = results.means.loc[runs].reset_index(drop=True)
    labels = pd.DataFrame([plan.labels(run.arm) for run in runs])
    names = tuple(labels) + (("optimizer",) if plan.name == "table2" else ())
    rows = pd.concat([labels, means[["arm", "optimizer", "n_seeds"]]], axis=1)
    # PCGrad as the paper describes it projects the alignment's gradient alone: no number for the other.
    printed = [
        {} if run.optimizer == "pcgrad-symmetric" else printed_row(results, plan.number, plan.labels(run.arm))
        for run in runs
    ]
    theirs, headings = pd.DataFrame(printed, index=means.index), {}
    for name, column, heading in measures(results, plan.costly):
        headings[name] = heading
        scale = 100 if is_score(results, column) else 1
        rows[name] = scale * means[column]
        if column != "ranked_mean":
            rows[f"{name}_std"] = scale * means[f"{column}_std"]
        if name in comparable(results) and PRINTED[name] in theirs:
            rows[f"paper_{name}"] = theirs[PRINTED[name]]
    rows["flag"] = flags(means)
    missing = [
        arm_words(run.arm, results.m)
        for run, row in zip(runs, printed, strict=True)
        if any(printed) and not row and run.optimizer != "pcgrad-symmetric"
    ]
    note = f"No printed number for {', '.join(missing)} (data/paper/README.md)." if missing else plan.note
    units = f"{UNITS} {RATIO_UNITS}" if plan.costly else UNITS
    return Table(plan.name, plan.title, names, headings, rows, units, note, plan.ablation)


def is_score(results: Results, column: str) -> bool:
    """Whether a column is a score, which tables show in percent."""
    return column in results.sides or column in SIDES


def measures(results: Results, costly: bool) -> list[tuple[str, str, str]]:
    """(name, column of the means, heading): benchmarks by side, the means of the sides and, where `costly`,
    what was ranked by and cost ratios."""
    by_side = sorted(results.sides, key=lambda name: list(SIDES.values()).index(results.sides[name]))
    found = [(name, name, name) for name in by_side if results.sides[name] != "over-refusal"]
    words = {"utility": "mean utility", "safety": "mean safety", "over_refusal": "over-refusal"}
    found += [(side, side, heading) for side, heading in words.items() if side in results.draws]
    if not costly:
        return found
    ratios = [
        (cost_column(cost, results.source), cost, cost_name(cost, results.source))
        for cost in costs_of(results)
    ]
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
    same = {
        side
        for side, names in AVERAGED.items()
        if {name for name, its_side in results.sides.items() if its_side == side} == names
    }
    return {name for name in PRINTED if RESTS_ON.get(name, set()) <= same}


def flags(means: pd.DataFrame) -> list[str | None]:
    """Of each arm: no safety gain, or in how many of the seeds there was none."""
    return [
        NO_GAIN if gain <= 0 else (f"{NO_GAIN} in {without} of {seeds} seeds" if without else None)
        for gain, without, seeds in zip(
            means["safety_gain"], means["n_no_gain"], means["n_seeds"], strict=True
        )
    ]


def correlation_table(results: Results) -> Table | None:
    """Table 8: Pearson and Spearman of buckets by O, by S and by C with UCR and with Eq. 8's ratio."""
    rows, headings = [], {}
    for score in "OSC":
        found = {cost: results.correlation("sft", cost, score) for cost in costs_of(results)}
        if not found["ucr"]:
            continue
        printed = printed_row(results, 8, {"score": score})
        row = {"score": score}
        row |= {name: found["ucr"][name] for name in ("n_points", "n_seeds", "n_dropped", "critical_r")}
        for cost, values in found.items():
            for statistic in STATISTICS:
                column = f"{cost_column(cost, results.source)}_{statistic}"
                headings[column] = f"{cost_name(cost, results.source)} {statistic}"
                row |= {f"{column}{end}": values[f"{statistic}{end}"] for end in ("", "_low", "_high")}
                if printed and cost_column(cost, results.source) in comparable(results):
                    row[f"paper_{column}"] = printed[column]
        without = found["ucr"]["n_no_gain"]
        words = f"{NO_GAIN} in {without} of {without + row['n_points']} buckets"
        rows.append(row | {"flag": words if without else None})
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
