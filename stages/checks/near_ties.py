"""Why two runs generated or chose otherwise: how near the two tokens' logits were where they part.

Greedy decoding turns a difference in the last digit into another token where two logits are nearly equal; any
other difference is a fault of one of the programs.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

import backends
from backends import models
from backends.base import Backend, Example, Head, Mask
from backends.core.progress import progress
from data.rendering import example
from stages.checks.comparison import BASE, NEAR_TIES, QUANTITIES, Comparison, Row
from stages.checks.finished import NO_FOLDER, differs
from stages.run.schemas import BENCHMARKS, CALIBRATION
from stages.run.sweep import TABLES


class Difference(NamedTuple):
    """A greedy choice that two runs made otherwise."""

    head: Head | None
    """ablated; None: the clean model"""
    prompt: Example
    """at whose end the runs part, with the `generated` tokens that both had"""
    generated: int
    tokens: tuple[int, int] | None
    """what each run says next; None: one stopped, as it had fewer tokens to spend"""

    def __str__(self) -> str:
        """Where it is, without its text."""
        head = "no head ablated" if self.head is None else "layer {} head {} ablated".format(*self.head)
        return f"{self.prompt.example_id}, {head}, after {self.generated} tokens"


def differences(pair: Comparison) -> list[Difference]:
    """First difference of every unequal prediction and generation of the sweeps and of the base model."""
    tables = (pair.first.read(CALIBRATION), pair.first.read(BENCHMARKS))
    rows = {row["example_id"]: example(row) for table in tables for row in table.to_dict("records")}
    greedy = [quantity for quantity in QUANTITIES if quantity is BASE or quantity.table in TABLES.values()]
    found = []
    for answers in (pair.paired(quantity) for quantity in greedy if not pair.obstacle(quantity.table)):
        for column in {"prediction", "token_ids"} & set(answers):
            unequal = answers[
                differs(answers[f"{column}_other"], answers[column]) & (answers["side"] == "both")
            ]
            for answer in unequal.to_dict("records"):
                head = None if pd.isna(answer.get("layer")) else (answer["layer"], answer["head"])
                found.append(
                    difference(head, rows[answer["example_id"]], answer[column], answer[f"{column}_other"])
                )
    return found


def difference(head: Head | None, row: Example, left, right) -> Difference:
    """Where two predictions, or two sequences of tokens, part."""
    if np.ndim(left) == 0:
        left, right = ([row.choice_ids[each] if len(row.choice_ids) else each] for each in (left, right))
    both = min(len(left), len(right))
    at = next((at for at in range(both) if left[at] != right[at]), both)
    prompt = replace(row, prompt_ids=np.concatenate([row.prompt_ids, left[:at]]).astype(np.int32))
    return Difference(head, prompt, at, (int(left[at]), int(right[at])) if at < both else None)


def gap(backend: Backend, found: Difference, mask: Mask) -> float:
    """How far the lower of the two tokens' logits lies below the highest that could have been said, in the
    model as loaded; infinite where there was no choice between two tokens."""
    if found.tokens is None:
        return float("inf")
    (logits,) = backend.logits([found.prompt], ablated=found.head, mask=mask)
    competing = logits[found.prompt.choice_ids] if len(found.prompt.choice_ids) else logits
    return float(competing.max() - logits[list(found.tokens)].min())


def near_ties(pair: Comparison) -> Row:
    """Whether every unequal prediction, generation and base response parts at a near-tie."""
    found, run = differences(pair), pair.first
    row, model = Row(NEAR_TIES.name, f"{len(found)}"), run.manifest("02_conflict")["model"]
    if not found:
        return pair.held(NEAR_TIES, row._replace(largest=0.0))
    if pair.half:
        return row._replace(note="not traced in half precision")
    if run.model_folder is None or not models.model_hashes(run.model_folder).items() <= model.items():
        return row._replace(note=NO_FOLDER)
    backend = backends.load(model["backend"], run.model_folder, dtype=model["dtype"])
    below = [gap(backend, each, run.settings.map.mask) for each in progress(found, desc="near-ties")]
    far = sum(each > NEAR_TIES.full for each in below)
    note = f"{far} are none, the first: {found[int(np.argmax(below))]}" if far else "all of them are"
    return pair.held(NEAR_TIES, row._replace(largest=max(below), mean=float(np.mean(below)), note=note))
