"""Which model folders the Flax decoder computes: four families, and of their attributes what it knows."""

from pathlib import Path

from backends import models
from backends.core.errors import InputError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
ROPE_TYPES = ("default", "llama3")
# Attributes of config.json that the decoder handles, beside those that do not change what is computed. Any
# other whose value is not its class's default is refused by name: a model computed a little wrong is worse
# than none.
# fmt: off
HANDLED = frozenset([
    "architectures", "attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pretraining_tp",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
])
# fmt: on


def check_folder(folder: Path) -> None:
    """InputError, one line that names what is not handled. The folder has passed `models.check_folder`."""
    from transformers import AutoConfig

    path, config = folder / "config.json", models.read_config(folder)
    architecture = config["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture} is not handled by --backend flax, only "
            f"{', '.join(ARCHITECTURES)}: use --backend torch"
        )
    default = AutoConfig.for_model(config["model_type"])
    for name, value in config.items():
        described = name.startswith("_")  # names and hashes, never arithmetic
        if described or name in HANDLED | models.INERT or value is None or value is False:
            continue
        usual = getattr(default, name, None)
        if value != usual or isinstance(value, bool) != isinstance(usual, bool):  # 0 == False
            raise InputError(f"{path}: attribute {name} = {value!r} is not handled")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: attribute hidden_act = {config['hidden_act']!r} is not handled, only 'silu'"
        )
    (rope,) = models.rope_parameters(path, config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"{path}: rope_type {kind!r} is not handled, only {' and '.join(ROPE_TYPES)}")
