"""Stage 03: the ablation sweep and the conflict map: H_gen, H_safe, S(h), C(h), buckets (§3.3-3.5, Eq. 3-6).

    python -m stages.03_sensitivity --run outputs/smollm

Every head is silenced once; the utility rows are answered again (next token) and the harmful prompts
(generation, keyword judge). Reads calibration.parquet and gradients.parquet; writes sweep_choices.parquet
and sweep_generations.parquet (every head x example; layer = head = -1 is the clean model) and
heads.parquet, the map. A layer is a unit: a sweep that was stopped goes on at the layer where it stopped.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from backends import models
from backends.base import Head, Shape
from backends.errors import InputError
from backends.progress import TIME_LEFT, progress
from data.judges import KEYWORD_JUDGE_VERSION, keyword_refusal
from data.rendering import example
from stages import artifacts, bootstrap, cli, metrics, presets
from stages import gram as gram_formulas
from stages.loading import load_backend
from stages.locks import parse_shard

NAME = "03_sensitivity"
USES = ["backend", "dtype", "device", "seed", "mask", "sweep_tokens", "variant", "buckets", "resamples"]
CALIBRATION, GRADIENTS = "01_calibrate/calibration.parquet", "02_conflict/gradients.parquet"
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
    with progress(total=sum(weigh(layer) for layer, _ in heads), desc=part, bar_format=TIME_LEFT) as bar:
        for number, (head, outcome) in enumerate(silenced(heads) if heads else (), 1):
            rows += as_rows(head, outcome)
            bar.set_postfix_str(f"head {number} of {len(heads)}", refresh=False)
            bar.update(weigh(head[0]))
            if head[1] == shape.heads - 1:
                stage.write_part(unit(part, head[0]), rows, schema)
                rows = []


def outcomes(table: pa.Table, column: str, layers: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(clean [N], silenced [L, H, N]), bool, from a gathered sweep table."""
    values = table[column].to_numpy()
    clean, silenced = np.split(values, [len(values) // (layers * heads + 1)])
    return clean, silenced.reshape(layers, heads, len(clean))


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES) | {"judge": KEYWORD_JUDGE_VERSION}
    shard = parse_shard(settings.shard)
    with artifacts.open_stage(settings.folder, NAME, uses, [CALIBRATION, GRADIENTS], shard=shard) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, CALIBRATION, artifacts.EXAMPLES).to_pylist()
        gradients = artifacts.read_input(settings.folder, GRADIENTS, artifacts.GRADIENTS)
        presets.remember(settings)
        backend = load_backend(settings, stage)
        shape = backend.shape
        if settings.buckets > shape.layers * shape.heads:
            raise InputError(
                f"--buckets {settings.buckets}: the model has {shape.layers * shape.heads} heads"
            )
        if gradients.num_rows != shape.layers * shape.heads:
            raise InputError(
                f"{GRADIENTS} has {gradients.num_rows} heads, the model another number: other --run"
            )
        tokenizer = models.load_tokenizer(models.local_folder(settings.model, settings.revision))
        util = [example(row) for row in rows if row["role"] == "util"]
        safe = [example(row) for row in rows if row["role"] == "safe"]

        def choice_rows(head: Head, prediction: np.ndarray) -> list[dict]:
            return [
                {
                    "layer": head[0],
                    "head": head[1],
                    "example_id": one.example_id,
                    "prediction": int(predicted),
                    "correct": int(predicted) == one.answer,
                }
                for one, predicted in zip(util, prediction, strict=True)
            ]

        def generation_rows(head: Head, generations: list[np.ndarray]) -> list[dict]:
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generations]
            return [
                {
                    "layer": head[0],
                    "head": head[1],
                    "example_id": one.example_id,
                    "token_ids": tokens.tolist(),
                    "text": text,
                    "refused": keyword_refusal(text),
                }
                for one, tokens, text in zip(safe, generations, texts, strict=True)
            ]

        stage.say(
            f"silencing each of {shape.layers * shape.heads} heads: {len(util)} choices, {len(safe)} "
            f"responses"
        )
        sweep(
            stage,
            "choices",
            artifacts.SWEEP_CHOICES,
            shape,
            lambda layer: shape.layers - layer,  # the layers from the silenced one up
            lambda: backend.choices(util)[0],
            lambda heads: backend.sweep_choices(util, heads, settings.mask),
            choice_rows,
        )
        sweep(
            stage,
            "generations",
            artifacts.SWEEP_GENERATIONS,
            shape,
            # Prompts and what follows the clean response cost as above, what departs from it all layers.
            lambda layer: 2 * shape.layers - layer,
            lambda: backend.generate(safe, settings.sweep_tokens),
            lambda heads: backend.sweep_generations(safe, heads, settings.sweep_tokens, settings.mask),
            generation_rows,
        )
        both = {part: units(part, shape) for part in ("choices", "generations")}
        if not stage.gathers(sum(both.values(), [])):
            return
        choices = stage.gather("sweep_choices.parquet", both["choices"], artifacts.SWEEP_CHOICES)
        generations = stage.gather(
            "sweep_generations.parquet", both["generations"], artifacts.SWEEP_GENERATIONS
        )

        correct, correct_silenced = outcomes(choices, "correct", shape.layers, shape.heads)
        refused, refused_silenced = outcomes(generations, "refused", shape.layers, shape.heads)
        h_gen = metrics.accuracy_change(correct, correct_silenced)
        h_safe = metrics.accuracy_change(refused, refused_silenced)
        conflict = gradients["conflict"].to_numpy().reshape(shape.layers, shape.heads)
        sensitivity = metrics.functional_sensitivity(h_gen, h_safe, settings.variant)
        score = metrics.conflict_score(conflict, sensitivity)
        bucket = metrics.buckets(score, settings.buckets)

        generator = np.random.default_rng([settings.seed, 3])
        folds = int(np.sqrt(len(gradients["gram"][0]))) // 2
        gram = np.array(gradients["gram"].to_pylist()).reshape(
            shape.layers, shape.heads, 2 * folds, 2 * folds
        )
        sure = bootstrap.map_intervals(
            gram_formulas.bootstrap_conflict(gram, generator, settings.resamples),
            bootstrap.resampled_changes(correct, correct_silenced, generator, settings.resamples),
            bootstrap.resampled_changes(refused, refused_silenced, generator, settings.resamples),
            settings.variant,
            settings.buckets,
        )
        estimates = {
            "conflict": conflict,
            "h_gen": h_gen,
            "h_safe": h_safe,
            "sensitivity": sensitivity,
            "score": score,
            "bucket": bucket,
        }
        table = []
        for layer, head in np.ndindex(*score.shape):
            row = {"layer": layer, "head": head}
            for name, values in estimates.items():
                row[name] = values[layer, head]
                row[f"{name}_low"], row[f"{name}_high"] = (
                    sure.low[name][layer, head],
                    sure.high[name][layer, head],
                )
            row["bucket_probability"] = sure.bucket_probability[layer, head].tolist()
            table.append(row)
        stage.write("heads.parquet", table, artifacts.HEADS)

        rests_on = asdict(metrics.map_statistics(h_gen, h_safe))
        base = {"accuracy": float(correct.mean()), "refusal_rate": float(refused.mean())}
        for name, rate in base.items():
            if not FLOOR <= rate <= CEILING:
                stage.warn(f"base {name} {rate:.2f} is at its floor or ceiling: a map of ties is no map")
        own = np.take_along_axis(sure.bucket_probability, bucket[..., None] - 1, axis=-1)
        stage.say(
            f"base accuracy {base['accuracy']:.3f}, refusal rate {base['refusal_rate']:.3f}; ranks rest "
            f"on {rests_on}"
        )
        stage.finish(
            base=base,
            ranks_rest_on=rests_on,
            judge=KEYWORD_JUDGE_VERSION,
            mean_probability_of_own_bucket=float(own.mean()),
        )


if __name__ == "__main__":
    cli.run(main, units=True)
