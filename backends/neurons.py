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
from typing import Literal, NamedTuple

import numpy as np

from backends.errors import InputError
from data.examples import Example

NODES, COMPLETE = 4, 0.005
"""nodes of a piece of a path; how far its attributions may be from the loss's change, else it is halved"""
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


Paths = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(path of each row [n], its place on it [n]) -> losses there [n], gradients times the path's length
[n, ...]"""


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a path, integrated."""

    path: int
    low: float
    high: float
    losses: tuple[float, float]
    """at its ends"""
    own: np.ndarray
    """attributions along it"""

    def missed(self, rounding: float) -> float:
        """How far its attributions are from what the loss does along it, but for what rounding (relative, of
        the numbers they come from) explains: in bfloat16 a path would else be halved for noise."""
        noise = rounding * (max(self.losses) + float(np.abs(self.own).sum()))
        return abs(float(self.own.sum()) - (self.losses[1] - self.losses[0])) - noise


class Integral(NamedTuple):
    """Of one example."""

    own: np.ndarray
    """attributions along each path, [P, ...]"""
    total: np.ndarray
    """what they sum to, [P]"""
    change: np.ndarray
    """of the loss, [P]"""


def integrate(
    evaluate: Paths, examples: int, paths: int, steps: int, rounding: float = 0.0
) -> list[Integral]:
    """Attributions of some examples along each of their paths, which all end at one place: the mean gradient
    times the path's length.

    A path is one piece of `NODES` nodes at first. What the attributions of a piece have to sum to is known:
    pieces that miss it are halved until none misses more than COMPLETE (of the largest change on any path of
    the example), or its path has `steps` nodes. So nodes gather where the loss turns: on a path from zero
    that is its first hundredth, which one rule over all of it would have to find.

    Args:
        evaluate: paths are numbered through, those of the first example first.
        paths: of each example.
        rounding: relative, of the model's numbers.
    """
    rule = quadrature(min(NODES, steps))
    size, every = len(rule[0]), range(examples * paths)
    ends = [(example * paths, 1.0) for example in range(examples)]
    whole = [(path, 0.0, 1.0) for path in every]
    losses, owns = _along(evaluate, ends + [(path, 0.0) for path in every], whole, rule)
    end, start = losses[:examples].repeat(paths), losses[examples:]
    change = end - start
    allowed = COMPLETE * np.abs(change).reshape(examples, paths).max(axis=1).repeat(paths)
    pieces = [Piece(*whole[path], (start[path], end[path]), owns[path]) for path in every]
    while True:
        spent = size * np.bincount([piece.path for piece in pieces], minlength=len(every))
        large: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: -piece.missed(rounding)):
            if piece.missed(rounding) > allowed[piece.path] and spent[piece.path] + size <= steps:
                spent[piece.path] += size
                large.append(piece)
        if not large:
            break
        pieces = [piece for piece in pieces if piece not in large] + _halves(evaluate, large, rule)
    along = np.zeros((len(every), *owns[0].shape))
    for piece in pieces:
        along[piece.path] += piece.own
    total = along.reshape(len(every), -1).sum(axis=1)
    split = (part.reshape(examples, paths, *part.shape[1:]) for part in (along, total, change))
    return [Integral(*each) for each in zip(*split, strict=True)]


def _halves(evaluate: Paths, pieces: Sequence[Piece], rule: tuple[np.ndarray, np.ndarray]) -> list[Piece]:
    """Two of each piece."""
    middles = [(piece.path, (piece.low + piece.high) / 2) for piece in pieces]
    halves = [
        (piece.path, *ends)
        for piece, (_, middle) in zip(pieces, middles, strict=True)
        for ends in ((piece.low, middle), (middle, piece.high))
    ]
    between, owns = _along(evaluate, middles, halves, rule)
    losses = [
        ends
        for piece, middle in zip(pieces, between, strict=True)
        for ends in ((piece.losses[0], middle), (middle, piece.losses[1]))
    ]
    return [Piece(*half, ends, own) for half, ends, own in zip(halves, losses, owns, strict=True)]


def _along(
    evaluate: Paths,
    places: Sequence[tuple[int, float]],
    stretches: Sequence[tuple[int, float, float]],
    rule: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses at places (path, point), and attributions along stretches (path, from, to)."""
    nodes, weights = rule
    inside = [(path, low + node * (high - low)) for path, low, high in stretches for node in nodes]
    paths, points = zip(*places, *inside, strict=True)
    along, gradient = evaluate(np.array(paths), np.array(points))
    of_each = gradient[len(places) :].reshape(len(stretches), len(nodes), *gradient.shape[1:])
    owns = [
        (high - low) * np.tensordot(weights, own, axes=1)
        for (_, low, high), own in zip(stretches, of_each, strict=True)
    ]
    return along[: len(places)], owns


def evaluated(tokens: Sequence[int], limit: int, evaluate: Paths) -> Paths:
    """`evaluate`, asked in order of paths for rows of at most `limit` tokens together (one at the least).

    Args:
        tokens: that a row of each path has.
    """

    def by_path(paths: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(paths, kind="stable")
        groups = packed([tokens[path] for path in paths[order]], limit)
        found = [evaluate(paths[order[some]], points[order[some]]) for some in groups]
        back = np.argsort(order)
        losses, gradients = (np.concatenate(each)[back] for each in zip(*found, strict=True))
        return losses, gradients

    return by_path


def grouped(examples: Sequence[Example], paths: int, limit: int) -> list[list[int]]:
    """Neighbours that are integrated together: the first points of all their paths have at most `limit`
    tokens (one example at the least)."""
    return packed([(paths * (NODES + 1) + 1) * len(example.target_ids) for example in examples], limit)


def packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbours whose sizes sum to at most `limit` (one at the least), by their places."""
    groups: list[list[int]] = [[]]
    held = 0
    for place, size in enumerate(sizes):
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += size
    return groups


def attribution(examples: Sequence[Example], found: Sequence[Integral]) -> Attribution:
    """InputError names an example whose attributions are not finite."""
    owns = [each.own.reshape(-1, each.own.shape[-1]) for each in found]  # [L, F] each
    for example, own in zip(examples, owns, strict=True):
        if not np.isfinite(own).all():
            where = example.example_id
            raise InputError(f"the attribution on {where} is not finite: try --dtype float32")
    total, change = (np.array([getattr(each, name) for each in found]) for name in ("total", "change"))
    return Attribution(np.mean([np.abs(own) for own in owns], axis=0), total, change)


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
