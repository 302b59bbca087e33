"""Greedy responses in the making: what both backends do alike, in plain Python.

Rows (head x prompt) decode side by side, a token a step. A row that has said what the clean model said is
*on* the clean response: below the silenced layer its stream, keys and values are the clean model's, known
already, and it enters at the silenced layer. With its first other word it is *off*, and runs through every
layer. Where so few rows are left that a step costs as much for more tokens, the next ones are guessed (the
clean response for rows on it; for others what other heads' responses went on with) and checked in the same
step: greedy, so still exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

WIDTH = 8
"""tokens of a row that a step takes at most"""
KEPT = 0.75
"""of the rows may still be going when those that ended are dropped"""
CLEAN = -1
"""the head that is silenced where none is"""


class Responses:
    """Responses to one prompt as a trie; a node is the tokens up to it, the root is 0."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._seen = [0]

    def add(self, node: int, tokens: Sequence[int]) -> int:
        """Goes on from a node by tokens, counting each on the way. Returns the last one's node."""
        for token in tokens:
            following = self._next[node].get(token)
            if following is None:
                following = len(self._next)
                self._next[node][token] = following
                self._next.append({})
                self._seen.append(0)
            self._seen[following] += 1
            node = following
        return node

    def guess(self, node: int, count: int) -> list[int]:
        """The commonest way on from a node, at most `count` tokens; of two as common, the one seen first."""
        tokens: list[int] = []
        while len(tokens) < count and self._next[node]:
            token, node = max(self._next[node].items(), key=lambda pair: (self._seen[pair[1]], -pair[1]))
            tokens.append(token)
        return tokens


@dataclass
class Draft:
    """The clean response to a prompt, and all responses of a layer's heads so far."""

    tokens: list[int]
    known: Responses = field(default_factory=Responses)

    def __post_init__(self) -> None:
        self.known.add(0, self.tokens)


@dataclass
class Row:
    """A response in the making."""

    prompt: int
    """of the prompts that decode together"""
    length: int
    """tokens of the prompt"""
    draft: Draft | None = None
    said: list[int] = field(default_factory=list)
    going: bool = True
    node: int = 0
    """`said` in the draft's `known`"""

    def __post_init__(self) -> None:
        self.on = self.draft is not None

    @property
    def position(self) -> int:
        """Of the last token said."""
        return self.length + len(self.said) - 1


class Engine(Protocol):
    """What holds the keys and values of rows, in order of `Decoding.rows`."""

    def step(self, ids: np.ndarray, positions: np.ndarray, rows: list[Row], off: list[int]) -> np.ndarray:
        """Greedy token after each of ids [R, w] at positions [R, w], int [R, w]. Rows `off` have left the
        clean response, in the order in which `leave` was told of them."""
        ...

    def leave(self, rows: list[Row], slots: range) -> None:
        """These rows have left the clean response; they are off[slots] from now on. What it left in the
        layers below the silenced one is theirs."""
        ...

    def pack(self, kept: list[int], off: list[int]) -> None:
        """Only rows `kept` go on; of those off, the ones at `off` of the old order."""
        ...


class Decoding:
    """Rows that decode side by side.

    Args:
        rows: whose prompts the engine holds.
        step_tokens: tokens that a step takes in for hardly more than it costs anyway.
        pairs: in half precision, for each row the row of the same prompt in which nothing is silenced.
            Rounding differs with the shape of a product, so that near a tie a row may leave the clean
            response without cause; what the clean model says in the same product decides.
    """

    def __init__(
        self,
        engine: Engine,
        rows: list[Row],
        budget: int,
        eos: set[int],
        step_tokens: int,
        pairs: list[int] | None = None,
    ):
        self.engine, self.rows, self.budget, self.eos = engine, list(rows), budget, eos
        self.step_tokens, self.pairs = step_tokens, pairs
        self.off = [] if rows and rows[0].on else list(range(len(rows)))

    def run(self, first: Sequence[int]) -> None:
        """Decodes every row to its end. `first` is what each one says first."""
        self._hear([[token] for token in first], [[]] * len(self.rows))
        while any(row.going for row in self.rows):
            fed = self._feed()
            width = max(map(len, fed))
            ids = np.array([tokens + [0] * (width - len(tokens)) for tokens in fed], np.int32)
            positions = np.array([row.position for row in self.rows], np.int32)[:, None] + np.arange(
                width, dtype=np.int32
            )
            self._hear(self.engine.step(ids, positions, self.rows, self.off).tolist(), fed)

    def _feed(self) -> list[list[int]]:
        """For each row, the last token it said, and guesses at the next ones where they cost nothing."""
        width = min(WIDTH, self.step_tokens // len(self.rows))
        fed = []
        for row in self.rows:
            guesses: list[int] = []
            if width > 1 and row.going and row.draft is not None:
                if row.on:
                    guesses = row.draft.tokens[len(row.said) :][: width - 1]
                else:
                    guesses = row.draft.known.guess(row.node, width - 1)
            fed.append([row.said[-1], *guesses[: self.budget - len(row.said) - 1]])
        return fed

    def _hear(self, told: list[list[int]], fed: list[list[int]]) -> None:
        """Takes each row's next tokens from what the model told after each token fed to it, up to the first
        that was guessed wrong."""
        left = []
        for line, row in enumerate(self.rows):
            if not row.going:
                continue
            was_on, began = row.on, len(row.said)
            for at, token in enumerate(told[line]):
                if row.on:
                    drafted = row.draft.tokens[len(row.said)]
                    if self.pairs is not None and token == told[self.pairs[line]][at]:
                        token = drafted
                    row.on = token == drafted
                row.said.append(token)
                row.going = token not in self.eos and len(row.said) < self.budget
                if not row.going or at + 1 >= len(fed[line]) or fed[line][at + 1] != token:
                    break
            if row.draft is not None:
                row.node = row.draft.known.add(row.node, row.said[began:])
            if was_on and not row.on and row.going:
                left.append(line)
        if 0 < sum(row.going for row in self.rows) <= KEPT * len(self.rows):
            left = self._pack(left)
        if left:
            slots = range(len(self.off), len(self.off) + len(left))
            self.engine.leave([self.rows[line] for line in left], slots)
            self.off += left

    def _pack(self, left: list[int]) -> list[int]:
        """Drops rows that have ended. Returns the new numbers of `left`."""
        kept = [line for line, row in enumerate(self.rows) if row.going]
        number = {line: new for new, line in enumerate(kept)}
        slots = [slot for slot, line in enumerate(self.off) if line in number]
        self.engine.pack(kept, slots)
        self.off = [number[self.off[slot]] for slot in slots]
        if self.pairs is not None:  # a pair ends with the rows that are on its response
            self.pairs = [number.get(self.pairs[line], 0) for line in kept]
        self.rows = [self.rows[line] for line in kept]
        return [number[line] for line in left]
