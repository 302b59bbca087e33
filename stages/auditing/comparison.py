"""Two runs of one method, quantity by quantity: how far they differ, and how far they may (DESIGN.md §8).

Pure tables; no model is needed. `stages.compare` prints the rows and traces what differs to near-ties, stage
06 puts them into the report of a run that has a sibling.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from backends.errors import InputError
from stages import artifacts, drawing, maps, metrics
from stages.arms import MAML
from stages.auditing import audit_neurons, audit_weights
from stages.auditing.audit_run import NEURONS, SWEPT, Arm, Run
from stages.auditing.tolerances import FLOAT32, HALF, Tolerances

STAGES = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate")
SUFFIX = "-flax"


class Row(NamedTuple):
    """One quantity of two runs."""

    quantity: str
    compared: str
    """what, and how many of it"""
    largest: float | None = None
    """difference"""
    mean: float | None = None
    """absolute difference"""
    rank: float | None = None
    """Spearman's correlation"""
    equal: float | None = None
    """share"""
    allowed: str = ""
    """the tolerance, in words; empty: none is set"""
    ok: bool | None = None
    """None: not held to a tolerance, or not comparable"""
    note: str = ""


def open_run(folder: Path) -> Run:
    """The run in `folder`, finished up to stage 05. InputError says what is missing."""
    return Run(folder, {stage: artifacts.stage_manifest(folder, stage) for stage in STAGES})


def sibling(folder: Path) -> Path | None:
    """The run of the same preset by the other backend, where it is finished up to stage 05."""
    name = folder.name.removesuffix(SUFFIX) if folder.name.endswith(SUFFIX) else folder.name + SUFFIX
    other = folder.with_name(name)
    done = all((other / stage / artifacts.MANIFEST).is_file() for stage in STAGES)
    return other if done else None


def describe(run: Run) -> str:
    model = run.manifests["02_conflict"]["model"]
    return f"{model['backend']}, {model['dtype']} on {model['device']}"


def tolerances(one: Run, other: Run) -> Tolerances:
    kinds = {run.manifests["02_conflict"]["model"]["dtype"] for run in (one, other)}
    return FLOAT32 if kinds == {"float32"} else HALF


def compare(one: Run, other: Run) -> list[Row]:
    """All quantities of two runs. InputError where they are not of one model."""
    weights = [run.manifests["02_conflict"]["model"]["weights_sha256"] for run in (one, other)]
    if weights[0] != weights[1] or one.grid != other.grid:
        raise InputError(f"{one.folder} and {other.folder} are runs of different models: nothing to compare")
    allowed = tolerances(one, other)
    checks: Sequence[Callable[[Run, Run, Tolerances], list[Row]]] = (
        gradients,
        predictions,
        generations,
        conflict_map,
        neurons,
        training,
        adapters,
        gains,
        responses,
        scores,
    )
    return [row for check in checks for row in check(one, other, allowed)]


# What is compared


def same_rows(one: Run, other: Run, role: str) -> bool:
    """Whether D_util or D_safe holds the same rows, token by token, in both."""
    columns = ("example_id", "prompt_ids", "target_ids", "choice_ids", "answer")
    rows = [[[row[name] for name in columns] for row in run.calibration[role]] for run in (one, other)]
    return rows[0] == rows[1]


def _other_rows(quantity: str, role: str) -> Row:
    return Row(quantity, "not compared", note=f"D_{role} holds other rows")


def _numbers(
    quantity: str,
    compared: str,
    values: tuple[np.ndarray, np.ndarray],
    **tolerance: float | None,
) -> Row:
    """A row of two equally shaped arrays, held to one tolerance: `largest`, `mean` or `rank`."""
    left, right = (np.asarray(array, np.float64).ravel() for array in values)
    apart, rank = np.abs(left - right), _rank(left, right)
    found = Row(quantity, compared, float(apart.max()), float(apart.mean()), rank)
    return _held(found, **tolerance)


def _held(row: Row, **tolerance: float | None) -> Row:
    """The row with its tolerance, named by the field that it holds, and the verdict."""
    ((name, bound),) = tolerance.items()
    if bound is None:
        return row
    if name in ("largest", "mean"):
        return row._replace(allowed=f"{name} {bound:g}", ok=getattr(row, name) <= bound)
    if name == "rank":
        ok = row.largest == 0 or (row.rank or 0.0) >= bound
        return row._replace(allowed=f"rank correlation {bound:g}", ok=ok)
    return row._replace(allowed=f"equal {100 * bound:g} %", ok=row.equal >= bound)


def _rank(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's correlation; None where one side is constant, or there are fewer than three."""
    if min(len(np.unique(left)), len(np.unique(right))) < 2 or len(left) < 3:
        return None
    return metrics.correlation(left, right).spearman


def gradients(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    if not (same_rows(one, other, "safe") and same_rows(one, other, "util")):
        return [_other_rows("gradients", "util or D_safe")]
    if one.gram().shape != other.gram().shape:
        return [Row("gradients", "not compared", note="the runs have unequal numbers of folds")]
    norms = np.sqrt(np.einsum("lhff->lhf", one.gram()) + np.finfo(np.float64).tiny)
    unit = norms[..., :, None] * norms[..., None, :]
    apart, folds = np.abs(one.gram() - other.gram()) / unit, one.gram().shape[-1] // 2
    compared = f"{len(one.heads)} heads x {folds} + {folds} folds, in units of norms"
    found = Row("gradients", compared, float(apart.max()), float(apart.mean()))
    return [_held(found, largest=allowed.gradients)]


def same_swept(one: Run, other: Run, relative: str) -> bool:
    """Whether both have this table of swept utility rows, of the same rows."""
    columns = ("example_id", "prompt_ids", "choice_ids", "answer")
    rows = [[[row[name] for name in columns] for row in run.swept.get(relative, ())] for run in (one, other)]
    return bool(rows[0]) and rows[0] == rows[1]


def _equal_share(quantity: str, one: Run, other: Run, relative: str, column: str, bound: float | None) -> Row:
    found = [run.table(relative)[column].to_pylist() for run in (one, other)]
    equal = float(np.mean([left == right for left, right in zip(*found, strict=True)]))
    return _held(Row(quantity, f"{len(found[0])}", equal=equal), equal=bound)


def predictions(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    choices, answers = SWEPT
    if choices in one.swept and not same_swept(one, other, choices):
        return [_other_rows("predictions", "util")]
    found = []
    if choices in one.swept:
        found.append(_equal_share("predictions", one, other, choices, "prediction", allowed.predictions))
    if same_swept(one, other, answers):
        found.append(_equal_share("worked answers", one, other, answers, "token_ids", allowed.generations))
    return found


def generations(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    if not same_rows(one, other, "safe"):
        return [_other_rows("generations", "safe")]
    relative = "03_sensitivity/sweep_generations.parquet"
    return [_equal_share("generations", one, other, relative, "token_ids", allowed.generations)]


def conflict_map(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    """O, H_gen, H_safe, S, C and buckets of every head, in the run's own map and in others that both have."""
    return [
        row for name in one.map_names if name in other.map_names for row in _map(one, other, name, allowed)
    ]


def _map(one: Run, other: Run, name: str, allowed: Tolerances) -> list[Row]:
    tables = [run.table(f"03_sensitivity/{maps.file('heads', name)}") for run in (one, other)]
    told = f" ({name})" if name else ""

    def row(quantity: str, column: str, **tolerance: float | None) -> Row:
        values = tuple(table[column].to_numpy() for table in tables)
        return _numbers(quantity + told, f"{len(values[0])} heads", values, **tolerance)

    same = np.equal(*(table["bucket"].to_numpy() for table in tables))
    buckets = Row(f"buckets{told}", f"{len(same)} heads", equal=float(same.mean()))
    return [
        row("O", "conflict", largest=allowed.conflict),
        row("H_gen", "h_gen", mean=allowed.change),
        row("H_safe", "h_safe", mean=allowed.change),
        row("S", "sensitivity", rank=allowed.rank),
        row("C", "score", rank=allowed.rank),
        _held(buckets, equal=allowed.buckets),
    ]


def neurons(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    """Both scores of every neuron, in units of the largest."""
    if NEURONS not in one.tables or NEURONS not in other.tables:
        return []
    if not all(same_rows(one, other, role) for role in ("util", *drawing.PAIR)):
        return [_other_rows("neurons", "util or pairs")]
    found = []
    for side in ("safety", "utility"):
        left, right = (run.table(NEURONS)[side].to_numpy() for run in (one, other))
        told, values = f"{len(left)} neurons, by the largest", (left / left.max(), right / left.max())
        found.append(_numbers(f"neurons' {side}", told, values, largest=allowed.neurons))
    return found


def gains(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    """Gains of the arms that both runs tuned with the same neurons."""
    labels = [label for label in common_arms(one, other) if label[1] == MAML]
    if not (labels and _same_alignment(one, other)):
        return []
    values = tuple(np.stack([audit_neurons.gains(run, label) for label in labels]) for run in (one, other))
    return [_numbers("gains", f"{len(labels)} arms", values, largest=allowed.gains)]


def common_arms(one: Run, other: Run) -> list[Arm]:
    """Arms that both runs tuned with the same heads or neurons."""

    def heads(run: Run) -> dict[Arm, tuple]:
        names = ("layers", "heads", "safety_neurons", "utility_neurons")
        return {
            (arm["arm"], arm["optimizer"], arm["seed"]): tuple(arm[name] for name in names)
            for arm in run.arms
        }

    left, right = heads(one), heads(other)
    return [label for label in left if left[label] == right.get(label)]


def training(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    labels = common_arms(one, other)
    if not labels or not _same_alignment(one, other):
        return [Row("training losses", "not compared", note="no arm with the same heads, seed and rows")]
    losses = []
    for run in (one, other):
        rows = run.table("04_align/training.parquet").to_pylist()
        losses.append(
            np.array(
                [row["loss"] for row in rows if (row["arm"], row["optimizer"], row["seed"]) in set(labels)]
            )
        )
    if len(losses[0]) != len(losses[1]):
        return [Row("training losses", "not compared", note="unequal numbers of steps")]
    compared = f"{len(losses[0])} steps of {len(labels)} arms"
    return [_numbers("training losses", compared, tuple(losses), mean=allowed.loss)]


def _same_alignment(one: Run, other: Run) -> bool:
    columns = ["example_id", "prompt_ids", "target_ids"]
    left, right = (run.table("01_calibrate/alignment.parquet").select(columns) for run in (one, other))
    return left.equals(right)


def adapters(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    """Each common arm's update of W_q: the difference's length relative to the update's own."""
    labels = [label for label in common_arms(one, other) if label[1] != MAML]
    if not labels or not _same_alignment(one, other):
        return [Row("adapters' ΔW", "not compared", note="no arm with the same heads, seed and rows")]
    relative, lengths = [], ([], [])
    for label in labels:
        left, right = (update(run, label) for run in (one, other))
        square = sum(float((delta**2).sum()) for delta in left.values())
        apart = sum(float(((left[layer] - right[layer]) ** 2).sum()) for layer in left)
        relative.append((apart / square) ** 0.5 if square else float(bool(apart)))
        for kept, deltas in zip(lengths, (left, right), strict=True):
            kept += [float(np.linalg.norm(delta)) for delta in deltas.values()]
    compared = f"{len(labels)} arms, relative to ΔW"
    found = Row("adapters' ΔW", compared, max(relative), float(np.mean(relative)), _rank(*lengths))
    return [_held(found, largest=allowed.update)]


def update(run: Run, label: Arm) -> dict[int, np.ndarray]:
    """Layer -> alpha / r * B A of an arm's adapter, [H * D, E]."""
    arm, optimizer, seed = label
    file = run.folder / "04_align" / "adapters" / f"{arm}-{optimizer}-{seed}" / audit_weights.ADAPTER_FILES[1]
    tensors, settings = audit_weights.read_lora(file), run.settings("04_align")
    scale = settings["alpha"] / settings["rank"]
    layers = sorted({layer for layer, _ in tensors})
    return {layer: scale * (tensors[layer, "B"] @ tensors[layer, "A"]) for layer in layers}


def responses(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    """Answers of the base model, and of arms tuned alike (whose weights differ by rounding already)."""
    found = []
    for quantity, labels in (("responses, base", [("base", "none", -1)]), ("responses, tuned", None)):
        chosen = set(common_arms(one, other) if labels is None else labels)
        answers = [
            {
                (row["arm"], row["seed"], row["example_id"]): (row["prediction"], row["output"])
                for row in run.table("05_evaluate/responses.parquet").to_pylist()
                if (row["arm"], row["optimizer"], row["seed"]) in chosen
            }
            for run in (one, other)
        ]
        shared = answers[0].keys() & answers[1].keys()
        if not shared:
            found.append(Row(quantity, "not compared", note="no common rows"))
            continue
        equal = float(np.mean([answers[0][key] == answers[1][key] for key in shared]))
        bound = None if labels is None else allowed.generations  # the scores hold those of tuned models
        found.append(_held(Row(quantity, f"{len(shared)}", equal=equal), equal=bound))
    return found


def scores(one: Run, other: Run, allowed: Tolerances) -> list[Row]:
    """Benchmark scores by arm and optimizer, averaged over each run's seeds."""

    def means(run: Run) -> dict[tuple, float]:
        cells: dict[tuple, list[float]] = {}
        for row in run.table("05_evaluate/scores.parquet").to_pylist():
            cells.setdefault((row["arm"], row["optimizer"], row["benchmark"]), []).append(row["score"])
        return {cell: float(np.mean(values)) for cell, values in cells.items()}

    left, right = means(one), means(other)
    shared = [cell for cell in left if cell in right]
    if not shared:
        return [Row("scores", "not compared", note="no common arm and benchmark")]
    values = tuple(np.array([side[cell] for cell in shared]) for side in (left, right))
    return [_numbers("scores", f"{len(shared)} arms x benchmarks", values, largest=allowed.score)]
