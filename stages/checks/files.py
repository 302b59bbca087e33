"""Checks of files and their chain: hashes, schemas, manifests, settings, inputs, the model."""

import json
from pathlib import Path

from backends import models
from backends.core.errors import InputError
from backends.core.files import sha256
from stages.checks.finished import NO_FOLDER, FinishedRun, Result
from stages.run.job import Job
from stages.run.pipeline import STAGES, WITH_UNITS, declaration
from stages.run.schemas import SCHEMA_VERSION
from stages.run.settings import OF_ONE_START
from stages.run.store import MANIFEST, RUN_FILE, differences, read_json

LOCK = ".lock"  # what locks' names begin with: a shard and a launch have their own
FIELDS = {
    *("schema", "stage", "settings", "inputs", "model", "outputs", "notes"),
    *("units", "versions", "git", "wall_seconds", "peak_memory_bytes"),
}
"""of a manifest"""
SAME_MODEL = ("id", "revision", *models.MODEL_HASHES, "backend", "dtype", "quantize")
"""what all stages that load the model must agree on; the device may differ"""


def files(run: FinishedRun) -> Result:
    """Every file of a stage is declared, in its manifest, and a table of its schema where it is one; nothing
    else is in the run's folder."""
    known = {*STAGES, RUN_FILE}
    beside = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith(LOCK))
    faults, count = [f"{name} belongs to no stage" for name in beside if name not in known], 0
    for stage in run.manifests:
        folder, listed = run.folder / stage, run.manifest(stage)["outputs"]
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
        tables, patterns = run.tables(stage), declaration(stage).also_writes
        tables = {table.file(name): (table, name) for table, name in tables}
        count += len(listed)
        for file in sorted({*listed, *present, *tables, *(path for path in patterns if "*" not in path)}):
            if file not in present:
                faults.append(f"{stage}/{file} is missing")
            elif file not in listed:
                faults.append(f"{stage}/{file} is not in the manifest")
            elif sha256(folder / file) != listed[file]:
                faults.append(f"{stage}/{file} is not what its manifest says (sha256)")
            elif file in tables:
                try:
                    run.read(*tables[file])
                except InputError as error:
                    faults.append(str(error))
            elif not any(Path(file).match(pattern) for pattern in patterns):
                faults.append(f"{stage}/{file} is no file of this stage")
    return faults, f"{count}, each with its manifest's sha256, tables under {SCHEMA_VERSION}"


def manifests(run: FinishedRun) -> Result:
    """Schema id, stage and fields of every manifest, laid out as the program writes JSON."""
    faults = []
    for stage, manifest in run.manifests.items():
        if other := sorted(manifest.keys() ^ FIELDS):
            faults.append(f"{stage} has other fields: {', '.join(other)}")
        for name, value in (("schema", SCHEMA_VERSION), ("stage", stage)):
            faults += [f"{stage}: {name} is {manifest.get(name)!r}"] if manifest.get(name) != value else []
    for relative in (RUN_FILE, *(f"{stage}/{MANIFEST}" for stage in run.manifests)):
        text = (run.folder / relative).read_text(encoding="utf-8")
        if text != json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n":
            faults.append(f"{relative} was edited: it is not laid out as the program writes it")
    return faults, f"{len(run.manifests)}, all fields"


def settings(run: FinishedRun) -> Result:
    """run.json is whole, and agrees with what every stage rests on."""
    kept = run.settings.flat().keys() - set(OF_ONE_START)
    lacking = sorted(kept - read_json(run.folder / RUN_FILE).keys())
    faults = [f"{RUN_FILE} lacks {name}" for name in lacking]
    for stage in run.manifests:
        own, recorded = run.settings.group(*declaration(stage).rests_on), run.manifest(stage)["settings"]
        if changed := differences(own, {name: recorded.get(name) for name in own}):
            faults.append(f"{RUN_FILE} against {stage}: {changed}")
    return faults, f"{RUN_FILE} and {len(run.manifests)} manifests agree"


def chain(run: FinishedRun) -> Result:
    """Every stage was made from the files that its declaration names, as their manifests have them now."""
    faults, count = [], 0
    for stage in run.manifests:
        inputs, recorded = Job(declaration(stage), run.settings).inputs, run.manifest(stage)["inputs"]
        count += len(inputs)
        faults += [f"{stage} does not name its input {path}" for path in inputs.keys() - recorded.keys()]
        changed = [path for path in recorded if recorded[path] != inputs.get(path)]
        faults += [f"{stage} was made from another {path}" for path in changed]
    return sorted(faults), f"{count} inputs, each as it is now"


def model(run: FinishedRun) -> Result:
    """One model in all stages, that of run.json. A stage without units (a map of gradients) loads none."""
    chosen = run.settings.model
    sweeps = run.settings.map.sensitivity != "gradient"
    stages = [stage for stage in WITH_UNITS if sweeps or stage != "03_sensitivity"]
    recorded = {stage: run.manifest(stage)["model"] for stage in stages}
    wanted = {name: recorded[WITH_UNITS[0]].get(name) for name in SAME_MODEL}
    wanted |= {"id": chosen.model, "revision": chosen.revision, "backend": chosen.backend}
    wanted |= {"quantize": chosen.quantize}
    wanted |= {"dtype": chosen.dtype} if chosen.dtype != "auto" else {}
    found = {stage: {name: own.get(name) for name in SAME_MODEL} for stage, own in recorded.items()}
    faults = [f"{stage}: {differences(wanted, own)}" for stage, own in found.items() if own != wanted]
    return faults, f"{chosen.model}, {chosen.backend}, {wanted['dtype']}, {wanted['weights_sha256'][:12]}"


def weights(run: FinishedRun) -> Result:
    """The model's folder holds the recorded weights and config, of this many heads."""
    if run.model_folder is None:
        return None, NO_FOLDER
    shape = models.folder_shape(run.model_folder)
    heads = (shape.layers, shape.heads)
    faults = [] if heads == run.heads else [f"{heads} layers x heads, gradients.parquet has {run.heads}"]
    recorded = run.manifest(WITH_UNITS[0])["model"]
    for name, digest in models.model_hashes(run.model_folder).items():
        if recorded.get(name) != digest:
            faults.append(f"{run.model_folder} holds other {name.partition('_')[0]} (sha256)")
    return faults, f"sha256 as recorded, {heads[0]} layers of {heads[1]} heads"
