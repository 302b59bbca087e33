"""The embedded data set: what the stages and the audit rely on."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import data.embedded
from data.embedded.generate import GROUPS, SPLITS, records
from data.records import SCORINGS, Record
from data.refusal_judge import keyword_refusal
from data.scoring import last_number

LEAST = (160, 120, 300, 300, 300, 300, 240, 200, 150, 120, 150, 150, 120, 120)
"""rows of each of SPLITS"""
KNOWLEDGE = ("util", "facts", "words")
HARMFUL = ("safe", "vanilla_harmful", "adversarial_harmful", "vanilla", "adversarial", "plain", "attacked")
BENIGN = ("vanilla_benign", "adversarial_benign", "benign")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Record]]:
    return {split: records(split) for split in SPLITS}


def test_every_split_has_enough_rows(rows):
    for split, least in zip(SPLITS, LEAST, strict=True):
        assert len(rows[split]) >= least
        assert {row.split for row in rows[split]} == {split}
        assert {row.scoring for row in rows[split]} <= set(SCORINGS)
    with pytest.raises(ValueError, match="split: 'nonsense' is not one of util, "):
        records("nonsense")


def test_same_seed_same_rows_other_seed_other_order_same_entries():
    for split in SPLITS:
        assert records(split, seed=3) == records(split, seed=3)
        first, second = records(split, seed=0), records(split, seed=1)
        assert [row.example_id for row in first] != [row.example_id for row in second]
        assert {row.entry for row in first} == {row.entry for row in second}


def test_rows_are_those_that_finished_runs_used(rows):
    """A change of rows changes every number of every run: make it knowingly."""
    texts = [
        f"{row.example_id}|{row.prompt}|{row.prefix}|{row.target}" for own in rows.values() for row in own
    ]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "ba3d609154a13a6f"


def test_ids_and_prompts_are_unique_across_the_project(rows):
    every = [row for split in SPLITS for row in rows[split]]
    assert len({row.example_id for row in every}) == len(every)
    assert len({(row.prompt, row.prefix) for row in every}) == len(every)
    assert all(re.fullmatch(r"embedded/[\w/-]+", row.example_id) for row in every)
    assert not [row for row in every if re.search(r"[{}]", row.prompt + row.prefix + row.target)], "a slot"


def test_no_entry_is_shared_between_groups_whatever_the_seed():
    entries = {group: set() for group in GROUPS.values()}
    for split, seed in itertools.product(SPLITS, (0, 1)):
        entries[GROUPS[split]] |= {row.entry for row in records(split, seed)}
    assert len(entries) == 3
    for one, other in itertools.combinations(entries.values(), 2):
        assert not one & other


def test_benchmark_attacks_are_held_out(rows):
    phrasing = json.loads((Path(data.embedded.__file__).parent / "phrasing.json").read_text(encoding="utf-8"))
    assert not set(phrasing["attacks"]) & set(phrasing["held_out_attacks"])
    held_out = {template.split("{act}")[0] for ts in phrasing["held_out_attacks"].values() for template in ts}
    held_out = {opening for opening in held_out if len(opening) > 12}
    assert len(held_out) >= 8
    for split in SPLITS:
        attacks = {row.source.removeprefix("embedded/") for row in rows[split]}
        if GROUPS[split] != "benchmarks":
            assert not attacks & set(phrasing["held_out_attacks"])
            assert not [row for row in rows[split] if any(row.prompt.startswith(o) for o in held_out)]
        else:
            assert not attacks & set(phrasing["attacks"])
    assert {row.source.removeprefix("embedded/") for row in rows["adversarial"]} == set(
        phrasing["held_out_attacks"]
    )


def test_knowledge_rows_are_next_token_rows(rows):
    for row in itertools.chain.from_iterable(rows[split] for split in KNOWLEDGE):
        assert row.scoring == "choice" and row.choices == () and row.answer is None
        assert row.prefix and not row.prefix.endswith(" ")
        assert re.fullmatch(r" \S.*", row.target)
    assert not {row.source for row in rows["words"]} & {row.source for row in rows["facts"]}
    assert {row.source for row in rows["util"]} == {row.source for row in rows["facts"]}


def test_problem_targets_are_numbers(rows):
    for row in rows["problems"]:
        assert row.scoring == "number" and row.prefix == ""
        assert last_number(row.target) == int(row.target) > 0


def test_targets_refuse_harmful_and_answer_benign_requests(rows):
    for row in itertools.chain.from_iterable(rows[split] for split in HARMFUL):
        assert row.scoring == "refusal"
        assert keyword_refusal(row.target), row.target
        assert 6 <= len(row.target.split()) <= 25, row.target
    for row in itertools.chain.from_iterable(rows[split] for split in BENIGN):
        assert row.scoring == "over_refusal"
        assert not keyword_refusal(row.target), row.target
        assert 4 <= len(row.target.split()) <= 25, row.target
    assert len({row.target for row in rows["vanilla_harmful"]}) >= 50


@pytest.mark.parametrize("split", SPLITS)
def test_first_rows_mix_the_families(rows, split):
    first = Counter(row.source for row in rows[split][:64])
    for family, count in Counter(row.source for row in rows[split]).items():
        assert abs(first[family] - 64 * count / len(rows[split])) <= 2
