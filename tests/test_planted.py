"""A planted effect is found: of a model whose risky heads read what the benchmark asks about and whose others
read harmful requests, the study of drawn arms says that C predicts the cost; with C shuffled among the heads
it says nothing."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import transformers

import backends
from backends.base import Example, Recipe
from stages.method import metrics, prediction
from stages.method.arms import BASE_RUN, OWN, arm_runs, parse, select_heads
from stages.method.conflict_map import head_map
from stages.method.gradients import conflict_from_gram
from stages.method.heads import HeadMap
from stages.report.drawn_arms import MEASURED, MapBy, families, predictions

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 4, 8, 8, 64
ABILITY, HARM, LAST, OUT = range(16), range(16, 32), range(32, 40), range(40, 48)
"""dimensions of the residual stream: words of questions, words of harmful requests, the last token of every
prompt, what heads write and the output matrix reads"""
QUESTIONS, REQUESTS, END, REFUSAL = range(3, 23), range(23, 43), 43, 50
"""tokens"""
DRAWS, FOLDS = 24, 4


def write_wired(folder: Path) -> np.ndarray:
    """A model of attention alone, whose heads read harmful words with weight 1 - w and the words of questions
    with weight w: 0.9 of half of them, the risky ones, and 0.1 of the others. Returns w [L, H]."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    draw = np.random.default_rng(7)
    wired = draw.permuted(np.repeat([0.1, 0.9], LAYERS * HEADS // 2)).reshape(LAYERS, HEADS)
    model = transformers.AutoModelForCausalLM.from_config(config)

    def random(rows: int, columns: int, at, scale: float = 1.0) -> np.ndarray:
        """Zero but in the columns `at`."""
        found = np.zeros((rows, columns), np.float32)
        found[:, list(at)] = scale * draw.normal(size=(rows, len(at)))
        return found

    def put(weight: torch.Tensor, values: np.ndarray) -> None:
        weight.data.copy_(torch.from_numpy(values))

    embedding = np.zeros((VOCABULARY, 48), np.float32)
    for tokens, at in ((QUESTIONS, ABILITY), (REQUESTS, HARM), ((END,), LAST)):
        embedding[list(tokens)] = random(len(tokens), 48, at)
    put(model.model.embed_tokens.weight, embedding)
    put(model.lm_head.weight, random(VOCABULARY, 48, OUT, 2.0))
    for layer, own in zip(model.model.layers, wired, strict=True):
        attention, size = layer.self_attn, HEADS * HEAD_DIM
        reads = np.repeat(own, HEAD_DIM)[:, None]  # (H * D, 1)
        put(attention.q_proj.weight, random(size, 48, LAST))
        put(attention.k_proj.weight, random(size, 48, [*ABILITY, *HARM], 0.5))
        values = reads * random(size, 48, ABILITY) + (1 - reads) * random(size, 48, HARM)
        put(attention.v_proj.weight, values.astype(np.float32))
        put(attention.o_proj.weight, np.ascontiguousarray(random(size, 48, OUT, 0.3).T))
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.save_pretrained(folder)
    return wired


def rows(words: range, count: int, seed: int, target: int) -> list[Example]:
    """Prompts of six words and the last token, each with a target."""
    draw, none = np.random.default_rng(seed), np.zeros(0, np.int32)
    prompts = [np.array([*draw.choice(list(words), 6), END], np.int32) for _ in range(count)]
    return [
        Example(f"{words[0]}-{seed}-{at}", prompt, np.array([target], np.int32), none, target)
        for at, prompt in enumerate(prompts)
    ]


def answered(backend, asked: list[Example]) -> list[Example]:
    """The questions, with the model's own answers for right ones."""
    known, _ = backend.choices(asked)
    return [
        Example(row.example_id, row.prompt_ids, np.array([token], np.int32), row.choice_ids, int(token))
        for row, token in zip(asked, known, strict=True)
    ]


def gradient_map(backend) -> HeadMap:
    """By the method's own formulas."""
    safe, util = rows(REQUESTS, 32, 1, REFUSAL), answered(backend, rows(QUESTIONS, 32, 2, 0))
    found = backend.head_gradients(safe, util, FOLDS)
    conflict = metrics.optimization_conflict(*conflict_from_gram(found.gram, FOLDS))
    changes = (metrics.mean_change(gates) for gates in (found.gate_util, found.gate_safe))
    return head_map(conflict, *changes, "rank-difference", 4)


def study(maps: dict[str, HeadMap], tuned: dict, outcomes: dict) -> pd.DataFrame:
    """What the report's table says of C of each map and of the log p of right answers that was lost.

    Args:
        tuned: arm as tuned -> its heads.
        outcomes: arm as tuned, or the base model -> log p of each benchmark row.
    """
    costs = pd.DataFrame({"safety_gain": 0.0}, index=pd.Index([BASE_RUN, *tuned], dtype=object))
    columns = {"layers": 0, "heads": 1}
    arms = pd.DataFrame(
        [{name: [head[at] for head in heads] for name, at in columns.items()} for heads in tuned.values()],
        index=costs.index[1:],
    )
    of = {
        run: pd.DataFrame({"side": "utility", "benchmark": "own", "verdict": values > -1, "graded": values})
        for run, values in outcomes.items()
    }
    by_name = {MapBy(name, "gradient"): scores for name, scores in maps.items()}
    drawn = families(costs, arms, SimpleNamespace(of=of), by_name, "gradient")
    found = predictions(drawn, np.random.default_rng(0))
    own = found[(found["outcome"] == "graded") & (found["at"] == MEASURED) & (found["predictor"] == "C")]
    return own.set_index("map")


def shuffled(scores: HeadMap, seed: int) -> HeadMap:
    """The map with its heads in another order."""
    order = np.random.default_rng(seed).permutation(LAYERS * HEADS)
    return HeadMap(*(values.ravel()[order].reshape(LAYERS, HEADS) for values in scores))


def test_an_effect_of_c_is_found_and_none_of_a_shuffled_c(scratch, monkeypatch):
    monkeypatch.setattr(prediction, "PERMUTATIONS", 200)
    monkeypatch.setattr(prediction, "RESAMPLES", 100)
    wired = write_wired(scratch / "model")
    backend = backends.load("torch", scratch / "model", device="cpu", dtype="float32")
    scores = gradient_map(backend)
    assert np.corrcoef(wired.ravel(), scores.conflict_score.ravel())[0, 1] > 0.5, "C must know the wiring"
    benchmark = answered(backend, rows(QUESTIONS, 48, 3, 0))
    align = rows(REQUESTS, 32, 4, REFUSAL)
    tuned, outcomes = {}, {BASE_RUN: backend.grade(benchmark).outcome}
    for run in arm_runs(parse([f"draws{DRAWS}"], 4), (), ("sft",), (21,)):
        tuned[run] = select_heads(run.arm, scores, 4, np.random.default_rng(run.seed))
        recipe = Recipe(
            rank=2, alpha=4.0, lr=0.1, batch=8, accumulation=1, seed=run.seed, folder=scratch / run.name
        )
        assert len(list(backend.tune(align, tuned[run], recipe))) == 4
        outcomes[run] = backend.grade(benchmark, recipe.folder).outcome
    others = {f"shuffled{seed}": shuffled(scores, seed) for seed in range(20)}
    found = study({OWN: scores} | others, tuned, outcomes)
    assert found["r"][OWN] > 0.5 and found["p_heads"][OWN] < 0.05
    assert sum(found["p_heads"][list(others)] < 0.05) <= 1
