"""The benchmarks run, on a small shape; the sweep agrees with the plain loop."""

import re
import sys

import pytest

from tests import benchmark_sweep, benchmark_tuning
from tests.conftest import BACKENDS


def test_the_benchmark_of_a_random_shape(capsys):
    benchmark_sweep.main(benchmark_sweep.Options(shape="small", prompts=4, tokens=6, layers=2, plain=2))
    lines = capsys.readouterr().out
    assert lines.count("8 of 8 outputs equal") == 2, lines
    assert re.findall(r"^(\w+): .*times faster", lines, re.MULTILINE) == ["choices", "responses", "both"]
    assert "layer-tokens" in lines and "peak memory" in lines and "extrapolated" in lines


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_benchmark_of_tuning(backend, capsys):
    benchmark_tuning.main(benchmark_tuning.Options(backend=backend, steps=1, repeats=1, accumulation=1))
    lines = capsys.readouterr().out
    for optimizer in ("sft", "pcgrad", "pcgrad-symmetric"):
        assert re.search(rf"^{optimizer}: memory [1-9]\d* MiB", lines, re.MULTILINE), lines
        assert re.search(rf"^{optimizer}: .* s a step", lines, re.MULTILINE), lines
