"""Adapters on the mesh."""

from pathlib import Path

import numpy as np

from backends.core import adapters
from backends.flax.decoder import Adapter
from backends.flax.model import Model


def load(model: Model, folder: Path | None) -> Adapter | None:
    """An adapter on the model's mesh. InputError on one that is damaged, of another model's shape, or more
    than plain LoRA on W_q or IA3 on what W_down reads."""
    if folder is None:
        return None
    folder, shape = Path(folder), model.config.shape
    if adapters.is_gains(folder):
        return Adapter(gains=model.put(adapters.read_gains(folder, shape)))
    a, b, scale = adapters.read(folder, shape)
    return Adapter(model.put(a), model.put(b), np.float32(scale))
