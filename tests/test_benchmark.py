"""The benchmarks run, on a small shape; the sweep agrees with the plain loop, and PCGrad needs no memory."""

import re
import sys

import pytest

from tests import benchmark_sweep, benchmark_tuning
from tests.conftest import BACKENDS


def test_the_benchmark_of_a_random_shape(capsys):
    benchmark_sweep.main(benchmark_sweep.Options(shape="small", prompts=4, tokens=6, layers=2, plain=2))
    done = capsys.readouterr().out
    told = {line.split(":")[0]: line for line in done.splitlines() if "times faster" in line}
    assert told.keys() == {"choices", "responses", "both"}
    for part in ("choices", "responses"):
        assert "8 of 8 outputs equal" in told[part], done
    assert "layer-tokens" in done and "peak memory" in done and "extrapolated" in done


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_pcgrad_takes_hardly_more_memory_than_sft(backend, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # then nothing is held by chance, and once is enough
    benchmark_tuning.main(benchmark_tuning.Options(backend=backend, steps=0, repeats=1, accumulation=1))
    done = capsys.readouterr().out
    told = re.findall(r"^(\S+): memory (\d+) MiB, (\S+) of sft's", done, re.MULTILINE)
    assert [name for name, _, _ in told] == ["sft", "pcgrad", "pcgrad-symmetric"]
    # LoRA's gradients, what PCGrad keeps more of, are 0.4 MiB of this shape.
    assert int(told[0][1]) > 50, "activations must dominate, or the ratio says nothing"
    assert all(float(ratio) < 1.15 for _, _, ratio in told), done
