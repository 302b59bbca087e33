"""NeuronTune's tuning: gains of MLP neurons by first-order MAML, in PEFT's own IA3 class."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import torch

from backends.base import Shape
from backends.batching import cut_tasks, passes
from backends.checkpoint import Checkpoint, identity
from backends.errors import InputError
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
from backends.torch_loss import example_losses
from backends.torch_tune import quietly, restore, state
from data.examples import Example


class TorchGainTuning:
    """One run (see `backends.base.Tuning`). The model is bare again when the iteration ends, however it ends.

    Gains are one array [L, F]. After every step each is brought back into its bounds, which for a neuron that
    is not tuned are 1 and 1. First order: the outer step takes the query gradient at the adapted gains.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        shape: Shape,
        tasks: Sequence[Task],
        neurons: Selection,
        recipe: GainRecipe,
    ):
        check_gains(tasks, neurons, shape.layers, shape.mlp_dim)
        self.model, self.shape, self.neurons, self.recipe = model, shape, neurons, recipe
        self.tasks = cut_tasks(tasks, recipe.max_length)
        self._adapter: Path | None = None
        self.repeated = 0

    @property
    def adapter(self) -> Path:
        if self._adapter is None:
            raise RuntimeError("the adapter is there when all steps have been taken")
        return self._adapter

    def __iter__(self) -> Iterator[dict]:
        config = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]
        )
        with quietly():
            wrapped = peft.get_peft_model(self.model, config)
        config.base_model_name_or_path = ""  # PEFT's choice would be this machine's path
        self._held = [
            layer.mlp.down_proj.ia3_l["default"] for layer in self.model.model.layers
        ]  # (1, F) each
        try:
            with torch.enable_grad():
                yield from self._steps()
            folder = self.recipe.folder or Path(tempfile.mkdtemp(prefix="cast-adapter-"))
            wrapped.save_pretrained(folder, safe_serialization=True)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            self._adapter = folder
        finally:
            wrapped.unload()

    def _steps(self) -> Iterator[dict]:
        recipe, device = self.recipe, self.model.device
        least, most = (
            torch.from_numpy(bound).to(device)
            for bound in bounds(self.neurons, self.shape.layers, self.shape.mlp_dim)
        )
        gains = torch.nn.Parameter(torch.ones_like(least))
        optimizer = torch.optim.Adam([gains], lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8)
        of = identity("torch", recipe, *divided(self.tasks, self.neurons))
        checkpoint = Checkpoint(recipe.checkpoint, of)
        restore(checkpoint.arrays, [gains], optimizer)
        self.repeated = len(checkpoint.records)
        yield from (records := checkpoint.records)
        steps = outer_steps(self.tasks, self.neurons, recipe)
        for step in range(len(records), steps):
            support, query = draw(self.tasks, step, recipe)
            adapted = gains.detach().clone()
            for _ in range(recipe.inner_steps):
                *_, gradient = self._objective(support, adapted, least < most)
                adapted = (adapted - recipe.inner_lr * gradient).clamp(least, most)
            loss, util_loss, cos, gains.grad = self._objective(query, adapted, least < most)
            if not torch.isfinite(gains.grad).all():
                raise InputError(
                    f"step {step}: the gradient is not finite: lower --gain-lr or use --dtype float32"
                )
            lr = outer_rate(step, steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            bounded = gains.detach().clamp(least, most)
            projected = bool((bounded != gains).any())
            gains.data.copy_(bounded)
            record = {
                "step": step,
                "loss": loss,
                "util_loss": util_loss,
                "cos": cos,
                "projected": projected,
                "lr": lr,
                "tokens": step_tokens(support, query, recipe),
            }
            records.append(record)
            if checkpoint.due:
                checkpoint.save(records, state([gains], optimizer))
            yield record
        self._hold(gains.detach())

    def _hold(self, gains: torch.Tensor) -> None:
        """Puts gains [L, F] into the model."""
        for parameter, row in zip(self._held, gains, strict=True):
            parameter.data.copy_(row[None])

    def _objective(
        self, rows: Task, gains: torch.Tensor, free: torch.Tensor
    ) -> tuple[float, float, float, torch.Tensor]:
        """At some gains: the safety and the utility loss, the cosine of their gradients in the free gains,
        and the gradient of what is minimised, [L, F], zero where not free."""
        self._hold(gains)
        safe_loss, safe = self._gradient(rows.safe)
        util_loss, util = self._gradient(rows.util)
        safe, util = safe * free, util * free
        dot, lengths = float((safe * util).sum()), float(safe.norm()) * float(util.norm())
        gradient = self.recipe.lam * safe + utility_weight(self.recipe) * util
        return safe_loss, util_loss, dot / lengths if lengths else 0.0, gradient

    def _gradient(self, examples: Sequence[Example]) -> tuple[float, torch.Tensor]:
        """Mean loss over the rows, and its gradient in the gains that the model holds, [L, F]."""
        total, gradient = 0.0, torch.zeros(self.shape.layers, self.shape.mlp_dim, device=self.model.device)
        for some in passes(examples, max(1, self.recipe.batch // 2)):
            loss = example_losses(self.model, some).sum() / len(examples)
            of_layers = torch.autograd.grad(loss, self._held)
            gradient += torch.cat([own.to(gradient.device) for own in of_layers]).float()
            total += float(loss.detach())
        return total, gradient
