"""NeuronTune's tuning: gains of MLP neurons by first-order MAML, in PEFT's own IA3 class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch

from backends.base import Example, Task
from backends.core.packing import passes
from backends.core.schedules import gain_bounds, learning_rate, utility_weight
from backends.core.tuning import GainPlan, GainStep
from backends.torch import adapter
from backends.torch.decoder import Decoder
from backends.torch.tune import differentiate, make_plan, restore, state, take_step


class Gains:
    """See `tuning.GainEngine`."""

    name = "torch"

    def __init__(self, decoder: Decoder, plan: GainPlan):
        self.model, self.shape, self.plan, self.recipe = decoder.model, decoder.shape, plan, plan.recipe
        rows = max(1, self.recipe.batch // 2)
        self.fit = make_plan(decoder, plan.rows, rows, decoder.shape.mlp_dim)

    def open(self) -> None:
        config = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]
        )
        self.wrapped = adapter.wrap(self.model, config)
        layers = self.model.model.layers
        self.of_layers = [layer.mlp.down_proj.ia3_l["default"] for layer in layers]  # (1, F) each
        bounds = gain_bounds(self.plan.neurons, self.shape.layers, self.shape.mlp_dim)
        self.least, self.most = (torch.from_numpy(bound).to(self.model.device) for bound in bounds)
        self.parameter = torch.nn.Parameter(torch.ones_like(self.least))
        self.optimizer = torch.optim.Adam([self.parameter], lr=self.recipe.lr, betas=(0.9, 0.999), eps=1e-8)

    def close(self) -> None:
        self.wrapped.unload()

    @property
    def gains(self) -> torch.Tensor:
        return self.parameter.detach()

    def step(self, support: Task, query: Task, number: int) -> GainStep:
        adapted, recipe = self.gains, self.recipe
        for _ in range(recipe.inner_steps):
            *_, gradient = self._objective(support, adapted)
            adapted = (adapted - recipe.inner_lr * gradient).clip(self.least, self.most)
        loss, util_loss, cos, self.parameter.grad = self._objective(query, adapted)
        take_step(self.optimizer, learning_rate(number, self.plan.steps, recipe))
        bounded = self.gains.clip(self.least, self.most)
        clipped = bool((bounded != self.gains).any())
        self.parameter.data.copy_(bounded)
        return GainStep(loss, util_loss, cos, float(self.parameter.grad.norm()), clipped)

    def _objective(self, rows: Task, gains: torch.Tensor) -> tuple[float, float, float, torch.Tensor]:
        """At some gains: the safety and the utility loss, the cosine of their gradients in the free gains,
        and the gradient of what is minimised, [L, F], zero where not free."""
        free = self.least < self.most
        safe_loss, safe = self._gradient(rows.safe, gains)
        util_loss, util = self._gradient(rows.util, gains)
        safe, util = safe * free, util * free
        dot, lengths = float((safe * util).sum()), float(safe.norm() * util.norm())
        gradient = self.recipe.lam * safe + utility_weight(self.recipe) * util
        return safe_loss, util_loss, dot / lengths if lengths else 0.0, gradient

    @torch.enable_grad()
    def _gradient(self, rows: Sequence[Example], gains: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean loss over the rows at some gains, and its gradient there, [L, F]."""
        self._set(gains)
        total, gradient = 0.0, torch.zeros_like(gains)
        for some in passes(rows, self.fit.rows):
            loss, each = differentiate(self.model, some, len(rows), self.of_layers, self.fit)
            gradient += torch.cat([own.to(gradient.device) for own in each]).float()
            total += loss
        return total, gradient

    def state(self) -> dict[str, np.ndarray]:
        return state([self.parameter], self.optimizer)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        restore(arrays, [self.parameter], self.optimizer)

    def save(self, folder: Path) -> None:
        self._set(self.gains)
        adapter.save(self.wrapped, folder)

    def _set(self, gains: torch.Tensor) -> None:
        """Puts gains [L, F] into the model."""
        for parameter, row in zip(self.of_layers, gains, strict=True):
            parameter.data.copy_(row[None])
