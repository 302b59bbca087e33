"""Heads that are drawn anew while they are tuned, both backends: against a loop written out with an Adam for
every row, and by its invariants."""

import dataclasses
import doctest

import numpy as np
import pytest
import torch

from backends.base import Recipe, Redraw
from backends.core import adapters as peft_folder
from backends.core import checkpoint, schedules
from backends.core.errors import InputError
from backends.core.schedules import learning_rate
from backends.core.seeds import batch_order
from stages.method import gradients, metrics
from tests import reference
from tests.conftest import ALL_HEADS, HEAD_DIM, HEADS, LAYERS, make_examples

RECIPE = Recipe(rank=4, alpha=8.0, lr=2e-2, batch=4, accumulation=1, epochs=4, max_length=64, seed=3)
ROWS = make_examples(8, seed=4)  # 8 steps
FIRST, SECOND, THIRD = [(0, 1), (2, 0)], [(0, 1), (1, 3)], [(2, 0), (2, 2)]
EVERY = 3


def in_turn(*draws):
    """Draws that do not look at the model."""
    left = iter(draws)
    return Redraw(EVERY, lambda _: next(left))


def updates(own, folder) -> np.ndarray:
    """ΔW of every layer, [L, H, D, E]."""
    a, b, scale = peft_folder.read(folder, own.shape)
    return scale * np.einsum("lhdr,lre->lhde", b.astype(np.float64), a.astype(np.float64))


def by_hand(folder, draws) -> tuple[list[float], np.ndarray]:
    """Losses and ΔW of PEFT's LoRA, each row of B and each A with moments and a count of steps of its own."""
    model = reference.lora(folder, RECIPE)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    moments = [torch.zeros(3, *weight.shape) for weight in weights]  # mean, square, steps
    order, losses, free = batch_order(len(ROWS), RECIPE), [], None
    for number, batch in enumerate(order):
        free = draws.get(number, free)
        loss = reference.mean_loss(model, [ROWS[row] for row in batch])
        losses.append(loss.item())
        masks = []
        for at in range(LAYERS):
            chosen = torch.tensor([(at, head) in free for head in range(HEADS)], dtype=torch.float32)
            masks += [chosen.max(), chosen.repeat_interleave(HEAD_DIM)[:, None]]
        found = [own * mask for own, mask in zip(torch.autograd.grad(loss, weights), masks, strict=True)]
        norm = torch.stack([own.square().sum() for own in found]).sum().sqrt()
        for weight, gradient, mask, own in zip(weights, found, masks, moments, strict=True):
            gradient = gradient * min(1.0, RECIPE.clip / float(norm))
            mean, square, steps = own
            steps += ((steps > 0) | (mask > 0)).float()  # it counts from the first step that is its own
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            count = steps.clamp(min=1)
            step = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
            weight.data -= learning_rate(number, len(order), RECIPE) * mask * step
    pairs = zip(weights[::2], weights[1::2], strict=True)
    scale = RECIPE.alpha / RECIPE.rank
    return losses, np.stack(
        [scale * (b @ a).detach().double().numpy().reshape(HEADS, HEAD_DIM, -1) for a, b in pairs]
    )


def test_docstring_examples():
    result = doctest.testmod(schedules)
    assert result.attempted and not result.failed


def test_every_row_moves_as_by_an_adam_that_starts_with_it(gqa, scratch):
    recipe = dataclasses.replace(RECIPE, folder=scratch)
    records = list(gqa.backend.tune(ROWS, FIRST, recipe, None, in_turn(SECOND, THIRD)))
    losses, expected = by_hand(gqa.plain.config._name_or_path, {0: FIRST, 3: SECOND, 6: THIRD})
    np.testing.assert_allclose([record["loss"] for record in records], losses, rtol=0, atol=2e-5)
    found = updates(gqa.backend, scratch)
    for layer, head in ALL_HEADS:
        moved = np.linalg.norm(expected[layer, head])
        drawn = (layer, head) in {*FIRST, *SECOND, *THIRD}
        assert (moved > 0.01) == drawn
        assert np.linalg.norm(found[layer, head] - expected[layer, head]) <= 2e-4 * moved, (layer, head)
    drawn = {record["step"]: record["drawn"] for record in records if record["drawn"] is not None}
    assert drawn == {0: FIRST, 3: SECOND, 6: THIRD}


def test_the_same_heads_again_change_nothing(own, scratch):
    same = dataclasses.replace(RECIPE, folder=scratch / "same")
    runs = [
        own.tune(ROWS, FIRST, dataclasses.replace(RECIPE, folder=scratch / "plain")),
        own.tune(ROWS, FIRST, same, None, in_turn(FIRST, FIRST)),
    ]
    plain, again = ([record["loss"] for record in run] for run in runs)
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    left, right = (updates(own, run.adapter) for run in runs)
    assert np.linalg.norm(left - right) <= 1e-5 * np.linalg.norm(left)


def test_rows_that_leave_keep_what_they_have(own, scratch):
    seen = []

    def draw(folder):
        seen.append(peft_folder.read(folder, own.shape)[:2])
        return [SECOND, THIRD][len(seen) - 1]

    before = own.logits(ROWS)
    recipe = dataclasses.replace(RECIPE, folder=scratch)
    assert len(list(own.tune(ROWS, FIRST, recipe, None, Redraw(EVERY, draw)))) == 8
    seen.append(peft_folder.read(scratch, own.shape)[:2])
    (a3, b3), (a6, b6), (a8, b8) = seen
    np.testing.assert_array_equal(b6[2, 0], b3[2, 0])  # left after three steps, and came back after six
    assert (b8[2, 0] != b6[2, 0]).all()
    np.testing.assert_array_equal(b8[0, 1], b6[0, 1])
    np.testing.assert_array_equal(b8[1, 3], b6[1, 3])
    assert (b3[1, 3] == 0).all() and (b6[1, 3] != 0).all()
    np.testing.assert_array_equal(a6[2], a3[2])  # no head of layer 2 was free
    np.testing.assert_array_equal(a8[:2], a6[:2])
    never = [head for head in ALL_HEADS if head not in {*FIRST, *SECOND, *THIRD}]
    assert all((b8[head] == 0).all() for head in never)
    np.testing.assert_array_equal(own.logits(ROWS), before)


def test_a_draw_that_reads_the_model_goes_on_exactly_after_a_kill(own, scratch, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    safe, util, count = make_examples(4, seed=1), make_examples(4, seed=2), []

    def draw(folder):
        found = own.head_gradients(safe, util, 2, adapter=folder)
        ranked = metrics.optimization_conflict(*gradients.conflict_from_gram(found.gram, 2))
        count.append(np.argwhere(metrics.buckets(ranked, 3) == 1).tolist())
        return [tuple(head) for head in count[-1]]

    again = Redraw(2, draw, (*safe, *util))
    fast = dataclasses.replace(RECIPE, lr=0.2)
    reference.goes_on(lambda recipe: own.tune(ROWS, FIRST, recipe, None, again), fast, scratch, 5)
    assert len({str(heads) for heads in count}) > 1, "the bucket must change"
    other = Redraw(2, draw, (*safe, *util[:-1]))
    recipe = dataclasses.replace(fast, folder=scratch / "stopped", checkpoint=scratch / "state")
    with pytest.raises(InputError, match="state is another tuning run's"):
        list(own.tune(ROWS, FIRST, recipe, None, other))


def test_what_cannot_be_drawn_is_named_and_leaves_the_model_bare(own):
    before = own.logits(ROWS)
    with pytest.raises(ValueError, match="every 0 steps"):
        own.tune(ROWS, FIRST, RECIPE, None, Redraw(0, lambda _: FIRST))
    with pytest.raises(ValueError, match="no head"):
        list(own.tune(ROWS, FIRST, RECIPE, None, in_turn([(9, 0)])))
    np.testing.assert_array_equal(own.logits(ROWS), before)
