"""NeuronTune's terms and what both backends do alike: paths, tasks, bounds of gains, schedules.

The paper's abstract fixes that neurons of all layers are attributed to safety and to utility, and that
meta-learning amplifies the first and suppresses the second. Integrated gradients and a split of the data for
an inner and an outer loop are a third party's reading of the paper. All else is ours: what a neuron is, the
paths, the selection, the losses, the bounds, first-order MAML, its schedule.

Axes: L layers, F neurons of a layer, N examples, P paths, p of them, n points, m nodes of a rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.examples import Example

NODES, COMPLETE = 4, 0.005
"""nodes of a piece of a path; how far its attributions may be from the loss's change without being halved"""
Neuron = tuple[int, int]
"""(layer, neuron), both from 0: a unit of an MLP's intermediate activation, which W_down reads"""


@dataclass(frozen=True)
class Attribution:
    """How much each neuron, at the last prompt token, moves the loss along a path (integrated gradients)."""

    score: np.ndarray
    """float64 [L, F]: mean over examples of the attributions' absolute values"""
    total: np.ndarray
    """float64 [N, P]: sum of an example's attributions over the neurons that move on a path (P: 1, or L where
    each layer has its own)"""
    change: np.ndarray
    """float64 [N, P]: loss at a path's end less loss at its start, which `total` approximates"""

    @property
    def gap(self) -> float:
        """How far `total` is from `change` (completeness): lengths over examples and paths, relative. 0 where
        nothing changes."""
        change = float(np.linalg.norm(self.change))
        return float(np.linalg.norm(self.total - self.change)) / change if change else 0.0


@dataclass(frozen=True)
class Selection:
    """Neurons whose gains are tuned, each once."""

    safety: tuple[Neuron, ...]
    """gains from 1 up"""
    utility: tuple[Neuron, ...]
    """gains from 1 down to 0"""


@dataclass(frozen=True)
class Task:
    """One attack family, or one kind of request where none is known: what a task of the meta-learning is."""

    name: str
    safe: tuple[Example, ...]
    """harmful requests with refusals"""
    util: tuple[Example, ...]
    """benign requests of the same form with answers"""


@dataclass(frozen=True)
class GainRecipe:
    """How gains are tuned: first-order MAML (Finn et al. 2017), Adam outside. All of it is our reading."""

    lam: float = 0.5
    """weight of the safety loss; 1 - lam is that of the utility loss"""
    utility_objective: Literal["preserve", "suppress"] = "preserve"
    """preserve: the utility loss is minimised; suppress: maximised, as a third party's code does"""
    lr: float = 0.05
    """outer step (Adam); decays linearly to 0"""
    inner_lr: float = 1.0
    """inner step (plain gradient descent)"""
    inner_steps: int = 1
    epochs: int = 1
    """passes over the tasks' rows, support and query together"""
    batch: int = 8
    """rows of a support batch, and of a query batch; half of them harmful, half benign"""
    max_length: int = 1024
    """tokens; a longer row is cut at its end"""
    seed: int = 21
    """order of tasks and rows"""
    folder: Path | None = None
    """where the PEFT folder goes; None: a new temporary folder"""
    checkpoint: Path | None = None
    """file that keeps the run's state, about once a minute; one that is there is gone on from"""


# Attribution


def quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1) and weights of Gauss and Legendre's rule, float64 [m] each (Captum's default too)."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


Paths = Callable[[list[int], np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(paths, points [n] of them) -> losses there [p, n], gradients times the path's length [p, n, ...]"""


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a path, integrated."""

    low: float
    high: float
    losses: tuple[float, float]
    """at its ends"""
    own: np.ndarray
    """attributions along it"""

    @property
    def missed(self) -> float:
        """How far its attributions are from what the loss does along it."""
        return abs(float(self.own.sum()) - (self.losses[1] - self.losses[0]))


def integrate(evaluate: Paths, paths: int, steps: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Attributions along each of some paths: the mean gradient times the path's length.

    A path is one piece of `NODES` nodes at first. What the attributions of a piece have to sum to is known:
    the piece that misses it by most is halved until none misses more than COMPLETE (of the largest change on
    any of the paths), with `steps` nodes on a path in the end at most. So nodes gather where the loss turns:
    on a path from zero that is its first hundredth, which one rule over all of it would have to find.

    Returns attributions of each path, what they sum to [P], and the loss's change [P].
    """
    nodes, weights = quadrature(min(NODES, steps))
    along, gradient = evaluate(list(range(paths)), np.array([0.0, *nodes, 1.0]))
    change = along[:, -1] - along[:, 0]
    found = []
    for path in range(paths):
        own = np.tensordot(weights, gradient[path, 1:-1], axes=1)
        pieces = [Piece(0.0, 1.0, (along[path, 0], along[path, -1]), own)]
        while (len(pieces) + 1) * len(nodes) <= steps:
            worst = max(pieces, key=lambda piece: piece.missed)
            if not worst.missed > COMPLETE * np.abs(change).max():
                break
            pieces.remove(worst)
            pieces += _halves(lambda points, path=path: evaluate([path], points), worst, nodes, weights)
        found.append(sum(piece.own for piece in pieces))
    return found, np.array([own.sum() for own in found]), change


def _halves(
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    piece: Piece,
    nodes: np.ndarray,
    weights: np.ndarray,
) -> list[Piece]:
    """The two halves of a piece of one path."""
    half = (piece.high - piece.low) / 2
    middle, count = piece.low + half, len(nodes)
    (along,), (gradient,) = evaluate(
        np.array([*(piece.low + half * nodes), middle, *(middle + half * nodes)])
    )
    first, second = (
        half * np.tensordot(weights, some, axes=1) for some in (gradient[:count], gradient[count + 1 :])
    )
    return [
        Piece(piece.low, middle, (piece.losses[0], along[count]), first),
        Piece(middle, piece.high, (along[count], piece.losses[1]), second),
    ]


def blocks(layers: Sequence[int], size: int) -> list[list[int]]:
    """Layers in runs of at most `size` (one at the least)."""
    size = max(1, size)
    return [list(layers[first : first + size]) for first in range(0, len(layers), size)]


def check_attribution(examples: Sequence[Example], baselines: Sequence[Example] | None, steps: int) -> None:
    """ValueError where there is nothing to attribute, or no baseline for each example."""
    if not examples or steps < 1:
        raise ValueError("attribute_neurons: no examples or no steps")
    if baselines is not None and len(baselines) != len(examples):
        raise ValueError(f"baselines: {len(baselines)} for {len(examples)} examples")
    for example in (*examples, *(baselines or ())):
        if len(example.prompt_ids) == 0 or len(example.target_ids) == 0:
            raise ValueError(f"example {example.example_id} has no prompt or no target")


# Gains


def check_gains(tasks: Sequence[Task], neurons: Selection, layers: int, width: int) -> None:
    """ValueError names a neuron that the model does not have or that is given twice, or a task too small to
    be split."""
    every = [*neurons.safety, *neurons.utility]
    if len(set(every)) < len(every):
        raise ValueError("neurons: one is given twice")
    for layer, neuron in every:
        if not (0 <= layer < layers and 0 <= neuron < width):
            raise ValueError(f"neurons: the model has no neuron ({layer}, {neuron})")
    if not tasks:
        raise ValueError("tune_gains: no tasks")
    for task in tasks:
        if min(len(task.safe), len(task.util)) < 2:
            raise ValueError(f"task {task.name}: two harmful and two benign rows are needed at least")


def bounds(neurons: Selection, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest gain of every neuron, float32 [L, F]; both 1 for those that are not tuned."""
    least, most = np.ones((2, layers, width), np.float32)
    for chosen, bound, value in ((neurons.safety, most, np.inf), (neurons.utility, least, 0.0)):
        if chosen:
            bound[tuple(np.array(chosen).T)] = value
    return least, most


def outer_steps(tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> int:
    """As many as see `epochs` times the tasks' rows; none where there is no neuron to tune."""
    if not neurons.safety and not neurons.utility:
        return 0
    rows = sum(len(task.safe) + len(task.util) for task in tasks)
    return recipe.epochs * -(-rows // (2 * recipe.batch))


def outer_rate(step: int, steps: int, recipe: GainRecipe) -> float:
    """Linear decay from recipe.lr at step 0 towards 0 after the last step."""
    return recipe.lr * (1.0 - step / steps)


def draw(tasks: Sequence[Task], step: int, recipe: GainRecipe) -> tuple[Task, Task]:
    """Support and query rows of an outer step, as a task each.

    Tasks take turns, in a new order each round. A task's rows are split once: those at even places are
    support, the others query, so that the outer step never sees a row that an inner one did.
    """
    turn, at = divmod(step, len(tasks))
    task = tasks[np.random.default_rng([recipe.seed, 4, turn]).permutation(len(tasks))[at]]
    generator = np.random.default_rng([recipe.seed, 5, step])

    def some(rows: Sequence[Example]) -> tuple[Example, ...]:
        size = min(max(1, recipe.batch // 2), len(rows))
        return tuple(rows[index] for index in generator.choice(len(rows), size, replace=False))

    support, query = (
        Task(task.name, some(task.safe[half::2]), some(task.util[half::2])) for half in range(2)
    )
    return support, query


def utility_weight(recipe: GainRecipe) -> float:
    """Of the utility loss in what is minimised."""
    return (1.0 - recipe.lam) * (1.0 if recipe.utility_objective == "preserve" else -1.0)


def step_tokens(support: Task, query: Task, recipe: GainRecipe) -> int:
    """Tokens that an outer step reads, padding not counted."""
    counts = [
        sum(len(row.prompt_ids) + len(row.target_ids) for row in (*task.safe, *task.util))
        for task in (support, query)
    ]
    return recipe.inner_steps * counts[0] + counts[1]


def divided(tasks: Sequence[Task], neurons: Selection) -> tuple[list, list[Example]]:
    """What `checkpoint.identity` wants to know of a run: the neurons and how the rows divide, and the
    rows."""
    chosen = [neurons.safety, neurons.utility, [[len(task.safe), len(task.util)] for task in tasks]]
    return chosen, [row for task in tasks for row in (*task.safe, *task.util)]
