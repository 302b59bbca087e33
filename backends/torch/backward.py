"""What a backward pass keeps of a model's layers, and computing them again instead."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from backends.base import Example
from backends.core.budgets import Work
from backends.torch.decoder import Decoder


def work_of(
    decoder: Decoder, examples: Sequence[Example], wide: int, fused: bool = True, adapted: int = 0
) -> Work:
    """What a backward pass goes through on the device with most layers.

    Args:
        wide: bytes of a number.
        fused: attention keeps no weights of pairs of tokens, but where they have a soft cap.
        adapted: numbers of a token that an adapter keeps in each layer.
    """
    lengths = [(len(row.target_ids), len(row.prompt_ids) + len(row.target_ids)) for row in examples]
    return Work(
        decoder.shape,
        wide,
        layers=max(map(decoder.places.count, decoder.places)),
        longest=max(length for _, length in lengths),
        targets=max(targets / length for targets, length in lengths),
        squares=not fused or bool(getattr(decoder.model.config, "attn_logit_softcapping", None)),
        adapted=adapted,
    )


def _double(value: object) -> object:
    """A float32 tensor in float64, all else as it is."""
    wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.double() if wide else value


@contextmanager
def _double_weights(module: torch.nn.Module) -> Iterator[None]:
    """Inside the block the module computes with float64 copies of its weights, whose gradients go to them."""
    own = [(part, name, weight) for part in module.modules() for name, weight in part._parameters.items()]
    for part, name, weight in own:
        part._parameters[name] = _double(weight)
    try:
        yield
    finally:
        for part, name, weight in own:
            part._parameters[name] = weight


@contextmanager
def recomputed(modules: Sequence[torch.nn.Module], by_layer: bool) -> Iterator[None]:
    """Inside the block a backward pass computes these modules again, one at a time, and keeps only what they
    are given.

    Args:
        by_layer: in float64, from weights that are so only while the module computes.
    """

    def run(module, forward, *args, **kwargs):
        if not by_layer:
            return forward(*args, **kwargs)
        args, kwargs = tree_map(_double, (args, kwargs))
        with _double_weights(module):
            return forward(*args, **kwargs)

    # A forward function of its own is what accelerate gives a module on one of several devices.
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        again = partial(run, module, module.forward)
        module.forward = partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
