"""The audit's checks by recomputation: each computes a table anew from what it rests on, and compares.

A check takes a `Run` and returns findings. It names rows by (layer, head), arm or example_id, and never shows
a prompt or an answer, which may be harmful.
"""

import csv
import re
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np

from backends.base import Recipe, batch_order, learning_rate
from data import benchmarks as registry
from data.jsonl import DATA_TYPES
from data.judges import KEYWORD_JUDGE_VERSION
from stages import arms, bootstrap, drawing, gram, judging, maps, metrics
from stages.auditing.audit_run import BASE, GROUPS, SWEPT, Arm, Finding, Run, finding, unlike

COSTS = "06_correlate/tables/costs.csv"


# 01: rows


def rows_asked(run: Run) -> list[Finding]:
    """As many rows of each role, data type and benchmark as the settings ask for, or fewer and said so."""
    settings = run.settings("01_calibrate")
    wanted = {role: settings[f"{role}_rows"] for role in ("util", "safe")}
    wanted |= {name: one.rows for name, one in maps.asked(tuple(settings["maps"]), settings["folds"]).items()}
    wanted |= dict.fromkeys(DATA_TYPES, settings["align_rows"] // len(DATA_TYPES))
    wanted |= {name: one.rows for name, one in run.asked.items()}
    wanted |= dict.fromkeys(drawing.PAIR, settings["pairs"]) if settings["pairs"] else {}
    roles = [run.table(f"01_calibrate/{name}.parquet")["role"].to_pylist() for name in GROUPS]
    counts = Counter(role for group in roles for role in group)
    told = [short["what"] for short in run.manifests["01_calibrate"]["notes"].get("short", [])]
    faults = [f"{role}: rows of no setting" for role in counts if role not in wanted]
    for role, rows in wanted.items():
        everything = role in run.asked and rows == 0
        word = "alignment" if role in DATA_TYPES else role
        said = counts[role] < rows and any(re.search(rf"\b{word}\b", what) for what in told)
        if counts[role] == 0 or (counts[role] != rows and not everything and not said):
            faults.append(f"{role}: {counts[role]} rows, {rows} asked")
    if len({counts[kind] for kind in DATA_TYPES}) > 1:
        faults.append(f"alignment is unbalanced: {[counts[kind] for kind in DATA_TYPES]}")
    return [
        finding(
            "rows are as many as asked for, or as there are",
            faults,
            ", ".join(f"{n} {role}" for role, n in counts.items()),
        )
    ]


# 02 and 03: the map


def gradients(run: Run) -> list[Finding]:
    """dot, norms, O and its interval, from the Gram matrices (Eq. 2), of every map."""
    return [gradients_of(run, number, name) for number, name in enumerate(run.map_names)]


def seeded(seed: int, stage: int, number: int) -> np.random.Generator:
    """The generator of a map's bootstrap in stage 02 or 03."""
    return np.random.default_rng([seed, stage, number] if number else [seed, stage])


def gradients_of(run: Run, number: int, name: str) -> Finding:
    file, settings = maps.file("gradients", name), run.settings("02_conflict")
    table, matrices = run.table(f"02_conflict/{file}"), run.gram(name)
    dot, norm_safe, norm_util = gram.conflict_from_gram(matrices, settings["folds"])
    generator = seeded(settings["seed"], 2, number)
    drawn = gram.bootstrap_conflict(matrices, generator, settings["resamples"])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    conflict = metrics.optimization_conflict(dot, norm_safe, norm_util)
    lengths = {"dot": dot, "norm_safe": norm_safe, "norm_util": norm_util}
    computed = lengths | {"conflict": conflict, "conflict_low": low, "conflict_high": high}
    faults = []
    for column, values in computed.items():
        scale = float(np.abs(values).max()) if column in lengths else 1.0
        faults += unlike(column, run.heads, table[column].to_numpy(), values.ravel(), scale)
    figure = f"dot, norms, O and its interval of {len(run.heads)} heads"
    return finding(f"{file} from its Gram matrices", faults, figure)


def sweep(run: Run) -> list[Finding]:
    """Every head x example once; correct, text and refused from predictions, token ids and text."""
    found = [judge(run)]
    outcome = {
        relative: np.stack([run.outcomes[row["example_id"]] for row in rows], axis=1)
        for relative, rows in run.swept.items()
    }
    swept = {**run.swept, "03_sensitivity/sweep_generations.parquet": run.calibration["safe"]}
    there = {f"03_sensitivity/{name}" for name in run.manifests["03_sensitivity"]["outputs"]}
    faults = [
        f"{relative}: no row of a map asks for it" for relative in SWEPT if relative in there - swept.keys()
    ]
    found.append(finding("tables of the sweep", faults, f"{len(swept)}, as the calibration rows ask"))
    silenced = [(-1, -1), *run.heads]
    for relative, rows in swept.items():
        column = "correct" if relative in outcome else "refused"
        again = outcome.get(relative, run.refused)
        stored = run.table(relative)[column].to_numpy(zero_copy_only=False)
        places = [(*head, row["example_id"]) for head in silenced for row in rows]
        figure = f"{len(places)} outcomes, every one of {len(silenced)} x {len(rows)} (heads x rows) once"
        name = relative.split("/")[1]
        found.append(finding(f"{name}: {column}", unlike(column, places, stored, again.ravel()), figure))
    return [*found, *(sweep_text(run, name) for name in swept if "choices" not in name)]


def judge(run: Run) -> Finding:
    """Verdicts can only be judged again by the judge that made them."""
    used = {"03_sensitivity": run.settings("03_sensitivity")["judge"]}
    used["05_evaluate"] = run.manifests["05_evaluate"]["notes"].get("judge")
    faults = [
        f"{stage} was judged by version {version}, this is {KEYWORD_JUDGE_VERSION}"
        for stage, version in used.items()
        if version != KEYWORD_JUDGE_VERSION
    ]
    return finding("judge", faults, f"keywords, version {KEYWORD_JUDGE_VERSION}")


def sweep_text(run: Run, relative: str) -> Finding:
    what = f"{relative.split('/')[1]}: text"
    if run.tokenizer is None:
        return Finding(what, None, "the recorded tokenizer is not on this machine")
    decode = cache(lambda ids: run.tokenizer.decode(ids, skip_special_tokens=True))
    faults = []
    for batch in run.table(relative).to_batches(max_chunksize=4096):  # all ids at once may fill gigabytes
        for row in batch.to_pylist():
            if decode(tuple(row["token_ids"])) != row["text"]:
                place = (row["layer"], row["head"], row["example_id"])
                faults.append(f"{place}: text is not what its token ids decode to")
    return finding(what, faults, f"{run.table(relative).num_rows} responses decode from their token ids")


def conflict_map(run: Run) -> list[Finding]:
    """H_gen, H_safe, S, C, buckets and all their intervals, from Gram matrices and outcomes (Eq. 3-6), of
    every map."""
    return [one for number, name in enumerate(run.map_names) for one in conflict_map_of(run, number, name)]


def conflict_map_of(run: Run, number: int, name: str) -> list[Finding]:
    file, settings = maps.file("heads", name), run.settings("03_sensitivity")
    relative, matrices = f"03_sensitivity/{file}", run.gram(name)
    run.check_grid(relative, run.grid)
    table, shape, variant, m = run.table(relative), run.grid, settings["variant"], settings["buckets"]
    outcomes = [(each[0], each[1:].reshape(*shape, -1)) for each in (run.correct(name), run.refused)]
    conflict = metrics.optimization_conflict(*gram.conflict_from_gram(matrices, matrices.shape[-1] // 2))
    h_gen, h_safe = (metrics.accuracy_change(*each) for each in outcomes)
    sensitivity = metrics.functional_sensitivity(h_gen, h_safe, variant)
    score = metrics.conflict_score(conflict, sensitivity)
    computed = {"conflict": conflict, "h_gen": h_gen, "h_safe": h_safe, "sensitivity": sensitivity}
    # Buckets from the stored scores, which are compared too: another machine's last bit must not move a tie.
    computed["score"], computed["bucket"] = (
        score,
        metrics.buckets(table["score"].to_numpy().reshape(shape), m),
    )

    generator = seeded(settings["seed"], 3, number)
    sure = bootstrap.map_intervals(
        gram.bootstrap_conflict(matrices, generator, settings["resamples"]),
        *(bootstrap.resampled_changes(*each, generator, settings["resamples"]) for each in outcomes),
        variant,
        m,
    )
    intervals = {f"{name}_low": values for name, values in sure.low.items()}
    intervals |= {f"{name}_high": values for name, values in sure.high.items()}
    faults = []
    for column, values in (computed | intervals).items():
        faults += unlike(column, run.heads, table[column].to_numpy(), values.ravel())
    probability = np.array(table["bucket_probability"].to_pylist())
    faults += unlike("bucket_probability", run.heads, probability, sure.bucket_probability.reshape(-1, m))
    sizes = np.bincount(table["bucket"].to_numpy(), minlength=m + 1)[1:]
    even = [] if np.ptp(sizes) <= 1 else [f"heads in buckets 1 to {m}: {sizes.tolist()}"]
    figure = f"O, H, S ({variant}), C, bucket and intervals of {len(run.heads)} heads"
    return [
        finding(f"{file} from gradients and sweep", faults, figure),
        finding(f"{file}: bucket sizes differ by at most 1", even, f"{sizes.tolist()}"),
    ]


# 04: budgets


def budgets(run: Run) -> list[Finding]:
    """Each arm tunes just the heads of its name; every arm sees the same rows, steps and learning rates."""
    settings = run.settings("04_align")
    names = ("conflict", "sensitivity", "score")
    ranked = {}
    for name in run.map_names:
        table = run.table(f"03_sensitivity/{maps.file('heads', name)}")
        ranked[name] = arms.HeadMap(*(table[each].to_numpy().reshape(run.grid) for each in names))
    asked = arms.units(SimpleNamespace(**settings))
    wanted = [(one["arm"], one["optimizer"], one["seed"]) for one in asked]
    faults = [] if run.labels[1:] == wanted else [f"arms.parquet has {run.labels[1:]}, asked were {wanted}"]
    for arm in run.arms:
        unit = f"{arm['arm']}-{arm['optimizer']}-{arm['seed']}"
        if arm["optimizer"] == arms.MAML:
            continue  # audit_neurons
        expected = arms.heads(arm["arm"], ranked, settings["buckets"], arm["seed"])
        own = list(zip(arm["layers"], arm["heads"], strict=True))
        if own != expected:
            extra, lacking = sorted(set(own) - set(expected)), sorted(set(expected) - set(own))
            faults.append(
                f"{unit}: {len(own)} heads, heads.parquet gives {len(expected)} (+{extra} -{lacking})"
            )
            continue
        computed = {"adapter": f"adapters/{unit}", "n_heads": len(expected)}
        computed["n_layers"] = len({layer for layer, _ in expected})
        by = ranked[arms.parse(arm["arm"], settings["buckets"]).map]
        for name in names:
            computed[f"mean_{name}"] = getattr(by, name)[tuple(np.array(expected).T)].mean()
        for column, value in computed.items():
            faults += unlike(column, [unit], [arm[column]], [value])
    sizes = {arm["arm"]: arm["n_heads"] for arm in run.arms if arm["optimizer"] != arms.MAML}
    return [finding("arms are the heads of their buckets", faults, f"{sizes}"), steps(run, settings)]


def steps(run: Run, settings: dict) -> Finding:
    """training.parquet against the rows, order and schedule that the recipe gives."""
    alignment = run.table("01_calibrate/alignment.parquet")
    prompts, targets = (alignment[name].to_pylist() for name in ("prompt_ids", "target_ids"))
    whole = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    lengths = [min(length, settings["max_length"]) for length in whole]
    rows = run.table("04_align/training.parquet").to_pylist()
    faults, count = [], 0
    labels = [label for label in run.labels[1:] if label[1] != arms.MAML]
    for label in labels:
        own = [row for row in rows if (row["arm"], row["optimizer"], row["seed"]) == label]
        names = ("lr", "epochs", "batch", "accumulation")
        recipe = Recipe(seed=label[2], **{name: settings[name] for name in names})
        order = batch_order(len(lengths), recipe)
        unit, count = "-".join(map(str, label)), len(order)
        if [row["step"] for row in own] != list(range(count)):
            faults.append(f"{unit}: {len(own)} steps in training.parquet, {count} asked")
            continue
        places = [f"{unit} step {step}" for step in range(count)]
        tokens = [sum(lengths[row] for row in batch) for batch in order]
        rates = [learning_rate(step, count, recipe) for step in range(count)]
        faults += unlike("tokens", places, [row["tokens"] for row in own], tokens)
        faults += unlike("lr", places, [row["lr"] for row in own], rates)
    others = sum(row["optimizer"] == arms.MAML for row in rows)
    if len(rows) - others != count * len(labels):
        faults.append(
            f"training.parquet has {len(rows) - others} rows, not {len(labels)} arms x {count} steps"
        )
    figure = f"{count} steps of the same rows and learning rates in each of {len(labels)} arms"
    return finding("budgets equal", faults, figure)


# 05 and 06: scores


def responses(run: Run) -> list[Finding]:
    """Every arm x benchmark row once, its verdict as judged again; scores and intervals from those."""
    faults, count = [], 0
    for (label, name), own in run.answers.items():
        again, asked = run.judged[label, name], run.benchmarks[name]
        rows, count = own.to_pylist(), count + own.num_rows
        places = [(label[0], label[2], row["example_id"]) for row in rows]
        for column in judging.COLUMNS:
            stored, computed = (table[column].to_pylist() for table in (own, again))
            faults += unlike(column, places, np.array(stored, object), np.array(computed, object))
        for place, row, question in zip(places, rows, asked, strict=True):
            if row["prompt"] != question["prompt"]:
                faults.append(f"{place}: the prompt is not that of benchmarks.parquet")
            if question["scoring"] != "choice":
                told = row["prediction"] == -1 and np.isnan(row["probability"])
            else:
                told = 0 <= row["probability"] <= 1 + 1e-6 and not row["token_ids"]
            if not told or row["output"] != spoken(run, question, row):
                faults.append(f"{place}: output, token ids, prediction and probability do not fit each other")
    figure = f"{count} verdicts of {len(run.labels)} models"
    figure += "; a classifier's words were believed" if run.classified else ""
    return [finding("responses.parquet judged again", faults, figure), scores(run)]


def spoken(run: Run, question: dict, row: dict) -> str | None:
    """The text of what was generated or predicted; with no tokenizer here to tell, the row is believed."""
    predicted = row["prediction"]
    if question["scoring"] != "choice":
        return (
            run.tokenizer.decode(row["token_ids"], skip_special_tokens=True)
            if run.tokenizer
            else row["output"]
        )
    if question["choices"]:
        return question["choices"][predicted] if 0 <= predicted < len(question["choices"]) else None
    return run.tokenizer.decode([predicted]) if run.tokenizer else row["output"]


def scores(run: Run) -> Finding:
    rows = run.table("05_evaluate/scores.parquet").to_pylist()
    cells = [((row["arm"], row["optimizer"], row["seed"]), row["benchmark"]) for row in rows]
    if cells != list(run.verdicts):
        raise ValueError("05_evaluate/scores.parquet does not hold every arm x benchmark once, in order")
    faults = []
    for row, (cell, passed) in zip(rows, run.verdicts.items(), strict=True):
        low, high = metrics.wilson_interval(int(passed.sum()), len(passed))
        computed = {"n": len(passed), "score": run.scores[cell], "score_low": low, "score_high": high}
        computed["side"] = registry.BENCHMARKS[cell[1]].side
        for column, value in computed.items():
            faults += unlike(column, [f"{cell[0][0]}-{cell[0][2]} {cell[1]}"], [row[column]], [value])
    return finding("scores.parquet from the verdicts", faults, f"{len(rows)} scores with Wilson intervals")


def costs(run: Run) -> list[Finding]:
    """Means by side, UCR and its kin, and the flag, of every arm (Eq. 7-8), from the verdicts."""
    with open(run.folder / COSTS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [expected_costs(run, label) for label in run.labels]
    keys = [tuple(map(str, label)) for label in run.labels]
    if [(row["arm"], row["optimizer"], row["seed"]) for row in rows] != keys:
        raise ValueError(f"{COSTS} does not hold the base model and every arm once, in order")
    if lacking := wanted[0].keys() - rows[0].keys():
        raise ValueError(f"{COSTS} has no column {', '.join(sorted(lacking))}")
    faults = []
    for label, row, computed in zip(run.labels, rows, wanted, strict=True):
        for column, value in computed.items():
            stored = row[column]
            if isinstance(value, float):
                stored = float(stored) if stored else float("nan")  # a cell without a value is empty
            faults += unlike(column, [f"{label[0]}-{label[2]}"], [stored], [value])
    figure = f"utility, safety, cost ratios and flags of {len(rows)} models"
    return [finding("costs.csv from the verdicts", faults, figure)]


def expected_costs(run: Run, label: Arm) -> dict[str, float | str]:
    """A row of costs.csv; NaN where there is no value."""
    sides = {name: registry.BENCHMARKS[name].side for name in run.benchmarks}
    source = [name for name in sides if registry.BENCHMARKS[name].source_domain]

    def mean(side: str, of: Arm) -> float:
        values = [run.scores[of, name] for name in sides if sides[name] == side]
        return float(np.mean(values)) if values else float("nan")

    def ratio(before: float, after: float) -> float:
        """Eq. 7, or NaN where a score is missing."""
        if label == BASE or np.isnan(before):
            return float("nan")
        return float(metrics.utility_cost_ratio(before, after, mean("safety", BASE), safety))

    safety = mean("safety", label)
    at_source = [run.scores[of, source[0]] if source else float("nan") for of in (BASE, label)]
    return {
        **{name: run.scores[label, name] for name in sides},
        "utility": mean("utility", label),
        "safety": safety,
        "over_refusal": mean("over-refusal", label),
        "ucr": ratio(mean("utility", BASE), mean("utility", label)),
        "source_cr": ratio(*at_source),
        # The loss is a rise here, so that base and arm change places.
        "over_refusal_cr": ratio(mean("over-refusal", label), mean("over-refusal", BASE)),
        "flag": "no safety gain" if label != BASE and safety <= mean("safety", BASE) else "",
    }
