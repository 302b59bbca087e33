"""Run by a process that sees four devices: a mesh of them answers as one device does, and holds less.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.four_devices FOLDER PARTS VERBS
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import backends
from backends.base import Backend, GainRecipe, Recipe, Selection, Task
from tests.conftest import assert_same, make_examples

ROWS, CHOICES, HEADS = make_examples(9), make_examples(8, choices=4), [(0, 1), (1, 2), (1, 3), (2, 0)]


def held(backend: Backend) -> list[int]:
    """Bytes of weights on each device."""
    weights = jax.tree.leaves(backend.model.weights)
    shards = [shard for weight in weights for shard in weight.addressable_shards]
    return [sum(s.data.nbytes for s in shards if s.device == at) for at in backend.model.mesh.devices.flat]


def matrices(backend: Backend) -> int:
    """Bytes of the matrices of layers that every mesh cuts: W_q, W_o and the MLP's."""
    layers = backend.model.weights["layers"]
    own = [layers["attention"][name] for name in ("query", "output")]
    own += [layers["mlp"][name] for name in ("gate", "up", "down")]
    return sum(part["kernel"][...].nbytes for part in own)


def tokens(backend: Backend) -> list[np.ndarray]:
    swept = backend.sweep_generations(ROWS, HEADS, 8)
    return [
        *backend.generate(ROWS, 8),
        *(tokens for _, found in swept for tokens in found),
        backend.choices(CHOICES)[0],
        *(found for _, found in backend.sweep_choices(ROWS, HEADS, "query")),
    ]


def logits(backend: Backend) -> list[np.ndarray]:
    return [backend.logits(ROWS)]


def gradients(backend: Backend) -> list[np.ndarray]:
    found = backend.head_gradients(CHOICES, ROWS[:8], 2)
    return [found.gram, found.gate_safe, found.gate_util]


def grades(backend: Backend) -> list[np.ndarray]:
    return [backend.grade(ROWS).outcome, *(found for _, found in backend.sweep_grades(ROWS, HEADS))]


def neurons(backend: Backend) -> list[np.ndarray]:
    return [backend.attribute_neurons(ROWS[:2], steps=4).score]


def gains(backend: Backend) -> list[np.ndarray]:
    task, chosen = Task("all", tuple(ROWS[:4]), tuple(ROWS[4:])), Selection(((0, 1), (2, 3)), ((1, 5),))
    run = backend.tune_gains([task], chosen, GainRecipe(lr=0.2, batch=4, epochs=2))
    return [np.array([step["loss"] for step in run]), backend.logits(ROWS, run.adapter)]


def tuned(backend: Backend) -> list[np.ndarray]:
    recipe = Recipe(rank=4, alpha=8.0, lr=1e-2, batch=4, accumulation=2, optimizer="pcgrad")
    run = backend.tune(ROWS, HEADS, recipe, CHOICES)
    return [np.array([step["loss"] for step in run]), backend.logits(ROWS, run.adapter)]


RELATIVE: dict[Callable, float] = {gradients: 1e-6, grades: 1e-5, neurons: 1e-4, gains: 1e-4}
"""how far a mesh may be from one device, relative to the largest number"""
ABSOLUTE: dict[Callable, tuple[float, ...]] = {logits: (3e-5,), tuned: (1e-5, 1e-4)}
"""how far each array of a verb may be"""


def apart(verb: Callable, expected: list[np.ndarray]) -> list[float]:
    """How far each array may be."""
    if verb in ABSOLUTE:
        return list(ABSOLUTE[verb])
    return [RELATIVE[verb] * np.abs(values).max() for values in expected]


def main(folder: Path, parts: int, every: bool) -> None:
    one = backends.load("flax", folder, device="cpu:0")
    four = backends.load("flax", folder, device="cpu", model_parallel=parts)
    assert four.device == f"cpu x 4 (data {4 // parts}, model {parts})", four.device
    query = four.model.weights["layers"]["attention"]["query"]["kernel"][...]
    assert {shard.data.shape[2] for shard in query.addressable_shards} == {4 // parts}, "heads are cut"
    (whole,), each = held(one), held(four)
    cut = matrices(one)
    print(f"bytes of weights on a device: {whole} on one, {each} on four of which {parts} share a copy")
    assert len(set(each)) == 1 and cut > whole / 2 and each[0] <= whole - cut * (1 - 1 / parts)
    for verb in (*ABSOLUTE, *RELATIVE) if every else (logits,):
        expected = verb(one)
        for found, value, bound in zip(verb(four), expected, apart(verb, expected), strict=True):
            np.testing.assert_allclose(found, value, rtol=0, atol=bound, err_msg=verb.__name__)
    if every:
        assert_same(tokens(four), tokens(one))
        list(four.sweep_generations(ROWS, HEADS, 8))
        keys = four.kept._made.streams[0].kept[1].keys
        cut = 4 // parts * (parts if four.shape.kv_heads % parts == 0 else 1)
        each = {shard.data.nbytes for shard in keys.addressable_shards}
        print(f"bytes of a sweep's clean keys: {keys.nbytes}, of them {each} on each device")
        assert each == {keys.nbytes // cut}, "caches are cut"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "every")
