"""Sparse tuning: LoRA on W_q in PEFT's own classes, with only the chosen heads' rows of B free to move."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch
from tqdm import tqdm

from backends.base import Example
from backends.core import seeds
from backends.core.budgets import TuningPlan, plan_tuning
from backends.core.packing import passes
from backends.core.schedules import BETAS, adam_pace, learning_rate
from backends.core.tuning import LoraPlan
from backends.torch import adapter
from backends.torch.backward import recomputed, work_of
from backends.torch.decoder import Decoder
from backends.torch.loss import example_losses

Gradients = Sequence[torch.Tensor]
"""of each parameter"""


class Lora:
    """See `tuning.LoraEngine`.

    PEFT has no row restriction. B starts at zero and its gradient is zeroed outside the chosen heads' rows,
    so Adam's moments, and with them the rows, stay exactly zero there (weight decay is 0; clipping comes
    later). Layers without a chosen head get no LoRA at all, unless heads may be drawn anew: then what has
    moved before and is not free has moments, and the step itself is undone there.
    """

    name = "torch"

    def __init__(self, decoder: Decoder, plan: LoraPlan):
        self.model, self.shape, self.plan, self.recipe = decoder.model, decoder.shape, plan, plan.recipe
        rows = [*plan.examples, *plan.reference]
        self.fit = make_plan(decoder, rows, plan.recipe.batch, decoder.shape.model_dim)

    def open(self) -> None:
        recipe, shape, layers = self.recipe, self.shape, self.plan.layers
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=0.0,
            target_modules=["q_proj"],
            layers_to_transform=layers,
        )
        self.wrapped = adapter.wrap(self.model, config)
        start = seeds.lora_a(recipe.seed, shape.layers, recipe.rank, shape.model_dim)
        for layer in layers:
            module = self.model.model.layers[layer].self_attn.q_proj
            module.lora_A["default"].weight.data.copy_(torch.from_numpy(start[layer]))
        self.parameters = [weight for weight in self.wrapped.parameters() if weight.requires_grad]
        self.free = self.by_parameter(*free(self.plan))
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=BETAS, eps=1e-8, weight_decay=0.0
        )

    def close(self) -> None:
        self.wrapped.unload()

    def by_parameter(self, of_layer: np.ndarray, of_head: np.ndarray) -> list[torch.Tensor]:
        """Of A [L] and of heads' rows of B [L, H], a factor for each parameter: [1, 1] and [H * D, 1]."""
        found = []
        for layer in self.plan.layers:
            rows = np.repeat(of_head[layer], self.shape.head_dim)
            found += [of_layer[layer].reshape(1, 1), rows[:, None]]
        pairs = zip(found, self.parameters, strict=True)
        return [torch.from_numpy(own.copy()).to(parameter.device) for own, parameter in pairs]

    @torch.enable_grad()
    def gradients(self, rows: Sequence[Example]) -> tuple[float, list[torch.Tensor]]:
        """Accumulated over forward passes of at most `recipe.batch` rows, fewer where memory asks for it."""
        total, gradients = 0.0, [torch.zeros_like(parameter) for parameter in self.parameters]
        for some in passes(rows, self.fit.rows):
            loss, found = differentiate(self.model, some, len(rows), self.parameters, self.fit)
            for gradient, new, free in zip(gradients, found, self.free, strict=True):
                gradient += new * free
            total += loss
        return total, gradients

    @staticmethod
    def project(gradients: Gradients, against: Gradients, symmetric: bool) -> tuple[Gradients, float, bool]:
        return project(gradients, against, symmetric)

    def step(self, gradients: list[torch.Tensor], number: int) -> float:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        lr = learning_rate(number, self.plan.steps, self.recipe)
        if self.plan.redraw is None:
            take_step(self.optimizer, lr)
            return float(norm)
        before = [parameter.detach().clone() for parameter in self.parameters]
        take_step(self.optimizer, lr)
        paces = self.by_parameter(*pace(self.plan, number))
        for start, end, own in zip(before, self.parameters, paces, strict=True):
            end.data.copy_(start.lerp(end.detach(), own))
        return float(norm)

    def state(self) -> dict[str, np.ndarray]:
        return state(self.parameters, self.optimizer)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        restore(arrays, self.parameters, self.optimizer)

    def save(self, folder: Path) -> None:
        adapter.save(self.wrapped, folder)


def free(plan: LoraPlan) -> tuple[np.ndarray, np.ndarray]:
    """1 where a head is free, else 0, float32: of each A [L], and of each head's rows of B [L, H]."""
    mask = np.zeros((plan.shape.layers, plan.shape.heads), np.float32)
    mask[tuple(np.array(plan.free).T)] = 1
    return mask.max(axis=1), mask


def pace(plan: LoraPlan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """What step `number` of the optimizer is multiplied by, as `free`. 0: what is not free; 1: what has been
    from the start (`schedules.adam_pace`)."""
    own = (adam_pace(number + 1, np.maximum(number + 1 - since, 1)) for since in plan.since)
    return tuple((each * mask).astype(np.float32) for each, mask in zip(own, free(plan), strict=True))


def project(
    gradients: Gradients, against: Gradients, symmetric: bool = False
) -> tuple[Gradients, float, bool]:
    """PCGrad for two tasks (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Alg. 1).

    Where the two conflict (negative inner product, all tensors together one vector), `gradients` lose their
    component along `against`. `symmetric` is the published algorithm, in which each task is projected against
    the other's original gradient and the step is their sum: `against` loses its component along the original
    `gradients` too, and is added, conflict or not. TorchJD's PCGrad is the same sum, without difference for
    two tasks (there is no order to shuffle). A gradient of zero conflicts with nothing.

    Args:
        gradients: the alignment loss's.
        against: the utility loss's.

    Returns the step's gradients, the cosine of the two before, and whether they conflicted.
    """
    pairs = list(zip(gradients, against, strict=True))
    sums = []
    for alignment, utility in pairs:
        a, u = alignment.double(), utility.double()
        own = torch.stack([(a * u).sum(), u.square().sum(), a.square().sum()])
        sums.append(own.to(gradients[0].device))
    dot, square, length = torch.stack(sums).sum(dim=0).tolist()  # the one wait for the device
    cos = dot / (square * length) ** 0.5 if square and length else 0.0
    projected = not dot >= 0  # NaN too, so that the step is not finite and is refused
    own = 1.0 - dot / length if projected and symmetric else 1.0
    other = (-dot / square if projected else 0.0) + symmetric
    step = [own * alignment + other * utility for alignment, utility in pairs] if other else gradients
    return step, cos, projected


def make_plan(decoder: Decoder, rows: Sequence[Example], batch: int, adapted: int) -> TuningPlan:
    """How passes of `batch` of these rows fit the devices; `adapted` as in `work_of`."""
    plan = plan_tuning(work_of(decoder, rows, decoder.itemsize, adapted=adapted), decoder.room, batch)
    tqdm.write(f"[torch] tuning: {plan}")
    return plan


def differentiate(
    model: torch.nn.Module,
    rows: Sequence[Example],
    of: int,
    parameters: Sequence[torch.Tensor],
    fit: TuningPlan,
) -> tuple[float, Sequence[torch.Tensor]]:
    """The rows' part of the mean loss over `of` rows, and its gradients."""
    with recomputed(model.model.layers if fit.recompute else [], False):
        loss = example_losses(model, rows).sum() / of
        found = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), found


def take_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def state(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Parameters by number, and Adam's moments as "number.name"."""
    arrays = {}
    for number, parameter in enumerate(parameters):
        arrays[f"{number}"] = parameter.detach().cpu().numpy()
        for name, value in optimizer.state[parameter].items():
            arrays[f"{number}.{name}"] = value.cpu().numpy()
    return arrays


def restore(
    arrays: dict[str, np.ndarray], parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Sets what `state` returned."""
    for key, array in arrays.items():
        number, _, name = key.partition(".")
        parameter, value = parameters[int(number)], torch.from_numpy(array)
        if name:  # Adam counts its steps on the CPU
            optimizer.state[parameter][name] = value if name == "step" else value.to(parameter.device)
        else:
            parameter.data.copy_(value)
