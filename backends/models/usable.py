"""Which model folders can be used, and what a folder says of its model: sizes, EOS, windows, tokenizer,
hashes."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from backends.base import Shape
from backends.core.errors import InputError, reason

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
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
# fmt: on


def read_config(folder: Path) -> dict:
    """config.json of a model folder. InputError if there is none or it cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is no model folder (no config.json): give a Hugging Face folder with safetensors"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None


def check_folder(folder: Path) -> None:
    """InputError, one line, on a folder that no backend can use: architecture, attribute, weights."""
    config = read_config(folder)
    architecture = (config.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture} is not handled, only {', '.join(ARCHITECTURES)}"
        )
    _check_attributes(folder / "config.json", config)
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors (other weight formats are not read): convert it")


def _check_attributes(path: Path, config: dict) -> None:
    from transformers import AutoConfig

    default = AutoConfig.for_model(config["model_type"])
    for name, value in config.items():
        described = name.startswith("_")  # names and hashes, never arithmetic
        if described or name in _HANDLED or value is None or value is False:
            continue
        usual = getattr(default, name, None)
        if value != usual or isinstance(value, bool) != isinstance(usual, bool):  # 0 == False
            raise InputError(f"{path}: attribute {name} = {value!r} is not handled")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: attribute hidden_act = {config['hidden_act']!r} is not handled, only 'silu'"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"{path}: rope_type {kind!r} is not handled, only {' and '.join(ROPE_TYPES)}")


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
    """Sizes of the model in a folder that `check_folder` has passed; nothing is loaded."""
    from transformers import AutoConfig

    return read_shape(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def eos_ids(folder: Path) -> list[int]:
    """Ids that end a response: generation_config.json's, else config.json's."""
    generation = folder / "generation_config.json"
    ends = None
    if generation.is_file():
        ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
    ends = read_config(folder).get("eos_token_id") if ends is None else ends
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


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
    """One hash over a folder's safetensors files, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        digest.update(path.name.encode() + _file_sha256(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


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
    """The folder's tokenizer. InputError if it cannot be loaded, or lacks an EOS token, or (`chat`) a chat
    template."""
    tokenizer = _tokenizer(folder, tokenizer_sha256(folder))
    if chat and not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template, so this is no instruct model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token")
    return tokenizer
