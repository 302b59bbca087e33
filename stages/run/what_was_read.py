"""What stage 01 says of the rows that it reads and draws: what there was, what was left out, what is cut."""

from collections.abc import Mapping

import pandas as pd

from backends import models
from data.own_rows import ROLES
from data.rendering import Renderer
from data.sampling import Drawn, Pools
from stages.run.job import Job
from stages.run.schemas import ALIGNMENT, BENCHMARKS, CALIBRATION, Table
from stages.run.settings import DataSettings


def say(data: DataSettings, pools: Pools, renderer: Renderer) -> None:
    """Reads the user's rows and says what was found, before any is drawn."""
    sources = {name: getattr(data, name) for name in ROLES}
    for name in (name for name in ROLES if sources[name]):
        records, reading = pools.records(f"own/{name}"), pools.readings[name]
        longest = next(record for record in records if record.example_id == reading.longest)
        target = renderer.tokenizer(longest.target, add_special_tokens=False).input_ids
        tokens = renderer.length(longest) + len(target)
        lines = [*reading.lines(), f"tokens of the longest: {tokens}", *reading.doubts()]
        print("\n  ".join((f"--{name} {sources[name]}", *lines)), flush=True)


def warn_of_rows(job: Job, drawn: Drawn, pools: Pools) -> None:
    """Says which rows of those there are were not taken, and why, and which are scored twice."""
    for name, reading in pools.readings.items():
        for doubt in reading.doubts():
            job.warn(f"--{name}: {doubt}")
    for shortfall in drawn.short:
        job.warn(f"too few rows: {shortfall}")
    for doubt in drawn.doubts:
        job.warn(doubt)


def warn_of_length(job: Job, tables: Mapping[Table, pd.DataFrame]) -> None:
    """Says how many rows do not fit with their answers or targets into the positions that the model knows,
    and how many alignment rows are cut."""
    positions = models.read_config(job.model_folder).get("max_position_embeddings", 0)
    new_tokens = {benchmark.name: benchmark.new_tokens for benchmark in job.settings.benchmarks}
    prompts = {table: rows["prompt_ids"].map(len) for table, rows in tables.items()}
    whole = {table: prompts[table] + rows["target_ids"].map(len) for table, rows in tables.items()}
    answered = prompts[BENCHMARKS] + tables[BENCHMARKS]["split"].map(new_tokens)
    max_length = job.settings.data.max_length
    lengths = {
        "benchmark prompts and answers": answered,
        "calibration prompts and targets": whole[CALIBRATION],
        "alignment prompts and targets": whole[ALIGNMENT].clip(upper=max_length),
    }
    for what, own in lengths.items():
        if positions and (long := int((own > positions).sum())):
            job.warn(f"{long} {what} are longer than the model's {positions} positions")
    warn_of_cuts(job, tables[ALIGNMENT], max_length)


def warn_of_cuts(job: Job, rows: pd.DataFrame, max_length: int) -> None:
    """Says how many alignment rows lose their end, and how much of their targets is left."""
    whole = rows["target_ids"].map(len)
    left = (max_length - rows["prompt_ids"].map(len)).clip(upper=whole)
    cut = left < whole
    if cut.any():
        less = f"{(cut & (left < whole / 2)).sum()} keep less than half of their target"
        one = f"{(cut & (left == 1)).sum()} one token of it"
        job.warn(
            f"{cut.sum()} of {len(rows)} alignment rows are cut to --max-length {max_length}: they do not "
            f"teach their end, {less}, {one}"
        )
