"""Greedy responses, and the sweep of responses that ablates one head at a time (see `core.drafts`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from backends.base import Example, Head
from backends.core import budgets, drafts, packing
from backends.core.drafts import WIDTH, Decoding, Row, Settings
from backends.core.kept import Kept
from backends.torch.adapter import adapted
from backends.torch.batch import Batch, make_batch, make_batches
from backends.torch.decoder import Ablation, Cache, Decoder
from backends.torch.sweep import Frontier, token_limit

ROWS_CPU, ROWS_CUDA = 512, 2048
"""rows decoded together where memory holds them; more gain nothing (on an H200 a step of 2,000 rows of an 8B
model takes 85 ms, of which its arithmetic alone is 55)"""
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
        self._rows: list[Row] = []
        self._prompts = torch.zeros(0)

    def step(self, ids: np.ndarray, positions: np.ndarray, rows: list[Row], off: list[int]) -> np.ndarray:
        device, width = self.decoder.device, int(positions.max()) + 1
        ids, positions = (torch.from_numpy(array).to(device).long() for array in (ids, positions))
        if self.frontier is None:
            hidden = self.decoder.embed(ids)
        else:
            columns = self.frontier.batch.columns
            places = columns[self._prompts_of(rows), positions.clamp(max=columns.shape[1] - 1)]
            hidden = self.frontier.hidden[0, places]
            if off:
                off = torch.tensor(off, device=device)
                own = self.decoder.embed(ids[off])
                hidden[off] = self.decoder.extend(self.lower, own, positions[off], width)
        hidden = self.decoder.extend(self.cache, hidden, positions, width, self.ablation)
        return self.decoder.greedy(hidden).cpu().numpy()  # the one wait for the device

    def _prompts_of(self, rows: list[Row]) -> torch.Tensor:
        """[R, 1] on the device; the list is another one only where rows have been dropped."""
        if rows is not self._rows:
            numbers = torch.tensor([row.prompt for row in rows])
            self._rows, self._prompts = rows, numbers[:, None].to(self.decoder.device)
        return self._prompts

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
        columns, rows = (part.to(decoder.places[index]) for part in (batch.columns, lines))
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


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: Sequence[Example], max_new_tokens: int, adapter: Path | None
) -> list[np.ndarray]:
    """See Backend.generate. Rows decode side by side, and where one ends the next prompt takes its place. The
    sweep's clean responses come from here too, so that clean and ablated models round alike."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    if not prompts:
        return outputs
    sequences = [prompt.prompt_ids for prompt in prompts]
    # Neighbours in alphabetical order share most of what they begin with.
    waiting = sorted(range(len(prompts)), key=lambda row: sequences[row].astype(">i4").tobytes())
    size = min(len(prompts), _plan(decoder, prompts, max_new_tokens).rows)
    columns = max(map(len, sequences)) + max_new_tokens + WIDTH
    cache = Cache(range(decoder.layers), size, columns, decoder.like)

    def refill(places: list[int]) -> tuple[list[Row], list[int]]:
        taken = [waiting.pop(0) for _ in places[: len(waiting)]]
        own, first = [sequences[row] for row in taken], [0] * len(taken)
        shared = min(map(len, own), default=0)
        for batch in make_batches(own, decoder.device, token_limit(decoder), shared):
            lines = torch.tensor([places[row] for row in batch.rows], device=decoder.device)
            tokens = _prefill(decoder, batch, decoder.embed(batch.ids)[None], cache, lines)
            for row, token in zip(batch.rows, tokens, strict=True):
                first[row] = token
        made = [Row(row, len(sequences[row])) for row in taken]
        everyone.extend(made)
        return made, first

    everyone: list[Row] = []
    with adapted(decoder.model, adapter):
        rows, first = refill(list(range(size)))
        engine = _Engine(decoder, cache)
        Decoding(engine, rows, _settings(decoder, max_new_tokens), refill=refill).run(first)
    for row in everyone:
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
        responses = generate(decoder, prompts, max_new_tokens, None)
        sequences = drafts.clean_sequences(prompts, responses)
        shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
        lines = make_batches(sequences, decoder.device, token_limit(decoder), shared, plan.prompts)
        return [_Block(decoder, line, prompts, responses, max_new_tokens + WIDTH) for line in lines]

    blocks = kept.of(prompts, ("responses", max_new_tokens, plan), make)
    yield from drafts.sweep(blocks, heads, mask, _settings(decoder, max_new_tokens), plan)
