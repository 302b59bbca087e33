"""Finished runs of stages 01 to 05 on the tiny model, each made once in a session of tests, and what tests do
with them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from backends.core.files import write_json
from stages.run.pipeline import STAGES, make
from stages.run.presets import preset_settings
from stages.run.settings import Settings
from stages.run.store import MANIFEST, RUN_FILE, read_json

COMPUTED = STAGES[:5]
"""all but the report"""
TINY = preset_settings("tiny").replace(
    benchmarks=("facts=12", "words=12", "problems=4:6", "adversarial=4:6", "vanilla=4:6", "benign=4:6"),
    arms=("full", "random", "bucket1", "bucket4"),
    align_rows=16,
    sweep_tokens=5,
)
NEURONS = preset_settings("tiny").replace(
    benchmarks=("facts=8", "problems=4:8", "adversarial=4:8", "benign=4:8"),
    arms=("full", "bucket4"),
    ablations=("randomneurons16",),
    pairs=8,
    attribution_steps=4,
    neurons=(0, 16),
    lam=(0.5, 0.9),
    gain_lr=0.5,
    align_rows=48,
    sweep_tokens=4,
    resamples=50,
)
OTHER_EACH_TIME = ("wall_seconds", "peak_memory_bytes", "units", "git")
"""of a manifest"""


def make_run(folder: Path, settings: Settings = TINY, stages: tuple[str, ...] = COMPUTED) -> Path:
    """Makes stages in this process."""
    for name in stages:
        make(name, settings.replace(run=str(folder)))
    return folder


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a session."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(
    factory: pytest.TempPathFactory, name: str, settings: Settings, stages: tuple[str, ...]
) -> Path:
    """A run that the first process which needs it makes; the others wait. Not to be changed."""
    folder = session_folder(factory) / "runs" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / stages[-1] / MANIFEST).is_file():
            make_run(folder, settings, stages)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """Stages 01 to 05 by TINY."""
    return made_once(tmp_path_factory, "tiny", TINY, COMPUTED)


@pytest.fixture(scope="session")
def neurons_run(tmp_path_factory) -> Path:
    """Stages 01 to 05 by NEURONS."""
    return made_once(tmp_path_factory, "neurons", NEURONS, COMPUTED)


@pytest.fixture()
def copy_run(tiny_run, scratch) -> Callable[..., Path]:
    """Copies the tiny run, to be changed."""

    def copied(before: str | None = None, name: str = "run", source: Path = tiny_run) -> Path:
        """
        Args:
            before: the first stage that the copy lacks; None: it has all.
        """
        folder = Path(shutil.copytree(source, scratch / name))
        write_json(folder / RUN_FILE, read_json(folder / RUN_FILE) | {"run": str(folder)})
        for later in STAGES[STAGES.index(before) :] if before else ():
            shutil.rmtree(folder / later, ignore_errors=True)
        return folder

    return copied


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run or of one of its stages but locks and settings, manifests without what differs each
    time."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != RUN_FILE and not path.name.startswith(".lock"):
            content = path.read_bytes()
            if path.name == MANIFEST:
                manifest = json.loads(content).items()
                content = json.dumps(
                    {key: value for key, value in manifest if key not in OTHER_EACH_TIME}
                ).encode()
            files[str(path.relative_to(folder))] = content
    return files


def assert_same(folder: Path, expected: Path) -> None:
    """Both hold the same files, byte for byte."""
    found, wanted = contents(folder), contents(expected)
    assert found.keys() == wanted.keys()
    assert [file for file in wanted if found[file] != wanted[file]] == []
