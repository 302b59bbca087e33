"""How likely targets are: of the model, and with one head at a time ablated. Nothing is decoded.

As in `torch.sweep` a pass starts at the ablated layer from the clean residual stream; a prompt and its target
are read at once, and the output matrix sees only the places that predict a target.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from backends.base import Example, Head
from backends.core import budgets, packing
from backends.core.kept import Kept
from backends.torch.adapter import adapted
from backends.torch.decoder import Ablation, Batch, Decoder, make_batches
from backends.torch.sweep import Frontier, token_limit

LOGITS = 256
"""places whose logits over the vocabulary are held together"""


@dataclass(frozen=True)
class Places:
    """Where a batch predicts targets; M of them, a row's in a run."""

    at: torch.Tensor
    """columns of the line, [M]"""
    tokens: torch.Tensor
    """predicted, [M]"""
    counts: list[int]
    """places of each row, [R]"""
    choices: dict[int, torch.Tensor]
    """place -> token ids that compete there, the answer among them"""


def predicted(example: Example) -> np.ndarray:
    """The tokens whose likelihood is a row's graded outcome: its target's, or the chosen answer's only."""
    if len(example.choice_ids):
        return example.choice_ids[[example.answer]]
    return example.target_ids


def read_sequences(examples: Sequence[Example]) -> list[np.ndarray]:
    """What the model reads of each row: the prompt, and all but the last token of what it is to predict."""
    return [np.concatenate([row.prompt_ids, predicted(row)[:-1]]) for row in examples]


def find_places(batch: Batch, examples: Sequence[Example]) -> Places:
    device = batch.ids.device
    at, tokens, counts, choices = [], [], [], {}
    for row, columns in zip(batch.rows, batch.columns.cpu(), strict=True):
        example, wanted = examples[row], predicted(examples[row])
        if len(example.choice_ids):
            choices[len(tokens)] = torch.from_numpy(example.choice_ids.astype(np.int64)).to(device)
        start = len(example.prompt_ids) - 1
        at.append(columns[start : start + len(wanted)])
        tokens += wanted.tolist()
        counts.append(len(wanted))
    return Places(
        torch.cat(at).to(batch.ids.device), torch.tensor(tokens).to(batch.ids.device), counts, choices
    )


def log_likelihood(decoder: Decoder, hidden: torch.Tensor, places: Places) -> np.ndarray:
    """float64 [n, R] from the last layer's residual stream of copies of a line, [n, T, E]."""
    found = torch.empty(len(hidden), len(places.at))
    for copy, stream in enumerate(hidden):
        for start in range(0, len(places.at), LOGITS):
            some = slice(start, start + LOGITS)
            logits = decoder.logits(stream[places.at[some]])  # (m, V)
            found[copy, some] = -torch.nn.functional.cross_entropy(
                logits, places.tokens[some], reduction="none"
            )
            for place, ids in places.choices.items():
                if start <= place < start + LOGITS:
                    line = logits[place - start]
                    found[copy, place] = line[places.tokens[place]] - line[ids].logsumexp(dim=0)
    parts = found.double().split(places.counts, dim=1)
    return torch.stack([part.mean(dim=1) for part in parts], dim=1).numpy()


class _Line:
    """A batch with its places, and its clean residual stream."""

    def __init__(self, decoder: Decoder, batch: Batch, examples: Sequence[Example]):
        self.frontier = Frontier(decoder, replace(batch, whole=True))
        self.places = find_places(batch, examples)


def lines(decoder: Decoder, examples: Sequence[Example]) -> list[_Line]:
    sequences = read_sequences(examples)
    shared = min(map(len, sequences), default=0)
    batches = make_batches(sequences, decoder.device, token_limit(decoder), shared)
    return [_Line(decoder, batch, examples) for batch in batches]


@torch.no_grad()
def loglikelihoods(decoder: Decoder, examples: Sequence[Example], adapter: Path | None) -> np.ndarray:
    """See Backend.loglikelihoods."""
    found = np.zeros(len(examples))
    with adapted(decoder.model, adapter):
        for line in lines(decoder, examples):
            line.frontier.move(decoder.layers)
            found[line.frontier.batch.rows] = log_likelihood(decoder, line.frontier.hidden, line.places)[0]
    return found


@torch.no_grad()
def sweep_loglikelihoods(
    decoder: Decoder, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_loglikelihoods."""
    targets = tuple(example.target_ids.tobytes() for example in examples)
    every = kept.of(examples, ("loglikelihoods", targets), lambda: lines(decoder, examples))
    tokens = sum(len(line.frontier.batch.ids) for line in every)
    keep = budgets.keeps_choices(decoder.shape, decoder.itemsize, decoder.room, tokens)
    for layer, group in packing.by_layer(heads):
        found = np.zeros((len(group), len(examples)))
        ablated = torch.tensor(group, device=decoder.device)
        for line in every:
            frontier, batch = line.frontier, line.frontier.batch
            frontier.move(layer)
            for some in packing.even_slices(len(group), token_limit(decoder) // len(batch.ids))[1]:
                ablation = Ablation(layer, ablated[some], mask)
                hidden = frontier.hidden.expand(len(ablation.heads), -1, -1)
                hidden = decoder.run(batch, hidden, layer, decoder.layers, ablation)  # (n, T, E)
                found[some, batch.rows] = log_likelihood(decoder, hidden, line.places)
            if not keep:
                frontier.release()
        for index, head in enumerate(group):
            yield (layer, head), found[index]
