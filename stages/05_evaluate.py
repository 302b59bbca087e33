"""Stage 05: the benchmarks, for the base model and every arm (§4.1, App. A).

    python -m stages.05_evaluate --run outputs/smollm
    python -m stages.05_evaluate --run outputs/llama --judge wildguard      # judges the kept responses again

Knowledge is scored by the next token, all else by generated text (data/scoring.py). Reads
benchmarks.parquet and the adapters; writes responses.parquet (every prompt, output, verdict) and
scores.parquet. Each arm x benchmark is a unit. Judging comes after the units and reads their outputs only:
with another judge, or another version of it, a finished stage is judged again and nothing is generated.
"""

import time
from collections import defaultdict
from pathlib import Path

import pyarrow as pa

from backends import models
from backends.base import Backend
from backends.errors import InputError
from backends.progress import progress
from data import benchmarks as registry
from data.judges import KEYWORD_JUDGE_VERSION
from data.rendering import example
from stages import artifacts, classifier, cli, judging, loading, metrics, presets, schemas
from stages.locks import parse_shard

NAME = "05_evaluate"
USES = ["backend", "dtype", "device", "benchmarks"]
BENCHMARKS, ARMS = "01_calibrate/benchmarks.parquet", "04_align/arms.parquet"
BASE = {"arm": "base", "optimizer": "none", "seed": -1}


def respond(
    backend: Backend, tokenizer, rows: list[dict], new_tokens: int, adapter: Path | None
) -> list[dict]:
    """Answers one benchmark's rows: next-token choices in one go, all others by generation."""
    answers: list[dict] = [{} for _ in rows]
    chosen = [index for index, row in enumerate(rows) if row["scoring"] == "choice"]
    written = [index for index, row in enumerate(rows) if row["scoring"] != "choice"]
    if chosen:
        prediction, probability = backend.choices([example(rows[index]) for index in chosen], adapter)
        for index, predicted, likely in zip(chosen, prediction.tolist(), probability.tolist(), strict=True):
            choices = rows[index]["choices"]
            output = choices[predicted] if choices else tokenizer.decode([predicted])
            told = {"output": output, "token_ids": [], "prediction": predicted, "probability": likely}
            answers[index] = told
    if written:
        generated = backend.generate([example(rows[index]) for index in written], new_tokens, adapter)
        for index, tokens in zip(written, generated, strict=True):
            output = tokenizer.decode(tokens, skip_special_tokens=True)
            told = {"output": output, "token_ids": tokens.tolist()}
            answers[index] = told | {"prediction": -1, "probability": float("nan")}
    return answers


def generate(
    stage: artifacts.Stage,
    settings: presets.Settings,
    units: dict[str, tuple[dict, Path | None, str]],
    rows: dict[str, list[dict]],
    asked: dict[str, registry.Asked],
) -> None:
    """Computes the units that are left; the bar shows each one's score by the keyword judge."""
    left = stage.left(list(units))
    if not left:
        return
    backend = loading.load_backend(settings, stage)
    tokenizer = models.load_tokenizer(models.local_folder(settings.model, settings.revision))
    bar = progress(left, desc=NAME, unit="unit")
    for unit in bar:
        labels, adapter, name = units[unit]
        began = time.monotonic()
        answers = respond(backend, tokenizer, rows[name], asked[name].new_tokens, adapter)
        seconds = time.monotonic() - began
        told = [
            labels | {"benchmark": name, "example_id": row["example_id"], "prompt": row["prompt"]} | answer
            for row, answer in zip(rows[name], answers, strict=True)
        ]
        outputs = pa.Table.from_pylist(told, schema=schemas.OUTPUTS)
        stage.write_part(unit, outputs, schemas.OUTPUTS, seconds=round(seconds, 2))
        verdicts = judging.judged(outputs, rows[name], asked[name].benchmark)["verdict"].to_numpy()
        bar.set_postfix_str(f"{unit} {verdicts.mean():.3f}")


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES)
    reads = [BENCHMARKS, ARMS]
    adapters = artifacts.stage_manifest(settings.folder, "04_align")["outputs"]
    reads += [f"04_align/{file}" for file in sorted(adapters) if file.startswith("adapters/")]
    shard = parse_shard(settings.shard)
    judge = {"judge": KEYWORD_JUDGE_VERSION}
    judge["classifier"] = classifier.identity(settings) if settings.judge == "wildguard" else None
    with artifacts.open_stage(settings.folder, NAME, uses, reads, shard=shard, noted=judge) as stage:
        if stage.finished and not stage.outdated:
            return
        benchmark_rows = artifacts.read_input(settings.folder, BENCHMARKS, schemas.EXAMPLES).to_pylist()
        arms = artifacts.read_input(settings.folder, ARMS, schemas.ARMS).to_pylist()
        for relative in reads[2:]:
            if artifacts.sha256(settings.folder / relative) != stage.inputs[relative]:
                raise InputError(
                    f"{settings.folder / relative} is not what its manifest says (sha256): make 04 again"
                )
        presets.remember(settings)
        named = registry.asked(settings.benchmarks, bool(settings.util), bool(settings.safe))
        asked = {one.name: one for one in named}
        rows = defaultdict(list)
        for row in benchmark_rows:
            rows[row["role"]].append(row)
        labelled: list[tuple[dict, Path | None]] = [(BASE, None)]
        for arm in arms:
            labels = {name: arm[name] for name in ("arm", "optimizer", "seed")}
            labelled.append((labels, settings.folder / "04_align" / arm["adapter"]))
        units = {
            f"{labels['arm']}-{labels['optimizer']}-{labels['seed']}-{name}": (labels, adapter, name)
            for labels, adapter in labelled
            for name in rows
        }
        if stage.finished:
            stage.say(f"judged otherwise ({stage.outdated}): the kept responses are judged again")
            kept = artifacts.read_table(stage.folder / "responses.parquet", schemas.RESPONSES)
            parts = judging.split(kept.select(schemas.OUTPUTS.names), units, rows)
            stage.reopen(parts, schemas.OUTPUTS, "responses.parquet")
        requests = [unit for unit, (_, _, name) in units.items() if asked[name].benchmark.side != "utility"]
        classified = classifier.units(settings, requests) if judge["classifier"] else {}
        stage.plan([*units, *classified.values()])
        generate(stage, settings, units, rows, asked)
        classifier.classify(stage, settings, classified)
        if not stage.gathers():
            return

        responses, scores, unclear = [], [], 0
        for unit, (labels, _, name) in progress(units.items(), desc="judging", unit="unit"):
            outputs = stage.read_parts([unit], schemas.OUTPUTS)
            words = None
            if unit in classified:
                words = stage.read_parts([classified[unit]], schemas.CLASSIFIED)
                unclear += words.num_rows - int(words["clear"].to_numpy().sum())
            table = judging.judged(outputs, rows[name], asked[name].benchmark, words)
            responses.append(table)
            count, passed = table.num_rows, int(table["verdict"].to_numpy().sum())
            low, high = metrics.wilson_interval(passed, count)
            told = {"benchmark": name, "side": asked[name].benchmark.side, "n": count}
            told |= {"score": passed / count, "score_low": low, "score_high": high}
            scores.append(labels | told)
        for labels, _ in labelled:
            own = [score for score in scores if all(score[key] == labels[key] for key in labels)]
            summary = ", ".join(f"{score['benchmark']} {score['score']:.3f}" for score in own)
            stage.say(f"{labels['arm']}-{labels['optimizer']}-{labels['seed']}: {summary}")
        if unclear:
            stage.warn(f"the classifier gave no clear answer on {unclear} responses: they are no refusals")
        stage.write("responses.parquet", pa.concat_tables(responses), schemas.RESPONSES)
        stage.write("scores.parquet", scores, schemas.SCORES)
        stage.finish(**judge, responses=sum(table.num_rows for table in responses))


if __name__ == "__main__":
    cli.run(main, units=True)
