"""Adapters in PEFT's file format, without PEFT (which needs torch): LoRA on W_q, and gains (IA3)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backends.base import Recipe, Shape
from backends.core.errors import InputError, reason

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
_LORA_PATTERN = re.compile(_LORA.replace(".", r"\.").format(r"(\d+)", "([AB])"))
_GAIN = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"

# Settings of PEFT that change what an adapter computes, at the value that is handled.
_HANDLED_LORA = {
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
_HANDLED_GAINS = {
    "peft_type": "IA3",
    "target_modules": ["down_proj"],
    "feedforward_modules": ["down_proj"],
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "exclude_modules": None,
}


def is_gains(folder: Path) -> bool:
    """Whether a folder holds gains, not LoRA. InputError on one that is damaged."""
    return _config(folder).get("peft_type") == "IA3"


def write(folder: Path, a: np.ndarray, b: np.ndarray, layers: Sequence[int], recipe: Recipe) -> None:
    """Writes the layers in `layers` of A [L, r, E] and B [L, H, D, r] as PEFT would."""
    tensors = {}
    for layer in layers:
        tensors[_LORA.format(layer, "A")] = np.ascontiguousarray(a[layer])
        tensors[_LORA.format(layer, "B")] = np.ascontiguousarray(b[layer].reshape(-1, recipe.rank))
    lora = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": 0.0, "init_lora_weights": True}
    _write(folder, {**_HANDLED_LORA, **lora, "layers_to_transform": list(layers)}, tensors)


def write_gains(folder: Path, gains: np.ndarray) -> None:
    """Writes gains [L, F] as PEFT would: IA3 on what W_down reads, in every layer."""
    tensors = {_GAIN.format(layer): np.ascontiguousarray(row[None]) for layer, row in enumerate(gains)}
    _write(folder, {**_HANDLED_GAINS, "init_ia3_weights": True}, tensors)


def _write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "", "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read(folder: Path, shape: Shape) -> tuple[np.ndarray, np.ndarray, float]:
    """A [L, r, E], B [L, H, D, r] (zero in layers without LoRA), and the scale alpha / r."""
    config, tensors = _read(folder, _HANDLED_LORA)
    rank = config["r"]
    a = np.zeros((shape.layers, rank, shape.model_dim), np.float32)
    b = np.zeros((shape.layers, shape.heads, shape.head_dim, rank), np.float32)
    for name, tensor in tensors.items():
        found = _LORA_PATTERN.fullmatch(name)
        if not found or int(found[1]) >= shape.layers:
            raise InputError(f"{folder}: tensor {name} is no LoRA of W_q in this model's layers")
        part = (a if found[2] == "A" else b)[int(found[1])]
        if tensor.size != part.size or tensor.shape[-1] != part.shape[-1]:
            raise InputError(f"{folder}: tensor {name} has shape {tensor.shape}, this model's has another")
        part[...] = tensor.reshape(part.shape)
    return a, b, config["lora_alpha"] / rank


def read_gains(folder: Path, shape: Shape) -> np.ndarray:
    """Gains, float32 [L, F]."""
    _, tensors = _read(folder, _HANDLED_GAINS)
    names = [_GAIN.format(layer) for layer in range(shape.layers)]
    if odd := sorted(tensors.keys() ^ set(names)):
        raise InputError(f"{folder}: gains of W_down's input are not those of this model's layers ({odd[0]})")
    for name, tensor in tensors.items():
        if tensor.shape != (1, shape.mlp_dim):
            raise InputError(f"{folder}: tensor {name} has shape {tensor.shape}, not (1, {shape.mlp_dim})")
    return np.concatenate([tensors[name] for name in names]).astype(np.float32)


def _config(folder: Path) -> dict:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the adapter cannot be loaded ({reason(error)})") from None


def _read(folder: Path, handled: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """Configuration and tensors. InputError on damage, or settings other than those handled."""
    config = _config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: the adapter cannot be loaded ({reason(error)})") from None
    for name, value in handled.items():
        if config.get(name, value) not in (value, None):
            raise InputError(f"{folder}: the adapter's {name} = {config[name]!r} is not handled")
    return config, tensors
