"""NeuronTune's tuning: gains of MLP neurons by first-order MAML, by optax."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from backends.base import Task
from backends.core import adapters
from backends.core.schedules import BETAS, learning_rate
from backends.core.tuning import GainPlan, GainStep
from backends.flax.decoder import Adapter
from backends.flax.loss import Passes, loss_of, sizes_of
from backends.flax.model import Model
from backends.flax.tune import restored, state


class Bounds(NamedTuple):
    """Least and largest gain of every neuron, [L, F]; both 1 where it is not free."""

    least: jax.Array
    most: jax.Array


class Gains:
    """See `tuning.GainEngine`."""

    name = "flax"

    def __init__(self, model: Model, plan: GainPlan):
        self.model, self.plan, self.recipe = model, plan, plan.recipe
        self.passes = Passes(model, max(1, plan.recipe.batch // 2), sizes_of(plan.rows, 3))

    def open(self) -> None:
        put, size = self.model.put, self.model.config.shape
        least, most = np.ones((2, size.layers, size.mlp_dim), np.float32)
        for layer, neuron in self.plan.neurons.safety:
            most[layer, neuron] = np.inf
        for layer, neuron in self.plan.neurons.utility:
            least[layer, neuron] = 0
        self.bounds = Bounds(put(least), put(most))
        self.gains = put(np.ones(least.shape, np.float32))
        self.moments = optimizer(self.bounds, 0.0).init(self.gains)

    def close(self) -> None:
        pass  # the weights of the model were never changed

    def step(self, support: Task, query: Task, number: int) -> GainStep:
        recipe, adapted = self.recipe, self.gains
        for _ in range(recipe.inner_steps):
            _, gradients = self.gradients(support, adapted)
            adapted = jnp.clip(adapted - recipe.inner_lr * self.minimised(*gradients), *self.bounds)
        losses, gradients = self.gradients(query, adapted)
        lr = np.float32(learning_rate(number, self.plan.steps, recipe))
        gradient = self.minimised(*gradients)
        self.gains, self.moments, clipped = update(self.gains, self.moments, gradient, self.bounds, lr)
        return GainStep(*losses, cosine(*gradients), float(jnp.linalg.norm(gradient)), bool(clipped))

    def gradients(self, rows: Task, gains: jax.Array) -> tuple[list[float], list[jax.Array]]:
        """Of harmful and of benign rows: the mean loss at some gains, and its gradient in what is free,
        [L, F]."""
        each = [self.passes.sum(gain_gradients, some, gains) for some in (rows.safe, rows.util)]
        return [loss for loss, _ in each], [only(gradient, self.bounds) for _, gradient in each]

    def minimised(self, safe: jax.Array, util: jax.Array) -> jax.Array:
        """The gradient of what is minimised: losses weigh lam and 1 - lam, the second one's sign is that of
        the objective."""
        sign = {"preserve": 1, "suppress": -1}[self.recipe.utility_objective]
        return self.recipe.lam * safe + sign * (1 - self.recipe.lam) * util

    def state(self) -> dict[str, np.ndarray]:
        return state((self.gains, self.moments))

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.gains, self.moments = restored(self.model, arrays, (self.gains, self.moments))

    def save(self, folder: Path) -> None:
        adapters.write_gains(folder, np.asarray(self.gains))


def only(gradient: jax.Array, bounds: Bounds) -> jax.Array:
    """Zero where a gain is not free."""
    return gradient * (bounds.least < bounds.most)


def cosine(left: jax.Array, right: jax.Array) -> float:
    """0 where one is zero."""
    lengths = float(jnp.linalg.norm(left)) * float(jnp.linalg.norm(right))
    return float(jnp.vdot(left, right)) / lengths if lengths else 0.0


@partial(jax.jit, static_argnames=("graph", "recompute"))
def gain_gradients(graph, weights, rows, recompute: bool, gains: jax.Array):
    """The loss and its gradient in the gains."""

    def loss(gains: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graph, weights), rows, Adapter(gains=gains), recompute)

    return jax.value_and_grad(loss)(gains)


def optimizer(bounds: Bounds, lr) -> optax.GradientTransformation:
    """Adam on the gradient of what is free."""
    mask = optax.stateless(lambda gradient, _: only(gradient, bounds))
    return optax.chain(mask, optax.adam(lr, *BETAS, eps=1e-8))


@jax.jit
def update(gains: jax.Array, moments, gradient: jax.Array, bounds: Bounds, lr):
    """One outer step inside the bounds, and whether a gain was out of bounds."""
    updates, moments = optimizer(bounds, lr).update(gradient, moments, gains)
    moved = optax.apply_updates(gains, updates)
    bounded = jnp.clip(moved, *bounds)
    return bounded, moments, (bounded != moved).any()
