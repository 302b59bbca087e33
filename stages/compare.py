"""The comparison: how far two runs of one method differ, torch against flax above all (DESIGN.md §8).

    python -m stages.compare outputs/smollm outputs/smollm-flax

One line a quantity: largest and mean difference, rank correlation, share that is equal, the tolerance, and
whether it holds. Where predictions or generations differ and the model is on this machine, each first
difference is asked again: it has to be a near-tie of two logits. Exit code 1 past a tolerance; 2, with one
line, where the folders are no finished runs of one model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import backends
from backends import models
from backends.errors import InputError
from stages.auditing import comparison, near_ties
from stages.auditing.audit_run import Run
from stages.auditing.comparison import Row

MARKS = {True: "ok  ", False: "FAIL", None: "-   "}
HEADINGS = ("", "quantity", "compared", "largest", "mean", "rank r", "equal", "tolerance", "")


def near_tie_row(one: Run, other: Run) -> Row:
    """Whether every unequal prediction, generation and base response parts at a near-tie."""
    near = comparison.tolerances(one, other).near
    found = near_ties.differences(one, other)
    compared = f"{len(found)} differences"
    if near is None:
        return Row("near-ties", compared, note="not traced in half precision")
    allowed = f"logits within {near:g}"
    if not found:
        return Row("near-ties", compared, allowed=allowed, ok=True)
    model = one.manifests["02_conflict"]["model"]
    if one.model_folder is None or models.weights_sha256(one.model_folder) != model["weights_sha256"]:
        return Row("near-ties", compared, allowed=allowed, note="the model's folder is not on this machine")
    backend = backends.load(model["backend"], one.model_folder, dtype=model["dtype"])
    below = near_ties.gaps(backend, found, one.settings("03_sensitivity")["mask"])
    far = sum(gap > near for gap in below)
    note = f"{far} are none, the first: {place(found[int(np.argmax(below))])}" if far else "all of them are"
    return Row("near-ties", compared, max(below), float(np.mean(below)), None, None, allowed, not far, note)


def place(difference: near_ties.Difference) -> str:
    """Where a difference is, without its text."""
    head = (
        "no head silenced"
        if difference.head is None
        else "layer {} head {} silenced".format(*difference.head)
    )
    return f"{difference.row['example_id']}, {head}, after {len(difference.before)} tokens"


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines of text."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2e}" if value and abs(value) < 0.01 else f"{value:.4f}"

    cells = [HEADINGS]
    for row in rows:
        equal = "" if row.equal is None else f"{100 * row.equal:.2f} %"
        numbers = number(row.largest), number(row.mean), number(row.rank), equal
        cells.append((MARKS[row.ok], row.quantity, row.compared, *numbers, row.allowed, row.note))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def main(one: Path, other: Path) -> int:
    """Prints the table; 1 if a quantity is past its tolerance, else 0. InputError as in `comparison`."""
    runs = comparison.open_run(one), comparison.open_run(other)
    rows = comparison.compare(*runs)
    rows.append(near_tie_row(*runs))
    for run in runs:
        print(f"{run.folder}: {comparison.describe(run)}")
    print("\n".join(table(rows)), flush=True)
    failed, held = sum(row.ok is False for row in rows), sum(row.ok is not None for row in rows)
    print(
        f"{held - failed} of {held} quantities within tolerance, {len(rows) - held} without one", flush=True
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stages.compare", description=__doc__, formatter_class=raw)
    parser.add_argument("one", type=Path, help="folder of a run that is finished up to stage 05")
    parser.add_argument("other", type=Path, help="folder of another")
    given = parser.parse_args()
    try:
        sys.exit(main(given.one, given.other))
    except (InputError, ValueError) as error:  # a damaged table is a ValueError of `audit_run`
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
