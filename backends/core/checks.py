"""Checks of a backend's arguments. Each raises ValueError that names the argument."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from backends.base import Example, Head, HeadGradients, Recipe, Redraw, Selection, Shape, Task
from backends.core.errors import InputError


def check_heads(heads: Sequence[Head], shape: Shape) -> list[Head]:
    """The heads as pairs of int; each must exist, and stand in the list once."""
    return _check_units("head", heads, shape.layers, shape.heads)


def _check_units(
    kind: str, units: Sequence[tuple[int, int]], layers: int, width: int
) -> list[tuple[int, int]]:
    pairs = [(int(layer), int(unit)) for layer, unit in units]
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"{kind}s: one is given twice")
    for layer, unit in pairs:
        if not (0 <= layer < layers and 0 <= unit < width):
            raise ValueError(f"{kind}s: the model has no {kind} ({layer}, {unit})")
    return pairs


def check_mask(mask: str) -> None:
    if mask not in ("output", "query"):
        raise ValueError(f'mask: "output" or "query", not {mask!r}')


def check_ablated(ablated: Head | None, adapter: Path | None, shape: Shape) -> Head | None:
    """The head as a pair of int. An adapter and an ablation exclude each other: the sweep has no adapter."""
    if ablated is None:
        return None
    if adapter is not None:
        raise ValueError("ablated: a head is ablated only in the model without an adapter")
    return check_heads([ablated], shape)[0]


def check_folds(folds: int, **examples: Sequence[Example]) -> None:
    """Each list must divide into equal folds."""
    for name, rows in examples.items():
        if len(rows) == 0 or len(rows) % folds:
            raise ValueError(f"{name}: {len(rows)} examples do not divide into {folds} equal folds")


def check_targets(*examples: Example) -> None:
    """Each must have a target, and what `check_graded` asks for."""
    for example in examples:
        if len(example.target_ids) == 0:
            raise ValueError(f"example {example.example_id} has no prompt or no target")
    check_graded(*examples)


def check_graded(*examples: Example) -> None:
    """Each must have a graded outcome: a target, refusals, or choices and the answer among them."""
    for example in examples:
        outcome = len(example.target_ids) + len(example.refusal_ids) + len(example.choice_ids)
        if len(example.prompt_ids) == 0 or outcome == 0:
            raise ValueError(f"example {example.example_id} has no prompt or no target")
        if len(example.choice_ids) and not 0 <= example.answer < len(example.choice_ids):
            raise ValueError(f"example {example.example_id}: answer {example.answer} is none of its choices")


def finite(found: Generator[HeadGradients], layers: Sequence[int]) -> Iterator[HeadGradients]:
    """Gradients as they come; ends `found`, which may hold an adapter in place, however it ends itself.
    InputError names a head of `layers` whose gradient is not finite."""
    with closing(found):
        for gradients in found:
            for values in (gradients.gram, gradients.gate_safe, gradients.gate_util):
                wrong = ~np.isfinite(values.reshape(*values.shape[:2], -1)).all(axis=-1)
                if wrong.any():
                    at, head = np.argwhere(wrong)[0]
                    raise InputError(
                        f"the gradient of head ({layers[at]}, {head}) is not finite: try --dtype float32"
                    )
            yield gradients


def check_tuning(
    examples: Sequence[Example],
    heads: Sequence[Head],
    recipe: Recipe,
    reference: Sequence[Example] | None,
    shape: Shape,
) -> list[Head]:
    """The heads, sorted."""
    pairs = sorted(check_heads(heads, shape))
    if not pairs or not examples:
        raise ValueError("tune: no heads or no examples")
    if recipe.optimizer != "sft" and not reference:
        raise ValueError(f"reference: {recipe.optimizer} needs examples to project against")
    return pairs


def check_redraw(redraw: Redraw | None) -> None:
    """It must say after how many steps."""
    if redraw is not None and redraw.every < 1:
        raise ValueError(f"redraw: every {redraw.every} steps, must be positive")


def check_neurons(shape: Shape) -> None:
    """InputError where the model has none that can be tuned."""
    if shape.mlp_dim is None:
        raise InputError(
            "NeuronTune needs a down_proj in the MLP of every layer, and this model has none (a mixture of "
            "experts, say): --pairs 0, and no arms of neurons"
        )


def check_dense(quantize: str) -> None:
    """InputError where NeuronTune would have to do with quantized weights."""
    if quantize:
        raise InputError(
            f"NeuronTune is not handled on quantized weights (--quantize {quantize}): --pairs 0, and no arms "
            f"of neurons (--neurons without a number)"
        )


def check_gains(tasks: Sequence[Task], neurons: Selection, shape: Shape) -> None:
    """Each neuron must exist and be given once, and each task have enough rows to be split."""
    check_neurons(shape)
    _check_units("neuron", [*neurons.safety, *neurons.utility], shape.layers, shape.mlp_dim)
    if not tasks:
        raise ValueError("tune_gains: no tasks")
    for task in tasks:
        if min(len(task.safe), len(task.util)) < 2:
            raise ValueError(f"task {task.name}: at least two harmful and two benign rows are needed")


def check_attribution(examples: Sequence[Example], baselines: Sequence[Example] | None, steps: int) -> None:
    """There must be something to attribute, and a baseline for each example, if any."""
    if not examples or steps < 1:
        raise ValueError("attribute_neurons: no examples or no steps")
    if baselines is not None and len(baselines) != len(examples):
        raise ValueError(f"baselines: {len(baselines)} for {len(examples)} examples")
    check_targets(*examples, *(baselines or ()))
