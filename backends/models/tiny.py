"""The `tiny` preset's model: random weights and a small tokenizer, made on the spot, for tests and CI.

It knows nothing; its weights are large enough that answers differ between prompts and heads matter. The
tokenizer is a byte-level BPE of 1,024 tokens, whose merges (trained on the embedded data set) are
`tiny_merges.txt`.
"""

import hashlib
from functools import cache
from pathlib import Path

VERSION = 1
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] "
    "}}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def _merges() -> str:
    return Path(__file__).with_name("tiny_merges.txt").read_text(encoding="utf-8")


def version() -> str:
    """Changes with whatever the folder's content depends on."""
    return hashlib.sha256("\n".join([str(VERSION), TEMPLATE, _merges()]).encode()).hexdigest()[:12]


def write(folder: Path) -> None:
    """Fills `folder` with config, safetensors and tokenizer; the same bytes every time."""
    import torch
    import transformers

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(VERSION)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def _tokenizer():
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(line.split()) for line in _merges().splitlines()]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped
