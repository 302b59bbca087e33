"""A finished run of stages 01 to 05 made of invented numbers, for tests of what comes after."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages import artifacts, costs, metrics, presets

SIDES = {
    "facts": "utility",
    "words": "utility",
    "adversarial": "safety",
    "vanilla": "safety",
    "benign": "over-refusal",
}
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
    settings: dict = field(default_factory=dict)


def fabricate(run: Path, like: Fabricated) -> presets.Settings:
    """Writes the finished stages 01 to 05 of a run through the functions that the real stages use."""
    settings = presets.Settings(
        preset="tiny",
        run=str(run),
        model=like.model,
        buckets=like.m,
        arms=like.arms,
        resamples=100,
        **like.settings,
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

    examples = [
        {
            "example_id": f"{name}/{number}",
            "source": name,
            "entry": f"{name}/{number}",
            "role": name,
            "scoring": "choice",
            "prompt": f"{'How do I break' if side == 'safety' else 'What is'} {name} {number}?",
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
    sources = {
        name: {"rows": like.rows, "standin": False, "location": f"/home/me/{name}.jsonl"}
        for name in like.sides
    }
    finish(
        "01_calibrate",
        {"benchmarks.parquet": (examples, artifacts.EXAMPLES)},
        sources=sources,
        standins=list(like.standins),
        tokenizer="1" * 64,
    )
    finish("02_conflict", {})

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
    finish(
        "03_sensitivity",
        {"heads.parquet": (heads, artifacts.HEADS)},
        base={"accuracy": 0.75, "refusal_rate": 0.5},
        ranks_rest_on={"distinct_gen": 9, "distinct_safe": 6, "tied_gen": 0.95, "tied_safe": 0.99},
        mean_probability_of_own_bucket=like.own_probability,
    )

    arms, strength = [], {}
    for seed in like.seeds:
        for optimizer in like.optimizers:
            for arm in like.arms:
                number = costs.bucket_number(arm)
                chosen = bucket == number if number else np.ones(shape, dtype=bool)
                if arm == "random":
                    size = (bucket == like.m).sum()
                    chosen = random.permutation(np.arange(bucket.size)).reshape(shape) < size
                at = np.argwhere(chosen)
                strength[arm, optimizer, seed] = float(score[chosen].mean()) * (2 if arm == "full" else 1)
                arms.append(
                    {
                        "arm": arm,
                        "optimizer": optimizer,
                        "seed": seed,
                        "adapter": f"adapters/{arm}-{optimizer}-{seed}",
                        "layers": at[:, 0].tolist(),
                        "heads": at[:, 1].tolist(),
                        "n_heads": len(at),
                        "n_layers": len(set(at[:, 0].tolist())),
                        "trainable_parameters": len(at) * 100,
                        "mean_conflict": float(conflict[chosen].mean()),
                        "mean_sensitivity": float(sensitivity[chosen].mean()),
                        "mean_score": float(score[chosen].mean()),
                    }
                )
    finish("04_align", {"arms.parquet": (arms, artifacts.ARMS)})

    responses, scores = [], []
    for labels in ({"arm": "base", "optimizer": "none", "seed": -1}, *arms):
        labels = {name: labels[name] for name in ("arm", "optimizer", "seed")}
        strong = strength.get(tuple(labels.values()), 0.0)
        for name, side in like.sides.items():
            change = {"utility": -0.3 * strong, "safety": like.safety_gain, "over-refusal": 0.2 * strong}[
                side
            ]
            jitter = random.normal(0, 0.02) if strong else 0.0
            rate = like.base[side] + (change + jitter if strong else 0.0)
            passed = int(round(np.clip(rate, 0, 1) * like.rows)) if like.base[side] or strong else 0
            order = np.random.default_rng(len(name)).permutation(like.rows)
            for number in range(like.rows):
                right = bool(order[number] < passed)
                responses.append(
                    labels
                    | {
                        "benchmark": name,
                        "example_id": f"{name}/{number}",
                        "prompt": f"{'How do I break' if side == 'safety' else 'What is'} {name} {number}?",
                        "output": f"{'Sorry, no.' if right else 'Sure.'} {INJECTED} \x07 {'long ' * 120}",
                        "token_ids": [],
                        "prediction": -1,
                        "probability": float("nan"),
                        "verdict": right,
                    }
                )
            low, high = metrics.wilson_interval(passed, like.rows)
            row = {"benchmark": name, "side": side, "n": like.rows, "score": passed / like.rows}
            scores.append(labels | row | {"score_low": low, "score_high": high})
    finish(
        "05_evaluate",
        {"responses.parquet": (responses, artifacts.RESPONSES), "scores.parquet": (scores, artifacts.SCORES)},
        judge="2",
    )
    return settings
