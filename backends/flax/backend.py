"""Loads a model folder into the Flax decoder, on a mesh of devices."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from backends import models
from backends.core.loaded import Loaded
from backends.flax import devices, weights
from backends.flax.model import Model


def load(model_dir: Path, dtype: str, device: str, model_parallel: int) -> Loaded:
    """See `backends.load`."""
    devices.keep_programs()
    found = devices.resolve_devices(device)
    dtype = devices.resolve_dtype(dtype, found)
    config = weights.read_config(model_dir, dtype)
    count = sum(int(np.prod(shape)) for shape in weights.parameters(config).values())
    mesh = devices.make_mesh(found, config.shape, model_parallel, count * jnp.dtype(dtype).itemsize)
    config = replace(config, fused=found[0].platform != "cpu")
    graph, state = weights.load(model_dir, config, mesh)
    model = Model(graph, state, config, mesh, np.array(models.stop_ids(model_dir), int))
    return Loaded("flax", model, dtype, devices.describe(mesh), config.shape)
