"""Greedy responses, and the sweep of responses that ablates one head at a time (see `core.drafts`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from backends.base import Example, Head
from backends.core import budgets, drafts, packing
from backends.core.drafts import WIDTH, Decoding, Row, Settings
from backends.core.kept import Kept
from backends.torch import continuous
from backends.torch.adapter import adapted
from backends.torch.decoder import Ablation, Batch, Cache, Decoder, make_batch, make_batches, to
from backends.torch.sweep import Frontier, token_limit

ROWS_CPU, ROWS_CUDA = 512, 640
"""rows decoded together; more gain nothing"""
STEP_CPU, STEP_CUDA = 32, 512
"""tokens that a step reads for hardly more than it costs anyway (it reads all weights)"""


class _Engine:
    """See `drafts.Engine`. Without a frontier all rows are off, and the cache has all layers.

    Args:
        cache: of the layers from the ablated one up, prompts filled in.
        ablation: a head a row.
        frontier: the clean model on prompts and responses, before the ablated layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        ablation: Ablation | None = None,
        frontier: Frontier | None = None,
    ):
        self.decoder, self.cache, self.ablation, self.frontier = decoder, cache, ablation, frontier
        rows = len(next(iter(cache.keys.values())))
        self.lower = Cache(range(cache.layers.start), rows, cache.columns, cache.like)

    def step(self, ids: np.ndarray, positions: np.ndarray, rows: list[Row], off: list[int]) -> np.ndarray:
        device = self.decoder.device
        ids, positions = (torch.from_numpy(array).to(device).long() for array in (ids, positions))
        if self.frontier is None:
            hidden = self.decoder.embed(ids)
        else:
            columns = self.frontier.batch.columns
            prompts = torch.tensor([row.prompt for row in rows], device=device)
            places = columns[prompts[:, None], positions.clamp(max=columns.shape[1] - 1)]
            hidden = self.frontier.hidden[0, places]
            if off:
                off = torch.tensor(off, device=device)
                hidden[off] = self.decoder.extend(self.lower, self.decoder.embed(ids[off]), positions[off])
        hidden = self.decoder.extend(self.cache, hidden, positions, self.ablation)
        return self.decoder.greedy(hidden).cpu().numpy()

    def leave(self, rows: list[Row], slots: range) -> None:
        columns = self.frontier.batch.columns[[row.prompt for row in rows]]  # (m, C)
        for index, (keys, values) in enumerate(self.frontier.below):
            at = columns.to(self.decoder.places[index])
            self.lower.fill(index, slice(slots.start, slots.stop), keys[at], values[at])

    def pack(self, kept: list[int], off: list[int]) -> None:
        self.cache.take(kept)
        self.lower.take(off + [0] * (len(kept) - len(off)))  # room for all that may yet leave
        if self.ablation is not None:
            self.ablation = self.ablation.take(torch.tensor(kept, device=self.decoder.device))


def _prefill(
    decoder: Decoder, batch: Batch, hidden: torch.Tensor, cache: Cache, lines: torch.Tensor, ablation=None
) -> list[int]:
    """Runs prompts through the cache's layers, keeps their keys and values in `lines` of it (copy by copy),
    and returns their first tokens."""

    def keep(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        columns, rows = to((batch.columns, lines), decoder.places[index])
        cache.fill(index, rows, *(part[:, columns].flatten(0, 1) for part in (keys, values)))

    hidden = decoder.run(batch, hidden, cache.layers.start, decoder.layers, ablation, keep)  # (n, R, E)
    return decoder.greedy(hidden.flatten(0, 1)).tolist()


def _plan(decoder: Decoder, prompts: Sequence[Example], max_new_tokens: int) -> budgets.Plan:
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens + WIDTH
    most = ROWS_CUDA if decoder.device.type == "cuda" else ROWS_CPU
    return budgets.plan_responses(decoder.shape, decoder.itemsize, decoder.room, len(prompts), longest, most)


def _settings(decoder: Decoder, max_new_tokens: int) -> Settings:
    step_tokens = STEP_CUDA if decoder.device.type == "cuda" else STEP_CPU
    return Settings(max_new_tokens, decoder.eos, step_tokens, decoder.itemsize < 4)


def generate(
    decoder: Decoder, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None
) -> list[np.ndarray]:
    """See Backend.generate."""
    with adapted(decoder.model, adapter):
        if len(set(decoder.places)) == 1 and continuous.handles(decoder.model):
            return continuous.generate(decoder.model, prompts, max_new_tokens, decoder.eos)
        return side_by_side(decoder, prompts, max_new_tokens)


@torch.no_grad()
def side_by_side(decoder: Decoder, prompts: Sequence[Example], max_new_tokens: int) -> list[np.ndarray]:
    """`generate` by this decoder, whatever the device."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    if not prompts:
        return outputs
    sequences = [prompt.prompt_ids for prompt in prompts]
    most = _plan(decoder, prompts, max_new_tokens).rows
    shared = min(map(len, sequences))
    for batch in make_batches(sequences, decoder.device, token_limit(decoder), shared, most):
        columns = batch.columns.shape[1] + max_new_tokens + WIDTH
        cache = Cache(range(decoder.layers), len(batch.rows), columns, decoder.like)
        lines = torch.arange(len(batch.rows), device=decoder.device)
        first = _prefill(decoder, batch, decoder.embed(batch.ids)[None], cache, lines)
        rows = [Row(row, len(sequences[row])) for row in batch.rows]
        Decoding(_Engine(decoder, cache), rows, _settings(decoder, max_new_tokens)).run(first)
        for row in rows:
            outputs[row.prompt] = np.array(row.tokens, np.int32)
    return outputs


class _Block:
    """See `drafts.Block`.

    Args:
        line: prompts with their responses.
        budget: tokens of a row after its prompt, at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        line: Batch,
        prompts: Sequence[Example],
        responses: Sequence[np.ndarray],
        budget: int,
    ):
        self.decoder, self.rows = decoder, line.rows
        own = [prompts[row].prompt_ids for row in line.rows]
        self.lengths = [len(ids) for ids in own]
        self.columns = max(self.lengths) + budget
        self.drafts = [responses[row].tolist() for row in line.rows]
        self.frontier = Frontier(decoder, line, key_values=True)
        # The prompts alone, which ablated models read, and where their tokens stand in the line.
        alone = packing.join(own, min(self.lengths) - 1)
        self.batch = make_batch(alone, decoder.device)
        holders, positions = (
            torch.from_numpy(part).to(decoder.device) for part in (alone.rows[alone.holders], alone.positions)
        )
        self.within = line.columns[holders, positions]

    def release(self) -> None:
        self.frontier.release()

    def begin(self, layer: int, heads: list[int], copies: int, mask: str) -> tuple[list[int], _Engine]:
        self.frontier.move(layer)
        decoder, batch, count = self.decoder, self.batch, len(self.rows)
        every = torch.tensor(heads, device=decoder.device)
        cache = Cache(range(layer, decoder.layers), len(heads) * count, self.columns, decoder.like)
        first = np.zeros((len(heads), count), int)
        stream = self.frontier.hidden[:, self.within]
        order = torch.from_numpy(batch.rows).to(decoder.device)
        for some in packing.even_slices(len(heads), token_limit(decoder) // len(batch.ids))[1]:
            ablation = Ablation(layer, every[some], mask)
            copy = torch.arange(some.start, some.stop, device=decoder.device)
            lines = (copy[:, None] * count + order).flatten()
            tokens = _prefill(decoder, batch, stream.expand(len(copy), -1, -1), cache, lines, ablation)
            first[some, batch.rows] = np.array(tokens).reshape(-1, count)
        ablation = Ablation(layer, every.repeat_interleave(count), mask)
        return first.ravel().tolist(), _Engine(decoder, cache, ablation, self.frontier)


@torch.no_grad()
def sweep_generations(
    decoder: Decoder,
    prompts: Sequence[Example],
    heads: Sequence[Head],
    max_new_tokens: int,
    mask: str,
    kept: Kept,
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """See Backend.sweep_generations."""
    if not prompts:
        yield from ((head, []) for head in heads)
        return
    plan = _plan(decoder, prompts, max_new_tokens)

    def make() -> list[_Block]:
        responses = side_by_side(decoder, prompts, max_new_tokens)
        sequences = drafts.clean_sequences(prompts, responses)
        shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
        lines = make_batches(sequences, decoder.device, token_limit(decoder), shared, plan.prompts)
        return [_Block(decoder, line, prompts, responses, max_new_tokens + WIDTH) for line in lines]

    blocks = kept.of(prompts, ("responses", max_new_tokens, plan), make)
    yield from drafts.sweep(blocks, heads, mask, _settings(decoder, max_new_tokens), plan)
