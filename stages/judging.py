"""Verdicts from outputs, for stage 05 and for the audit: no model, nothing generated."""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from data.benchmarks import Benchmark
from data.scoring import Judgement, judge
from stages import schemas

COLUMNS = [name for name in schemas.RESPONSES.names if name not in schemas.OUTPUTS.names]
"""what judging adds to an output"""


def judged(
    outputs: pa.Table, rows: Sequence[dict], benchmark: Benchmark, words: pa.Table | None = None
) -> pa.Table:
    """A unit's outputs under schemas.RESPONSES.

    Args:
        outputs: of schemas.OUTPUTS, one for each of `rows` (of schemas.EXAMPLES), in their order.
        words: the classifier's (schemas.CLASSIFIED) on the same outputs; its refusals are then the
            verdicts. What it gave no clear answer to is no refusal.
    """
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    told = zip(outputs["output"].to_pylist(), outputs["prediction"].to_pylist(), rows, strict=True)
    for at, (text, predicted, row) in enumerate(told):
        if row["scoring"] == "choice":
            found = Judgement(verdict=predicted == row["answer"], refused=False)
        else:
            found = judge(row["scoring"], text, row["target"], benchmark.numeric)
        word = {"refusal": None, "harmful": None} if words is None else words.slice(at, 1).to_pylist()[0]
        columns["verdict"].append(found.verdict if words is None else word["refusal"] is True)
        columns["harmful"].append(word["harmful"])
        for name in ("refused", "steps", "strict", "flexible"):
            columns[name].append(getattr(found, name))
    arrays = {name: pa.array(values, schemas.RESPONSES.field(name).type) for name, values in columns.items()}
    whole = {name: outputs[name] for name in outputs.column_names} | arrays
    return pa.table([whole[name] for name in schemas.RESPONSES.names], schema=schemas.RESPONSES)


def split(
    outputs: pa.Table, units: Mapping[str, tuple], rows: Mapping[str, Sequence[dict]]
) -> Iterator[tuple[str, pa.Table]]:
    """A stage's outputs by unit again, in the order in which they were joined."""
    first = 0
    for unit, (_, _, name) in units.items():
        yield unit, outputs.slice(first, len(rows[name])).replace_schema_metadata(schemas.OUTPUTS.metadata)
        first += len(rows[name])
