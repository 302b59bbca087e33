"""Which model folders can be used, and what a folder says of its model: sizes, EOS, windows, tokenizer,
hashes."""

import hashlib
import json
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from backends.base import Shape
from backends.core.errors import InputError, reason

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "MistralForCausalLM": "mistral"}
"""architecture -> its model_type"""
ROPE_TYPES = ("default", "llama3")

# Attributes of config.json that the code handles, or that do not change what it computes. Any other attribute
# whose value is not its class's default is refused by name: a model computed a little wrong is worse than
# none.
# fmt: off
_HANDLED = frozenset([
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
    "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache", "use_sliding_window", "vocab_size",
])
# Of those, what no result follows from; `eos_ids` says which ids end a response.
_NOT_COMPUTED_WITH = frozenset([
    "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
])
# What other tools and older versions leave in a config.json: marks, labels of classifiers, and settings of
# generation, which is greedy here whatever they say.
_INERT = frozenset([
    "chunk_size_feed_forward", "do_sample", "id2label", "is_decoder", "is_llama_config", "label2id",
    "max_length", "max_new_tokens", "model_max_length", "name_or_path", "num_beams", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "repetition_penalty", "return_dict",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "transformers.js_config",
    "unsloth_fixed", "unsloth_version",
])
# fmt: on
TIED = ("lm_head.weight", "model.embed_tokens.weight")
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
    """InputError, one line, on a folder that no backend can use: architecture, attribute, size, weights."""
    path, config = folder / "config.json", read_config(folder)
    architectures = config.get("architectures") or ["none named"]
    if not isinstance(architectures, list):
        raise InputError(f"{path}: architectures = {architectures!r} is no list of names")
    architecture = str(architectures[0])
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture} is not handled, only {', '.join(ARCHITECTURES)}"
        )
    wanted, found = ARCHITECTURES[architecture], config.get("model_type")
    if found != wanted:
        raise InputError(f"{path}: model_type of {architecture} is {wanted!r}, not {found!r}")
    _check_attributes(path, config)
    _check_sizes(path, folder_shape(folder))
    eos_ids(folder)
    for file in weight_files(folder):
        with open(file, "rb") as weights:
            if weights.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(f"{file} is a Git LFS pointer, not the weights: `git lfs pull` there")
    if config.get("tie_word_embeddings"):
        _check_tied(folder)


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


def _check_tied(folder: Path) -> None:
    """InputError where the files hold an output matrix that is not the embedding, to which config.json ties
    it: some loaders take the one, some the other."""
    holders = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                holders |= {name: path for name in TIED if name in set(file.keys())}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: the weights cannot be loaded ({reason(error)})") from None
    if len(holders) < len(TIED):
        return
    matrices = []
    for name in TIED:
        with safe_open(holders[name], framework="numpy") as file:
            matrices.append(file.get_tensor(name))
    if not np.array_equal(*matrices):
        raise InputError(f"{folder}: tie_word_embeddings is true, but {' is not '.join(TIED)}")


def _check_attributes(path: Path, config: dict) -> None:
    from transformers import AutoConfig

    default = AutoConfig.for_model(config["model_type"])
    for name, value in config.items():
        described = name.startswith("_")  # names and hashes, never arithmetic
        if described or name in _HANDLED | _INERT or value is None or value is False:
            continue
        usual = getattr(default, name, None)
        if value != usual or isinstance(value, bool) != isinstance(usual, bool):  # 0 == False
            raise InputError(f"{path}: attribute {name} = {value!r} is not handled")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: attribute hidden_act = {config['hidden_act']!r} is not handled, only 'silu'"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: the rope parameters are {rope!r}, not names and values")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"{path}: rope_type {kind!r} is not handled, only {' and '.join(ROPE_TYPES)}")
    for name, value in ({"rope_theta": config.get("rope_theta")} | rope).items():
        if name not in ("rope_type", "type") and not isinstance(value, int | float | None):
            raise InputError(f"{path}: rope parameter {name} = {value!r} is no number")


def _check_sizes(path: Path, shape: Shape) -> None:
    if min(astuple(shape)) < 1:
        raise InputError(f"{path}: sizes must be positive, not {shape}")
    if shape.heads % shape.kv_heads:
        raise InputError(
            f"{path}: num_attention_heads {shape.heads} is no multiple of num_key_value_heads "
            f"{shape.kv_heads}"
        )


def read_shape(config) -> Shape:
    """Sizes of a model from transformers' configuration object."""
    return Shape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        model_dim=config.hidden_size,
        mlp_dim=config.intermediate_size,
        vocab=config.vocab_size,
    )


def folder_shape(folder: Path) -> Shape:
    """Sizes of the model in a folder; nothing is loaded. InputError where transformers refuses its
    config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library's checks raise types of their own, the cause in the last line
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{folder / 'config.json'} cannot be used ({cause})") from None
    return read_shape(config)


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
    if config.model_type == "llama" or (config.model_type == "qwen2" and not config.use_sliding_window):
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
        if not name.startswith("_") and name not in _NOT_COMPUTED_WITH | _INERT
    }
    described = json.dumps([config, sorted(set(eos_ids(folder)))], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def model_hashes(folder: Path) -> dict[str, str]:
    """MODEL_HASHES of a folder."""
    return dict(zip(MODEL_HASHES, (weights_sha256(folder), config_sha256(folder)), strict=True))


def tokenizer_sha256(folder: Path) -> str:
    """One hash over what decides a text's token ids: the tokenizer's files and the chat template."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, files: str):
    """Kept for the next unit of this process, as long as the files have this hash (`tokenizer_sha256`)."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises a dozen types here
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason(error)})") from None


def load_tokenizer(folder: Path, chat: bool = True):
    """The folder's tokenizer. InputError if it cannot be loaded, lacks an EOS token or (`chat`) a chat
    template, or has ids that the model has no embedding for."""
    tokenizer = _tokenizer(folder, tokenizer_sha256(folder))
    if chat and not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template, so this is no instruct model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token")
    largest, size = max(tokenizer.get_vocab().values()), folder_shape(folder).vocab
    if largest >= size:
        raise InputError(f"{folder}: the tokenizer's ids go up to {largest}, vocab_size is {size} only")
    return tokenizer
