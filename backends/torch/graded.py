"""Graded outcomes of rows: of the model, and with one head at a time ablated. Nothing is decoded.

As in `torch.sweep` a pass starts at the ablated layer from the clean residual stream; a prompt and its target
are read at once, and the output matrix sees only the places whose next tokens count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from backends.base import Choices, Example, Grades, Head
from backends.core import budgets, packing
from backends.core.kept import Kept
from backends.torch.adapter import adapted
from backends.torch.batch import Batch
from backends.torch.decoder import Ablation, Decoder
from backends.torch.sweep import Candidates, Frontier, choose, copies, find_candidates, line_batches

LOGITS_CPU, LOGITS_CUDA = 256, 2048
"""places whose logits over the vocabulary are held together"""


@dataclass(frozen=True)
class Places:
    """Where a batch predicts what counts; M of them, a row's in a run."""

    at: torch.Tensor
    """columns of the line, [M]"""
    tokens: torch.Tensor
    """predicted, [M]"""
    counts: list[int]
    """places of each row, [R]"""
    candidates: Candidates
    """what competes at each place, the answer among them; or what refusals begin with"""
    refusals: torch.Tensor | None
    """bool [M]: the candidates are what refusals begin with; None: nowhere"""


def predicted(example: Example) -> np.ndarray:
    """The tokens whose likelihood is a row's graded outcome: its target's, or the chosen answer's only; of a
    request one of those that refusals begin with."""
    if len(example.refusal_ids):
        return example.refusal_ids[:1]
    if len(example.choice_ids):
        return example.choice_ids[[example.answer]]
    return example.target_ids


def competing(example: Example) -> np.ndarray:
    """What refusals begin with, or choices: where there are any, the outcome is no likelihood of a target."""
    return example.refusal_ids if len(example.refusal_ids) else example.choice_ids


def read_sequences(examples: Sequence[Example]) -> list[np.ndarray]:
    """What the model reads of each row: the prompt, and all but the last token of what it is to predict."""
    return [np.concatenate([row.prompt_ids, predicted(row)[:-1]]) for row in examples]


def find_places(batch: Batch, examples: Sequence[Example]) -> Places:
    at, tokens, counts, candidates, refusals = [], [], [], [], []
    for row, columns in zip(batch.rows, batch.columns.cpu(), strict=True):
        example, wanted = examples[row], predicted(examples[row])
        candidates += [competing(example)] * len(wanted)
        refusals += [len(example.refusal_ids) > 0] * len(wanted)
        start = len(example.prompt_ids) - 1
        at.append(columns[start : start + len(wanted)])
        tokens += wanted.tolist()
        counts.append(len(wanted))
    device = batch.ids.device
    return Places(
        torch.cat(at).to(device),
        torch.tensor(tokens, device=device),
        counts,
        find_candidates(candidates, None, device),
        torch.tensor(refusals, device=device) if any(refusals) else None,
    )


def outcome_at(
    logits: torch.Tensor, tokens: torch.Tensor, candidates: Candidates, refusals: torch.Tensor | None
) -> torch.Tensor:
    """The outcome at each place, [m], from its logits [m, V]: see `Places`."""
    whole = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    among = logits.gather(-1, tokens[:, None])[:, 0] - candidates.of(logits).logsumexp(dim=-1)
    outcome = torch.where(candidates.free, whole, among)
    return outcome if refusals is None else torch.where(refusals, candidates.log_odds(logits), outcome)


def grades(decoder: Decoder, hidden: torch.Tensor, places: Places) -> np.ndarray:
    """float64 [n, R] from the last layer's residual stream of copies of a line, [n, T, E]."""
    size = LOGITS_CUDA if decoder.device.type == "cuda" else LOGITS_CPU
    found = torch.empty(len(hidden), len(places.at), device=decoder.device)
    for copy, stream in enumerate(hidden):
        for some in torch.arange(len(places.at), device=decoder.device).split(size):
            logits, own = decoder.logits(stream[places.at[some]]), places.candidates.take(some)  # (m, V)
            refusals = None if places.refusals is None else places.refusals[some]
            found[copy, some] = outcome_at(logits, places.tokens[some], own, refusals)
    parts = found.double().cpu().split(places.counts, dim=1)
    return torch.stack([part.mean(dim=1) for part in parts], dim=1).numpy()


class _Line:
    """A batch with its places, and its clean residual stream."""

    def __init__(self, decoder: Decoder, batch: Batch, examples: Sequence[Example]):
        self.frontier = Frontier(decoder, replace(batch, whole=True))
        self.places = find_places(batch, examples)
        self.clean = np.zeros(0)

    def read(self, decoder: Decoder) -> torch.Tensor:
        """Sets `clean`, the clean model's outcomes [R]. Returns the last layer's residual stream after each
        prompt, [R, E]."""
        self.frontier.move(decoder.layers)
        hidden = self.frontier.hidden
        self.clean = grades(decoder, hidden, self.places)[0]
        self.frontier.release()
        first = np.cumsum([0, *self.places.counts[:-1]])
        return hidden[0, self.places.at[torch.from_numpy(first).to(hidden.device)]]


def lines(decoder: Decoder, examples: Sequence[Example]) -> list[_Line]:
    batches = line_batches(decoder, read_sequences(examples))
    return [_Line(decoder, batch, examples) for batch in batches]


@torch.no_grad()
def grade(decoder: Decoder, examples: Sequence[Example], adapter: Path | None) -> Grades:
    """See Backend.grade."""
    found = Choices(np.zeros(len(examples), np.int32), np.zeros(len(examples), np.float32))
    outcome = np.zeros(len(examples))
    with adapted(decoder.model, adapter):
        for line in lines(decoder, examples):
            rows, hidden = line.frontier.batch.rows, line.read(decoder)
            outcome[rows] = line.clean
            own = choose(decoder.logits(hidden), [examples[row] for row in rows])
            found.prediction[rows], found.probability[rows] = own
    return Grades(outcome, found)


@torch.no_grad()
def sweep_grades(
    decoder: Decoder, examples: Sequence[Example], heads: Sequence[Head], mask: str, kept: Kept
) -> Iterator[tuple[Head, np.ndarray]]:
    """See Backend.sweep_grades."""
    half = decoder.itemsize < 4

    def make() -> list[_Line]:
        made = lines(decoder, examples)
        for line in made if half else []:
            line.read(decoder)
        return made

    wanted = tuple(
        (row.target_ids.tobytes(), row.choice_ids.tobytes(), row.refusal_ids.tobytes(), row.answer)
        for row in examples
    )
    every = kept.of(examples, ("grade", wanted), make)
    tokens = sum(len(line.frontier.batch.ids) for line in every)
    keep = budgets.keeps_choices(decoder.shape, decoder.itemsize, decoder.room, tokens)
    for layer, group in packing.by_layer(heads):
        found = np.zeros((len(group), len(examples)))
        for line in every:
            frontier, batch = line.frontier, line.frontier.batch
            frontier.move(layer)
            for some, ablated in copies(decoder, group, len(batch.ids)):
                hidden = frontier.hidden.expand(len(ablated), -1, -1)
                hidden = decoder.run(batch, hidden, layer, decoder.layers, Ablation(layer, ablated, mask))
                own = grades(decoder, hidden, line.places)  # (n, R)
                found[some, batch.rows] = line.clean + (own - own[-1])[:-1] if half else own
            if not keep:
                frontier.release()
        for index, head in enumerate(group):
            yield (layer, head), found[index]
