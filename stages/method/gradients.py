"""What Eq. 2 needs, from inner products of fold gradients.

Notation as in `stages.method.metrics`. A head's Gram matrix is [2F, 2F], safe folds first, of equal size.
"""

import numpy as np
from numpy.typing import ArrayLike

from stages.method.arrays import ROUNDING, FloatArray, array, count


def conflict_from_gram(gram: ArrayLike, folds: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(dot, norm_safe, norm_util), each [L, H], from inner products of fold-mean gradients; input of Eq. 2.

    `gram` is [L, H, 2F, 2F], safe folds first. Folds are of equal size, so the full mean gradient is the mean
    over folds, and all three follow from the Gram matrix. A norm that rounding alone could have made
    is set to 0 (its folds cancel), and dot is held within norm_safe * norm_util.

    Raises ValueError on NaN, wrong shape, or a matrix that cannot be a Gram matrix.

    >>> gram = np.array([[[[4.0, -1.0], [-1.0, 1.0]]]])  # one head, one fold: |g_safe| = 2, |g_util| = 1
    >>> [float(v[0, 0]) for v in conflict_from_gram(gram, folds=1)]
    [-1.0, 2.0, 1.0]
    """
    folds = count("folds", folds)
    gram = checked_gram(gram)
    if gram.shape[-1] != 2 * folds:
        raise ValueError(f"folds: {folds} do not fit a gram of shape {gram.shape}")
    mean = np.full((1, folds), 1 / folds)
    dot, norm_safe, norm_util = combine_folds(gram, mean, mean)
    return dot[0], norm_safe[0], norm_util[0]


def checked_gram(gram: ArrayLike) -> FloatArray:
    """`gram` as float64 [L, H, 2F, 2F], checked for what every Gram matrix satisfies."""
    gram = array("gram", gram, axes=4)
    if gram.shape[-1] != gram.shape[-2] or gram.shape[-1] % 2:
        raise ValueError(f"gram: must be [layers, heads, 2 * folds, 2 * folds], not {gram.shape}")
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    if np.any(diagonal < 0):
        raise ValueError(f"gram: negative squared norm {diagonal.min():.6g} on the diagonal")
    norms = np.sqrt(diagonal)
    bound = norms[..., :, None] * norms[..., None, :]
    if np.any(np.abs(gram - np.swapaxes(gram, -1, -2)) > ROUNDING * bound):
        raise ValueError("gram: not symmetric")
    if np.any(np.abs(gram) > bound * (1 + ROUNDING)):
        raise ValueError("gram: an inner product exceeds the product of its norms")
    return gram


def combine_folds(
    gram: FloatArray, w_safe: FloatArray, w_util: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(dot, norm_safe, norm_util), each [R, L, H], of fold gradients weighted by [R, F] (rows add to 1).

    `gram` as `checked_gram` returns it. ValueError where it is not positive semidefinite.
    """
    folds = gram.shape[-1] // 2
    blocks = (gram[..., :folds, :folds], gram[..., folds:, folds:], gram[..., :folds, folds:])
    pairs = ((w_safe, w_safe), (w_util, w_util), (w_safe, w_util))
    safe_squared, util_squared, dot = (
        np.einsum("rf,lhfg,rg->rlh", left, block, right, optimize=True)
        for (left, right), block in zip(pairs, blocks, strict=True)
    )
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    scale_safe = diagonal[..., :folds].max(axis=-1)  # (L, H), what rounding is relative to
    scale_util = diagonal[..., folds:].max(axis=-1)
    for squared, scale in ((safe_squared, scale_safe), (util_squared, scale_util)):
        if np.any(squared < -ROUNDING * scale):
            raise ValueError("gram: not positive semidefinite (a mean gradient has a negative squared norm)")
    # Folds that cancel leave a norm of pure rounding, and a direction of pure noise.
    rounding = 4 * folds * np.finfo(np.float64).eps
    norm_safe = np.sqrt(np.where(safe_squared <= rounding * scale_safe, 0.0, safe_squared))
    norm_util = np.sqrt(np.where(util_squared <= rounding * scale_util, 0.0, util_squared))
    bound = norm_safe * norm_util
    if np.any(np.abs(dot) > bound + ROUNDING * np.sqrt(scale_safe * scale_util)):
        raise ValueError("gram: not positive semidefinite (a mean product exceeds its norms)")
    return np.clip(dot, -bound, bound), norm_safe, norm_util
