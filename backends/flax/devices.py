"""What the Flax backend runs on: devices, their mesh, and the cache of compiled programs."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backends import models
from backends.base import Shape
from backends.core.errors import InputError

REPORTED_SECONDS = 0.5
"""compilations below this are not reported"""


def resolve_devices(device: str) -> list[jax.Device]:
    """ "auto": all devices of the kind that JAX prefers; "cpu", "cuda", "tpu": all of that kind; "cuda:1":
    that one. InputError says what JAX sees instead of the requested device."""
    if device == "auto":
        return jax.devices()
    kind, _, number = device.partition(":")
    try:
        found = jax.devices(kind)
    except RuntimeError:
        found = []
    if number:
        found = [at for at in found if number.isdigit() and at.id == int(number)]
    if not found:
        seen = ", ".join(f"{at.platform}:{at.id}" for at in jax.devices())
        raise InputError(f"--device {device}: JAX {jax.__version__} sees {seen}; use one of them, or cpu")
    return found


def resolve_dtype(dtype: str, devices: Sequence[jax.Device]) -> str:
    """ "auto" is bfloat16 on GPU and TPU. On a CPU XLA multiplies float32 as fast (346 against 349 GFLOP/s on
    two cores with AVX512-BF16), so it is float32 there."""
    if dtype == "auto":
        return "float32" if devices[0].platform == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: float32, bfloat16 or auto")
    return dtype


def make_mesh(devices: Sequence[jax.Device], shape: Shape, model_parallel: int, weight_bytes: int) -> Mesh:
    """Devices as (data, model): `model` of them share one copy of the weights, cut by heads.

    Args:
        model_parallel: size of the model axis; 0: the smallest that leaves half of a device's memory free.

    Raises InputError where heads or devices do not divide by it.
    """
    count = len(devices)
    if not model_parallel:
        model_parallel = model_axis(count, shape.heads, weight_bytes, memory_of(devices[0]))
    if shape.heads % model_parallel:
        raise InputError(f"--model-parallel {model_parallel} does not divide the model's {shape.heads} heads")
    if count % model_parallel:
        raise InputError(f"--model-parallel {model_parallel} does not divide the {count} devices JAX sees")
    grid = np.array(devices).reshape(-1, model_parallel)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def memory_of(device: jax.Device) -> int | None:
    """Bytes that JAX may use of a device (of a GPU it takes three quarters at the start); None: a CPU, whose
    devices share the machine's."""
    return (device.memory_stats() or {}).get("bytes_limit")


def model_axis(count: int, heads: int, weight_bytes: int, memory: int | None) -> int:
    """The fewest of `count` devices, dividing them and the heads, whose share of the weights leaves half of
    each one's memory free. InputError where all together are too few."""
    for size in range(1, count + 1):
        if count % size == 0 and heads % size == 0 and (memory is None or weight_bytes / size <= memory / 2):
            return size
    raise InputError(
        f"{weight_bytes / 2**30:.1f} GiB of weights do not fit {count} devices of {memory / 2**30:.1f} GiB "
        f"(half of each is left free): more devices, or --dtype bfloat16"
    )


def describe(mesh: Mesh) -> str:
    """ "cpu:0", or "cuda x 8 (data 4, model 2)"."""
    devices = mesh.devices.ravel()
    # JAX calls every GPU "gpu"; the kind is in what its client says of itself.
    platform = "cuda" if "cuda" in devices[0].client.platform_version else devices[0].platform
    if len(devices) == 1:
        return f"{platform}:{devices[0].id}"
    return f"{platform} x {len(devices)} (data {mesh.shape['data']}, model {mesh.shape['model']})"


def place(mesh: Mesh, array: np.ndarray, axis: int | None = None) -> jax.Array:
    """An array on the mesh: cut along `axis` among the data axis where that divides, else on each device."""
    cut = axis is not None and array.shape[axis] % mesh.shape["data"] == 0
    return jax.device_put(array, NamedSharding(mesh, P(*(None,) * axis, "data") if cut else P()))


def keep_programs() -> None:
    """Compiled programs go to the user's cache folder (JAX_COMPILATION_CACHE_DIR overrides it), and a line
    says when one is compiled or fetched. Called once a process."""
    global _reporting
    if _reporting:
        return
    _reporting = True
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(models.cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.monitoring.register_event_duration_secs_listener(_report)


_reporting = False


def _report(event: str, seconds: float, **about: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration" and seconds >= REPORTED_SECONDS:
        name = str(about.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        print(f"[flax] compiled {name} in {seconds:.1f} s", flush=True)
