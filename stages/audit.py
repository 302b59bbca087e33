"""The audit: whether a run's files are those its manifests name, and follow from each other.

    python -m stages.audit outputs/smollm

One line a check: "ok   <what>: <figure>", "FAIL <what>: <what, where>", or "skip <what>: <why>" where the
model's folder is not on this machine. All checks are run. Exit code 1 on any failure; 2, with one line, where
the folder is no finished run. Hashes show what was changed after a stage; what was changed together with its
hash shows when it is computed again.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from backends.core.errors import reason
from stages.checks import files, recomputed, rows, tuning
from stages.checks.finished import FinishedRun, Result
from stages.run.guard import guarded
from stages.run.pipeline import WITH_UNITS

CHECKS: dict[str, Callable[[FinishedRun], Result]] = {
    check.__name__.replace("_", " "): check
    for check in (
        *(files.files, files.manifests, files.settings, files.chain, files.model, files.weights),
        *(rows.requested_rows, rows.leaks, rows.token_ids, recomputed.judges, recomputed.keys),
        *(tuning.steps, tuning.adapters, recomputed.texts, recomputed.costs),
    )
}
CHECKS |= {f"{stage} joined again": partial(recomputed.joined, stage=stage) for stage in WITH_UNITS}


def result_of(check: Callable[[FinishedRun], Result], run: FinishedRun) -> Result:
    """A check's result; a file that cannot even be read as what it should be is a failure of the check."""
    try:
        return check(run)
    except Exception as error:  # damage takes any form
        return [f"cannot be checked, {type(error).__name__}: {reason(error)}"], ""


def main(folder: Path) -> int:
    """Prints a line a check; 1 if one failed, else 0. InputError where the folder is no finished run."""
    run, count = FinishedRun(folder), Counter()
    for what, check in CHECKS.items():
        faults, figure = result_of(check, run)
        mark = "FAIL" if faults else "skip" if faults is None else "ok  "
        more = f"; and {len(faults) - 3} more" if faults and len(faults) > 3 else ""
        print(f"{mark} {what}: {'; '.join(faults[:3]) + more if faults else figure}", flush=True)
        count[mark] += 1
    passed, failed, skipped = (count[mark] for mark in ("ok  ", "FAIL", "skip"))
    print(f"audit of {folder}: {passed} ok, {failed} failed, {skipped} not checked", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stages.audit", description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. outputs/smollm")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    given = parser.parse_args()
    guarded(lambda: sys.exit(main(given.run)))
