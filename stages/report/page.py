"""report.html: one file with figures, tables and examples inside, made from what stage 06 computed.

Everything that a model or a user wrote is escaped by jinja2. The page holds no time, no date and no path of
this machine, so that the same inputs give the same bytes.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

import jinja2
import numpy as np
import pandas as pd

from data.benchmarks import DOMAINS
from stages.method.arms import BASE, ArmRun
from stages.report import examples, words
from stages.report.results import FULL, RANDOM, Results, plain
from stages.report.tables import Table, flags, is_score
from stages.run.store import computed_by


def without_folder(value: object) -> str:
    """A setting as text; of an absolute path only its last name, because folders differ between machines."""
    if isinstance(value, list):
        return " ".join(map(without_folder, value)) or "none"
    text = str(value)
    if text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute():
        return f"…/{PureWindowsPath(text).name}"
    return text or "none"


def settings_rows(manifests: Mapping[str, Mapping]) -> list[tuple[str, str, str]]:
    """Every setting that some stage recorded: name, value, the stages that rest on it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in manifests.items():
        for name, value in manifest["settings"].items():
            rows.setdefault((name, without_folder(value)), []).append(stage[:2])
    return [(*setting, ", ".join(stages)) for setting, stages in rows.items()]


def number(value: float | None, digits: int = 2) -> str:
    if value is None or np.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, 1)


def records(table: pd.DataFrame) -> list[dict]:
    """A table for the page: None for every missing value."""
    return plain(table).to_dict("records")


def arms(results: Results, runs: Sequence[ArmRun]) -> list[dict]:
    """The base model and arms, each with its words and its flag."""
    means = results.means.loc[[results.means.index[0], *runs]]
    named = [words.arm_words(run.arm, results.m) for run in means.index]
    return records(means.assign(label=named, flag=flags(means)))


def failure_rows(results: Results) -> list[dict]:
    """Failures of the base model, all heads, random heads and the zones, each with its words."""
    kinds = [BASE, FULL, RANDOM, *(run.arm for run in results.main if run.arm.bucket in (1, results.m))]
    named = {arm.name: words.arm_words(arm, results.m) for arm in kinds}
    table = results.failures[results.failures["arm"].isin(list(named))]
    return records(table.assign(label=table["arm"].map(named)).sort_values("benchmark", kind="stable"))


def render(
    results: Results, manifests: Mapping[str, Mapping], papers: Sequence[Table], folder: Path, **parts: object
) -> str:
    """The page as text.

    Args:
        manifests: by stage, with stage 06's settings and notes.
        folder: of the figures.
        parts: plain (other tables, by name), findings, claims, samples, failure_modes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"number": number, "percent": percent, "signed": words.signed}
    environment.filters |= filters | {"records": records, "origin": without_folder}
    rows = results.correlations
    own = (rows["family"] == "C") & (rows["buckets"] == results.m)
    others = ~own & (rows["cost"] != "over_refusal_cr") & rows["seed"].isna()
    # A table of main arms without printed numbers repeats what stands there already, but for buckets by O, S.
    main = [table for table in papers if not table.ablation]
    main = [table for table in main if table.has_paper or {*table.rows.get("score", ())} & {"O", "S"}]
    drawn = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in sorted(folder.glob("*.svg"))}
    return environment.get_template("report.html.jinja").render(
        results=results,
        manifests=manifests,
        **parts,
        words=words,
        is_score=is_score,
        COLLAPSE=examples.COLLAPSE,
        DOMAINS=DOMAINS,
        model=manifests["02_conflict"]["model"],
        computed_by=computed_by(manifests["02_conflict"]["model"]),
        arms=arms(results, results.main),
        correlations=records(rows[own]),
        other_correlations=records(rows[others]),
        failures=failure_rows(results),
        main_tables=main,
        ablations=[table for table in papers if table.ablation],
        warnings=[
            (stage, examples.UNSEEN.sub("", warning))
            for stage, manifest in manifests.items()
            for warning in manifest["notes"].get("warnings", [])
        ],
        # An image of its own can neither run anything nor mix its ids with others.
        figures={name: f"data:image/svg+xml;base64,{image}" for name, image in drawn.items()},
        settings=settings_rows(manifests),
    )
