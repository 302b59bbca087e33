"""Stage 02: gradients of every head's W_q rows, and from them the optimization conflict O(h) (§3.2, Eq. 2).

    python -m stages.02_conflict --run outputs/smollm

Reads calibration.parquet; writes gradients.parquet: for each head the Gram matrix [2F, 2F] of F fold-mean
gradients of D_safe and of D_util, and what follows from it: dot, norms, O, and O's bootstrap interval over
folds. As many layers as BLOCK bytes of gradients allow are a unit (a small model is one unit).
"""

import numpy as np

from backends.base import Shape
from data.rendering import example
from stages import artifacts, cli, metrics, presets
from stages import gram as gram_formulas
from stages.loading import load_backend
from stages.locks import parse_shard

NAME = "02_conflict"
USES = ["backend", "dtype", "device", "seed", "folds", "resamples"]
CALIBRATION = "01_calibrate/calibration.parquet"
BLOCK = 16 * 2**30
"""bytes of fold gradients that a unit holds in memory; fixed, so that units are the same on every machine"""


def units(shape: Shape, folds: int) -> dict[str, range]:
    """Names of the units, and their layers."""
    layer = 2 * folds * shape.heads * shape.head_dim * shape.model_dim * 4
    size = max(1, BLOCK // layer)
    blocks = [range(first, min(first + size, shape.layers)) for first in range(0, shape.layers, size)]
    return {f"layers{block[0]:03d}-{block[-1]:03d}": block for block in blocks}


def main(settings: presets.Settings) -> None:
    uses = settings.subset(*USES)
    shard = parse_shard(settings.shard)
    with artifacts.open_stage(settings.folder, NAME, uses, [CALIBRATION], shard=shard) as stage:
        if stage.finished:
            return
        rows = artifacts.read_input(settings.folder, CALIBRATION, artifacts.EXAMPLES).to_pylist()
        presets.remember(settings)
        backend = load_backend(settings, stage)
        safe, util = ([example(row) for row in rows if row["role"] == role] for role in ("safe", "util"))
        stage.say(
            f"gradients of {len(safe)} safety and {len(util)} utility rows in {settings.folds} folds each"
        )
        blocks = units(backend.shape, settings.folds)
        for unit in stage.left(list(blocks)):
            found = backend.gradient_gram(safe, util, settings.folds, blocks[unit])
            rows = [
                {"layer": layer, "head": head, "gram": matrix.ravel().tolist()}
                for layer, heads in zip(blocks[unit], found, strict=True)
                for head, matrix in enumerate(heads)
            ]
            stage.write_part(unit, rows, artifacts.GRAM)
        if not stage.gathers(list(blocks)):
            return
        matrices = stage.read_parts(list(blocks), artifacts.GRAM)["gram"].to_pylist()
        gram = np.array(matrices).reshape(
            backend.shape.layers, backend.shape.heads, *[2 * settings.folds] * 2
        )

        dot, norm_safe, norm_util = gram_formulas.conflict_from_gram(gram, settings.folds)
        conflict = metrics.optimization_conflict(dot, norm_safe, norm_util)
        generator = np.random.default_rng([settings.seed, 2])
        low, high = np.quantile(
            gram_formulas.bootstrap_conflict(gram, generator, settings.resamples), [0.025, 0.975], axis=0
        )
        table = [
            {
                "layer": layer,
                "head": head,
                "dot": dot[layer, head],
                "norm_safe": norm_safe[layer, head],
                "norm_util": norm_util[layer, head],
                "conflict": conflict[layer, head],
                "conflict_low": low[layer, head],
                "conflict_high": high[layer, head],
                "gram": gram[layer, head].ravel().tolist(),
            }
            for layer, head in np.ndindex(*conflict.shape)
        ]
        stage.write("gradients.parquet", table, artifacts.GRADIENTS)
        zero = int(((norm_safe == 0) | (norm_util == 0)).sum())
        if zero:
            stage.warn(f"{zero} heads have no gradient at all: their O is 0.5 by convention")
        stage.say(f"O: mean {conflict.mean():.3f}, range {conflict.min():.3f} to {conflict.max():.3f}")
        stage.finish(
            conflict_mean=float(conflict.mean()),
            conflict_range=[float(conflict.min()), float(conflict.max())],
            interval_width_mean=float((high - low).mean()),
        )


if __name__ == "__main__":
    cli.run(main, units=True)
