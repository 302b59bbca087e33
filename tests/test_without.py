"""Each backend where the other's libraries are not installed: a process that sees all packages but those."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLAX_ALONE = """
import importlib, sys
import numpy as np
import backends
from backends.base import Example, Recipe
for stage in ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate", "06_correlate"):
    importlib.import_module(f"stages.{stage}")
from stages import audit, compare
backend = backends.load("flax", sys.argv[1], device="cpu")
row = Example("a", np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([], np.int32), 8)
assert len(backend.generate([row], 3)) == 1
tuning = backend.tune([row], [(0, 0)], Recipe(rank=2))
list(tuning)
assert backend.logits([row], tuning.adapter).shape == (1, backend.shape.vocab)
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "peft")]
"""


def run(code: str, scratch: Path, hidden: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess:
    """Runs code in a process whose packages are links to this one's, but for the hidden ones."""
    packages = scratch / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = entry.name.lower().split("-")[0].split(".")[0]
        if name not in hidden and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
    )


def test_flax_works_without_torch(models, scratch):
    done = run(FLAX_ALONE, scratch, ("torch", "torchgen", "functorch", "peft"), models["llama-gqa"])
    assert done.returncode == 0, done.stderr


def test_what_needs_torch_says_so(scratch):
    code = "from backends import models; models.local_folder('random/tiny')"
    os.environ["CAST_CACHE"], before = str(scratch / "cache"), os.environ.get("CAST_CACHE")
    try:
        done = run(code, scratch, ("torch", "torchgen", "functorch"))
    finally:
        os.environ.pop("CAST_CACHE")
        if before:
            os.environ["CAST_CACHE"] = before
    assert "InputError: model random/tiny is made with torch, once" in done.stderr


@pytest.mark.parametrize("missing", ["jax", "flax", "optax"])
def test_torch_works_without_jax_and_flax_says_what_to_install(models, scratch, missing):
    code = f"""
import sys
import backends
from backends.core.errors import InputError
assert backends.load("torch", sys.argv[1], device="cpu").shape.layers == 3
try:
    backends.load("flax", sys.argv[1])
except InputError as error:
    assert "needs {missing}, which is not installed" in str(error) and "--backend torch" in str(error)
    sys.exit(0)
sys.exit("no InputError")
"""
    done = run(code, scratch, (missing, f"{missing}lib"), models["llama-gqa"])
    assert done.returncode == 0, done.stderr
