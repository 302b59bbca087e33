"""SmolLM2 on the public sets in float32: scores against an independent loop and a direct check."""

import importlib

import math_verify
import numpy as np
import pytest
import torch

import backends
from backends import models as folders
from data import benchmarks, sources
from data.rendering import Renderer
from stages import artifacts, judging, schemas
from tests.test_sources import SHARED, needs_shared

pytestmark = needs_shared
evaluate = importlib.import_module("stages.05_evaluate")


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
        rendered = map(renderer.row, sources.load(pool).records[::5])
        short = [row for row in rendered if len(row["prompt_ids"]) <= most]
        return short[:: len(short) // count][:count]

    return of


@torch.no_grad()
def test_mmlus_letters_are_those_of_a_plain_transformers_loop(real, tokenizer, rows):
    """300 rows; the loop pads on the left, sixteen at a time, as lm-evaluation-harness does."""
    asked = rows("mmlu", 300, 112)
    assert len(asked) == 300
    answers = evaluate.respond(real, tokenizer, asked, 0, None)
    found = np.array([answer["prediction"] for answer in answers])
    plain = []
    ordered = sorted(range(300), key=lambda at: len(asked[at]["prompt_ids"]))
    for start in range(0, 300, 16):
        some = [asked[at] for at in ordered[start : start + 16]]
        width = max(len(row["prompt_ids"]) for row in some)
        ids = torch.tensor([[0] * (width - len(row["prompt_ids"])) + row["prompt_ids"] for row in some])
        mask = torch.tensor(
            [[0] * (width - len(row["prompt_ids"])) + [1] * len(row["prompt_ids"]) for row in some]
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = real.model(
            ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        for row, line in zip(some, logits.logits[:, -1], strict=True):
            plain.append(int(line[row["choice_ids"]].argmax()))
    expected = np.empty(300, int)
    expected[ordered] = plain
    np.testing.assert_array_equal(found, expected)
    gold = np.array([row["answer"] for row in asked])
    assert (found == gold).mean() == (expected == gold).mean() > 0
    assert all(0 < answer["probability"] < 1 for answer in answers)


def test_gsm8ks_score_is_a_direct_math_verify_pass(real, tokenizer, rows):
    asked = rows("gsm8k", 6, 110)
    answers = evaluate.respond(real, tokenizer, asked, 120, None)
    labels = {"arm": "base", "optimizer": "none", "seed": -1, "benchmark": "gsm8k"}
    told = [
        labels | {"example_id": row["example_id"], "prompt": row["prompt"]} | answer
        for row, answer in zip(asked, answers, strict=True)
    ]
    # Beside what the model says, answers that are right, for a check that can see both.
    for row in asked[:3]:
        text = f"Let us see.\nSo \\boxed{{{row['target']}}}"
        made = {"example_id": row["example_id"], "prompt": row["prompt"], "output": text, "token_ids": []}
        told.append(labels | made | {"prediction": -1, "probability": float("nan")})
    outputs = artifacts.pa.Table.from_pylist(told, schema=schemas.OUTPUTS)
    judged = judging.judged(outputs, asked + asked[:3], benchmarks.BENCHMARKS["gsm8k"])
    direct = []
    for row, answer in zip(asked + asked[:3], told, strict=True):
        gold = math_verify.parse(f"${row['target']}$")
        boxed = math_verify.LatexExtractionConfig(boxed_match_priority=0)
        parsed = math_verify.parse(answer["output"], extraction_config=[boxed])
        direct.append("\\boxed" in answer["output"] and math_verify.verify(gold, parsed))
    assert judged["verdict"].to_pylist() == direct and sum(direct) >= 3
    assert all(len(answer["token_ids"]) <= 120 for answer in answers)
