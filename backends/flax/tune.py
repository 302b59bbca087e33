"""Sparse tuning by optax: LoRA on W_q, only the chosen heads' rows of B move. Mirrors the torch wing's."""

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
from backends.core import seeds
from backends.core.packing import passes
from backends.core.schedules import BETAS, learning_rate
from backends.core.tuning import LoraPlan
from backends.flax import adapter
from backends.flax.decoder import Adapter
from backends.flax.loss import loss_of, make_rows, recomputes
from backends.flax.model import Model


class Trained(NamedTuple):
    """What is trained, or its gradient: LoRA's A [L, r, E] and B [L, H, D, r], float32."""

    a: jax.Array
    b: jax.Array


class Lora:
    """See `tuning.LoraEngine`.

    The base weights are no argument of the gradient. Of A and B, what is not the chosen heads' is zeroed in
    the gradients, so that Adam's moments and the clipped norm are those of the chosen rows alone, and again
    in the updates: `optax.masked` would pass a raw gradient through where it masks.
    """

    name = "flax"

    def __init__(self, model: Model, plan: LoraPlan):
        self.model, self.plan, self.recipe = model, plan, plan.recipe

    def open(self) -> None:
        model, recipe, shape = self.model, self.recipe, self.model.config.shape
        mask = self.plan.mask
        self.free = self.factors(mask.max(axis=1), mask)
        self.trained = Trained(
            model.put(seeds.lora_a(recipe.seed, shape.layers, recipe.rank, shape.model_dim)),
            model.put(np.zeros((shape.layers, shape.heads, shape.head_dim, recipe.rank), np.float32)),
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(recipe.clip),
            optax.adamw(
                lambda step: learning_rate(step, self.plan.steps, recipe),
                *BETAS,
                eps=1e-8,
                weight_decay=0.0,
            ),
        )
        self.optimizer_state = optimizer.init(self.trained)
        self.update = jax.jit(partial(_update, optimizer), donate_argnums=(0, 1))

    def close(self) -> None:
        pass  # the weights of the model were never changed

    def factors(self, of_layer: np.ndarray, of_head: np.ndarray) -> Trained:
        """Of A [L] and of heads' rows of B [L, H], as [L, 1, 1] and [L, H, 1, 1]."""
        put = self.model.put
        return Trained(put(of_layer[:, None, None]), put(of_head[:, :, None, None]))

    def gradients(self, rows: Sequence[Example]) -> tuple[float, Trained]:
        """Accumulated over forward passes of `recipe.batch` rows; fewer are padded, since each number of rows
        would need a program of its own."""
        model, recipe = self.model, self.recipe
        total, gradients = 0.0, None
        scale = np.float32(recipe.alpha / recipe.rank)
        for some in passes(rows, recipe.batch):
            batch = make_rows(model, some, model.rows(min(recipe.batch, len(rows))), len(rows))
            recompute = recomputes(model, *batch.ids.shape)
            loss, new = model.apply(lora_gradients, self.trained, scale, self.free, batch, recompute)
            gradients = new if gradients is None else jax.tree.map(jnp.add, gradients, new)
            total += float(loss)
        return total, gradients

    @staticmethod
    def products(gradients: Trained, against: Trained) -> list[float]:
        sums = np.zeros(3)
        for alignment, utility in zip(gradients, against, strict=True):
            a, u = (np.asarray(part, np.float64) for part in (alignment, utility))
            sums += np.vdot(a, u), np.vdot(u, u), np.vdot(a, a)
        return sums.tolist()

    @staticmethod
    def combined(own: float, gradients: Trained, other: float, against: Trained) -> Trained:
        return jax.tree.map(lambda alignment, utility: own * alignment + other * utility, gradients, against)

    def step(self, gradients: Trained, number: int) -> float:
        """The optimizer counts its steps itself."""
        pace = self.free if self.plan.redraw is None else self.factors(*self.plan.pace(number))
        self.trained, self.optimizer_state, norm = self.update(
            self.trained, self.optimizer_state, gradients, pace
        )
        return float(norm)

    def state(self) -> dict[str, np.ndarray]:
        return state((self.trained, self.optimizer_state))

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.trained, self.optimizer_state = restored(
            self.model, arrays, (self.trained, self.optimizer_state)
        )

    def save(self, folder: Path) -> None:
        a, b = (np.asarray(part) for part in self.trained)
        adapter.write(folder, a, b, self.plan.layers, self.recipe)


def state(tree) -> dict[str, np.ndarray]:
    """The tree's leaves by number."""
    return {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}


def restored(model: Model, arrays: dict[str, np.ndarray], tree):
    """A tree like `tree` from `state`'s arrays."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [model.put(arrays[str(number)]) for number in range(len(leaves))]
    return jax.tree.unflatten(structure, kept)


@partial(jax.jit, static_argnames=("graph", "recompute"))
def lora_gradients(graph, weights, trained, scale, free, rows, recompute: bool):
    """The loss and its gradient in the chosen heads' rows; zero elsewhere."""

    def loss(trained: Trained) -> jax.Array:
        decoder = nnx.merge(graph, weights)
        return loss_of(decoder, rows, Adapter(trained.a, trained.b, scale), recompute)

    value, gradients = jax.value_and_grad(loss)(trained)
    return value, jax.tree.map(jnp.multiply, gradients, free)


def _update(optimizer, trained, state, gradients, pace):
    """One step of the optimizer, times `pace` (0 where nothing is free), and the norm of the gradient before
    clipping."""
    updates, state = optimizer.update(gradients, state, trained)
    updates = jax.tree.map(jnp.multiply, updates, pace)
    return optax.apply_updates(trained, updates), state, optax.tree.norm(gradients)
