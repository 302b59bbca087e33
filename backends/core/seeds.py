"""Random streams, each with a name of its own, and what the backends draw from them."""

import hashlib

import numpy as np

from backends.base import Recipe


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """The generator of one purpose: no two purposes of a seed share a stream.

    >>> stream(21, "lora", "A").integers(100) == stream(21, "tuning", "order").integers(100)
    False
    """
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    words = np.frombuffer(digest[:16], "<u4")
    return np.random.default_rng(np.random.SeedSequence([seed, *words.tolist()]))


def lora_a(seed: int, layers: int, rank: int, model_dim: int) -> np.ndarray:
    """LoRA's A of every layer, float32 [L, r, E]: PEFT's kaiming_uniform(a=√5).

    All layers are drawn in every arm, so that a seed gives a layer the same A in every arm and backend.
    """
    bound = 1.0 / np.sqrt(model_dim)
    size = (layers, rank, model_dim)
    return stream(seed, "lora", "A").uniform(-bound, bound, size).astype(np.float32)


def batch_order(rows: int, recipe: Recipe) -> list[np.ndarray]:
    """Row indices of each step, [<= batch * accumulation], over all epochs; each epoch is a new
    permutation."""
    generator = stream(recipe.seed, "tuning", "order")
    size = recipe.batch * recipe.accumulation
    steps = []
    for _ in range(recipe.epochs):
        order = generator.permutation(rows)
        steps += [order[start : start + size] for start in range(0, rows, size)]
    return steps


def reference_rows(step: int, reference: int, batch: int, recipe: Recipe) -> np.ndarray:
    """Indices of the rows of D_util that a step of PCGrad uses, as many as the step's own, drawn for each
    step."""
    generator = stream(recipe.seed, "tuning", "reference", step)
    return generator.choice(reference, min(batch, reference), replace=False)
