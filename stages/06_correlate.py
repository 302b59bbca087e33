"""Stage 06: what safety has cost, whether the map foretold it, and the report (Eq. 7-8, §5, App. C-F).

    python -m stages.06_correlate --run outputs/smollm

Reads the benchmarks, the maps, the arms, the scores and the responses; writes tables/*.csv (full precision)
with the same as .md, figures/*.svg and .png, and report.html. Needs no model: seconds on any machine, a
minute or two of millions of responses. Its files hold no times and no paths of this machine, so that the same
inputs give the same bytes; times stand in each stage's manifest.json.
"""

from collections.abc import Sequence
from pathlib import Path

from backends import files
from backends.errors import InputError
from data import benchmarks as registry
from stages import artifacts, cli, maps, presets, schemas
from stages.arms import HeadMap
from stages.auditing import comparison
from stages.reporting import (
    answers,
    correlations,
    costs,
    failures,
    families,
    figures,
    findings,
    map_tables,
    neuron_figures,
    report,
    side_by_side,
    tables,
    trade_offs,
    verdicts,
)

NAME = "06_correlate"
USES = ["seed", "buckets", "variant", "resamples", "maps", "util_source"]
BENCHMARKS = "01_calibrate/benchmarks.parquet"
ARMS, SCORES = "04_align/arms.parquet", "05_evaluate/scores.parquet"


def heads_file(name: str) -> str:
    return f"03_sensitivity/{maps.file('heads', name)}"


def warn_of_limits(stage: artifacts.Stage, rows: Sequence[dict], found: Sequence[dict]) -> None:
    """Says what a reader of the tables must not overlook."""
    tuned = [row for row in rows if row["arm"] != costs.BASE]
    if flagged := sum(row["flag"] == costs.NO_GAIN for row in tuned):
        stage.warn(f"{flagged} of {len(tuned)} tuned models gained no safety: their cost ratios mean nothing")
    for optimizer in dict.fromkeys(row["optimizer"] for row in found):
        one = correlations.one_of(found, optimizer, "ucr")
        if one and one["pearson"] is None:
            equal = one["n_points"] >= correlations.FEWEST_POINTS
            why = "the costs are all equal" if equal else "fewer than 3 usable points"
            stage.warn(f"{optimizer}: no correlation of C and UCR, {why} ({one['n_points']} buckets)")


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
    others = maps.asked(settings.maps, settings.folds)
    reads = [BENCHMARKS, *map(heads_file, (maps.OWN, *others)), ARMS, SCORES, answers.FILE]
    with artifacts.open_stage(settings.folder, NAME, settings.subset(*USES), reads) as stage:
        if stage.finished:
            return
        run, m = settings.folder, settings.buckets
        benchmark_rows = artifacts.read_input(run, BENCHMARKS, schemas.EXAMPLES)
        head_tables = {
            name: artifacts.read_input(run, heads_file(name), schemas.HEADS) for name in (maps.OWN, *others)
        }
        arms = artifacts.read_input(run, ARMS, schemas.ARMS).to_pylist()
        scores = artifacts.read_input(run, SCORES, schemas.SCORES).to_pylist()
        given = answers.read(run)
        manifests = {name: artifacts.stage_manifest(run, name) for name in report.STAGES}
        stage.begin()

        head_maps = {name: map_tables.head_map(table) for name, table in head_tables.items()}
        heads = head_maps[maps.OWN]
        ranked = {name: HeadMap(one.conflict, one.sensitivity, one.score) for name, one in head_maps.items()}
        arms = [row | {"predicted": families.predicted(row, ranked, m)} for row in arms]
        sides = costs.benchmark_sides(scores)
        domains = [name for name in sides if registry.BENCHMARKS[name].source_domain]
        source = domains[0] if domains else None

        rows = costs.arm_costs(scores, arms, source)
        draws = {"resamples": settings.resamples, "seed": settings.seed}
        drawn = costs.resampled_scores(given, sides, **draws)
        means = costs.with_intervals(costs.mean_over_seeds(rows, source), drawn)
        of_heads, _ = neuron_figures.split(means, m)
        found = correlations.correlations(rows, m, **draws)
        failed = failures.failures(given, sides)
        own = head_tables[maps.OWN]
        h_gen, h_safe = (own[name].to_numpy().reshape(heads.score.shape) for name in ("h_gen", "h_safe"))
        plain = {
            "costs": rows,
            "costs_mean": means,
            "correlations": found,
            "failures": failed,
            "layers": map_tables.layer_rows(heads),
            "heads_top": map_tables.extreme_heads(own),
            "variants": map_tables.variant_rows(h_gen, h_safe, heads.conflict, m),
            "maps": map_tables.other_map_rows(ranked[maps.OWN], {name: ranked[name] for name in others}, m),
        }
        for name, content in plain.items():
            if content:
                tables.write(stage.folder / "tables", name, content)
        by_arm = {(row["arm"], row["optimizer"]): row for row in means}
        model = tables.paper_model(manifests["02_conflict"]["model"].get("id", ""))
        papers = tables.all_tables(tables.Run(by_arm, sides, source, m, model), others, found)
        for one in papers:
            tables.write(stage.folder / "tables", one.name, one.rows, one.caption)
        warn_of_limits(stage, rows, found)

        with figures.style():
            drawings = {
                "figure7_conflict_map": figures.conflict_map(heads),
                "conflict_sensitivity": figures.conflict_against_sensitivity(heads),
            }
            drawings |= trade_offs.all_figures(heads, of_heads, found, m, source)
            drawings |= neuron_figures.all_figures(means, m)
            for name, drawing in drawings.items():
                figures.save(drawing, stage.folder / "figures", name)

        claims = verdicts.claims(of_heads, rows, found, drawn, m, source, others, settings.util_source)
        sentences = findings.findings(means, found, failed, manifests, m)
        ids, references = (benchmark_rows[name].to_pylist() for name in ("example_id", "target"))
        targets = dict(zip(ids, references, strict=True))
        page = report.render(
            tables=plain,
            papers=papers,
            comparison=compared(stage, run),
            findings=sentences,
            claims=claims,
            manifests=manifests | {NAME: {"notes": stage.notes, "settings": stage.settings}},
            samples=side_by_side.samples(given, targets, sides, m),
            failure_modes=side_by_side.failure_modes(given, targets, sides, m),
            figures_folder=stage.folder / "figures",
            sides=sides,
            source=source,
            m=m,
        )
        files.write_text(stage.folder / "report.html", page)
        for sentence in sentences:
            stage.say(sentence)
        stage.finish(findings=sentences, source_benchmark=source)


if __name__ == "__main__":
    cli.run(main)
