"""The transformers decoder, layer by layer: prompts without padding, ablated heads, decoding from caches.

Layers are called as they are, whatever their family; only their attention (`torch.attention`) is told what to
do, so that a pass can start at any layer from a kept residual stream, compute a shared prefix once, skip
tokens whose output is not read, and ablate another head in every row. `choices`, `generate` and both sweeps
run on this code path, so that clean and ablated models round alike. `torch.probe` compares it with the
model's own forward.

Axes as in `backends.base`; n copies or rows of a pass, R prompts of a batch, T tokens of its line, P of the
prefix that all share, C of the longest prompt, or columns of a cache.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from backends import models
from backends.core import budgets
from backends.torch import attention
from backends.torch.attention import Attend, Heads, Masks, mixed
from backends.torch.batch import Batch, attend_all, attend_last
from backends.torch.quantized import stored_bytes

PIECE = 1024
"""tokens of the vocabulary whose logits are computed together on a CPU"""
Keep = Callable[[int, torch.Tensor, torch.Tensor], None]
"""takes a layer's index, keys and values, [n, T, K, D], on its device"""


@dataclass(frozen=True)
class Ablation:
    """Which head of a layer is ablated in each copy or row, [n] (-1: none), and what is zeroed."""

    layer: int
    heads: torch.Tensor
    mask: str = "output"

    def take(self, rows: torch.Tensor) -> "Ablation":
        return Ablation(self.layer, self.heads[rows], self.mask)

    def to(self, device: torch.device) -> "Ablation":
        return Ablation(self.layer, self.heads.to(device), self.mask)

    def zeroed(self, part: str, index: int, per_head: torch.Tensor) -> torch.Tensor:
        """`part` of layer `index`, [n, M, H, D], without the ablated heads, if it is the one to be zeroed.

        output: what W_o reads of a head (zeroing W_o's output would hit channels, not heads). query: what
        attention receives, after bias, norm and rotary turn; the head attends uniformly.
        """
        if part != self.mask or index != self.layer:
            return per_head
        every = torch.arange(per_head.shape[2], device=per_head.device)
        return per_head * (every != self.heads[:, None])[:, None, :, None]


@dataclass(frozen=True)
class Positions:
    """Where tokens stand, as layers are told it."""

    ids: torch.Tensor
    """[1 or n, T]"""
    turns: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """kind of a layer -> cosines and sines, [1 or n, T, .] each"""

    def to(self, place: torch.device) -> "Positions":
        return self._each(lambda part: part.to(place))

    def take(self, tokens: torch.Tensor | np.ndarray) -> "Positions":
        return self._each(lambda part: part[:, tokens])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Positions":
        turns = {kind: tuple(map(change, turn)) for kind, turn in self.turns.items()}
        return Positions(change(self.ids), turns)


class _Left(Exception):
    """How the call of a layer is left once its attention has been given the heads."""

    def __init__(self, heads: Heads):
        self.heads = heads


def _leave(heads: Heads) -> torch.Tensor:
    raise _Left(heads)


class Cache:
    """Keys and values of some layers, [n, C, K, D] each, each on its layer's device; a token's column is its
    position.

    Args:
        like: [K, D] on every layer's device.
    """

    def __init__(self, layers: range, rows: int, columns: int, like: Sequence[torch.Tensor]):
        shape = (rows, columns, *like[0].shape)
        self.layers, self.columns, self.like = layers, columns, like
        # Zeros: a column that is masked yet is multiplied by 0, and must be a number.
        self.keys = {index: like[index].new_zeros(shape) for index in layers}
        self.values = {index: like[index].new_zeros(shape) for index in layers}

    def fill(self, index: int, rows: slice | torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The first columns of some rows."""
        self.keys[index][rows, : keys.shape[1]] = keys
        self.values[index][rows, : values.shape[1]] = values

    def take(self, rows: Sequence[int]) -> None:
        rows = torch.tensor(rows, dtype=torch.long)
        for device, layers in groupby(self.layers, lambda index: self.like[index].device):
            rows = rows.to(device)
            for index in layers:
                self.keys[index], self.values[index] = self.keys[index][rows], self.values[index][rows]


class Decoder:
    """A transformers causal LM, layer by layer. Holds no weights of its own.

    Args:
        places: each layer's device, the first one's also that of embedding, norm and output matrix. There a
            pass begins and ends; in between the residual stream follows the layers. None: all on one.
        eos: ids that end a response.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        places: Sequence[torch.device] | None = None,
        eos: Sequence[int] = (),
    ):
        model.set_attn_implementation(attention.NAME)
        self.model, self.eos = model, frozenset(eos)
        self.shape = models.read_shape(model.config, all(map(has_neurons, model.model.layers)))
        self.layers = self.shape.layers
        # Some families turn the layers of a kind by angles of their own.
        by_kind = "layer_type" in inspect.signature(model.model.rotary_emb.forward).parameters
        self.kinds = model.config.layer_types if by_kind else [""] * self.layers
        self.places = list(places or [model.device] * self.layers)
        self.itemsize = model.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.places[0]

    @property
    def like(self) -> list[torch.Tensor]:
        """Of a cache."""
        shape = self.shape.kv_heads, self.shape.head_dim
        return [torch.empty(shape, dtype=self.model.dtype, device=place) for place in self.places]

    @property
    def room(self) -> int:
        """Bytes that may be used beside the weights; of several devices, what the fullest one has. Not what
        is free now: how work is cut, and so how it rounds, must not depend on it."""
        if self.device.type != "cuda":
            return budgets.machine_bytes() // 2 - sum(map(stored_bytes, self.model.parameters()))
        weights = Counter()
        for weight in self.model.parameters():
            weights[weight.device] += stored_bytes(weight)
        return min(
            int(0.9 * torch.cuda.get_device_properties(place).total_memory) - held
            for place, held in weights.items()
        )

    def stretches(self, layers: Iterable[int]) -> Iterator[tuple[torch.device, Iterator[int]]]:
        """Layers in a row that are on one device, with it."""
        return groupby(layers, lambda index: self.places[index])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer reads, [..., E]; Granite multiplies the embedding."""
        embedded = self.model.model.embed_tokens(ids)
        scale = getattr(self.model.config, "embedding_multiplier", None)
        return embedded * scale if scale else embedded

    def logits(self, hidden: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [..., V] from the last layer's residual stream, or [..., m] for the m tokens of
        `vocabulary`. Never rounded to half precision, where 16 and 16.05 are one number and letters tie."""
        hidden, weight = self.model.model.norm(hidden), self.model.lm_head.weight
        if vocabulary is not None:
            weight = weight[vocabulary]
        if self.device.type == "cpu" or self.model.dtype == torch.float32:
            found = torch.nn.functional.linear(hidden.float(), weight.float())
        else:
            found = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            found = found.unflatten(0, hidden.shape[:-1])
        return finished(self.model, found)

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """The token of the largest logit, int64 [...], from the last layer's residual stream; of several, the
        first one. What is done to logits (`finished`) leaves their order."""
        if self.device.type != "cpu":
            return self.logits(hidden).argmax(dim=-1)
        # A piece of the vocabulary at a time, whose logits stay in the cache, and tokens as columns: for the
        # few rows of a decoding step MKL takes a third to a half less time than for all logits at once.
        columns = self.model.model.norm(hidden).flatten(0, -2).float().t().contiguous()  # (E, M)
        token = torch.zeros(columns.shape[1], dtype=torch.long)
        most = torch.full(token.shape, -torch.inf)
        weight = self.model.lm_head.weight
        for start in range(0, len(weight), PIECE):
            likely, at = (weight[start : start + PIECE].float() @ columns).max(dim=0)
            token = torch.where(likely > most, at + start, token)
            most = torch.maximum(most, likely)
        return token.view(hidden.shape[:-1])

    def run(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        start: int,
        stop: int,
        ablation: Ablation | None = None,
        keep: Keep | None = None,
    ) -> torch.Tensor:
        """Layers start..stop-1 for copies of a batch, each with another head ablated.

        Args:
            hidden: residual stream before layer `start`, [n, T, E].
            keep: called for each layer.

        Returns the residual stream after layer stop-1: [n, T, E], or after the model's last layer of the
        prompts' last tokens only, [n, R, E] (unless `batch.whole`).
        """
        positions = self.positions(hidden, batch.positions[None])
        for place, layers in self.stretches(range(start, stop)):
            hidden, line, own_positions = hidden.to(place), batch.to(place), positions.to(place)
            ablated = ablation and ablation.to(place)
            at = torch.arange(line.columns.shape[1], device=place)
            among = Masks((at[:, None] - at)[None])  # (1, C, C)
            ends = Masks((line.lengths - 1)[:, None, None] - at)  # (R, 1, C)
            for index in layers:
                last = line.last if index == self.layers - 1 and not batch.whole else None

                def attend(heads, index=index, line=line, last=last, among=among, ends=ends):
                    if keep is not None:
                        keep(index, heads.keys, heads.values)
                    return attend_all(line, heads, among) if last is None else attend_last(line, heads, ends)

                hidden = self.layer(index, hidden, own_positions, attend, ablated, last)
        return hidden.to(self.device)

    def extend(
        self,
        cache: Cache,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        width: int,
        ablation: Ablation | None = None,
    ) -> torch.Tensor:
        """The cache's layers for w further tokens of each row, [n, w, E] at positions [n, w], which it then
        holds.

        Args:
            width: columns of the cache that any of them sees, one more than the largest position.
        """
        every = self.positions(hidden, positions)
        for place, layers in self.stretches(cache.layers):
            hidden, own = hidden.to(place), every.to(place)
            ablated = ablation and ablation.to(place)
            lines = torch.arange(len(hidden), device=place)[:, None]
            masks = Masks(own.ids[:, :, None] - torch.arange(width, device=place))  # (n, w, C)
            for index in layers:

                def attend(heads, index=index, lines=lines, at=own.ids, masks=masks):
                    cache.keys[index][lines, at] = heads.keys
                    cache.values[index][lines, at] = heads.values
                    keys, values = (kept[index][: len(lines), :width] for kept in (cache.keys, cache.values))
                    heads = replace(heads, keys=keys, values=values)
                    return mixed(heads, masks.of(heads))

                hidden = self.layer(index, hidden, own, attend, ablated)
        return hidden.to(self.device)

    def positions(self, hidden: torch.Tensor, ids: torch.Tensor) -> Positions:
        """Of tokens at positions `ids`, [1 or n, T]; `hidden` gives type and device."""
        turn = self.model.model.rotary_emb
        kinds = dict.fromkeys(self.kinds)
        return Positions(ids, {kind: turn(hidden, ids, *([kind] if kind else [])) for kind in kinds})

    def layer(
        self,
        index: int,
        hidden: torch.Tensor,
        positions: Positions,
        attend: Attend,
        ablation: Ablation | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One decoder layer on [n, T, E]; its outcome for all tokens or for those of `wanted` [M]."""
        every = None
        if wanted is not None:  # to all keys and values only these tokens attend
            every = self.heads(index, hidden, positions)
            hidden, positions = hidden[:, wanted], positions.take(wanted)

        def answer(heads: Heads) -> torch.Tensor:
            if every is not None:
                heads = replace(heads, keys=every.keys, values=every.values)
            if ablation is None:
                return attend(heads)
            heads = replace(heads, queries=ablation.zeroed("query", index, heads.queries))
            return ablation.zeroed("output", index, attend(heads))

        return self._call(index, hidden, positions, answer)

    def heads(self, index: int, hidden: torch.Tensor, positions: Positions) -> Heads:
        """What attention is given in a layer on [n, T, E]; nothing behind it is computed."""
        try:
            self._call(index, hidden, positions, _leave)
        except _Left as left:
            return left.heads
        raise TypeError(f"layer {index} does not call the registered attention function")

    def _call(self, index: int, hidden: torch.Tensor, positions: Positions, answer: Attend) -> torch.Tensor:
        return self.model.model.layers[index](
            hidden,
            attention_mask=answer,
            position_ids=positions.ids,
            position_embeddings=positions.turns[self.kinds[index]],
        )


def has_neurons(layer: torch.nn.Module) -> bool:
    """Whether one matrix reads all units of a layer's MLP, as NeuronTune needs it."""
    return isinstance(getattr(getattr(layer, "mlp", None), "down_proj", None), torch.nn.Linear)


def finished(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """What a model makes of its output matrix's products: Cohere multiplies, Granite divides, Gemma caps."""
    config = model.config
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
