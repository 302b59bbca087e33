"""Stage 06: what safety has cost, whether the map predicted it, and the report (Eq. 7-8, §5, App. C-F).

    python -m stages.06_correlate --run outputs/smollm

Reads the benchmarks, the maps, the arms, the scores and the responses; writes tables/*.csv (full precision)
with the same as .md, figures/*.svg and .png, and report.html. Needs no model: seconds on any machine, a
minute or two of millions of responses. Its files hold no times and no paths of this machine, so that the same
inputs give the same bytes; times stand in each stage's manifest.json.
"""

import matplotlib.style
import pandas as pd

from backends.core.files import write_text
from backends.core.seeds import stream
from data.benchmarks import BENCHMARKS as KNOWN
from stages.method.arms import BASE, OWN, arm_from_row
from stages.method.heads import own_probability, read_map
from stages.report import (
    agreement,
    claims,
    correlations,
    costs,
    drawn_arms,
    drift,
    examples,
    figures,
    findings,
    page,
    tables,
    trade_offs,
)
from stages.report.responses import Responses, read_responses, runs_of
from stages.report.results import Results
from stages.run import cli
from stages.run.job import Job, Stage
from stages.run.schemas import ARMS, BENCHMARKS, DRIFT, HEADS, RELIABILITY, RESPONSES, SCORES
from stages.run.settings import Settings
from stages.run.store import RunFolder

GROUPS = ("model", "data", "map", "tuning")
EARLIER = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate")


def compute(job: Job) -> tuple[Results, Responses]:
    """All numbers of the report."""
    settings = job.settings
    arms, scores = job.read(ARMS), job.read(SCORES)
    by_name = {row["arm"]: arm_from_row(row) for row in arms.to_dict("records")} | {BASE.name: BASE}
    sides = dict(zip(scores["benchmark"], scores["side"], strict=True))
    source = next((name for name in sides if KNOWN[name].source_domain), None)
    losses = costs.losses_of(sides, source)

    # §4.1: scores, means by side and cost ratios of every arm, optimizer and seed; then over seeds
    measured: dict = {}
    for run, row in zip(runs_of(scores, by_name), scores.to_dict("records"), strict=True):
        measured.setdefault(run, {})[row["benchmark"]] = row["score"]
    tuned = arms.set_axis(runs_of(arms, by_name))
    by_seed = costs.arm_costs(measured, tuned, sides, losses)
    responses = read_responses(job.run, by_name, sides)
    resamples, generator = settings.map.resamples, stream(settings.data.seed, "costs", "rows")
    draws = costs.resampled(responses.of, sides, losses, resamples, generator)
    means = costs.with_intervals(costs.mean_over_seeds(by_seed, losses), draws)
    maps = {spec.name: job.read(HEADS, spec.name) for spec in settings.maps}
    by_outcome = drawn_arms.predicting_maps(maps, settings.map.variant, settings.map.buckets)
    drawn = drawn_arms.families(by_seed, tuned, responses, by_outcome, settings.map.sensitivity)
    results = Results(
        m=settings.map.buckets,
        paper=settings.model.paper or None,
        maps=settings.maps,
        heads={name: read_map(own) for name, own in maps.items()},
        sensitivity=settings.map.sensitivity,
        reliability=job.read(RELIABILITY),
        sides=sides,
        source=source,
        costs=by_seed,
        means=means,
        draws=draws,
        # §5.3: does what the buckets were ranked by predict their cost?
        correlations=correlations.correlations(by_seed, means, draws, settings.map.buckets),
        drawn=drawn,
        predictions=drawn_arms.predictions(drawn, stream(settings.data.seed, "draws", "permutations")),
        # App. C: refusals of harmless questions, reasoning that is gone
        failures=examples.count_failures(responses),
        judges=agreement.table(responses, job.run.manifest("05_evaluate")["notes"].get("classifier")),
        # §7: does the map move while a model is tuned?
        **drift.fields(job, by_name),
    )
    return results, responses


def plain_tables(job: Job, results: Results) -> dict[str, pd.DataFrame]:
    """Tables that are not the paper's, by file name."""
    own = results.heads[OWN]
    others = {name: heads for name, heads in results.heads.items() if name != OWN}
    return {
        "costs": results.costs,
        "costs_mean": results.means,
        "correlations": results.correlations,
        "failures": results.failures,
        "judges": results.judges,
        "drawn_arms": results.predictions,
        "drift": results.drift,
        "drift_layers": results.drift_layers,
        "redraws": results.redraws,
        "layers": tables.layer_table(own),
        "heads_top": tables.extreme_heads(job.read(HEADS)),
        "variants": tables.variant_table(own),
        "maps": tables.other_maps_table(own, others),
    }


def draw_figures(job: Job, results: Results) -> None:
    """Draws and writes every figure."""
    own, kept = results.heads[OWN], own_probability(job.read(HEADS))
    with matplotlib.style.context(figures.STYLE, after_reset=True):
        drawings = {"figure7_conflict_map": figures.conflict_map(own, kept)}
        drawings["conflict_sensitivity"] = figures.conflict_against_sensitivity(own)
        if len(results.drift):
            drawings["drift"] = drift.figure(*results.drift_means)
        for name, drawing in (drawings | trade_offs.all_figures(results)).items():
            figures.save(drawing, job.folder / "figures", name)


def warn_of_limits(job: Job, results: Results) -> None:
    """Says what a reader of the tables must not overlook."""
    gains = results.costs["safety_gain"].dropna()
    if without := int((gains <= 0).sum()):
        job.warn(f"{without} of {len(gains)} tuned models gained no safety: their cost ratios mean nothing")
    for optimizer in results.optimizers:
        row = results.correlation(optimizer, "ucr")
        if row and pd.isna(row["pearson"]):
            why = (
                f"the {row['all_equal']} are all equal" if row["all_equal"] else "fewer than 3 usable points"
            )
            job.warn(f"{optimizer}: no correlation of C and UCR, {why} ({row['n_points']} buckets)")


def join(job: Job) -> dict:
    """Computes, writes and says it all."""
    results, responses = compute(job)
    plain, papers = plain_tables(job, results), tables.paper_tables(results)
    for name, table in plain.items():
        if len(table):
            tables.write(job.folder / "tables", name, table)
    for table in papers:
        tables.write(job.folder / "tables", table.name, table.rows, table.caption)
    draw_figures(job, results)
    warn_of_limits(job, results)

    # §5: what of the paper's claims holds here
    verdicts = claims.claims(results)
    manifests = {name: job.run.manifest(name) for name in EARLIER}
    kept = manifests["03_sensitivity"]["notes"].get("mean_probability_of_own_bucket")
    paragraphs = findings.findings(results, verdicts, kept)
    rows = job.run.read(BENCHMARKS, columns=["example_id", "target"])
    targets = dict(zip(rows["example_id"], rows["target"], strict=True))
    text = page.render(
        results,
        manifests | {job.stage.name: {"notes": job.notes, "settings": job.settings.group(*GROUPS)}},
        papers,
        job.folder / "figures",
        plain=plain,
        findings=paragraphs,
        claims=verdicts,
        samples=examples.samples(responses, results, targets),
        failure_modes=examples.failure_modes(responses, results, targets),
    )
    write_text(job.folder / "report.html", text)
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph]
    for sentence in sentences:
        job.say(sentence)
    return {"findings": sentences, "source_benchmark": results.source}


def judges(settings: Settings) -> dict:
    """Who judged, which the report says: another judge's verdicts may be the same."""
    notes = RunFolder(settings.folder).manifest("05_evaluate")["notes"]
    return {f"05_evaluate {name}": notes.get(name) for name in ("judge", "classifier")}


STAGE = Stage(
    name="06_correlate",
    rests_on=GROUPS,
    reads=(BENCHMARKS, HEADS, RELIABILITY, ARMS, SCORES, RESPONSES, DRIFT),
    writes=(),
    join=join,
    also_rests_on=judges,
    also_writes=("tables/*", "figures/*", "report.html"),
)


if __name__ == "__main__":
    cli.run(STAGE)
