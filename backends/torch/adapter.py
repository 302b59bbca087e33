"""PEFT adapters in and around the model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from backends.core.errors import InputError, reason


@contextmanager
def quietly() -> Iterator[None]:
    """Around PEFT's loading: peft 0.21 asks transformers 5.23 for a renamed property, once a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def adapted(model: torch.nn.Module, folder: Path | None) -> Iterator[None]:
    """The model with a PEFT adapter in place, not merged, so that it answers exactly as it was tuned.

    Raises InputError on an adapter that PEFT cannot load.
    """
    if folder is None:
        yield
        return
    import peft  # takes seconds, and the sweep does without

    try:
        with quietly():
            wrapped = peft.PeftModel.from_pretrained(model, folder)
    except Exception as error:  # many types, as for a damaged model
        raise InputError(f"{folder}: the adapter cannot be loaded ({reason(error)})") from None
    try:
        yield
    finally:
        wrapped.unload()


def wrap(model: torch.nn.Module, config):
    """The model with new PEFT layers inside, by PEFT's configuration."""
    import peft

    with quietly():
        wrapped = peft.get_peft_model(model, config)
    config.base_model_name_or_path = ""  # PEFT's choice would be this machine's path
    return wrapped


def save(wrapped, folder: Path) -> None:
    wrapped.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
