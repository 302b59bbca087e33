"""Shared fixtures: tiny random models of every handled kind, and examples for them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as backends does, and before torch is imported here
# Flax tests of random models mostly compile, and LLVM's passes are a third of that; where a result is held to
# the tolerances of a run, programs are compiled as users' are (`optimized`).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import backends  # noqa: E402
from backends import models as folders  # noqa: E402
from backends.base import Backend, Example  # noqa: E402
from backends.core.errors import InputError  # noqa: E402
from tests import reference  # noqa: E402
from tests.families import (  # noqa: E402
    FAMILIES,
    HEAD_DIM,  # noqa: F401 (tests take all sizes from here)
    HEADS,
    KINDS,
    LAYERS,
    VOCABULARY,
    write_family,
    write_model,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.utils.logging.disable_progress_bar()

pytest_plugins = ["tests.public_sets", "tests.runs"]

BACKENDS = ["torch", "flax"]
COMPILED = {
    "llama-gqa": (),  # scaled rotary embedding and a tied matrix
    "qwen2-mha": pytest.mark.long,
    "qwen2-mqa": (),  # biases and mixed windows
    "qwen3-gqa": (),  # norms of queries and keys
    "mistral-mqa": pytest.mark.long,
}
"""marks of the kinds where Flax compiles for each"""
ALL_HEADS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """JAX compiles with all optimizations, as it does for users."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class Pair(NamedTuple):
    """A backend, and the model that transformers loads from the same folder."""

    backend: Backend
    plain: transformers.PreTrainedModel


def load_pair(name: str, folder: Path, dtype: str = "float32") -> Pair:
    return Pair(backends.load(name, folder, device="cpu", dtype=dtype), reference.load(folder))


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets JAX's compiled programs after a test that leaves many: each takes 20 memory maps or more, and a
    process that reaches vm.max_map_count (65,530 by default) dies."""
    yield
    maps = Path("/proc/self/maps")  # Linux only, as is the limit
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture(
    scope="session",
    params=[
        *(pytest.param(("torch", kind), id=f"torch-{kind}") for kind in KINDS),
        *(pytest.param(("torch", kind), id=f"torch-{kind}", marks=pytest.mark.long) for kind in FAMILIES),
        *(pytest.param(("flax", kind), id=f"flax-{kind}", marks=marks) for kind, marks in COMPILED.items()),
    ],
)
def pair(request, models, tmp_path_factory) -> Pair:
    """Either backend on every kind of model."""
    name, kind = request.param
    return load_pair(name, models.get(kind) or write_family(tmp_path_factory.mktemp("family") / kind, kind))


@pytest.fixture(scope="session", params=BACKENDS)
def gqa(request, models) -> Pair:
    """Either backend on one model."""
    return load_pair(request.param, models["llama-gqa"])


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=marks) for kind, marks in COMPILED.items()])
def both(request, models) -> list[Backend]:
    """Torch and Flax on one model, of every kind."""
    return [backends.load(name, models[request.param], device="cpu") for name in BACKENDS]


@pytest.fixture(params=BACKENDS)
def own(request, models) -> Backend:
    """A backend of the test's own, which it may leave changed."""
    return backends.load(request.param, models["llama-gqa"], device="cpu")


def edited(models, scratch: Path, **config) -> Path:
    """A copy of the llama-gqa folder with other values in its config.json and generation_config.json."""
    folder = scratch / "edited"
    shutil.copytree(models["llama-gqa"], folder)
    for file in ("config.json", "generation_config.json"):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes tensors of a safetensors file in place."""
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def make_examples(count: int, seed: int = 0, shared: int = 5, choices: int = 0) -> list[Example]:
    """Rows of unequal length with a common prefix of `shared` tokens (and one duplicate)."""
    generator = np.random.default_rng(seed)
    prefix = generator.integers(3, VOCABULARY, shared)
    examples = []
    for number in range(count):
        own = generator.integers(3, VOCABULARY, 2 + int(generator.integers(0, 9)))
        prompt = np.concatenate([prefix, own]).astype(np.int32)
        if number == count - 1 and count > 2:
            prompt = examples[0].prompt_ids
        target = generator.integers(3, VOCABULARY, 1 + int(generator.integers(0, 4))).astype(np.int32)
        candidates = generator.choice(np.arange(3, VOCABULARY), choices, replace=False).astype(np.int32)
        answer = 0 if choices else int(target[0])
        examples.append(Example(f"e{number}", prompt, target, candidates, answer))
    return examples


def run_apart(code: str, *arguments: object, **environment: str) -> str:
    """What code prints in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_records(found: dict, expected: dict, rel: float, abs: float = 1e-12) -> None:
    """Records of a step of tuning: the same heads drawn, the same numbers but for rounding."""
    assert found["drawn"] == expected["drawn"]
    found, expected = ({**own, "drawn": 0} for own in (found, expected))
    assert found == pytest.approx(expected, rel=rel, abs=abs, nan_ok=True)


def assert_same(found, expected) -> None:
    """Lists of int32 arrays."""
    assert len(found) == len(expected)
    for tokens, wanted in zip(found, expected, strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, wanted)


@pytest.fixture(scope="session")
def smollm():
    """Folder of the embedded model, if this machine has it already or may fetch it; else the test skips."""
    try:
        return folders.local_folder(folders.EMBEDDED)
    except InputError as error:
        pytest.skip(f"the embedded model is not here: {error}")


@pytest.fixture(autouse=True, scope="session")
def temporary():
    """Temporary files go into a folder that goes with the tests: adapters that are given no folder stay."""
    with tempfile.TemporaryDirectory(prefix="cast-tests-") as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        yield
        tempfile.tempdir = before


@pytest.fixture()
def scratch():
    with tempfile.TemporaryDirectory(prefix="cast-test-") as folder:
        yield Path(folder)
