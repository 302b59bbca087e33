"""Gradients of heads with an adapter in place, both backends: those of the merged model, float32."""

import dataclasses

import numpy as np
import pytest
import torch

from backends.base import GainRecipe, Recipe, Selection, Task
from tests import reference
from tests.conftest import ALL_HEADS, HEAD_DIM, change_tensors, make_examples
from tests.test_graded import plain_grade

SAFE, UTIL = make_examples(4, seed=1), make_examples(4, seed=2, choices=3)
FOLDS = 2


def lora(own, folder):
    """An adapter whose rows of B are large enough for a mistake to show."""
    recipe = Recipe(rank=2, alpha=4.0, lr=0.1, batch=4, accumulation=1, folder=folder)
    assert list(own.tune(SAFE, [(0, 1), (2, 3)], recipe))

    def scatter(tensors):
        for tensor in (tensor for name, tensor in tensors.items() if "lora_B" in name):
            tensor[tensor != 0] = np.random.default_rng(0).normal(size=(tensor != 0).sum())

    change_tensors(folder / "adapter_model.safetensors", scatter)


def gains(own, folder):
    task = Task("all", tuple(SAFE), tuple(make_examples(4, seed=5)))
    recipe = GainRecipe(lr=0.5, batch=4, folder=folder)
    assert list(own.tune_gains([task], Selection(((0, 1), (1, 7)), ((2, 3),)), recipe))


def merged_gradients(model, mask: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gram, and gates of both sides, of a plain model, a row and a head at a time, in float64."""
    gate, means = torch.ones((), requires_grad=True, dtype=torch.float64), []
    with reference.doubled(model):
        weights = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in model.model.layers]
        for rows in (SAFE, UTIL):
            for fold in range(FOLDS):
                losses = []
                for row in rows[fold::FOLDS]:
                    target = dataclasses.replace(row, choice_ids=row.choice_ids[:0])  # the loss knows none
                    losses.append(-plain_grade(model, target))
                means.append(torch.autograd.grad(torch.stack(losses).mean(), weights))
        model.requires_grad_(False)
        gram, gates = [], []
        for layer, head in ALL_HEADS:
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            stacked = torch.stack([mean[layer][rows].flatten() for mean in means])
            gram.append((stacked @ stacked.T).numpy())
            with reference.ablated(model, layer, head, mask, gate):
                of_rows = [plain_grade(model, row) for row in (*SAFE, *UTIL)]
                gates.append([float(torch.autograd.grad(each, gate)[0]) for each in of_rows])
    gates = np.array(gates).reshape(3, 4, -1)
    return np.array(gram).reshape(3, 4, 2 * FOLDS, 2 * FOLDS), gates[..., :4], gates[..., 4:]


@pytest.mark.parametrize("mask", ["output", "query"])
@pytest.mark.parametrize("tune", [lora, gains])
def test_gradients_with_an_adapter_are_those_of_the_merged_model(gqa, scratch, tune, mask):
    tune(gqa.backend, scratch)
    clean = gqa.backend.head_gradients(SAFE, UTIL, FOLDS, mask=mask)
    found = gqa.backend.head_gradients(SAFE, UTIL, FOLDS, mask=mask, adapter=scratch)
    expected = merged_gradients(reference.merged(gqa.plain.config._name_or_path, scratch), mask)
    for values, wanted in zip((found.gram, found.gate_safe, found.gate_util), expected, strict=True):
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(found.gram - clean.gram).max() > 1e-2 * np.abs(clean.gram).max()
    again = gqa.backend.head_gradients(SAFE, UTIL, FOLDS, mask=mask)
    np.testing.assert_allclose(again.gram, clean.gram, rtol=1e-12)  # the base is left as it was
    some = gqa.backend.head_gradients(SAFE, UTIL, FOLDS, [2], mask, scratch)
    np.testing.assert_allclose(some.gate_util, found.gate_util[[2]], rtol=1e-9)
