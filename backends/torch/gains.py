"""NeuronTune's tuning: gains of MLP neurons by first-order MAML, in PEFT's own IA3 class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch

from backends.base import Example
from backends.core.packing import passes
from backends.core.schedules import learning_rate
from backends.core.tuning import GainPlan
from backends.torch import adapter
from backends.torch.decoder import Decoder
from backends.torch.tune import differentiate, make_plan, restore, state, take_step


class Gains:
    """See `tuning.GainEngine`."""

    name = "torch"

    def __init__(self, decoder: Decoder, plan: GainPlan):
        self.model, self.plan, self.recipe = decoder.model, plan, plan.recipe
        rows = max(1, self.recipe.batch // 2)
        self.fit = make_plan(decoder, plan.rows, rows, decoder.shape.mlp_dim)

    def open(self) -> None:
        config = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]
        )
        self.wrapped = adapter.wrap(self.model, config)
        layers = self.model.model.layers
        self.of_layers = [layer.mlp.down_proj.ia3_l["default"] for layer in layers]  # (1, F) each
        self.least, self.most = (torch.from_numpy(bound).to(self.model.device) for bound in self.plan.bounds)
        self.parameter = torch.nn.Parameter(torch.ones_like(self.least))
        self.optimizer = torch.optim.Adam([self.parameter], lr=self.recipe.lr, betas=(0.9, 0.999), eps=1e-8)

    def close(self) -> None:
        self.wrapped.unload()

    @property
    def gains(self) -> torch.Tensor:
        return self.parameter.detach()

    @torch.enable_grad()
    def gradient(self, rows: Sequence[Example], gains: torch.Tensor) -> tuple[float, torch.Tensor]:
        self._set(gains)
        total, gradient = 0.0, torch.zeros_like(gains)
        for some in passes(rows, self.fit.rows):
            loss, each = differentiate(self.model, some, len(rows), self.of_layers, self.fit)
            gradient += torch.cat([own.to(gradient.device) for own in each]).float()
            total += loss
        return total, gradient

    def norm(self, array: torch.Tensor) -> float:
        return float(array.norm())

    def step(self, gradient: torch.Tensor, number: int) -> bool:
        self.parameter.grad = gradient
        take_step(self.optimizer, learning_rate(number, self.plan.steps, self.recipe))
        bounded = self.gains.clip(self.least, self.most)
        clipped = bool((bounded != self.gains).any())
        self.parameter.data.copy_(bounded)
        return clipped

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
