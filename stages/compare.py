"""The comparison: how far two runs of one method differ, torch against flax above all.

    python -m stages.compare outputs/smollm outputs/smollm-flax

First the settings in which they differ. Then one line a quantity: largest and mean difference, rank
correlation, share that is equal, the tolerance, and whether it holds. Where predictions or generations differ
and the model is on this machine, each first difference is computed again: it has to be a near-tie of two
logits. Exit code 1 past a tolerance; 2, with one line, where the folders are no runs of one model that are
finished up to stage 05.
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from backends.core.errors import InputError
from stages.checks.comparison import Comparison
from stages.checks.finished import FinishedRun
from stages.checks.near_ties import near_ties
from stages.run.guard import guarded
from stages.run.pipeline import STAGES
from stages.run.store import computed_by

HEADINGS = ("", "quantity", "compared", "largest", "mean", "rank r", "equal", "tolerance", "")
MARKS = {True: "ok", False: "FAIL", None: "-"}


def main(first: Path, second: Path) -> int:
    """Prints the table; 1 if a quantity is past its tolerance, else 0. InputError where none compares."""
    pair = Comparison(*(FinishedRun(folder, STAGES[:-1]) for folder in (first, second)))
    try:
        rows = [*pair.rows(), near_ties(pair)]
    except ValueError as error:
        raise InputError(str(error)) from None
    for run in pair.runs:
        model = run.manifest("02_conflict")["model"]
        print(f"{run.folder}: {computed_by(model)}")
    if changed := pair.settings():
        print(f"settings that differ: {changed}")
    cells = [(MARKS[row.ok], *row[:-2], row.note) for row in rows]
    print(tabulate(cells, HEADINGS, tablefmt="plain", floatfmt=".3g"), flush=True)
    failed, held = (sum(row.ok in states for row in rows) for states in ((False,), (False, True)))
    print(f"{held - failed} of {held} quantities within tolerance, {len(rows) - held} without one")
    return 1 if failed else 0


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stages.compare", description=__doc__, formatter_class=raw)
    parser.add_argument("first", type=Path, help="folder of a run that is finished up to stage 05")
    parser.add_argument("second", type=Path, help="folder of another")
    given = parser.parse_args()
    guarded(lambda: sys.exit(main(given.first, given.second)))
