"""SmolLM2 on the public sets in float32: scores against an independent loop and a direct check."""

import math_verify
import numpy as np
import pytest
import torch
import transformers

import backends
from backends import models as folders
from data import hub, scoring
from data.rendering import Renderer, example
from tests.public_sets import SHARED, needs_shared

pytestmark = needs_shared


@pytest.fixture(scope="module")
def real(smollm):
    return backends.load("torch", smollm, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return folders.load_tokenizer(smollm)


@pytest.fixture()
def rows(monkeypatch, tokenizer):
    monkeypatch.setenv("CAST_DATA", str(SHARED))
    renderer = Renderer(tokenizer, "26 Jul 2024")

    def of(pool, count, most):
        """Every so many-th row of at most `most` prompt tokens."""
        rendered = map(renderer.row, hub.load(pool).records[::5])
        short = [row for row in rendered if len(row["prompt_ids"]) <= most]
        return short[:: len(short) // count][:count]

    return of


@pytest.mark.long
@torch.no_grad()
def test_mmlus_letters_are_those_of_a_plain_transformers_loop(smollm, real, rows):
    """300 rows; the loop pads on the left, sixteen at a time, as lm-evaluation-harness does."""
    drawn = sorted(rows("mmlu", 300, 112), key=lambda row: len(row["prompt_ids"]))
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


def test_gsm8ks_score_is_a_direct_math_verify_pass(real, tokenizer, rows):
    drawn = rows("gsm8k", 6, 110)
    generated = real.generate([example(row) for row in drawn], 120)
    assert all(len(ids) <= 120 for ids in generated)
    # Beside what the model says, answers that are right, for a check that can see both.
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated]
    texts += [f"Let us see.\nSo \\boxed{{{row['target']}}}" for row in drawn[:3]]
    golds = [row["target"] for row in drawn + drawn[:3]]
    verdicts = [scoring.verdict("boxed", text, gold) for text, gold in zip(texts, golds, strict=True)]
    boxed = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    direct = [
        "\\boxed" in text
        and math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(text, [boxed]))
        for text, gold in zip(texts, golds, strict=True)
    ]
    assert verdicts == direct and sum(direct) >= 3
