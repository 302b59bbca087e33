"""The stages of a run, in order: the one place that imports a numbered script."""

import importlib

from stages.run.job import Stage
from stages.run.runner import run_stage
from stages.run.settings import Settings
from stages.run.store import RunFolder

STAGES = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate", "06_correlate")
WITH_UNITS = STAGES[1:5]
"""stages whose work is shared out"""


def declaration(name: str) -> Stage:
    """The declaration of a stage."""
    return importlib.import_module(f"stages.{name}").STAGE


def make(name: str, settings: Settings) -> None:
    """Makes a stage in this process."""
    run_stage(declaration(name), settings)


def planned_run(settings: Settings) -> RunFolder:
    """The run, with the tables of its first stage, drawn now where it has none; nothing is written.

    Raises InputError where the model or the data cannot be had.
    """
    run, first = RunFolder(settings.folder), STAGES[0]
    if not run.is_finished(first):
        declaration(first).before(settings)
        rows = importlib.import_module(f"stages.{first}").draw_rows(settings)
        for table, own in rows.tables.items():
            run.preload(table, own)
        for shortfall in rows.drawn.short:
            print(f"too few rows: {shortfall}")
    return run
