"""Next-token choices, and the sweep that ablates one head at a time.

What makes the sweep cheap and keeps it exact: a head of layer l changes nothing below l, so a pass starts at
l from the clean residual stream, which moves up layer by layer; a beginning that prompts share is computed
once a head; nothing is padded; the last layer computes the last token only, and the output matrix the
candidates only; heads of a layer are ablated together, in copies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from backends.base import Choices, Example, Head
from backends.core import budgets, packing
from backends.core.drafts import CLEAN
from backends.core.kept import Kept
from backends.torch.adapter import adapted
from backends.torch.batch import Batch, make_batches
from backends.torch.decoder import Ablation, Decoder

TOKENS_CPU, TOKENS_CUDA = 4096, 65536
"""tokens that go through a layer at once: enough to fill the cores, few enough for their caches"""
COPIES = 16
"""of a line in half precision, one of them its clean twin, that should go through a layer at once"""


def token_limit(decoder: Decoder) -> int:
    return TOKENS_CUDA if decoder.device.type == "cuda" else TOKENS_CPU


def line_batches(decoder: Decoder, sequences: Sequence[np.ndarray]) -> list[Batch]:
    """Lines of which a sweep takes copies."""
    tokens = token_limit(decoder) // (COPIES if decoder.itemsize < 4 else 1)
    return make_batches(sequences, decoder.device, tokens, min(map(len, sequences), default=0))


def prompt_batches(decoder: Decoder, prompts: Sequence[Example]) -> list[Batch]:
    return line_batches(decoder, [prompt.prompt_ids for prompt in prompts])


class Frontier:
    """The clean residual stream of a batch before layer `layer`, [1, T, E], moved up as a sweep goes.

    Args:
        key_values: also keep the keys and values of the layers below, [T, K, D] each.
    """

    def __init__(self, decoder: Decoder, batch: Batch, key_values: bool = False):
        self.decoder, self.batch, self.key_values = decoder, batch, key_values
        self.release()

    def release(self) -> None:
        """Frees the stream; the next move computes it again."""
        self.layer, self.hidden = 0, None
        self.below: list[tuple[torch.Tensor, torch.Tensor]] = []

    def move(self, layer: int) -> None:
        if layer == self.layer and self.hidden is not None:
            return
        if layer < self.layer:
            self.release()
        if self.hidden is None:
            self.hidden = self.decoder.embed(self.batch.ids)[None]
        self.hidden = self.decoder.run(
            self.batch, self.hidden, self.layer, layer, keep=self._keep if self.key_values else None
        )
        self.layer = layer

    def _keep(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.below.append((keys[0], values[0]))


@dataclass(frozen=True)
class Candidates:
    """Tokens that compete in each of R rows of logits, as columns of them."""

    columns: torch.Tensor
    """[R, m], filled up with 0"""
    filled: torch.Tensor
    """bool [R, m]"""
    free: torch.Tensor
    """bool [R]: the whole vocabulary competes"""

    def of(self, logits: torch.Tensor, fill: float = -torch.inf) -> torch.Tensor:
        """The candidates' logits [..., R, m] of all [..., R, V]."""
        return logits.gather(-1, self.columns.expand(*logits.shape[:-1], -1)).masked_fill(self.filled, fill)

    def log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """That the next token is one of them and no other one, [..., R] of [..., R, V]."""
        columns = torch.where(self.filled, self.columns[:, :1], self.columns)
        others = logits.scatter(-1, columns.expand(*logits.shape[:-1], -1), -torch.inf)
        return self.of(logits).logsumexp(dim=-1) - others.logsumexp(dim=-1)

    def take(self, rows: torch.Tensor) -> "Candidates":
        return Candidates(self.columns[rows], self.filled[rows], self.free[rows])

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Predictions in the sense of Example.answer, [..., R] of [..., R, V]."""
        return torch.where(self.free, logits.argmax(dim=-1), self.of(logits).argmax(dim=-1))


def find_candidates(
    choice_ids: Sequence[np.ndarray], vocabulary: np.ndarray | None, device: torch.device
) -> Candidates:
    """The candidates of R rows of logits.

    Args:
        choice_ids: token ids of each row, [n]; none: the whole vocabulary competes.
        vocabulary: the tokens that columns of logits stand for, sorted; None: all.
    """
    width = max(1, *map(len, choice_ids)) if len(choice_ids) else 1
    columns = np.zeros((len(choice_ids), width), np.int64)
    filled = np.ones(columns.shape, bool)
    for row, ids in enumerate(choice_ids):
        columns[row, : len(ids)] = ids if vocabulary is None else np.searchsorted(vocabulary, ids)
        filled[row, : len(ids)] = False
    return Candidates(*(torch.from_numpy(part).to(device) for part in (columns, filled, filled.all(axis=1))))


def _clean(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """Logits after each prompt, [R, V]."""
    hidden = decoder.embed(batch.ids)[None]
    return decoder.logits(decoder.run(batch, hidden, 0, decoder.layers)[0])


def choose(logits: torch.Tensor, examples: Sequence[Example]) -> Choices:
    """From the logits after each prompt, [N, V]."""
    candidates = find_candidates([example.choice_ids for example in examples], None, logits.device)
    chosen, likely = candidates.choose(logits), logits.softmax(dim=-1)
    alone = likely.gather(-1, chosen[:, None])[:, 0]
    total = torch.where(candidates.free, alone, candidates.of(likely, 0.0).sum(dim=-1))
    return Choices(chosen.cpu().numpy().astype(np.int32), total.cpu().numpy())


@torch.no_grad()
def choices(decoder: Decoder, examples: Sequence[Example], adapter: Path | None) -> Choices:
    """See Backend.choices."""
    found = Choices(np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32))
    with adapted(decoder.model, adapter):
        for batch in prompt_batches(decoder, examples):
            own = choose(_clean(decoder, batch), [examples[row] for row in batch.rows])
            found.prediction[batch.rows], found.probability[batch.rows] = own
    return found


@torch.no_grad()
def logits(
    decoder: Decoder, examples: Sequence[Example], adapter: Path | None, ablated: Head | None, mask: str
) -> np.ndarray:
    """See Backend.logits."""
    found = np.zeros((len(examples), decoder.shape.vocab), np.float32)
    ablation = None
    if ablated is not None:
        ablation = Ablation(ablated[0], torch.tensor([ablated[1]], device=decoder.device), mask)
    with adapted(decoder.model, adapter):
        for batch in prompt_batches(decoder, examples):
            hidden = decoder.run(batch, decoder.embed(batch.ids)[None], 0, decoder.layers, ablation)
            found[batch.rows] = decoder.logits(hidden[0]).cpu().numpy()
    return found


def copies(decoder: Decoder, heads: Sequence[int], tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Groups of a layer's heads that go through it together, in copies of a line of `tokens` tokens: their
    places, and the head that each copy ablates, [n].

    In half precision the last copy ablates none. Rounding differs with the shape of a product, so that near a
    tie a head without effect would show one; beside its clean twin it does not.
    """
    half = decoder.itemsize < 4
    for some in packing.even_slices(len(heads), max(1, token_limit(decoder) // tokens - half))[1]:
        yield some, torch.tensor([*heads[some], *[CLEAN] * half], device=decoder.device)


@torch.no_grad()
def sweep_choices(
    decoder: Decoder, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    ids = packing.candidates(examples)
    vocabulary = None if ids is None else torch.from_numpy(ids).to(decoder.device)

    half = decoder.itemsize < 4

    def make() -> tuple[np.ndarray | None, list[tuple[Frontier, Candidates]]]:
        made = []
        for batch in prompt_batches(decoder, examples):
            own = [examples[row].choice_ids for row in batch.rows]
            made.append((Frontier(decoder, batch), find_candidates(own, ids, decoder.device)))
        return choices(decoder, examples, None)[0] if half else None, made

    among = tuple(example.choice_ids.tobytes() for example in examples)
    clean, every = kept.of(examples, ("choices", among), make)
    tokens = sum(len(frontier.batch.ids) for frontier, _ in every)
    keep = budgets.keeps_choices(decoder.shape, decoder.itemsize, decoder.room, tokens)
    for layer, group in packing.by_layer(heads):
        prediction = np.zeros((len(group), len(examples)), np.int32)
        for frontier, candidates in every:
            batch = frontier.batch
            frontier.move(layer)
            for some, ablated in copies(decoder, group, len(batch.ids)):
                hidden = frontier.hidden.expand(len(ablated), -1, -1)
                hidden = decoder.run(batch, hidden, layer, decoder.layers, Ablation(layer, ablated, mask))
                found = candidates.choose(decoder.logits(hidden, vocabulary)).cpu().numpy()  # (n, R)
                if half:
                    found = np.where(found == found[-1], clean[batch.rows], found)[:-1]
                prediction[some, batch.rows] = found
            if not keep:
                frontier.release()
        for index, head in enumerate(group):
            yield (layer, head), prediction[index]
