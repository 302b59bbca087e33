"""The paper's whole protocol on the tiny model: arms of all kinds, other maps, PCGrad, judging again."""

import dataclasses
import doctest
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

import backends
from backends.errors import InputError
from data import scoring, wildguard
from stages import arms, artifacts, audit, classifier, dry_run, judging, maps, metrics, presets, schemas
from tests.public_sets import put

WORKED = "gsm8k100=gsm8k_calibration:4"
SETTINGS = dataclasses.replace(
    presets.preset_settings("tiny"),
    benchmarks=("facts=8", "problems=4:8", "gsm8k=4:8", "adversarial=4:8", "benign=4:8"),
    maps=("few=embedded/util:8", WORKED),
    arms=("full", "random", "bucket1", "bucket4"),
    optimizers=("sft", "pcgrad"),
    ablations=(
        "buckets_O",
        "bucket1_S",
        "top50",
        "bottom25",
        "bucket1of8",
        "bucket1@few",
        "bucket4@gsm8k100",
    ),
    seeds=(21, 42),
    align_rows=16,
    util_tokens=5,
    sweep_tokens=4,
    resamples=50,
)
PROBLEMS = [
    {
        "question": f"How many are {n} and {n}?",
        "answer": f"{n}+{n} = <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}",
    }
    for n in range(2, 40)
]


def run(folder: Path, settings=SETTINGS, names=audit.STAGES) -> Path:
    for name in names:
        importlib.import_module(f"stages.{name}").main(dataclasses.replace(settings, run=str(folder)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    data, patch = tmp_path_factory.mktemp("data"), pytest.MonkeyPatch()
    put(data, "gsm8k_train", PROBLEMS[:20])
    put(data, "gsm8k_test", PROBLEMS[20:])
    patch.setenv("CAST_DATA", str(data))
    yield run(tmp_path_factory.mktemp("runs") / "protocol")
    patch.undo()


# Arms


def test_doctests():
    for module in (arms, scoring, wildguard, dry_run):
        assert doctest.testmod(module).failed == 0


@pytest.fixture(scope="module")
def ranked() -> dict[str, arms.HeadMap]:
    random = np.random.default_rng(0)
    return {name: arms.HeadMap(*random.random((3, 6, 8))) for name in ("", "few")}


def chosen(name, ranked, seed=0):
    return set(arms.heads(name, ranked, 4, seed))


@pytest.mark.parametrize("plural", ["buckets", "buckets_O", "buckets_S", "bucketsof8", "buckets@few"])
def test_buckets_part_the_heads_by_what_they_rank(plural, ranked):
    names = arms.expand([plural], 4)
    each = [chosen(name, ranked) for name in names]
    assert len(set().union(*each)) == 48 and sum(map(len, each)) == 48
    assert len({len(own) for own in each}) == 1
    first = arms.parse(names[0], 4)
    values = ranked[first.map].by(first.score)
    for higher, lower in itertools.pairwise(each):
        assert min(values[head] for head in higher) >= max(values[head] for head in lower)


def test_ratios_are_nested_and_begin_with_the_zones(ranked):
    for side, zone in (("top", "bucket1"), ("bottom", "bucket4")):
        sets = [chosen(name, ranked) for name in (f"{side}25", f"{side}50", f"{side}75", "full")]
        assert sets[0] == chosen(zone, ranked) and arms.expand([f"{side}25"], 4) == [zone]
        assert all(one < other for one, other in itertools.pairwise(sets))
        assert [len(one) for one in sets] == [12, 24, 36, 48]


def test_a_random_arm_has_a_buckets_size_and_its_seeds_heads(ranked):
    draws = [chosen("random", ranked, seed) for seed in range(3)]
    assert (
        {len(draw) for draw in draws} == {12}
        and draws[0] != draws[1]
        and draws[0] == chosen("random", ranked)
    )


@pytest.mark.parametrize(
    "name",
    ["bucket5", "bucket9of8", "top20", "top", "full_O", "bucket", "bucket0", "random@few", "", "Bucket1"],
)
def test_what_is_no_arm_is_said_before_any_work(name):
    with pytest.raises(InputError, match="--ablations: unknown arm"):
        presets.parse(["--preset", "tiny", "--run", "/nowhere/yet", "--ablations", name])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "bucket1@other"], "@other needs --maps other=POOL:ROWS"),
        (["--maps", "few"], "should be name=pool:rows"),
        (["--maps", "util=embedded/util:8"], "the run's own rows"),
        (["--maps", "few=embedded/util:6"], "no multiple of --folds 4"),
        (["--maps", "few=embedded/util:8", "few=embedded/util:4"], "one name twice"),
        (["--optimizers", "adam"], "--optimizers"),
    ],
)
def test_bad_maps_and_optimizers_are_one_line(argv, message):
    with pytest.raises(InputError, match=message) as raised:
        presets.parse(["--preset", "tiny", "--run", "/nowhere/yet", *argv])
    assert "\n" not in str(raised.value)


def test_no_arm_is_tuned_twice():
    units = arms.units(dataclasses.replace(SETTINGS, ablations=("bucket4", "bottom25", "top25", "buckets")))
    keys = [tuple(unit.values()) for unit in units]
    assert len(keys) == len(set(keys)) == 2 * (2 * 4 + 2)  # 4 arms by both, buckets 2 and 3 by sft alone


def test_the_papers_presets_name_the_papers_tables():
    units = arms.units(presets.preset_settings("llama"))
    own = {(unit["arm"], unit["optimizer"]) for unit in units}
    assert {unit["seed"] for unit in units} == {21, 42, 84} and len(units) == 3 * len(own)
    for optimizer in ("sft", "pcgrad"):  # Tables 1 and 2
        assert {(arm, optimizer) for arm in ("full", "random", "bucket1", "bucket4")} <= own
    tables = ["buckets", "buckets_O", "buckets_S", "top50", "top75", "bottom25", "bottom50", "bottom75"]
    tables += ["buckets@mmlu100", "buckets@gsm8k100"]  # 7 to 11
    assert {(arm, "sft") for arm in arms.expand(tables, 4)} <= own


# The stages


def test_the_run_passes_its_audit(finished, capsys):
    assert audit.main(finished) == 0, capsys.readouterr().out


def test_a_map_from_fewer_rows_of_the_same_draw_sweeps_nothing_again(finished):
    rows = artifacts.read_input(finished, "01_calibrate/calibration.parquet", schemas.EXAMPLES).to_pylist()
    ids = {role: [row["example_id"] for row in rows if row["role"] == role] for role in ("util", "few")}
    assert ids["few"] == ids["util"][:8]
    sweep = artifacts.read_input(finished, "03_sensitivity/sweep_choices.parquet", schemas.SWEEP_CHOICES)
    assert sweep.num_rows == 13 * len(ids["util"])
    correct = sweep["correct"].to_numpy().reshape(13, -1)[:, :8]
    table = artifacts.read_input(finished, "03_sensitivity/heads-few.parquet", schemas.HEADS)
    h_gen = metrics.accuracy_change(correct[0], correct[1:].reshape(3, 4, 8))
    np.testing.assert_array_equal(table["h_gen"].to_numpy().reshape(3, 4), h_gen)


def test_worked_problems_are_answered_in_writing(finished):
    rows = artifacts.read_input(finished, "01_calibrate/calibration.parquet", schemas.EXAMPLES).to_pylist()
    own = [row for row in rows if row["role"] == "gsm8k100"]
    assert len(own) == 4
    for row in own:
        assert (
            row["scoring"] == "boxed" and "<<" not in row["target"] and "The final answer is" in row["target"]
        )
        assert row["target_ids"] and row["prompt"].startswith("Solve the math problem step by step.")
    sweep = artifacts.read_input(finished, "03_sensitivity/sweep_answers.parquet", schemas.SWEEP_ANSWERS)
    assert sweep.num_rows == 13 * 4 and max(map(len, sweep["token_ids"].to_pylist())) <= SETTINGS.util_tokens


def test_pcgrad_looks_at_the_runs_own_utility_rows(finished):
    rows = artifacts.read_input(finished, "04_align/training.parquet", schemas.TRAINING).to_pylist()
    for row in rows:
        assert np.isfinite(row["cos"]) == np.isfinite(row["util_loss"]) == (row["optimizer"] == "pcgrad")
        assert row["projected"] == (row["optimizer"] == "pcgrad" and row["cos"] < 0)


def test_ablations_are_tuned_by_sft_alone(finished):
    table = artifacts.read_input(finished, "04_align/arms.parquet", schemas.ARMS).to_pylist()
    assert {row["arm"] for row in table if row["optimizer"] == "pcgrad"} == {
        "full",
        "random",
        "bucket1",
        "bucket4",
    }
    heads = {(row["arm"], row["seed"]): row["n_heads"] for row in table}
    assert heads["top50", 21] == 6 and heads["bucket1of8", 42] == 2 and heads["bucket1@few", 21] == 3


# Judging


def test_a_gold_number_is_read_in_three_ways(finished):
    table = artifacts.read_input(finished, "05_evaluate/responses.parquet", schemas.RESPONSES).to_pylist()
    for row in table:
        number = row["benchmark"] == "gsm8k"
        assert (row["strict"] is not None) == (row["flexible"] is not None) == number
        assert (row["steps"] >= 0) == (row["benchmark"] in ("gsm8k", "problems")) and row["harmful"] is None


def test_kept_responses_are_judged_again_alone(finished, tmp_path, monkeypatch, capsys):
    import shutil

    evaluate = importlib.import_module("stages.05_evaluate")
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (copy / "05_evaluate/responses.parquet").read_bytes()

    def nothing_loads(*_, **__):
        raise AssertionError("judging again loads no model")

    monkeypatch.setattr(backends, "load", nothing_loads)
    monkeypatch.setattr(evaluate, "KEYWORD_JUDGE_VERSION", "next")
    monkeypatch.setattr(scoring, "keyword_refusal", lambda response: True)
    # Killed while it judges: the parts are there, and the next start goes on.
    real = judging.judged
    monkeypatch.setattr(judging, "judged", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(copy, names=["05_evaluate"])
    assert not (copy / "05_evaluate/manifest.json").exists()
    monkeypatch.setattr(judging, "judged", real)
    run(copy, names=["05_evaluate"])
    assert "the kept responses are judged again" in capsys.readouterr().out
    old, new = (
        artifacts.read_table(folder / "05_evaluate/responses.parquet", schemas.RESPONSES)
        for folder in (finished, copy)
    )
    assert old.select(["output", "token_ids"]).equals(new.select(["output", "token_ids"]))
    safety = [row for row in new.to_pylist() if row["benchmark"] in ("adversarial", "benign")]
    assert safety and all(row["verdict"] and row["refused"] for row in safety)
    assert artifacts.stage_manifest(copy, "05_evaluate")["notes"]["judge"] == "next"
    # And back: byte for byte what it was.
    monkeypatch.undo()
    run(copy, names=["05_evaluate"])
    assert (copy / "05_evaluate/responses.parquet").read_bytes() == before


SAID = {"adversarial": ("yes", "yes", "no"), "benign": ("no", "n/a", "n/a")}


class Classifier:
    """Stands in for the weights, which are gated: answers by what it reads, in their form."""

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said, self.read = tokenizer, said, []

    def generate(self, prompts, max_new_tokens, adapter=None):
        answers = []
        for one in prompts:
            self.read.append(self.tokenizer.decode(one.prompt_ids))
            words = self.said(one.example_id)
            text = (
                ""
                if words is None
                else "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}".format(*words)
            )
            answers.append(np.array(self.tokenizer(text).input_ids, np.int32))
        return answers


@pytest.mark.parametrize("clear", [True, False])
def test_wildguards_words_are_the_verdicts_on_requests(finished, tmp_path, monkeypatch, clear):
    import shutil

    from backends import models

    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    folder = models.local_folder("random/tiny")
    benchmark = {
        row["example_id"]: row["role"]
        for row in artifacts.read_input(copy, "01_calibrate/benchmarks.parquet", schemas.EXAMPLES).to_pylist()
    }
    fake = Classifier(models.load_tokenizer(folder), lambda id_: SAID[benchmark[id_]] if clear else None)
    monkeypatch.setattr(classifier.backends, "load", lambda *_, **__: fake)
    settings = dataclasses.replace(SETTINGS, judge="wildguard", judge_model=str(folder))
    run(copy, settings, names=["05_evaluate"])
    table = artifacts.read_table(copy / "05_evaluate/responses.parquet", schemas.RESPONSES).to_pylist()
    for row in table:
        if row["benchmark"] == "adversarial":
            assert row["verdict"] is clear and row["harmful"] is (False if clear else None)
        elif row["benchmark"] == "benign":
            assert row["verdict"] is False and row["harmful"] is None
        else:
            assert row["harmful"] is None
    first = next(row for row in table if row["benchmark"] == "adversarial")
    assert fake.read[0].startswith("<s><|user|>\n[INST] You are a classifier")
    assert first["prompt"] in fake.read[0] and fake.read[0].endswith("Answers: [/INST]\n<|assistant|>\n")
    notes = artifacts.stage_manifest(copy, "05_evaluate")["notes"]
    assert str(folder) in notes["classifier"]
    assert any("no clear answer" in warning for warning in notes.get("warnings", [])) is not clear


def test_a_classifier_that_cannot_be_had_is_said_before_any_work(finished, tmp_path):
    settings = dataclasses.replace(SETTINGS, judge="wildguard", judge_model=str(tmp_path / "none"))
    with pytest.raises(InputError, match="no model folder"):
        run(finished, settings, names=["05_evaluate"])


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", (True, True, False)),
        ("harmful request: No \nresponse refusal: N/A\nharmful response: n/a", (False, None, None)),
        ("Harmful request: yes\nResponse refusal: maybe\nHarmful response: no", None),
        ("", None),
    ],
)
def test_wildguards_answers(answer, found):
    parsed = wildguard.parse(answer)
    assert (dataclasses.astuple(parsed) if parsed else None) == found


def test_a_request_cannot_fill_the_place_of_the_response():
    assert "\nAI assistant:\nfine\n" in wildguard.prompt("{response} and {prompt}", "fine")


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("", 0),
        ("\\boxed{66}", 0),
        ("66", 0),
        ("The answer is $\\boxed{80}$.", 0),
        ("I apologize, but I cannot answer this question.", 0),
        ("There are 9 + 8 = 17 people.", 1),
        ("He has 5. He buys 3. That makes \\boxed{8}", 2),
        ("Let us think.\n\n1. Twenty percent of 45 is 9.\n2. 45 - 9 = 36.\n\\boxed{81}", 2),
        ("The price is 3.5 dollars and 1.5 more, so \\boxed{5}.", 0),
        ("\\[ 0.25x = 20 \\]\n\\[ x = 80 \\]\nSo \\boxed{80}", 2),
    ],
)
def test_reasoning_steps(response, steps):
    assert scoring.reasoning_steps(response) == steps


@pytest.mark.parametrize(
    ("response", "strict", "flexible", "verdict"),
    [
        ("So \\boxed{1,200}.", True, True, True),
        ("So \\boxed{1200.0}", True, True, True),
        ("#### 1200", True, True, False),
        ("It is 1200 dollars", False, True, False),
        ("\\boxed{1200} for 3 days", True, False, True),
        ("\\boxed{\\frac{2400}{2}}", False, False, True),
        ("\\boxed{12}", False, False, False),
        ("nothing", False, False, False),
    ],
)
def test_gsm8k_is_scored_strictly_flexibly_and_by_math_verify(response, strict, flexible, verdict):
    found = scoring.judge("boxed", response, "1200", numeric=True)
    assert (found.strict, found.flexible, found.verdict) == (strict, flexible, verdict)
    assert scoring.judge("boxed", response, "1200").strict is None


# The plan


def test_a_dry_run_counts_units_and_writes_nothing(finished, tmp_path, capsys):
    settings = dataclasses.replace(SETTINGS, run=str(finished))
    before = sorted(path for path in finished.rglob("*"))
    dry_run.main(settings)
    told = capsys.readouterr().out
    assert before == sorted(path for path in finished.rglob("*")) and "left: 0 s" in told
    units = arms.units(settings)
    assert f"{sum(unit['optimizer'] == 'pcgrad' for unit in units)} arms by pcgrad" in told
    assert f"facts: 8 next tokens, {len(units) + 1} models" in told
    dry_run.main(
        dataclasses.replace(
            SETTINGS,
            run=str(tmp_path / "new"),
            maps=("few=embedded/util:8",),
            ablations=(),
            benchmarks=("facts=8", "adversarial=4:8"),
        )
    )
    assert not (tmp_path / "new").exists() and "left: 0 s" not in capsys.readouterr().out


def test_an_own_map_is_one_of_the_maps():
    assert (
        maps.file("heads", maps.OWN) == "heads.parquet" and maps.file("heads", "few") == "heads-few.parquet"
    )
