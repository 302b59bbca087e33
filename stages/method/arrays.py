"""Checks of numeric arguments: a ValueError begins with the argument's name."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Room for rounding in inner products, relative to the norms: sums made in float32 pass, mistakes do not.
ROUNDING = 1e-6


def array(
    name: str,
    value: ArrayLike,
    *,
    axes: int | None = None,
    shape: tuple[int, ...] | None = None,
    low: float = -np.inf,
    high: float = np.inf,
) -> FloatArray:
    """`value` as a float64 array that is finite, not empty, of the shape and in the range asked for."""
    try:
        checked = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be an array of real numbers") from None
    if axes is not None and checked.ndim != axes:
        raise ValueError(f"{name}: must have {axes} axes, has shape {checked.shape}")
    if shape is not None and checked.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}, has {checked.shape}")
    if checked.size == 0:
        raise ValueError(f"{name}: is empty (shape {checked.shape})")
    if not np.all(np.isfinite(checked)):
        raise ValueError(f"{name}: holds NaN or infinity")
    if checked.min() < low or checked.max() > high:
        raise ValueError(
            f"{name}: must lie in [{low:g}, {high:g}], found {checked.min():.6g} to {checked.max():.6g}"
        )
    return checked


def count(name: str, value: int, *, low: int = 1, high: int | None = None) -> int:
    """`value` as a whole number in low..high."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: must be a whole number, not {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}: must be {limits}, not {value}")
    return int(value)
