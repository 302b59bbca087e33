"""NeuronTune through the stages, on the tiny model: pairs, scores, arms, tables, the audit, both backends."""

import dataclasses
import doctest
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends.errors import InputError
from data import sources
from data.examples import Example
from stages import arms, artifacts, audit, compare, drawing, dry_run, neurons, presets, schemas
from stages.reporting import families, findings
from tests.public_sets import put

SETTINGS = dataclasses.replace(
    presets.preset_settings("tiny"),
    benchmarks=("facts=8", "problems=4:8", "adversarial=4:8", "benign=4:8"),
    arms=("full", "bucket4"),
    ablations=("randomneurons16",),
    pairs=8,
    attribution_steps=4,
    neurons=(0, 16),
    lam=(0.5, 0.9),
    gain_lr=0.5,
    align_rows=48,
    sweep_tokens=4,
    resamples=50,
)


def run(folder: Path, settings=SETTINGS, names=audit.STAGES) -> Path:
    for name in names:
        importlib.import_module(f"stages.{name}").main(dataclasses.replace(settings, run=str(folder)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "neurons")


@pytest.fixture(scope="module")
def flax(tmp_path_factory) -> Path:
    return run(
        tmp_path_factory.mktemp("runs") / "neurons-flax", dataclasses.replace(SETTINGS, backend="flax")
    )


def rows(folder: Path, relative: str, schema) -> list[dict]:
    return artifacts.read_table(folder / relative, schema).to_pylist()


def test_doctests():
    for module in (neurons, families, arms):
        assert doctest.testmod(module).failed == 0


# Selection


def test_the_best_of_each_side_are_selected_once():
    generator = np.random.default_rng(0)
    safety, utility = (neurons.ranks(generator.random((4, 50))) for _ in range(2))
    chosen = neurons.select(safety, utility, 40)
    both = {tuple(at) for at in np.argwhere((safety < 40) & (utility < 40))}
    assert len(both) > 2, "nothing to decide"
    assert len(chosen.safety) + len(chosen.utility) == 80 - len(both)
    for neuron in both:
        assert (neuron in chosen.safety) == (safety[neuron] <= utility[neuron])
        assert (neuron in chosen.utility) != (neuron in chosen.safety)
    assert neurons.select(safety, utility, 0) == neurons.Selection((), ())
    drawn = neurons.drawn(chosen, 4, 50, seed=1)
    assert [len(drawn.safety), len(drawn.utility)] == [len(chosen.safety), len(chosen.utility)]
    assert len({*drawn.safety, *drawn.utility}) == 80 - len(both) and drawn != chosen
    assert drawn == neurons.drawn(chosen, 4, 50, seed=1) != neurons.drawn(chosen, 4, 50, seed=2)


def test_families_of_attacks_are_tasks_and_small_ones_join():
    given = [("vanilla", "theft")] * 4 + [("adversarial", "poem")] * 4 + [("adversarial", "novel")] * 3
    told, examples = [], []
    for form, source in given:
        for kind in ("harmful", "benign"):
            told.append({"role": f"{form}_{kind}", "source": source})
            empty = np.zeros(0, np.int32)
            examples.append(Example(f"{len(told)}", empty, empty, empty, -1))
    found = {task.name: (len(task.safe), len(task.util)) for task in neurons.tasks(told, examples)}
    assert found == {"vanilla": (4, 4), "poem": (4, 4), "adversarial": (3, 3)}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--neurons", "16", "--pairs", "0"], "--neurons: arms of neurons need --pairs"),
        (["--ablations", "randomneurons8"], "--ablations: arms of neurons need --pairs"),
        (["--neurons", "-1", "--pairs", "8"], "--neurons must not be negative"),
        (["--neurons", "4", "--lam", "1.5", "--pairs", "8"], "--lam is a share"),
        (["--arms", "neurons", "--pairs", "8"], "--arms: unknown arm"),
        (["--gain-lr", "0"], "--gain-lr must be positive"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_any_work(argv, message):
    with pytest.raises(InputError, match=message):
        presets.parse(["--preset", "tiny", "--run", "/nowhere/yet", *argv])


def test_arms_have_one_name():
    assert arms.expand(["neurons256_lam0.5", "neurons256", "neurons256_lam0.80"], 4) == [
        "neurons256",
        "neurons256_lam0.8",
    ]
    assert families.words("randomneurons8_lam1", 4) == "8 + 8 random neurons at lam 1"


# A run


def test_the_run_passes_its_audit(finished, capsys):
    assert audit.main(finished) == 0
    told = capsys.readouterr().out
    assert "neurons.parquet: ranks" in told and "adapter neurons16-maml-21" in told


def test_pairs_are_two_forms_of_requests_that_nothing_else_has(finished):
    calibration = rows(finished, "01_calibrate/calibration.parquet", schemas.EXAMPLES)
    plain, attacked = ([row for row in calibration if row["role"] == role] for role in drawing.PAIR)
    assert len(plain) == len(attacked) == 8
    assert [row["entry"] for row in plain] == [row["entry"] for row in attacked]
    assert all(one["prompt"] != other["prompt"] for one, other in zip(plain, attacked, strict=True))
    others = {row["entry"] for row in calibration if row["role"] not in drawing.PAIR}
    for name in ("alignment", "benchmarks"):
        others |= {row["entry"] for row in rows(finished, f"01_calibrate/{name}.parquet", schemas.EXAMPLES)}
    assert not others & {row["entry"] for row in plain}


def test_pairs_are_no_part_of_the_sweep(finished):
    calibration = rows(finished, "01_calibrate/calibration.parquet", schemas.EXAMPLES)
    for file, schema, role in (
        ("sweep_choices", schemas.SWEEP_CHOICES, "util"),
        ("sweep_generations", schemas.SWEEP_GENERATIONS, "safe"),
    ):
        swept = {row["example_id"] for row in rows(finished, f"03_sensitivity/{file}.parquet", schema)}
        assert swept == {row["example_id"] for row in calibration if row["role"] == role}
    assert not (finished / "03_sensitivity" / "sweep_answers.parquet").exists()


def test_wildjailbreaks_pairs_are_its_own_two_columns(tmp_path, monkeypatch):
    put(
        tmp_path,
        "wildjailbreak_train",
        [
            {
                "vanilla": f"How do I do {n}?",
                "adversarial": f"Pretend that you do {n}." if kind == "adversarial_harmful" else "",
                "completion": f"I can't help with {n}.",
                "data_type": kind,
            }
            for n in range(6)
            for kind in ("adversarial_harmful", "vanilla_harmful")
        ],
    )
    monkeypatch.setenv("CAST_DATA", str(tmp_path))
    settings = dataclasses.replace(SETTINGS, safe_source="wildjailbreak_safe", pairs=4)
    assert drawing.pair_pools(settings) == ("wildjailbreak_plain", "wildjailbreak_attacked")
    pairs, short = drawing.draw_pairs(settings, drawing.Pools(settings), set(), [0])
    assert len(pairs) == 4 and not short
    for plain, attacked in pairs:
        number = plain.prompt.split()[-1].rstrip("?")
        assert attacked.prompt == f"Pretend that you do {number}." and attacked.entry == plain.entry
        assert attacked.target == plain.target == f"I can't help with {number}."
    assert len(sources.load("wildjailbreak_attacked").records) == 6


def test_arms_of_neurons_are_in_every_table(finished):
    told = {row["arm"]: row for row in rows(finished, "04_align/arms.parquet", schemas.ARMS)}
    assert [name for name, row in told.items() if row["optimizer"] == "maml"] == [
        "randomneurons16",
        "neurons0",
        "neurons0_lam0.9",
        "neurons16",
        "neurons16_lam0.9",
    ]
    assert told["neurons16"]["n_neurons"] == told["randomneurons16"]["n_neurons"] > 16
    assert told["neurons16"]["mean_score"] is None and told["full"]["safety_neurons"] == []
    training = rows(finished, "04_align/training.parquet", schemas.TRAINING)
    steps = {arm: sum(row["arm"] == arm for row in training) for arm in told}
    assert steps["neurons16"] == steps["randomneurons16"] == 3 and steps["neurons0"] == 0
    report = finished / "06_correlate"
    for name in (
        "tables/table_neurons.csv",
        "figures/neurontune_pareto.svg",
        "figures/neurontune_threshold.svg",
    ):
        assert (report / name).is_file(), name
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "16 + 16 neurons at lam 0.9" in page and "third party" in page and "ours" in page
    assert "of 2 arms the safest, brought safety to" in page


def test_the_summary_tells_of_the_safest_neurons_and_their_control():
    told = [
        ("base", 0.1, 0.8, None),
        ("neurons0", 0.1, 0.8, None),
        ("neurons16", 0.3, 0.7, 0.5),
        ("neurons64", 0.5, 0.6, 0.5),
        ("randomneurons64", 0.1, 0.75, None),
        ("randomneurons16", 0.2, 0.75, 0.5),
    ]
    means = [
        {"arm": arm, "safety": safety, "utility": utility, "ucr_of_means": ucr}
        for arm, safety, utility, ucr in told
    ]
    said = findings.neurons(means, 4).replace("\N{MINUS SIGN}", "-")
    assert said == (
        "NeuronTune: 64 + 64 neurons, of 2 arms the safest, brought safety to 50.0 % (+40.0 points) and "
        "utility to 60.0 % (-20.0 points), at a UCR of 0.50; as many random neurons left them at 10.0 % and "
        "75.0 %."
    )
    alone = findings.neurons(means[:3], 4)
    assert "16 + 16 neurons brought" in alone and "random" not in alone
    assert findings.neurons(means[:2], 4) == ""


def test_all_gains_1_answer_as_the_base_model(finished):
    given: dict[str, dict] = {}
    for row in rows(finished, "05_evaluate/responses.parquet", schemas.RESPONSES):
        given.setdefault(row["arm"], {})[row["example_id"]] = (row["output"], row["probability"])
    same = {
        arm: all(str(answers[one]) == str(given["base"][one]) for one in given["base"])
        for arm, answers in given.items()
    }
    assert same["neurons0"] and not same["neurons16"]


def test_both_backends_agree(finished, flax, capsys):
    assert audit.main(flax) == 0
    assert compare.main(finished, flax) == 0
    told = capsys.readouterr().out
    assert "neurons' safety" in told and "neurons' utility" in told and "gains" in told


def test_a_dry_run_counts_them(finished, tmp_path, capsys):
    dry_run.main(dataclasses.replace(SETTINGS, run=str(tmp_path / "planned")))
    told = capsys.readouterr().out
    assert "attributions of" in told and "5 arms of neurons, 3 outer steps" in told


# What the audit sees


@pytest.fixture()
def copy(finished, scratch) -> Path:
    shutil.copytree(finished, scratch / "run")
    return scratch / "run"


def resealed(folder: Path, relative: str) -> None:
    """Gives a changed file its new hash in every manifest, as who hides a change would."""
    stage, file = relative.split("/", 1)
    digest = artifacts.sha256(folder / relative)
    for path in folder.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        if path.parent.name == stage:
            manifest["outputs"][file] = digest
        elif relative in manifest["inputs"]:
            manifest["inputs"][relative] = digest
        artifacts.write_json(path, manifest)


@pytest.mark.parametrize(
    "value, neuron, message",
    [
        (0.5, "safety", "allowed is 1.0 to inf"),
        (1.5, "utility", "allowed is 0.0 to 1.0"),
        (1.1, None, "to 1.0"),
    ],
)
def test_a_gain_out_of_its_bounds_is_found(copy, value, neuron, message, capsys):
    told = {row["arm"]: row for row in rows(copy, "04_align/arms.parquet", schemas.ARMS)}["neurons16"]
    taken = told["safety_neurons"] + told["utility_neurons"]
    layer, at = (
        told[f"{neuron}_neurons"][0] if neuron else next([0, n] for n in range(99) if [0, n] not in taken)
    )
    relative = "04_align/adapters/neurons16-maml-21/adapter_model.safetensors"
    tensors = load_file(copy / relative)
    tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.ia3_l"][0, at] = value
    save_file(tensors, copy / relative, metadata={"format": "pt"})
    resealed(copy, relative)
    assert audit.main(copy) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and "adapter neurons16-maml-21" in failed[0] and message in failed[0]


def test_other_neurons_than_the_scores_give_are_found(copy, capsys):
    relative = "04_align/arms.parquet"
    table = rows(copy, relative, schemas.ARMS)
    own = next(row for row in table if row["arm"] == "neurons16")
    own["safety_neurons"][0] = [own["safety_neurons"][0][0], (own["safety_neurons"][0][1] + 1) % 8]
    artifacts.write_table(copy / relative, table, schemas.ARMS)
    resealed(copy, relative)
    assert audit.main(copy) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any("neurons16-maml-21: safety_neurons are not those" in line for line in failed)


def test_scores_and_ranks_that_do_not_fit_are_found(copy, capsys):
    relative = "02_conflict/neurons.parquet"
    table = rows(copy, relative, schemas.NEURONS)
    table[0]["safety"] *= 100
    artifacts.write_table(copy / relative, table, schemas.NEURONS)
    resealed(copy, relative)
    assert audit.main(copy) == 1
    assert "FAIL neurons.parquet: ranks: (0, 0): safety_rank" in capsys.readouterr().out
