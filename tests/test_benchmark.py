"""The benchmark of the sweep runs, on a small shape, and its sweep and plain loop agree."""

import subprocess
import sys

from tests.conftest import ROOT


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
