"""Adapters in PEFT's file format, without PEFT (which needs torch): LoRA on W_q, read and written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backends.base import Recipe, Shape
from backends.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
_PATTERN = re.compile(_NAME.replace(".", r"\.").format(r"(\d+)", "([AB])"))

# Settings of PEFT that change what an adapter computes, at the value that is handled.
_HANDLED = {
    "peft_type": "LORA",
    "target_modules": ["q_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
}


def write(folder: Path, a: np.ndarray, b: np.ndarray, layers: Sequence[int], recipe: Recipe) -> None:
    """Writes the layers in `layers` of A [L, r, E] and B [L, H, D, r] as PEFT would."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **_HANDLED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": list(layers),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {}
    for layer in layers:
        tensors[_NAME.format(layer, "A")] = np.ascontiguousarray(a[layer])
        tensors[_NAME.format(layer, "B")] = np.ascontiguousarray(b[layer].reshape(-1, recipe.rank))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read(folder: Path, shape: Shape) -> tuple[np.ndarray, np.ndarray, float]:
    """A [L, r, E], B [L, H, D, r] (zero in layers without LoRA), and the scale alpha / r.

    InputError on an adapter that is damaged, of another model's shape, or more than plain LoRA on W_q.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: the adapter cannot be loaded ({error})") from None
    for name, value in _HANDLED.items():
        if config.get(name, value) not in (value, None):
            raise InputError(f"{folder}: the adapter's {name} = {config[name]!r} is not handled")
    rank = config["r"]
    a = np.zeros((shape.layers, rank, shape.model_dim), np.float32)
    b = np.zeros((shape.layers, shape.heads, shape.head_dim, rank), np.float32)
    for name, tensor in tensors.items():
        found = _PATTERN.fullmatch(name)
        if not found or int(found[1]) >= shape.layers:
            raise InputError(f"{folder}: tensor {name} is no LoRA of W_q in this model's layers")
        part = (a if found[2] == "A" else b)[int(found[1])]
        if tensor.size != part.size or tensor.shape[-1] != part.shape[-1]:
            raise InputError(f"{folder}: tensor {name} has shape {tensor.shape}, this model's has another")
        part[...] = tensor.reshape(part.shape)
    return a, b, config["lora_alpha"] / rank
