"""Sparse tuning by optax: LoRA on W_q, only the chosen heads' rows of B move."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from backends.base import Example
from backends.core import adapters, seeds
from backends.core.schedules import BETAS, learning_rate
from backends.core.tuning import LoraPlan
from backends.flax.decoder import Adapter
from backends.flax.loss import Passes, loss_of, sizes_of
from backends.flax.model import Model


class Trained(NamedTuple):
    """What is trained, its gradient, or a factor of each: LoRA's A [L, r, E] and B [L, H, D, r], float32."""

    a: jax.Array
    b: jax.Array


class Step(NamedTuple):
    """What a step of the optimizer does with a gradient."""

    free: Trained
    """1 where it is followed, else 0"""
    clip: np.float32
    lr: np.float32
    pace: Trained | None
    """what Adam's step is multiplied by, where heads are drawn anew"""


class Lora:
    """See `tuning.LoraEngine`. The base weights are no argument of the gradient."""

    name = "flax"

    def __init__(self, model: Model, plan: LoraPlan):
        self.model, self.plan, self.recipe = model, plan, plan.recipe
        rows = min(plan.recipe.batch, len(plan.examples))
        self.passes = Passes(model, rows, sizes_of([*plan.examples, *plan.reference], 3))

    def open(self) -> None:
        put, size, rank = self.model.put, self.model.config.shape, self.recipe.rank
        free = np.zeros((size.layers, size.heads, 1, 1), np.float32)
        for layer, head in self.plan.free:
            free[layer, head] = 1
        self.free = Trained(put(free.max(axis=1)), put(free))
        self.trained = Trained(
            put(seeds.lora_a(self.recipe.seed, size.layers, rank, size.model_dim)),
            put(np.zeros((size.layers, size.heads, size.head_dim, rank), np.float32)),
        )
        self.moments = optimizer(self.how(0)).init(self.trained)

    def close(self) -> None:
        pass  # the weights of the model were never changed

    def gradients(self, rows: Sequence[Example]) -> tuple[float, Trained]:
        """Also of what is frozen."""
        scale = np.float32(self.recipe.alpha / self.recipe.rank)
        return self.passes.sum(lora_gradients, rows, self.trained, scale)

    def project(self, gradients: Trained, against: Trained, symmetric: bool) -> tuple[Trained, float, bool]:
        return project(times(gradients, self.free), times(against, self.free), symmetric)

    def how(self, number: int) -> Step:
        """Step `number` of the schedule."""
        plan, pace = self.plan, None
        if plan.redraw is not None:
            of_layer, of_head = (correction(number + 1 - since) for since in plan.since)
            usual = correction(np.array(number + 1))
            pace = times(Trained(of_layer[:, None, None], of_head[..., None, None]), self.free)
            pace = jax.tree.map(lambda own: own / usual, pace)
        lr = learning_rate(number, plan.steps, self.recipe)
        return Step(self.free, np.float32(self.recipe.clip), np.float32(lr), pace)

    def step(self, gradients: Trained, number: int) -> float:
        found = update(self.trained, self.moments, gradients, self.how(number))
        self.trained, self.moments, norm = found
        return float(norm)

    def state(self) -> dict[str, np.ndarray]:
        return state((self.trained, self.moments))

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.trained, self.moments = restored(self.model, arrays, (self.trained, self.moments))

    def save(self, folder: Path) -> None:
        adapters.write(folder, *map(np.asarray, self.trained), self.plan.layers, self.recipe)


def state(tree) -> dict[str, np.ndarray]:
    """The tree's leaves by number."""
    return {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}


def restored(model: Model, arrays: dict[str, np.ndarray], tree):
    """A tree like `tree` from `state`'s arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [model.put(arrays[str(number)]) for number in range(len(leaves))])


@partial(jax.jit, static_argnames=("graph", "recompute"))
def lora_gradients(graph, weights, rows, recompute: bool, trained: Trained, scale):
    """The loss and its gradient."""

    def loss(trained: Trained) -> jax.Array:
        return loss_of(nnx.merge(graph, weights), rows, Adapter(*trained, scale), recompute)

    return jax.value_and_grad(loss)(trained)


# The optimizer


def times(tree, factors):
    return jax.tree.map(jnp.multiply, tree, factors)


def optimizer(how: Step) -> optax.GradientTransformation:
    """AdamW on the gradient of what is free, clipped. Where a gradient was always zero Adam's moments are,
    and so is its step (weight decay is 0): no mask on the step is needed, and `optax.masked` would be none,
    since it passes on what it masks.

    Where heads are drawn anew, one that leaves still has moments: there Adam's step itself is multiplied.
    """

    def factor(by: Trained) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, _: times(updates, by))

    adamw = optax.adamw(how.lr, *BETAS, eps=1e-8, weight_decay=0.0)
    paced = [] if how.pace is None else [factor(how.pace)]
    return optax.chain(factor(how.free), optax.clip_by_global_norm(how.clip), adamw, *paced)


@partial(jax.jit, donate_argnames=("trained", "moments"))
def update(trained: Trained, moments, gradients: Trained, how: Step):
    """One step of the optimizer, and the norm of the gradient of what is free before clipping."""
    updates, moments = optimizer(how).update(gradients, moments, trained)
    norm = optax.tree.norm(times(gradients, how.free))
    return optax.apply_updates(trained, updates), moments, norm


def correction(steps: np.ndarray) -> np.ndarray:
    """How much longer than its moments say Adam's step number `steps` (from 1) is, correcting their bias from
    zero; float32. A row that is free since some step moves as by an Adam that began there: its own correction
    in place of the one for all."""
    first, second = (1 - beta ** np.maximum(steps, 1.0) for beta in BETAS)
    return (np.sqrt(second) / first).astype(np.float32)


def project(gradients: Trained, against: Trained, symmetric: bool) -> tuple[Trained, float, bool]:
    """PCGrad for two tasks (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Alg. 1), all parts
    together one vector, in float64 on the host.

    Returns the gradient of the step: `gradients` without their component along `against`, where the two
    conflict; `symmetric`, plus `against` without its component along `gradients`. And the cosine of the two,
    0 where one is zero, and whether they conflict. What is not finite is kept.
    """
    own, other = ([np.asarray(part, np.float64) for part in each] for each in (gradients, against))
    dot, of_own, of_other = (
        sum(float(np.vdot(*parts)) for parts in zip(*pair, strict=True))
        for pair in ((own, other), (own, own), (other, other))
    )
    conflict = not dot >= 0  # NaN too: the step is then not finite, and is refused
    along_other, along_own = (dot / of_other, dot / of_own) if conflict else (0.0, 0.0)
    step = [left - along_other * right for left, right in zip(own, other, strict=True)]
    if symmetric:
        step = [found + right - along_own * left for found, left, right in zip(step, own, other, strict=True)]
    lengths = np.sqrt(of_own) * np.sqrt(of_other)
    found = Trained(*(jnp.asarray(part, jnp.float32) for part in step))
    return found, dot / float(lengths) if lengths else 0.0, conflict
