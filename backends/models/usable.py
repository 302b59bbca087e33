"""Which folders hold a model, and what a folder says of it: sizes, EOS, windows, hashes. Which of them a
backend can run says its own `usable`."""

import hashlib
import json
import math
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from backends.base import Shape
from backends.core.errors import InputError, reason

# Attributes of config.json from which no result follows (`eos_ids` says which ids end a response); also what
# other tools and older versions leave there: marks, labels of classifiers, and settings of generation, which
# is greedy here whatever they say.
# fmt: off
INERT = frozenset([
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "generation_config", "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "min_p",
    "model_max_length", "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers.js_config", "transformers_version",
    "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
])
# fmt: on
EMBEDDING = "model.embed_tokens.weight"
TIED = ("lm_head.weight", EMBEDDING)
_LFS_POINTER = b"version https://git-lfs"
MODEL_HASHES = ("weights_sha256", "config_sha256")
"""what says that two folders hold the same model"""


def read_config(folder: Path) -> dict:
    """config.json of a model folder. InputError if there is none or it cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is no model folder (no config.json): give a Hugging Face folder with safetensors"
        )
    return _read_object(path)


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def check_folder(folder: Path) -> None:
    """InputError, one line, on a folder that no backend can use: class, sizes, EOS, weights."""
    path, config = folder / "config.json", read_config(folder)
    _check_class(path, config)
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value) and name not in INERT:
            raise InputError(f"{path}: attribute {name} = {value} is no finite number")
    for rope in rope_parameters(path, config):
        for name, value in rope.items():
            if name not in ("rope_type", "type") and not isinstance(value, int | float | None):
                raise InputError(f"{path}: rope parameter {name} = {value!r} is no number")
    for file in weight_files(folder):
        with open(file, "rb") as weights:
            if weights.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(f"{file} is a Git LFS pointer, not the weights: `git lfs pull` there")
    _check_sizes(path, folder_shape(folder))
    eos_ids(folder)
    if config.get("tie_word_embeddings"):
        _check_tied(folder)


def _check_class(path: Path, config: dict) -> None:
    """The architecture must be the one that transformers loads."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    architectures, found = config.get("architectures") or ["none named"], config.get("model_type")
    found = str(found) if isinstance(found, list | dict) else found
    if not isinstance(architectures, list):
        raise InputError(f"{path}: architectures = {architectures!r} is no list of names")
    architecture = str(architectures[0])
    types = [kind for kind, name in CLASSES.items() if name == architecture]
    if types and found not in CLASSES:
        usual = max(types, key=lambda kind: architecture.lower().startswith(kind.replace("_", "")))
        raise InputError(f"{path}: model_type of {architecture} is {usual!r}, not {found!r}")
    if found not in types:
        known = (
            f"{found!r} is a {CLASSES[found]}" if found in CLASSES else "no language model of transformers"
        )
        raise InputError(f"{path}: architecture {architecture} is not handled: {known}")


def rope_parameters(path: Path, config: dict) -> list[dict]:
    """What config.json says of rotary turns: once, or for each kind of layer."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # as transformers takes them
    if not isinstance(rope, dict):
        raise InputError(f"{path}: the rope parameters are {rope!r}, not names and values")
    by_kind = [value for value in rope.values() if isinstance(value, dict)]
    return by_kind or [{"rope_theta": config.get("rope_theta")} | rope]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, as transformers chooses them: model.safetensors,
    else those that its index names. What else lies there is no part of the model.

    Raises InputError where there are none, one is missing, or the folder holds an adapter beside its model.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json), which would be loaded too: merge it into the "
            f"weights, or move it elsewhere"
        )
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise InputError(
            f"{folder} has no model.safetensors and no index of its parts (other formats are not read): "
            f"convert it"
        )
    parts = _read_object(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(type(name) is str for name in parts.values()):
        raise InputError(f"{index} names no files")
    files = [folder / name for name in sorted(set(parts.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing, as {missing[0]}"
        )
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a folder. InputError on a damaged file."""
    shapes = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in set(file.keys())}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: the weights cannot be loaded ({reason(error)})") from None
    return shapes


def _check_tied(folder: Path) -> None:
    """InputError where the files hold an output matrix that is not the embedding, to which config.json ties
    it: some loaders take the one, some the other."""
    matrices = []
    for path in weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            matrices += [file.get_tensor(name) for name in TIED if name in set(file.keys())]
    if len(matrices) == len(TIED) and not np.array_equal(*matrices):
        raise InputError(f"{folder}: tie_word_embeddings is true, but {' is not '.join(TIED)}")


def _check_sizes(path: Path, shape: Shape) -> None:
    if not all(type(size) is int and size > 0 for size in astuple(shape) if size is not None):
        raise InputError(f"{path}: sizes must be positive, not {shape}")
    if shape.heads % shape.kv_heads:
        raise InputError(
            f"{path}: num_attention_heads {shape.heads} is no multiple of num_key_value_heads "
            f"{shape.kv_heads}"
        )


def read_shape(config, neurons: bool = True) -> Shape:
    """Sizes of a model from transformers' configuration object.

    Args:
        neurons: a matrix of its own reads the units of each layer's MLP.
    """
    head_dim = getattr(config, "head_dim", None)
    return Shape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads if head_dim is None else head_dim,
        model_dim=config.hidden_size,
        mlp_dim=config.intermediate_size if neurons else None,
        vocab=config.vocab_size,
    )


def configuration(folder: Path):
    """transformers' configuration object. InputError where it refuses config.json."""
    from transformers import AutoConfig

    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library's checks raise types of their own, the cause in the last line
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{folder / 'config.json'} cannot be used ({cause})") from None


def folder_shape(folder: Path) -> Shape:
    """Sizes of the model in a folder; nothing is loaded. InputError where config.json does not give them."""
    config, names = configuration(folder), tensor_shapes(folder)
    try:
        layers = range(config.num_hidden_layers)
        return read_shape(config, all(f"model.layers.{at}.mlp.down_proj.weight" in names for at in layers))
    except (AttributeError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} gives no sizes of a decoder ({reason(error)})") from None


def eos_ids(folder: Path) -> list[int]:
    """Ids that end a response: generation_config.json's, else config.json's. InputError where they are
    none."""
    generation = folder / "generation_config.json"
    ends = _read_object(generation).get("eos_token_id") if generation.is_file() else None
    ends = read_config(folder).get("eos_token_id") if ends is None else ends
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int for end in ends):
        raise InputError(f"{folder}: eos_token_id = {ends!r} is no token id")
    return ends


def sliding_windows(config) -> list[int | None]:
    """Tokens that each layer attends to, itself included; None: all. `config` is transformers' object."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama" or not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


@lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, modified_ns: int) -> bytes:
    """Kept for the next unit of this process, as long as size and time are the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def weights_sha256(folder: Path) -> str:
    """One hash over the files of a folder's weights, by name."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        status = path.stat()
        digest.update(path.name.encode() + _file_sha256(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def config_sha256(folder: Path) -> str:
    """One hash over what config.json says of the arithmetic, and the ids that end a response."""
    config = {
        name: value
        for name, value in read_config(folder).items()
        if not name.startswith("_") and name not in INERT
    }
    described = json.dumps([config, sorted(set(eos_ids(folder)))], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def model_hashes(folder: Path) -> dict[str, str]:
    """MODEL_HASHES of a folder."""
    return dict(zip(MODEL_HASHES, (weights_sha256(folder), config_sha256(folder)), strict=True))
