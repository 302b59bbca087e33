"""What sharing a sweep out costs: the work of Ray's actors beside that of one process, on the embedded model.

    python -m tests.benchmark_launch --actors 2

Stages 01 and 02 run once; then stage 03 is made on copies of the run: by a process of one core that has the
machine to itself, by as many such processes as there are actors, each of which makes all of it, and by actors
of one core each that share it out. Cores that share memory's bandwidth take more processor time when both are
used, whoever uses them: what whole processes need beside each other says how much of the actors' work that
is. All sweeps must be equal, byte for byte.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.run.pipeline import STAGES, make
from stages.run.presets import preset_settings
from stages.scale.engine import LOCAL, share_out
from stages.scale.engine import Options as Launch
from stages.scale.launch import launch_lock
from stages.scale.on_ray import RayEngine
from tests.conftest import ROOT
from tests.runs import assert_same, make_run

SWEEP = STAGES[2]
ALONE = f"""
import time
from stages.run import pipeline, presets
settings = presets.parse()
wall, work = time.monotonic(), time.process_time()
pipeline.make({SWEEP!r}, settings)
print("took", time.monotonic() - wall, time.process_time() - work)
"""


@dataclass
class Options:
    actors: int = 2
    util_rows: int = 16
    safe_rows: int = 8
    sweep_tokens: int = 16
    dtype: str = "float32"


def processes(folders: list[Path]) -> tuple[float, float]:
    """Each makes all of stage 03, beside the others. Mean seconds of the clock, and of processors."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, "--run", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process failed: see above")
    took = [[float(number) for number in output.splitlines()[-1].split()[1:]] for output in outputs]
    wall, work = (sum(each) / len(took) for each in zip(*took, strict=True))
    return wall, work


def main(options: Options) -> None:
    sizes = {name: getattr(options, name) for name in ("util_rows", "safe_rows", "sweep_tokens", "dtype")}
    settings = preset_settings("smollm").replace(pairs=0, neurons=(), **sizes)
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as scratch:
        begun = make_run(Path(scratch, "begun"), settings, STAGES[:2])
        names = ["shared", "alone", *(f"whole{number}" for number in range(options.actors))]
        shared, alone, *beside = (Path(shutil.copytree(begun, Path(scratch, name))) for name in names)
        took = {
            "one process alone": processes([alone]),
            f"each of {len(beside)} processes beside each other": processes(beside),
        }
        launch = Launch(ray=LOCAL, cpus_per_actor=1, actors=options.actors)
        own = settings.replace(run=str(shared))
        engine = RayEngine(own, launch)
        with launch_lock(shared):
            try:
                engine.start()
                began = time.monotonic()
                work = sum(row["work"] for row in share_out(engine, SWEEP, own))
            finally:
                engine.close()
        worked = time.process_time()
        make(SWEEP, own)  # joins the units
        wall, work = time.monotonic() - began, work + time.process_time() - worked
        for folder in (alone, *beside):
            assert_same(folder / SWEEP, shared / SWEEP)
    print(f"{options.actors} actors: {work:.0f} s of processor time, {wall:.0f} s")
    for who, (its_wall, its_work) in took.items():
        print(
            f"{who}: {its_work:.0f} s of processor time, {its_wall:.0f} s; the actors take "
            f"{work / its_work:.3f} of the work and {wall / its_wall:.3f} of the time"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
