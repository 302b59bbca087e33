"""Runs whose units are computed by Ray's actors or submitit's jobs end in the files of a plain run."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.errors import InputError
from stages import artifacts, launch, presets
from stages.launching import on_ray, on_slurm
from tests.conftest import ROOT
from tests.test_stages import SETTINGS, STAGES, contents, run

ray = pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
pytest.importorskip("submitit", reason="requirements-slurm.txt is not installed")

FIELDS = ("benchmarks", "arms", "align_rows", "sweep_tokens")
OPTIONS = [
    word
    for name in FIELDS
    for value in [getattr(SETTINGS, name)]
    for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,)))
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run by one process."""
    return computed(run(tmp_path_factory.mktemp("plain") / "tiny"))


def computed(folder: Path) -> dict[str, bytes]:
    """What stages 01 to 05 made."""
    return {path: data for path, data in contents(folder).items() if path.split("/")[0] in STAGES}


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
    command = [sys.executable, "-m", "stages.launch", "--preset", "tiny", "--run", str(folder)]
    return subprocess.Popen(
        [*command, *OPTIONS, *engine],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return told


def wait_until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits for a state of a run that is still going on."""
    while not there():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def units_done(folder: Path, stage: str) -> int:
    return len(list((folder / stage / "parts").glob("*.parquet")))


def test_three_nodes(cluster, plain, scratch):
    told = finish(start(scratch / "tiny", "--ray", cluster.address))
    assert computed(scratch / "tiny") == plain
    assert "3 of 3 actors of 0 GPUs and 1 CPUs on 3 nodes" in told
    rows = re.findall(r"^\S+ \w{6} +(\d+) +(\d+) +\d+ s +\d+ s +(\d+)$", told, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "1", "1"] and all(row[2] == "0" for row in rows)
    units = 1 + 2 * 4 + 4 + 5 * 6  # gradients; choices and responses of 3 layers and clean; arms; benchmarks
    assert sum(int(row[1]) for row in rows) == units
    assert "audit of" in told and " 0 failed" in told


def test_node_and_driver_lost(cluster, plain, scratch):
    """A node goes in the middle of the sweep, later the driver, which is started again."""
    folder = scratch / "tiny"
    process = start(folder, "--ray", cluster.address)
    wait_until(lambda: units_done(folder, "03_sensitivity") > 0, process)
    assert not (folder / "03_sensitivity" / artifacts.MANIFEST).exists()
    cluster.remove_node(cluster.others.pop(), allow_graceful=False)
    wait_until(lambda: units_done(folder, "04_align") > 0, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "04_align" / artifacts.MANIFEST).exists()
    # Two: for a third it would wait as long as Ray has not missed the node.
    told = finish(start(folder, "--ray", cluster.address, "--actors", "2"))
    assert computed(folder) == plain
    assert "2 of 2 actors" in told


class Dies(on_ray.Worker):
    """An actor whose process ends, or whose stage fails, at a certain unit."""

    def make(self, name, units):
        if name == "03_sensitivity" and units and (unit := os.environ["DIES_AT"]) in units:
            if os.environ["DIES_BY"] == "signal":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"no {unit}")
        return super().make(name, units)


@pytest.mark.parametrize("how", ["signal", "error"])
def test_unit_that_always_fails(how, scratch, monkeypatch):
    """It is tried three times, then named; the rest is kept."""
    monkeypatch.setattr(on_ray, "Worker", Dies)
    monkeypatch.setattr(on_ray, "PASSED", ("DIES_AT", "DIES_BY"))
    monkeypatch.setenv("DIES_AT", "choices-layer002")
    monkeypatch.setenv("DIES_BY", how)
    run(scratch / "tiny", names=STAGES[:2])
    settings = dataclasses.replace(SETTINGS, run=str(scratch / "tiny"))
    engine = on_ray.RayEngine(settings, on_ray.HERE, None, 1, 1)
    try:
        why = "its process died" if how == "signal" else "ValueError: no choices-layer002"
        with pytest.raises(InputError, match=rf"unit \S+ of 03_sensitivity failed 3 times: {why}"):
            engine.run("03_sensitivity")
    finally:
        engine.close()


def test_submitit(plain, scratch):
    """Two local jobs at a time, interrupted in the middle of a unit as Slurm does before it takes a node
    away; they go on."""
    folder = scratch / "tiny"
    process = start(folder, "--slurm", "local,jobs=2")
    wait_until(lambda: units_done(folder, "04_align") > 0, process)
    jobs = subprocess.run(
        ["pgrep", "-f", f"submitit.core._submit {folder}-jobs"], capture_output=True, text=True, check=False
    )
    for job in jobs.stdout.split():
        os.kill(int(job), signal.SIGUSR2)
    told = finish(process)
    assert computed(folder) == plain
    assert re.search(r"04_align +2 +0", told), told
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


def test_slurm(slurm, plain, scratch):
    """A stage as an array of two jobs and one that joins them."""
    folder = run(scratch / "tiny", names=STAGES[:1])
    settings = dataclasses.replace(SETTINGS, run=str(folder))
    engine = on_slurm.SlurmEngine(settings, "partition=gpu,gpus=1,jobs=2,reservation=night")
    engine.run(STAGES[1])
    scripts = [path.read_text() for path in sorted(slurm.glob("*.sh"))]
    assert ["--array=0-1%2" in script for script in scripts] == [True, False]
    assert all("--gpus-per-node=1" in script and "--reservation=night" in script for script in scripts)
    made = {path for path in plain if path.startswith(STAGES[1])}
    assert made and {path: computed(folder)[path] for path in made} == {path: plain[path] for path in made}
    assert engine.told()[1].split()[:3] == [STAGES[1], "2", "0"]


def test_slurm_refuses(slurm, scratch):
    folder = run(scratch / "tiny", names=STAGES[:1])
    settings = dataclasses.replace(SETTINGS, run=str(folder))
    with pytest.raises(InputError, match="sbatch refused the job .*invalid partition"):
        on_slurm.SlurmEngine(settings, "partition=closed").run(STAGES[1])
    other = dataclasses.replace(settings, seed=settings.seed + 1, folds=2)
    run(scratch / "tiny", names=STAGES[1:2])
    with pytest.raises(InputError, match="made with other settings"):
        on_slurm.SlurmEngine(other, "partition=gpu").run(STAGES[1])


def test_scripts(scratch, capsys):
    options = ["--run", str(scratch / "never"), "--preset", "tiny", "--dry-run"]
    launch.main([*options, "--slurm", "partition=gpu,gpus=1,jobs=16,hours=1.5,mem=64GB,reservation=night"])
    told = capsys.readouterr().out
    assert told.count("#!/bin/bash") == 4
    for line in ("array=0-15%16", "partition=gpu", "gpus-per-node=1", "time=90", "reservation=night"):
        assert told.count(f"#SBATCH --{line}") == 4, told
    assert not (scratch / "never").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "one of --ray and --slurm"),
        ("--ray 127.0.0.1:1", "nothing answers there"),
        ("--ray --gpus-per-actor 1", r"1 actors of 1 GPUs and \d+ CPUs do not fit: .* 0 GPUs"),
        ("--ray --actors 500", "500 actors of"),
        ("--ray --device cuda:1", "an actor has GPUs of its own"),
        ("--ray --shard 1/2", "--shard: a launch shares"),
        ("--ray --nonsense 1", "unknown option --nonsense"),
        ("--slurm partition=gpu", "no srun on this machine"),
        ("--slurm jobs=x", "--slurm jobs=x: key=value"),
        ("--slurm local,partition=gpu", "only jobs, hours and gpus count there, not partition"),
        ("--slurm local,jobs=0", "jobs and hours must be positive"),
    ],
)
def test_bad_input(options, told, scratch):
    """One line, before anything is computed."""
    with pytest.raises(InputError, match=told) as error:
        launch.main(["--preset", "tiny", "--run", str(scratch / "run"), *options.split()])
    assert "\n" not in str(error.value)
    assert not (scratch / "run" / "01_calibrate").exists()


def test_no_cluster_here(scratch, monkeypatch):
    """As Ray says it; in truth another test's cluster may be on this machine."""

    def nothing(address, **options):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(on_ray.ray, "init", nothing)
    with pytest.raises(InputError, match="--ray auto: no Ray there .Could not find any running Ray instance"):
        launch.main(["--preset", "tiny", "--run", str(scratch / "run"), "--ray", "auto"])


@pytest.mark.parametrize("engine", ["--ray", "--slurm"])
def test_not_installed(engine, scratch, monkeypatch):
    monkeypatch.setattr(on_ray, "ray", None)
    monkeypatch.setattr(on_slurm, "submitit", None)
    with pytest.raises(InputError, match=rf"{engine} needs .*requirements-{engine[2:]}.txt"):
        launch.main(["--preset", "tiny", "--run", str(scratch / "run"), engine, "local"])


def test_other_version(cluster, scratch):
    """A driver of another version than the cluster's."""
    program = "import ray, sys; ray.__version__ = '1.0'; from stages import cli, launch; "
    program += "cli.guarded(lambda: launch.main(sys.argv[1:]))"
    options = ["--preset", "tiny", "--run", str(scratch / "run"), "--ray", cluster.address]
    process = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: --ray") and process.stderr.count("\n") == 1, process.stderr
    assert "another version of Ray" in process.stderr


def test_actor_that_cannot_work():
    settings = presets.preset_settings("tiny")
    good = on_ray.Hello("a 123456", on_ray.package_versions(), True)
    on_ray.check(good, settings)
    with pytest.raises(InputError, match="node a 123456 does not see outputs/tiny: .* file system"):
        on_ray.check(good._replace(sees=False), settings)
    with pytest.raises(InputError, match="node a 123456 has torch 0, here it is"):
        on_ray.check(good._replace(versions=good.versions | {"torch": "0"}), settings)


def test_in_use(scratch):
    with launch.alone(scratch), pytest.raises(InputError, match="is launched already"), launch.alone(scratch):
        pass
