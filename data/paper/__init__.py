"""The numbers printed in the paper's result tables, one CSV a table (README.md says what was set right)."""

import csv
from pathlib import Path

FOLDER = Path(__file__).parent
TABLES = (1, 2, 7, 8, 9, 10, 11)
TEXT_COLUMNS = frozenset({"model", "method", "score", "selection"})


def table(number: int) -> list[dict[str, str | float]]:
    """The rows of a table of the paper, top to bottom, one dictionary each; every number is a float.

    >>> table(1)[0]["model"], table(1)[0]["mmlu"]
    ('llama', 59.38)
    """
    if number not in TABLES:
        raise ValueError(f"number: the paper's tables here are {', '.join(map(str, TABLES))}, not {number!r}")
    with (FOLDER / f"table{number}.csv").open(newline="", encoding="utf-8") as file:
        return [
            {column: cell if column in TEXT_COLUMNS else float(cell) for column, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def row(number: int, **where: str | float) -> dict[str, str | float] | None:
    """The row of a table with these values; None: the table has none (README.md says which are missing).

    >>> row(9, selection="bottom", percent=50)["gen"]
    57.93
    """
    return next((found for found in table(number) if where.items() <= found.items()), None)
