"""Each backend where the other's libraries are not installed: a process that finds all packages but those."""

from tests.conftest import run_apart

HIDE = """
import sys
from importlib.machinery import PathFinder
class Visible(PathFinder):
    hidden = set(sys.argv[2].split())
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
import backends
from backends.core.errors import InputError
def refusal(call, *arguments):
    try:
        call(*arguments)
    except InputError as error:
        return str(error)
"""
FLAX_ALONE = """
import importlib, os
import numpy as np
from backends import models
from backends.base import Example, Recipe
for stage in ("01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate", "06_correlate"):
    importlib.import_module(f"stages.{stage}")
from stages import audit, compare, export
backend = backends.load("flax", sys.argv[1], device="cpu")
row = Example("a", np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([], np.int32), 8)
assert len(backend.generate([row], 3)) == 1
tuning = backend.tune([row], [(0, 0)], Recipe(rank=2))
list(tuning)
assert backend.logits([row], tuning.adapter).shape == (1, backend.shape.vocab)
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "peft")]
os.environ["CAST_CACHE"] = sys.argv[3]  # where that model was never made
assert "model random/tiny is made with torch, once" in refusal(models.local_folder, "random/tiny")
"""
TORCH_ALONE = """
assert backends.load("torch", sys.argv[1], device="cpu").shape.layers == 3
assert not [name for name in sys.modules if name.split(".")[0] in ("jax", "flax", "optax")]
for missing in ("jax", "flax", "optax"):  # each alone
    Visible.hidden = {missing}
    message = refusal(backends.load, "flax", sys.argv[1])
    assert f"needs {missing}, which is not installed" in message and "--backend torch" in message
"""


def test_flax_works_without_torch_and_what_needs_torch_says_so(models, scratch):
    hidden = "torch torchgen functorch peft"
    run_apart(HIDE + FLAX_ALONE, models["llama-gqa"], hidden, scratch)


def test_torch_works_without_jax_and_flax_says_what_to_install(models):
    run_apart(HIDE + TORCH_ALONE, models["llama-gqa"], "jax jaxlib flax optax")
