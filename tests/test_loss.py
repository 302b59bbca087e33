"""Rows as one line, where what they share stands once, give the loss and gradients of rows alone."""

import numpy as np
import pytest
import torch
import transformers

from backends.core import packing
from backends.torch import loss as torch_loss
from tests import reference
from tests.conftest import KINDS, make_examples


@pytest.fixture(scope="module")
def plain(models):
    found = {kind: transformers.AutoModelForCausalLM.from_pretrained(models[kind]).double() for kind in KINDS}
    for model in found.values():
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
    return found


def gradients(model, losses: torch.Tensor) -> list[torch.Tensor]:
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    weighted = losses * torch.arange(1, len(losses) + 1)  # no row may stand for another
    return torch.autograd.grad(weighted.sum(), weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [0, 5])
def test_a_line_is_its_rows(plain, kind, shared, monkeypatch):
    model, examples = plain[kind], make_examples(6, seed=11, shared=shared)
    alone = torch.stack([reference.loss(model, example) for example in examples])
    expected = gradients(model, alone)
    ways = [False] if kind in ("mistral-mqa", "qwen2-mqa", "qwen3-gqa") else [False, True]
    for line in ways:  # a window shorter than the rows is for padded rows alone
        monkeypatch.setattr(torch_loss, "_line_pays", lambda *_, line=line: line)
        losses = torch_loss.example_losses(model, examples)
        torch.testing.assert_close(losses.float(), alone, rtol=1e-6, atol=0)  # transformers' is float32
        for found, wanted in zip(gradients(model, losses), expected, strict=True):
            assert float((found - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


def test_rows_that_a_window_cuts_or_that_are_long_and_share_little_are_padded(plain):
    generator = np.random.default_rng(4)
    apart = [generator.integers(3, 90, 700).astype(np.int32) for _ in range(4)]
    alike = [np.concatenate([apart[0], row[:20]]) for row in apart]
    rows = [row.prompt_ids for row in make_examples(4, shared=8)]
    short = [row.prompt_ids[:6] for row in make_examples(4)]
    for sequences, joined in (
        (rows, {"llama-gqa", "qwen2-mha"}),
        (short, set(KINDS)),
        (apart, set()),
        (alike, {"llama-gqa", "qwen2-mha"}),
    ):
        line = packing.join(sequences, 0)
        assert {kind for kind in KINDS if torch_loss._line_pays(plain[kind], line)} == joined
