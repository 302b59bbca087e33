"""Runs whose units are computed by Ray's actors or submitit's jobs end in the files of a plain run."""

import doctest
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from backends.core.errors import InputError
from stages.run.locks import LAUNCH_LOCK
from stages.run.pipeline import WITH_UNITS, declaration, make
from stages.run.runner import unit_states
from stages.run.store import MANIFEST, PARTS
from stages.scale import launch, on_ray, on_slurm
from stages.scale.engine import LOCAL, Call, Engine, Options, share_out
from tests.conftest import ROOT
from tests.runs import COMPUTED, TINY, assert_same

pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
pytest.importorskip("submitit", reason="requirements-slurm.txt is not installed")

OPTIONS = [
    word
    for name in ("benchmarks", "arms", "align_rows", "sweep_tokens")
    for value in [TINY.flat()[name]]
    for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value]))
]
CONFLICT, SWEEP, ALIGN = WITH_UNITS[:3]


@pytest.fixture()
def cluster():
    """Three nodes of one processor each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.others = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def start(folder: Path, *engine: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "stages.scale.launch", "--preset", "tiny", "--run", str(folder)]
    return subprocess.Popen(
        [*command, *OPTIONS, *engine],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def wait_until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits for a state of a run that is still going on."""
    while not there():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def has_parts(folder: Path, stage: str) -> bool:
    return any((folder / stage / PARTS).glob("*.parquet"))


def assert_computed(folder: Path, plain: Path) -> None:
    for name in COMPUTED:
        assert_same(folder / name, plain / name)


@contextmanager
def started(engine: Engine, run: Path) -> Iterator[Callable[[str], list[dict]]]:
    """What computes a stage's units with an engine, within a launch."""
    with launch.launch_lock(run):
        try:
            engine.start()
            yield lambda name, **changes: share_out(engine, name, TINY.replace(run=str(run), **changes))
        finally:
            engine.close()


def joined(run: Path, name: str) -> None:
    """Makes a stage whose units are all there."""
    assert all(unit_states(declaration(name), TINY.replace(run=str(run))).values())
    make(name, TINY.replace(run=str(run)))


# Ray


def actors(run: Path, **options: int) -> on_ray.RayEngine:
    """On this machine alone."""
    return on_ray.RayEngine(TINY.replace(run=str(run)), Options(ray=LOCAL, cpus_per_actor=1, **options))


def test_actors_make_a_stage(copy_run, tiny_run):
    run = copy_run(before=SWEEP)
    with started(actors(run, actors=1), run) as compute:
        rows = compute(SWEEP)
        assert compute(SWEEP) == [], "nothing is pending"
    assert sum(row["units"] for row in rows) == len(
        unit_states(declaration(SWEEP), TINY.replace(run=str(run)))
    )
    joined(run, SWEEP)
    assert_same(run / SWEEP, tiny_run / SWEEP)


@pytest.mark.long
def test_node_and_driver_lost(cluster, tiny_run, scratch):
    """A node goes in the middle of the sweep, later the driver, which is started again."""
    folder = scratch / "tiny"
    process = start(folder, "--ray", cluster.address)
    wait_until(lambda: has_parts(folder, SWEEP), process)
    assert not (folder / SWEEP / MANIFEST).exists()
    cluster.remove_node(cluster.others.pop(), allow_graceful=False)
    wait_until(lambda: has_parts(folder, ALIGN), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / ALIGN / MANIFEST).exists()
    # Two: for a third it would wait as long as Ray has not missed the node.
    output = finish(start(folder, "--ray", cluster.address, "--actors", "2"))
    assert_computed(folder, tiny_run)
    assert "[launch] 2 actors of 0 GPUs and 1 CPUs" in output and " 0 failed" in output
    assert re.search(r"^\S+ +\d+ +\d+ +\d+$", output, re.MULTILINE), "what each node did"


class Dies:
    """An actor whose process ends, or whose stage fails, at a certain unit."""

    def compute(self, call):
        if (unit := os.environ["DIES_AT"]) in call.units:
            if os.environ["DIES_BY"] == "signal":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"no {unit}")
        return call()


@pytest.mark.long
@pytest.mark.parametrize("how", ["signal", "error"])
def test_unit_that_always_fails(how, copy_run, monkeypatch):
    """It is tried three times, then named; the rest is kept."""
    monkeypatch.setattr(on_ray, "Worker", Dies)
    monkeypatch.setattr(on_ray, "PASSED", ("DIES_AT", "DIES_BY"))
    monkeypatch.setenv("DIES_AT", "choices-layer002")
    monkeypatch.setenv("DIES_BY", how)
    why = "its process died" if how == "signal" else "ValueError: no choices-layer002"
    failed = pytest.raises(InputError, match=rf"unit \S+ of {SWEEP} failed 3 times: {why}")
    run = copy_run(before=SWEEP)
    with started(actors(run), run) as compute, failed:
        compute(SWEEP)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Could not find any Ray instance.\nMore."), "no Ray there .Could not find any Ray"),
        (
            RuntimeError("Version mismatch:\nThis process uses 1.0"),
            "another version of Ray .* .Version",
        ),
    ],
)
def test_no_such_cluster(error, message, scratch, monkeypatch):
    """As Ray puts it; in truth another test's cluster may be on this machine."""
    monkeypatch.setattr(on_ray.ray, "init", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=f"--ray auto: .*{message}") as refused:
        launch.main(["--preset", "tiny", "--run", str(scratch / "run"), "--ray", "auto"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "device", "size", "room"),
    [
        (Options(), "auto", (1, 4), 3),  # a GPU's share of the smaller node
        (Options(), "cpu", (0, 4), 6),
        (Options(cpus_per_actor=1), "cpu", (0, 1), 24),
        (Options(gpus_per_actor=2), "auto", (2, 4), 1),
    ],
)
def test_sizes_of_actors(options, device, size, room):
    nodes = [on_ray.Node("a", 16, 2), on_ray.Node("b", 8, 1)]
    found = on_ray.actor_size(device, options, nodes)
    assert (found.gpus, found.cpus) == size and found.room(nodes) == room
    with pytest.raises(InputError, match="room for"):
        on_ray.actor_size(device, Options(actors=room + 1, gpus_per_actor=size[0]), nodes[:1])


# Slurm


@pytest.mark.long
def test_submitit(tiny_run, scratch):
    """Two local jobs at a time, interrupted in the middle of a unit as Slurm does before it takes a node
    away; they go on."""
    folder = scratch / "tiny"
    process = start(folder, "--slurm", "local,jobs=2")
    wait_until(lambda: has_parts(folder, ALIGN), process)
    jobs = subprocess.run(
        ["pgrep", "-f", f"submitit.core._submit {folder}-jobs"], capture_output=True, text=True, check=False
    )
    for job in jobs.stdout.split():
        os.kill(int(job), signal.SIGUSR2)
    finish(process)
    assert_computed(folder, tiny_run)
    assert any("Requeued" in log.read_text() for log in (scratch / "tiny-jobs").glob("*_log.*"))


@pytest.fixture()
def slurm(scratch, monkeypatch) -> Path:
    """A folder with the jobs of a Slurm that runs them here."""
    home, programs = scratch / "slurm", scratch / "bin"
    for folder in (home, programs):
        folder.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        path = programs / name
        path.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "fake_slurm.py").read_text())
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    return home


def jobs(run: Path, text: str) -> on_slurm.SlurmEngine:
    return on_slurm.SlurmEngine(TINY.replace(run=str(run)), Options(slurm=text))


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_slurm(count, slurm, copy_run, tiny_run):
    """A stage's units by an array of jobs."""
    run = copy_run(before=SWEEP)
    with started(jobs(run, f"partition=gpu,gpus=1,jobs={count},reservation=night"), run) as compute:
        rows = compute(SWEEP)
    (script,) = [path.read_text() for path in slurm.glob("*.sh")]
    assert ("--array=0-1%2" in script) == (count == 2) and len(rows) == count
    assert "--gpus-per-node=1" in script and "--reservation=night" in script
    joined(run, SWEEP)
    assert_same(run / SWEEP, tiny_run / SWEEP)


def test_slurm_refuses(slurm, copy_run):
    run = copy_run(before=CONFLICT)
    with started(jobs(run, "partition=closed"), run) as compute:
        with pytest.raises(InputError, match="sbatch refused the job .*invalid partition"):
            compute(CONFLICT)
        with pytest.raises(InputError, match="--seed: .*01_calibrate rests on 0, not 1"):
            compute(CONFLICT, seed=1)


def test_scripts(scratch, capsys):
    options = ["--run", str(scratch / "never"), "--preset", "tiny", "--dry-run"]
    launch.main([*options, "--slurm", "partition=gpu,gpus=1,jobs=16,hours=1.5,mem=64GB,reservation=night"])
    output = capsys.readouterr().out
    for line in (
        "array=0-15%16",
        "partition=gpu",
        "gpus-per-node=1",
        "time=90",
        "reservation=night",
        "mem=64GB",
    ):
        assert output.count(f"#SBATCH --{line}") == 1, output
    assert not (scratch / "never").exists()


# Both


def test_process_that_cannot_work(scratch):
    """It sees another launch's folder, or has other packages."""
    call = Call(TINY.replace(run=str(scratch)), SWEEP, ("choices-clean",), "token")
    assert "does not see" in call().error
    (scratch / LAUNCH_LOCK).write_text("token")
    assert f"run `python -m stages.{COMPUTED[0]}" in call().error
    (scratch / LAUNCH_LOCK).write_text("a later one's")
    assert re.search("node .* does not see .*: .* file system", call().error)
    (scratch / LAUNCH_LOCK).write_text("token")
    assert re.search(
        "node .* has torch .*, not 0: use one .venv", replace(call, versions={"torch": "0"})().error
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "one of --ray and --slurm"),
        ("--ray --slurm local", "one of --ray and --slurm"),
        ("--ray 127.0.0.1:1", "nothing answers there"),
        ("--ray --actors -1", "must not be negative"),
        ("--ray --device cuda:1", "an actor has GPUs of its own"),
        ("--ray --shard 1/2", "--shard: a launch shares"),
        ("--ray --nonsense 1", "unknown option --nonsense"),
        ("--slurm partition=gpu", "no srun on this machine"),
        ("--slurm jobs=x", "--slurm jobs=x: key=value"),
        ("--slurm local,partition=gpu", "only jobs, hours and gpus count there, not partition"),
        ("--slurm local,jobs=0", "jobs and hours must be positive"),
        pytest.param(
            "--ray --gpus-per-actor 1",
            r"1 actors of 1 GPUs and \d+ CPUs do not fit: .* 0 GPUs",
            marks=pytest.mark.long,
        ),
        pytest.param("--ray --actors 500", "500 actors of", marks=pytest.mark.long),
    ],
)
def test_bad_input(options, message, scratch):
    """One line, before anything is computed."""
    with pytest.raises(InputError, match=message) as error:
        launch.main(["--preset", "tiny", "--run", str(scratch / "run"), *options.split()])
    assert "\n" not in str(error.value)
    assert not (scratch / "run" / COMPUTED[0]).exists()


@pytest.mark.parametrize("engine", ["--ray", "--slurm"])
def test_not_installed(engine, scratch, monkeypatch):
    monkeypatch.setattr(on_ray, "ray", None)
    monkeypatch.setattr(on_slurm, "submitit", None)
    with pytest.raises(InputError, match=rf"{engine} needs .*requirements-{engine[2:]}.txt"):
        launch.main(["--preset", "tiny", "--run", str(scratch / "run"), engine, "local"])


def test_in_use(scratch):
    with launch.launch_lock(scratch), pytest.raises(InputError, match="is launched already"):
        launch.launch_lock(scratch).__enter__()


def test_doctests():
    assert doctest.testmod(on_slurm).failed == 0
