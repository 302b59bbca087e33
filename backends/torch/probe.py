"""Whether a model that is run layer by layer is the one that transformers runs.

A decoder calls the layers in their order, with positions, masks and scales of its own. What a family does
differently shows on two short rows that share a beginning: their residual streams and logits, also those of
a token that is read behind a cache, have to be those of the model's own forward with transformers' own
attention. Windows are longer than the rows: what attention is told of them has to be what config.json says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from backends import models
from backends.core import packing
from backends.core.errors import InputError, reason
from backends.torch import attention
from backends.torch.batch import make_batch
from backends.torch.decoder import Cache, Decoder

SHARED, OWN = 5, (4, 7)
"""tokens that the rows begin with alike, and those of each"""


@dataclass(frozen=True)
class Computed:
    """On all rows."""

    streams: list[torch.Tensor]
    """after each layer, [all tokens, E]"""
    logits: torch.Tensor
    """[R, V]"""


def probed(folder: Path, model: torch.nn.Module, places: Sequence[torch.device]) -> Decoder:
    """The model as a decoder. InputError, one line, where it then is another model, or cannot be run so."""
    family, rows = type(model).__name__, probe_rows(model.config.vocab_size)
    ends = models.stop_ids(folder)
    try:
        with torch.no_grad():
            decoder = Decoder(model, places, ends)
            found, windows = layer_by_layer(decoder, rows)
            cached, expected = from_cache(decoder, rows), at_once(model, rows)
    except Exception as error:  # whatever a layer raises that is called in another way than it expects
        raise InputError(f"{folder}: a {family} cannot be run layer by layer ({reason(error)})") from None
    compared = [
        *(
            (f"after layer {at}", *pair)
            for at, pair in enumerate(zip(found.streams, expected.streams, strict=True))
        ),
        ("in its logits", found.logits, expected.logits),
        ("in its logits behind a cache", cached, expected.logits),
    ]
    bound = torch.finfo(model.dtype).eps ** 0.5  # far above rounding, far below what a forgotten step does
    for place, own, plain in compared:
        difference = float((own - plain).norm() / plain.norm().clamp(min=1e-30))
        if not difference < bound:
            raise InputError(
                f"{folder}: run layer by layer a {family} is another model: {100 * difference:.2g} % apart "
                f"{place} (rounding: less than {100 * bound:.2g} %)"
            )
    if windows != models.sliding_windows(model.config):
        raise InputError(
            f"{folder}: the layers of a {family} attend with windows {windows}, by config.json with "
            f"{models.sliding_windows(model.config)}"
        )
    return decoder


def probe_rows(vocab: int) -> list[np.ndarray]:
    """Token ids of two rows, in the order of `packing.lines`."""
    ids = (np.arange(SHARED + sum(OWN), dtype=np.int64) * 7919 + 31) % vocab
    first, second = np.split(ids[SHARED:], [OWN[0]])
    return sorted(
        (np.concatenate([ids[:SHARED], own]) for own in (first, second)), key=lambda row: row.tolist()
    )


def layer_by_layer(decoder: Decoder, rows: list[np.ndarray]) -> tuple[Computed, list[int | None]]:
    """As the sweep does, and the sliding window of each layer."""
    batch = make_batch(packing.join(rows, SHARED), decoder.device)
    hidden = decoder.embed(batch.ids)[None]
    positions = decoder.positions(hidden, batch.positions[None])
    places = torch.cat([own[:length] for own, length in zip(batch.columns, batch.lengths, strict=True)])
    streams, windows = [], []
    for index, place in enumerate(decoder.places):
        before = hidden
        windows.append(decoder.heads(index, before.to(place), positions.to(place)).window)
        hidden = decoder.run(replace(batch, whole=True), before, index, index + 1)
        streams.append(hidden[0, places].float())
    last = decoder.run(batch, before, decoder.layers - 1, decoder.layers)[0]
    return Computed(streams, decoder.logits(last)), windows


def from_cache(decoder: Decoder, rows: list[np.ndarray]) -> torch.Tensor:
    """Logits after the rows, [R, V], whose last tokens are read behind a cache of those before."""
    batch = make_batch(packing.join([row[:-1] for row in rows], SHARED), decoder.device)
    cache = Cache(range(decoder.layers), len(rows), max(map(len, rows)), decoder.like)

    def keep(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        columns = batch.columns.to(keys.device)
        cache.fill(index, slice(None), keys[0, columns], values[0, columns])

    decoder.run(batch, decoder.embed(batch.ids)[None], 0, decoder.layers, keep=keep)
    ends = torch.tensor([[row[-1]] for row in rows], device=decoder.device)
    hidden = decoder.extend(cache, decoder.embed(ends), batch.lengths[:, None], cache.columns)
    return decoder.logits(hidden[:, 0])


def at_once(model: torch.nn.Module, rows: list[np.ndarray]) -> Computed:
    """transformers' own forward and attention, row by row."""
    streams, logits = [[] for _ in model.model.layers], []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output, kept=kept: kept.append(output[0].float().to(model.device))
        )
        for layer, kept in zip(model.model.layers, streams, strict=True)
    ]
    model.set_attn_implementation("eager")
    try:
        for row in rows:
            logits.append(
                model(torch.from_numpy(row)[None].to(model.device), use_cache=False).logits[0, -1].float()
            )
    finally:
        model.set_attn_implementation(attention.NAME)
        for hook in hooks:
            hook.remove()
    return Computed([torch.cat(own) for own in streams], torch.stack(logits))
