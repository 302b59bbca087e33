"""NeuronTune's tuning: gains of MLP neurons by first-order MAML, by optax. Mirrors the torch wing's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from backends.base import Example
from backends.core.packing import passes
from backends.core.schedules import learning_rate
from backends.core.tuning import GainPlan
from backends.flax import adapter
from backends.flax.decoder import Adapter
from backends.flax.loss import loss_of, make_rows, recomputes
from backends.flax.model import Model
from backends.flax.tune import restored, state


class Gains:
    """See `tuning.GainEngine`."""

    name = "flax"

    def __init__(self, model: Model, plan: GainPlan):
        self.model, self.plan, self.recipe = model, plan, plan.recipe

    def open(self) -> None:
        plan, recipe = self.plan, self.recipe
        self.least, self.most = map(self.model.put, plan.bounds)
        self.gains = self.model.put(np.ones(self.least.shape, np.float32))
        optimizer = optax.adam(
            lambda step: learning_rate(step, plan.steps, recipe), b1=0.9, b2=0.999, eps=1e-8
        )
        self.optimizer_state = optimizer.init(self.gains)
        self.update = jax.jit(partial(_update, optimizer))

    def close(self) -> None:
        pass  # the weights of the model were never changed

    def gradient(self, rows: Sequence[Example], gains: jax.Array) -> tuple[float, jax.Array]:
        model, size = self.model, max(1, self.recipe.batch // 2)
        total, gradient = 0.0, jnp.zeros_like(gains)
        for some in passes(rows, size):
            batch = make_rows(model, some, model.rows(min(size, len(rows))), len(rows))
            recompute = recomputes(model, *batch.ids.shape)
            loss, new = model.apply(gain_gradients, gains, batch, recompute)
            gradient += new
            total += float(loss)
        return total, gradient

    def norm(self, array: jax.Array) -> float:
        return float(jnp.linalg.norm(array))

    def step(self, gradient: jax.Array, number: int) -> bool:
        """The optimizer counts its steps itself."""
        self.gains, self.optimizer_state, clipped = self.update(
            self.gains, self.optimizer_state, gradient, self.least, self.most
        )
        return bool(clipped)

    def state(self) -> dict[str, np.ndarray]:
        return state((self.gains, self.optimizer_state))

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.gains, self.optimizer_state = restored(self.model, arrays, (self.gains, self.optimizer_state))

    def save(self, folder: Path) -> None:
        adapter.write_gains(folder, np.asarray(self.gains))


@partial(jax.jit, static_argnames=("graph", "recompute"))
def gain_gradients(graph, weights, gains, rows, recompute: bool):
    """The loss and its gradient in the gains."""

    def loss(gains: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graph, weights), rows, Adapter(gains=gains), recompute)

    return jax.value_and_grad(loss)(gains)


def _update(optimizer, gains, state, gradient, least, most):
    """One outer step inside the bounds, and whether a gain was out of bounds."""
    updates, state = optimizer.update(gradient, state, gains)
    moved = optax.apply_updates(gains, updates)
    bounded = jnp.clip(moved, least, most)
    return bounded, state, (bounded != moved).any()
