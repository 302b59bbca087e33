"""The audit: whether a run's files are those its manifests name, and follow from each other (DESIGN.md §8).

    python -m stages.audit outputs/smollm

One line a check: "ok   <what>: <figure>", "FAIL <what>: <what, where>", or "skip <what>: <why>" where
the model's folder is not here. All checks are run. Exit code 1 on any failure; 2, with one line, where the
folder is no finished run. Hashes tell what was changed after a stage; what was changed together with its hash
is told by computing it again.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from backends.errors import InputError
from data.examples import Record
from data.jsonl import normalise
from data.rendering import Renderer
from stages import arms, artifacts, schemas
from stages.auditing import audit_checks, audit_neurons, audit_weights
from stages.auditing.audit_run import GROUPS, NEURONS, SAFETY_ROLES, Finding, Run, finding

STAGES = ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate", "06_correlate")
RUN_FILE = "run.json"
LOCK = ".lock"
"""what locks' names begin with: a shard and a launch have their own"""
FIELDS = {
    "schema": str,
    "stage": str,
    "settings": dict,
    "inputs": dict,
    "model": dict,
    "outputs": dict,
    "notes": dict,
    "units": dict,
    "versions": dict,
    "git": dict,
    "wall_seconds": (int, float),
    "peak_memory_bytes": int,
}
READS = {
    "01_calibrate": (),
    "02_conflict": ("01_calibrate/calibration.parquet",),
    "03_sensitivity": ("01_calibrate/calibration.parquet", "02_conflict/gradients.parquet"),
    "04_align": (
        "01_calibrate/alignment.parquet",
        "01_calibrate/calibration.parquet",
        "03_sensitivity/heads.parquet",
    ),
    "05_evaluate": ("01_calibrate/benchmarks.parquet", "04_align/arms.parquet"),
    "06_correlate": ("03_sensitivity/heads.parquet", "04_align/arms.parquet", "05_evaluate/scores.parquet"),
}
"""inputs that a stage's manifest must name; it may name more"""
MAP_READS = {"03_sensitivity": "02_conflict/gradients", "04_align": "03_sensitivity/heads"}
"""what a stage reads of every other map"""
REPORT = ("tables/*.csv", "tables/*.md", "figures/*.svg", "figures/*.png", "report.html")


def open_run(folder: Path) -> Run:
    """The run in `folder`. InputError where it is none, or lacks a stage (and which command makes that)."""
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder} is no run (no {RUN_FILE}): give the folder of a run, e.g. outputs/smollm")
    for stage in STAGES:
        artifacts.stage_manifest(folder, stage)
    return Run(folder, {stage: artifacts.stage_manifest(folder, stage) for stage in STAGES})


# Files and their chain


def files(run: Run) -> list[Finding]:
    """Every file of a stage is in its manifest with its sha256, and nothing else is in the run's folder."""
    found = []
    for stage in STAGES:
        folder, listed = run.folder / stage, run.manifests[stage]["outputs"]
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        there.remove(artifacts.MANIFEST)
        faults = [f"{stage}/{file} is missing" for file in sorted(listed.keys() - there)]
        faults += [f"{stage}/{file} is not in the manifest" for file in sorted(there - listed.keys())]
        for file in sorted(there & listed.keys()):
            if artifacts.sha256(folder / file) != listed[file]:
                faults.append(f"{stage}/{file} is not what its manifest says (sha256)")
        strange = sorted(file for file in listed if not expected(run, stage, file))
        faults += [f"{stage}/{file} is no file of this stage" for file in strange]
        faults += [f"{stage} lacks {file}" for file in sorted(required(run, stage) - listed.keys())]
        found.append(finding(f"files of {stage}", faults, f"{len(listed)}, each with its manifest's sha256"))
    beside = [
        path
        for path in run.folder.iterdir()
        if path.name not in (*STAGES, RUN_FILE) and not path.name.startswith(LOCK)
    ]
    strange = [f"{path.name} belongs to no stage" for path in sorted(beside)]
    return [*found, finding("files beside the stages", strange, f"none but {RUN_FILE} and {LOCK}")]


def required(run: Run, stage: str) -> set[str]:
    """Files that a stage must have."""
    names = {relative.split("/", 1)[1] for relative in run.tables if relative.startswith(f"{stage}/")}
    if stage == "04_align":
        labels = arms.units(SimpleNamespace(**run.settings(stage)))
        units = [f"{one['arm']}-{one['optimizer']}-{one['seed']}" for one in labels]
        names |= {f"adapters/{unit}/{file}" for unit in units for file in audit_weights.ADAPTER_FILES}
    elif stage == "06_correlate":
        names |= {audit_checks.COSTS.split("/", 1)[1], "report.html"}
    return names


def expected(run: Run, stage: str, file: str) -> bool:
    if stage == "06_correlate":
        return any(Path(file).match(pattern) for pattern in REPORT)
    return file in required(run, stage)


def columns(run: Run) -> list[Finding]:
    """Every table has the columns and the schema id of its kind."""
    faults = []
    for relative in run.tables:
        try:
            run.table(relative)
        except InputError as error:
            faults.append(str(error))
    return [finding("parquet schemas", faults, f"{len(run.tables)} tables under {schemas.SCHEMA_VERSION}")]


def manifests(run: Run) -> list[Finding]:
    """Schema id, stage and fields of every manifest; written as `artifacts.write_json` writes."""
    faults = []
    for stage in STAGES:
        manifest, where = run.manifests[stage], f"{stage}/{artifacts.MANIFEST}"
        if manifest.keys() != FIELDS.keys():
            faults.append(f"{where} has other fields: {', '.join(sorted(manifest.keys() ^ FIELDS.keys()))}")
            continue
        mistyped = [name for name, kind in FIELDS.items() if not isinstance(manifest[name], kind)]
        faults += [f"{where}: {name} is of another type" for name in mistyped]
        for name, value in {"schema": schemas.SCHEMA_VERSION, "stage": stage}.items():
            if manifest[name] != value:
                faults.append(f"{where}: {name} is {manifest[name]!r}, not {value!r}")
    for relative in (RUN_FILE, *(f"{stage}/{artifacts.MANIFEST}" for stage in STAGES)):
        text = (run.folder / relative).read_text(encoding="utf-8")
        if text != json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n":
            faults.append(f"{relative} was edited: it is not laid out as the program writes it")
    return [finding("manifests", faults, f"{len(STAGES)} under {schemas.SCHEMA_VERSION}, all fields")]


def settings(run: Run) -> list[Finding]:
    """run.json and the settings of every manifest agree."""
    stored, faults = artifacts.read_json(run.folder / RUN_FILE), []
    for stage in STAGES:
        for name, value in run.settings(stage).items():
            derived = name == "judge" or name.endswith(" sha256")
            if not derived and stored.get(name) != value:
                faults.append(f"{stage}: {name} is {value!r}, in {RUN_FILE} {stored.get(name)!r}")
    return [finding("settings", faults, f"{RUN_FILE} and {len(STAGES)} manifests agree")]


def chain(run: Run) -> list[Finding]:
    """Every stage was made from the files that are there now."""
    faults, count = [], 0
    for stage in STAGES:
        inputs = run.manifests[stage]["inputs"]
        wanted = set(READS[stage])
        if stage in MAP_READS:
            wanted |= {f"{MAP_READS[stage]}-{name}.parquet" for name in run.map_names if name}
        if stage == "04_align" and any(arm["n_neurons"] for arm in run.arms):
            wanted.add(NEURONS)
        if stage == "05_evaluate":
            outputs = run.manifests["04_align"]["outputs"]
            wanted |= {f"04_align/{file}" for file in outputs if file.startswith("adapters/")}
        faults += [f"{stage} does not name its input {file}" for file in sorted(wanted - inputs.keys())]
        for relative, digest in inputs.items():
            path = run.folder / relative
            count += 1
            if not path.is_file() or artifacts.sha256(path) != digest:
                faults.append(f"{stage} was made from another {relative}")
    return [finding("chain of inputs", faults, f"{count} inputs, each as the file is now")]


def notes(run: Run) -> list[Finding]:
    """Counts that manifests tell and the report may show."""
    told = {stage: run.manifests[stage]["notes"] for stage in STAGES}
    rows = {name: run.table(f"01_calibrate/{name}.parquet") for name in GROUPS}
    counts = {name: table.num_rows for name, table in rows.items()}
    tokens = {name: sum(map(len, table["prompt_ids"].to_pylist())) for name, table in rows.items()}
    training = run.table("04_align/training.parquet")
    counts |= {role: len(own) for role, own in run.calibration.items()}
    refusals = float(run.refused[0].mean())
    bases = {
        name: {"accuracy": float(run.correct(name)[0].mean()), "refusal_rate": refusals}
        for name in run.map_names
    }
    others = told["03_sensitivity"].get("maps", {})
    told["03_sensitivity"] = told["03_sensitivity"] | {
        "base of other maps": {name: found.get("base") for name, found in others.items()}
    }
    computed = {
        ("01_calibrate", "counts"): counts | {name: len(asked) for name, asked in run.benchmarks.items()},
        ("01_calibrate", "tokens"): tokens,
        ("03_sensitivity", "base"): bases.pop(""),
        ("03_sensitivity", "base of other maps"): bases,
        ("04_align", "arms"): len(run.arms),
        ("04_align", "steps"): training.num_rows,
        ("04_align", "tokens"): sum(training["tokens"].to_pylist()),
        ("05_evaluate", "responses"): run.table("05_evaluate/responses.parquet").num_rows,
    }
    faults = [
        f"{stage}: {name} is {told[stage].get(name)!r}, recomputed {value!r}"
        for (stage, name), value in computed.items()
        if told[stage].get(name) != value
    ]
    return [finding("notes of the manifests", faults, f"{len(computed)} counts and rates")]


# Data


def leaks(run: Run) -> list[Finding]:
    """No entry, example_id or normalised prompt is in two of calibration, alignment and benchmarks."""
    found = []
    tables = {name: run.table(f"01_calibrate/{name}.parquet") for name in GROUPS}
    keys = {
        "entry": lambda table: table["entry"].to_pylist(),
        "example_id": lambda table: table["example_id"].to_pylist(),
        # A prompt of signs only stands for itself.
        "normalised prompt": lambda table: [normalise(text) or text for text in table["prompt"].to_pylist()],
    }
    # Entries may recur within the benchmarks, in the forms of an alignment request, in both forms of a pair's
    # and in the utility rows of several maps, not in util and safe.
    roles = ["safe" if role in SAFETY_ROLES else "util" for role in tables["calibration"]["role"].to_pylist()]
    for key, values_of in keys.items():
        seen: dict[str, dict[str, str]] = {}
        for name, table in tables.items():
            groups = roles if name == "calibration" else [name] * table.num_rows
            ids = table["example_id"].to_pylist()
            for value, group, example_id in zip(values_of(table), groups, ids, strict=True):
                seen.setdefault(value, {}).setdefault(group, f"{group} {example_id}")
        shared = [" and ".join(places.values()) for places in seen.values() if len(places) > 1]
        faults = [f"{places} share one" for places in shared]
        figure = f"{len(seen)} distinct ones in util, safe, alignment and benchmarks"
        found.append(finding(f"no shared {key}", faults, figure))
    return found


def tokens(run: Run) -> list[Finding]:
    """Rendering and tokenizing every row again gives its text and ids; one BOS where the model has one."""
    what, settings = "token ids match the recorded tokenizer", run.settings("01_calibrate")
    if run.model_folder is None:
        return [Finding(what, None, "the model's folder is not on this machine")]
    if run.tokenizer is None:
        return [Finding(what, False, f"{run.model_folder} holds another one than stage 01 used (sha256)")]
    renderer = Renderer(run.tokenizer, settings["date"], settings["system"])
    faults, count = [], 0
    for name in GROUPS:
        for row in run.table(f"01_calibrate/{name}.parquet").to_pylist():
            count += 1
            where = f"{name} {row['example_id']}"
            faults += [f"{where}: {column} differs" for column in unlike_rendered(renderer, row)]
            if renderer.bos is not None and row["prompt_ids"].count(renderer.bos) != 1:
                faults.append(f"{where}: {row['prompt_ids'].count(renderer.bos)} BOS tokens")
            if row["choice_ids"]:
                right = row["choices"][row["answer"]].strip()
                if not row["target"].strip().startswith(right):
                    faults.append(f"{where}: the target is not the choice that answer names")
    return [finding(what, faults, f"{count} rows")]


def unlike_rendered(renderer: Renderer, row: dict) -> list[str]:
    """Columns of a row of schemas.EXAMPLES that rendering its own text again does not give."""
    answer = row["answer"] if row["choices"] else -1
    names = ("example_id", "source", "entry", "role", "prompt", "target", "scoring")
    record = Record(**{name: row[name] for name in names}, choices=tuple(row["choices"]), answer=answer)
    bare = renderer.prompt(record)
    if not row["rendered"].startswith(bare):
        return ["rendered"]
    again = renderer.row(replace(record, prefix=row["rendered"].removeprefix(bare)))
    return [column for column in again if again[column] != row[column]]


# All checks

CHECKS: tuple[Callable[[Run], list[Finding]], ...] = (
    files,
    columns,
    manifests,
    settings,
    chain,
    audit_weights.base,
    audit_checks.rows_asked,
    leaks,
    tokens,
    audit_checks.gradients,
    audit_checks.sweep,
    audit_checks.conflict_map,
    audit_neurons.scores,
    audit_checks.budgets,
    audit_neurons.arms_of_neurons,
    audit_weights.adapters,
    audit_neurons.adapters,
    audit_checks.responses,
    audit_checks.costs,
    notes,
)
MARKS = {True: "ok  ", False: "FAIL", None: "skip"}


def checked(check: Callable[[Run], list[Finding]], run: Run) -> list[Finding]:
    """A check's findings; a file that cannot even be read as what it should be is a failure of the check."""
    try:
        return check(run)
    except ValueError as error:
        return [Finding(check.__name__, False, str(error).splitlines()[0])]
    except (OSError, LookupError, TypeError, AttributeError) as error:  # damage takes any form
        return [Finding(check.__name__, False, f"cannot be checked ({type(error).__name__}: {error})")]


def main(folder: Path) -> int:
    """Prints a line a check; 1 if one failed, else 0. InputError where the folder is no finished run."""
    run = open_run(folder)
    found: list[Finding] = []
    for check in CHECKS:
        for one in checked(check, run):
            print(f"{MARKS[one.ok]} {one.what}: {one.detail}", flush=True)
            found.append(one)
    failed, skipped = (sum(one.ok is state for one in found) for state in (False, None))
    passed = len(found) - failed - skipped
    print(f"audit of {folder}: {passed} ok, {failed} failed, {skipped} not checked", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stages.audit", description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. outputs/smollm")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        sys.exit(main(parser.parse_args().run))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
