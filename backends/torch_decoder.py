"""The transformers decoder, run layer by layer: shared prefixes, silenced heads, greedy decoding.

The modules are transformers' own, called one layer at a time, so that a pass can start at any layer from a
kept residual stream, compute a prefix that rows share once, and silence another head in every row.
`choices`, `generate` and both sweeps run on this one code path: a silenced head is compared with a clean
model that was computed alike.

Axes as in `backends.base`; R rows of one batch, P tokens of the shared prefix, S of the (right-padded)
suffix.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from backends import batching, models


@dataclass
class Batch:
    """Rows that share a prefix: prefix ids [P], suffix ids [R, S] right-padded, true suffix lengths [R]."""

    prefix: torch.Tensor
    suffix: torch.Tensor
    lengths: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Silence:
    """Which head is silenced in each row: one layer, heads [R], and what is zeroed."""

    layer: int
    heads: torch.Tensor
    mask: str = "output"

    def take(self, rows: torch.Tensor) -> "Silence":
        return Silence(self.layer, self.heads[rows], self.mask)

    def repeat(self, times: int) -> "Silence":
        return Silence(self.layer, self.heads.repeat_interleave(times), self.mask)


class _Past:
    """One layer's keys and values, in the form that transformers' attention asks for (`update`)."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None):
        self.keys, self.values = keys, values

    def update(self, keys, values, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat([self.keys, keys], dim=2)  # (R, K, P + S, D)
            self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values


class _Slots:
    """One layer's keys and values in buffers of fixed size [R, K, columns, D], written column by column."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, columns: int):
        rows, kv_heads, filled, dim = keys.shape
        self.keys, self.values = (keys.new_empty(rows, kv_heads, columns, dim) for _ in range(2))
        self.keys[:, :, :filled], self.values[:, :, :filled] = keys, values
        self.filled = filled

    def update(self, keys, values, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.filled + keys.shape[2]
        self.keys[:, :, self.filled : end], self.values[:, :, self.filled : end] = keys, values
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def take(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def make_batches(
    sequences: Sequence[np.ndarray], device: torch.device, tokens: int, shared: int
) -> list[tuple[np.ndarray, Batch]]:
    """`batching.pack` with the token ids on the device: the rows' indices and the batch, for each batch."""
    return [
        (
            packed.rows,
            Batch(
                *(torch.from_numpy(ids).to(device) for ids in (packed.prefix, packed.suffix, packed.lengths))
            ),
        )
        for packed in batching.pack(sequences, tokens, shared)
    ]


@contextmanager
def _silenced(attention: torch.nn.Module, silence: Silence, kept_heads: int):
    """Zeroes the named head of each row inside one attention module.

    output: its slice of what W_o reads (zeroing W_o's output would hit channels, not heads). query: its
    slice of the query, after the bias; rotary embedding leaves zero at zero, so the head attends uniformly.
    """
    width = attention.head_dim
    keep = torch.ones(len(silence.heads), kept_heads, device=silence.heads.device)
    keep[torch.arange(len(silence.heads), device=keep.device), silence.heads] = 0
    keep = keep.repeat_interleave(width, dim=1)[:, None].to(attention.o_proj.weight.dtype)  # (R, 1, H * D)
    if silence.mask == "output":
        hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * keep,))
    else:
        hook = attention.q_proj.register_forward_hook(lambda _, inputs, output: output * keep)
    try:
        yield
    finally:
        hook.remove()


class Decoder:
    """A transformers causal LM, taken apart. Holds no weights of its own."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        config = model.config
        self.layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.windows = models.sliding_windows(config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _modules(self):
        return self.model.model.layers

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_tokens(ids)

    def logits(self, hidden: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [..., V] from the last layer's residual stream, or [..., n] for the n tokens of
        `vocabulary`."""
        hidden = self.model.model.norm(hidden)
        if vocabulary is None:
            return self.model.lm_head(hidden).float()
        return torch.nn.functional.linear(hidden, self.model.lm_head.weight[vocabulary]).float()

    def _layer(self, index, hidden, positions, visible, distance, past, silence):
        """One decoder layer. visible: bool [R, T, columns]; distance: query minus key position, same
        shape."""
        window = self.windows[index]
        mask = visible if window is None else visible & (distance < window)
        module = self._modules()[index]
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        arguments = {
            "attention_mask": mask[:, None],
            "position_ids": positions,
            "past_key_values": past,
            "use_cache": True,
            "position_embeddings": rotary,
        }
        if silence is None or silence.layer != index:
            return module(hidden, **arguments)
        with _silenced(module.self_attn, silence, self.heads):
            return module(hidden, **arguments)

    def run(
        self,
        batch: Batch,
        prefix: torch.Tensor,
        suffix: torch.Tensor,
        start: int,
        stop: int,
        silence: Silence | None = None,
        keep: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, list[_Past]]:
        """Layers start..stop-1 for a batch, or for `copies` of it, each copy with another head silenced.

        Args:
            prefix: residual stream of the shared prefix before layer `start`, [copies, P, E].
            suffix: that of the rows, [copies * R, S, E], copy by copy.
            silence: one head a copy.
            keep: return every layer's keys and values.

        Returns the residual streams after layer stop-1, and one `_Past` ([copies * R, K, P + S, D]) a layer.
        """
        copies, width, length = len(suffix) // batch.rows, len(batch.prefix), batch.suffix.shape[1]
        device = suffix.device
        columns = torch.arange(width + length, device=device)
        apart = columns[:, None] - columns[None, :]  # query minus key position
        causal = apart >= 0
        rows_silence = None if silence is None else silence.repeat(batch.rows)
        pasts = []
        for index in range(start, stop):
            past = _Past()
            if width:
                prefix = self._layer(
                    index,
                    prefix,
                    columns[None, :width],
                    causal[None, :width, :width],
                    apart[None, :width, :width],
                    past,
                    silence,
                )
                past.keys, past.values = (
                    kept.repeat_interleave(batch.rows, dim=0) for kept in (past.keys, past.values)
                )
            # Padding stands after a row's own tokens, so causality alone hides it from them.
            suffix = self._layer(
                index,
                suffix,
                columns[None, width:],
                causal[None, width:].expand(copies * batch.rows, -1, -1),
                apart[None, width:],
                past,
                rows_silence,
            )
            if keep:
                pasts.append(past)
        return prefix, suffix, pasts

    def start(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual streams before layer 0: [1, P, E] and [R, S, E]."""
        return self.embed(batch.prefix[None]), self.embed(batch.suffix)

    def decode(
        self,
        pasts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        lengths: torch.Tensor,
        tokens: torch.Tensor,
        budget: torch.Tensor,
        eos: torch.Tensor,
        silence: Silence | None = None,
    ) -> list[list[int]]:
        """Greedy continuation of rows whose keys and values are known, one token a step for all rows.

        Args:
            pasts: keys and values of every layer, [R, K, columns, D]; columns from lengths[r] on are ignored
            in row r.
            lengths: tokens of each row that `pasts` holds validly, [R].
            tokens: the next token of each row, already decided, [R].
            budget: tokens that each row may have in all, `tokens` included, [R].
            eos: ids that end a row.

        Returns each row's tokens, beginning with `tokens`, EOS included.
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        written = [[int(token)] for token in tokens]
        filled = pasts[0][0].shape[2]
        columns = filled + int(budget.max())
        slots = [_Slots(keys, values, columns) for keys, values in pasts]
        key_position = torch.arange(filled, device=tokens.device).repeat(len(rows), 1)  # (R, columns so far)
        valid = key_position < lengths[:, None]
        position, left = lengths.clone(), budget - 1
        while True:
            going = (left > 0) & ~torch.isin(tokens, eos)
            if not going.any():
                return written
            if going.sum() <= len(going) // 2:  # drop finished rows where it saves real work
                kept = going.nonzero()[:, 0]
                rows, tokens, position, left = rows[kept], tokens[kept], position[kept], left[kept]
                key_position, valid, going = key_position[kept], valid[kept], going[kept]
                silence = None if silence is None else silence.take(kept)
                for slot in slots:
                    slot.take(kept)
            key_position = torch.cat([key_position, position[:, None]], dim=1)
            valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
            visible, distance = valid[:, None], (position[:, None] - key_position)[:, None]
            hidden = self.embed(tokens[:, None])
            for index, slot in enumerate(slots):
                hidden = self._layer(index, hidden, position[:, None], visible, distance, slot, silence)
            tokens = self.logits(hidden[:, 0]).argmax(dim=-1)
            for row, token, alive in zip(rows.tolist(), tokens.tolist(), going.tolist(), strict=True):
                if alive:
                    written[row].append(token)
            position, left = position + 1, torch.where(going, left - 1, 0)
