"""NeuronTune's arms: which neurons are tuned, and which rows are a task of its meta-learning.

    neurons256                  the 256 neurons of highest safety and the 256 of highest utility score
    neurons256_lam0.8           with another weight of the safety loss than 0.5
    randomneurons256            as many of each as neurons256 has, drawn by the seed: the control
    neurons0                    no neuron: all gains 1, the base model bit for bit

All of it is our reading of an abstract that fixes only that there is a neuron-count threshold (README).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from backends.neurons import Neuron, Selection, Task
from data.examples import Example
from stages.arms import Arm


def ranks(score: np.ndarray) -> np.ndarray:
    """int32 [L, F] from scores: 0 is the highest; ties by (layer, neuron).

    >>> ranks(np.array([[1.0, 3.0], [3.0, 0.0]])).tolist()
    [[2, 0], [1, 3]]
    """
    found = np.empty(score.size, np.int32)
    found[np.argsort(-score.ravel(), kind="stable")] = np.arange(score.size, dtype=np.int32)
    return found.reshape(score.shape)


def select(safety: np.ndarray, utility: np.ndarray, k: int) -> Selection:
    """The first `k` by each rank; a neuron of both goes to the list where its rank is better, to safety where
    they are equal. Lists are not filled up again.

    Args:
        safety, utility: ranks, int [L, F].

    >>> select(np.array([[0, 1, 2]]), np.array([[2, 0, 1]]), 2)
    Selection(safety=((0, 0),), utility=((0, 1), (0, 2)))
    """
    first = {"safety": safety < k, "utility": utility < k}
    better = safety <= utility
    first["safety"], first["utility"] = (
        first["safety"] & (better | ~first["utility"]),
        first["utility"] & (~better | ~first["safety"]),
    )
    return Selection(**{name: _pairs(np.argwhere(mask)) for name, mask in first.items()})


def drawn(chosen: Selection, layers: int, width: int, seed: int) -> Selection:
    """As many neurons of each kind as a selection has, drawn from all."""
    count = len(chosen.safety), len(chosen.utility)
    places = np.random.default_rng([seed, 6]).choice(layers * width, sum(count), replace=False)
    pairs = np.stack(np.unravel_index(places, (layers, width)), axis=1)
    return Selection(*(_pairs(part[np.lexsort(part.T[::-1])]) for part in np.split(pairs, [count[0]])))


def of_arm(arm: Arm, scored: pa.Table, seed: int) -> Selection:
    """The neurons of an arm, from a table of schemas.NEURONS."""
    shape = tuple(int(scored[name].to_numpy().max()) + 1 for name in ("layer", "neuron"))
    safety, utility = (scored[f"{side}_rank"].to_numpy().reshape(shape) for side in ("safety", "utility"))
    chosen = select(safety, utility, arm.number)
    return chosen if arm.kind == "neurons" else drawn(chosen, *shape, seed)


def _pairs(places: np.ndarray) -> tuple[Neuron, ...]:
    return tuple((int(layer), int(neuron)) for layer, neuron in places)


def tasks(rows: Sequence[Mapping], examples: Sequence[Example]) -> list[Task]:
    """Alignment rows as tasks: plain requests are one, every family of attacks (`source`) another; a family
    with fewer than four harmful or four benign rows, or a data set that names none, joins "adversarial".

    Args:
        rows: of alignment.parquet (role, source), `examples` the same as backends see them.
    """
    kinds = ("harmful", "benign")
    found: dict[str, dict[str, list[Example]]] = {}
    for row, example in zip(rows, examples, strict=True):
        form, kind = row["role"].split("_")
        name = form if form == "vanilla" else row["source"]
        found.setdefault(name, {one: [] for one in kinds})[kind].append(example)
    small = [
        name for name, own in found.items() if name != "vanilla" and min(len(own[one]) for one in kinds) < 4
    ]
    rest = {one: [row for name in small for row in found[name][one]] for one in kinds}
    kept = {name: own for name, own in found.items() if name not in small}
    if any(rest.values()):
        kept["adversarial"] = rest
    return [Task(name, tuple(own["harmful"]), tuple(own["benign"])) for name, own in sorted(kept.items())]
