"""A model folder's configuration and weights for the Flax decoder.

One table maps checkpoint keys to parameters with a transform, and it is strict both ways: a key of the
checkpoint that maps to nothing, a parameter that nothing fills, and a wrong shape are refused by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
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


class Transform(NamedTuple):
    """Between a checkpoint's tensor and a parameter (of one layer)."""

    stored: Callable[[tuple[int, ...]], tuple[int, ...]]
    """the tensor's shape from the parameter's"""
    apply: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    """the parameter from the tensor, given the parameter's shape"""


SAME = Transform(lambda shape: shape, lambda tensor, shape: tensor)
TRANSPOSED = Transform(lambda shape: shape[::-1], lambda tensor, shape: tensor.T)
# [heads * D, E] -> [E, heads, D]
HEADS_OUT = Transform(
    lambda shape: (shape[1] * shape[2], shape[0]),
    lambda tensor, shape: tensor.reshape(*shape[1:], shape[0]).transpose(2, 0, 1),
)
# [E, H * D] -> [H, D, E]
HEADS_IN = Transform(
    lambda shape: (shape[2], shape[0] * shape[1]),
    lambda tensor, shape: tensor.reshape(shape[2], *shape[:2]).transpose(1, 2, 0),
)
# [heads * D] -> [heads, D]
BY_HEAD = Transform(lambda shape: (shape[0] * shape[1],), lambda tensor, shape: tensor.reshape(shape))


@dataclass(frozen=True)
class Entry:
    """Where a parameter comes from, and how it is cut."""

    key: str
    """of the checkpoint; with {} a key per layer, whose tensors are stacked"""
    transform: Transform
    cut: int | None
    """axis of the parameter (a leading layer axis included) that the mesh's model axis cuts"""

    @property
    def stacked(self) -> bool:
        return "{}" in self.key


_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
TABLE: dict[tuple[str, ...], Entry] = {
    ("embedding",): Entry("model.embed_tokens.weight", SAME, 0),
    ("head",): Entry("lm_head.weight", SAME, 0),
    ("norm", "scale"): Entry("model.norm.weight", SAME, None),
    ("layers", "before_attention", "scale"): Entry("model.layers.{}.input_layernorm.weight", SAME, None),
    ("layers", "before_mlp", "scale"): Entry("model.layers.{}.post_attention_layernorm.weight", SAME, None),
    **{
        ("layers", "attention", name, "kernel"): Entry(f"{_ATTENTION}{key}.weight", HEADS_OUT, 2)
        for name, key in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    },
    **{
        ("layers", "attention", name, "bias"): Entry(f"{_ATTENTION}{key}.bias", BY_HEAD, 1)
        for name, key in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    },
    ("layers", "attention", "query_norm", "scale"): Entry(f"{_ATTENTION}q_norm.weight", SAME, None),
    ("layers", "attention", "key_norm", "scale"): Entry(f"{_ATTENTION}k_norm.weight", SAME, None),
    ("layers", "attention", "output", "kernel"): Entry(f"{_ATTENTION}o_proj.weight", HEADS_IN, 1),
    ("layers", "attention", "output", "bias"): Entry(f"{_ATTENTION}o_proj.bias", SAME, None),
    ("layers", "mlp", "gate", "kernel"): Entry(f"{_MLP}gate_proj.weight", TRANSPOSED, 2),
    ("layers", "mlp", "up", "kernel"): Entry(f"{_MLP}up_proj.weight", TRANSPOSED, 2),
    ("layers", "mlp", "down", "kernel"): Entry(f"{_MLP}down_proj.weight", TRANSPOSED, 1),
    ("layers", "mlp", "gate", "bias"): Entry(f"{_MLP}gate_proj.bias", SAME, 1),
    ("layers", "mlp", "up", "bias"): Entry(f"{_MLP}up_proj.bias", SAME, 1),
    ("layers", "mlp", "down", "bias"): Entry(f"{_MLP}down_proj.bias", SAME, None),
}

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
        shapes |= dict.fromkeys(keys_of(entry, config), entry.transform.stored(of_layer))
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
                return entry.transform.apply(checkpoint.read(keys[0]), shape)[index].astype(config.dtype)
            layers = [
                entry.transform.apply(checkpoint.read(key), shape[1:])[index[1:]].astype(config.dtype)
                for key in keys[index[0]]
            ]
            return np.stack(layers)

        sharding = NamedSharding(mesh, specification(entry, shape, parts))
        array = jax.make_array_from_callback(shape, sharding, part)
        finite = np.asarray(jnp.isfinite(array).all(axis=tuple(range(int(entry.stacked), len(shape)))))
        if not finite.all():
            key = keys[int(np.argmin(np.atleast_1d(finite)))]
            raise InputError(f"{folder}: weight {key} holds values that are not finite")
        return array

    flat = [(path, leaf.replace(filled(path, leaf.shape))) for path, leaf in nnx.to_flat_state(abstract)]
    return graph, nnx.from_flat_state(flat)
