"""What sharing a sweep out costs: the work of Ray's actors beside that of one process, on the embedded model.

    python -m tests.benchmark_launch --actors 2

Stages 01 and 02 run once; then stage 03 is made by processes of one core, and shared out to as many actors of
one core each, on copies of the run. The processes do not share anything out, each makes all of it: they run
beside each other because cores that share memory's bandwidth take more processor time, whoever uses them.
Each call of an actor computes the clean pass up to its first layer again. All sweeps must be equal, byte for
byte.
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


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(prefix="cast-benchmark-") as scratch:
        begun, shared = Path(scratch, "begun"), Path(scratch, "shared")
        alone = [Path(scratch, f"alone{number}") for number in range(options.actors)]
        settings = dataclasses.replace(
            presets.preset_settings("smollm"),
            run=str(begun),
            pairs=0,
            neurons=(),
            **{name: getattr(options, name) for name in ("util_rows", "safe_rows", "sweep_tokens", "dtype")},
        )
        for earlier in ("01_calibrate", "02_conflict"):
            importlib.import_module(f"stages.{earlier}").main(settings)
        for folder in (*alone, shared):
            shutil.copytree(begun, folder)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", ALONE, "--run", str(folder)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for folder in alone
        ]
        told = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            sys.exit("a process failed: see above")
        took = [[float(number) for number in text.splitlines()[-1].split()[1:]] for text in told]
        wall, work = (sum(each) / len(took) for each in zip(*took, strict=True))
        print(
            f"processes beside each other: {', '.join(f'{one[1]:.0f}' for one in took)} s of processor time"
        )
        engine = RayEngine(dataclasses.replace(settings, run=str(shared)), HERE, None, 1, options.actors)
        try:
            engine.start()
            began = time.monotonic()
            engine.run(NAME)
            shared_wall = time.monotonic() - began
            print("\n".join(engine.told()))
            spent = sum(one.work for one in engine.nodes.values())
        finally:
            engine.close()
        for table in ("sweep_choices.parquet", "sweep_generations.parquet", "heads.parquet"):
            for folder in alone:
                assert (folder / NAME / table).read_bytes() == (shared / NAME / table).read_bytes(), table
    print(f"a process beside the others: {work:.0f} s of processor time, {wall:.0f} s")
    print(f"{options.actors} actors: {spent:.0f} s of processor time, {shared_wall:.0f} s")
    print(f"work {spent / work:.3f} of such a process, time {shared_wall / wall:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
