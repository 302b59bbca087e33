"""Stage 01: draws D_util, D_safe, D_align and the benchmarks, renders and tokenizes them (§4.1, App. A).

    python -m stages.01_calibrate --preset smollm
    python -m stages.01_calibrate --preset tiny --run /tmp/tiny         # a second on a CPU

Benchmarks are drawn first, then calibration, then alignment; each leaves out the entries of those before it,
so no row that is trained on or calibrated with is scored (data/sampling.py). Writes calibration.parquet,
alignment.parquet and benchmarks.parquet.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

import backends
from backends import models
from backends.core.checks import check_neurons
from backends.core.errors import InputError
from backends.core.files import sha256
from data import own_rows, sampling
from data.rendering import Renderer, shared_first_tokens
from data.sampling import Drawn, Plan, Pools, Wanted
from stages.method.arms import required_heads
from stages.run import classify, cli, what_was_read
from stages.run.job import Job, Stage
from stages.run.schemas import ALIGNMENT, BENCHMARKS, CALIBRATION, Table
from stages.run.settings import Settings


def plan_of(settings: Settings) -> Plan:
    """What a run draws."""
    data = settings.data
    own, *others = settings.maps
    return Plan(
        seed=data.seed,
        folds=data.folds,
        util=Wanted(own.pool, own.rows),
        safe=Wanted("own/safe" if data.safe else data.safe_source, data.safe_rows),
        align=Wanted("own/align" if data.align else data.align_source, data.align_rows),
        benchmarks=settings.benchmarks,
        maps=others,
        pairs=data.pairs,
        benign_share=data.benign_share,
        max_length=data.max_length,
        development=data.split == "development",
    )


def check(settings: Settings) -> None:
    """Whether model and data can be had and fit: InputError says what cannot, and how to get it, before
    anything is downloaded."""
    model, device = settings.model, settings.run.device
    if model.quantize and not device.startswith("cuda"):  # what is named need not be on this machine
        backends.check_quantize_here(model.quantize, device)
    data = settings.group("data")
    problems = [models.missing(model.model, model.revision), classify.missing(settings)]
    problems += [own_rows.missing(name, data[name]) for name in own_rows.ROLES]
    sampling.check_reachable(sampling.needed_pools(plan_of(settings)), *problems)
    folder = models.local_folder(model.model, model.revision)
    backends.check_folder(model.backend, folder)
    models.load_tokenizer(folder)
    classify.folder_of(settings)  # stage 05 needs it, after all tuning
    shape = models.folder_shape(folder)
    needed = max(settings.map.buckets, required_heads(run.arm for run in settings.arm_runs))
    if needed > shape.layers * shape.heads:
        raise InputError(f"--buckets {needed}: the model has {shape.layers * shape.heads} heads")
    if settings.data.pairs:
        check_neurons(shape)
    for arm in (run.arm for run in settings.arm_runs if run.arm.of_neurons):
        if arm.neurons > (neurons := shape.layers * shape.mlp_dim):
            raise InputError(f"--neurons {arm.neurons} (arm {arm.name}): the model has {neurons} neurons")


@dataclass(frozen=True)
class Rows:
    """The rows of a run, rendered and tokenized, and where they came from."""

    tables: dict[Table, pd.DataFrame]
    drawn: Drawn
    pools: Pools
    renderer: Renderer


def draw_rows(settings: Settings) -> Rows:
    """Draws, renders and tokenizes all rows. Writes nothing."""
    data, model = settings.data, settings.model
    folder = models.local_folder(model.model, model.revision)
    tokenizer = models.load_tokenizer(folder)
    renderer = Renderer(tokenizer, data.date, data.system)
    pools = Pools(data.util, data.safe, data.align)
    what_was_read.say(data, pools, renderer)
    drawn = sampling.draw_all(plan_of(settings), pools, renderer.length)
    records = {CALIBRATION: drawn.calibration, ALIGNMENT: drawn.alignment, BENCHMARKS: drawn.benchmarks}
    tables = {
        table: pd.DataFrame([renderer.row(record) for record in own], columns=table.schema.names)
        for table, own in records.items()
    }
    ids = (rows[name] for rows in tables.values() for name in rows if name.endswith("_ids"))
    largest = max(max(map(max, filter(len, column)), default=0) for column in ids)
    models.check_ids(tokenizer, largest, models.folder_shape(folder).vocab)
    return Rows(tables, drawn, pools, renderer)


def warn_of_scoring(job: Job, rows: Rows) -> None:
    """Says where tokenizer, chat template and configuration do not agree, and which rows a token scores that
    says less than their answer."""
    for doubt in models.disagreements(job.model_folder):
        job.warn(doubt)
    if rows.renderer.chat.closes_thoughts:
        job.warn("the chat template opens a thought in every prompt: it is closed at once, empty")
    if controlled := rows.renderer.controlled:
        name, token = next(iter(controlled.items()))
        job.warn(f"{len(controlled)} rows hold control tokens, which are read as text ({token} in {name})")
    for table, own in rows.tables.items():
        for split, drawn in own.groupby("split", sort=False):
            if shared := shared_first_tokens(drawn.to_dict("records")):
                job.warn(
                    f"{len(shared)} of {len(drawn)} {split} rows ({table.stem}) are scored by a first token "
                    f"that another target begins with too, as {shared[0]}"
                )


def join(job: Job) -> dict:
    """Draws and writes all rows."""
    rows = draw_rows(job.settings)
    tables, drawn, pools = rows.tables, rows.drawn, rows.pools
    for table, own in tables.items():
        job.write(table, own)
    standins = sorted(pool for pool, source in pools.provenance.items() if source["standin"])
    if standins:
        job.warn(f"stand-ins, not the published sets: {', '.join(standins)}; no score on them compares")
    if job.settings.data.split == "development":
        job.warn("development split: its scores are for choosing settings, not for reporting")
    what_was_read.warn_of_rows(job, drawn, pools)
    what_was_read.warn_of_length(job, tables)
    warn_of_scoring(job, rows)
    if job.shape.mlp_dim is None:
        job.warn("no NeuronTune: this model has no down_proj of its own in every layer's MLP")
    counts = {table.stem: len(own) for table, own in tables.items()}
    counts |= Counter(tables[CALIBRATION]["split"]) | Counter(tables[BENCHMARKS]["split"])
    job.say(", ".join(f"{name} {count}" for name, count in counts.items()))
    return {
        "counts": counts,
        "short": [asdict(shortfall) for shortfall in drawn.short],
        "tokens": {table.stem: int(own["prompt_ids"].map(len).sum()) for table, own in tables.items()},
        "sources": pools.provenance,
        "read": {name: asdict(reading) for name, reading in pools.readings.items()},
        "standins": standins,
        "tokenizer": models.tokenizer_sha256(job.model_folder),
        "model_folder": str(job.model_folder),
    }


def own_files(settings: Settings) -> dict:
    """The content of the user's files, which the rows depend on. (A data set on the hub is what it was when
    it was read; the manifest has its commit.)"""
    data = settings.group("data")
    files = {name: data[name] for name in own_rows.ROLES if own_rows.is_file(data[name])}
    return {f"{name} sha256": sha256(Path(file)) for name, file in files.items()}


STAGE = Stage(
    name="01_calibrate",
    rests_on=("model", "data"),
    reads=(),
    writes=(CALIBRATION, ALIGNMENT, BENCHMARKS),
    before=check,
    join=join,
    also_rests_on=own_files,
)


if __name__ == "__main__":
    cli.run(STAGE)
