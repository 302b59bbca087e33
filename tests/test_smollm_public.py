"""SmolLM2 on a public set in float32: scores against an independent loop."""

import numpy as np
import pytest
import torch
import transformers

import backends
from backends import models as folders
from data import hub
from data.rendering import Renderer, example
from tests.public_sets import SHARED, needs_shared

pytestmark = needs_shared


@pytest.fixture()
def drawn(smollm, monkeypatch) -> list[dict]:
    """300 rows of MMLU of at most 112 prompt tokens, short ones first."""
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    renderer = Renderer(folders.load_tokenizer(smollm), "26 Jul 2024")
    rendered = map(renderer.row, hub.load("mmlu").records[::5])
    short = [row for row in rendered if len(row["prompt_ids"]) <= 112]
    return sorted(short[:: len(short) // 300][:300], key=lambda row: len(row["prompt_ids"]))


@pytest.mark.long
@torch.no_grad()
def test_mmlus_letters_are_those_of_a_plain_transformers_loop(smollm, drawn):
    """The loop pads on the left, sixteen at a time, as lm-evaluation-harness does."""
    real = backends.load("torch", smollm, dtype="float32", device="cpu")
    found, probability = real.choices([example(row) for row in drawn])
    model, plain = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval(), []
    for start in range(0, 300, 16):
        some = drawn[start : start + 16]
        width = max(len(row["prompt_ids"]) for row in some)
        ids, mask = torch.zeros(2, len(some), width, dtype=torch.int64)
        for at, row in enumerate(some):
            ids[at, -len(row["prompt_ids"]) :] = torch.tensor(row["prompt_ids"])
            mask[at, -len(row["prompt_ids"]) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        letters = zip(some, output.logits[:, -1], strict=True)
        plain += [int(logits[row["choice_ids"]].argmax()) for row, logits in letters]
    assert len(plain) == 300
    np.testing.assert_array_equal(found, plain)
    assert (found == [row["answer"] for row in drawn]).any() and ((probability > 0) & (probability < 1)).all()
