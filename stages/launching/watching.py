"""What engines share: how a process computes units, a stage's units as its folder shows them, and one bar."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from backends.errors import InputError
from backends.progress import progress
from stages import artifacts
from stages.settings import Settings

RETRIES = 2
"""times that a unit is tried again after it failed or its process died"""
SECONDS = 1.0
"""between two looks at what runs"""


class Engine(Protocol):
    """Where the units of stages 02 to 05 are computed."""

    def run(self, name: str) -> None:
        """Makes a stage, or does nothing where it is made.

        Raises InputError, one line, where a unit failed more than RETRIES times; what is finished is kept.
        """

    def told(self) -> list[str]:
        """What was done where, as lines of a table."""

    def close(self) -> None:
        """Lets go of what the engine holds."""


def compute(settings: Settings, name: str, shard: str) -> str:
    """A shard of a stage, in this process; with an empty one the whole stage, which joins what is there.

    Returns a user's mistake, one line: an exception would be taken for a failure that is worth a retry.
    """
    try:
        importlib.import_module(f"stages.{name}").main(replace(settings, shard=shard))
    except InputError as error:
        return str(error)
    return ""


class Watch:
    """A bar that shows how many of a stage's units are finished, whoever computes them."""

    def __init__(self, folder: Path, bar: tqdm):
        self.folder, self.bar = folder, bar

    def look(self, note: str = "") -> None:
        """Looks at the folder again."""
        units, finished = artifacts.planned(self.folder)
        if not units:  # not said yet, or joined
            return
        if self.bar.total != len(units):
            self.bar.total = len(units)
            self.bar.initial = len(finished)  # so that the pace is this run's own
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(len(finished) - self.bar.n)


@contextmanager
def watch(folder: Path) -> Iterator[Watch]:
    """A bar over the units of the stage in `folder`."""
    with progress(total=None, desc=folder.name, unit="unit") as bar:
        yield Watch(folder, bar)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines, the first column to the left, the others to the right.

    >>> table([("node", "units"), ("a", "12")])
    ['node  units', 'a        12']
    """
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
