"""The benchmarks run, on a small shape; the sweep agrees with the plain loop, and PCGrad needs no memory."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import BACKENDS, ROOT


def test_the_benchmark_of_a_random_shape():
    options = ["--shape", "small", "--prompts", "4", "--tokens", "6", "--layers", "2", "--plain", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmark_sweep", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = {line.split(":")[0]: line for line in done.stdout.splitlines() if "times faster" in line}
    assert told.keys() == {"choices", "responses", "both"}
    for part in ("choices", "responses"):
        assert "8 of 8 outputs equal" in told[part], done.stdout
    assert "layer-tokens" in done.stdout and "peak memory" in done.stdout and "extrapolated" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_pcgrad_takes_hardly_more_memory_than_sft(backend):
    # Once: with one thread nothing is held by chance.
    options = ["--backend", backend, "--shape", "small", "--tokens", "256", "--steps", "0", "--repeats", "1"]
    options += ["--accumulation", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmark_tuning", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^(\S+): memory (\d+) MiB, (\S+) of sft's", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in told] == ["sft", "pcgrad", "pcgrad-symmetric"]
    # LoRA's gradients, what PCGrad keeps more of, are 0.4 MiB of this shape.
    assert int(told[0][1]) > 50, "activations must dominate, or the ratio says nothing"
    assert all(float(ratio) < 1.15 for _, _, ratio in told), done.stdout
