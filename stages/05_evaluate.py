"""Stage 05: the benchmarks, for the base model and every arm (§4.1, App. A).

    python -m stages.05_evaluate --run outputs/smollm

Knowledge is scored by the next token, all else by generated text (data/scoring.py). Reads
benchmarks.parquet and the adapters; writes responses.parquet (every prompt, output, verdict, so that
judging can be run again) and scores.parquet. Each arm x benchmark is a unit.
"""

import time
from collections import defaultdict
from pathlib import Path

from backends import models
from backends.base import Backend
from backends.errors import InputError
from backends.progress import progress
from data import benchmarks as registry
from data.judges import KEYWORD_JUDGE_VERSION
from data.rendering import example
from data.scoring import verdict
from stages import artifacts, cli, metrics, presets
from stages.loading import load_backend
from stages.locks import parse_shard

NAME = "05_evaluate"
USES = ["backend", "dtype", "device", "benchmarks"]
BENCHMARKS, ARMS = "01_calibrate/benchmarks.parquet", "04_align/arms.parquet"
BASE = {"arm": "base", "optimizer": "none", "seed": -1}


def respond(
    backend: Backend, tokenizer, rows: list[dict], new_tokens: int, adapter: Path | None
) -> list[dict]:
    """Answers and judges one benchmark's rows: next-token choices in one go, all others by generation."""
    answers: list[dict] = [{} for _ in rows]
    chosen = [index for index, row in enumerate(rows) if row["scoring"] == "choice"]
    written = [index for index, row in enumerate(rows) if row["scoring"] != "choice"]
    if chosen:
        prediction, probability = backend.choices([example(rows[index]) for index in chosen], adapter)
        for index, predicted, likely in zip(chosen, prediction.tolist(), probability.tolist(), strict=True):
            row = rows[index]
            output = row["choices"][predicted] if row["choices"] else tokenizer.decode([predicted])
            correct = predicted == row["answer"]
            answers[index] = {
                "output": output,
                "token_ids": [],
                "prediction": predicted,
                "probability": likely,
                "verdict": correct,
            }
    if written:
        generated = backend.generate([example(rows[index]) for index in written], new_tokens, adapter)
        for index, tokens in zip(written, generated, strict=True):
            row = rows[index]
            output = tokenizer.decode(tokens, skip_special_tokens=True)
            passed = verdict(row["scoring"], output, row["target"])
            answers[index] = {
                "output": output,
                "token_ids": tokens.tolist(),
                "prediction": -1,
                "probability": float("nan"),
                "verdict": passed,
            }
    return answers


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES) | {"judge": KEYWORD_JUDGE_VERSION}
    reads = [BENCHMARKS, ARMS]
    adapters = artifacts.stage_manifest(settings.folder, "04_align")["outputs"]
    reads += [f"04_align/{file}" for file in sorted(adapters) if file.startswith("adapters/")]
    shard = parse_shard(settings.shard)
    with artifacts.open_stage(settings.folder, NAME, uses, reads, shard=shard) as stage:
        if stage.finished:
            return
        benchmark_rows = artifacts.read_input(settings.folder, BENCHMARKS, artifacts.EXAMPLES).to_pylist()
        arms = artifacts.read_input(settings.folder, ARMS, artifacts.ARMS).to_pylist()
        for relative in reads[2:]:
            if artifacts.sha256(settings.folder / relative) != stage.inputs[relative]:
                raise InputError(
                    f"{settings.folder / relative} is not what its manifest says (sha256): make 04 again"
                )
        presets.remember(settings)
        asked = {
            one.name: one
            for one in registry.asked(settings.benchmarks, bool(settings.util), bool(settings.safe))
        }
        backend = load_backend(settings, stage)
        tokenizer = models.load_tokenizer(models.local_folder(settings.model, settings.revision))
        by_benchmark = defaultdict(list)
        for row in benchmark_rows:
            by_benchmark[row["role"]].append(row)

        labelled = [(BASE, None)]
        for arm in arms:
            labels = {name: arm[name] for name in ("arm", "optimizer", "seed")}
            labelled.append((labels, settings.folder / "04_align" / arm["adapter"]))
        units = {
            f"{labels['arm']}-{labels['optimizer']}-{labels['seed']}-{name}": (labels, adapter, name)
            for labels, adapter in labelled
            for name in by_benchmark
        }
        for unit in progress(stage.left(list(units)), desc=NAME, unit="unit"):
            labels, adapter, name = units[unit]
            rows, began = by_benchmark[name], time.monotonic()
            answers = respond(backend, tokenizer, rows, asked[name].new_tokens, adapter)
            told = [
                labels
                | {"benchmark": name, "example_id": row["example_id"], "prompt": row["prompt"]}
                | answer
                for row, answer in zip(rows, answers, strict=True)
            ]
            stage.write_part(unit, told, artifacts.RESPONSES, seconds=round(time.monotonic() - began, 2))
        if not stage.gathers(list(units)):
            return
        responses = stage.gather("responses.parquet", list(units), artifacts.RESPONSES)
        verdicts = responses["verdict"].to_numpy()
        scores, first = [], 0
        for labels, _, name in units.values():
            count = len(by_benchmark[name])
            passed = int(verdicts[first : first + count].sum())
            first += count
            low, high = metrics.wilson_interval(passed, count)
            scores.append(
                labels
                | {
                    "benchmark": name,
                    "side": asked[name].benchmark.side,
                    "n": count,
                    "score": passed / count,
                    "score_low": low,
                    "score_high": high,
                }
            )
        for labels, _ in labelled:
            own = [score for score in scores if all(score[key] == labels[key] for key in labels)]
            summary = ", ".join(f"{score['benchmark']} {score['score']:.3f}" for score in own)
            stage.say(f"{labels['arm']}-{labels['optimizer']}-{labels['seed']}: {summary}")
        stage.write("scores.parquet", scores, artifacts.SCORES)
        stage.finish(judge=KEYWORD_JUDGE_VERSION, responses=responses.num_rows)


if __name__ == "__main__":
    cli.run(main, units=True)
