"""Tiny random models: of the families that both backends compute, in every sharing of keys, and of all that
run on torch, each with what others do not have."""

from pathlib import Path

import torch
import transformers

KINDS = ["llama-gqa", "qwen2-mha", "qwen2-mqa", "qwen3-gqa", "mistral-mqa"]
"""each family and each sharing of keys, with one window for all layers, for some, and for none"""
VOCABULARY, LAYERS, HEADS, HEAD_DIM = 97, 3, 4, 8
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,  # not H * D, so that mixing the two up fails
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SOME_SLIDE = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
GQA = COMMON | {"num_key_value_heads": 2}
SQUARE = {"hidden_size": 32, "head_dim": 8}
"""of families whose heads divide the hidden size"""
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING = {"sliding_window": 7, "layer_types": TYPES}
CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0, "query_pre_attn_scalar": 11}
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
}

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "mistral": {"sliding_window": 9},
    "ministral": SLIDING,
    "olmo2": {},
    "olmo3": SLIDING,
    "gemma": {},
    "gemma2": SLIDING | CAPS,
    "gemma3_text": SLIDING | {"rope_parameters": BASES, "query_pre_attn_scalar": 11},
    "granite": SCALES | {"attention_multiplier": 0.3},
    "cohere2": SLIDING | SQUARE | {"logit_scale": 0.5},
    "starcoder2": SQUARE | {"use_bias": True},
    "exaone4": SLIDING,
    "seed_oss": {"attention_bias": True},
    "hunyuan_v1_dense": {},
    "nemotron": SQUARE | {"partial_rotary_factor": 0.5},
    "stablelm": SQUARE | {"use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "apertus": {},
    "qwen3_moe": EXPERTS | {"attention_bias": True},
}
"""model_type -> what its configuration has beside `GQA`"""


def write_model(folder: Path, kind: str) -> Path:
    """Of a kind, as `save`."""
    family, sharing = kind.split("-")
    common = COMMON | {"num_key_value_heads": {"mha": HEADS, "gqa": 2, "mqa": 1}[sharing]}
    if family == "llama":
        config = transformers.LlamaConfig(**common, rope_parameters=dict(ROPE), tie_word_embeddings=True)
    elif family == "qwen3":
        config = transformers.Qwen3Config(**common, **SOME_SLIDE, attention_bias=True)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**common, **(SOME_SLIDE if sharing == "mqa" else {}))
    else:
        config = transformers.MistralConfig(**common, sliding_window=9)
    return save(folder, config)


def write_family(folder: Path, family: str) -> Path:
    return save(folder, transformers.AutoConfig.for_model(family, **(GQA | FAMILIES[family])))


def save(folder: Path, config) -> Path:
    """A random model with weights large enough that heads matter and greedy tokens vary, no bias and no scale
    of a norm what it usually begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.3)
            elif name.endswith("norm.weight"):
                usual = float(weight.detach()[0])  # 1, in Gemma 0
                torch.nn.init.uniform_(weight, usual - 0.3, usual + 0.3)
    model.save_pretrained(folder)
    return folder
