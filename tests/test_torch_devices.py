"""Torch models over several devices: how layers are spread, and that no operation takes tensors of two.

CUDA refuses such an operation; a CPU is one device whatever its number. So the numbers are kept here: a
tensor that was moved to cpu:1 is known to be there, and so is what is computed from it.
"""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backends
from backends.base import GainRecipe, Recipe, Selection, Task
from backends.core.errors import InputError
from backends.torch import devices
from tests.conftest import LAYERS, assert_records, assert_same, make_examples

FIRST, SECOND = torch.device("cpu:0"), torch.device("cpu:1")


class Apart(TorchDispatchMode):
    """Fails where tensors of two devices meet. Within a backward pass nothing is checked: autograd itself
    moves gradients to where their tensors are."""

    def __init__(self):
        super().__init__()
        self.of = weakref.WeakKeyDictionary()
        self.moves = 0

    def put(self, model: torch.nn.Module, places: dict[str, torch.device]) -> None:
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            (place,) = [place for part, place in places.items() if name.startswith(f"{part}.")]
            self.of[weight.untyped_storage()] = place.index

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = function(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1 or function is torch.ops.aten.copy_.default:
            return found
        wanted = kwargs.get("device")
        places = {self.of.get(tensor.untyped_storage()) for tensor in given if tensor.dim()} - {None}
        if wanted is not None and wanted.index is not None:
            self.moves += bool(places) and places != {wanted.index}
            places = {wanted.index}
        assert len(places) <= 1, f"{function} takes tensors of two devices"
        known = {tensor.untyped_storage() for tensor in given}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and places and tensor.untyped_storage() not in known:
                (self.of[tensor.untyped_storage()],) = places
        return found


class Made(TorchFunctionMode):
    """Records where torch.tensor puts its results, which no dispatch shows."""

    def __init__(self, watched: Apart):
        super().__init__()
        self.watched = watched

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        device = (kwargs or {}).get("device")
        if function is torch.tensor and device is not None and device.index is not None:
            self.watched.of[found.untyped_storage()] = device.index
        return found


@pytest.fixture(params=["qwen2-mqa", pytest.param("llama-gqa", marks=pytest.mark.long)])
def both(request, models, monkeypatch):
    """The model on one device, and with its layers on two, watched."""
    folder = models[request.param]
    single = backends.load("torch", folder, device="cpu")
    monkeypatch.setattr(devices, "at_hand", lambda device: [FIRST, SECOND])
    # It moves weights that are not yet where they belong; cpu:1 calls itself cpu, so it would try for ever.
    monkeypatch.setattr("accelerate.hooks.set_module_tensor_to_device", lambda *_, **__: None)
    two = backends.load("torch", folder, device="cpu", model_parallel=2)
    assert two.device == "cpu x 2" and two.model.places == [FIRST] + [SECOND] * (LAYERS - 1)
    watched = Apart()
    watched.put(two.model.model, two.model.model.hf_device_map)
    with watched, Made(watched):
        yield single, two
    assert watched.moves, "no pass went to the second device"


HEADS = [(layer, head) for layer in range(LAYERS) for head in (0, 3)]


def test_every_verb_is_that_of_one_device(both):
    safe, util, choices = make_examples(5), make_examples(4, seed=1), make_examples(4, seed=1, choices=4)
    for exact in (
        lambda own: own.logits(safe),
        lambda own: own.logits(safe, ablated=(1, 2)),
        lambda own: own.choices(choices),
        lambda own: own.generate(safe, 6),
        lambda own: list(own.sweep_choices(choices, HEADS)),
        lambda own: list(own.sweep_generations(safe, HEADS, 5)),
        lambda own: list(own.sweep_generations(safe, HEADS, 5, "query")),
    ):
        for each, other in zip(*(tree_leaves(exact(backend)) for backend in both), strict=True):
            np.testing.assert_array_equal(each, other)
    for summed in (  # over gradients, in another order
        lambda own: own.gradient_gram(safe[1:], util, folds=2),
        lambda own: own.attribute_neurons(util, None, steps=8).score,
        lambda own: own.attribute_neurons(safe, make_examples(5, seed=4), steps=4).score,
    ):
        each, other = map(summed, both)
        np.testing.assert_allclose(each, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


def test_tuning_is_that_of_one_device(both, scratch):
    """By heads and by neurons: records, adapters, and answers with them."""
    rows, against = make_examples(8), make_examples(6, seed=1)
    tasks = [Task("plain", tuple(rows), tuple(against))]
    neurons = Selection(safety=((0, 1), (2, 3)), utility=((1, 2),))
    heads = Recipe(rank=2, alpha=2.0, lr=0.1, optimizer="pcgrad-symmetric")
    for tune, recipe in (
        (lambda own, recipe: own.tune(rows, HEADS, recipe, against), heads),
        (lambda own, recipe: own.tune_gains(tasks, neurons, recipe), GainRecipe(lr=0.1, batch=4)),
    ):
        folders = [scratch / f"{type(recipe).__name__}-{number}" for number in range(2)]
        runs = [tune(own, replace(recipe, folder=to)) for own, to in zip(both, folders, strict=True)]
        for record, same in zip(*runs, strict=True):
            assert_records(record, same, rel=1e-4)
        tensors, same = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
        for name in tensors:
            np.testing.assert_allclose(tensors[name], same[name], rtol=0, atol=1e-6)
        assert_same(*(own.generate(rows, 4, runs[0].adapter) for own in both))


def test_meeting_tensors_of_two_devices_are_noticed():
    with Apart() as watched, pytest.raises(AssertionError, match="two devices"):
        torch.ones(2).to(FIRST) + torch.ones(2).to(SECOND)
    with watched:
        torch.ones(2).to(FIRST) + torch.ones(2).to(SECOND).to(FIRST)
        assert watched.moves == 1


def test_layers_are_spread_evenly():
    for layers, rest, counts in (
        ([1] * 8, 0, [4, 4]),
        ([1] * 8, 4, [2, 6]),  # the first device holds embedding and output matrix too
        ([1] * 8, 100, [1, 2, 3, 2]),
        ([1] * 3, 0, [1, 1, 1]),
        ([4, 1, 1, 1, 1], 0, [1, 4]),
        ([1] * 5, 0, [5]),
    ):
        named = [torch.device("cuda", index) for index in range(len(counts))]
        found = devices.spread(layers, rest, named)
        assert [found.count(device) for device in named] == counts and found == sorted(found, key=named.index)


def test_as_few_devices_as_hold_the_weights(models, monkeypatch):
    folder = models["llama-gqa"]
    with pytest.raises(
        InputError, match=r"--model-parallel 2: here 1 devices can share .* \(--device cpu: cpu\)"
    ):
        backends.load("torch", folder, device="cpu", model_parallel=2)
    layers, rest = devices.weight_bytes(transformers.AutoConfig.from_pretrained(folder), torch.float32)
    named = [torch.device("cuda", index) for index in range(3)]
    monkeypatch.setattr(devices, "at_hand", lambda device: named)

    def counted(memory: int) -> int:
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return len(set(devices.places(folder, torch.float32, "auto", 0)))

    whole = sum(layers) + rest
    largest = devices.fullest(devices.spread(layers, rest, named), layers, rest)
    memory = (2 * whole, 2 * whole - 1, whole, int(largest / 0.95) + 1)
    assert [counted(each) for each in memory] == [1, 2, 3, 3]
    with pytest.raises(InputError, match="of weights do not fit 3 devices of .* more devices"):
        counted(largest)


def test_auto_is_a_precision(models):
    assert backends.load("torch", models["llama-gqa"], device="cpu", dtype="auto").dtype in (
        "float32",
        "bfloat16",
    )
