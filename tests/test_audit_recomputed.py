"""Numbers, rows and weights that were tampered with, and every hash along the chain made right again.

Only computing them again can tell: each test demands a failure that names the place.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from stages import artifacts, audit, schemas
from stages.auditing import audit_checks, audit_weights
from stages.auditing.audit_run import BASE
from stages.reporting import costs
from tests.tampering import (
    ADAPTER,
    ARMS,
    BENCHMARKS,
    CALIBRATION,
    CHOICES,
    COSTS,
    GENERATIONS,
    HEADS,
    RESPONSES,
    SCORES,
    copied,
    edit,
    edit_manifest,
    failures,
    finished_run,
    reseal,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture()
def run(finished, tmp_path) -> Path:
    return copied(finished, tmp_path)


@pytest.mark.parametrize("column", ["dot", "norm_safe", "conflict", "conflict_high"])
def test_an_edited_gradient_fails(run, column, capsys):
    relative = "02_conflict/gradients.parquet"
    edit(run, relative, lambda rows: rows[5].update({column: rows[5][column] * (1 + 1e-7)}))
    failed = failures(run, capsys)
    assert any(
        f"FAIL gradients.parquet from its Gram matrices: (1, 1): {column} is" in line for line in failed
    )


def test_a_changed_refusal_in_the_sweep_fails(run, capsys):
    edit(run, GENERATIONS, lambda rows: rows[30].update(refused=not rows[30]["refused"]))
    row = artifacts.read_table(run / GENERATIONS, schemas.SWEEP_GENERATIONS).to_pylist()[30]
    place = (row["layer"], row["head"], row["example_id"])
    assert any(f"{place}: refused is {row['refused']}" in line for line in failures(run, capsys))


def test_a_changed_text_in_the_sweep_fails_whatever_its_flag(run, capsys):
    edit(run, GENERATIONS, lambda rows: rows[30].update(text="I cannot help with that.", refused=True))
    failed = "\n".join(failures(run, capsys))
    assert "sweep_generations.parquet: text: (1, 2," in failed and "heads.parquet from gradients" in failed


def test_a_sweep_of_rows_of_no_map_fails(run, capsys):
    swept = artifacts.read_table(run / GENERATIONS, schemas.SWEEP_GENERATIONS).drop_columns("refused")
    correct = [False] * len(swept)
    relative = "03_sensitivity/sweep_answers.parquet"
    artifacts.write_table(run / relative, swept.append_column("correct", [correct]), schemas.SWEEP_ANSWERS)
    reseal(run)
    (failed,) = failures(run, capsys)
    assert f"{relative}: no row of a map asks for it" in failed


def test_a_changed_answer_in_the_sweep_fails(run, capsys):
    edit(run, CHOICES, lambda rows: rows[20].update(correct=not rows[20]["correct"]))
    assert any("sweep_choices.parquet: correct: (0, 1," in line for line in failures(run, capsys))


@pytest.mark.parametrize("relative", [CHOICES, GENERATIONS])
def test_a_sweep_row_twice_fails(run, relative, capsys):
    edit(run, relative, lambda rows: rows.__setitem__(9, rows[8]))
    assert any(f"{relative}, row 9: is" in line for line in failures(run, capsys))
    edit(run, relative, lambda rows: rows.pop())
    assert any(f"{relative}: " in line and "(heads x rows)" in line for line in failures(run, capsys))


def test_swapped_buckets_fail(run, capsys):
    def swap(rows):
        one, other = (next(row for row in rows if row["bucket"] == number) for number in (1, 4))
        one["bucket"], other["bucket"] = 4, 1

    edit(run, HEADS, swap)
    failed = failures(run, capsys)
    assert any("heads.parquet from gradients and sweep" in line and "bucket is" in line for line in failed)


@pytest.mark.parametrize("column", ["h_gen", "sensitivity", "score", "score_low", "bucket_probability"])
def test_an_edited_map_fails(run, column, capsys):
    def change(rows):
        values = np.array(rows[7][column], dtype=np.float64)
        rows[7][column] = (values / 2 + 0.125).tolist()

    edit(run, HEADS, change)
    assert any(f"(1, 3): {column} is" in line for line in failures(run, capsys))


def test_an_edited_score_fails(run, capsys):
    edit(run, SCORES, lambda rows: rows[2].update(score=rows[2]["score"] + 0.25))
    assert any(
        "scores.parquet from the verdicts: base--1 adversarial: score is" in line
        for line in failures(run, capsys)
    )


def test_an_edited_verdict_fails(run, capsys):
    edit(run, RESPONSES, lambda rows: rows[20].update(verdict=not rows[20]["verdict"]))
    row = artifacts.read_table(run / RESPONSES, schemas.RESPONSES).to_pylist()[20]
    failed = failures(run, capsys)
    assert any("responses.parquet judged again" in line and row["example_id"] in line for line in failed)


def test_an_edited_output_fails_the_scores_though_its_verdict_fits(run, capsys):
    def refuse(rows):
        row = next(row for row in rows if row["benchmark"] == "adversarial" and not row["verdict"])
        row.update(output="I cannot help with that.", verdict=True)

    edit(run, RESPONSES, refuse)
    failed = "\n".join(failures(run, capsys))
    assert "scores.parquet from the verdicts: base--1 adversarial" in failed
    assert "costs.csv from the verdicts: base--1: adversarial is" in failed


def test_a_prediction_that_is_not_its_output_fails(run, capsys):
    edit(run, RESPONSES, lambda rows: rows[0].update(prediction=rows[0]["prediction"] + 1))
    assert any(
        "output, token ids, prediction and probability do not fit" in line for line in failures(run, capsys)
    )


@pytest.mark.parametrize("column", ["ucr", "utility", "flag", "over_refusal_cr"])
def test_an_edited_cost_fails(run, column, capsys):
    lines = (run / COSTS).read_text().splitlines()
    cells, at = lines[2].split(","), lines[0].split(",").index(column)
    cells[at] = "" if column == "flag" else "0.125"
    (run / COSTS).write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    reseal(run)
    assert any(
        f"costs.csv from the verdicts: random-21: {column} is" in line for line in failures(run, capsys)
    )


def test_costs_are_those_of_stage_06(finished):
    """On scores where safety and utility move: two programs of one formula."""
    run = audit.open_run(finished)
    generator = np.random.default_rng(0)
    run.scores = {(label, name): float(generator.random()) for label in run.labels for name in run.benchmarks}
    sides = {"facts": "utility", "problems": "utility", "adversarial": "safety", "benign": "over-refusal"}
    rows = [
        dict(zip(("arm", "optimizer", "seed"), label, strict=True))
        | {"benchmark": name, "side": sides[name], "n": 10, "score": score}
        for (label, name), score in run.scores.items()
    ]
    for row in costs.arm_costs(rows, run.arms, "facts"):
        expected = audit_checks.expected_costs(run, (row["arm"], row["optimizer"], row["seed"]))
        for column, value in expected.items():
            stored = np.nan if row[column] is None else row[column]
            np.testing.assert_equal(stored, value, err_msg=column)
    assert np.isnan(audit_checks.expected_costs(run, BASE)["ucr"])


# Resealed: budgets, weights, leaks, tokens


def test_an_arm_with_a_head_more_fails(run, capsys):
    def more(rows):
        arm = next(row for row in rows if row["arm"] == "bucket4")
        own = set(zip(arm["layers"], arm["heads"], strict=True))
        heads = sorted([*own, min(set(np.ndindex(3, 4)) - own)])
        arm["layers"], arm["heads"] = ([head[axis] for head in heads] for axis in (0, 1))
        arm["n_heads"] = len(heads)

    edit(run, ARMS, more)
    failed = failures(run, capsys)
    assert any(
        "arms are the heads of their buckets: bucket4-sft-21: 4 heads, heads.parquet gives 3" in line
        for line in failed
    )


def test_another_random_draw_fails(run, capsys):
    def redraw(rows):
        rows[0]["heads"] = [(head + 1) % 4 for head in rows[0]["heads"]]

    edit(run, ARMS, redraw)
    assert any("arms are the heads of their buckets: random-sft-21" in line for line in failures(run, capsys))


def test_unequal_parameters_steps_rows_and_rates_fail(run, capsys):
    edit(run, ARMS, lambda rows: rows[1].update(trainable_parameters=rows[1]["trainable_parameters"] + 1))
    assert any(
        "trainable_parameters is" in line and "bucket1-sft-21" in line for line in failures(run, capsys)
    )
    relative = "04_align/training.parquet"
    edit(run, relative, lambda rows: (rows[0].update(tokens=9), rows[1].update(lr=1.0)))
    failed = "\n".join(failures(run, capsys))
    assert "random-sft-21 step 0: tokens is 9" in failed and "random-sft-21 step 1: lr is 1.0" in failed
    edit(run, relative, lambda rows: rows.pop())
    assert any(
        "bucket4-sft-21: 1 steps in training.parquet, 2 asked" in line for line in failures(run, capsys)
    )


def frozen_row(run: Path) -> tuple[str, int, int]:
    """(name of B, layer, a row of it that no head of bucket4 has)."""
    arm = artifacts.read_table(run / ARMS, schemas.ARMS).to_pylist()[2]
    layer = arm["layers"][0]
    own = {head for at, head in zip(arm["layers"], arm["heads"], strict=True) if at == layer}
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight"
    return name, layer, 16 * min(set(range(4)) - own)


def edit_adapter(run: Path, change) -> None:
    tensors = load_file(run / ADAPTER)
    change(tensors)
    save_file(tensors, run / ADAPTER, metadata={"format": "pt"})
    reseal(run)


def test_a_frozen_row_that_moved_fails(run, capsys):
    name, layer, row = frozen_row(run)
    edit_adapter(run, lambda tensors: tensors[name].__setitem__((row, 0), 0.25))
    (line,) = failures(run, capsys)
    assert f"bucket4-sft-21: layer {layer}: 1 frozen rows of B are not zero (first: row {row})" in line
    assert f"merged, row {row} of layer {layer}'s W_q changes" in line


def test_a_frozen_row_too_small_to_change_the_merged_weights_fails(run, capsys):
    name, layer, row = frozen_row(run)
    edit_adapter(run, lambda tensors: tensors[name].__setitem__((row, 0), 1e-30))
    (line,) = failures(run, capsys)
    assert "frozen rows of B are not zero" in line and "merged" not in line


def test_an_adapter_that_learned_nothing_or_is_not_finite_or_elsewhere_fails(run, capsys):
    _, layer, _ = frozen_row(run)
    stem = f"base_model.model.model.layers.{layer}.self_attn"
    edit_adapter(run, lambda tensors: [tensors[name].fill(0) for name in tensors if "lora_B" in name])
    assert any("no chosen row of B has moved" in line for line in failures(run, capsys))
    edit_adapter(run, lambda tensors: tensors[f"{stem}.q_proj.lora_A.weight"].fill(np.nan))
    assert any(f"layer {layer}: A or B is not finite" in line for line in failures(run, capsys))
    edit_adapter(run, lambda tensors: tensors.update({f"{stem}.v_proj.lora_A.weight": np.zeros((4, 64))}))
    assert any("which is no LoRA of W_q" in line for line in failures(run, capsys))


def test_an_adapter_of_other_settings_fails(run, capsys):
    path = (run / ADAPTER).with_name("adapter_config.json")
    config = artifacts.read_json(path) | {"lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
    path.write_text(json.dumps(config))
    reseal(run)
    (line,) = failures(run, capsys)
    assert "lora_alpha is 8.0, not 4.0" in line and "target_modules is ['q_proj', 'v_proj']" in line


def test_fewer_rows_than_asked_for_fail(run, capsys):
    edit(run, BENCHMARKS, lambda rows: rows.pop())
    edit(run, "01_calibrate/alignment.parquet", lambda rows: rows[0].update(role="vanilla_benign"))
    failed = "\n".join(failures(run, capsys))
    assert "benign: 2 rows, 3 asked" in failed
    assert "vanilla_harmful: 3 rows, 4 asked" in failed and "vanilla_benign: 5 rows, 4 asked" in failed


@pytest.mark.parametrize("key", ["entry", "example_id", "prompt"])
def test_a_row_shared_by_calibration_and_benchmarks_fails(run, key, capsys):
    row = artifacts.read_table(run / CALIBRATION, schemas.EXAMPLES).to_pylist()[0]
    value = f"  {row['prompt'].upper()}!" if key == "prompt" else row[key]
    edit(run, BENCHMARKS, lambda rows: rows[3].update({key: value}))
    what = "normalised prompt" if key == "prompt" else key
    failed = failures(run, capsys)
    assert any(f"FAIL no shared {what}: util {row['example_id']} and benchmarks" in line for line in failed)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("prompt_ids", lambda ids: [ids[0], *ids]),
        ("target_ids", lambda ids: ids[::-1] + [7]),
        ("rendered", lambda text: text + " "),
        ("answer", lambda answer: answer + 1),
    ],
)
def test_other_tokens_fail(run, column, change, capsys):
    edit(run, CALIBRATION, lambda rows: rows[2].update({column: change(rows[2][column])}))
    example_id = artifacts.read_table(run / CALIBRATION, schemas.EXAMPLES).to_pylist()[2]["example_id"]
    failed = [line for line in failures(run, capsys) if line.startswith("FAIL token ids")]
    assert len(failed) == 1 and f"calibration {example_id}" in failed[0]


def test_a_model_folder_with_other_weights_or_tokenizer_fails(run, tmp_path, capsys):
    model = artifacts.stage_manifest(run, "01_calibrate")["notes"]["model_folder"]
    changed = Path(shutil.copytree(model, tmp_path / "model"))
    edit_manifest(run, "01_calibrate", lambda manifest: manifest["notes"].update(model_folder=str(changed)))
    assert failures(run, capsys) == []
    with open(changed / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    (changed / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    failed = "\n".join(failures(run, capsys))
    assert "holds other weights" in failed and "holds another one than stage 01 used" in failed


def test_without_the_model_folder_nothing_fails_and_what_was_not_checked_is_said(run, capsys):
    edit_manifest(run, "01_calibrate", lambda manifest: manifest["notes"].update(model_folder="/nowhere"))
    assert audit.main(run) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skip ")]
    assert len(skipped) == 6 and all("not on this machine" in line for line in skipped)
    name, _, row = frozen_row(run)
    edit_adapter(run, lambda tensors: tensors[name].__setitem__((row, 0), 0.25))
    assert any("frozen rows of B are not zero" in line for line in failures(run, capsys))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merging_is_computed_in_the_dtype_of_sharded_weights(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    names = [audit_weights.Q_PROJ.format(layer) for layer in range(2)]
    weights = [torch.randn(8, 6, generator=generator).to(getattr(torch, dtype)) for _ in names]
    for layer, (name, weight) in enumerate(zip(names, weights, strict=True)):
        save_torch({name: weight}, tmp_path / f"model-{layer}.safetensors")
    run = SimpleNamespace(model_folder=tmp_path, grid=(2, 4))
    held = audit_weights.base_weights(run)
    assert [held[layer].name for layer in range(2)] == ["model-0.safetensors", "model-1.safetensors"]
    a, b = np.ones((2, 6), np.float32), np.zeros((8, 2), np.float32)
    b[3], b[5] = 0.5, 1e-12  # the second is too small to change any rounded weight
    for layer in range(2):
        changed = audit_weights.changed_rows(held[layer], names[layer], a, b, scale=2.0)
        assert np.flatnonzero(changed).tolist() == [3]
