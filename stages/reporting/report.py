"""report.html: one file with figures, tables and examples inside, made from what stage 06 computed.

Everything that a model or a user wrote is escaped by jinja2. The page holds no time, no date and no path of
this machine, so that the same inputs give the same bytes.
"""

import base64
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import jinja2
import numpy as np

from stages.reporting import correlations, costs, families, side_by_side
from stages.reporting.findings import signed
from stages.reporting.tables import Table, flag

STAGES = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate")
TEMPLATE = "report.html.jinja"


# Settings and provenance


def without_folder(value: object) -> str:
    """A setting as text; of an absolute path only its last name, because folders differ between machines."""
    if isinstance(value, list):
        return " ".join(map(without_folder, value)) or "none"
    text = str(value)
    if text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute():
        return f"…/{PureWindowsPath(text).name}"
    return text if text else "none"


def settings_rows(manifests: dict[str, dict]) -> list[dict]:
    """Every setting that some stage recorded: name, value, the stages it went into."""
    rows: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in manifests.items():
        for name, value in manifest["settings"].items():
            rows.setdefault((name, without_folder(value)), []).append(stage[:2])
    return [
        {"name": name, "value": value, "stages": ", ".join(stages)} for (name, value), stages in rows.items()
    ]


def source_rows(manifest: dict) -> list[dict]:
    """Where each pool of data came from, as stage 01 recorded it."""
    return [
        {
            "pool": pool,
            "rows": source["rows"],
            "origin": source.get("repository") or without_folder(source["location"]),
            "revision": source.get("revision", ""),
            "standin": source["standin"],
            "note": source.get("note", ""),
        }
        for pool, source in manifest["notes"].get("sources", {}).items()
    ]


# The page


def _figure(folder: Path, name: str) -> str:
    """A figure as a data URI: an image of its own can neither run anything nor mix its ids with others."""
    return f"data:image/svg+xml;base64,{base64.b64encode((folder / f'{name}.svg').read_bytes()).decode()}"


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or np.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _small(value: float | None) -> str:
    """Differences, which may be very small."""
    return _number(value, 4) if not value or value >= 0.01 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.1f}"


HEADINGS = {
    "predicted": "mean score",
    "over_refusal": "over-refusal",
    "utility": "mean utility",
    "safety": "mean safety",
}
_PARTS = (("", ""), ("", "_std"), ("paper_", ""))
"""before and after a measure's name: its value, deviation and printed number"""


def shown_tables(tables: Sequence[Table], source: str | None) -> list[dict]:
    """The paper's tables as a page shows them: cells of (value, deviation, printed number), each formatted.

    Left out is what repeats the tables of arms and correlations: main arms only, without printed numbers.
    """
    return [
        {
            "name": one.name,
            "title": one.title,
            "note": one.note,
            "ablation": one.ablation,
            "labels": one.labels,
            "headings": [_heading(name, source) for name in one.measures],
            "rows": [
                {
                    "labels": [row[name] for name in one.labels],
                    "cells": [
                        tuple(_cell(name, row.get(f"{before}{name}{after}")) for before, after in _PARTS)
                        for name in one.measures
                    ],
                    "flag": row["flag"],
                }
                for row in one.rows
            ],
        }
        for one in tables
        if one.ablation or one.has_paper or any(row.get("score") in ("O", "S") for row in one.rows)
    ]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    small = name in ("predicted", "ucr") or name.endswith(("_cr", *correlations.STATISTICS))
    return _number(value, 2 if small else 1)


def _heading(name: str, source: str | None) -> str:
    columns = {costs.cost_column(cost, source): costs.cost_name(cost, source) for cost in costs.RATIOS}
    for column, words in columns.items():
        if name == column or name.startswith(f"{column}_"):
            return f"{words}{name.removeprefix(column).replace('_', ' ')}"
    return HEADINGS.get(name, name)


def render(
    *,
    tables: dict[str, list[dict]],
    papers: Sequence[Table],
    comparison: tuple[str, list] | None,
    findings: Sequence[str],
    claims: list[dict],
    manifests: dict[str, dict],
    samples: list[dict],
    failure_modes: list[dict],
    figures_folder: Path,
    sides: dict[str, str],
    source: str | None,
    m: int,
) -> str:
    """The page as text; see stage 06 for what goes in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "small": _small,
        "signed": signed,
    }
    model = manifests["02_conflict"]["model"]
    classifier = manifests["05_evaluate"]["notes"].get("classifier")
    shown = shown_tables(papers, source)
    main = [row | {"flag": flag(row)} for row in tables["costs_mean"] if families.is_main(row["arm"], m)]
    own = families.label(families.own(m), m)
    compared = {costs.BASE, "full", "random", "bucket1", f"bucket{m}"}
    return environment.get_template(TEMPLATE).render(
        model=model,
        model_name=without_folder(model.get("id", "")).removeprefix("…/"),
        comparison=comparison,
        findings=findings,
        claims=claims,
        warnings=[
            (stage, side_by_side.UNSEEN.sub("", warning))
            for stage, manifest in manifests.items()
            for warning in manifest["notes"].get("warnings", [])
        ],
        standins=manifests["01_calibrate"]["notes"].get("standins", []),
        base=tables["costs_mean"][0],
        means=main,
        sides=sides,
        correlations=[row for row in tables["correlations"] if row["family"] == own],
        other_correlations=[
            row for row in tables["correlations"] if row["family"] != own and row["cost"] != "over_refusal_cr"
        ],
        failures=[row for row in tables["failures"] if row["arm"] in compared],
        failure_modes=failure_modes,
        main_tables=[one for one in shown if not one["ablation"]],
        ablations=[one for one in shown if one["ablation"]],
        maps=tables["maps"],
        heads_top=tables["heads_top"],
        variants=tables["variants"],
        variant=manifests["03_sensitivity"]["settings"].get("variant", ""),
        map_notes=manifests["03_sensitivity"]["notes"],
        samples=samples,
        figures={
            path.stem: _figure(figures_folder, path.stem) for path in sorted(figures_folder.glob("*.svg"))
        },
        source=source,
        m=m,
        cost_name=costs.cost_name,
        arm_words=lambda arm: families.words(arm, m),
        several_seeds=max(row["n_seeds"] for row in tables["costs_mean"]) > 1,
        settings=settings_rows(manifests),
        sources=source_rows(manifests["01_calibrate"]),
        versions=manifests["05_evaluate"].get("versions", {}),
        git=manifests["05_evaluate"].get("git", {}),
        judge=manifests["05_evaluate"]["notes"].get("judge", "unknown"),
        classifier=classifier and without_folder(classifier),
        tokenizer=manifests["01_calibrate"]["notes"].get("tokenizer", ""),
        stages=[*STAGES, "06_correlate"],
    )
