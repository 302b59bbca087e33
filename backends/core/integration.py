"""Integrated gradients along paths of neurons, and their quadrature, in numpy: torch's (Flax has its own).

Axes: L layers, F neurons of a layer, N examples, P paths, p of them, n points, m nodes of a rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from backends.base import Attribution, Example
from backends.core.errors import InputError

NODES, COMPLETE = 4, 0.005
"""nodes of a piece of a path; how far its attributions may be from the loss's change, else it is halved"""
Paths = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(path of each row [n], its place on it in [0, 1], [n]) -> losses there [n], gradients times the path's
length [n, ...]"""
Integrals = tuple[np.ndarray, np.ndarray, np.ndarray]
"""attributions along each path of each example [N, P, ...], their sums [N, P], the loss's change [N, P]"""


def quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1) and weights of Gauss-Legendre quadrature, float64 [m] each (Captum's default too)."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


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

    def error(self, rounding: float) -> float:
        """Distance of its attributions from the loss's change along it, beyond what rounding explains
        (relative to the numbers they come from): in bfloat16 a path would else be halved for noise."""
        noise = rounding * (max(self.losses) + float(np.abs(self.own).sum()))
        return abs(float(self.own.sum()) - (self.losses[1] - self.losses[0])) - noise


def integrate(evaluate: Paths, examples: int, paths: int, steps: int, rounding: float = 0.0) -> Integrals:
    """Attributions of some examples along each of their paths, which all end at one place: the mean gradient
    times the path's length.

    A path is one piece of `NODES` nodes at first. What the attributions of a piece have to sum to is known:
    pieces that miss it are halved until none misses more than COMPLETE (of the largest change on any path of
    the example), or its path has `steps` nodes. So nodes gather where the loss turns; on a path from zero
    that is its first hundredth, which one rule over the whole path would miss.

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
        for piece in sorted(pieces, key=lambda piece: -piece.error(rounding)):
            if piece.error(rounding) > allowed[piece.path] and spent[piece.path] + size <= steps:
                spent[piece.path] += size
                large.append(piece)
        if not large:
            break
        pieces = [piece for piece in pieces if piece not in large] + _halves(evaluate, large, rule)
    own = np.zeros((len(every), *owns[0].shape))
    for piece in pieces:
        own[piece.path] += piece.own
    total = own.reshape(len(every), -1).sum(axis=1)
    return tuple(part.reshape(examples, paths, *part.shape[1:]) for part in (own, total, change))


def _halves(evaluate: Paths, pieces: Sequence[Piece], rule: tuple[np.ndarray, np.ndarray]) -> list[Piece]:
    """Two of each piece."""
    middles = [(piece.path, (piece.low + piece.high) / 2) for piece in pieces]
    stretches = [
        (piece.path, *ends)
        for piece, (_, middle) in zip(pieces, middles, strict=True)
        for ends in ((piece.low, middle), (middle, piece.high))
    ]
    between, owns = _along(evaluate, middles, stretches, rule)
    losses = [
        ends
        for piece, middle in zip(pieces, between, strict=True)
        for ends in ((piece.losses[0], middle), (middle, piece.losses[1]))
    ]
    return [Piece(*half, ends, own) for half, ends, own in zip(stretches, losses, owns, strict=True)]


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
    """`evaluate`, called in order of paths for rows of at most `limit` tokens together (one row at the
    least).

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


def attribution(examples: Sequence[Example], found: Sequence[Integrals]) -> Attribution:
    """Of all examples, whose integrals come in groups. InputError names one that is not finite."""
    own, total, change = (np.concatenate(parts) for parts in zip(*found, strict=True))
    own = own.reshape(len(examples), -1, own.shape[-1])  # (N, L, F)
    for example, finite in zip(examples, np.isfinite(own).all(axis=(1, 2)), strict=True):
        if not finite:
            where = example.example_id
            raise InputError(f"the attribution on {where} is not finite: try --dtype float32")
    return Attribution(np.mean(np.abs(own), axis=0), total, change)
