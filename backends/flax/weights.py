"""A model folder's configuration and weights for the Flax decoder.

One table maps checkpoint keys to parameters, and it is strict both ways: a key of the
checkpoint that maps to nothing, a parameter that nothing fills, and a wrong shape are refused by name.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (teaches numpy, and so safetensors, bfloat16)
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from backends import models
from backends.core.errors import InputError, reason
from backends.flax.decoder import EVERY, Config, Decoder


class Entry(NamedTuple):
    """Where a parameter comes from, and how it is cut."""

    key: str
    """of the checkpoint; with {} a key per layer, whose tensors are stacked"""
    inputs: int | None
    """of a parameter's axes (of one layer) the first that a matrix reads, the columns of the checkpoint's
    [out, in]; 0: a vector; None: as in the checkpoint"""
    cut: int | None
    """axis of the parameter (a leading layer axis included) that the mesh's model axis cuts"""

    @property
    def stacked(self) -> bool:
        return "{}" in self.key

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint's shape from that of the parameter (of one layer)."""
        if self.inputs is None:
            return shape
        return tuple(math.prod(axes) for axes in (shape[self.inputs :], shape[: self.inputs]) if axes)

    def read(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return tensor if self.inputs is None else tensor.T.reshape(shape)


TABLE: dict[tuple[str, ...], Entry] = {
    ("embedding",): Entry("model.embed_tokens.weight", None, 0),
    ("head",): Entry("lm_head.weight", None, 0),
    ("norm", "scale"): Entry("model.norm.weight", 0, None),
}
_NORMS = {
    ("before_attention",): "input_layernorm",
    ("before_mlp",): "post_attention_layernorm",
    ("attention", "query_norm"): "self_attn.q_norm",
    ("attention", "key_norm"): "self_attn.k_norm",
}
_PROJECTIONS = {
    ("attention", "query"): ("self_attn.q_proj", 1, 2, 1),
    ("attention", "key"): ("self_attn.k_proj", 1, 2, 1),
    ("attention", "value"): ("self_attn.v_proj", 1, 2, 1),
    ("attention", "output"): ("self_attn.o_proj", 2, 1, None),
    ("mlp", "gate"): ("mlp.gate_proj", 1, 2, 1),
    ("mlp", "up"): ("mlp.up_proj", 1, 2, 1),
    ("mlp", "down"): ("mlp.down_proj", 1, 1, None),
}
"""module -> key, inputs, and the axes that are cut of kernel and bias"""
for path, key in _NORMS.items():
    TABLE["layers", *path, "scale"] = Entry(f"model.layers.{{}}.{key}.weight", 0, None)
for path, (key, inputs, kernel, bias) in _PROJECTIONS.items():
    TABLE["layers", *path, "kernel"] = Entry(f"model.layers.{{}}.{key}.weight", inputs, kernel)
    TABLE["layers", *path, "bias"] = Entry(f"model.layers.{{}}.{key}.bias", 0, bias)

# Buffers that old checkpoints carry and that the configuration gives anyway.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_config(folder: Path, dtype: str) -> Config:
    """The decoder's configuration. The folder has passed `flax.usable`, which refuses what is not handled."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    windows = models.sliding_windows(config)
    shape = models.read_shape(config)
    llama_bias = bool(getattr(config, "attention_bias", False))
    return Config(
        shape=shape,
        eps=config.rms_norm_eps,
        frequencies=tuple(rotary_frequencies(config.rope_parameters, shape.head_dim)),
        windows=tuple(EVERY if window is None else window for window in windows),
        qkv_bias=llama_bias or config.model_type == "qwen2",
        output_bias=llama_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        tied=bool(config.tie_word_embeddings),
        head_norms=config.model_type == "qwen3",
        dtype=dtype,
    )


def rotary_frequencies(rope: dict, dim: int) -> list[float]:
    """Radians a position of each pair of channels, [D / 2]; with Llama 3.1's scaling by wavelength where
    `rope_type` is llama3 (transformers' `modeling_rope_utils`).

    Every step is rounded to float32 where transformers rounds it. One rounding fewer would be more exact, and
    another model: a last digit here moves O by 2e-4 on one head of SmolLM2.
    """
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    powers = (np.float64(rope["rope_theta"]) ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if rope.get("rope_type", "default") == "llama3":
        low, high, factor = (
            np.float32(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor")
        )
        context = np.float32(rope["original_max_position_embeddings"])
        waves = np.float32(2 * np.pi) / frequencies
        scaled = np.where(waves > context / low, frequencies / factor, frequencies)
        share = (context / waves - low) / (high - low)
        between = (np.float32(1) - share) * scaled / factor + share * scaled
        medium = ~(waves < context / high) & ~(waves > context / low)
        frequencies = np.where(medium, between, scaled)
    return frequencies.tolist()


def keys_of(entry: Entry, config: Config) -> list[str]:
    layers = range(config.shape.layers if entry.stacked else 1)
    return [entry.key.format(layer) for layer in layers]


class Checkpoint:
    """The weights of a folder, read tensor by tensor."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, {}
        for path in models.weight_files(folder):
            try:
                with safe_open(path, framework="numpy") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: the weights cannot be loaded ({reason(error)})") from None

    def read(self, key: str) -> np.ndarray:
        with safe_open(self.files[key], framework="numpy") as file:
            return file.get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self.files[key], framework="numpy") as file:
            return tuple(file.get_slice(key).get_shape())


def check(checkpoint: Checkpoint, config: Config) -> None:
    """InputError names the first weight that is missing, unexpected, or of another shape than config.json
    says."""
    shapes = {}
    for path, shape in parameters(config).items():
        entry = TABLE[path]
        of_layer = shape[1:] if entry.stacked else shape
        shapes |= dict.fromkeys(keys_of(entry, config), entry.stored(of_layer))
    tied = {"lm_head.weight"} if config.tied else set()
    unexpected = {key for key in checkpoint.files.keys() - shapes - tied if not _RECOMPUTED.fullmatch(key)}
    for what, keys in (("missing", shapes.keys() - checkpoint.files.keys()), ("unexpected", unexpected)):
        if keys:
            raise InputError(f"{checkpoint.folder}: {len(keys)} weights are {what}, the first is {min(keys)}")
    for key, shape in shapes.items():
        if (stored := checkpoint.shape(key)) != shape:
            raise InputError(
                f"{checkpoint.folder}: weight {key} has shape {stored}, by config.json it is {shape}"
            )


def parameters(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path and shape of every parameter; each stands in the table, or there would be nothing to fill it."""
    abstract = nnx.state(nnx.eval_shape(lambda: Decoder(config)))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    if unfilled := sorted(shapes.keys() - TABLE.keys()):
        raise ValueError(f"parameter {'.'.join(unfilled[0])} stands in no line of the table")
    return shapes


def specification(entry: Entry, shape: tuple[int, ...], parts: int) -> P:
    """How a parameter lies on the mesh: cut along its axis where that divides, else a copy on each device."""
    if entry.cut is None or shape[entry.cut] % parts:
        return P()
    return P(*(None,) * entry.cut, "model")


def load(folder: Path, config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder, split into its structure and its weights, each device holding its own part only.

    Raises InputError on weights that are missing, unexpected, of another shape, or not finite.
    """
    checkpoint = Checkpoint(folder)
    check(checkpoint, config)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config)))
    parts = mesh.shape["model"]

    def filled(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        entry = TABLE[path]
        keys = keys_of(entry, config)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if not entry.stacked:
                return entry.read(checkpoint.read(keys[0]), shape)[index].astype(config.dtype)
            layers = (entry.read(checkpoint.read(key), shape[1:]) for key in keys[index[0]])
            return np.stack([layer[index[1:]].astype(config.dtype) for layer in layers])

        sharding = NamedSharding(mesh, specification(entry, shape, parts))
        array = jax.make_array_from_callback(shape, sharding, part)
        finite = np.asarray(jnp.isfinite(array).all(axis=tuple(range(int(entry.stacked), len(shape)))))
        if not finite.all():
            key = keys[int(np.argmin(np.atleast_1d(finite)))]
            raise InputError(f"{folder}: weight {key} holds values that are not finite")
        return array

    flat = [(path, leaf.replace(filled(path, leaf.shape))) for path, leaf in nnx.to_flat_state(abstract)]
    return graph, nnx.from_flat_state(flat)
