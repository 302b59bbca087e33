"""Model folders: where they come from (`sources`), which of them can be used (`usable`),
their `tokenizer`, and what ends a response (`turns`)."""

from backends.models.sources import EMBEDDED, TINY, cache_folder, local_folder, missing, without_progress_bars
from backends.models.tokenizer import check_ids, control_tokens, load_tokenizer, tokenizer_sha256
from backends.models.turns import disagreements, stop_ids, turn_end
from backends.models.usable import (
    EMBEDDING,
    INERT,
    MODEL_HASHES,
    check_folder,
    configuration,
    eos_ids,
    folder_shape,
    model_hashes,
    read_config,
    read_shape,
    rope_parameters,
    sliding_windows,
    tensor_shapes,
    weight_files,
    weights_sha256,
)

__all__ = [
    "EMBEDDED",
    "EMBEDDING",
    "INERT",
    "MODEL_HASHES",
    "TINY",
    "cache_folder",
    "check_folder",
    "check_ids",
    "configuration",
    "control_tokens",
    "disagreements",
    "eos_ids",
    "folder_shape",
    "load_tokenizer",
    "local_folder",
    "missing",
    "model_hashes",
    "read_config",
    "read_shape",
    "rope_parameters",
    "sliding_windows",
    "stop_ids",
    "tensor_shapes",
    "tokenizer_sha256",
    "turn_end",
    "weight_files",
    "weights_sha256",
    "without_progress_bars",
]
