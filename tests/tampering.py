"""Ways to alter a copy of a finished run, for the tests of the audit and the comparison."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from safetensors.numpy import load_file, save_file

from backends.core.files import sha256, write_json
from stages.run.pipeline import STAGES
from stages.run.schemas import Table
from stages.run.store import MANIFEST, RUN_FILE, RunFolder, read_json, read_table, stage_files, write_table


def copied(finished: Path, to: Path, name: str = "run") -> Path:
    return Path(shutil.copytree(finished, to / name))


def reseal(run: Path) -> None:
    """Makes every hash of every manifest that of the file as it is now, as who hides a change would."""
    hashes: dict[str, str] = {}
    for stage in (stage for stage in STAGES if RunFolder(run).is_finished(stage)):
        manifest = read_json(run / stage / MANIFEST)
        manifest["outputs"] = {file: sha256(run / stage / file) for file in stage_files(run / stage)}
        hashes |= {f"{stage}/{file}": digest for file, digest in manifest["outputs"].items()}
        manifest["inputs"] = {file: hashes[file] for file in manifest["inputs"]}
        write_json(run / stage / MANIFEST, manifest)


def edit(run: Path, table: Table, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> None:
    """Lets `change` alter a table in place, or return another, and reseals."""
    rows = read_table(run / table.path(), table.schema)
    changed = change(rows)
    write_table(run / table.path(), rows if changed is None else changed, table.schema)
    reseal(run)


def cell(row: int, column: str, change: Callable) -> Callable[[pd.DataFrame], None]:
    """Changes one cell."""

    def changed(rows: pd.DataFrame) -> None:
        rows.at[row, column] = change(rows.at[row, column])

    return changed


def edit_adapter(run: Path, name: str, change: Callable[[dict], None]) -> None:
    """Alters the tensors of an adapter, and reseals."""
    path = run / "04_align" / "adapters" / name / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(run)


def edit_manifest(run: Path, stage: str, change: Callable[[dict], None]) -> None:
    manifest = read_json(run / stage / MANIFEST)
    change(manifest)
    write_json(run / stage / MANIFEST, manifest)


def edit_settings(run: Path, **values: object) -> None:
    """Writes other settings into run.json, and nowhere else."""
    write_json(run / RUN_FILE, read_json(run / RUN_FILE) | values)
