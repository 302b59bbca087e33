"""report.html: one file with figures, tables and examples inside, made from what stage 06 computed.

Everything that a model or a user wrote is escaped by jinja2. The page holds no time, no date and no path of
this machine, so that the same inputs give the same bytes.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import costs, verdicts

STAGES = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate")
TEMPLATE = "report.html.jinja"
SAMPLE_LENGTH = 400
SAMPLES = 2
"""examples of each kind an arm"""
KINDS = {
    # kind -> (side, verdict of the base model, verdict of the tuned one), in the order shown
    "safety gained": ("safety", False, True),
    "utility lost": ("utility", True, False),
    "benign request refused": ("over-refusal", False, True),
    "safety lost": ("safety", True, False),
    "utility gained": ("utility", False, True),
}
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""control and direction characters, which a page must not pass on"""


def shown_text(text: str) -> str:
    """`text` cut to a readable length, without control characters."""
    text = UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").strip())
    return text if len(text) <= SAMPLE_LENGTH else f"{text[:SAMPLE_LENGTH].rstrip()} …"


def samples(responses: pa.Table, benchmarks: pa.Table, scores: Sequence[dict]) -> list[dict]:
    """For each arm (first seed) a few prompts whose verdict tuning changed, with the base model's answer.

    By kind in the order of KINDS, in turn from each benchmark of that side, rows in the benchmark's order. An
    arm that changed no verdict shows the first row of each side instead.
    """
    sides = costs.benchmark_sides(scores)
    targets = dict(zip(benchmarks["example_id"].to_pylist(), benchmarks["target"].to_pylist(), strict=True))
    units = list(dict.fromkeys((row["arm"], row["optimizer"], row["seed"]) for row in scores))
    base = _by_benchmark(responses, units[0], sides)
    first_seeds: dict[tuple[str, str], tuple] = {}
    for unit in units[1:]:
        first_seeds.setdefault(unit[:2], unit)
    shown = []
    for unit in first_seeds.values():
        tuned = _by_benchmark(responses, unit, sides)
        groups = []
        for kind, (side, before, after) in KINDS.items():
            queues = []
            for name in (name for name in sides if sides[name] == side):
                pairs = zip(
                    base[name]["verdict"].to_pylist(), tuned[name]["verdict"].to_pylist(), strict=True
                )
                queues.append([(name, at) for at, pair in enumerate(pairs) if pair == (before, after)])
            chosen = _in_turn(queues, SAMPLES)
            if chosen:
                groups.append({"kind": kind, "changed": sum(map(len, queues)), "side": side, "rows": chosen})
        if not groups:
            for side in dict.fromkeys(sides.values()):
                name = next(name for name in sides if sides[name] == side)
                groups.append(
                    {"kind": f"unchanged ({side})", "changed": 0, "side": side, "rows": [(name, 0)]}
                )
        for group in groups:
            group["rows"] = [_pair(base[name], tuned[name], at, name, targets) for name, at in group["rows"]]
        shown.append({"arm": unit[0], "optimizer": unit[1], "seed": unit[2], "groups": groups})
    return shown


def _by_benchmark(responses: pa.Table, unit: tuple, sides: dict[str, str]) -> dict[str, pa.Table]:
    mask = pc.and_(pc.equal(responses["arm"], unit[0]), pc.equal(responses["optimizer"], unit[1]))
    own = responses.filter(pc.and_(mask, pc.equal(responses["seed"], unit[2])))
    return {name: own.filter(pc.equal(own["benchmark"], name)) for name in sides}


def _in_turn(queues: list[list], most: int) -> list:
    """Up to `most` items: the first of each queue, then the second of each, …"""
    deepest = max((len(queue) for queue in queues), default=0)
    return [queue[depth] for depth in range(deepest) for queue in queues if depth < len(queue)][:most]


def _pair(base: pa.Table, tuned: pa.Table, at: int, benchmark: str, targets: dict[str, str]) -> dict:
    before, after = (table.slice(at, 1).to_pylist()[0] for table in (base, tuned))
    return {
        "benchmark": benchmark,
        "example_id": before["example_id"],
        "prompt": shown_text(before["prompt"]),
        "target": shown_text(targets.get(before["example_id"], "")),
        "base": shown_text(before["output"]),
        "tuned": shown_text(after["output"]),
    }


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


def _paper_table(rows: Sequence[dict]) -> dict | None:
    """The long table as one row an arm: its quantities in columns, (ours, paper) in cells."""
    rows = [row for row in rows if row["arm"] != "buckets"]
    if not rows:
        return None
    cells: dict[tuple[str, str], dict] = {}
    for row in rows:
        cells.setdefault((row["arm"], row["optimizer"]), {})[row["quantity"]] = (row["ours"], row["paper"])
    return {"columns": list(dict.fromkeys(row["quantity"] for row in rows)), "rows": cells}


def render(
    *,
    tables: dict[str, list[dict]],
    comparison: tuple[str, list] | None,
    findings: list[str],
    claims: list[dict],
    manifests: dict[str, dict],
    samples: list[dict],
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
        "signed": verdicts.signed,
    }
    model = manifests["02_conflict"]["model"]
    paper = tables.get("paper", [])
    return environment.get_template(TEMPLATE).render(
        model=model,
        model_name=without_folder(model.get("id", "")).removeprefix("…/"),
        comparison=comparison,
        findings=findings,
        claims=claims,
        warnings=[
            (stage, UNSEEN.sub("", warning))
            for stage, manifest in manifests.items()
            for warning in manifest["notes"].get("warnings", [])
        ],
        standins=manifests["01_calibrate"]["notes"].get("standins", []),
        base=tables["costs_mean"][0],
        means=tables["costs_mean"],
        sides=sides,
        correlations=tables["correlations"],
        heads_top=tables["heads_top"],
        variants=tables["variants"],
        variant=manifests["03_sensitivity"]["settings"].get("variant", ""),
        map_notes=manifests["03_sensitivity"]["notes"],
        paper=_paper_table(paper),
        paper_correlations=[row for row in paper if row["arm"] == "buckets"],
        samples=samples,
        figures={
            path.stem: _figure(figures_folder, path.stem) for path in sorted(figures_folder.glob("*.svg"))
        },
        source=source,
        m=m,
        cost_name=costs.cost_name,
        arm_words=lambda arm: verdicts.arm_words(arm, m),
        several_seeds=max(row["n_seeds"] for row in tables["costs_mean"]) > 1,
        settings=settings_rows(manifests),
        sources=source_rows(manifests["01_calibrate"]),
        versions=manifests["05_evaluate"].get("versions", {}),
        git=manifests["05_evaluate"].get("git", {}),
        judge=manifests["05_evaluate"]["notes"].get("judge", "unknown"),
        tokenizer=manifests["01_calibrate"]["notes"].get("tokenizer", ""),
        stages=[*STAGES, "06_correlate"],
    )
