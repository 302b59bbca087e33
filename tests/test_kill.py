"""Stages that are killed, run out of disk, or are shared out end in the same files as undisturbed ones."""

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stages.run.pipeline import WITH_UNITS, declaration, make
from stages.run.presets import parse
from stages.run.runner import unit_states
from stages.run.store import MANIFEST, PARTS, STARTED
from tests.conftest import ROOT
from tests.runs import assert_same

KILLS = [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, 20))]

# Started like `python -m stages.NAME`, but `end` befalls the n-th renaming of a finished part or checkpoint
# into its place.
DISTURBED = """
import os, runpy, signal, sys
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
from backends.core import checkpoint
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
    """The same command in this process: a new one would take seconds to begin."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        make(name, parse(["--run", str(folder), *options]))
    return output.getvalue()


@pytest.mark.parametrize("number", KILLS)
def test_killed_at_a_random_moment(copy_run, tiny_run, number):
    name = ("03_sensitivity", "04_align", "05_evaluate", "02_conflict")[number % 4]
    generator = np.random.default_rng([7, number])
    longest = 1.0
    while True:  # until a kill finds the stage at work
        folder = copy_run(before=name)
        process = start(name, folder)
        while process.poll() is None and not (folder / name / STARTED).exists():
            time.sleep(0.01)
        time.sleep(generator.uniform(0, longest))
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL and not (folder / name / MANIFEST).exists():
            break
        shutil.rmtree(folder)
        longest /= 2
    finish(name, folder)
    assert_same(folder / name, tiny_run / name)


@pytest.mark.parametrize(
    ("name", "count", "end"),
    [
        ("03_sensitivity", 6, "torn"),  # a part's temporary file, half written
        ("04_align", 2, "before"),  # a checkpoint, written but not in its place
        pytest.param("04_align", 4, "after", marks=pytest.mark.long),  # a checkpoint, in its place
        pytest.param("05_evaluate", 2, "after", marks=pytest.mark.long),  # a part, in its place
    ],
)
def test_killed_while_a_file_is_written(copy_run, tiny_run, name, count, end):
    folder = copy_run(before=name)
    killed = subprocess.run(
        [sys.executable, "-c", DISTURBED, str(count), end, name, "--run", str(folder)],
        cwd=ROOT,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / name / PARTS).is_dir() and not (folder / name / MANIFEST).exists()
    output = finish(name, folder)
    if name == "04_align":
        assert "goes on after step" in output
    assert_same(folder / name, tiny_run / name)
    assert not [path for path in (folder / name).rglob("*") if path.name.endswith((".tmp", ".checkpoint"))]


@pytest.mark.parametrize("name", WITH_UNITS)
def test_shards_make_what_one_process_makes(copy_run, tiny_run, name):
    folder = copy_run(before=name)
    settings = parse(["--run", str(folder)])
    expected = {}
    for shard in ("2/2", "1/2"):
        output = finish(name, folder, "--shard", shard)
        assert f"shard {shard} is done" in output and not (folder / name / MANIFEST).exists()
        states = unit_states(declaration(name), settings)
        assert all(states[unit] for unit in list(states)[int(shard[0]) - 1 :: 2])
        kept = {
            unit: (folder / name / PARTS / f"{unit}.parquet").stat().st_mtime_ns
            for unit in states
            if states[unit]
        }
        assert expected.items() <= kept.items(), "no unit is computed twice"
        expected = kept
    assert all(states.values())
    finish(name, folder)
    assert_same(folder / name, tiny_run / name)
    assert all(unit_states(declaration(name), settings).values())


@pytest.mark.long
def test_a_full_disk_is_named_and_what_was_done_is_kept(copy_run, tiny_run, scratch):
    name = "03_sensitivity"
    source, disk = copy_run(before=name), scratch / "disk"
    disk.mkdir()
    # What is there, in pages, and room for some of the stage's parts.
    size = sum(-(-path.stat().st_size // 2**12) for path in source.rglob("*")) * 2**12 + 2**15
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here, so none can be filled")
    try:
        folder = Path(shutil.copytree(source, disk / "run"))
        # The check of free space up front would refuse.
        code = (
            "import collections, runpy, shutil, sys; usage = collections.namedtuple('usage', 'free');"
            "shutil.disk_usage = lambda path: usage(2**40); sys.argv = sys.argv[1:];"
            f"runpy.run_module('stages.{name}', run_name='__main__')"
        )
        full = subprocess.run(
            [sys.executable, "-c", code, name, "--run", str(folder)], cwd=ROOT, capture_output=True, text=True
        )
        assert full.returncode == 2, full.stderr
        last = full.stderr.strip().splitlines()[-1]
        assert last.startswith("error: the disk is full") and "Traceback" not in full.stderr
        assert list((folder / name / PARTS).glob("*.parquet"))
        subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
        finish(name, folder)
        assert_same(folder / name, tiny_run / name)
    finally:
        subprocess.run(["umount", disk], check=True)
