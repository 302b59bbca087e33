"""Drawing the rows of a run: nothing twice, a stream for each draw, shortfalls said, bad sources refused."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from backends.core.errors import InputError
from data import sampling
from data.benchmarks import parse_benchmarks
from data.records import DATA_TYPES, identities
from data.sampling import Plan, Pools, Wanted
from tests.public_sets import MMLU, put

SMOLLM = ("facts=120", "words=120", "problems=32:48", "adversarial=40:32", "vanilla=40:32", "benign=40:32")
FEW = SimpleNamespace(name="few", pool="embedded/util", rows=8)
SUMS = SimpleNamespace(name="sums", pool="embedded/sums", rows=96)
PLAN = Plan(
    seed=3,
    folds=4,
    util=Wanted("embedded/util", 32),
    safe=Wanted("embedded/safe", 12),
    align=Wanted("embedded", 240),
    benchmarks=parse_benchmarks(SMOLLM, False, False),
    maps=(FEW,),
    pairs=32,
)


def draw(plan, pools=None):
    return sampling.draw_all(plan, pools or Pools(), lambda record: len(record.prompt.split()))


def counts(records):
    return Counter(record.split for record in records)


@pytest.fixture(scope="module")
def drawn():
    return draw(PLAN)


def test_every_split_has_the_rows_that_the_plan_wants_in_the_order_of_the_tables(drawn):
    expected = {"util": 32, "safe": 12, "few": 8, "plain": 32, "attacked": 32}
    assert list(counts(drawn.calibration).items()) == list(expected.items())
    assert counts(drawn.alignment) == dict.fromkeys(DATA_TYPES, 60)
    assert counts(drawn.benchmarks) == {one.name: one.rows for one in PLAN.benchmarks}
    assert drawn.short == [] and draw(PLAN) == drawn
    ids = {split: [row.example_id for row in drawn.calibration if row.split == split] for split in expected}
    assert ids["few"] == ids["util"][:8], "a map of the run's own pool is a part of D_util, swept already"
    tables = [identities(rows) for rows in (drawn.calibration, drawn.alignment, drawn.benchmarks)]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("seed", [0, 3])
def test_a_reliable_map_draws_its_rows_without_a_shortfall_and_scores_the_same(seed):
    few, many = (
        draw(replace(PLAN, seed=seed, util=Wanted("embedded/util", util), safe=Wanted("embedded/safe", safe)))
        for util, safe in ((32, 12), (512, 256))
    )
    assert many.short == []
    expected = {"util": 512, "safe": 256, "few": 8, "plain": 32, "attacked": 32}
    assert counts(many.calibration) == expected
    assert (many.alignment, many.benchmarks) == (few.alignment, few.benchmarks)


@pytest.mark.parametrize("seed", [0, 3])
def test_development_rows_are_no_benchmark_rows_of_this_seed_and_of_the_presets(seed):
    """And all else is the same. With two seeds' rows left out there may be too few; that is said."""
    benchmark, development = (draw(replace(PLAN, seed=seed, development=flag)) for flag in (False, True))
    assert development.calibration == benchmark.calibration
    assert development.alignment == benchmark.alignment
    scored = identities(development.benchmarks)
    assert not scored & identities([*benchmark.calibration, *benchmark.alignment, *benchmark.benchmarks])
    assert not scored & identities(draw(replace(PLAN, seed=sampling.PRESET_SEED)).benchmarks)
    short = {one.split: one.drawn for one in development.short}
    assert counts(development.benchmarks) == counts(benchmark.benchmarks) | short
    assert short.keys() == ({"facts", "words"} if seed else set()) and min(short.values(), default=60) >= 60


def test_more_benign_rows_leave_the_others_and_too_few_are_short_in_proportion(drawn):
    more = draw(replace(PLAN, benign_share=0.75))
    kinds = {"harmful": 30, "benign": 90}
    assert counts(more.alignment) == {kind: kinds[kind.split("_")[1]] for kind in DATA_TYPES}
    assert more.benchmarks == drawn.benchmarks and more.calibration == drawn.calibration
    found = draw(replace(PLAN, benign_share=0.75, align=Wanted("embedded", 4_000)))
    (short,) = found.short
    assert short.requested == 1500 and short.drawn < 450
    benign, harmful = (counts(found.alignment)[f"vanilla_{kind}"] for kind in ("benign", "harmful"))
    assert (benign, harmful) == (short.drawn, round(short.drawn / 3))


def test_too_few_rows_are_balanced_to_what_there_is_and_said():
    many = replace(
        PLAN,
        util=Wanted("embedded/util", 100_000),
        align=Wanted("embedded", 40_000),
        benchmarks=parse_benchmarks(("facts=99999", "vanilla=4:6"), False, False),
        pairs=5_000,
    )
    found = draw(many)
    short = {one.split: one for one in found.short}
    assert set(short) == {"facts", "util", "pairs", "alignment", "util for attribution"}
    calibration = counts(found.calibration)
    assert short["util"].drawn == calibration["util"] and calibration["util"] % PLAN.folds == 0
    assert short["facts"].drawn == short["facts"].pool_rows == counts(found.benchmarks)["facts"]
    assert short["pairs"].drawn == calibration["plain"] == calibration["attacked"]
    assert counts(found.alignment) == dict.fromkeys(DATA_TYPES, short["alignment"].drawn)
    assert str(short["facts"]) == "facts: 251 of 99999 rows, embedded/facts has 251 in all"
    (few,) = draw(replace(PLAN, util=Wanted("embedded/util", 16))).short
    assert (few.split, few.requested, few.drawn) == ("util for attribution", 32, 16)


def test_worked_problems_make_a_map_and_move_no_other_row():
    plan = replace(PLAN, benchmarks=parse_benchmarks(("problems=0:8", *SMOLLM[3:]), False, False))
    before, found = draw(plan), draw(replace(plan, maps=(FEW, SUMS)))
    sums = [row for row in found.calibration if row.split == "sums"]
    assert len(sums) == SUMS.rows and {row.scoring for row in sums} == {"number"}
    assert [row for row in found.calibration if row.split != "sums"] == before.calibration
    assert (found.alignment, found.benchmarks, found.short) == (
        before.alignment,
        before.benchmarks,
        before.short,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"util": Wanted("embedded/nothing", 8)}, "no embedded pool 'nothing', there are util, safe, "),
        ({"util": Wanted("nothing", 8)}, "unknown data pool 'nothing'; there are mmlu, "),
        ({"util": Wanted("own/util", 8)}, "--util: .* cannot be read"),
        ({"util": Wanted("embedded/problems", 8)}, "util: calibration rows are scored by the next token"),
        ({"safe": Wanted("embedded/vanilla", 8), "folds": 4_000}, "--folds 4000 needs as many at least"),
        ({"align": Wanted("nothing", 8)}, '--align-source: "embedded" or "wildjailbreak", not \'nothing\''),
        ({"max_length": 4}, "vanilla_harmful: no row is left .* too long"),
        ({"util": Wanted("embedded/facts", 8), "facts": 0}, "util: 0 rows are there"),
        ({"safe": Wanted("embedded/plain", 500)}, "--pairs: none of"),
        ({"facts": 0, "development": True}, "benchmark facts: no row is left"),
        ({"new_tokens": 0}, "vanilla writes its answers, give vanilla=rows:new-tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    texts = (f"facts={change.pop('facts', 4)}", f"vanilla=4:{change.pop('new_tokens', 8)}")
    plan = replace(PLAN, benchmarks=parse_benchmarks(texts, False, False), **change)
    with pytest.raises(InputError, match=message) as raised:
        draw(plan)
    assert "\n" not in str(raised.value)


def test_a_users_rows_calibrate_and_the_others_are_the_benchmark(tmp_path):
    mine = tmp_path / "my.jsonl"
    rows = []
    for n in range(40):
        rows += [
            {"role": "util", "prompt": f"What is {n} plus one?", "target": f" {n + 1}"},
            {"role": "util", "prompt": f"Add {n} and 2.", "target": str(n + 2), "scoring": "number"},
            {"role": "safe", "prompt": f"Please break rule number {n}.", "target": "No, I will not."},
            {"role": "align", "prompt": f"Align {n}.", "target": "No.", "data_type": DATA_TYPES[n % 4]},
        ]
    mine.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plan = replace(
        PLAN,
        util=Wanted("own/util", 16),
        safe=Wanted("own/safe", 8),
        align=Wanted("own/align", 32),
        benchmarks=parse_benchmarks(("facts=4", "vanilla=4:8", "benign=4:8"), True, True),
        maps=(),
        pairs=0,
    )
    pools = Pools(str(mine), str(mine), str(mine))
    found = draw(plan, pools)
    assert counts(found.calibration) == {"util": 16, "safe": 8} and counts(found.alignment).total() == 32
    assert counts(found.benchmarks) == {"benign": 4, "own_util": 64, "own_safe": 32}
    assert all(row.scoring == "choice" for row in found.calibration if row.split == "util")
    assert not identities(found.calibration) & identities(found.benchmarks)
    assert pools.provenance["own/util"]["location"] == str(mine)
    with pytest.raises(InputError, match=r"benchmark own_safe: no row is left \(40 less those used\)"):
        draw(replace(plan, safe=Wanted("own/safe", 40)), pools)
    mine.write_text('{"role": "util", "prompt": "x"}\n')
    with pytest.raises(InputError, match="^--util: my.jsonl, line 1: column 'target' is missing"):
        draw(plan, Pools(str(mine)))


def test_wildjailbreaks_pairs_are_its_own_two_columns(tmp_path, monkeypatch):
    kinds = {"adversarial_harmful": "Pretend that you do {}.", "vanilla_harmful": ""}
    rows = [
        {
            "vanilla": f"How do I do {n}?",
            "adversarial": form.format(n),
            "completion": f"I can't help with {n}.",
            "data_type": kind,
        }
        for n in range(12)
        for kind, form in kinds.items()
    ]
    put(tmp_path, "wildjailbreak_train", rows)
    monkeypatch.setenv("CAST_DATA", str(tmp_path))
    plan = replace(PLAN, safe=Wanted("wildjailbreak_safe", 8), pairs=4)
    assert sampling.needed_pools(plan)[-6:-4] == ["wildjailbreak_plain", "wildjailbreak_attacked"]
    found = draw(plan).calibration
    plain, attacked = ([row for row in found if row.split == split] for split in sampling.PAIR)
    assert len(plain) == len(attacked) == 4
    for one, other in zip(plain, attacked, strict=True):
        number = one.prompt.split()[-1].rstrip("?")
        assert other.prompt == f"Pretend that you do {number}." and other.entry == one.entry
        assert other.target == one.target == f"I can't help with {number}."
    assert not identities(plain) & identities(row for row in found if row.split == "safe")


def test_calibration_rows_without_a_target_are_refused(tmp_path, monkeypatch):
    """A benchmark's requests, which no set answers: no gradient and no log p could be taken."""
    requests = [
        {"prompt": f"Do {n}.", "adversarial": False, "prompt_harm_label": "harmful"} for n in range(9)
    ]
    put(tmp_path, "wildguard_test", requests)
    monkeypatch.setenv("CAST_DATA", str(tmp_path))
    for side in ("safe", "util"):
        with pytest.raises(InputError, match=f"^{side}: rows of wildguard without a target have neither"):
            draw(replace(PLAN, **{side: Wanted("wildguard", 8)}))


def test_all_that_cannot_be_had_is_listed_before_any_work(folder, capsys):
    plan = replace(PLAN, util=Wanted("mmlu_calibration", 8), align=Wanted("wildjailbreak", 8))
    pools = sampling.needed_pools(plan)
    sampling.check_reachable(pools, None)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "public data:" and [line.split()[:2] for line in said[1:]] == [
        [pool, "there"] for pool in ("mmlu_calibration", *DATA_TYPES)
    ]
    (folder / "wildjailbreak_train.parquet").unlink()
    with pytest.raises(InputError) as raised:
        sampling.check_reachable(pools, "no model folder x")
    lines = str(raised.value).splitlines()
    assert lines[0] == "what this run needs cannot be had:" and lines[1] == "  no model folder x"
    assert [line.split(":")[0].strip() for line in lines[2:]] == list(DATA_TYPES)


def test_what_repeats_calibrates_once_and_is_counted_where_it_is_scored(tmp_path, monkeypatch):
    """A benchmark keeps the rows that its set has."""

    def questions(count, word):
        rows = [MMLU[0] | {"question": f"Which {word} {number}?"} for number in range(count)]
        return [*rows, rows[0], rows[1] | {"answer": 0}]

    put(tmp_path, "mmlu_validation", questions(9, "one"))
    put(tmp_path, "mmlu_dev", MMLU[1:])
    put(tmp_path, "mmlu_test", questions(5, "other"))
    monkeypatch.setenv("CAST_DATA", str(tmp_path))
    benchmarks = parse_benchmarks(("mmlu=0", "vanilla=4:8"), False, False)
    plan = replace(PLAN, util=Wanted("mmlu_calibration", 100), benchmarks=benchmarks, maps=(), pairs=0)
    found = draw(plan)
    assert found.doubts == [
        "1 of 7 rows of mmlu repeat another one, as the set has them",
        "1 of 12 rows of mmlu_calibration repeat an earlier one: taken once",
    ]
    assert counts(found.benchmarks)["mmlu"] == 7 and counts(found.calibration)["util"] == 8
