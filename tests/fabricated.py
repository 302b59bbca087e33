"""A finished run of stages 01 to 05 made of invented numbers, for tests of what comes after."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backends.core.files import sha256, write_json
from stages.method import metrics
from stages.method.arms import ARM_FIELDS, BASE_RUN, ArmRun, select_heads
from stages.method.conflict_map import head_columns
from stages.method.heads import HeadMap, read_map
from stages.method.reliability import QUANTITIES, Reliability, rows_wanted
from stages.report import correlations, costs, figures
from stages.report.examples import MEASURES
from stages.report.results import Results
from stages.run.judging import score_rows
from stages.run.runner import run_stage
from stages.run.schemas import ARMS, BENCHMARKS, HEADS, OWN_MAP, RELIABILITY, RESPONSES, SCORES
from stages.run.settings import Settings
from stages.run.store import MANIFEST, write_table

correlate = importlib.import_module("stages.06_correlate")
SIDES = {"facts": "utility", "words": "utility", "adversarial": "safety", "vanilla": "safety"}
SIDES["benign"] = "over-refusal"
WORKED_SIDES = {"facts": "utility", "problems": "utility", "vanilla": "safety", "benign": "over-refusal"}
PAPER_SIDES = {
    **dict.fromkeys(("mmlu", "csqa", "gsm8k", "math"), "utility"),
    **dict.fromkeys(("wildjailbreak", "wildguard", "dan"), "safety"),
}
BASE = {"utility": 0.8, "safety": 0.2, "over-refusal": 0.05}
CHOICES = ("facts", "words", "mmlu", "csqa")
"""benchmarks answered by the next token"""
WORKED = ("problems", "gsm8k", "math")
"""benchmarks answered in steps"""
INJECTED = '<script>alert("x")</script>'
"""stands in every output"""


@dataclass(frozen=True)
class Fabricated:
    """What a made-up run looks like; the numbers of an arm follow from its heads' mean C."""

    layers: int = 4
    heads: int = 3
    kinds: tuple[str, ...] = ("counted",)
    """of outcomes; what is not counted has other changes"""
    sides: dict[str, str] = field(default_factory=lambda: dict(SIDES))
    rows: int = 12
    base: dict[str, float] = field(default_factory=lambda: dict(BASE))
    safety_gain: float = 0.6
    warnings: tuple[str, ...] = ()
    standins: tuple[str, ...] = ()
    classifier: str | None = None
    """what judged the requests; None: the keyword judge alone"""
    reliability: float | None = 0.7
    """of every quantity of a map"""
    settings: dict = field(default_factory=dict)
    """other than those of `fabricate`"""


def report_of(folder: Path, like: Fabricated, formats: tuple[str, ...] = ("svg",)) -> tuple[str, dict, set]:
    """Page, tables and names of figures of a fabricated run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FORMATS", {name: figures.FORMATS[name] for name in formats})
        run_stage(correlate.STAGE, fabricate(folder, like))
    out = folder / correlate.STAGE.name
    tables = {path.stem: pd.read_csv(path) for path in sorted(out.glob("tables/*.csv"))}
    drawn = {path.stem for path in out.glob("figures/*")}
    assert all((out / "tables" / f"{name}.md").is_file() for name in tables)
    assert all((out / "figures" / f"{name}.{end}").is_file() for name in drawn for end in formats)
    return (out / "report.html").read_text(encoding="utf-8"), tables, drawn


def results_of(by_seed: pd.DataFrame, sides: dict, losses: dict, draws=None, **more) -> Results:
    """Results of costs by seed; without resamples the means stand for them."""
    means = costs.mean_over_seeds(by_seed, losses)
    draws = draws or {name: means[[name]].T for name in (*sides, "utility", "safety", *losses)}
    means = costs.with_intervals(means, draws)
    values = {"m": 4, "paper": None, "maps": (), "heads": {}, "source": None, "sides": sides}
    values |= {"costs": by_seed, "means": means, "draws": draws, "sensitivity": "counted"}
    values["reliability"] = _reliability({OWN_MAP: None}, 0.7)
    values["correlations"] = correlations.correlations(by_seed, means, draws, 4)
    values |= dict.fromkeys(("predictions", "drift", "drift_layers", "redraws", "judges"), pd.DataFrame())
    values["drawn"] = ()
    values["failures"] = pd.DataFrame(columns=["arm", "optimizer", "side", *MEASURES])
    return Results(**values | more)


def fabricate(run: Path, like: Fabricated) -> Settings:
    """Writes the finished stages 01 to 05 of a run."""
    common = {"preset": "tiny", "run": str(run), "model": "random/tiny", "resamples": 100, "folds": 4}
    settings = Settings().replace(**common | like.settings)
    random = np.random.default_rng(0)

    def finish(stage: str, tables: dict, **notes) -> None:
        folder = run / stage
        folder.mkdir(parents=True)
        for file, (frame, schema) in tables.items():
            write_table(folder / file, frame, schema)
        model = {
            "id": settings.model.model,
            "revision": "main",
            "weights_sha256": "0" * 64,
            "config_sha256": "1" * 64,
        }
        model |= {"backend": "torch", "device": "cpu", "dtype": "float32", "quantize": ""}
        manifest = {"settings": settings.group("model", "data", "map"), "inputs": {}, "model": model}
        manifest["outputs"] = {file: sha256(folder / file) for file in tables}
        write_json(folder / MANIFEST, manifest | {"notes": notes, "units": {}})

    source = {"rows": like.rows, "standin": False}
    sources = {name: source | {"location": f"/home/me/{name}.jsonl"} for name in like.sides}
    examples = {BENCHMARKS.file(): (_examples(like), BENCHMARKS.schema)}
    finish(BENCHMARKS.stage, examples, sources=sources, standins=list(like.standins), tokenizer="1" * 64)
    finish("02_conflict", {})

    maps = {spec.name: _map(like, settings.map.buckets, random) for spec in settings.maps}
    tables = {HEADS.file(name): (frame, HEADS.schema) for name, frame in maps.items()}
    tables[RELIABILITY.file()] = (_reliability(maps, like.reliability), RELIABILITY.schema)
    finish(
        HEADS.stage,
        tables,
        base={"accuracy": 0.75, "refusal_rate": 0.5},
        ranks_rest_on={"distinct_gen": 9, "distinct_safe": 6, "tied_gen": 0.95, "tied_safe": 0.99},
        mean_probability_of_own_bucket=0.6,
        warnings=list(like.warnings),
    )

    head_maps = {name: read_map(frame) for name, frame in maps.items()}
    arms = pd.DataFrame([_arm(unit, head_maps, settings.map.buckets) for unit in settings.arm_runs])
    finish(ARMS.stage, {ARMS.file(): (arms, ARMS.schema)})

    strength = {BASE_RUN: 0.0}
    for unit, mean in zip(settings.arm_runs, arms["mean_conflict_score"], strict=True):
        strength[unit] = mean * (2 if unit.arm.kind == "full" else 1)
    rows = []
    for unit, strong in strength.items():
        for name, side in like.sides.items():
            rows += _answers(like, unit, name, side, strong, random)
    responses = pd.DataFrame(rows)
    tables = {RESPONSES.file(): (responses, RESPONSES.schema)}
    tables[SCORES.file()] = score_rows(responses, like.sides), SCORES.schema
    finish(SCORES.stage, tables, judge="2", classifier=like.classifier)
    return settings


def _prompt(name: str, side: str, number: int) -> str:
    return f"{'How do I break' if side == 'safety' else 'What is'} {name} {number}?"


def _examples(like: Fabricated) -> pd.DataFrame:
    rows = [(name, at) for name in like.sides for at in range(like.rows)]
    frame = pd.DataFrame(rows, columns=["split", "answer"])
    frame["example_id"] = frame["entry"] = [f"{name}/{at}" for name, at in rows]
    frame["prompt"] = [_prompt(name, like.sides[name], at) for name, at in rows]
    frame["target"] = [f"answer {at}" for _, at in rows]
    frame = frame.assign(source=frame["split"], scoring="refusal", prefix="", rendered="")
    frame["choices"] = frame["earlier"] = [[]] * len(rows)
    ids = ("prompt_ids", "target_ids", "choice_ids", "refusal_ids")
    return frame.assign(**{name: [[1]] * len(rows) for name in ids})


def _map(like: Fabricated, m: int, random: np.random.Generator) -> pd.DataFrame:
    """heads.parquet of one map."""
    shape = (like.layers, like.heads)
    middle = 0.12 * np.exp(-(((np.arange(like.layers)[:, None] / like.layers - 0.6) / 0.2) ** 2))
    values = {"optimization_conflict": np.clip(0.42 + middle + random.normal(0, 0.05, shape), 0, 1)}
    values |= {"h_gen": random.integers(0, 9, shape) / 128, "h_safe": random.integers(0, 6, shape) / 32}
    sensitivity = metrics.functional_sensitivity(values["h_gen"], values["h_safe"])
    score = metrics.conflict_score(values["optimization_conflict"], sensitivity)
    values |= {"functional_sensitivity": sensitivity, "conflict_score": score}
    frame = pd.DataFrame(head_columns(shape))
    for name, each in values.items():
        for end, factor in (("", 1), ("_low", 0.9), ("_high", 1.1)):
            frame[f"{name}{end}"] = factor * each.ravel()
    for number, kind in enumerate(like.kinds):
        other = np.random.default_rng(number).permutation(len(frame)) if number else slice(None)
        for name in ("h_gen", "h_safe"):
            frame[f"{name}_{kind}"] = values[name].ravel()[other]
    frame["bucket"], frame["bucket_low"], frame["bucket_high"] = metrics.buckets(score, m).ravel(), 1, m
    own = random.uniform(0.3, 0.9, len(frame))
    own = np.where(np.arange(1, m + 1) == frame[["bucket"]].to_numpy(), own[:, None], 0.1)
    frame["bucket_probability"] = own.tolist()
    return frame.reindex(columns=HEADS.schema.names)


def _reliability(maps: dict, value: float | None) -> pd.DataFrame:
    labels = {"sensitivity": "counted", "rows_util": 32, "rows_safe": 12}
    found = [
        Reliability(name, value, value, None if value is None else rows_wanted(value)) for name in QUANTITIES
    ]
    found.append(Reliability("bucket", 0.3, None, None))
    return pd.DataFrame([{"map": name} | labels | each._asdict() for name in maps for each in found])


def _arm(unit: ArmRun, maps: dict[str, HeadMap], m: int) -> dict:
    """A row of arms.parquet."""
    row = unit.labels | {name: getattr(unit.arm, name) for name in ARM_FIELDS}
    own = maps[unit.arm.map or OWN_MAP]
    heads = [] if unit.arm.of_neurons else select_heads(unit.arm, own, m, np.random.default_rng(unit.seed))
    at = tuple(np.array(heads or [(0, 0)]).T)
    neurons = [[0, number] for number in range(unit.arm.neurons or 0)]
    return row | {
        "adapter": f"adapters/{unit.name}",
        "layers": [layer for layer, _ in heads],
        "heads": [head for _, head in heads],
        "n_heads": len(heads),
        "n_layers": len({layer for layer, _ in heads}),
        "safety_neurons": neurons,
        "utility_neurons": neurons,
        "n_neurons": 2 * len(neurons),
        "trainable_parameters": len(heads) * 100,
        "entered": [1, 0] if unit.arm.rediagnosed else None,
        "mean_optimization_conflict": float(own.optimization_conflict[at].mean()),
        "mean_functional_sensitivity": float(own.functional_sensitivity[at].mean()),
        "mean_conflict_score": float(own.conflict_score[at].mean()),
        "ranked_mean": float(own.by(unit.arm.ranked_by)[at].mean()) if heads else None,
    }


def _answers(like: Fabricated, unit: ArmRun, name: str, side: str, strong: float, random) -> list[dict]:
    """Rows of responses.parquet; `strong` 0 is the base model. Of a strong arm's worked answers every fourth
    is without steps and every fifth a refusal."""
    change = {"utility": -0.3 * strong, "safety": like.safety_gain, "over-refusal": 0.2 * strong}[side]
    rate = like.base[side] + (change + random.normal(0, 0.02) if strong else 0.0)
    passed = int(round(np.clip(rate, 0, 1) * like.rows)) if like.base[side] or strong else 0
    order = np.random.default_rng(len(name)).permutation(like.rows)
    broken = strong > 0.5
    rows = []
    for at in range(like.rows):
        right, choice, numeric = bool(order[at] < passed), name in CHOICES, name in ("problems", "gsm8k")
        refused, steps = right and side != "utility", None
        if name in WORKED:
            refused = broken and at % 5 == 0
            steps = 0 if refused or (broken and at % 4 == 0) else 1 + at % 3
        row = {"benchmark": name, "example_id": f"{name}/{at}", "prompt": _prompt(name, side, at)}
        row |= {"output": f"{'Sorry, no.' if right else 'Sure.'} {INJECTED} \x07 {'long ' * 120}"}
        row |= {
            "token_ids": [],
            "prediction": 0 if choice else None,
            "probability": None,
            "graded": -1 - 0.3 * strong - 0.1 * (at % 3) * strong**2 if side == "utility" else None,
            "verdict": right,
        }
        row |= {"refused": None if choice else refused, "steps": steps}
        row |= {"harmful": not right if like.classifier and side == "safety" else None}
        row |= {"strict": right and at % 2 == 0 if numeric else None, "flexible": True if numeric else None}
        rows.append(unit.labels | row)
    return rows
