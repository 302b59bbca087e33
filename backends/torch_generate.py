"""Greedy responses, and the sweep that silences one head at a time.

All rows (head x prompt) of a layer's heads decode side by side, a token a step. A row that has said what the
clean model said is *on* the clean response: below the silenced layer its stream, keys and values are the
clean model's, known already, and it enters at the silenced layer. With its first other word it is off, and
runs through every layer. Where so few rows are left that a step costs as much for more tokens, the
next ones are guessed (the clean response for rows on it; for others what other heads' responses went on
with) and checked in the same step: greedy, so still exact.

Nothing depends on other layers: a layer's responses are the same however a sweep is cut into calls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from backends import batching, memory
from backends.base import Head, Shape
from backends.drafts import Responses
from backends.torch_decoder import Batch, Cache, Decoder, Silence, make_batch, make_batches
from backends.torch_sweep import Frontier, in_groups, token_limit
from data.examples import Example

ROWS_CPU, ROWS_CUDA = 512, 640
"""rows decoded together; more gain nothing"""
STEP_CPU, STEP_CUDA = 32, 512
"""tokens that a step takes in for hardly more than it costs anyway (it reads all weights)"""
WIDTH = 8
"""tokens of a row that a step takes at most"""
KEPT = 0.75
"""of the rows in a cache may be left when it is packed again"""
CLEAN = -1
"""the head that is silenced where none is"""


@dataclass
class _Row:
    """A response in the making."""

    prompt: int
    """of the block"""
    length: int
    """tokens of the prompt"""
    said: list[int]
    on: bool
    """it is the clean response so far"""
    going: bool = True
    node: int = 0
    """`said` in the prompt's `Responses`"""

    @property
    def position(self) -> int:
        """Of the last token said."""
        return self.length + len(self.said) - 1


@dataclass
class _Clean:
    """What is known of a block's prompts before the layer at which a sweep stands."""

    drafts: list[list[int]]
    """the clean responses"""
    stream: torch.Tensor
    """residual stream of the line of prompts and responses, [T, E]"""
    columns: torch.Tensor
    """where the token at each position stands in the line, [N, C]"""
    below: list[tuple[torch.Tensor, torch.Tensor]]
    """keys and values of the line in the layers below, [T, K, D]"""
    known: list[Responses] = field(default_factory=list)
    """the responses of the layer's heads so far, for each prompt"""


class _Decoding:
    """Rows that decode side by side; line i of `cache` is rows[i].

    Args:
        cache: of the layers from the silenced one up, prompts filled in.
        silence: a head a row.
        first: what each row says first.
        clean: None: no row is on a clean response, and the cache has all layers.
        pairs: in half precision, the row of the same prompt in which nothing is silenced. Rounding differs
            with the shape of a product, so that near a tie a row may leave the clean response without cause;
            what the clean model says in the same product decides.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        rows: list[_Row],
        silence: Silence | None,
        clean: _Clean | None,
        budget: int,
        eos: set[int],
        pairs: list[int] | None = None,
    ):
        self.decoder, self.cache, self.rows, self.silence = decoder, cache, rows, silence
        self.clean, self.budget, self.eos, self.pairs = clean, budget, eos, pairs
        self.lower = Cache(range(cache.layers.start), len(rows), cache.columns, cache.like)
        self.off: list[int] = []  # line i of `lower` is rows[off[i]]

    def run(self, first: Sequence[int]) -> None:
        """Decodes every row to its end. `first` is what each one says first."""
        self._hear([[token] for token in first], [[]] * len(self.rows))
        while any(row.going for row in self.rows):
            fed = self._feed()
            self._hear(self._step(fed), fed)

    def _feed(self) -> list[list[int]]:
        """For each row, the last token it said, and guesses at the next ones where they cost nothing."""
        width = STEP_CUDA if self.decoder.device.type == "cuda" else STEP_CPU
        width = min(WIDTH, width // len(self.rows))
        fed = []
        for row in self.rows:
            guesses: list[int] = []
            if width > 1 and row.going and self.clean is not None:
                if row.on:
                    guesses = self.clean.drafts[row.prompt][len(row.said) :][: width - 1]
                else:
                    guesses = self.clean.known[row.prompt].guess(row.node, width - 1)
            fed.append([row.said[-1], *guesses[: self.budget - len(row.said) - 1]])
        return fed

    def _step(self, fed: list[list[int]]) -> list[list[int]]:
        """The greedy token after each token fed."""
        device, width = self.decoder.device, max(map(len, fed))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in fed], device=device)
        positions = torch.tensor([row.position for row in self.rows], device=device)
        positions = positions[:, None] + torch.arange(width, device=device)
        if self.clean is None:
            hidden = self.decoder.embed(ids)
        else:
            prompts = torch.tensor([row.prompt for row in self.rows], device=device)
            columns = self.clean.columns
            hidden = self.clean.stream[columns[prompts[:, None], positions.clamp(max=columns.shape[1] - 1)]]
            if self.off:
                off = torch.tensor(self.off, device=device)
                below = self.decoder.extend(self.lower, self.decoder.embed(ids[off]), positions[off])
                hidden[off] = below
        hidden = self.decoder.extend(self.cache, hidden, positions, self.silence)
        return self.decoder.logits(hidden).argmax(dim=-1).tolist()

    def _hear(self, told: list[list[int]], fed: list[list[int]]) -> None:
        """Takes each row's next tokens from what the model told after each token fed to it, up to the first
        that was guessed wrong."""
        left = []
        for line, row in enumerate(self.rows):
            if not row.going:
                continue
            draft = self.clean.drafts[row.prompt] if row.on else ()
            began = len(row.said)
            for at, token in enumerate(told[line]):
                if row.on and self.pairs is not None and token == told[self.pairs[line]][at]:
                    token = draft[len(row.said)]
                row.on = row.on and token == draft[len(row.said)]
                row.said.append(token)
                row.going = token not in self.eos and len(row.said) < self.budget
                if not row.going or at + 1 >= len(fed[line]) or fed[line][at + 1] != token:
                    break
            if self.clean is not None:
                row.node = self.clean.known[row.prompt].add(row.node, row.said[began:])
                if draft and not row.on and row.going:
                    left.append(line)
        if 0 < sum(row.going for row in self.rows) <= KEPT * len(self.rows):
            left = self._pack(left)
        if left:
            self._leave(left)

    def _leave(self, lines: list[int]) -> None:
        """Rows that are off the clean response from now on: what it left in the lower layers is theirs."""
        places = self.clean.columns[[self.rows[line].prompt for line in lines]]  # (m, C)
        slots = slice(len(self.off), len(self.off) + len(lines))
        for index, (keys, values) in enumerate(self.clean.below):
            self.lower.fill(index, slots, keys[places], values[places])
        self.off += lines

    def _pack(self, left: list[int]) -> list[int]:
        """Drops rows that have ended. Returns the new numbers of `left`."""
        kept = [line for line, row in enumerate(self.rows) if row.going]
        number = {line: new for new, line in enumerate(kept)}
        if self.pairs is not None:
            self.pairs = [number.get(self.pairs[line], 0) for line in kept]
        lower = [slot for slot, line in enumerate(self.off) if line in number]
        self.off = [number[self.off[slot]] for slot in lower]
        self.lower.take(lower + [0] * (len(kept) - len(lower)))
        self.cache.take(kept)
        self.rows = [self.rows[line] for line in kept]
        if self.silence is not None:
            self.silence = self.silence.take(torch.tensor(kept, device=self.decoder.device))
        return [number[line] for line in left]


def _prefill(
    decoder: Decoder, batch: Batch, hidden: torch.Tensor, cache: Cache, lines: torch.Tensor, silence=None
) -> list[int]:
    """Runs prompts through the cache's layers, keeps their keys and values in `lines` of it (copy by copy),
    and returns their first tokens."""

    def keep(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        cache.fill(index, lines, *(part[:, batch.columns].flatten(0, 1) for part in (keys, values)))

    hidden = decoder.run(batch, hidden, cache.layers.start, decoder.layers, silence, keep)  # (n, R, E)
    return decoder.logits(hidden.flatten(0, 1)).argmax(dim=-1).tolist()


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
    rows = _plan(decoder, shape, prompts, max_new_tokens).rows
    shared = min(map(len, sequences))
    for batch in make_batches(sequences, decoder.device, token_limit(decoder), shared, rows):
        columns = batch.columns.shape[1] + max_new_tokens + WIDTH
        cache = Cache(range(decoder.layers), len(batch.rows), columns, decoder.like)
        lines = torch.arange(len(batch.rows), device=decoder.device)
        first = _prefill(decoder, batch, decoder.embed(batch.ids)[None], cache, lines)
        responses = [_Row(row, len(sequences[row]), [], False) for row in batch.rows]
        _Decoding(decoder, cache, responses, None, None, max_new_tokens, eos).run(first)
        for response in responses:
            outputs[response.prompt] = np.array(response.said, np.int32)
    return outputs


class _Block:
    """Prompts whose clean responses are known, and the clean model's state before the layer at which the
    sweep stands."""

    def __init__(
        self, decoder: Decoder, line: Batch, prompts: Sequence[Example], drafts: Sequence[np.ndarray]
    ):
        self.decoder, self.rows = decoder, line.rows
        own = [prompts[row].prompt_ids for row in line.rows]
        self.lengths = [len(ids) for ids in own]
        self.drafts = [drafts[row].tolist() for row in line.rows]
        self.frontier = Frontier(decoder, line, key_values=True)
        # The prompts alone, which silenced models read, and where their tokens stand in the line.
        (alone,) = batching.lines(own, 2 * sum(self.lengths) * len(own), min(self.lengths) - 1)
        self.batch = make_batch(alone, decoder.device)
        holders, positions = (
            torch.from_numpy(part).to(decoder.device) for part in (alone.rows[alone.holders], alone.positions)
        )
        self.within = line.columns[holders, positions]

    def silenced(
        self, layer: int, group: Sequence[int], mask: str, budget: int, eos: set[int], most: int
    ) -> list[list[list[int]]]:
        """Responses of each prompt with each head of the group silenced, decoding at most `most` rows
        together."""
        self.frontier.move(layer)
        line, count = self.frontier.batch, len(self.rows)
        clean = _Clean(self.drafts, self.frontier.hidden[0], line.columns, self.frontier.below)
        for draft in self.drafts:
            clean.known.append(Responses())
            clean.known[-1].add(0, draft)
        half = self.decoder.itemsize < 4
        responses: list[list[list[int]]] = []
        for some in in_groups(len(group), most // count - half):
            heads = [*group[some], *([CLEAN] if half else [])]
            rows = self._decoded(layer, heads, mask, budget, eos, clean)
            for copy in range(len(group[some])):
                responses.append([row.said for row in rows[copy * count : (copy + 1) * count]])
        return responses

    def _decoded(
        self, layer: int, heads: list[int], mask: str, budget: int, eos: set[int], clean: _Clean
    ) -> list[_Row]:
        """A row for each head x prompt, head by head."""
        decoder, batch, count = self.decoder, self.batch, len(self.rows)
        copies = torch.tensor(heads, device=decoder.device)
        columns = max(self.lengths) + budget + WIDTH
        cache = Cache(range(layer, decoder.layers), len(heads) * count, columns, decoder.like)
        first = np.zeros((len(heads), count), int)
        stream = self.frontier.hidden[:, self.within]
        order = torch.from_numpy(batch.rows).to(decoder.device)
        for some in in_groups(len(heads), token_limit(decoder) // len(batch.ids)):
            silence = Silence(layer, copies[some], mask)
            lines = (
                torch.arange(some.start, some.stop, device=decoder.device)[:, None] * count + order
            ).flatten()
            hidden = stream.expand(len(silence.heads), -1, -1)
            told = _prefill(decoder, batch, hidden, cache, lines, silence)
            first[some][:, batch.rows] = np.array(told).reshape(-1, count)
        rows = [_Row(at, self.lengths[at], [], True) for _ in heads for at in range(count)]
        pairs = None
        if heads[-1] == CLEAN:
            pairs = [(len(heads) - 1) * count + row.prompt for row in rows]
        silence = Silence(layer, copies.repeat_interleave(count), mask)
        _Decoding(decoder, cache, rows, silence, clean, budget, eos, pairs).run(first.ravel().tolist())
        return rows


@torch.no_grad()
def sweep_generations(
    decoder: Decoder,
    shape: Shape,
    prompts: Sequence[Example],
    heads: Sequence[Head],
    max_new_tokens: int,
    eos: set[int],
    mask: str,
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """See Backend.sweep_generations."""
    if not prompts:
        yield from ((head, []) for head in heads)
        return
    plan = _plan(decoder, shape, prompts, max_new_tokens)
    drafts = generate(decoder, shape, prompts, max_new_tokens, eos)
    # What the clean model reads: the prompt, then its response but for the last token.
    sequences = [
        np.concatenate([prompt.prompt_ids, draft[:-1]]) for prompt, draft in zip(prompts, drafts, strict=True)
    ]
    shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
    lines = make_batches(sequences, decoder.device, token_limit(decoder), shared, plan.prompts)
    blocks = [_Block(decoder, line, prompts, drafts) for line in lines]
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
