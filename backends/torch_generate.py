"""Greedy responses, and the sweep of responses that silences one head at a time (see `responses`).

Nothing depends on other layers: a layer's responses are the same however a sweep is cut into calls.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from backends import batching, memory
from backends.base import Head, Shape
from backends.kept import Kept
from backends.responses import CLEAN, WIDTH, Decoding, Draft, Row
from backends.torch_decoder import Batch, Cache, Decoder, Silence, make_batch, make_batches, to
from backends.torch_sweep import Frontier, in_groups, token_limit
from data.examples import Example

ROWS_CPU, ROWS_CUDA = 512, 640
"""rows decoded together; more gain nothing"""
STEP_CPU, STEP_CUDA = 32, 512
"""tokens that a step takes in for hardly more than it costs anyway (it reads all weights)"""


def _step_tokens(decoder: Decoder) -> int:
    return STEP_CUDA if decoder.device.type == "cuda" else STEP_CPU


class _Engine:
    """See `responses.Engine`. Without a frontier all rows are off, and the cache has all layers.

    Args:
        cache: of the layers from the silenced one up, prompts filled in.
        silence: a head a row.
        frontier: the clean model on prompts and responses, before the silenced layer.
    """

    def __init__(
        self, decoder: Decoder, cache: Cache, silence: Silence | None = None, frontier: Frontier | None = None
    ):
        self.decoder, self.cache, self.silence, self.frontier = decoder, cache, silence, frontier
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
        hidden = self.decoder.extend(self.cache, hidden, positions, self.silence)
        return self.decoder.greedy(hidden).cpu().numpy()

    def leave(self, rows: list[Row], slots: range) -> None:
        columns = self.frontier.batch.columns[[row.prompt for row in rows]]  # (m, C)
        for index, (keys, values) in enumerate(self.frontier.below):
            at = columns.to(self.decoder.places[index])
            self.lower.fill(index, slice(slots.start, slots.stop), keys[at], values[at])

    def pack(self, kept: list[int], off: list[int]) -> None:
        self.cache.take(kept)
        self.lower.take(off + [0] * (len(kept) - len(off)))  # room for all that may yet leave
        if self.silence is not None:
            self.silence = self.silence.take(torch.tensor(kept, device=self.decoder.device))


def _prefill(
    decoder: Decoder, batch: Batch, hidden: torch.Tensor, cache: Cache, lines: torch.Tensor, silence=None
) -> list[int]:
    """Runs prompts through the cache's layers, keeps their keys and values in `lines` of it (copy by copy),
    and returns their first tokens."""

    def keep(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        columns, rows = to((batch.columns, lines), decoder.places[index])
        cache.fill(index, rows, *(part[:, columns].flatten(0, 1) for part in (keys, values)))

    hidden = decoder.run(batch, hidden, cache.layers.start, decoder.layers, silence, keep)  # (n, R, E)
    return decoder.greedy(hidden.flatten(0, 1)).tolist()


def _plan(decoder: Decoder, shape: Shape, prompts: Sequence[Example], max_new_tokens: int) -> memory.Plan:
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens + WIDTH
    most = ROWS_CUDA if decoder.device.type == "cuda" else ROWS_CPU
    return memory.plan_responses(shape, decoder.itemsize, decoder.room, len(prompts), longest, most)


@torch.no_grad()
def generate(
    decoder: Decoder, shape: Shape, prompts: Sequence[Example], max_new_tokens: int, eos: set[int]
) -> list[np.ndarray]:
    """See Backend.generate."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    if not prompts:
        return outputs
    sequences = [prompt.prompt_ids for prompt in prompts]
    most = _plan(decoder, shape, prompts, max_new_tokens).rows
    shared = min(map(len, sequences))
    for batch in make_batches(sequences, decoder.device, token_limit(decoder), shared, most):
        columns = batch.columns.shape[1] + max_new_tokens + WIDTH
        cache = Cache(range(decoder.layers), len(batch.rows), columns, decoder.like)
        lines = torch.arange(len(batch.rows), device=decoder.device)
        first = _prefill(decoder, batch, decoder.embed(batch.ids)[None], cache, lines)
        rows = [Row(row, len(sequences[row])) for row in batch.rows]
        Decoding(_Engine(decoder, cache), rows, max_new_tokens, eos, _step_tokens(decoder)).run(first)
        for row in rows:
            outputs[row.prompt] = np.array(row.said, np.int32)
    return outputs


class _Block:
    """Prompts with their clean responses, whose rows decode together."""

    def __init__(
        self, decoder: Decoder, line: Batch, prompts: Sequence[Example], drafts: Sequence[np.ndarray]
    ):
        self.decoder, self.rows = decoder, line.rows
        own = [prompts[row].prompt_ids for row in line.rows]
        self.lengths = [len(ids) for ids in own]
        self.drafts = [drafts[row].tolist() for row in line.rows]
        self.frontier = Frontier(decoder, line, key_values=True)
        # The prompts alone, which silenced models read, and where their tokens stand in the line.
        alone = batching.join(own, min(self.lengths) - 1)
        self.batch = make_batch(alone, decoder.device)
        holders, positions = (
            torch.from_numpy(part).to(decoder.device) for part in (alone.rows[alone.holders], alone.positions)
        )
        self.within = line.columns[holders, positions]

    def silenced(
        self, layer: int, group: Sequence[int], mask: str, budget: int, eos: set[int], most: int
    ) -> list[list[list[int]]]:
        """Responses of each prompt with each head of the group silenced, at most `most` rows together."""
        self.frontier.move(layer)
        drafts, count = [Draft(tokens) for tokens in self.drafts], len(self.rows)
        half = self.decoder.itemsize < 4
        responses: list[list[list[int]]] = []
        for some in in_groups(len(group), most // count - half):
            heads = [*group[some], *([CLEAN] if half else [])]
            rows = [Row(at, self.lengths[at], draft) for _ in heads for at, draft in enumerate(drafts)]
            pairs = [(len(heads) - 1) * count + row.prompt for row in rows] if half else None
            first, engine = self._begun(layer, heads, mask, budget)
            Decoding(engine, rows, budget, eos, _step_tokens(self.decoder), pairs).run(first)
            for start in range(0, len(group[some]) * count, count):
                responses.append([row.said for row in rows[start : start + count]])
        return responses

    def _begun(self, layer: int, heads: list[int], mask: str, budget: int) -> tuple[list[int], _Engine]:
        """First tokens of head x prompt, head by head, and what goes on from them."""
        decoder, batch, count = self.decoder, self.batch, len(self.rows)
        copies = torch.tensor(heads, device=decoder.device)
        columns = max(self.lengths) + budget + WIDTH
        cache = Cache(range(layer, decoder.layers), len(heads) * count, columns, decoder.like)
        first = np.zeros((len(heads), count), int)
        stream = self.frontier.hidden[:, self.within]
        order = torch.from_numpy(batch.rows).to(decoder.device)
        for some in in_groups(len(heads), token_limit(decoder) // len(batch.ids)):
            silence = Silence(layer, copies[some], mask)
            copy = torch.arange(some.start, some.stop, device=decoder.device)
            lines = (copy[:, None] * count + order).flatten()
            told = _prefill(decoder, batch, stream.expand(len(copy), -1, -1), cache, lines, silence)
            first[some, batch.rows] = np.array(told).reshape(-1, count)
        silence = Silence(layer, copies.repeat_interleave(count), mask)
        return first.ravel().tolist(), _Engine(decoder, cache, silence, self.frontier)


@torch.no_grad()
def sweep_generations(
    decoder: Decoder,
    shape: Shape,
    prompts: Sequence[Example],
    heads: Sequence[Head],
    max_new_tokens: int,
    eos: set[int],
    mask: str,
    kept: Kept,
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """See Backend.sweep_generations."""
    if not prompts:
        yield from ((head, []) for head in heads)
        return
    plan = _plan(decoder, shape, prompts, max_new_tokens)

    def make() -> list[_Block]:
        drafts = generate(decoder, shape, prompts, max_new_tokens, eos)
        # What the clean model reads: the prompt, then its response but for the last token.
        sequences = [
            np.concatenate([prompt.prompt_ids, draft[:-1]])
            for prompt, draft in zip(prompts, drafts, strict=True)
        ]
        shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
        lines = make_batches(sequences, decoder.device, token_limit(decoder), shared, plan.prompts)
        return [_Block(decoder, line, prompts, drafts) for line in lines]

    blocks = kept.of(prompts, ("responses", max_new_tokens, plan), make)
    for layer, group in batching.by_layer(heads):
        outputs = [[np.zeros(0, np.int32)] * len(prompts) for _ in group]
        for block in blocks:
            responses = block.silenced(layer, group, mask, max_new_tokens, eos, plan.rows)
            for output, said in zip(outputs, responses, strict=True):
                for row, tokens in zip(block.rows, said, strict=True):
                    output[row] = np.array(tokens, np.int32)
            if not plan.keep:
                block.frontier.release()
        for head, output in zip(group, outputs, strict=True):
            yield (layer, head), output
