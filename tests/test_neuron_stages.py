"""NeuronTune through stages 01 to 05, on the tiny model: pairs, scores, arms."""

import numpy as np

from data.sampling import PAIR
from stages.method.arms import MAML
from stages.run.schemas import (
    ALIGNMENT,
    ARMS,
    BENCHMARKS,
    CALIBRATION,
    NEURONS,
    RESPONSES,
    SWEEP_CHOICES,
    SWEEP_GENERATIONS,
    TRAINING,
)
from stages.run.store import RunFolder


def test_pairs_are_two_forms_of_requests_that_nothing_else_has(neurons_run):
    run = RunFolder(neurons_run)
    calibration = run.read(CALIBRATION)
    plain, attacked = (calibration[calibration["split"] == split] for split in PAIR)
    assert len(plain) == 8 and plain["entry"].tolist() == attacked["entry"].tolist()
    assert (plain["prompt"].to_numpy() != attacked["prompt"].to_numpy()).all()
    others = [calibration[~calibration["split"].isin(PAIR)], run.read(ALIGNMENT), run.read(BENCHMARKS)]
    assert not set(plain["entry"]) & {entry for rows in others for entry in rows["entry"]}


def test_pairs_are_no_part_of_the_sweep(neurons_run):
    run = RunFolder(neurons_run)
    calibration = run.read(CALIBRATION)
    for table, split in ((SWEEP_CHOICES, "util"), (SWEEP_GENERATIONS, "safe")):
        own = calibration[calibration["split"] == split]
        assert set(run.read(table)["example_id"]) == set(own["example_id"])


def test_the_neurons_of_an_arm_are_those_of_the_best_ranks(neurons_run):
    run = RunFolder(neurons_run)
    scored, arms = run.read(NEURONS), run.read(ARMS).set_index("arm")
    assert (np.sort(scored["safety_rank"]) == np.arange(len(scored))).all()
    best = scored.loc[scored["safety_score"].idxmax()]
    assert best["safety_rank"] == 0
    chosen = [list(neuron) for neuron in arms.loc["neurons16", "safety_neurons"]]
    assert [best["layer"], best["neuron"]] in chosen
    first = scored[(scored["safety_rank"] < 16) | (scored["utility_rank"] < 16)]
    assert arms.loc["neurons16", "n_neurons"] == len(first) == arms.loc["randomneurons16", "n_neurons"]
    drawn = [list(neuron) for neuron in arms.loc["randomneurons16", "safety_neurons"]]
    assert drawn != chosen


def test_arms_of_neurons_are_in_every_table(neurons_run):
    run = RunFolder(neurons_run)
    arms, training = run.read(ARMS), run.read(TRAINING)
    own = arms[arms["optimizer"] == MAML]
    assert own["arm"].tolist() == [
        "randomneurons16",
        "neurons0",
        "neurons0_lam0.9",
        "neurons16",
        "neurons16_lam0.9",
    ]
    assert own["neurons"].tolist() == [16, 0, 0, 16, 16] and own["lam"].tolist() == [0.5, 0.5, 0.9, 0.5, 0.9]
    assert own["mean_conflict_score"].isna().all() and own["bucket"].isna().all()
    assert arms[arms["arm"] == "full"]["neurons"].isna().all()
    steps = training.groupby("arm").size()
    assert steps["neurons16"] == steps["randomneurons16"] == 3 and "neurons0" not in steps


def test_all_gains_1_answer_as_the_base_model(neurons_run):
    responses = RunFolder(neurons_run).read(RESPONSES)
    columns = ["example_id", "output", "probability"]
    base, none, some = (
        responses[responses["arm"] == arm][columns].reset_index(drop=True)
        for arm in ("base", "neurons0", "neurons16")
    )
    assert base.equals(none) and not base.equals(some)
    assert len(base) == 20
