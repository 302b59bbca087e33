"""Sparse tuning by optax: LoRA on W_q, only the chosen heads' rows of B move. Mirrors `torch_tune`."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from backends import flax_adapter
from backends.base import (
    Head,
    Recipe,
    batch_order,
    check_tuning,
    learning_rate,
    lora_a,
    reference_rows,
    step_tokens,
)
from backends.batching import cut_rows, passes
from backends.checkpoint import Checkpoint, identity
from backends.errors import InputError
from backends.flax_decoder import Adapter
from backends.flax_loss import loss_of, make_rows, recomputes
from backends.flax_model import Model
from data.examples import Example


class Trained(NamedTuple):
    """What is trained, or its gradient: LoRA's A [L, r, E] and B [L, H, D, r], float32."""

    a: jax.Array
    b: jax.Array


class FlaxTuning:
    """One tuning run (see `backends.base.Tuning`).

    The base weights are no argument of the gradient. Of A and B, what is not the chosen heads' is zeroed in
    the gradients, so that Adam's moments and the clipped norm are those of the chosen rows alone, and again
    in the updates: `optax.masked` would pass a raw gradient through where it masks.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None,
    ):
        self.heads = check_tuning(examples, heads, recipe, reference, model.config.shape)
        self.model, self.recipe = model, recipe
        self.examples = cut_rows(examples, recipe.max_length)
        self.reference = list(reference or ())
        self._adapter: Path | None = None
        self.repeated = 0

    @property
    def adapter(self) -> Path:
        if self._adapter is None:
            raise RuntimeError("the adapter is there when all steps have been taken")
        return self._adapter

    def __iter__(self) -> Iterator[dict]:
        model, recipe, shape = self.model, self.recipe, self.model.config.shape
        order = batch_order(len(self.examples), recipe)
        chosen = np.zeros((shape.layers, shape.heads, 1, 1), np.float32)
        chosen[tuple(np.array(self.heads).T)] = 1
        free = Trained(model.put(chosen.max(axis=1)), model.put(chosen))  # [L, 1, 1] and [L, H, 1, 1]
        trained = Trained(
            model.put(lora_a(recipe.seed, shape.layers, recipe.rank, shape.model_dim)),
            model.put(np.zeros((shape.layers, shape.heads, shape.head_dim, recipe.rank), np.float32)),
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(recipe.clip),
            optax.adamw(
                lambda step: learning_rate(step, len(order), recipe),
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=0.0,
            ),
        )
        state = optimizer.init(trained)
        update = jax.jit(partial(_update, optimizer), donate_argnums=(0, 1))
        of = identity("flax", recipe, self.heads, [*self.examples, *self.reference])
        checkpoint = Checkpoint(recipe.checkpoint, of)
        if checkpoint.arrays:
            leaves, tree = jax.tree.flatten((trained, state))
            kept = [checkpoint.arrays[str(number)] for number in range(len(leaves))]
            trained, state = jax.tree.unflatten(tree, [model.put(array) for array in kept])
        self.repeated = len(checkpoint.records)
        yield from (records := checkpoint.records)
        for step, rows in enumerate(order[len(records) :], len(records)):
            batch = [self.examples[row] for row in rows]
            loss, gradients = self._gradients(batch, trained, free)
            util_loss, cos, projected = float("nan"), float("nan"), False
            if recipe.optimizer != "sft":
                drawn = reference_rows(step, len(self.reference), len(batch), recipe)
                util_loss, against = self._gradients([self.reference[row] for row in drawn], trained, free)
                symmetric = recipe.optimizer == "pcgrad-symmetric"
                gradients, cos, projected = project(gradients, against, symmetric)
            trained, state, norm = update(trained, state, gradients, free)
            if not np.isfinite(float(norm)):
                raise InputError(
                    f"step {step}: the gradient is not finite: lower --lr or use --dtype float32"
                )
            record = {
                "step": step,
                "loss": loss,
                "util_loss": util_loss,
                "cos": cos,
                "projected": projected,
                "lr": learning_rate(step, len(order), recipe),
                "tokens": step_tokens(batch, recipe),
            }
            records.append(record)
            if checkpoint.due:
                leaves = jax.tree.leaves((trained, state))
                checkpoint.save(records, {str(at): np.asarray(leaf) for at, leaf in enumerate(leaves)})
            yield record
        folder = recipe.folder or Path(tempfile.mkdtemp(prefix="cast-adapter-"))
        layers = sorted({layer for layer, _ in self.heads})
        flax_adapter.write(folder, np.asarray(trained.a), np.asarray(trained.b), layers, recipe)
        self._adapter = folder

    def _gradients(self, batch: Sequence[Example], trained: Trained, free: Trained) -> tuple[float, Trained]:
        """Mean loss over the rows and its gradient, accumulated over forward passes of `recipe.batch`
        rows: of fewer, where others would be padded, each number would want a program of its own."""
        model, recipe = self.model, self.recipe
        total, gradients = 0.0, None
        for some in passes(batch, recipe.batch):
            filled = model.rows(min(recipe.batch, len(batch)))
            rows = make_rows(model, some, filled, len(batch))
            scale = np.float32(recipe.alpha / recipe.rank)
            loss, new = lora_gradients(
                model.graph, model.weights, trained, scale, free, rows, recomputes(model, *rows.ids.shape)
            )
            gradients = new if gradients is None else jax.tree.map(jnp.add, gradients, new)
            total += float(loss)
        return total, gradients


@partial(jax.jit, static_argnames=("graph", "recompute"))
def lora_gradients(graph, weights, trained, scale, free, rows, recompute: bool):
    """The loss and its gradient in the chosen heads' rows; zero elsewhere."""

    def loss(trained: Trained) -> jax.Array:
        decoder = nnx.merge(graph, weights)
        return loss_of(decoder, rows, Adapter(trained.a, trained.b, scale), recompute)

    value, gradients = jax.value_and_grad(loss)(trained)
    return value, jax.tree.map(jnp.multiply, gradients, free)


def _update(optimizer, trained, state, gradients, free):
    """One step of the optimizer, and the norm of the gradient before clipping."""
    updates, state = optimizer.update(gradients, state, trained)
    updates = jax.tree.map(jnp.multiply, updates, free)
    return optax.apply_updates(trained, updates), state, optax.tree.norm(gradients)


def project(gradients: Trained, against: Trained, symmetric: bool = False) -> tuple[Trained, float, bool]:
    """PCGrad for two tasks: see `torch_tune.project`."""
    dot, square, length = _products(gradients, against)
    cos = dot / (square * length) ** 0.5 if square and length else 0.0
    projected = not dot >= 0  # NaN too, so that the step is not finite and is noticed
    own = 1.0 - dot / length if projected and symmetric else 1.0
    other = (-dot / square if projected else 0.0) + symmetric
    if not other:
        return gradients, cos, projected
    return jax.tree.map(lambda one, utility: own * one + other * utility, gradients, against), cos, projected


def _products(gradients: Trained, against: Trained) -> list[float]:
    """gradients · against, against · against, gradients · gradients, in float64, tensor by tensor."""
    sums = np.zeros(3)
    for one, other in zip(gradients, against, strict=True):
        one, other = (np.asarray(part, np.float64) for part in (one, other))
        sums += np.vdot(one, other), np.vdot(other, other), np.vdot(one, one)
    return sums.tolist()
