"""Next-token choices, and the sweep that ablates one head at a time.

What makes the sweep cheap and keeps it exact: a head of layer l changes nothing below l, so a pass starts at
l from the clean residual stream, which moves up layer by layer; a beginning that prompts share is computed
once a head; nothing is padded; the last layer computes the last token only, and the output matrix the
candidates only; heads of a layer are ablated together, in copies.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from backends.base import Example, Head
from backends.core import budgets, packing
from backends.core.kept import Kept
from backends.torch.adapter import adapted
from backends.torch.decoder import Ablation, Batch, Decoder, make_batches

TOKENS_CPU, TOKENS_CUDA = 4096, 32768
"""tokens that go through a layer at once: enough to fill the cores, few enough for their caches"""


def token_limit(decoder: Decoder) -> int:
    return TOKENS_CUDA if decoder.device.type == "cuda" else TOKENS_CPU


def prompt_batches(decoder: Decoder, prompts: Sequence[Example]) -> list[Batch]:
    sequences = [prompt.prompt_ids for prompt in prompts]
    shared = min(map(len, sequences), default=0)
    return make_batches(sequences, decoder.device, token_limit(decoder), shared)


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


def _choose(logits: torch.Tensor, example: Example, vocabulary: torch.Tensor | None) -> int:
    """Prediction in the sense of Example.answer from one row of logits."""
    if len(example.choice_ids) == 0:
        return int(logits.argmax())
    ids = torch.from_numpy(example.choice_ids.astype(np.int64)).to(logits.device)
    return int(logits[ids if vocabulary is None else torch.searchsorted(vocabulary, ids)].argmax())


def _clean(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """Logits after each prompt, [R, V]."""
    hidden = decoder.embed(batch.ids)[None]
    return decoder.logits(decoder.run(batch, hidden, 0, decoder.layers)[0])


@torch.no_grad()
def choices(
    decoder: Decoder, examples: Sequence[Example], adapter: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """See Backend.choices."""
    prediction, probability = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32)
    with adapted(decoder.model, adapter):
        for batch in prompt_batches(decoder, examples):
            for row, line in zip(batch.rows, _clean(decoder, batch), strict=True):
                example = examples[row]
                prediction[row] = _choose(line, example, None)
                candidates = example.choice_ids if len(example.choice_ids) else prediction[row : row + 1]
                ids = torch.from_numpy(candidates.astype(np.int64)).to(line.device)
                probability[row] = float(line.softmax(dim=-1)[ids].sum())
    return prediction, probability


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


@torch.no_grad()
def sweep_choices(
    decoder: Decoder, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_choices."""
    ids = packing.candidates(examples)
    vocabulary = None if ids is None else torch.from_numpy(ids).to(decoder.device)

    def make() -> list[Frontier]:
        return [Frontier(decoder, batch) for batch in prompt_batches(decoder, examples)]

    frontiers = kept.of(examples, ("choices",), make)
    tokens = sum(len(frontier.batch.ids) for frontier in frontiers)
    keep = budgets.keeps_choices(decoder.shape, decoder.itemsize, decoder.room, tokens)
    for layer, group in packing.by_layer(heads):
        prediction = np.zeros((len(group), len(examples)), np.int32)
        every = torch.tensor(group, device=decoder.device)
        for frontier in frontiers:
            batch = frontier.batch
            frontier.move(layer)
            for some in packing.even_slices(len(group), token_limit(decoder) // len(batch.ids))[1]:
                ablation = Ablation(layer, every[some], mask)
                hidden = frontier.hidden.expand(len(ablation.heads), -1, -1)
                hidden = decoder.run(batch, hidden, layer, decoder.layers, ablation)  # (n, R, E)
                logits = decoder.logits(hidden, vocabulary)
                for index, lines in enumerate(logits, some.start):
                    for row, line in zip(batch.rows, lines, strict=True):
                        prediction[index, row] = _choose(line, examples[row], vocabulary)
            if not keep:
                frontier.release()
        for index, head in enumerate(group):
            yield (layer, head), prediction[index]
