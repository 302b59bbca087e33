"""Sparse tuning: LoRA on W_q in PEFT's own classes, with only the chosen heads' rows of B free to move."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import torch

from backends.base import (
    Head,
    Recipe,
    Shape,
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
from backends.torch_loss import example_losses
from data.examples import Example


@contextmanager
def quietly() -> Iterator[None]:
    """Around PEFT's loading: peft 0.21 asks transformers 5.23 for a renamed property, once a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class TorchTuning:
    """One tuning run (see `backends.base.Tuning`). The model is bare again when the iteration ends, however
    it ends.

    PEFT has no row restriction. B starts at zero and a hook zeroes its gradient outside the chosen heads'
    rows, so Adam's moments, and with them the rows, stay exactly zero there (weight decay is 0; clipping
    comes after the hook). Layers without a chosen head get no LoRA at all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        shape: Shape,
        examples: Sequence[Example],
        heads: Sequence[Head],
        recipe: Recipe,
        reference: Sequence[Example] | None,
    ):
        self.heads = check_tuning(examples, heads, recipe, reference, shape)
        self.model, self.shape, self.recipe = model, shape, recipe
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
        wrapped = self._wrap()
        try:
            with torch.enable_grad():
                yield from self._steps(wrapped)
            self._adapter = self._save(wrapped)
        finally:
            wrapped.unload()

    def _wrap(self) -> peft.PeftModel:
        recipe, shape = self.recipe, self.shape
        layers = sorted({layer for layer, _ in self.heads})
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=0.0,
            target_modules=["q_proj"],
            layers_to_transform=layers,
        )
        with quietly():
            wrapped = peft.get_peft_model(self.model, config)
        config.base_model_name_or_path = ""  # PEFT's choice would be this machine's path
        start = lora_a(recipe.seed, shape.layers, recipe.rank, shape.model_dim)
        for layer in layers:
            module = self.model.model.layers[layer].self_attn.q_proj
            module.lora_A["default"].weight.data.copy_(torch.from_numpy(start[layer]))
            weight = module.lora_B["default"].weight  # (H * D, r)
            chosen = torch.zeros(shape.heads, 1, 1, device=weight.device)
            chosen[[head for at, head in self.heads if at == layer]] = 1
            rows = chosen.expand(-1, shape.head_dim, 1).reshape(-1, 1)  # (H * D, 1)
            weight.register_hook(lambda gradient, rows=rows: gradient * rows)
        return wrapped

    def _steps(self, wrapped: peft.PeftModel) -> Iterator[dict]:
        recipe = self.recipe
        parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        order = batch_order(len(self.examples), recipe)
        of = identity("torch", recipe, self.heads, [*self.examples, *self.reference])
        checkpoint = Checkpoint(recipe.checkpoint, of)
        restore(checkpoint.arrays, parameters, optimizer)
        self.repeated = len(checkpoint.records)
        yield from (records := checkpoint.records)
        for step, rows in enumerate(order[len(records) :], len(records)):
            batch = [self.examples[row] for row in rows]
            loss, gradients = self._gradients(batch, parameters)
            util_loss, cos, projected = float("nan"), float("nan"), False
            if recipe.optimizer != "sft":
                drawn = reference_rows(step, len(self.reference), len(batch), recipe)
                util_loss, against = self._gradients([self.reference[row] for row in drawn], parameters)
                symmetric = recipe.optimizer == "pcgrad-symmetric"
                gradients, cos, projected = project(gradients, against, symmetric)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            if not torch.isfinite(norm):
                raise InputError(
                    f"step {step}: the gradient is not finite: lower --lr or use --dtype float32"
                )
            lr = learning_rate(step, len(order), recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            record = {
                "step": step,
                "loss": loss,
                "util_loss": util_loss,
                "cos": cos,
                "projected": projected,
                "lr": lr,
                "tokens": step_tokens(batch, recipe),
            }
            records.append(record)
            if checkpoint.due:
                checkpoint.save(records, state(parameters, optimizer))
            yield record

    def _gradients(
        self, batch: Sequence[Example], parameters: list[torch.nn.Parameter]
    ) -> tuple[float, list[torch.Tensor]]:
        """Mean loss over the rows and its gradient, accumulated over forward passes of at most
        `recipe.batch` rows."""
        total, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
        for rows in passes(batch, self.recipe.batch):
            loss = example_losses(self.model, rows).sum() / len(batch)
            for kept, new in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                kept += new
            total += float(loss.detach())
        return total, gradients

    def _save(self, wrapped: peft.PeftModel) -> Path:
        folder = self.recipe.folder or Path(tempfile.mkdtemp(prefix="cast-adapter-"))
        wrapped.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        return folder


def state(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All that later steps follow from: parameters and Adam's moments."""
    arrays = {}
    for number, parameter in enumerate(parameters):
        arrays[f"{number}"] = parameter.detach().cpu().numpy()
        for name, value in optimizer.state[parameter].items():
            arrays[f"{number}.{name}"] = value.cpu().numpy()
    return arrays


def restore(
    arrays: dict[str, np.ndarray], parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    for name, array in arrays.items():
        number, _, what = name.partition(".")
        parameter, value = parameters[int(number)], torch.from_numpy(array)
        if what:  # Adam counts its steps on the CPU
            optimizer.state[parameter][what] = value if what == "step" else value.to(parameter.device)
        else:
            parameter.data.copy_(value)


def project(
    gradients: list[torch.Tensor], against: list[torch.Tensor], symmetric: bool = False
) -> tuple[list[torch.Tensor], float, bool]:
    """PCGrad for two tasks (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Alg. 1).

    Where the two conflict (negative inner product, all tensors together one vector), `gradients` lose their
    component along `against`. `symmetric` is the published algorithm, in which each task is projected against
    the other's original gradient and the step is their sum: `against` loses its component along the original
    `gradients` too, and is added, conflict or not. TorchJD's PCGrad is the same sum, without difference for
    two tasks (there is no order to shuffle); a mean, as some write it, would only be clipped less. A gradient
    of zero conflicts with nothing.

    Args:
        gradients: the alignment loss's, any shapes.
        against: the utility loss's, of the same shapes.

    Returns the step's gradients, the cosine of the two before, and whether they conflicted.
    """
    dot, square, length = _products(gradients, against)
    cos = dot / (square * length) ** 0.5 if square and length else 0.0
    projected = not dot >= 0  # NaN too, so that the step is not finite and is noticed
    own = 1.0 - dot / length if projected and symmetric else 1.0
    other = (-dot / square if projected else 0.0) + symmetric
    if not other:
        return gradients, cos, projected
    pairs = zip(gradients, against, strict=True)
    return [own * one + other * utility for one, utility in pairs], cos, projected


def _products(gradients: list[torch.Tensor], against: list[torch.Tensor]) -> list[float]:
    """gradients · against, against · against, gradients · gradients, in float64, tensor by tensor."""
    sums = []
    for one, other in zip(gradients, against, strict=True):
        one, other = one.double(), other.double()
        own = torch.stack([(one * other).sum(), other.square().sum(), one.square().sum()])
        sums.append(own.to(gradients[0].device))
    return torch.stack(sums).sum(dim=0).tolist()  # the one wait for the device
