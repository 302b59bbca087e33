"""How rows are packed for a pass, as both backends do it, in numpy.

Axes as in `backends.base`; R rows of one batch, P tokens of the prefix that all share, C of the longest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from backends.base import Example, Head


@dataclass(frozen=True)
class Line:
    """Sequences as one line of T tokens without padding, in which a beginning that some share stands once."""

    rows: np.ndarray
    """indices of the sequences, int [R]"""
    ids: np.ndarray
    """token ids, int64 [T]"""
    positions: np.ndarray
    """of the tokens in their sequences, int64 [T]"""
    prefix: int
    """P: the first tokens of the line, which all sequences share"""
    columns: np.ndarray
    """where the token at each position of a sequence stands in the line, int64 [R, C]; its last one beyond
    its end"""
    lengths: np.ndarray
    """tokens of each sequence, int64 [R]"""
    holders: np.ndarray
    """a sequence that has the token, as a row of `columns`; int64 [T]"""

    @property
    def picks(self) -> np.ndarray:
        """Of each token after the prefix, one place in `columns[:, P:]`, flattened: int64 [T - P]."""
        at = self.holders * (self.columns.shape[1] - self.prefix) + self.positions - self.prefix
        return at[self.prefix :]


def lines(
    sequences: Sequence[np.ndarray], tokens: int, shared: int, most: int = 0, multiple: int = 1
) -> list[Line]:
    """Joins sequences into lines of at most `tokens` tokens (one sequence at the least), neighbours in
    alphabetical order together, since they share most.

    Args:
        sequences: int32 [T_i] each.
        shared: the longest prefix that may be shared by all; each keeps at least one token after it.
        most: sequences of a line; 0: any number.
        multiple: of which P is a multiple, where few shapes are wanted.
    """
    order = sorted(range(len(sequences)), key=lambda row: sequences[row].astype(">i4").tobytes())
    groups: list[list[tuple[int, int]]] = []  # sequence, and how much of it the one before shares
    filled = width = common = 0
    for row in order:
        length = len(sequences[row])
        same = _same(sequences[groups[-1][-1][0]], sequences[row]) if groups else 0
        size = len(groups[-1]) + 1 if groups else 1
        # Attention works on a padded grid, which is kept from growing far beyond the line.
        grid = size * (max(width, length) - min(common, same))
        if not groups or filled + length - same > tokens or grid > 2 * tokens or size - 1 == most > 0:
            groups.append([(row, 0)])
            filled, width, common = length, length, min(shared, length - 1)
        else:
            groups[-1].append((row, same))
            filled, width, common = filled + length - same, max(width, length), min(common, same, length - 1)
    return [_line(sequences, group, shared, multiple) for group in groups]


def join(sequences: Sequence[np.ndarray], shared: int) -> Line:
    """All sequences as one line, however long (see `lines`)."""
    (line,) = lines(sequences, 2 * sum(map(len, sequences)) * len(sequences), shared)
    return line


def _same(first: np.ndarray, second: np.ndarray) -> int:
    """Number of leading tokens that two sequences share."""
    shortest = min(len(first), len(second))
    differing = np.flatnonzero(first[:shortest] != second[:shortest])
    return int(differing[0]) if len(differing) else shortest


def _line(sequences: Sequence[np.ndarray], group: list[tuple[int, int]], shared: int, multiple: int) -> Line:
    lengths = np.array([len(sequences[row]) for row, _ in group], np.int64)
    prefix = min([shared, int(lengths.min()) - 1, *(same for _, same in group[1:])])
    prefix -= prefix % multiple
    columns = np.zeros((len(group), int(lengths.max())), np.int64)
    ids, positions, holders, count = [], [], [], 0
    for line, (row, same) in enumerate(group):
        own = np.arange(same, lengths[line])
        if line:
            columns[line, :same] = columns[line - 1, :same]
        columns[line, own] = count + own - same
        columns[line, lengths[line] :] = columns[line, lengths[line] - 1]
        ids.append(sequences[row][own].astype(np.int64))
        positions.append(own)
        holders.append(np.full(len(own), line))
        count += len(own)
    rows = np.array([row for row, _ in group])
    ids, positions, holders = map(np.concatenate, (ids, positions, holders))
    return Line(rows, ids, positions, prefix, columns, lengths, holders)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def by_tokens(examples: Sequence[Example], budget: int) -> list[list[int]]:
    """Examples with their targets in batches of similar length, at most `budget` padded tokens each (one
    example at the least): their places."""
    lengths = [len(example.prompt_ids) + len(example.target_ids) for example in examples]
    ordered = sorted(range(len(examples)), key=lambda place: -lengths[place])
    batches, start = [], 0
    while start < len(ordered):
        size = max(1, budget // lengths[ordered[start]])
        batches.append(ordered[start : start + size])
        start += size
    return batches


def passes(batch: Sequence[Example], rows: int) -> list[list[Example]]:
    """A step's rows as forward passes of at most `rows` each, neighbours in length together."""
    ordered = sorted(batch, key=lambda row: -(len(row.prompt_ids) + len(row.target_ids)))
    return [ordered[start : start + rows] for start in range(0, len(ordered), rows)]


def even_slices(count: int, most: int) -> tuple[int, Iterator[slice]]:
    """`count` things in as few groups as `most` per group allows: the size of all but the last, and the
    groups."""
    groups = -(-count // max(1, most))
    size = -(-count // max(1, groups))
    return size, (slice(start, min(start + size, count)) for start in range(0, count, max(1, size)))


def by_layer(heads: Sequence[Head]) -> Iterator[tuple[int, list[int]]]:
    """Runs of consecutive heads in one layer."""
    for layer, group in groupby(heads, key=lambda pair: pair[0]):
        yield layer, [head for _, head in group]


def candidates(examples: Sequence[Example]) -> np.ndarray | None:
    """The tokens that can be chosen in any example, sorted int64; None where a whole vocabulary competes."""
    if not examples or any(len(example.choice_ids) == 0 for example in examples):
        return None
    return np.unique(np.concatenate([example.choice_ids for example in examples])).astype(np.int64)


def training_rows(examples: Sequence[Example]) -> tuple[list[np.ndarray], list[int]]:
    """Prompt and target of each example as one sequence, and where its target begins."""
    sequences = [np.concatenate([example.prompt_ids, example.target_ids]) for example in examples]
    return sequences, [len(example.prompt_ids) for example in examples]


def cut_rows(examples: Sequence[Example], max_length: int) -> list[Example]:
    """The examples with targets cut so that a row has at most `max_length` tokens. ValueError names one
    whose prompt leaves no room for its target."""
    cut = []
    for example in examples:
        room = max_length - len(example.prompt_ids)
        if room < 1 or len(example.target_ids) == 0:
            raise ValueError(f"example {example.example_id} has no target token within {max_length} tokens")
        cut.append(replace(example, target_ids=example.target_ids[:room]))
    return cut
