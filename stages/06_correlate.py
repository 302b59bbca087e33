"""Stage 06: what safety has cost, whether the map foretold it, and the report (Eq. 7-8, §5).

    python -m stages.06_correlate --run outputs/smollm

Reads the benchmarks, the map, the arms, the scores and the responses; writes tables/*.csv (full precision)
with the same as .md, figures/*.svg and .png, and report.html. Needs no model: seconds on any machine. Its
files hold no times and no paths of this machine, so that the same inputs give the same bytes; times stand in
each stage's manifest.json.
"""

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa

from backends import files
from backends.errors import InputError
from data import benchmarks as registry
from data import paper
from stages import artifacts, cli, comparison, costs, figures, metrics, presets, report, verdicts

NAME = "06_correlate"
USES = ["seed", "buckets", "variant", "resamples"]
BENCHMARKS, HEADS = "01_calibrate/benchmarks.parquet", "03_sensitivity/heads.parquet"
ARMS, SCORES = "04_align/arms.parquet", "05_evaluate/scores.parquet"
RESPONSES = "05_evaluate/responses.parquet"
MOST_HEADS = 10
PAPER_COLUMNS = {
    # The paper's column -> ours; scores in percent.
    "mmlu": "mmlu",
    "csqa": "csqa",
    "gsm8k": "gsm8k",
    "math": "math",
    "adv_harm": "wildjailbreak",
    "wildguard": "wildguard",
    "dan": "dan",
    "gen": "utility",
    "safe": "safety",
    "mean_score": "mean_score",
    "ucr": "ucr_of_means",
    "mmlu_cr": "source_cr",
}
NOT_PERCENT = ("mean_score", "ucr", "mmlu_cr")


def layer_rows(heads: figures.HeadMap) -> list[dict]:
    """Per layer the means of O, S and C, and the share of its heads in each bucket."""
    rows = []
    for layer in range(len(heads.score)):
        row = {"layer": layer}
        for name in ("conflict", "sensitivity", "score"):
            row[f"mean_{name}"] = float(getattr(heads, name)[layer].mean())
        for number in range(1, heads.m + 1):
            row[f"share_bucket{number}"] = float((heads.bucket[layer] == number).mean())
        rows.append(row)
    return rows


def extreme_heads(table: pa.Table) -> list[dict]:
    """The ten heads of highest and of lowest C (fewer of a small model), highest first, with intervals."""
    rows = sorted(table.to_pylist(), key=lambda row: (-row["score"], row["layer"], row["head"]))
    most = min(MOST_HEADS, len(rows) // 2)
    numbered = [{"rank": rank} | row for rank, row in enumerate(rows, start=1)]
    chosen = []
    for row in numbered[:most] + numbered[len(rows) - most :]:
        probability = row.pop("bucket_probability")[row["bucket"] - 1]
        chosen.append(row | {"probability_of_bucket": None if np.isnan(probability) else probability})
    return chosen


def variant_rows(h_gen: np.ndarray, h_safe: np.ndarray, conflict: np.ndarray, m: int) -> list[dict]:
    """How far Eq. 5 as printed and its re-ranked variant give the same map; all inputs [L, H]."""
    names = metrics.SENSITIVITY_VARIANTS
    sensitivity = {name: metrics.functional_sensitivity(h_gen, h_safe, name) for name in names}
    score = {name: metrics.conflict_score(conflict, sensitivity[name]) for name in names}
    bucket = {name: metrics.buckets(score[name], m) for name in names}
    printed, reranked = (bucket[name] for name in names)

    def row(quantity: str, values: tuple = (None, None), agreement: float | None = None) -> dict:
        return {"quantity": quantity, "as_printed": values[0], "reranked": values[1], "agreement": agreement}

    def rank_correlation(values: dict[str, np.ndarray]) -> float | None:
        if values[names[0]].size < 2:
            return None
        rho = metrics.correlation(*(values[name].ravel() for name in names)).spearman
        return None if np.isnan(rho) else rho

    rows = [
        row("rank correlation of S (Spearman)", agreement=rank_correlation(sensitivity)),
        row("rank correlation of C (Spearman)", agreement=rank_correlation(score)),
        row("share of heads in the same bucket", agreement=float((printed == reranked).mean())),
    ]
    for label, number in (("Risky", 1), ("Safe", m)):
        both = ((printed == number) & (reranked == number)).sum() / (printed == number).sum()
        rows.append(row(f"share of the {label} Zone in the other's {label} Zone", agreement=float(both)))
    for label, function in (("smallest", np.min), ("mean", np.mean), ("largest", np.max)):
        rows.append(row(f"{label} S", tuple(float(function(sensitivity[name])) for name in names)))
    for number in range(1, m + 1):
        means = tuple(float(score[name][bucket[name] == number].mean()) for name in names)
        rows.append(row(f"mean C of bucket {number}", means))
    return rows


def paper_model(model: str) -> str | None:
    """llama, qwen or mistral where the run's model is one that the paper reports."""
    names = {presets.PRESETS[name]["model"]: name for name in ("llama", "qwen", "mistral")}
    return names.get(model)


def paper_rows(name: str, means: list[dict], m: int) -> list[dict]:
    """The paper's numbers (Tables 1, 2, 7) and ours, one row a number; empty where M is not the paper's 4."""
    if m != 4:
        return []
    printed: dict[tuple, dict] = {}
    methods = {"base": "base", "full": "full", "random": "random", "risky": "bucket1", "safe": "bucket4"}
    for number, optimizer in ((1, "sft"), (2, "pcgrad")):
        for row in paper.table(number):
            if row["model"] == name and (number == 1 or row["method"] != "base"):
                arm = methods[row["method"]]
                printed[arm, "none" if arm == costs.BASE else optimizer] = row
    for row in paper.table(7):
        if row["model"] == name and row["score"] == "C":
            printed[f"bucket{row['bucket']:.0f}", "sft"] = row
    rows = []
    for mean in means:
        for column, ours in PAPER_COLUMNS.items():
            value = printed.get((mean["arm"], mean["optimizer"]), {}).get(column)
            if value is not None and mean.get(ours) is not None:
                scale = 1 if column in NOT_PERCENT else 100
                row = {"arm": mean["arm"], "optimizer": mean["optimizer"], "quantity": column}
                rows.append(row | {"paper": value, "ours": scale * mean[ours]})
    return rows


def paper_correlations(name: str, found: list[dict]) -> list[dict]:
    """Table 8's row C of this model and ours; its rows O and S rank the buckets by O and S, ours do not."""
    (printed,) = [row for row in paper.table(8) if row["model"] == name and row["score"] == "C"]
    rows = []
    for one in found:
        if one["optimizer"] == "sft" and one["measure"] == "C" and one["cost"] != "over_refusal_cr":
            for statistic in ("pearson", "spearman"):
                column = {"ucr": "ucr", "source_cr": "mmlu_cr"}[one["cost"]]
                row = {"arm": "buckets", "optimizer": "sft", "quantity": f"{statistic} of C and {column}"}
                rows.append(row | {"paper": printed[f"{column}_{statistic}"], "ours": one[statistic]})
    return rows


def write_rows(stage: artifacts.Stage, name: str, rows: list[dict]) -> None:
    """Writes tables/<name>.csv (floats in full) and .md (four digits); None is an empty cell."""
    columns = list(rows[0])
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _full(row[column]) for column in columns} for row in rows)
    files.write_text(stage.folder / "tables" / f"{name}.csv", text.getvalue())
    lines = [columns, ["---"] * len(columns)]
    lines += [[_short(row[column]) for column in columns] for row in rows]
    markdown = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    files.write_text(stage.folder / "tables" / f"{name}.md", markdown)


def _full(value: object) -> str:
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _full(value).replace("|", "\\|")


def head_map(table: pa.Table) -> figures.HeadMap:
    """heads.parquet as arrays [L, H]."""
    shape = tuple(int(np.max(table[name].to_numpy())) + 1 for name in ("layer", "head"))
    arrays = {
        name: table[name].to_numpy().reshape(shape) for name in ("conflict", "sensitivity", "score", "bucket")
    }
    probability = np.array(table["bucket_probability"].to_pylist(), dtype=np.float64).reshape(*shape, -1)
    own = np.take_along_axis(probability, arrays["bucket"][..., None] - 1, axis=-1)[..., 0]
    return figures.HeadMap(**arrays, own_probability=own)


def warn_of_limits(stage: artifacts.Stage, rows: list[dict], found: list[dict]) -> None:
    """Says what a reader of the tables must not overlook."""
    tuned = [row for row in rows if row["arm"] != costs.BASE]
    if flagged := sum(row["flag"] == costs.NO_GAIN for row in tuned):
        stage.warn(f"{flagged} of {len(tuned)} tuned models gained no safety: their cost ratios mean nothing")
    for one in found:
        if (one["cost"], one["measure"]) == ("ucr", "C") and one["pearson"] is None:
            equal = one["n_points"] >= costs.FEWEST_POINTS
            why = "the costs are all equal" if equal else "fewer than 3 usable points"
            stage.warn(f"{one['optimizer']}: no correlation of C and UCR, {why} ({one['n_points']} buckets)")


def compared(stage: artifacts.Stage, run: Path) -> tuple[str, list[comparison.Row]] | None:
    """How far this run and its sibling of the other backend differ, and what the sibling is; None: there is
    none. Whatever is wrong with the sibling is no reason to go without a report."""
    other = comparison.sibling(run)
    if other is None:
        return None
    try:
        runs = comparison.open_run(run), comparison.open_run(other)
        rows = comparison.compare(*runs)
    except (InputError, ValueError) as error:
        stage.warn(f"the sibling run {other.name} cannot be compared: {str(error).splitlines()[0]}")
        return None
    stage.notes["compared_with"] = {
        "run": other.name,
        "manifests": {
            name: artifacts.sha256(other / name / artifacts.MANIFEST) for name in comparison.STAGES
        },
    }
    failed = [row.quantity for row in rows if row.ok is False]
    if failed:
        stage.warn(f"past tolerance against {other.name}: {', '.join(failed)}")
    return f"{other.name} ({comparison.describe(runs[1])})", rows


def main(settings: presets.Settings) -> None:
    reads = [BENCHMARKS, HEADS, ARMS, SCORES, RESPONSES]
    with artifacts.open_stage(settings.folder, NAME, settings.subset(*USES), reads) as stage:
        if stage.finished:
            return
        read = settings.folder
        benchmark_rows = artifacts.read_input(read, BENCHMARKS, artifacts.EXAMPLES)
        table = artifacts.read_input(read, HEADS, artifacts.HEADS)
        arms = artifacts.read_input(read, ARMS, artifacts.ARMS).to_pylist()
        scores = artifacts.read_input(read, SCORES, artifacts.SCORES).to_pylist()
        responses = artifacts.read_input(read, RESPONSES, artifacts.RESPONSES)
        manifests = {name: artifacts.stage_manifest(read, name) for name in report.STAGES}
        stage.begin()

        heads = head_map(table)
        sides = costs.benchmark_sides(scores)
        domains = [name for name in sides if registry.BENCHMARKS[name].source_domain]
        source = domains[0] if domains else None
        rows = costs.arm_costs(scores, arms, source)
        draws = {"resamples": settings.resamples, "seed": settings.seed}
        drawn = costs.resampled_scores(responses, sides, **draws)
        means = costs.with_intervals(costs.mean_over_seeds(rows), drawn)
        found = costs.correlations(rows, **draws)
        h_gen, h_safe = (table[name].to_numpy().reshape(heads.score.shape) for name in ("h_gen", "h_safe"))
        tables = {
            "costs": rows,
            "costs_mean": means,
            "correlations": found,
            "layers": layer_rows(heads),
            "heads_top": extreme_heads(table),
            "variants": variant_rows(h_gen, h_safe, heads.conflict, heads.m),
        }
        if published := paper_model(manifests["02_conflict"]["model"].get("id", "")):
            tables["paper"] = paper_rows(published, means, heads.m) + paper_correlations(published, found)
        for name, content in tables.items():
            if content:
                write_rows(stage, name, content)
        warn_of_limits(stage, rows, found)

        folder = stage.folder / "figures"
        with figures.style():
            figures.save(figures.conflict_map(heads), folder, "conflict_map")
            figures.save(figures.conflict_against_sensitivity(heads), folder, "conflict_sensitivity")
            figures.save(figures.pareto(means, heads.m), folder, "pareto")
            figures.save(
                figures.cost_against_conflict(means, found, heads.m, source), folder, "cost_conflict"
            )

        claims = verdicts.claims(means, rows, found, drawn, heads.m, source)
        findings = verdicts.findings(means, found, manifests, heads.m)
        page = report.render(
            tables=tables,
            comparison=compared(stage, settings.folder),
            findings=findings,
            claims=claims,
            manifests=manifests | {NAME: {"notes": stage.notes, "settings": stage.settings}},
            samples=report.samples(responses, benchmark_rows, scores),
            figures_folder=folder,
            sides=sides,
            source=source,
            m=heads.m,
        )
        files.write_text(stage.folder / "report.html", page)
        for sentence in findings:
            stage.say(sentence)
        stage.finish(findings=findings, source_benchmark=source)


if __name__ == "__main__":
    cli.run(main)
