"""NeuronTune's arms: which neurons are tuned, and which rows are a task of its meta-learning.

    neurons256                  the 256 neurons of highest safety and the 256 of highest utility score
    neurons256_lam0.8           with another weight of the safety loss than 0.5
    randomneurons256            as many of each as neurons256 has, drawn by the seed: the control
    neurons0                    no neuron: all gains 1, the base model bit for bit

All of it is our reading of an abstract that fixes only that there is a neuron-count threshold (README).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.method.arms import Arm

Neuron = tuple[int, int]
"""(layer, neuron), both from 0"""
FEWEST = 4
"""harmful and benign rows that a family of attacks needs to be a task of its own"""


class Chosen(NamedTuple):
    """Neurons of an arm, by (layer, neuron)."""

    safety: tuple[Neuron, ...]
    utility: tuple[Neuron, ...]


def ranks(score: np.ndarray) -> np.ndarray:
    """int32 [L, F] from scores: 0 is the highest; ties by (layer, neuron).

    >>> ranks(np.array([[1.0, 3.0], [3.0, 0.0]])).tolist()
    [[2, 0], [1, 3]]
    """
    found = np.empty(score.size, np.int32)
    found[np.argsort(-score.ravel(), kind="stable")] = np.arange(score.size, dtype=np.int32)
    return found.reshape(score.shape)


def select(safety: np.ndarray, utility: np.ndarray, k: int) -> Chosen:
    """The first `k` by each rank; a neuron of both goes to the list where its rank is better, to safety where
    they are equal. Lists are not filled up again.

    Args:
        safety, utility: ranks, int [L, F].

    >>> select(np.array([[0, 1, 2]]), np.array([[2, 0, 1]]), 2)
    Chosen(safety=((0, 0),), utility=((0, 1), (0, 2)))
    """
    first = {"safety": safety < k, "utility": utility < k}
    better = safety <= utility
    first["safety"], first["utility"] = (
        first["safety"] & (better | ~first["utility"]),
        first["utility"] & (~better | ~first["safety"]),
    )
    return Chosen(**{name: _pairs(np.argwhere(mask)) for name, mask in first.items()})


def draw_random(count: tuple[int, int], shape: tuple[int, int], generator: np.random.Generator) -> Chosen:
    """As many safety and utility neurons as `count` says, drawn from all of `shape` (L, F)."""
    places = generator.choice(shape[0] * shape[1], sum(count), replace=False)
    pairs = np.stack(np.unravel_index(places, shape), axis=1)
    return Chosen(*(_pairs(part[np.lexsort(part.T[::-1])]) for part in np.split(pairs, [count[0]])))


def choose_neurons(
    arm: Arm, safety: np.ndarray, utility: np.ndarray, generator: np.random.Generator
) -> Chosen:
    """The neurons of an arm.

    Args:
        safety, utility: ranks, int [L, F].
        generator: of the draw of random neurons.
    """
    chosen = select(safety, utility, arm.neurons)
    if arm.kind == "neurons":
        return chosen
    return draw_random((len(chosen.safety), len(chosen.utility)), safety.shape, generator)


def _pairs(places: np.ndarray) -> tuple[Neuron, ...]:
    return tuple((int(layer), int(neuron)) for layer, neuron in places)


class TaskRows(NamedTuple):
    """Rows of a task of the meta-learning, as indices."""

    name: str
    harmful: list[int]
    benign: list[int]


def task_rows(data_types: Sequence[str], sources: Sequence[str]) -> list[TaskRows]:
    """Alignment rows as tasks: plain requests are one, every family of attacks (`source`) another; a family
    with fewer than FEWEST harmful or benign rows, or a data set that names none, joins "adversarial".

    Args:
        data_types, sources: of each row ("vanilla_harmful", …; the family that its attack is of).
    """
    tasks: dict[str, TaskRows] = {}
    for row, (data_type, source) in enumerate(zip(data_types, sources, strict=True)):
        form, kind = data_type.split("_")
        name = form if form == "vanilla" else source
        getattr(tasks.setdefault(name, TaskRows(name, [], [])), kind).append(row)
    small = [task for task in tasks.values() if task.name != "vanilla" and min(map(len, task[1:])) < FEWEST]
    kept = [task for task in tasks.values() if task not in small]
    if small:
        rest = (sum((task[part] for task in small), []) for part in (1, 2))
        kept.append(TaskRows("adversarial", *rest))
    return sorted(kept, key=lambda task: task.name)
