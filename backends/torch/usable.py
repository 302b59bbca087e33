"""Which model folders the torch backend runs: decoders of transformers whose layers all attend by a `q_proj`
and an `o_proj`. Here is what config.json and the weights' names tell without loading; `probe` finds the rest.
"""

from pathlib import Path

from backends import models
from backends.core.errors import InputError

LAYERS = ("full_attention", "sliding_attention")
"""kinds of layers with heads that attend to all tokens before, or to the last of them"""
STRETCHED = ("dynamic", "longrope")
"""kinds of rotary turns that change with the longest row beside a token"""
COMPUTED_WITH = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "partial_rotary_factor",
    "residual_multiplier",
    "use_qk_norm",
)
"""attributes that some families compute with; in all others transformers passes over them, and the model that
it loads is not the one that config.json describes"""


def check_folder(folder: Path) -> None:
    """InputError, one line that names what is not handled. The folder has passed `models.check_folder`."""
    from transformers.activations import ACT2FN

    path, own, config = folder / "config.json", models.read_config(folder), models.configuration(folder)
    if own.get("quantization_config") is not None:
        raise InputError(f"{path}: quantization_config is not handled, only dense weights have gradients")
    for name in ("hidden_act", "hidden_activation"):
        if (act := getattr(config, name, None)) is not None and act not in ACT2FN:
            raise InputError(f"{path}: attribute {name} = {act!r} is no activation of transformers")
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in LAYERS:
            raise InputError(f"{path}: layer {layer} is of type {kind!r}, not {' or '.join(LAYERS)}")
    for rope in models.rope_parameters(path, own):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in STRETCHED:
            raise InputError(
                f"{path}: rope_type {kind!r} is not handled: it turns a row by the longest beside it"
            )
    for name in COMPUTED_WITH:
        value = own.get(name)
        if value is not None and value is not False and not _knows(own["model_type"], name):
            raise InputError(f"{path}: attribute {name} = {value!r} is not handled in a {own['model_type']}")
    _check_attention(folder)


def _knows(model_type: str, name: str) -> bool:
    """Whether a family's configuration has the attribute, itself or among the rope parameters."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    return hasattr(default, name) or name in (getattr(default, "rope_parameters", None) or {})


def _check_attention(folder: Path) -> None:
    """Each head needs its own rows of W_q, and its own columns of W_o."""
    shape, found = models.folder_shape(folder), models.tensor_shapes(folder)
    first = "model.layers.0.self_attn."
    own = sorted(name.removeprefix(first) for name in found if name.startswith(first))
    for name in ("q_proj.weight", "o_proj.weight"):
        if name not in own:
            raise InputError(
                f"{folder}: {first}{name} is none of the weights (attention has {', '.join(own) or 'none'})"
            )
    if sinks := [name for name in found if name.endswith("self_attn.sinks")]:
        raise InputError(f"{folder}: weight {sinks[0]} is not handled: heads that attend to a sink")
    for name, stored in found.items():
        expected = (shape.heads * shape.head_dim, shape.model_dim)
        if name.endswith("self_attn.q_proj.weight") and stored != expected:
            raise InputError(f"{folder}: weight {name} has shape {stored}, by config.json it is {expected}")
