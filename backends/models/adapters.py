"""Adapters as other programs take them: PEFT's folder with the settings that matter, or merged weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from backends.core.errors import InputError, reason
from backends.core.files import write_json
from backends.models.usable import read_config, weight_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"

# What an adapter of a run may say. PEFT refuses settings that it does not know, and each version adds some:
# all others are left out, where they have no effect. r and lora_alpha stay even at PEFT's defaults, because
# other programs (vLLM) want them.
_SAID = {
    "LORA": ("r", "lora_alpha", "target_modules", "layers_to_transform"),
    "IA3": ("target_modules", "feedforward_modules"),
}
_ALWAYS = ("peft_type", "task_type", "inference_mode")
_REPLACED = ("base_model_name_or_path", "revision")
_WITHOUT_EFFECT = (None, False, {}, [], "none", 0.0)
_DEFAULTS = {
    "init_lora_weights": True,
    "init_ia3_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


def minimal_config(folder: Path) -> dict:
    """What an adapter's configuration says beyond PEFT's defaults, its base model left out. InputError where
    it is more than LoRA or IA3, or cannot be read."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None
    kind = config.get("peft_type")
    if kind not in _SAID:
        raise InputError(f"{path}: peft_type {kind!r} is none of {', '.join(_SAID)}")
    said = (*_ALWAYS, *_SAID[kind])
    if missing := [name for name in said if config.get(name) is None and name != "layers_to_transform"]:
        raise InputError(f"{path} lacks {missing[0]}")
    for name, value in config.items():
        plain = value in _WITHOUT_EFFECT or _DEFAULTS.get(name) == value
        if name not in (*said, *_REPLACED, "peft_version") and not plain:
            raise InputError(f"{path}: {name} = {value!r} is not handled")
    found = {name: config[name] for name in said if config.get(name) is not None}
    alpha = found.get("lora_alpha")
    return found | ({"lora_alpha": int(alpha)} if alpha is not None and alpha == int(alpha) else {})


def write_adapter(folder: Path, to: Path, base: str, revision: str | None) -> None:
    """Writes an adapter's folder anew: file modes follow the umask, the configuration is minimal.

    Args:
        base: hub id or folder of the model that it belongs to.
        revision: of a model of the hub; None: its newest.
    """
    config = minimal_config(folder) | {"base_model_name_or_path": base}
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / CONFIG, config | ({"revision": revision} if revision else {}))
    shutil.copyfile(folder / WEIGHTS, to / WEIGHTS)  # its content, not its mode


def changes(folder: Path) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Weight of the base model -> what it becomes, float32 from float32.

    LoRA: W [out, in] + scale * B [out, r] A [r, in]. IA3 on what a matrix reads: W [out, in] * gains [1, in].
    InputError where the adapter's tensors are others.
    """
    config = minimal_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read ({reason(error)})") from None
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        matrix, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        parts.setdefault(f"{matrix}.weight", {})[part] = tensor.astype(np.float32)
    wanted = {"lora_A", "lora_B"} if config["peft_type"] == "LORA" else {"ia3_l"}
    if odd := [matrix for matrix, own in parts.items() if own.keys() != wanted]:
        raise InputError(f"{folder / WEIGHTS}: {odd[0]} has not {' and '.join(sorted(wanted))}")
    if config["peft_type"] == "IA3":
        return {matrix: _gained(own["ia3_l"]) for matrix, own in parts.items()}
    scale = np.float32(config["lora_alpha"] / config["r"])
    return {matrix: _added(own["lora_A"], own["lora_B"], scale) for matrix, own in parts.items()}


def _added(a: np.ndarray, b: np.ndarray, scale: np.float32) -> Callable[[np.ndarray], np.ndarray]:
    return lambda weight: weight + scale * (b @ a)


def _gained(gains: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda weight: weight * gains


def merge(base: Path, folder: Path, to: Path) -> int:
    """Writes the base model's folder with an adapter merged into its weights; how many matrices changed.

    The arithmetic is float32, and so are the changed matrices in the file: in a bfloat16 base many changes
    would be rounded away. All other weights are as they were. config.json names float32, in which every
    reader gets the exact sum. InputError where the adapter belongs to another model.
    """
    to.mkdir(parents=True, exist_ok=True)
    files, changed = weight_files(base), changes(folder)
    sizes, left = {}, set(changed)
    for path in files:
        tensors = {}
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensors[name] = file.get_tensor(name)
                if name in left:
                    tensors[name] = _changed(folder, name, tensors[name], changed[name])
        left -= tensors.keys()
        sizes |= {name: tensor.nbytes for name, tensor in tensors.items()}
        (to / path.name).touch()
        mode = (to / path.name).stat().st_mode  # by the umask; safetensors' own files are their owner's alone
        save_file(tensors, to / path.name, metadata={"format": "pt"})
        (to / path.name).chmod(mode)
    if left:
        raise InputError(f"{folder} changes {min(left)}, which {base} has not: it is another model's adapter")
    _write_rest(base, to, sum(sizes.values()))
    return len(changed)


def _changed(
    folder: Path, name: str, weight: np.ndarray, change: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    try:
        found = change(weight.astype(np.float32))
    except ValueError:
        found = None
    if found is None or found.shape != weight.shape:
        raise InputError(f"{folder}: {name} is {weight.shape} in the base model, which does not fit")
    return found


def _write_rest(base: Path, to: Path, total_size: int) -> None:
    """Tokenizer, template, generation settings and licence as they are; config.json with its new type, and
    the index of the parts, if there is one, with their new size."""
    kept = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")
    for path in sorted(file for pattern in kept for file in base.glob(pattern)):
        stray = path.name == INDEX and (base / "model.safetensors").is_file()
        if path.is_file() and not stray:
            shutil.copyfile(path, to / path.name)
    config = read_config(base)
    named = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    write_json(to / "config.json", both_spellings(config) | dict.fromkeys(named, "float32"))
    if (to / INDEX).is_file():
        index = json.loads((to / INDEX).read_text(encoding="utf-8"))
        write_json(to / INDEX, index | {"metadata": index.get("metadata", {}) | {"total_size": total_size}})


def both_spellings(config: dict) -> dict:
    """A config.json with its rotary turns as transformers 5 names them, and as older readers do, which would
    take their default for what they do not find. (Turns by kind of layer have no older name.)"""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    older = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return older | config
