"""NeuronTune's tuning: gains of MLP neurons by first-order MAML, by optax. Mirrors `torch_gains`."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from backends import flax_adapter
from backends.batching import cut_tasks, passes
from backends.checkpoint import Checkpoint, identity
from backends.errors import InputError
from backends.flax_decoder import Adapter
from backends.flax_loss import loss_of, make_rows, recomputes
from backends.flax_model import Model
from backends.neurons import (
    GainRecipe,
    Selection,
    Task,
    bounds,
    check_gains,
    divided,
    draw,
    outer_rate,
    outer_steps,
    step_tokens,
    utility_weight,
)
from data.examples import Example


class FlaxGainTuning:
    """One run (see `backends.base.Tuning` and `torch_gains.TorchGainTuning`)."""

    def __init__(self, model: Model, tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe):
        shape = model.config.shape
        check_gains(tasks, neurons, shape.layers, shape.mlp_dim)
        self.model, self.neurons, self.recipe = model, neurons, recipe
        self.tasks = cut_tasks(tasks, recipe.max_length)
        self._adapter: Path | None = None
        self.repeated = 0

    @property
    def adapter(self) -> Path:
        if self._adapter is None:
            raise RuntimeError("the adapter is there when all steps have been taken")
        return self._adapter

    def __iter__(self) -> Iterator[dict]:
        model, recipe, shape = self.model, self.recipe, self.model.config.shape
        least, most = map(model.put, bounds(self.neurons, shape.layers, shape.mlp_dim))
        gains = model.put(np.ones((shape.layers, shape.mlp_dim), np.float32))
        steps = outer_steps(self.tasks, self.neurons, recipe)
        optimizer = optax.adam(lambda step: outer_rate(step, steps, recipe), b1=0.9, b2=0.999, eps=1e-8)
        state = optimizer.init(gains)
        update = jax.jit(partial(_update, optimizer))
        of = identity("flax", recipe, *divided(self.tasks, self.neurons))
        checkpoint = Checkpoint(recipe.checkpoint, of)
        if checkpoint.arrays:
            leaves, tree = jax.tree.flatten((gains, state))
            kept = [checkpoint.arrays[str(number)] for number in range(len(leaves))]
            gains, state = jax.tree.unflatten(tree, [model.put(array) for array in kept])
        self.repeated = len(checkpoint.records)
        yield from (records := checkpoint.records)
        for step in range(len(records), steps):
            support, query = draw(self.tasks, step, recipe)
            adapted = gains
            for _ in range(recipe.inner_steps):
                *_, gradient = self._objective(support, adapted, least < most)
                adapted = jnp.clip(adapted - recipe.inner_lr * gradient, least, most)
            loss, util_loss, cos, gradient = self._objective(query, adapted, least < most)
            if not bool(jnp.isfinite(gradient).all()):
                raise InputError(
                    f"step {step}: the gradient is not finite: lower --gain-lr or use --dtype float32"
                )
            gains, state, projected = update(gains, state, gradient, least, most)
            record = {
                "step": step,
                "loss": loss,
                "util_loss": util_loss,
                "cos": cos,
                "projected": bool(projected),
                "lr": outer_rate(step, steps, recipe),
                "tokens": step_tokens(support, query, recipe),
            }
            records.append(record)
            if checkpoint.due:
                leaves = jax.tree.leaves((gains, state))
                checkpoint.save(records, {str(at): np.asarray(leaf) for at, leaf in enumerate(leaves)})
            yield record
        folder = recipe.folder or Path(tempfile.mkdtemp(prefix="cast-adapter-"))
        flax_adapter.write_gains(folder, np.asarray(gains))
        self._adapter = folder

    def _objective(
        self, rows: Task, gains: jax.Array, free: jax.Array
    ) -> tuple[float, float, float, jax.Array]:
        """At some gains: the safety and the utility loss, the cosine of their gradients in the free gains,
        and the gradient of what is minimised, [L, F], zero where not free."""
        safe_loss, safe = self._gradient(rows.safe, gains)
        util_loss, util = self._gradient(rows.util, gains)
        safe, util = safe * free, util * free
        dot = float((safe * util).sum())
        lengths = float(jnp.linalg.norm(safe)) * float(jnp.linalg.norm(util))
        gradient = self.recipe.lam * safe + utility_weight(self.recipe) * util
        return safe_loss, util_loss, dot / lengths if lengths else 0.0, gradient

    def _gradient(self, examples: Sequence[Example], gains: jax.Array) -> tuple[float, jax.Array]:
        """Mean loss over the rows, and its gradient in the gains, [L, F]."""
        model, size = self.model, max(1, self.recipe.batch // 2)
        total, gradient = 0.0, jnp.zeros_like(gains)
        for some in passes(examples, size):
            rows = make_rows(model, some, model.rows(min(size, len(examples))), len(examples))
            recompute = recomputes(model, *rows.ids.shape)
            loss, new = gain_gradients(model.graph, model.weights, gains, rows, recompute)
            gradient += new
            total += float(loss)
        return total, gradient


@partial(jax.jit, static_argnames=("graph", "recompute"))
def gain_gradients(graph, weights, gains, rows, recompute: bool):
    """The loss and its gradient in the gains."""

    def loss(gains: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graph, weights), rows, Adapter(gains=gains), recompute)

    return jax.value_and_grad(loss)(gains)


def _update(optimizer, gains, state, gradient, least, most):
    """One outer step inside the bounds, and whether one of them held a gain back."""
    updates, state = optimizer.update(gradient, state, gains)
    moved = optax.apply_updates(gains, updates)
    bounded = jnp.clip(moved, least, most)
    return bounded, state, (bounded != moved).any()
