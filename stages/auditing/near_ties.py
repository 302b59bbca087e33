"""Why two runs generated or chose otherwise: how near the two tokens' logits were where they part.

Greedy decoding turns a difference in the last digit into another token where two logits are nearly equal; any
other difference is a fault of one of the programs. Each first difference is asked again, with the same head
silenced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from backends.base import Backend, Mask
from backends.progress import progress
from data.examples import Example
from data.rendering import example
from stages.auditing.audit_run import SWEPT, Run
from stages.auditing.comparison import same_rows, same_swept

AT_ONCE = 128
"""prompts whose logits over the whole vocabulary are held together"""


class Difference(NamedTuple):
    """A greedy choice that two runs made otherwise."""

    head: tuple[int, int] | None
    """silenced; None: the clean model"""
    row: dict
    """of calibration.parquet or benchmarks.parquet"""
    before: list[int]
    """tokens that both runs had generated"""
    tokens: tuple[int, int]
    """what each run says next"""


def differences(one: Run, other: Run) -> list[Difference]:
    """First difference of every unequal prediction and generation of the sweeps and of the base model."""
    return [*_choice_differences(one, other), *_text_differences(one, other), *_base_differences(one, other)]


def _silenced(row: dict) -> tuple[int, int] | None:
    return None if row["layer"] < 0 else (row["layer"], row["head"])


def _token(row: dict, prediction: int) -> int:
    """The token id that a prediction stands for."""
    return int(row["choice_ids"][prediction]) if len(row["choice_ids"]) else prediction


def _choice_differences(one: Run, other: Run) -> list[Difference]:
    relative = next(iter(SWEPT))
    if not same_swept(one, other, relative):
        return []
    by_id = {row["example_id"]: row for row in one.swept[relative]}
    tables = [run.table(relative).to_pylist() for run in (one, other)]
    return [
        Difference(_silenced(left), row, [], tuple(_token(row, side["prediction"]) for side in (left, right)))
        for left, right in zip(*tables, strict=True)
        if left["prediction"] != right["prediction"]
        for row in [by_id[left["example_id"]]]
    ]


def _first(head, row: dict, left: list[int], right: list[int]) -> Difference:
    at = next(at for at in range(max(len(left), len(right))) if left[at : at + 1] != right[at : at + 1])
    # One that stops where the other goes on had fewer tokens to spend: there is no choice to compare.
    tokens = (left[at], right[at]) if at < min(len(left), len(right)) else (-1, -1)
    return Difference(head, row, left[:at], tokens)


def _text_differences(one: Run, other: Run) -> list[Difference]:
    if not same_rows(one, other, "safe"):
        return []
    by_id = {row["example_id"]: row for row in one.calibration["safe"]}
    tables = [run.table("03_sensitivity/sweep_generations.parquet").to_pylist() for run in (one, other)]
    return [
        _first(_silenced(left), by_id[left["example_id"]], left["token_ids"], right["token_ids"])
        for left, right in zip(*tables, strict=True)
        if left["token_ids"] != right["token_ids"]
    ]


def _base_differences(one: Run, other: Run) -> list[Difference]:
    rows = {row["example_id"]: row for name in one.benchmarks for row in one.benchmarks[name]}
    answers = [
        {
            row["example_id"]: row
            for row in run.table("05_evaluate/responses.parquet").to_pylist()
            if row["arm"] == "base"
        }
        for run in (one, other)
    ]
    found = []
    for key in rows.keys() & answers[0].keys() & answers[1].keys():
        left, right, row = answers[0][key], answers[1][key], rows[key]
        if left["prediction"] != right["prediction"]:
            tokens = tuple(_token(row, side["prediction"]) for side in (left, right))
            found.append(Difference(None, row, [], tokens))
        elif left["token_ids"] != right["token_ids"]:
            found.append(_first(None, row, left["token_ids"], right["token_ids"]))
    return found


def gaps(backend: Backend, found: Sequence[Difference], mask: Mask) -> list[float]:
    """For each difference how far the lower of the two tokens' logits lies below the highest that could have
    been said, in the model as loaded; infinite where there was no choice between two tokens."""
    by_head: dict[tuple[int, int] | None, list[int]] = {}
    for index, one in enumerate(found):
        if min(one.tokens) >= 0:
            by_head.setdefault(one.head, []).append(index)
    below = [float("inf")] * len(found)
    with progress(total=sum(map(len, by_head.values())), desc="near-ties", unit="row") as bar:
        for head, indices in by_head.items():
            for start in range(0, len(indices), AT_ONCE):
                some = indices[start : start + AT_ONCE]
                asked = [_prompt(found[index]) for index in some]
                for index, prompt, logits in zip(
                    some, asked, backend.logits(asked, silenced=head, mask=mask), strict=True
                ):
                    competing = logits[prompt.choice_ids] if len(prompt.choice_ids) else logits
                    below[index] = float(competing.max() - logits[list(found[index].tokens)].min())
                bar.update(len(some))
    return below


def _prompt(difference: Difference) -> Example:
    """The prompt at whose end the two runs part, with all that both had generated."""
    one = example(difference.row)
    ids = np.concatenate([one.prompt_ids, np.array(difference.before, np.int32)])
    return Example(one.example_id, ids, one.target_ids, one.choice_ids, one.answer)
