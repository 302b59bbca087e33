"""The paper's whole protocol on the tiny model: arms of all kinds, other maps, PCGrad, the classifier."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from backends import models
from backends.core.errors import InputError
from stages import audit
from stages.run import classify, schemas
from stages.run.pipeline import STAGES
from stages.run.presets import preset_settings
from stages.run.store import RunFolder
from stages.scale import plan
from tests.public_sets import put
from tests.runs import make_run

EVALUATE = schemas.RESPONSES.stage
MAIN = ("full", "random", "bucket1", "bucket4")
BENCHMARKS = ("mmlu=8", "problems=4:8", "gsm8k=4:8", "adversarial=4:8", "benign=4:8")
ABLATIONS = ("buckets_O", "bucket1_S", "top50", "bottom25", "bucket1of8", "bucket1@few", "bucket4@gsm8k100")
SETTINGS = preset_settings("tiny").replace(
    benchmarks=BENCHMARKS,
    maps=("few=embedded/util:8", "gsm8k100=gsm8k_calibration:4"),
    arms=MAIN,
    optimizers=("sft", "pcgrad"),
    ablations=ABLATIONS,
    seeds=(21, 42),
    align_rows=16,
    util_tokens=5,
    sweep_tokens=4,
    resamples=50,
)
PROBLEMS = [
    {"question": f"How many are {n} and {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
    for n in range(2, 40)
]
LETTERED = [
    {"question": f"Which is number {n}?", "choices": ["it", f"{n}", "they", "none"], "answer": 1}
    for n in range(8)
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    data, patch = tmp_path_factory.mktemp("data"), pytest.MonkeyPatch()
    put(data, "gsm8k_train", PROBLEMS[:20])
    put(data, "gsm8k_test", PROBLEMS[20:])
    put(data, "mmlu_test", LETTERED)
    patch.setenv("CAST_DATA", str(data))
    yield make_run(tmp_path_factory.mktemp("runs") / "protocol", SETTINGS, STAGES)
    patch.undo()


def rows(folder: Path, table: schemas.Table) -> list[dict]:
    return RunFolder(folder).read(table).to_dict("records")


def test_the_run_passes_its_audit(finished, capsys):
    assert audit.main(finished) == 0, capsys.readouterr().out


def test_maps_share_rows_and_sweep_none_again_and_problems_are_answered_in_writing(finished):
    calibration = rows(finished, schemas.CALIBRATION)
    ids = {
        name: [row["example_id"] for row in calibration if row["split"] == name] for name in ("util", "few")
    }
    assert ids["few"] == ids["util"][:8]
    assert len(rows(finished, schemas.SWEEP_CHOICES)) == 13 * len(ids["util"])
    own = [row for row in calibration if row["split"] == "gsm8k100"]
    assert len(own) == 4
    for row in own:
        assert row["scoring"] == "boxed" and len(row["target_ids"])
        assert "<<" not in row["target"] and "The final answer is" in row["target"]
    sweep = RunFolder(finished).read(schemas.SWEEP_ANSWERS)
    assert len(sweep) == 13 * 4 and max(map(len, sweep["token_ids"])) <= 5


def test_only_pcgrad_reads_the_runs_utility_rows_and_ablations_are_tuned_by_sft_alone(finished):
    for row in rows(finished, schemas.TRAINING):
        pcgrad = row["optimizer"] == "pcgrad"
        assert np.isfinite(row["cos"]) == np.isfinite(row["util_loss"]) == pcgrad
        assert row["projected"] == (pcgrad and row["cos"] < 0)
    table = rows(finished, schemas.ARMS)
    assert {row["arm"] for row in table if row["optimizer"] == "pcgrad"} == set(MAIN)
    heads = {(row["arm"], row["seed"]): row["n_heads"] for row in table}
    assert heads["top50", 21] == 6 and heads["bucket1of8", 42] == 2 and heads["bucket1@few", 21] == 3


def test_missing_values_are_null(finished):
    for row in rows(finished, schemas.RESPONSES):
        number, worked = row["benchmark"] == "gsm8k", row["benchmark"] in ("gsm8k", "problems")
        assert (row["strict"] is not None) == (row["flexible"] is not None) == number
        assert (row["steps"] is not None) == worked and row["harmful"] is None


# The classifier

ANSWERS = {"adversarial": ("yes", "yes", "no"), "benign": ("no", "n/a", "n/a")}


class Classifier:
    """Stands in for the weights, which are gated: answers by benchmark, in their form."""

    def __init__(self, tokenizer, answers: dict[str, tuple[str, str, str] | None]):
        self.tokenizer, self.answers, self.read = tokenizer, answers, []

    def generate(self, prompts, max_new_tokens, adapter=None):
        found = []
        for prompt in prompts:
            self.read.append(self.tokenizer.decode(prompt.prompt_ids))
            answer = self.answers[prompt.example_id]
            text = "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}"
            found.append(self.tokenizer(text.format(*answer) if answer else "").input_ids)
        return [np.array(ids, np.int32) for ids in found]


@pytest.mark.parametrize("clear", [True, False])
def test_the_classifiers_answers_are_the_verdicts_on_requests(finished, tmp_path, monkeypatch, clear):
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    folder = models.local_folder("random/tiny")
    answers = {
        row["example_id"]: ANSWERS.get(row["split"]) if clear else None
        for row in rows(copy, schemas.BENCHMARKS)
    }
    fake = Classifier(models.load_tokenizer(folder), answers)
    monkeypatch.setattr(classify.backends, "load", lambda *_, **__: fake)
    make_run(copy, SETTINGS.replace(judge="wildguard", judge_model=str(folder)), (EVALUATE,))
    table = rows(copy, schemas.RESPONSES)
    for row in table:
        attacked = row["benchmark"] == "adversarial"
        assert row["harmful"] == (False if attacked and clear else None)
        if attacked:
            assert row["verdict"] == clear
        elif row["benchmark"] == "benign":
            assert not row["verdict"]
    first = next(row for row in table if row["benchmark"] == "adversarial")
    assert fake.read[0].startswith("<s><|user|>\n[INST] You are a classifier")
    assert first["prompt"] in fake.read[0] and fake.read[0].endswith("Answers: [/INST]\n<|assistant|>\n")
    notes = RunFolder(copy).manifest(EVALUATE)["notes"]
    assert str(folder) in notes["classifier"]
    assert any("no clear answer" in warning for warning in notes.get("warnings", [])) is not clear


def test_a_classifier_that_cannot_be_had_is_refused_before_any_work(finished, tmp_path):
    settings = SETTINGS.replace(judge="wildguard", judge_model=str(tmp_path / "none"))
    with pytest.raises(InputError, match="no model folder"):
        make_run(finished, settings, (EVALUATE,))


def test_a_dry_run_counts_units_and_writes_nothing(finished, tmp_path, capsys):
    before = sorted(finished.rglob("*"))
    plan.main(SETTINGS.replace(run=str(finished)))
    output = capsys.readouterr().out
    assert sorted(finished.rglob("*")) == before and "8 arms by pcgrad" in output
    plan.main(SETTINGS.replace(run=str(tmp_path / "new"), ablations=()))
    assert not (tmp_path / "new").exists() and capsys.readouterr().out != output
