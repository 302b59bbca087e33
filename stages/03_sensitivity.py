"""Stage 03: the ablation sweep and the conflict map: H_gen, H_safe, S(h), C(h), buckets (§3.3-3.5, Eq. 3-6).

    python -m stages.03_sensitivity --run outputs/smollm

Every head is silenced once; the utility rows are answered again (next token; worked problems in writing) and
the harmful prompts (generation, keyword judge). Reads calibration.parquet and gradients.parquet; writes
sweep_choices.parquet, sweep_generations.parquet and, where answers are written, sweep_answers.parquet (every
head x example; layer = head = -1 is the clean model) and heads.parquet, the map. Every other map (--maps) has
its own heads-<map>.parquet and shares the sweep: a row that two maps have is answered once. A layer is a
unit: a sweep that was stopped goes on at the layer where it stopped.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache

import numpy as np
import pyarrow as pa

from backends import models
from backends.base import Head, Shape
from backends.errors import InputError
from backends.progress import TIME_LEFT, progress
from data.judges import KEYWORD_JUDGE_VERSION, keyword_refusal
from data.rendering import example
from data.scoring import verdict
from stages import artifacts, bootstrap, cli, maps, metrics, presets, schemas
from stages import gram as gram_formulas
from stages.loading import load_backend
from stages.locks import parse_shard

NAME = "03_sensitivity"
USES = [
    "backend",
    "dtype",
    "device",
    "seed",
    "mask",
    "sweep_tokens",
    "util_tokens",
    "maps",
    "folds",
    "variant",
]
USES += ["buckets", "resamples"]
CALIBRATION = "01_calibrate/calibration.parquet"
FLOOR, CEILING = 0.05, 0.95
CLEAN: Head = (-1, -1)


def unit(part: str, layer: int) -> str:
    return f"{part}-{'clean' if layer < 0 else f'layer{layer:03d}'}"


def units(part: str, shape: Shape) -> list[str]:
    return [unit(part, layer) for layer in range(-1, shape.layers)]


def sweep(
    stage: artifacts.Stage,
    part: str,
    schema: pa.Schema,
    shape: Shape,
    weigh: Callable[[int], int],
    clean: Callable[[], object],
    silenced: Callable[[list[Head]], Iterable[tuple[Head, object]]],
    as_rows: Callable[[Head, object], list[dict]],
) -> None:
    """Runs one part of the sweep over the layers that are still this process's to do.

    Args:
        weigh: what silencing a head of a layer costs, beside other layers (for the time still to go).
    """
    left = stage.left(units(part, shape))
    if unit(part, CLEAN[0]) in left:
        stage.write_part(unit(part, CLEAN[0]), as_rows(CLEAN, clean()), schema)
    layers = [layer for layer in range(shape.layers) if unit(part, layer) in left]
    heads = [(layer, head) for layer in layers for head in range(shape.heads)]
    rows: list[dict] = []
    began = time.monotonic()
    with progress(total=sum(weigh(layer) for layer, _ in heads), desc=part, bar_format=TIME_LEFT) as bar:
        for number, (head, outcome) in enumerate(silenced(heads) if heads else (), 1):
            rows += as_rows(head, outcome)
            bar.set_postfix_str(f"head {number} of {len(heads)}", refresh=False)
            bar.update(weigh(head[0]))
            if head[1] == shape.heads - 1:
                now = time.monotonic()
                stage.write_part(unit(part, head[0]), rows, schema, seconds=round(now - began, 2))
                rows, began = [], now


def seconds_per_head(stage: artifacts.Stage, part: str, shape: Shape) -> float:
    """What silencing a head took on average (App. F.5), from the times of the parts that were just joined."""
    took = [stage.units[unit(part, layer)].get("seconds", 0.0) for layer in range(shape.layers)]
    return sum(took) / (shape.layers * shape.heads)


def outcomes(table: pa.Table, column: str, layers: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(clean [N], silenced [L, H, N]), bool, from a gathered sweep table."""
    values = table[column].to_numpy()
    clean, silenced = np.split(values, [len(values) // (layers * heads + 1)])
    return clean, silenced.reshape(layers, heads, len(clean))


def map_rows(
    gradients: pa.Table,
    correct: tuple[np.ndarray, np.ndarray],
    refused: tuple[np.ndarray, np.ndarray],
    generator: np.random.Generator,
    settings: presets.Settings,
) -> tuple[list[dict], dict]:
    """The rows of heads.parquet, and what the manifest tells of the map.

    Args:
        gradients: of schemas.GRADIENTS.
        correct, refused: (clean [N], silenced [L, H, N]), bool, of D_util and D_safe.
    """
    shape, resamples = correct[1].shape[:2], settings.resamples
    h_gen, h_safe = metrics.accuracy_change(*correct), metrics.accuracy_change(*refused)
    conflict = gradients["conflict"].to_numpy().reshape(shape)
    sensitivity = metrics.functional_sensitivity(h_gen, h_safe, settings.variant)
    score = metrics.conflict_score(conflict, sensitivity)
    bucket = metrics.buckets(score, settings.buckets)
    folds = int(np.sqrt(len(gradients["gram"][0]))) // 2
    gram = np.array(gradients["gram"].to_pylist()).reshape(*shape, 2 * folds, 2 * folds)
    sure = bootstrap.map_intervals(
        gram_formulas.bootstrap_conflict(gram, generator, resamples),
        bootstrap.resampled_changes(*correct, generator, resamples),
        bootstrap.resampled_changes(*refused, generator, resamples),
        settings.variant,
        settings.buckets,
    )
    estimates = {"conflict": conflict, "h_gen": h_gen, "h_safe": h_safe}
    estimates |= {"sensitivity": sensitivity, "score": score, "bucket": bucket}
    rows = []
    for at in np.ndindex(*shape):
        row = {"layer": at[0], "head": at[1], "bucket_probability": sure.bucket_probability[at].tolist()}
        for name, values in estimates.items():
            row |= {name: values[at], f"{name}_low": sure.low[name][at], f"{name}_high": sure.high[name][at]}
        rows.append(row)
    own = np.take_along_axis(sure.bucket_probability, bucket[..., None] - 1, axis=-1)
    notes = {
        "base": {"accuracy": float(correct[0].mean()), "refusal_rate": float(refused[0].mean())},
        "ranks_rest_on": asdict(metrics.map_statistics(h_gen, h_safe)),
        "mean_probability_of_own_bucket": float(own.mean()),
    }
    return rows, notes


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES) | {"judge": KEYWORD_JUDGE_VERSION}
    shard = parse_shard(settings.shard)
    names = [maps.OWN, *maps.asked(settings.maps, settings.folds)]
    reads = [CALIBRATION, *(f"02_conflict/{maps.file('gradients', name)}" for name in names)]
    with artifacts.open_stage(settings.folder, NAME, uses, reads, shard=shard) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, CALIBRATION, schemas.EXAMPLES).to_pylist()
        gradients = {
            name: artifacts.read_input(settings.folder, relative, schemas.GRADIENTS)
            for name, relative in zip(names, reads[1:], strict=True)
        }
        presets.remember(settings)
        backend = load_backend(settings, stage)
        shape = backend.shape
        if settings.buckets > shape.layers * shape.heads:
            raise InputError(
                f"--buckets {settings.buckets}: the model has {shape.layers * shape.heads} heads"
            )
        for relative, table in zip(reads[1:], gradients.values(), strict=True):
            if table.num_rows != shape.layers * shape.heads:
                raise InputError(
                    f"{relative} has {table.num_rows} heads, the model another number: other --run"
                )
        tokenizer = models.load_tokenizer(models.local_folder(settings.model, settings.revision))
        safe = [row for row in rows if row["role"] == "safe"]
        # A row that several maps have is swept once. Other rows (pairs of requests) are stage 02's.
        util = {name or "util" for name in names}
        distinct = {row["example_id"]: row for row in rows if row["role"] in util}
        chosen = [row for row in distinct.values() if row["scoring"] == "choice"]
        written = [row for row in distinct.values() if row["scoring"] != "choice"]
        decode = cache(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
        refuses, right = cache(keyword_refusal), cache(verdict)  # silenced models mostly say the same

        def sweep_choices(schema: pa.Schema) -> None:
            examples = [example(row) for row in chosen]

            def as_rows(head: Head, prediction: np.ndarray) -> list[dict]:
                labels = {"layer": head[0], "head": head[1]}
                return [
                    labels
                    | {"example_id": row["example_id"], "prediction": int(predicted)}
                    | {"correct": int(predicted) == row["answer"]}
                    for row, predicted in zip(chosen, prediction, strict=True)
                ]

            sweep(
                stage,
                "choices",
                schema,
                shape,
                lambda layer: shape.layers - layer,  # the layers from the silenced one up
                lambda: backend.choices(examples)[0],
                lambda heads: backend.sweep_choices(examples, heads, settings.mask),
                as_rows,
            )

        def sweep_text(
            part: str,
            schema: pa.Schema,
            asked: list[dict],
            new_tokens: int,
            judge: Callable[[dict, str], dict],
        ) -> None:
            examples = [example(row) for row in asked]

            def as_rows(head: Head, generations: list[np.ndarray]) -> list[dict]:
                told = []
                for row, tokens in zip(asked, generations, strict=True):
                    text = decode(tuple(tokens.tolist()))
                    labels = {"layer": head[0], "head": head[1], "example_id": row["example_id"]}
                    told.append(labels | {"token_ids": tokens.tolist(), "text": text} | judge(row, text))
                return told

            sweep(
                stage,
                part,
                schema,
                shape,
                # Prompts and what follows the clean response cost as above, what departs from it all layers.
                lambda layer: 2 * shape.layers - layer,
                lambda: backend.generate(examples, new_tokens),
                lambda heads: backend.sweep_generations(examples, heads, new_tokens, settings.mask),
                as_rows,
            )

        stage.say(
            f"silencing each of {shape.layers * shape.heads} heads: {len(chosen)} choices, "
            + (f"{len(written)} written answers, " if written else "")
            + f"{len(safe)} responses"
        )
        outputs = {"choices": schemas.SWEEP_CHOICES} if chosen else {}
        outputs |= {"answers": schemas.SWEEP_ANSWERS} if written else {}
        outputs["generations"] = schemas.SWEEP_GENERATIONS
        done = {part: units(part, shape) for part in outputs}
        stage.plan(sum(done.values(), []))
        if chosen:
            sweep_choices(schemas.SWEEP_CHOICES)
        if written:
            sweep_text(
                "answers",
                schemas.SWEEP_ANSWERS,
                written,
                settings.util_tokens,
                lambda row, text: {"correct": right(row["scoring"], text, row["target"])},
            )
        sweep_text(
            "generations",
            schemas.SWEEP_GENERATIONS,
            safe,
            settings.sweep_tokens,
            lambda row, text: {"refused": refuses(text)},
        )
        if not stage.gathers():
            return
        swept = {
            part: stage.gather(f"sweep_{part}.parquet", done[part], schema)
            for part, schema in outputs.items()
        }
        # (clean [N], silenced [L, H, N]) of every distinct utility row
        found = [
            outcomes(swept[part], "correct", shape.layers, shape.heads)
            for part in ("choices", "answers")
            if part in swept
        ]
        correct = tuple(np.concatenate(each, axis=-1) for each in zip(*found, strict=True))
        refused = outcomes(swept["generations"], "refused", shape.layers, shape.heads)
        column = {row["example_id"]: at for at, row in enumerate(chosen + written)}
        notes = {}
        for number, name in enumerate(names):
            own = [column[row["example_id"]] for row in rows if row["role"] == (name or "util")]
            generator = np.random.default_rng([settings.seed, 3, number] if name else [settings.seed, 3])
            table, notes[name] = map_rows(
                gradients[name], (correct[0][own], correct[1][..., own]), refused, generator, settings
            )
            stage.write(maps.file("heads", name), table, schemas.HEADS)
            told, base = f"map {name}: " if name else "", notes[name]["base"]
            for kind, rate in base.items():
                if not FLOOR <= rate <= CEILING and (kind == "accuracy" or not name):
                    stage.warn(
                        f"{told}base {kind} {rate:.2f} is at its floor or ceiling: a map of ties is no map"
                    )
            stage.say(
                f"{told}base accuracy {base['accuracy']:.3f}, refusal rate {base['refusal_rate']:.3f}; ranks "
                f"rest on {notes[name]['ranks_rest_on']}"
            )
        others = {name: notes[name] for name in names if name}
        cost = ", ".join(f"{part} {seconds_per_head(stage, part, shape):.2f} s" for part in outputs)
        stage.say(f"a head took: {cost} (App. F.5: 7 s and 60 s for 100 rows of an 8B model on an H800)")
        stage.finish(judge=KEYWORD_JUDGE_VERSION, **notes[maps.OWN], **({"maps": others} if others else {}))


if __name__ == "__main__":
    cli.run(main, units=True)
