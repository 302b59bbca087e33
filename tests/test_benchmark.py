"""The benchmarks run, on a small shape; the sweep agrees with the plain loop."""

import re
import sys

import pytest

from tests import benchmark_sweep, benchmark_tuning
from tests.conftest import BACKENDS


def test_the_benchmark_of_a_random_shape(capsys):
    benchmark_sweep.main(benchmark_sweep.Options(shape="small", prompts=4, tokens=6, layers=2, plain=2))
    lines = capsys.readouterr().out
    assert lines.count("8 of 8 outputs equal") == 2 and "both: sweep" in lines, lines


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_benchmark_of_tuning(backend, capsys):
    benchmark_tuning.main(benchmark_tuning.Options(backend=backend, tokens=64, steps=1))
    lines = capsys.readouterr().out
    for optimizer in benchmark_tuning.OPTIMIZERS:
        for what in (r"memory [1-9]\d* MiB", ".* s a step"):
            assert re.search(rf"^{optimizer}: {what}", lines, re.MULTILINE), lines
