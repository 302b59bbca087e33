"""Greedy responses in the making, as both backends do them, in plain Python.

Rows (head x prompt) decode side by side, a token a step. A row whose tokens so far are the clean model's is
*on* the clean response: below the ablated layer its stream, keys and values are the clean model's, known
already, and it enters at the ablated layer. With its first other token it is *off*, and runs through every
layer. Where so few rows remain that a step costs as much for more tokens, the next ones are guessed (the
clean response for rows on it; for others what other heads' responses continued with) and checked in the same
step: greedy, so still exact.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from backends.base import Example, Head
from backends.core import packing
from backends.core.budgets import Plan

WIDTH = 8
"""tokens of a row that a step reads at most"""
KEPT = 0.75
"""rows that ended are dropped once no more than this share is active"""
CLEAN = -1
"""the head of a row in which none is ablated"""


class Trie:
    """Responses to one prompt; a node is the tokens up to it, the root is 0."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._count = [0]

    def add(self, node: int, tokens: Sequence[int]) -> int:
        """Continues from a node, counting each token's node. Returns the last one's node."""
        for token in tokens:
            following = self._next[node].get(token)
            if following is None:
                following = len(self._next)
                self._next[node][token] = following
                self._next.append({})
                self._count.append(0)
            self._count[following] += 1
            node = following
        return node

    def guess(self, node: int, count: int) -> list[int]:
        """The most frequent continuation of a node, at most `count` tokens; of two as frequent, the first
        seen."""
        tokens: list[int] = []
        while len(tokens) < count and self._next[node]:
            token, node = max(self._next[node].items(), key=lambda pair: (self._count[pair[1]], -pair[1]))
            tokens.append(token)
        return tokens


@dataclass
class Draft:
    """The clean response to a prompt, and all responses of a layer's heads so far."""

    tokens: list[int]
    known: Trie = field(default_factory=Trie)

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
    tokens: list[int] = field(default_factory=list)
    active: bool = True
    node: int = 0
    """`tokens` in the draft's `known`"""

    def __post_init__(self) -> None:
        self.on = self.draft is not None

    @property
    def position(self) -> int:
        """Of the last token."""
        return self.length + len(self.tokens) - 1


class Engine(Protocol):
    """The keys and values of rows, in order of `Decoding.rows`."""

    def step(self, ids: np.ndarray, positions: np.ndarray, rows: list[Row], off: list[int]) -> np.ndarray:
        """Greedy token after each of ids [R, w] at positions [R, w], int [R, w]. Rows `off` have left the
        clean response, in the order of the calls of `leave`."""
        ...

    def leave(self, rows: list[Row], slots: range) -> None:
        """These rows have left the clean response; they are off[slots] from now on. Its keys and values in
        the layers below the ablated one become theirs."""
        ...

    def pack(self, kept: list[int], off: list[int]) -> None:
        """Keeps only rows `kept`, and of those off the ones at `off` of the old order."""
        ...


@dataclass(frozen=True)
class Settings:
    """How responses decode."""

    budget: int
    """tokens of a response at most"""
    eos: frozenset[int]
    step_tokens: int
    """that a step reads for hardly more than it costs anyway"""
    half: bool = False
    """half precision: in a sweep a clean response decodes beside the ablated ones"""


Refill = Callable[[list[int]], tuple[list[Row], list[int]]]


class Decoding:
    """Rows that decode side by side.

    Args:
        rows: whose prompts the engine holds.
        refill: given the places of rows that have ended, puts waiting prompts there, and returns their rows
            and first tokens (fewer than places where none wait).
        pairs: in half precision, for each row the row of the same prompt in which nothing is ablated.
            Rounding differs with the shape of a product, so that near a tie a row may leave the clean
            response without cause; the clean model's token in the same product decides.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[Row],
        settings: Settings,
        pairs: list[int] | None = None,
        refill: Refill | None = None,
    ):
        self.engine, self.rows, self.settings = engine, list(rows), settings
        self.pairs, self.refill = pairs, refill
        self.off = [] if rows and rows[0].on else list(range(len(rows)))

    def run(self, first: Sequence[int]) -> None:
        """Decodes every row to its end from its first token."""
        self._append([[token] for token in first], [[]] * len(self.rows))
        while any(row.active for row in self.rows):
            fed = self._feed()
            width = max(map(len, fed))
            ids = np.array([tokens + [0] * (width - len(tokens)) for tokens in fed], np.int32)
            positions = np.array([row.position for row in self.rows], np.int32)[:, None] + np.arange(
                width, dtype=np.int32
            )
            self._append(self.engine.step(ids, positions, self.rows, self.off).tolist(), fed)

    def _feed(self) -> list[list[int]]:
        """For each row its last token, and guesses at the next ones where they cost nothing."""
        width = min(WIDTH, self.settings.step_tokens // len(self.rows))
        fed = []
        for row in self.rows:
            guesses: list[int] = []
            if width > 1 and row.active and row.draft is not None:
                if row.on:
                    guesses = row.draft.tokens[len(row.tokens) :][: width - 1]
                else:
                    guesses = row.draft.known.guess(row.node, width - 1)
            fed.append([row.tokens[-1], *guesses[: self.settings.budget - len(row.tokens) - 1]])
        return fed

    def _append(self, answers: list[list[int]], fed: list[list[int]]) -> None:
        """Appends to each row the model's tokens after each token fed, up to the first wrong guess."""
        leaving = []
        for line, row in enumerate(self.rows):
            if not row.active:
                continue
            was_on, began = row.on, len(row.tokens)
            for at, token in enumerate(answers[line]):
                if row.on:
                    drafted = row.draft.tokens[len(row.tokens)]
                    if self.pairs is not None and token == answers[self.pairs[line]][at]:
                        token = drafted
                    row.on = token == drafted
                row.tokens.append(token)
                row.active = token not in self.settings.eos and len(row.tokens) < self.settings.budget
                if not row.active or at + 1 >= len(fed[line]) or fed[line][at + 1] != token:
                    break
            if row.draft is not None:
                row.node = row.draft.known.add(row.node, row.tokens[began:])
            if was_on and not row.on and row.active:
                leaving.append(line)
        if sum(row.active for row in self.rows) <= KEPT * len(self.rows):
            if self.refill is not None:
                self._admit(self.refill)
            if 0 < sum(row.active for row in self.rows) <= KEPT * len(self.rows):
                leaving = self._pack(leaving)
        if leaving:
            slots = range(len(self.off), len(self.off) + len(leaving))
            self.engine.leave([self.rows[line] for line in leaving], slots)
            self.off += leaving

    def _admit(self, refill: Refill) -> None:
        """Prompts that wait take the places of rows that have ended, also of those that end at once."""
        while places := [place for place, row in enumerate(self.rows) if not row.active]:
            rows, first = refill(places)
            if not rows:
                return
            for place, row, token in zip(places, rows, first, strict=False):
                row.tokens.append(token)
                row.active = token not in self.settings.eos and len(row.tokens) < self.settings.budget
                self.rows[place] = row

    def _pack(self, leaving: list[int]) -> list[int]:
        """Drops rows that have ended. Returns the new numbers of `leaving`."""
        kept = [line for line, row in enumerate(self.rows) if row.active]
        number = {line: new for new, line in enumerate(kept)}
        slots = [slot for slot, line in enumerate(self.off) if line in number]
        self.engine.pack(kept, slots)
        self.off = [number[self.off[slot]] for slot in slots]
        if self.pairs is not None:  # a pair ends with the rows that are on its response
            self.pairs = [number.get(self.pairs[line], 0) for line in kept]
        self.rows = [self.rows[line] for line in kept]
        return [number[line] for line in leaving]


# The sweep


class Block(Protocol):
    """Prompts with their clean responses, whose rows decode together."""

    rows: np.ndarray
    """indices of the prompts"""
    lengths: list[int]
    drafts: list[list[int]]

    def begin(self, layer: int, heads: list[int], copies: int, mask: str) -> tuple[list[int], Engine]:
        """First tokens of head x prompt, head by head, with each head of `layer` ablated, and what decodes
        them on. Programs of a fixed shape may fill up to `copies` heads."""
        ...

    def release(self) -> None:
        """Frees the clean streams."""
        ...


def clean_sequences(prompts: Sequence[Example], drafts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the clean model reads: each prompt, then its response but for the last token."""
    pairs = zip(prompts, drafts, strict=True)
    return [np.concatenate([prompt.prompt_ids, draft[:-1]]) for prompt, draft in pairs]


def sweep(
    blocks: Sequence[Block], heads: Sequence[Head], mask: str, settings: Settings, plan: Plan
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """For each head in order, the responses of all blocks' prompts with that head ablated. Nothing depends on
    other
    layers: a layer's responses are the same however a sweep is cut into calls."""
    for layer, group in packing.by_layer(heads):
        outputs = [[np.zeros(0, np.int32)] * sum(len(block.rows) for block in blocks) for _ in group]
        for block in blocks:
            responses = _ablated(block, layer, group, mask, settings, plan)
            for output, of_head in zip(outputs, responses, strict=True):
                for row, tokens in zip(block.rows, of_head, strict=True):
                    output[row] = np.array(tokens, np.int32)
            if not plan.keep:
                block.release()
        for head, output in zip(group, outputs, strict=True):
            yield (layer, head), output


def _ablated(
    block: Block, layer: int, group: Sequence[int], mask: str, settings: Settings, plan: Plan
) -> list[list[list[int]]]:
    """Responses of a block's prompts for each head of the group, at most `plan.rows` rows together."""
    drafts, count = [Draft(tokens) for tokens in block.drafts], len(block.rows)
    responses: list[list[list[int]]] = []
    size, groups = packing.even_slices(len(group), plan.rows // count - settings.half)
    for some in groups:
        heads = [*group[some], *[CLEAN] * settings.half]
        rows = [Row(at, block.lengths[at], draft) for _ in heads for at, draft in enumerate(drafts)]
        pairs = [(len(heads) - 1) * count + row.prompt for row in rows] if settings.half else None
        first, engine = block.begin(layer, heads, size + settings.half, mask)
        Decoding(engine, rows, settings, pairs).run(first[: len(rows)])
        for start in range(0, len(group[some]) * count, count):
            responses.append([row.tokens for row in rows[start : start + count]])
    return responses
