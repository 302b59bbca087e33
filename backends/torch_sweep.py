"""Next-token choices, greedy generation, and the sweep that silences one head at a time.

What makes the sweep cheap, and leaves it exact (tests hold it against a hook-and-loop reference): a head of
layer l changes nothing below l, so a pass starts at l from the clean residual stream, which moves up layer
by layer and is never kept twice; the prompts' shared prefix is computed once a head; heads of a layer
go through together; and the clean continuation is checked in one pass, so that decoding starts only where a
silenced model leaves it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from backends import batching
from backends.base import Head
from backends.torch_decoder import Batch, Decoder, Silence, make_batches
from data.examples import Example

# Padded suffix tokens that go through a layer at once: enough to fill the cores, small enough for their
# caches.
TOKENS_CPU, TOKENS_CUDA = 4096, 32768
# Those of one batch of prompts: fewer mean less padding, and are still enough for a matrix product.
BATCH_CPU, BATCH_CUDA = 1024, 16384


def _limit(decoder: Decoder, cpu: int, cuda: int) -> int:
    return cuda if decoder.device.type == "cuda" else cpu


def _prompt_batches(
    decoder: Decoder, prompts: Sequence[Example], tokens: int
) -> list[tuple[np.ndarray, Batch]]:
    sequences = [prompt.prompt_ids for prompt in prompts]
    shared = min(map(len, sequences), default=0)
    return make_batches(sequences, decoder.device, tokens, shared)


def _last(batch: Batch, suffix: torch.Tensor) -> torch.Tensor:
    """Residual stream at each row's last token, [copies * R, E]."""
    copies = len(suffix) // batch.rows
    lines = torch.arange(len(suffix), device=suffix.device)
    return suffix[lines, (batch.lengths - 1).repeat(copies)]


# Choices


def _choose(logits: torch.Tensor, example: Example, vocabulary: torch.Tensor | None) -> int:
    """Prediction in the sense of Example.answer from one row of logits."""
    if len(example.choice_ids) == 0:
        return int(logits.argmax())
    ids = torch.from_numpy(example.choice_ids.astype(np.int64)).to(logits.device)
    return int(logits[ids if vocabulary is None else torch.searchsorted(vocabulary, ids)].argmax())


@torch.no_grad()
def choices(decoder: Decoder, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """See Backend.choices."""
    prediction, probability = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32)
    for rows, batch in _prompt_batches(decoder, examples, _limit(decoder, BATCH_CPU, BATCH_CUDA)):
        _, suffix, _ = decoder.run(batch, *decoder.start(batch), 0, decoder.layers)
        logits = decoder.logits(_last(batch, suffix))
        for row, line in zip(rows, logits, strict=True):
            example = examples[row]
            prediction[row] = _choose(line, example, None)
            asked = example.choice_ids if len(example.choice_ids) else prediction[row : row + 1]
            ids = torch.from_numpy(asked.astype(np.int64)).to(line.device)
            probability[row] = float(line.softmax(dim=-1)[ids].sum())
    return prediction, probability


@torch.no_grad()
def logits(decoder: Decoder, examples: Sequence[Example], silenced: Head | None, mask: str) -> np.ndarray:
    """See Backend.logits."""
    found = np.zeros((len(examples), decoder.model.config.vocab_size), np.float32)
    for rows, batch in _prompt_batches(decoder, examples, _limit(decoder, BATCH_CPU, BATCH_CUDA)):
        if silenced is None:
            _, suffix, _ = decoder.run(batch, *decoder.start(batch), 0, decoder.layers)
        else:
            frontier = _Frontier(decoder, batch, False)
            frontier.move(silenced[0])
            suffix, _, _ = frontier.silenced([silenced[1]], mask)
        found[rows] = decoder.logits(_last(batch, suffix)).cpu().numpy()
    return found


class _Frontier:
    """The clean residual stream of a batch before layer `layer`, moved up as the sweep goes."""

    def __init__(self, decoder: Decoder, batch: Batch, keep: bool):
        self.decoder, self.batch, self.keep = decoder, batch, keep
        self.restart()

    def restart(self) -> None:
        self.layer, self.pasts = 0, []
        self.prefix, self.suffix = self.decoder.start(self.batch)

    def move(self, layer: int) -> None:
        if layer < self.layer:
            self.restart()
        self.prefix, self.suffix, pasts = self.decoder.run(
            self.batch, self.prefix, self.suffix, self.layer, layer, keep=self.keep
        )
        self.pasts += pasts
        self.layer = layer

    def silenced(self, heads: Sequence[int], mask: str):
        """Runs the rest of the model for each head: (residual stream [copies * R, S, E], pasts of layers >=
        layer)."""
        copies = len(heads)
        silence = Silence(self.layer, torch.tensor(heads, device=self.suffix.device), mask)
        _, suffix, pasts = self.decoder.run(
            self.batch,
            self.prefix.expand(copies, -1, -1),
            self.suffix.repeat(copies, 1, 1),
            self.layer,
            self.decoder.layers,
            silence,
            keep=self.keep,
        )
        return suffix, pasts, silence.repeat(self.batch.rows)


def _at_once(decoder: Decoder, batch: Batch, heads: Sequence[int]) -> Iterator[list[int]]:
    """Indices into `heads`, as many together as fit the token budget."""
    size = max(1, _limit(decoder, TOKENS_CPU, TOKENS_CUDA) // batch.suffix.numel())
    for start in range(0, len(heads), size):
        yield list(range(start, min(start + size, len(heads))))


@torch.no_grad()
def sweep_choices(
    decoder: Decoder, examples: Sequence[Example], heads: Sequence[Head], mask: str
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    ids = batching.candidates(examples)
    vocabulary = None if ids is None else torch.from_numpy(ids).to(decoder.device)
    batches = _prompt_batches(decoder, examples, _limit(decoder, BATCH_CPU, BATCH_CUDA))
    frontiers = [(rows, _Frontier(decoder, batch, False)) for rows, batch in batches]
    for layer, group in batching.by_layer(heads):
        prediction = np.zeros((len(group), len(examples)), np.int32)
        for rows, frontier in frontiers:
            frontier.move(layer)
            for some in _at_once(decoder, frontier.batch, group):
                suffix, _, _ = frontier.silenced([group[index] for index in some], mask)
                logits = decoder.logits(_last(frontier.batch, suffix), vocabulary)
                for line, (index, row) in enumerate((index, row) for index in some for row in rows):
                    prediction[index, row] = _choose(logits[line], examples[row], vocabulary)
        for index, head in enumerate(group):
            yield (layer, head), prediction[index]


# Generations


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: Sequence[Example], max_new_tokens: int, eos: torch.Tensor
) -> list[np.ndarray]:
    """See Backend.generate."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for rows, batch in _prompt_batches(decoder, prompts, _limit(decoder, TOKENS_CPU, TOKENS_CUDA)):
        _, suffix, pasts = decoder.run(batch, *decoder.start(batch), 0, decoder.layers, keep=True)
        first = decoder.logits(_last(batch, suffix)).argmax(dim=-1)
        lengths = batch.lengths + len(batch.prefix)
        budget = torch.full_like(lengths, max_new_tokens)
        known = [(past.keys, past.values) for past in pasts]
        for row, tokens in zip(rows, decoder.decode(known, lengths, first, budget, eos), strict=True):
            outputs[row] = np.array(tokens, np.int32)
    return outputs


@torch.no_grad()
def sweep_generations(
    decoder: Decoder,
    prompts: Sequence[Example],
    heads: Sequence[Head],
    max_new_tokens: int,
    eos: torch.Tensor,
    mask: str,
) -> Iterator[tuple[Head, list[np.ndarray]]]:
    """See Backend.sweep_generations. The clean continuation is the draft of every silenced model."""
    if not prompts:
        yield from ((head, []) for head in heads)
        return
    drafts = generate(decoder, prompts, max_new_tokens, eos)
    # What predicts the draft's tokens: the prompt, then the draft but for its last token.
    sequences = [
        np.concatenate([prompt.prompt_ids, draft[:-1]]) for prompt, draft in zip(prompts, drafts, strict=True)
    ]
    shared = min(len(prompt.prompt_ids) for prompt in prompts) - 1
    batches = make_batches(sequences, decoder.device, _limit(decoder, TOKENS_CPU, TOKENS_CUDA), shared)
    checks = []
    for rows, batch in batches:
        check = _DraftCheck(batch, [prompts[row] for row in rows], [drafts[row] for row in rows])
        clean = _Frontier(decoder, batch, True)
        _, suffix, _ = decoder.run(batch, clean.prefix, clean.suffix, 0, decoder.layers)
        check.expect(check.predictions(decoder, suffix))
        checks.append((rows, clean, check))
    for layer, group in batching.by_layer(heads):
        outputs = [list(drafts) for _ in group]
        for rows, frontier, check in checks:
            frontier.move(layer)
            for some in _at_once(decoder, frontier.batch, group):
                suffix, pasts, silence = frontier.silenced([group[index] for index in some], mask)
                predicted = check.predictions(decoder, suffix)
                accepted, left = check.compare(predicted)
                if len(left) == 0:
                    continue
                prompt_rows = left % frontier.batch.rows
                known = [(past.keys[prompt_rows], past.values[prompt_rows]) for past in frontier.pasts]
                known += [(past.keys[left], past.values[left]) for past in pasts]
                agreed = accepted[left]
                tails = decoder.decode(
                    known,
                    check.prompt_lengths[prompt_rows] + agreed,
                    predicted[left].gather(1, agreed[:, None])[:, 0],
                    max_new_tokens - agreed,
                    eos,
                    silence.take(left),
                )
                for line, tokens in zip(left.tolist(), tails, strict=True):
                    copy, row = divmod(line, frontier.batch.rows)
                    kept = drafts[rows[row]][: int(accepted[line])]
                    outputs[some[copy]][rows[row]] = np.concatenate([kept, np.array(tokens, np.int32)])
        for index, head in enumerate(group):
            yield (layer, head), outputs[index]


class _DraftCheck:
    """Compares one-pass predictions with drafts, G tokens at the most.

    In float32 a draft token is accepted if it is what the silenced model predicts there. In half precision
    a pass over many tokens may differ from decoding at a near-tie, so the clean model's own one-pass
    predictions are what the silenced model's are held against: a head without effect then shows none.
    """

    def __init__(self, batch: Batch, prompts: Sequence[Example], drafts: Sequence[np.ndarray]):
        device = batch.suffix.device
        self.rows = batch.rows
        self.prompt_lengths = torch.tensor([len(prompt.prompt_ids) for prompt in prompts], device=device)
        self.drafted = torch.tensor([len(draft) for draft in drafts], device=device)
        self.width = int(self.drafted.max())
        columns = torch.arange(self.width, device=device)
        # Where token g of the draft is predicted; clipped where a draft is shorter.
        last = (self.prompt_lengths - 1 - len(batch.prefix))[:, None]
        self.where = torch.minimum(last + columns, batch.lengths[:, None] - 1)  # (R, G)
        self.inside = columns < self.drafted[:, None]  # (R, G)

    def predictions(self, decoder: Decoder, suffix: torch.Tensor) -> torch.Tensor:
        """Greedy token at each place of the draft, [copies * R, G]."""
        copies = len(suffix) // self.rows
        lines = torch.arange(len(suffix), device=suffix.device)[:, None]
        places, inside = self.where.repeat(copies, 1), self.inside.repeat(copies, 1)
        hidden = suffix[lines, places]  # (copies * R, G, E)
        predicted = torch.zeros(places.shape, dtype=torch.long, device=suffix.device)
        predicted[inside] = decoder.logits(hidden[inside]).argmax(dim=-1)
        return predicted

    def expect(self, clean: torch.Tensor) -> None:
        self.clean = clean  # (R, G)

    def compare(self, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of leading draft tokens that stand in each row, [copies * R], and the rows that leave the
        draft."""
        copies = len(predicted) // self.rows
        wrong = (predicted != self.clean.repeat(copies, 1)) & self.inside.repeat(copies, 1)
        drafted = self.drafted.repeat(copies)
        accepted = torch.where(wrong.any(dim=1), wrong.int().argmax(dim=1), drafted)
        return accepted, (accepted < drafted).nonzero()[:, 0]
