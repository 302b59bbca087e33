"""Units computed by several processes of a machine: the same bytes, and none outlives the command."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch

import backends
from backends.base import Shape
from stages.run import cli, threads
from stages.run.job import Job
from stages.run.pipeline import WITH_UNITS, declaration, make
from stages.run.presets import parse
from stages.run.store import PARTS, RUN_FILE, read_json
from tests.conftest import ROOT
from tests.runs import assert_same

SWEEP, ALIGN, EVALUATE = WITH_UNITS[1:]
SMOLLM = Shape(layers=30, heads=9, kv_heads=3, head_dim=64, model_dim=576, mlp_dim=1536, vocab=49152)
SIZE = 134_515_008
"""its parameters"""


@pytest.fixture()
def command(monkeypatch):
    """The command of a stage, in this process."""

    def run(name: str, folder: Path, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["stage", "--run", str(folder), *options])
        cli.run(declaration(name))

    yield run
    assert multiprocessing.active_children() == []


def test_tuned_models_and_the_runs_settings_are_those_of_one_process(command, copy_run, capsys):
    one, two = (copy_run(before=ALIGN, name=name) for name in ("one", "two"))
    options = ("--lr", "0.2", "--arms", "full", "bucket4", "--optimizers", "sft", "pcgrad")
    make(ALIGN, parse(["--run", str(one), *options]))
    command(ALIGN, two, *options, "--processes", "2")
    output = capsys.readouterr()
    assert "4 units by 2 processes" in output.out and "4/4" in output.err
    assert_same(two / ALIGN, one / ALIGN)
    stored = [read_json(folder / RUN_FILE) | {"run": ""} for folder in (one, two)]
    assert stored[0] == stored[1] and stored[0]["lr"] == 0.2 and "processes" not in stored[0]


@pytest.mark.long
def test_responses_are_those_of_one_process(command, copy_run, tiny_run):
    folder = copy_run(before=EVALUATE)
    command(EVALUATE, folder, "--processes", "3")
    assert_same(folder / EVALUATE, tiny_run / EVALUATE)


def test_what_is_wrong_in_a_process_is_said_in_one_line(command, copy_run, capsys):
    folder = copy_run(before=ALIGN)
    damaged = folder / ALIGN / PARTS / "random-sft-21.checkpoint"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("no checkpoint")
    with pytest.raises(SystemExit) as stop:
        command(ALIGN, folder, "--processes", "2")
    assert stop.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.startswith(f"{damaged} is damaged") and error.count("\n") == 1


@pytest.mark.long
def test_a_process_that_dies_is_named_by_its_last_words(command, copy_run, capsys):
    folder = copy_run(before=ALIGN)

    def kill_one() -> None:
        while not list((folder / ALIGN / PARTS).glob("*.parquet")):
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    killer = Thread(target=kill_one)
    killer.start()
    with pytest.raises(SystemExit) as stop:
        command(ALIGN, folder, "--processes", "2")
    killer.join()
    assert stop.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.startswith(f"a process of {ALIGN} died (") and error.count("\n") == 1


def started_by(process: subprocess.Popen) -> list[int]:
    """Processes that live and were started by this one, which may have ended; a zombie is none."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == process.pid and int(stat.parent.name) != process.pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGINT, 128 + signal.SIGINT),
    ],
)
def test_no_process_outlives_its_start(copy_run, tiny_run, number, code):
    folder = copy_run(before=EVALUATE)
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{EVALUATE}", "--run", str(folder), "--processes", "2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever started the tests may ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list((folder / EVALUATE / PARTS).glob("*.parquet")):
        time.sleep(0.01)
    assert len(started_by(process)) >= 2
    if number == signal.SIGINT:  # as a terminal sends it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == code
    if number == signal.SIGINT:
        assert errors.splitlines()[-1].startswith("stopped.") and "Traceback" not in errors
    for _ in range(500):
        if not started_by(process):
            break
        time.sleep(0.01)
    assert started_by(process) == []
    make(EVALUATE, parse(["--run", str(folder)]))
    assert_same(folder / EVALUATE, tiny_run / EVALUATE)


def test_how_many_there_are(tiny_run, monkeypatch):
    def count(name: str = ALIGN, size: int = SIZE, cores: int = 4, gib: float = 64, **values) -> int:
        monkeypatch.setattr(threads, "parameters", lambda _: size)
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        monkeypatch.setattr(threads, "machine_bytes", lambda: int(gib * 2**30))
        settings = parse(["--run", str(tiny_run), "--device", "cpu"]).replace(**values)
        job = Job(declaration(name), settings)
        job.shape = SMOLLM
        return threads.side_by_side(job)

    assert count() == count(EVALUATE) == 4 and count(cores=32) == 8 and count(cores=1) == 1
    assert count(gib=6) == 2 and count(gib=1) == 1 and count(EVALUATE, gib=16, drift=True) < 4
    assert count(SWEEP) == count(SWEEP, processes=2) == 1, "only where products have few rows"
    assert count(shard="1/2") == count(shard="units=a", processes=2) == 1
    assert count(backend="flax") == count(judge="wildguard") == 1
    tiny, large = 4_000_000, 1_100_000_000
    assert count(size=tiny) == count(size=large) == 1 and count(size=tiny, processes=3) == 3


def test_a_model_is_as_large_as_its_files_say(models):
    size = backends.load("torch", models["llama-gqa"], device="cpu").model.model.num_parameters()
    assert threads.parameters(Path(models["llama-gqa"])) == size


def test_a_small_model_has_one_thread_also_in_one_process(tiny_run, monkeypatch):
    monkeypatch.setattr(threads, "parameters", lambda _: SIZE)
    before, seen = torch.get_num_threads(), {}
    torch.set_num_threads(2)
    try:
        for name in WITH_UNITS:
            job = Job(declaration(name), parse(["--run", str(tiny_run), "--device", "cpu"]))
            job.shape = SMOLLM
            with threads.threads_of(job):
                seen[name] = torch.get_num_threads()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert list(seen.values()) == [2, 2, 1, 1]
