"""What sharing a sweep out costs: the work of Ray's actors beside that of one process, on the embedded model.

    python -m tests.benchmark_launch --actors 2

Stages 01 and 02 run once; then stage 03 is made on copies of the run: by a process of one core that has the
machine to itself, by as many such processes as there are actors, each of which makes all of it, and by actors
of one core each that share it out. Cores that share memory's bandwidth take more processor time when both are
used, whoever uses them: what whole processes need beside each other says how much of the actors' work that
is. All sweeps must be equal, byte for byte.
"""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages import presets
from stages.launching.on_ray import HERE, RayEngine
from tests.conftest import ROOT

NAME = "03_sensitivity"
ALONE = """
import importlib, sys, time
from stages import presets
settings = presets.parse(sys.argv[1:])
wall, work = time.monotonic(), time.process_time()
importlib.import_module("stages.03_sensitivity").main(settings)
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
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process failed: see above")
    took = [[float(number) for number in text.splitlines()[-1].split()[1:]] for text in told]
    wall, work = (sum(each) / len(took) for each in zip(*took, strict=True))
    return wall, work


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as scratch:
        begun, shared = Path(scratch, "begun"), Path(scratch, "shared")
        alone, *beside = whole = [Path(scratch, f"whole{number}") for number in range(options.actors + 1)]
        settings = dataclasses.replace(
            presets.preset_settings("smollm"),
            run=str(begun),
            pairs=0,
            neurons=(),
            **{name: getattr(options, name) for name in ("util_rows", "safe_rows", "sweep_tokens", "dtype")},
        )
        for earlier in ("01_calibrate", "02_conflict"):
            importlib.import_module(f"stages.{earlier}").main(settings)
        for folder in (*whole, shared):
            shutil.copytree(begun, folder)
        took = {
            "one process alone": processes([alone]),
            f"each of {len(beside)} processes beside each other": processes(beside),
        }
        engine = RayEngine(dataclasses.replace(settings, run=str(shared)), HERE, None, 1, options.actors)
        try:
            engine.start()
            began = time.monotonic()
            engine.run(NAME)
            wall = time.monotonic() - began
            print("\n".join(engine.told()))
            work = sum(one.work for one in engine.nodes.values())
        finally:
            engine.close()
        for table in ("sweep_choices.parquet", "sweep_generations.parquet", "heads.parquet"):
            for folder in whole:
                assert (folder / NAME / table).read_bytes() == (shared / NAME / table).read_bytes(), table
    print(f"{options.actors} actors: {work:.0f} s of processor time, {wall:.0f} s")
    for who, (its_wall, its_work) in took.items():
        print(
            f"{who}: {its_work:.0f} s of processor time, {its_wall:.0f} s; the actors take "
            f"{work / its_work:.3f} of the work and {wall / its_wall:.3f} of the time"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
