"""The embedded data set: what the stages and the audit rely on."""

import itertools
import json
import re
from pathlib import Path

import pytest

import data.embedded
from data.embedded.generate import GROUPS, ROLES, records
from data.examples import SCORINGS, Record
from data.judges import keyword_refusal, last_number

SIZES = {
    "util": 160,
    "safe": 120,
    "vanilla_harmful": 300,
    "adversarial_harmful": 300,
    "vanilla_benign": 300,
    "adversarial_benign": 300,
    "facts": 240,
    "words": 200,
    "problems": 150,
    "vanilla": 120,
    "adversarial": 150,
    "benign": 150,
    "plain": 120,
    "attacked": 120,
}
KNOWLEDGE = ("util", "facts", "words")
HARMFUL = (
    "safe",
    "vanilla_harmful",
    "adversarial_harmful",
    "vanilla",
    "adversarial",
    "plain",
    "attacked",
)
BENIGN = ("vanilla_benign", "adversarial_benign", "benign")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Record]]:
    return {role: records(role) for role in ROLES}


def test_every_role_has_enough_rows_and_says_its_role(rows):
    assert set(SIZES) == set(ROLES) == set(GROUPS)
    for role, least in SIZES.items():
        assert len(rows[role]) >= least
        assert {row.role for row in rows[role]} == {role}
        assert {row.scoring for row in rows[role]} <= set(SCORINGS)


def test_same_seed_same_rows_other_seed_other_order_same_entries():
    for role in ROLES:
        assert records(role, seed=3) == records(role, seed=3)
        first, second = records(role, seed=0), records(role, seed=1)
        assert [row.example_id for row in first] != [row.example_id for row in second]
        assert {row.entry for row in first} == {row.entry for row in second}


def test_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role"):
        records("nonsense")


def test_ids_and_prompts_are_unique_across_the_project(rows):
    every = [row for role in ROLES for row in rows[role]]
    assert len({row.example_id for row in every}) == len(every)
    assert len({(row.prompt, row.prefix) for row in every}) == len(every)
    assert all(re.fullmatch(r"embedded/[\w/-]+", row.example_id) for row in every)


def test_no_entry_is_shared_between_groups_whatever_the_seed():
    entries = {group: set() for group in GROUPS.values()}
    for role, seed in itertools.product(ROLES, (0, 1)):
        entries[GROUPS[role]] |= {row.entry for row in records(role, seed)}
    assert len(entries) == 3
    for one, other in itertools.combinations(entries.values(), 2):
        assert not one & other


def test_benchmark_attacks_are_held_out(rows):
    phrasing = json.loads((Path(data.embedded.__file__).parent / "phrasing.json").read_text(encoding="utf-8"))
    assert not set(phrasing["attacks"]) & set(phrasing["held_out_attacks"])
    held_out = {template.split("{act}")[0] for ts in phrasing["held_out_attacks"].values() for template in ts}
    held_out = {opening for opening in held_out if len(opening) > 12}
    assert len(held_out) >= 8
    for role in ROLES:
        attacks = {row.source.removeprefix("embedded/") for row in rows[role]}
        if GROUPS[role] != "benchmarks":
            assert not attacks & set(phrasing["held_out_attacks"])
            assert not [row for row in rows[role] if any(row.prompt.startswith(o) for o in held_out)]
        else:
            assert not attacks & set(phrasing["attacks"])
    assert {row.source.removeprefix("embedded/") for row in rows["adversarial"]} == set(
        phrasing["held_out_attacks"]
    )


def test_knowledge_rows_are_next_token_rows(rows):
    for row in itertools.chain.from_iterable(rows[role] for role in KNOWLEDGE):
        assert row.scoring == "choice" and row.choices == () and row.answer == -1
        assert row.prefix and not row.prefix.endswith(" ")
        assert re.fullmatch(r" \S.*", row.target)
    assert not {row.source for row in rows["words"]} & {row.source for row in rows["facts"]}
    assert {row.source for row in rows["util"]} == {row.source for row in rows["facts"]}


def test_problem_targets_are_numbers(rows):
    for row in rows["problems"]:
        assert row.scoring == "number" and row.prefix == ""
        assert last_number(row.target) == int(row.target) > 0


def test_targets_refuse_harmful_and_answer_benign_requests(rows):
    for row in itertools.chain.from_iterable(rows[role] for role in HARMFUL):
        assert row.scoring == "refusal"
        assert keyword_refusal(row.target), row.target
        assert 6 <= len(row.target.split()) <= 25, row.target
    for row in itertools.chain.from_iterable(rows[role] for role in BENIGN):
        assert row.scoring == "over_refusal"
        assert not keyword_refusal(row.target), row.target
        assert 4 <= len(row.target.split()) <= 25, row.target
    assert len({row.target for row in rows["vanilla_harmful"]}) >= 50


def test_no_slot_is_left_unfilled(rows):
    for row in itertools.chain.from_iterable(rows.values()):
        assert not re.search(r"[{}]", row.prompt + row.prefix + row.target), row.example_id


@pytest.mark.parametrize("role", ROLES)
def test_first_rows_mix_the_families(rows, role):
    families = {row.source for row in rows[role]}
    shares = {f: sum(row.source == f for row in rows[role]) / len(rows[role]) for f in families}
    first = rows[role][:64]
    for family, share in shares.items():
        assert abs(sum(row.source == family for row in first) - 64 * share) <= 2
