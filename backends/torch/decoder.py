"""The transformers decoder, taken apart: prompts without padding, ablated heads, decoding from caches.

The weights and small modules (projections, norms, MLP, rotary tables) are transformers' own and are called
layer by layer; here is the order of a Llama, Qwen2 or Mistral layer, so that a pass can start at any layer
from a kept residual stream, compute a shared prefix once, skip tokens whose output is not read, and ablate
another head in every row. `choices`, `generate` and both sweeps run on this code path, so that clean and
ablated models round alike.

Axes as in `backends.base`; n copies or rows of a pass, R prompts of a batch, T tokens of its line, P of the
prefix that all share, C of the longest prompt, or columns of a cache.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from transformers.models.llama.modeling_llama import rotate_half

from backends import models
from backends.core import budgets, packing
from backends.torch.masks import Masks

PIECE = 1024
"""tokens of the vocabulary whose logits are computed together on a CPU"""
Pair = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """A `packing.Line` on a device: prompts without padding, shared beginnings once."""

    rows: np.ndarray
    ids: torch.Tensor
    positions: torch.Tensor
    prefix: int
    columns: torch.Tensor
    lengths: torch.Tensor
    picks: torch.Tensor
    whole: bool = False
    """the last layer's outcome is wanted of every token, not of the prompts' last ones only"""

    @property
    def last(self) -> torch.Tensor:
        """Each prompt's last token in the line, [R]."""
        return self.columns[:, -1]

    def to(self, device: torch.device) -> "Batch":
        tensors = ("ids", "positions", "columns", "lengths", "picks")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def make_batch(line: packing.Line, device: torch.device) -> Batch:
    ids, positions, columns, lengths, picks = (
        torch.from_numpy(part).to(device)
        for part in (line.ids, line.positions, line.columns, line.lengths, line.picks)
    )
    return Batch(line.rows, ids, positions, line.prefix, columns, lengths, picks)


def make_batches(
    sequences: Sequence[np.ndarray], device: torch.device, tokens: int, shared: int, most: int = 0
) -> list[Batch]:
    """`packing.lines` on the device."""
    return [make_batch(line, device) for line in packing.lines(sequences, tokens, shared, most)]


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

        output: what W_o reads of a head (zeroing W_o's output would hit channels, not heads). query: after
        the bias; rotary embedding leaves zero at zero, so the head attends uniformly.
        """
        if part != self.mask or index != self.layer:
            return per_head
        every = torch.arange(per_head.shape[2], device=per_head.device)
        return per_head * (every != self.heads[:, None])[:, None, :, None]


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
    """A transformers causal LM, taken apart. Holds no weights of its own.

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
        self.model, self.eos = model, frozenset(eos)
        self.shape = models.read_shape(model.config)
        self.layers = self.shape.layers
        self.windows = models.sliding_windows(model.config)
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
            return budgets.machine_bytes() // 2 - sum(weight.nbytes for weight in self.model.parameters())
        weights = Counter()
        for weight in self.model.parameters():
            weights[weight.device] += weight.nbytes
        return min(
            int(0.9 * torch.cuda.get_device_properties(place).total_memory) - held
            for place, held in weights.items()
        )

    def stretches(self, layers: Iterable[int]) -> Iterator[tuple[torch.device, Iterator[int]]]:
        """Layers in a row that are on one device, with it."""
        return groupby(layers, lambda index: self.places[index])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_tokens(ids)

    def logits(self, hidden: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [..., V] from the last layer's residual stream, or [..., m] for the m tokens of
        `vocabulary`. Never rounded to half precision, where 16 and 16.05 are one number and letters tie."""
        hidden, weight = self.model.model.norm(hidden), self.model.lm_head.weight
        if vocabulary is not None:
            weight = weight[vocabulary]
        if self.device.type == "cpu" or self.model.dtype == torch.float32:
            return torch.nn.functional.linear(hidden.float(), weight.float())
        found = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return found.unflatten(0, hidden.shape[:-1])

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """The token of the largest logit, int64 [...], from the last layer's residual stream; of several, the
        first one."""
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
        keep: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Layers start..stop-1 for copies of a batch, each with another head ablated.

        Args:
            hidden: residual stream before layer `start`, [n, T, E].
            keep: called with each layer's index, keys and values, [n, T, K, D], on its device.

        Returns the residual stream after layer stop-1: [n, T, E], or after the model's last layer of the
        prompts' last tokens only, [n, R, E] (unless `batch.whole`).
        """
        turns = self.rotary(hidden, batch.positions[None])
        for place, layers in self.stretches(range(start, stop)):
            hidden, line, rotary = hidden.to(place), batch.to(place), to(turns, place)
            ablated = ablation and ablation.to(place)
            at = torch.arange(line.columns.shape[1], device=place)
            own = self.masks((at[:, None] - at)[None])  # (1, C, C)
            ends = self.masks((line.lengths - 1)[:, None, None] - at)  # (R, 1, C)
            for index in layers:
                last = line.last if index == self.layers - 1 and not batch.whole else None

                def attend(index, queries, keys, values, line=line, last=last, own=own, ends=ends):
                    if keep is not None:
                        keep(index, keys, values)
                    window = self.windows[index]
                    if last is None:
                        return self._attend_all(line, index, queries, keys, values, own.of(window))
                    return self._attend_last(line, index, queries, keys, values, ends.of(window))

                hidden = self.layer(index, hidden, rotary, attend, ablated, last)
        return hidden.to(self.device)

    def masks(self, distance: torch.Tensor) -> Masks:
        return Masks(distance, self.shape.heads // self.shape.kv_heads, self.model.dtype)

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
        turns = self.rotary(hidden, positions)
        for place, layers in self.stretches(cache.layers):
            hidden, at, rotary = hidden.to(place), positions.to(place), to(turns, place)
            ablated = ablation and ablation.to(place)
            lines = torch.arange(len(hidden), device=place)[:, None]
            masks = self.masks(at[:, :, None] - torch.arange(width, device=place))  # (n, w, C)

            def attend(index, queries, keys, values, lines=lines, at=at, masks=masks):
                cache.keys[index][lines, at] = keys
                cache.values[index][lines, at] = values
                known, held = (kept[index][: len(lines), :width] for kept in (cache.keys, cache.values))
                return self._attention(index, queries, known, held, masks.of(self.windows[index]))

            for index in layers:
                hidden = self.layer(index, hidden, rotary, attend, ablated)
        return hidden.to(self.device)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Pair:
        """Cosines and sines, [n, T, 1, D] each."""
        cos, sin = self.model.model.rotary_emb(hidden, position_ids=positions)
        return cos[:, :, None], sin[:, :, None]

    def layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rotary: Pair,
        attend: Attend,
        ablation: Ablation | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One decoder layer on [n, T, E]; its outcome for all tokens or for those of `wanted` [M]."""
        module = self.model.model.layers[index]
        attention, normed = module.self_attn, module.input_layernorm(hidden)
        keys = attention.k_proj(normed).unflatten(-1, (self.shape.kv_heads, -1))  # (n, T, K, D)
        values = attention.v_proj(normed).unflatten(-1, (self.shape.kv_heads, -1))
        keys = _rotated(keys, rotary)
        if wanted is not None:
            hidden, normed = hidden[:, wanted], normed[:, wanted]
            rotary = rotary[0][:, wanted], rotary[1][:, wanted]
        queries = attention.q_proj(normed).unflatten(-1, (self.shape.heads, -1))  # (n, M, H, D)
        if ablation is not None:
            queries = ablation.zeroed("query", index, queries)
        mixed = attend(index, _rotated(queries, rotary), keys, values)
        if ablation is not None:
            mixed = ablation.zeroed("output", index, mixed)
        hidden = hidden + attention.o_proj(mixed.flatten(-2))
        return hidden + module.mlp(module.post_attention_layernorm(hidden))

    def _attention(self, index, queries, keys, values, mask) -> torch.Tensor:
        """Queries [n, M, H, D] on keys and values [n, C, K, D], with one of `Masks`.

        Heads that share a key are queries of one head here, so that no key is copied.
        """
        group = self.shape.heads // self.shape.kv_heads
        grouped = queries.unflatten(2, (self.shape.kv_heads, group)).permute(0, 2, 3, 1, 4)  # (n, K, G, M, D)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            grouped.flatten(2, 3),  # (n, K, G * M, D)
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            scale=self.model.model.layers[index].self_attn.scaling,
        )
        return mixed.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (n, M, H, D)

    def attend_behind(
        self,
        index: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        prefix_keys: torch.Tensor,
        prefix_values: torch.Tensor,
    ) -> torch.Tensor:
        """Rows of w tokens [n, w, H, D] on their own keys and values [n, w, K, D] and those of a prefix
        [P, K, D] that all share. It is not copied for each row, nor kept so for the gradient."""
        window, group = self.windows[index], self.shape.heads // self.shape.kv_heads
        width, prefix = queries.shape[1], len(prefix_keys)
        grouped = queries.unflatten(2, (self.shape.kv_heads, group))  # (n, w, K, G, D)
        before = torch.einsum("nwkgd,pkd->nkgwp", grouped, prefix_keys)
        among = torch.einsum("nwkgd,nvkd->nkgwv", grouped, keys)
        at = torch.arange(prefix + width, device=queries.device)
        distance = at[prefix:, None] - at  # query minus key position, (w, P + w)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = torch.cat([before, among], dim=-1) * self.model.model.layers[index].self_attn.scaling
        wide = torch.promote_types(scores.dtype, torch.float32)
        share = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1, dtype=wide).to(scores.dtype)
        mixed = torch.einsum("nkgwp,pkd->nwkgd", share[..., :prefix], prefix_values)
        mixed = mixed + torch.einsum("nkgwv,nvkd->nwkgd", share[..., prefix:], values)
        return mixed.flatten(2, 3)  # (n, w, H, D)

    def _attend_all(self, batch: Batch, index, queries, keys, values, mask) -> torch.Tensor:
        """Every token of a line on what stands before it in its own prompt, [n, T, H, D]."""
        prefix, copies, group = batch.prefix, len(queries), self.shape.heads // self.shape.kv_heads
        mask = mask.unflatten(2, (group, -1))  # (1, 1, G, C, C)
        # Each prompt's own, (n * R, C, K, D) and (n * R, C - P, H, D); shared tokens are answered more than
        # once and picked once.
        known, held = (part[:, batch.columns].flatten(0, 1) for part in (keys, values))
        own_queries = queries[:, batch.columns[:, prefix:]].flatten(0, 1)
        own = self._attention(index, own_queries, known, held, mask[:, :, :, prefix:].flatten(2, 3))
        own = own.unflatten(0, (copies, -1)).flatten(1, 2)[:, batch.picks]  # (n, T - P, H, D)
        if not prefix:
            return own
        before = mask[:, :, :, :prefix, :prefix].flatten(2, 3)
        first = self._attention(index, *(part[:, :prefix] for part in (queries, keys, values)), before)
        return torch.cat([first, own], dim=1)

    def _attend_last(self, batch: Batch, index, queries, keys, values, mask) -> torch.Tensor:
        """The prompts' last tokens on their prompts, [n, R, H, D]."""
        known, held = (part[:, batch.columns].flatten(0, 1) for part in (keys, values))
        own = queries.flatten(0, 1)[:, None]
        mixed = self._attention(index, own, known, held, mask.repeat(len(queries), 1, 1, 1))
        return mixed[:, 0].unflatten(0, (len(queries), -1))


def to(pair: Pair, place: torch.device) -> Pair:
    return pair[0].to(place), pair[1].to(place)


def _rotated(per_head: torch.Tensor, rotary: Pair) -> torch.Tensor:
    cos, sin = rotary
    return per_head * cos + rotate_half(per_head) * sin
