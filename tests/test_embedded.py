"""The embedded data set: what the stages and the audit rely on."""

import hashlib
import itertools
import json
import re
from collections import Counter
from operator import add, mul, sub
from pathlib import Path

import pytest

import data.embedded
from data.embedded.generate import GROUPS, SPLITS, records
from data.records import SCORINGS, Record, normalise
from data.refusal_judge import keyword_refusal

HARMFUL = ("safe", "vanilla_harmful", "adversarial_harmful", "vanilla", "adversarial", "plain", "attacked")
ENDING = " Answer in one sentence."
BENIGN = ("vanilla_benign", "adversarial_benign", "benign")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Record]]:
    return {split: records(split) for split in SPLITS}


def test_every_row_names_its_split(rows):
    for split, own in rows.items():
        assert {row.split for row in own} == {split}
        assert {row.scoring for row in own} <= set(SCORINGS)
    with pytest.raises(ValueError, match="split: 'nonsense' is not one of util, "):
        records("nonsense")


def test_rows_are_those_that_finished_runs_used(rows):
    """A change of rows changes every number of every run: make it knowingly. More rows that calibrate leave
    all others as they are."""
    calibrating = [split for split in SPLITS if GROUPS[split] == "calibration"]
    others = [split for split in SPLITS if split not in calibrating]
    assert calibrating[-1] == SPLITS[-1] == "sums"  # what came later moves nothing that was there
    for splits, expected in (
        (calibrating[:-1], "3e274ea4e58c5c6e"),
        (others, "37f12a548982fcbb"),
        (["sums"], "d5630ae8147afd61"),
    ):
        texts = [
            f"{row.example_id}|{row.prompt}|{row.prefix}|{row.target}"
            for split in splits
            for row in rows[split]
        ]
        assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == expected


def test_there_are_enough_rows_for_a_reliable_map(rows):
    for split, least in (("util", 640), ("safe", 288), ("plain", 288), ("attacked", 288), ("sums", 240)):
        own = rows[split]
        assert len(own) >= least
        for texts in ({row.entry for row in own}, {normalise(row.prompt) for row in own}):
            assert len(texts) == len(own)
    families = Counter(row.source for row in rows["util"])
    assert len(families) >= 20 and max(families.values()) <= 0.15 * len(rows["util"])


def test_no_fact_that_calibrates_is_scored_in_another_family_or_the_other_way_round(rows):
    """Paris for France and France for Paris are one pair."""

    def pairs(*splits):
        subjects = ((row.entry.split("/")[1], row.target) for split in splits for row in rows[split])
        return [frozenset(normalise(text.replace("-", " ")) for text in pair) for pair in subjects]

    assert len(pairs("util")) > 640 and not set(pairs("util")) & set(pairs("facts", "words"))
    domains = [{row.source for row in rows[split]} for split in ("util", "words")]
    assert not domains[0] & domains[1], "words is another domain than D_util's"


def test_no_problem_that_calibrates_is_scored_with_other_numbers_or_in_another_story(rows):
    """Each worked answer is right; sums and problems share neither a first number nor a story."""

    def problems(split):
        for row in rows[split]:
            a, sign, b, equals, result = row.target.split()
            assert equals == "=" and int(result) == {"+": add, "-": sub, "x": mul}[sign](int(a), int(b))
            story = row.prompt.removesuffix(ENDING).replace(f"{a} ", "{a} ").replace(f"{b} ", "{b} ")
            assert row.scoring == "number" and story.count("{") == 2
            names = r"\b(Tom|Anna|Ben|Maria|Sam|Lucy|Omar|Nina|Jack|Emma)\b"
            yield row.source, int(a), re.sub(names, "{name}", story)

    sums, scored = ([*problems(split)] for split in ("sums", "problems"))
    for at in (1, 2):
        assert not {row[at] for row in sums} & {row[at] for row in scored}
    stories = Counter(source for source, story in {(source, story) for source, _, story in sums})
    assert len(stories) == 3 and min(stories.values()) >= 6


def test_ids_and_prompts_are_unique_across_the_project(rows):
    every = [row for split in SPLITS for row in rows[split]]
    assert len({row.example_id for row in every}) == len(every)
    assert len({(row.prompt, row.prefix) for row in every}) == len(every)
    assert all(re.fullmatch(r"embedded/[\w/-]+", row.example_id) for row in every)
    assert not [row for row in every if re.search(r"[{}]", row.prompt + row.prefix + row.target)], "a slot"


def test_no_entry_is_shared_between_groups(rows):
    entries = {group: set() for group in GROUPS.values()}
    for split, own in rows.items():
        entries[GROUPS[split]] |= {row.entry for row in own}
    assert len(entries) == 3
    assert sum(map(len, entries.values())) == len(set().union(*entries.values()))


def test_benchmark_attacks_are_held_out(rows):
    path = Path(data.embedded.__file__).parent / "phrasing.json"
    phrasing = json.loads(path.read_text(encoding="utf-8"))
    training, held_out = phrasing["attacks"], phrasing["held_out_attacks"]
    assert not set(training) & set(held_out)
    openings = {template.split("{act}")[0] for templates in held_out.values() for template in templates}
    openings = tuple(opening for opening in openings if len(opening) > 12)
    assert len(openings) >= 8
    for split, own in rows.items():
        attacks = {row.source.removeprefix("embedded/") for row in own}
        assert not attacks & set(training if GROUPS[split] == "benchmarks" else held_out)
        assert GROUPS[split] == "benchmarks" or not [row for row in own if row.prompt.startswith(openings)]
    assert {row.source.removeprefix("embedded/") for row in rows["adversarial"]} == set(held_out)


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


def test_first_rows_mix_the_families(rows):
    for own in rows.values():
        first = Counter(row.source for row in own[:64])
        for family, count in Counter(row.source for row in own).items():
            assert abs(first[family] - 64 * count / len(own)) <= 2
