"""For the tests of the audit: one small finished run, and ways to alter a copy of it."""

import dataclasses
import importlib
import shutil
from pathlib import Path

from stages import artifacts, audit, presets, schemas
from stages.auditing.audit_run import SWEPT, TABLES

SETTINGS = dataclasses.replace(
    presets.preset_settings("tiny"),
    benchmarks=("facts=8", "problems=3:4", "adversarial=4:4", "benign=3:4"),
    arms=("random", "bucket1", "bucket4"),
    util_rows=8,
    safe_rows=4,
    align_rows=16,
    sweep_tokens=4,
    resamples=20,
)
HEADS, SCORES = "03_sensitivity/heads.parquet", "05_evaluate/scores.parquet"
RESPONSES, ARMS = "05_evaluate/responses.parquet", "04_align/arms.parquet"
CHOICES, GENERATIONS = "03_sensitivity/sweep_choices.parquet", "03_sensitivity/sweep_generations.parquet"
BENCHMARKS, CALIBRATION = "01_calibrate/benchmarks.parquet", "01_calibrate/calibration.parquet"
COSTS = "06_correlate/tables/costs.csv"
ADAPTER = "04_align/adapters/bucket4-sft-21/adapter_model.safetensors"


def finished_run(scratch: Path) -> Path:
    """A finished run below `scratch`; made by the first test file of a session that asks."""
    folder = scratch / "audited"
    if not folder.exists():
        for name in audit.STAGES:
            importlib.import_module(f"stages.{name}").main(dataclasses.replace(SETTINGS, run=str(folder)))
    return folder


def copied(finished: Path, to: Path) -> Path:
    return Path(shutil.copytree(finished, to / "run"))


def reseal(run: Path) -> None:
    """Makes every hash of every manifest that of the file as it is now."""
    hashes: dict[str, str] = {}
    for stage in audit.STAGES:
        manifest = artifacts.stage_manifest(run, stage)
        outputs = {str(path.relative_to(run / stage)): path for path in artifacts.files_below(run / stage)}
        manifest["outputs"] = {file: artifacts.sha256(path) for file, path in outputs.items()}
        hashes |= {f"{stage}/{file}": digest for file, digest in manifest["outputs"].items()}
        manifest["inputs"] = {file: hashes[file] for file in manifest["inputs"]}
        artifacts.write_json(run / stage / artifacts.MANIFEST, manifest)


def edit(run: Path, relative: str, change) -> None:
    """Lets `change` alter a table's rows in place, and reseals."""
    rows = artifacts.read_table(run / relative, (TABLES | SWEPT)[relative]).to_pylist()
    change(rows)
    artifacts.write_table(run / relative, rows, (TABLES | SWEPT)[relative])
    reseal(run)


def edit_manifest(run: Path, stage: str, change) -> None:
    manifest = artifacts.stage_manifest(run, stage)
    change(manifest)
    artifacts.write_json(run / stage / artifacts.MANIFEST, manifest)


def failures(run: Path, capsys) -> list[str]:
    """The FAIL lines of an audit, whose exit code must agree with them; no prompt may be in its output."""
    capsys.readouterr()
    code = audit.main(run)
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAIL ")]
    assert code == (1 if failed else 0)
    for relative in (BENCHMARKS, CALIBRATION):
        for row in artifacts.read_table(run / relative, schemas.EXAMPLES).to_pylist():
            assert row["prompt"] not in printed
    return failed
