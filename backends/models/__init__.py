"""Model folders: where they come from (`sources`) and which of them can be used (`usable`)."""

from backends.models.sources import EMBEDDED, TINY, cache_folder, local_folder, missing, without_progress_bars
from backends.models.usable import (
    MODEL_HASHES,
    check_folder,
    eos_ids,
    folder_shape,
    load_tokenizer,
    model_hashes,
    read_config,
    read_shape,
    sliding_windows,
    tokenizer_sha256,
    weight_files,
    weights_sha256,
)

__all__ = [
    "EMBEDDED",
    "MODEL_HASHES",
    "TINY",
    "cache_folder",
    "check_folder",
    "eos_ids",
    "folder_shape",
    "load_tokenizer",
    "local_folder",
    "missing",
    "model_hashes",
    "read_config",
    "read_shape",
    "sliding_windows",
    "tokenizer_sha256",
    "weight_files",
    "weights_sha256",
    "without_progress_bars",
]
