"""Stages that are killed, run out of disk, or are shared out end in the same files as undisturbed ones.

CAST_KILLS=20 bash tests/run.sh -k kill    (the long form; 3 kills are made otherwise)
"""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stages import artifacts, presets
from tests.conftest import ROOT
from tests.test_stages import STAGES, contents, run

KILLS = int(os.environ.get("CAST_KILLS", "3"))
KILLED = ["03_sensitivity", "04_align", "05_evaluate", "02_conflict"]

# Started like `python -m stages.NAME`, with the disk's part played by this: `end` stands for what befalls the
# n-th renaming of a finished part or checkpoint into place.
DISTURBED = """
import errno, os, runpy, signal, sys
count, end, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.argv = [name, *sys.argv[4:]]
rename, seen = os.replace, 0
def disturbed(source, target):
    global seen
    seen += str(target).endswith((".parquet", ".checkpoint"))
    if seen == count:
        if end == "torn":
            with open(source, "r+b") as file:
                file.truncate(os.path.getsize(source) // 2)
        if end == "after":
            rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = disturbed
from backends import checkpoint
checkpoint.SECONDS = 0.0
runpy.run_module(f"stages.{name}", run_name="__main__")
"""


def start(name: str, folder: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}", "--run", str(folder), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(name: str, folder: Path, *options: str) -> str:
    """In this process: a new one would take seconds to begin."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        importlib.import_module(f"stages.{name}").main(presets.parse(["--run", str(folder), *options]))
    return told.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed") / "tiny")


@pytest.fixture()
def before(undisturbed, scratch):
    """Makes a run that has come as far as a stage."""

    def made(name: str) -> Path:
        folder = scratch / name
        shutil.copytree(undisturbed, folder)
        for later in STAGES[STAGES.index(name) :]:
            shutil.rmtree(folder / later)
        return folder

    return made


def assert_as_undisturbed(folder: Path, undisturbed: Path, name: str) -> None:
    found, expected = contents(folder / name), contents(undisturbed / name)
    assert found.keys() == expected.keys()
    for file in expected:
        assert found[file] == expected[file], f"{name}/{file} is another"


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(before, undisturbed, number):
    name = KILLED[number % len(KILLED)]
    generator = np.random.default_rng([7, number])
    longest = 1.0
    while True:  # until a kill finds the stage at work
        folder = before(name)
        process = start(name, folder)
        while process.poll() is None and not (folder / name / artifacts.STARTED).exists():
            time.sleep(0.01)
        time.sleep(generator.uniform(0, longest))
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL and not (folder / name / artifacts.MANIFEST).exists():
            break
        shutil.rmtree(folder)
        longest /= 2
    finish(name, folder)
    assert_as_undisturbed(folder, undisturbed, name)


@pytest.mark.parametrize(
    ("name", "count", "end"),
    [
        ("03_sensitivity", 6, "torn"),  # a part's temporary file, half written
        ("04_align", 2, "before"),  # a checkpoint, written but not in its place
        ("04_align", 4, "after"),  # a checkpoint, in its place
        ("05_evaluate", 2, "after"),  # a part, in its place
    ],
)
def test_killed_while_a_file_is_written(before, undisturbed, name, count, end):
    folder = before(name)
    killed = subprocess.run(
        [sys.executable, "-c", DISTURBED, str(count), end, name, "--run", str(folder)],
        cwd=ROOT,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / name / "parts").is_dir() and not (folder / name / artifacts.MANIFEST).exists()
    told = finish(name, folder)
    if name == "04_align":
        assert "goes on after step" in told
    assert_as_undisturbed(folder, undisturbed, name)
    assert not [path for path in (folder / name).rglob("*") if path.name.endswith((".tmp", ".checkpoint"))]


@pytest.mark.parametrize("name", ["02_conflict", "03_sensitivity", "04_align", "05_evaluate"])
def test_shards_make_what_one_process_makes(before, undisturbed, name):
    folder = before(name)
    told = finish(name, folder, "--shard", "2/2")
    assert "shard 2/2 is done" in told and not (folder / name / artifacts.MANIFEST).exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / name).rglob("parts/*.parquet")}
    assert bool(kept) == (name != "02_conflict"), "a small model's gradients are one unit"
    finish(name, folder)
    assert_as_undisturbed(folder, undisturbed, name)


def test_shards_run_beside_each_other_and_a_whole_stage_alone(before):
    name = "03_sensitivity"
    folder = before(name)
    with artifacts.open_stage(folder, name, {}, shard=(1, 2)):
        with artifacts.open_stage(folder, name, {}, shard=(2, 2)):
            pass
        for second, why in (((1, 2), "the same shard"), (None, "a whole stage")):
            options = () if second is None else ("--shard", "1/2")
            process = start(name, folder, *options)
            told, _ = process.communicate()
            assert process.returncode == 2 and "is in use by another process" in told, why


def test_a_full_disk_is_told_and_what_was_done_is_kept(before, undisturbed, scratch):
    name = "03_sensitivity"
    disk = scratch / "disk"
    disk.mkdir()
    # What is there, in pages, and room for some of the stage's parts.
    size = sum(-(-path.stat().st_size // 2**12) for path in before(name).rglob("*")) * 2**12 + 2**15
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here, so none can be filled")
    try:
        folder = Path(shutil.copytree(scratch / name, disk / "run"))
        # The check of free space up front would refuse: it is told that there is enough.
        code = (
            "import collections, runpy, shutil, sys; usage = collections.namedtuple('usage', 'free');"
            "shutil.disk_usage = lambda path: usage(2**40); sys.argv = sys.argv[1:];"
            f"runpy.run_module('stages.{name}', run_name='__main__')"
        )
        full = subprocess.run(
            [sys.executable, "-c", code, name, "--run", str(folder)], cwd=ROOT, capture_output=True, text=True
        )
        assert full.returncode == 2, full.stderr
        told = full.stderr.strip().splitlines()[-1]
        assert told.startswith("error: the disk is full") and "Traceback" not in full.stderr
        assert list((folder / name / "parts").glob("*.parquet"))
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        finish(name, folder)
        assert_as_undisturbed(folder, undisturbed, name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
