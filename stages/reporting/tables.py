"""The paper's result tables from a run's numbers, its printed numbers beside ours (Tables 1, 2, 7 to 11).

A table has a row for each of its arms that was tuned, and is not made where none was. Scores are in percent,
as the paper prints them; each has its standard deviation over seeds (`<column>_std`) and, where the run's
model is one of the paper's and that number was printed, `paper_<column>`. Cost ratios are Eq. 7 and 8 on the
averaged scores, `_std` that of the seeds' own ratios. A row that gained no safety has no ratio and says so in
`flag`.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backends import files
from data import paper
from stages import arms, presets
from stages.maps import Map
from stages.reporting import correlations, costs, families

PRINTED = {
    # Our column -> the paper's.
    **{name: name for name in ("mmlu", "csqa", "gsm8k", "math", "wildguard", "dan")},
    "wildjailbreak": "adv_harm",
    "utility": "gen",
    "safety": "safe",
    "predicted": "mean_score",
    "ucr": "ucr",
    "mmlu_cr": "mmlu_cr",
}
MEAN_OF = {
    "utility": {"mmlu", "csqa", "gsm8k", "math"},
    "safety": {"wildjailbreak", "wildguard", "dan"},
}
"""benchmarks of the paper's averages: no other average compares with them"""
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
    "first-order MAML are ours (backends/neurons.py), so that these are no numbers of that paper's method. "
    "K + K neurons: the K of highest safety and of highest utility score, those of both once."
)
UNITS = "Scores and their standard deviations over seeds (_std) in percent."
RATIOS = "Cost ratios: Eq. 7 and 8 on the averaged scores; their _std is that of the seeds' own ratios."


@dataclass(frozen=True)
class Table:
    """One table: label columns, then measures, each with its `_std` and `paper_` columns where there are
    any."""

    name: str
    title: str
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    rows: list[dict]
    units: str
    note: str = ""
    ablation: bool = False
    """its arms are no part of the paper's main comparison"""

    @property
    def caption(self) -> str:
        return " ".join(part for part in (f"{self.title}.", self.units, self.note) if part)

    @property
    def has_paper(self) -> bool:
        return any(f"paper_{name}" in row for row in self.rows for name in self.measures)


@dataclass(frozen=True)
class Run:
    """What every table of a run needs."""

    means: Mapping[tuple[str, str], dict]
    """(arm, optimizer) -> row of costs.mean_over_seeds"""
    sides: Mapping[str, str]
    """benchmark -> side"""
    source: str | None
    """benchmark of Eq. 8"""
    m: int
    model: str | None
    """llama, qwen or mistral where the model is one that the paper reports"""


@dataclass(frozen=True)
class Entry:
    """One row to be: its labels, which arm it is, and where the paper prints it."""

    arm: str
    labels: dict
    where: dict | None = None
    """key columns of the paper's row; None: it has none"""
    optimizer: str = "sft"


def paper_model(model: str) -> str | None:
    """llama, qwen or mistral where the run's model is one that the paper reports."""
    names = {presets.PRESETS[name]["model"]: name for name in ("llama", "qwen", "mistral")}
    return names.get(model)


def all_tables(run: Run, others: Mapping[str, Map], found: Sequence[dict]) -> list[Table]:
    """Every table whose arms were tuned, the paper's first.

    Args:
        others: the run's other maps by name.
        found: rows of correlations.correlations.
    """
    made = [main_table(run, 1, ("sft",)), main_table(run, 2, ("pcgrad", "pcgrad-symmetric"))]
    made += [bucket_table(run), correlation_table(run, found), ratio_table(run)]
    first = {one.pool: one.name for one in reversed(others.values())}
    made += [map_table(run, one, first[one.pool] == one.name) for one in others.values()]
    made += [finer_table(run), neuron_table(run)]
    shown = {(row["arm"], row["optimizer"]) for table in made if table for row in table.rows if "arm" in row}
    made.append(rest_table(run, shown))
    return [table for table in made if table]


def main_table(run: Run, number: int, optimizers: Sequence[str]) -> Table | None:
    """Tables 1 and 2: the base model, all heads, random heads, the Risky and the Safe Zone.

    PCGrad as the paper describes it projects the alignment's gradient, so its numbers stand beside "pcgrad"
    only.
    """
    methods = {"full": "full", "random": "random"}
    methods |= {"risky": "bucket1", "safe": f"bucket{run.m}"} if run.m > 1 else {}
    entries = [Entry(costs.BASE, {"method": "base"}, {"method": "base"}, "none")]
    for optimizer in optimizers:
        for method, arm in methods.items():
            where = {"method": method} if optimizer == optimizers[0] else None
            entries.append(Entry(arm, {"method": method}, where, optimizer))
    name = {1: "plain fine-tuning", 2: "PCGrad"}[number]
    labels = ("method", "optimizer") if len(optimizers) > 1 else ("method",)
    title = f"Table {number}: all heads, random heads and zones of C by {name}"
    return build(run, f"table{number}", title, labels, entries, number)


def bucket_table(run: Run) -> Table | None:
    """Table 7: buckets by C, by O and by S, what they were ranked by and what they cost."""
    entries = [
        Entry(
            _bucket(number, run.m, score),
            {"score": score, "bucket": number},
            {"score": score, "bucket": number},
        )
        for score in "COS"
        for number in range(1, run.m + 1)
    ]
    title = "Table 7: buckets by C, by O alone and by S alone"
    return build(run, "table7", title, ("score", "bucket"), entries, 7, costly=True)


def ratio_table(run: Run) -> Table | None:
    """Table 9: more and more heads, from those of highest C (top) and of lowest C (bottom)."""
    entries = [Entry("full", _ratio("full", 100), _ratio("full", 100))]
    for selection in ("top", "bottom"):
        for percent in (25, 50, 75):
            arm = arms.name_of(arms.parse(f"{selection}{percent}", run.m), run.m)
            entries.append(Entry(arm, _ratio(selection, percent), _ratio(selection, percent)))
    if not any((one.arm, "sft") in run.means for one in entries if one.labels["percent"] in (50, 75)):
        return None
    title = "Table 9: share of heads tuned, from the top and from the bottom of C"
    return build(run, "table9", title, ("selection", "percent"), entries, 9, ablation=True)


def map_table(run: Run, one: Map, first: bool = True) -> Table | None:
    """Tables 10 and 11, and their like: buckets of the map from other utility rows.

    Args:
        first: of the run's maps from that pool, which alone takes the paper's number.
    """
    number = MAP_TABLES.get(one.pool) if first else None
    entries = [
        Entry(_bucket(bucket, run.m, "C", one.name), {"map": one.name, "bucket": bucket}, {"bucket": bucket})
        for bucket in range(1, run.m + 1)
    ]
    name, head = (f"table{number}", f"Table {number}: ") if number else (f"table_map_{one.name}", "")
    title = f"{head}{'b' if head else 'B'}uckets of map {one.name} ({one.rows} rows of {one.pool})"
    printed = number if one.rows == MAP_ROWS else None
    return build(run, name, title, ("bucket",), entries, printed, ablation=True, costly=True)


def finer_table(run: Run) -> Table | None:
    """Buckets of C of any other number than the run's own: no table of the paper."""
    entries = []
    for arm, optimizer in run.means:
        one = families.family(arm, run.m)
        if one and one.of != run.m and one == families.Family("C", one.of, ""):
            number = families.parse(arm, run.m).number
            entries.append(Entry(arm, {"buckets": one.of, "bucket": number}, None, optimizer))
    entries.sort(key=lambda entry: (entry.labels["buckets"], entry.labels["bucket"], entry.optimizer))
    labels, title = ("buckets", "bucket"), "Buckets of C in other numbers (not in the paper)"
    return build(run, "table_buckets", title, labels, entries, ablation=True, costly=True)


def neuron_table(run: Run) -> Table | None:
    """NeuronTune's arms beside the base model, all heads and the Safe Zone: no table of either paper."""
    own = sorted(
        (arm for arm, _ in run.means if families.of_neurons(arm, run.m)),
        key=lambda arm: (families.parse(arm, run.m).lam, families.parse(arm, run.m).number, arm),
    )
    if not own:
        return None
    entries = [Entry(costs.BASE, {"tuned": "nothing (base model)"}, None, "none")]
    entries += [Entry(arm, {"tuned": families.words(arm, run.m)}) for arm in ("full", f"bucket{run.m}")]
    entries += [Entry(arm, {"tuned": families.words(arm, run.m)}, None, arms.MAML) for arm in own]
    title = "NeuronTune beside CAST, on the same rows and seeds"
    made = build(run, "table_neurons", title, ("tuned",), entries, ablation=True, costly=True)
    return made and replace(made, note=NEURON_NOTE)


def rest_table(run: Run, shown: Iterable[tuple[str, str]]) -> Table | None:
    """Arms that no other table shows."""
    left = [key for key in run.means if key not in set(shown) and not families.is_main(key[0], run.m)]
    entries = [Entry(arm, {"tuned": families.words(arm, run.m)}, None, optimizer) for arm, optimizer in left]
    labels, title = ("tuned",), "Further arms (not in the paper)"
    return build(run, "table_further", title, labels, entries, ablation=True, costly=True)


def _ratio(selection: str, percent: int) -> dict:
    return {"selection": selection, "percent": percent}


def _bucket(number: int, m: int, score: str, map_: str = "") -> str:
    return arms.name_of(arms.Arm("bucket", number, m, score, map_), m)


def build(
    run: Run,
    name: str,
    title: str,
    labels: tuple[str, ...],
    entries: Sequence[Entry],
    number: int | None = None,
    *,
    costly: bool = False,
    ablation: bool = False,
) -> Table | None:
    """The table of the entries that were tuned; None where only the base model would be in it.

    Args:
        number: the paper's table; None: it has none.
        costly: with what the arms were ranked by, and the cost ratios.
    """
    tuned = [entry for entry in entries if (entry.arm, entry.optimizer) in run.means]
    if all(entry.arm == costs.BASE for entry in tuned):
        return None
    scores = [name for side in ("utility", "safety") for name in run.sides if run.sides[name] == side]
    scores += ["utility", "safety"] + (["over_refusal"] if "over-refusal" in run.sides.values() else [])
    ratios = ["ucr", "source_cr"] if run.source else ["ucr"]
    measures = (
        ["predicted", *scores, *(costs.cost_column(one, run.source) for one in ratios)] if costly else scores
    )
    printed = {id(entry): _printed(run, number, entry) for entry in tuned}
    columns = {
        name for name in _comparable(run) if any(PRINTED[name] in (there or {}) for there in printed.values())
    }
    rows = []
    for entry in tuned:
        mean = run.means[entry.arm, entry.optimizer]
        values = {one: _share(mean, one) for one in scores} | {"predicted": (mean.get("predicted"), None)}
        for one in ratios:
            values[costs.cost_column(one, run.source)] = (mean[f"{one}_of_means"], mean[f"{one}_std"])
        row = entry.labels | {"arm": entry.arm, "optimizer": entry.optimizer, "n_seeds": mean["n_seeds"]}
        for one in measures:
            row[one], row[f"{one}_std"] = values[one]
            if one in columns:
                row[f"paper_{one}"] = (printed[id(entry)] or {}).get(PRINTED[one])
        rows.append(row | {"flag": flag(mean)})
    note = ""
    lacking = [entry for entry in tuned if columns and entry.where and not printed[id(entry)]]
    if lacking := [families.words(entry.arm, run.m) for entry in lacking]:
        note = f"No printed number for {', '.join(lacking)} (data/paper/README.md)."
    units = f"{UNITS} {RATIOS}" if costly else UNITS
    return Table(name, title, labels, tuple(measures), rows, units, note, ablation)


def _share(mean: dict, name: str) -> tuple[float | None, float | None]:
    """Mean and deviation in percent."""
    return tuple(None if value is None else 100 * value for value in (mean[name], mean[f"{name}_std"]))


def _printed(run: Run, number: int | None, entry: Entry) -> dict | None:
    """The paper's row of an entry. With another number of buckets than the paper's none compares."""
    if number is None or run.model is None or run.m != M or entry.where is None:
        return None
    return paper.row(number, model=run.model, **entry.where)


def _comparable(run: Run) -> set[str]:
    """Our columns that compare with the paper's: averages only where they are over the same benchmarks."""
    same = {
        mean
        for mean, names in MEAN_OF.items()
        if {name for name, side in run.sides.items() if side == mean} == names
    }
    needed = {
        "utility": {"utility"},
        "safety": {"safety"},
        "ucr": {"utility", "safety"},
        "mmlu_cr": {"safety"},
    }
    return {name for name in PRINTED if needed.get(name, set()) <= same}


def flag(mean: dict) -> str:
    """ "", "no safety gain", or in how many of the seeds there was none."""
    if mean["arm"] == costs.BASE:
        return ""
    if mean["flag"] or mean["ucr_of_means"] is None:
        return costs.NO_GAIN
    return f"{costs.NO_GAIN} in {mean['n_no_gain']} of {mean['n_seeds']} seeds" if mean["n_no_gain"] else ""


def correlation_table(run: Run, found: Sequence[dict]) -> Table | None:
    """Table 8: Pearson and Spearman of buckets by O, by S and by C with UCR and with Eq. 8's ratio."""
    ratios = ["ucr", "source_cr"] if run.source else ["ucr"]
    columns_of = {one: costs.cost_column(one, run.source) for one in ratios}
    measures = [f"{cost}_{name}" for cost in columns_of.values() for name in correlations.STATISTICS]
    rows = []
    for score in "OSC":
        each = {one: correlations.one_of(found, "sft", one, score) for one in ratios}
        if each["ucr"] is None:
            continue
        printed = paper.row(8, model=run.model, score=score) if run.model and run.m == M else None
        columns = _comparable(run) if printed else set()
        row = {"score": score} | {name: each["ucr"][name] for name in ("n_points", "n_seeds", "critical_r")}
        for one, values in each.items():
            cost = columns_of[one]
            for name in correlations.STATISTICS:
                row |= {f"{cost}_{name}{end}": values[f"{name}{end}"] for end in ("", "_low", "_high")}
                if cost in columns:
                    row[f"paper_{cost}_{name}"] = printed[f"{cost}_{name}"]
        unusable = each["ucr"]["n_no_gain"]
        row["flag"] = (
            f"{costs.NO_GAIN} in {unusable} of {unusable + row['n_points']} buckets" if unusable else ""
        )
        rows.append(row)
    if not rows:
        return None
    note = (
        "A point is a bucket, its cost the mean of its seeds' ratios; _low and _high are a bootstrap over "
        "seeds. critical_r: what |r| of as many unrelated points exceeds once in twenty times."
    )
    title = "Table 8: how far O, S and C foretell the cost of a bucket"
    return Table("table8", title, ("score",), tuple(measures), rows, note)


# Files


def write(folder: Path, name: str, rows: Sequence[dict], note: str = "") -> None:
    """Writes <name>.csv (floats in full) and .md (four digits, `note` above); None is an empty cell."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _full(row.get(column)) for column in columns} for row in rows)
    files.write_text(folder / f"{name}.csv", text.getvalue())
    lines = [columns, ["---"] * len(columns)]
    lines += [[_short(row.get(column)) for column in columns] for row in rows]
    markdown = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    files.write_text(folder / f"{name}.md", f"{note}\n\n{markdown}" if note else markdown)


def _full(value: object) -> str:
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _full(value).replace("|", "\\|")
