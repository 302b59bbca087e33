"""Checks of the rows of stage 01: how many, none in two places, and their tokens."""

from collections import Counter
from dataclasses import fields

import pandas as pd

from data.records import DATA_TYPES, Record, normalise
from data.rendering import Renderer, conversations_of, earlier_of
from data.sampling import PAIR, rows_of_types
from stages.checks.finished import NO_FOLDER, FinishedRun, Result, unequal
from stages.run.schemas import ALIGNMENT, BENCHMARKS, CALIBRATION
from stages.run.store import differences

TABLES = (CALIBRATION, ALIGNMENT, BENCHMARKS)


def requested_rows(run: FinishedRun) -> Result:
    """As many rows of each split as the settings request, or as few as the manifest says there were."""
    data, notes = run.settings.data, run.notes("01_calibrate")
    wanted = {each.name: each.rows for each in (*run.settings.maps, *run.settings.benchmarks)}
    wanted |= rows_of_types(data.align_rows, data.benign_share) | {"safe": data.safe_rows}
    wanted |= dict.fromkeys(PAIR, data.pairs) if data.pairs else {}
    for short in notes["short"]:
        members = {"alignment": DATA_TYPES, "pairs": PAIR}.get(short["split"], [short["split"]])
        left = short["drawn"] / short["requested"]  # of alignment rows every type loses its share
        drawn = {split: round(wanted.get(split, 0) * left) for split in DATA_TYPES}
        wanted |= {split: drawn.get(split, short["drawn"]) for split in members if wanted.get(split)}
    tables = {table.stem: run.read(table) for table in TABLES}
    counts = Counter(pd.concat(tables.values())["split"])
    faults = [
        f"{split}: {counts[split]} rows, {wanted.get(split)} requested"
        for split in {**wanted, **counts}
        if counts[split] == 0 or wanted.get(split) not in (0, counts[split])  # 0: all there are
    ]
    noted = {name: len(rows) for name, rows in tables.items()}
    noted |= {name: count for name, count in counts.items() if name not in DATA_TYPES}
    tokens = {name: int(rows["prompt_ids"].map(len).sum()) for name, rows in tables.items()}
    if changed := differences(notes, notes | {"counts": noted, "tokens": tokens}):
        faults.append(f"notes: {changed}")
    return faults, ", ".join(f"{count} {split}" for split, count in counts.items())


def leaks(run: FinishedRun) -> Result:
    """No entry, example_id or normalised prompt is in two of utility, safety, alignment and benchmark rows.

    They may recur within the benchmarks, in the forms of an alignment request, in both forms of a pair and in
    the utility rows of several maps.
    """
    rows = pd.concat([run.read(table).assign(group=table.stem) for table in TABLES])
    calibrating, utility = rows["group"] == CALIBRATION.stem, rows["split"].isin(run.map_names)
    rows["group"] = rows["group"].mask(calibrating & utility, "util").mask(calibrating & ~utility, "safe")
    rows["normalised prompt"] = [normalise(text) for text in conversations_of(rows)]
    rows["place"] = rows["group"] + " " + rows["example_id"]
    faults, keys = [], ("entry", "example_id", "normalised prompt")
    for key in keys:
        places = rows.drop_duplicates([key, "group"]).groupby(key, sort=False)["place"].agg(list)
        faults += [f"{' and '.join(shared)} share one {key}" for shared in places if len(shared) > 1]
    return faults, f"{len(rows)} rows share no {', '.join(keys)} between {', '.join(rows['group'].unique())}"


def token_ids(run: FinishedRun) -> Result:
    """Rendering and tokenizing every row again gives its text and ids; targets are the right choices."""
    if run.model_folder is None:
        return None, NO_FOLDER
    if run.tokenizer is None:
        return [f"{run.model_folder} holds another tokenizer than stage 01 used (sha256)"], ""
    renderer = Renderer(run.tokenizer, run.settings.data.date, run.settings.data.system)
    rows = pd.concat([run.read(table) for table in TABLES], ignore_index=True)
    records = [record_of(row) for row in rows.to_dict("records")]
    faults = unequal(rows, pd.DataFrame([renderer.row(record) for record in records]))
    faults += [
        f"{record.example_id}: the target is not the choice that answer names"
        for record in records
        if record.choices and not record.target.strip().startswith(record.choices[record.answer].strip())
    ]
    return faults, f"{len(rows)} rows"


def record_of(row: dict) -> Record:
    """What a row of EXAMPLES was rendered from."""
    text = {field.name: row[field.name] for field in fields(Record)}
    text |= {"choices": tuple(row["choices"]), "answer": row["answer"] if len(row["choices"]) else None}
    return Record(**text | {"earlier": earlier_of(row)})
