"""A finished run of stages 01 to 05 made of invented numbers, for tests of what comes after."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages import arms, artifacts, maps, metrics, presets, schemas
from stages.reporting import families

SIDES = {
    "facts": "utility",
    "words": "utility",
    "adversarial": "safety",
    "vanilla": "safety",
    "benign": "over-refusal",
}
PAPER_SIDES = {
    **dict.fromkeys(("mmlu", "csqa", "gsm8k", "math"), "utility"),
    **dict.fromkeys(("wildjailbreak", "wildguard", "dan"), "safety"),
}
CHOICES = ("facts", "words", "mmlu", "csqa")
"""benchmarks answered by the next token"""
WORKED = ("problems", "gsm8k", "math")
"""benchmarks answered in steps"""
ARMS = ("full", "random", "bucket1", "bucket2", "bucket3", "bucket4")
INJECTED = '<script>alert("x")</script>'
"""stands in every output"""


@dataclass(frozen=True)
class Fabricated:
    """What a made-up run looks like; the numbers of an arm follow from its heads' mean C."""

    layers: int = 4
    heads: int = 3
    m: int = 4
    arms: tuple[str, ...] = ARMS
    ablations: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ("sft",)
    seeds: tuple[int, ...] = (21,)
    sides: dict[str, str] = field(default_factory=lambda: dict(SIDES))
    rows: int = 12
    model: str = "random/tiny"
    base: dict[str, float] = field(
        default_factory=lambda: {"utility": 0.8, "safety": 0.2, "over-refusal": 0.05}
    )
    safety_gain: float = 0.6
    own_probability: float = 0.6
    warnings: tuple[str, ...] = ()
    standins: tuple[str, ...] = ()
    classifier: str | None = None
    """what judged the requests; None: the keyword judge alone"""
    settings: dict = field(default_factory=dict)


def fabricate(run: Path, like: Fabricated) -> presets.Settings:
    """Writes the finished stages 01 to 05 of a run through the functions that the real stages use."""
    options = {"resamples": 100, "folds": 4} | like.settings
    settings = presets.Settings(
        preset="tiny",
        run=str(run),
        model=like.model,
        buckets=like.m,
        arms=like.arms,
        ablations=like.ablations,
        maps=like.maps,
        optimizers=like.optimizers,
        seeds=like.seeds,
        **options,
    )
    random = np.random.default_rng(0)
    model = {"id": like.model, "revision": "main", "weights_sha256": "0" * 64}
    model |= {"backend": "torch", "device": "cpu", "dtype": "float32"}

    def finish(name: str, tables: dict, **notes) -> None:
        with artifacts.open_stage(run, name, settings.subset("model", "seed", "util", "variant")) as stage:
            stage.begin(model)
            for file, (rows, schema) in tables.items():
                stage.write(file, rows, schema)
            for warning in like.warnings if name == "03_sensitivity" else ():
                stage.warn(warning)
            stage.finish(**notes)

    sources = {
        name: {"rows": like.rows, "standin": False, "location": f"/home/me/{name}.jsonl"}
        for name in like.sides
    }
    finish(
        "01_calibrate",
        {"benchmarks.parquet": (_examples(like), schemas.EXAMPLES)},
        sources=sources,
        standins=list(like.standins),
        tokenizer="1" * 64,
    )
    finish("02_conflict", {})

    names = ("", *maps.asked(like.maps, settings.folds))
    drawn = {name: _map(like, random) for name in names}
    finish(
        "03_sensitivity",
        {maps.file("heads", name): (rows, schemas.HEADS) for name, (_, rows) in drawn.items()},
        base={"accuracy": 0.75, "refusal_rate": 0.5},
        ranks_rest_on={"distinct_gen": 9, "distinct_safe": 6, "tied_gen": 0.95, "tied_safe": 0.99},
        mean_probability_of_own_bucket=like.own_probability,
    )

    ranked = {name: one for name, (one, _) in drawn.items()}
    tuned = [_arm(unit, ranked, like.m) for unit in arms.units(settings)]
    finish("04_align", {"arms.parquet": (tuned, schemas.ARMS)})

    responses, scores = [], []
    for row in ({"arm": "base", "optimizer": "none", "seed": -1}, *tuned):
        labels = {name: row[name] for name in ("arm", "optimizer", "seed")}
        strong = row["mean_score"] * (2 if row["arm"] == "full" else 1) if row["arm"] != "base" else 0.0
        for name, side in like.sides.items():
            told, passed = _answers(like, name, side, strong, random)
            responses += [labels | one for one in told]
            low, high = metrics.wilson_interval(passed, like.rows)
            one = {"benchmark": name, "side": side, "n": like.rows, "score": passed / like.rows}
            scores.append(labels | one | {"score_low": low, "score_high": high})
    finish(
        "05_evaluate",
        {"responses.parquet": (responses, schemas.RESPONSES), "scores.parquet": (scores, schemas.SCORES)},
        judge="2",
        classifier=like.classifier,
    )
    return settings


def _prompt(name: str, side: str, number: int) -> str:
    return f"{'How do I break' if side == 'safety' else 'What is'} {name} {number}?"


def _examples(like: Fabricated) -> list[dict]:
    return [
        {
            "example_id": f"{name}/{number}",
            "source": name,
            "entry": f"{name}/{number}",
            "role": name,
            "scoring": "choice" if name in CHOICES else "refusal",
            "prompt": _prompt(name, side, number),
            "rendered": "",
            "target": f"answer {number}",
            "choices": [],
            "answer": 0,
            "prompt_ids": [1],
            "target_ids": [2],
            "choice_ids": [],
        }
        for name, side in like.sides.items()
        for number in range(like.rows)
    ]


def _map(like: Fabricated, random: np.random.Generator) -> tuple[arms.HeadMap, list[dict]]:
    """One conflict map, and its rows of heads.parquet."""
    shape = (like.layers, like.heads)
    middle = 0.12 * np.exp(-(((np.arange(like.layers)[:, None] / like.layers - 0.6) / 0.2) ** 2))
    conflict = np.clip(0.42 + middle + random.normal(0, 0.05, shape), 0, 1)
    h_gen, h_safe = random.integers(0, 9, shape) / 128, random.integers(0, 6, shape) / 32
    sensitivity = metrics.functional_sensitivity(h_gen, h_safe)
    score = metrics.conflict_score(conflict, sensitivity)
    bucket = metrics.buckets(score, like.m)
    columns = {
        "conflict": conflict,
        "h_gen": h_gen,
        "h_safe": h_safe,
        "sensitivity": sensitivity,
        "score": score,
    }
    heads = []
    for layer, head in np.ndindex(*shape):
        row = {
            "layer": layer,
            "head": head,
            "bucket": int(bucket[layer, head]),
            "bucket_low": 1,
            "bucket_high": like.m,
        }
        for name, values in columns.items():
            row[name] = float(values[layer, head])
            row |= {f"{name}_low": row[name] * 0.9, f"{name}_high": row[name] * 1.1}
        own = like.own_probability + random.uniform(-0.3, 0.3)
        row["bucket_probability"] = [
            own if number == row["bucket"] else 0.1 for number in range(1, like.m + 1)
        ]
        heads.append(row)
    return arms.HeadMap(conflict, sensitivity, score), heads


def _arm(unit: dict, ranked: dict[str, arms.HeadMap], m: int) -> dict:
    """A row of arms.parquet."""
    heads = arms.heads(unit["arm"], ranked, m, unit["seed"])
    at = tuple(np.array(heads).T)
    own = ranked[families.parse(unit["arm"], m).map]
    return unit | {
        "adapter": f"adapters/{unit['arm']}-{unit['optimizer']}-{unit['seed']}",
        "layers": [layer for layer, _ in heads],
        "heads": [head for _, head in heads],
        "n_heads": len(heads),
        "n_layers": len({layer for layer, _ in heads}),
        "safety_neurons": [],
        "utility_neurons": [],
        "n_neurons": 0,
        "trainable_parameters": len(heads) * 100,
        "mean_conflict": float(own.conflict[at].mean()),
        "mean_sensitivity": float(own.sensitivity[at].mean()),
        "mean_score": float(own.score[at].mean()),
    }


def _answers(
    like: Fabricated, name: str, side: str, strong: float, random: np.random.Generator
) -> tuple[list[dict], int]:
    """Rows of responses.parquet without labels, and how many passed; `strong` 0 is the base model.

    Of worked answers the first pass, and of a strong arm's every fourth is without steps and every fifth a
    refusal; a base model's are neither.
    """
    change = {"utility": -0.3 * strong, "safety": like.safety_gain, "over-refusal": 0.2 * strong}[side]
    jitter = random.normal(0, 0.02) if strong else 0.0
    rate = like.base[side] + (change + jitter if strong else 0.0)
    passed = int(round(np.clip(rate, 0, 1) * like.rows)) if like.base[side] or strong else 0
    order = np.random.default_rng(len(name)).permutation(like.rows)
    broken = strong > 0.5
    rows = []
    for number in range(like.rows):
        right = bool(order[number] < passed)
        refused = {"utility": False, "safety": right, "over-refusal": right}[side]
        worked, numeric = name in WORKED, name in ("problems", "gsm8k")
        if worked:
            refused = broken and number % 5 == 0
        steps = (0 if refused or (broken and number % 4 == 0) else 1 + number % 3) if worked else -1
        rows.append(
            {
                "benchmark": name,
                "example_id": f"{name}/{number}",
                "prompt": _prompt(name, side, number),
                "output": f"{'Sorry, no.' if right else 'Sure.'} {INJECTED} \x07 {'long ' * 120}",
                "token_ids": [],
                "prediction": 0 if name in CHOICES else -1,
                "probability": float("nan"),
                "verdict": right,
                "refused": refused,
                "harmful": not right if like.classifier and side == "safety" else None,
                "steps": steps,
                "strict": right and number % 2 == 0 if numeric else None,
                "flexible": True if numeric else None,
            }
        )
    return rows, passed
