"""The audit passes a clean run, and names what was changed: files, manifests, rows, numbers, weights.

Where every hash along the chain is made right again, only computing a table again can find a change.
"""

import json
import shutil
import subprocess
import sys
from functools import partial
from operator import mul, not_
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backends.core.errors import InputError
from backends.core.files import sha256, write_json
from stages import audit
from stages.checks.files import files as file_check
from stages.checks.finished import FinishedRun, unequal
from stages.checks.recomputed import said
from stages.run import schemas as t
from stages.run.pipeline import STAGES
from stages.run.store import RUN_FILE, read_json, read_table, stage_files, write_table
from tests.conftest import ROOT
from tests.runs import NEURONS, make_run
from tests.tampering import cell, copied, edit, edit_adapter, edit_manifest, edit_settings, reseal

COSTS = "06_correlate/tables/costs.csv"
LORA, GAINS = "bucket4-sft-21", "neurons16-maml-21"
ADAPTER = f"04_align/adapters/{LORA}/adapter_model.safetensors"
DAMAGED = [table.path() for table in (t.NEURONS, t.SWEEP_CHOICES, t.ARMS, t.SCORES)]


@pytest.fixture(scope="module")
def finished(neurons_run, tmp_path_factory) -> Path:
    """All six stages."""
    folder = copied(neurons_run, tmp_path_factory.mktemp("audited"))
    return make_run(folder, NEURONS, STAGES[-1:])


@pytest.fixture()
def run(finished, scratch) -> Path:
    return copied(finished, scratch)


def audited(run: Path, capsys) -> str:
    """The lines of an audit that fail; it prints one for each check, whatever the others find."""
    capsys.readouterr()
    code, printed = audit.main(run), capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAIL ")]
    assert code == (1 if failed else 0) and printed.count("\n") == len(audit.CHECKS) + 1
    return "\n".join(failed)


def test_a_clean_run_passes_and_so_does_a_resealed_one(run, capsys):
    assert audit.main(run) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines) and f"{len(lines)} ok, 0 failed, 0 not" in last
    reseal(run)
    assert audited(run, capsys) == ""


def test_the_command_ends_with_1_on_failure_and_with_2_on_no_run(run):
    (run / "01_calibrate" / "notes.txt").write_text("mine")
    expected = {run: (1, "01_calibrate/notes.txt is not in the manifest"), run / "none": (2, "is no run")}
    for folder, (code, message) in expected.items():
        command = [sys.executable, "-m", "stages.audit", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code and message in (done.stdout or done.stderr)
        assert bool(done.stdout) == (code == 1) and (code == 1 or done.stderr.count("\n") == 1)


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_stage_names_its_command(run, stage):
    shutil.rmtree(run / stage)
    with pytest.raises(InputError, match=f"python -m stages.{stage} --run"):
        audit.main(run)


# Files, manifests, settings


def test_one_flipped_byte_in_any_file_fails(run):
    paths = [run / stage / file for stage in STAGES for file in stage_files(run / stage)]
    suffixes = {".parquet", ".safetensors", ".json", ".csv", ".md", ".svg", ".png", ".html"}
    assert suffixes <= {path.suffix for path in paths}
    for path in paths:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    faults, _ = file_check(FinishedRun(run))
    assert faults == [
        f"{path.relative_to(run)} is not what its manifest says (sha256)" for path in sorted(paths)
    ]


@pytest.mark.parametrize("files", [[t.CALIBRATION.path()], [*DAMAGED, ADAPTER]])
def test_damaged_files_are_failures_not_tracebacks(run, files, capsys):
    """Resealed, and every check is still made."""
    for path in (run / file for file in files):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    reseal(run)
    failed = audited(run, capsys)
    assert Path(files[0]).name in failed and "cannot be read" in failed


def test_changed_manifests_and_settings_fail(run, capsys):
    def change(manifest):
        manifest["schema"] = "cast-0"
        manifest["settings"]["seed"] = 7
        manifest["inputs"].popitem()
        manifest["notes"]["base"]["accuracy"] = 0.9
        del manifest["git"]

    edit_manifest(run, "03_sensitivity", change)
    edit_manifest(run, "04_align", lambda manifest: manifest["model"].update(weights_sha256="0" * 64))
    edit_manifest(run, "05_evaluate", lambda manifest: manifest["notes"].update(judge="0"))
    edit_settings(run, lr=0.25)
    (run / RUN_FILE).write_text(json.dumps(read_json(run / RUN_FILE)))
    failed = audited(run, capsys)
    for message in (
        "03_sensitivity has other fields: git; 03_sensitivity: schema is 'cast-0'",
        f"{RUN_FILE} was edited",
        f"{RUN_FILE} against 03_sensitivity: seed 0 -> 7; {RUN_FILE} against 04_align: lr 0.25 -> 0.1",
        "03_sensitivity does not name its input 02_conflict/gradients.parquet",
        "03_sensitivity joined again: notes: row 0: base.accuracy is 0.9",
        "FAIL model: 04_align: weights_sha256",
        "judges: 05_evaluate: version 0",
    ):
        assert message in failed, failed


def test_strange_missing_and_changed_files_fail(run, capsys):
    for relative in ("02_conflict/parts/more.parquet", "06_correlate/tables/.hidden", "07_more/a"):
        (run / relative).parent.mkdir(exist_ok=True)
        (run / relative).write_bytes(b"")
    failed = audited(run, capsys)
    assert "07_more belongs to no stage; 02_conflict/parts/more.parquet is not in the manifest" in failed
    assert "06_correlate/tables/.hidden is not in the manifest" in failed
    shutil.rmtree(run / "07_more")
    (run / "06_correlate" / "tables" / ".hidden").unlink()
    (run / "06_correlate" / "report.html").unlink()
    reseal(run)
    listed = {"parts/more.parquet": sha256(run / "02_conflict/parts/more.parquet")}
    edit_manifest(run, "02_conflict", lambda manifest: manifest["outputs"].update(listed))
    # 03's manifest is right about its own files, but 04 was made from another map.
    rows = read_table(run / t.HEADS.path(), t.HEADS.schema)
    write_table(run / t.HEADS.path(), rows[::-1], t.HEADS.schema)
    own = {t.HEADS.file(): sha256(run / t.HEADS.path())}
    edit_manifest(run, "03_sensitivity", lambda manifest: manifest["outputs"].update(own))
    failed = audited(run, capsys)
    assert "02_conflict/parts/more.parquet is no file of this stage" in failed
    assert "06_correlate/report.html is missing" in failed
    assert f"04_align was made from another {t.HEADS.path()}" in failed
    assert "heads.parquet: layer 0, head 0: layer is 2, recomputed 0" in failed


# Tables, every hash made right again


def one_head_more(rows):
    rows.at[1, "layers"], rows.at[1, "heads"] = [0, 0, 0, 0], [0, 1, 2, 3]


def refuse(rows):
    row = rows.index[(rows["benchmark"] == "adversarial") & ~rows["verdict"]][0]
    rows.loc[row, ["output", "verdict"]] = "I cannot help with that.", True


def last_gone(rows):
    return rows[:-1]


def swapped(rows):
    return rows.iloc[[0, 2, 1, *range(3, len(rows))]]


TAMPERED = [  # changes that do not hide one another, and what is said of each
    [
        (t.GRADIENTS, cell(5, "dot", partial(mul, 1 + 1e-7)), "gradients.parquet: layer 1, head 1: dot is"),
        (t.NEURONS, cell(0, "safety_score", partial(mul, 100)), "layer 0, neuron 0: safety_rank is"),
        (t.SWEEP_GENERATIONS, cell(30, "refused", not_), "generations.parquet: layer 0, head 2, ex"),
        (t.SWEEP_CHOICES, cell(20, "correct", not_), "choices.parquet: layer 0, head 0, ex"),
        (t.ARMS, cell(1, "lam", lambda old: 0.5), "arm bucket4, optimizer sft, seed 21: lam is 0.5"),
        (t.TRAINING, cell(0, "tokens", lambda old: 9), "arm full, optimizer sft, seed 21, step 0: tokens is"),
        (t.RESPONSES, cell(20, "verdict", not_), "responses.parquet: arm full, optimizer sft, se"),
        (t.SCORES, cell(2, "score_high", lambda old: 1.0), "arm base, benchmark adversarial: score_high is"),
        (t.CALIBRATION, cell(2, "prompt_ids", lambda ids: [ids[0], *ids]), ": prompt_ids is ["),
    ],
    [
        (
            t.GRADIENTS,
            cell(5, "optimization_conflict", partial(mul, 1 + 1e-7)),
            "1: optimization_conflict is",
        ),
        (t.SWEEP_GENERATIONS, last_gone, "generations.parquet: 103 rows, recomputed 104"),
        (t.SWEEP_CHOICES, cell(20, "head", lambda old: 3), "choices.parquet: layer 0, head 0, ex"),
        (t.ARMS, cell(5, "safety_neurons", lambda old: [[0, 1], *old[1:]]), "seed 21: safety_neurons is"),
        (t.TRAINING, cell(1, "lr", lambda old: 1.0), "seed 21, step 1: lr is 1.0"),
        (t.RESPONSES, swapped, "responses.parquet: arm base, benchmark facts, ex"),
        (t.CALIBRATION, cell(2, "target_ids", lambda ids: [*ids, 7]), ": target_ids is ["),
        (t.ALIGNMENT, cell(0, "split", lambda old: "vanilla_benign"), "vanilla_harmful: 11 rows"),
    ],
    [
        (t.SWEEP_GENERATIONS, cell(30, "text", lambda old: "No."), "texts: sweep_generations.parquet"),
        (t.SWEEP_CHOICES, swapped, "keys: sweep_choices.parquet: exam"),
        (t.ARMS, one_head_more, f"{LORA}: adapter_config.json: layers_to_transform"),
        (t.TRAINING, last_gone, "rows, recomputed"),
        (t.RESPONSES, refuse, "; responses.parquet: arm base, benchmark adversarial"),
        (t.SCORES, last_gone, "scores.parquet: 31 rows, recomputed 32"),
        (t.CALIBRATION, cell(2, "rendered", lambda text: text + " "), ": rendered differs"),
    ],
    [
        (t.HEADS, cell(7, "h_gen", lambda old: old + 0.125), "layer 1, head 3: h_gen is"),
        (t.HEADS, cell(7, "conflict_score_low", partial(mul, 0.5)), "head 3: conflict_score_low is"),
        (t.HEADS, cell(7, "bucket_probability", partial(mul, 0.5)), "head 3: bucket_probability is"),
        (t.RESPONSES, cell(0, "prediction", lambda old: old + 1), "texts: responses.parquet: arm base"),
        (t.CALIBRATION, cell(2, "answer", lambda old: 3 - old), ": answer is"),
    ],
    [
        (t.HEADS, cell(7, "functional_sensitivity", partial(mul, 0.5)), "head 3: functional_sensitivity is"),
        (t.ARMS, one_head_more, "arms.parquet: arm bucket4, optimizer sft, seed 21: layers is"),
        (t.RESPONSES, refuse, "scores.parquet: arm base, benchmark adversarial: score is"),
    ],
    [
        (t.HEADS, cell(7, "conflict_score", partial(mul, 0.5)), "layer 1, head 3: conflict_score is"),
        (t.BENCHMARKS, last_gone, "benign: 3 rows, 4 requested"),
        (t.ARMS, cell(1, "trainable_parameters", partial(mul, 2)), f"{LORA}: trainable_parameters is"),
    ],
    [(t.HEADS, lambda rows: rows.assign(bucket=5 - rows["bucket"]), "layer 0, head 0: bucket is")],
]


@pytest.mark.parametrize("changes", TAMPERED)
def test_tampered_tables_fail(run, changes, capsys):
    for table, change, _ in changes:
        edit(run, table, change)
    failed = audited(run, capsys)
    assert [message for _, _, message in changes if message not in failed] == [], failed


def test_a_sweep_that_no_row_needs_and_tampered_costs_fail(run, capsys):
    rows = read_table(run / t.SWEEP_GENERATIONS.path(), t.SWEEP_GENERATIONS.schema)
    write_table(run / t.SWEEP_ANSWERS.path(), rows.assign(correct=False), t.SWEEP_ANSWERS.schema)
    costs = pd.read_csv(run / COSTS).astype(object)
    columns = ["ucr", "over_refusal_cr", "flag"]
    costs.loc[1, columns] = 0.125, 0.125, None
    costs.to_csv(run / COSTS, index=False)
    reseal(run)
    failed = audited(run, capsys)
    assert "sweep_answers.parquet is not needed" in failed
    assert all(f"arm full, optimizer sft, seed 21: {column} is" in failed for column in columns)


def test_rows_shared_by_calibration_and_benchmarks_fail(run, capsys):
    row = read_table(run / t.CALIBRATION.path(), t.EXAMPLES).iloc[0]
    for place, column in enumerate(("entry", "example_id", "prompt")):
        value = f"  {row['prompt'].upper()}!" if column == "prompt" else row[column]
        edit(run, t.BENCHMARKS, cell(place, column, lambda old, value=value: value))
    failed = audited(run, capsys)
    for key in ("entry", "example_id", "normalised prompt"):
        assert f"share one {key}" in failed and f"util {row['example_id']} and benchmarks" in failed


def set_b(which: str, value: float, tensors: dict) -> None:
    """Sets rows of the first B: all, or the first of those that no head of the arm has."""
    b = next(tensor for name, tensor in tensors.items() if "lora_B" in name)
    b[np.flatnonzero(~b.any(axis=1))[0] if which == "frozen" else slice(None)] = value


def no_b(tensors):
    tensors |= {name: 0 * tensor for name, tensor in tensors.items() if "lora_B" in name}


def elsewhere(tensors):
    tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"] = np.zeros((4, 64), np.float32)


def set_gain(which: str, value: float, tensors: dict) -> None:
    """Sets a gain; one below 1 is a utility neuron's, one above 1 a safety neuron's."""
    tensor = next(tensor for tensor in tensors.values() if (tensor < 1).any() and (tensor > 1).any())
    place = {"safety": tensor > 1, "utility": tensor < 1, "frozen": tensor == 1}[which]
    tensor[0, np.flatnonzero(place)[0]] = value


@pytest.mark.parametrize(
    ("lora", "gain", "messages"),
    [
        (partial(set_b, "frozen", 0.25), ("safety", 0.5), ["1 frozen rows of B", "1.0 to inf"]),
        (partial(set_b, "frozen", 1e-30), ("utility", 1.5), ["1 frozen rows of B", "allowed is 0.0 to 1.0"]),
        (no_b, ("frozen", 1.1), ["nothing that it may move has moved", "allowed is 1.0 to 1.0"]),
        (partial(set_b, "all", np.nan), ("safety", np.nan), ["or not finite", "is nan, allowed is 1.0"]),
        (elsewhere, ("safety", 1.1), ["which is no part of this adapter"]),
    ],
)
def test_tampered_adapters_fail(run, lora, gain, messages, capsys):
    edit_adapter(run, LORA, lora)
    edit_adapter(run, GAINS, partial(set_gain, *gain))
    failed = audited(run, capsys)
    assert [message for message in messages if message not in failed] == [], failed


def test_an_adapter_of_other_settings_fails(run, capsys):
    path = run / "04_align" / "adapters" / LORA / "adapter_config.json"
    write_json(path, read_json(path) | {"lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"]})
    reseal(run)
    failed = audited(run, capsys)
    assert "lora_alpha 8.0 -> 4.0, target_modules ['q_proj', 'v_proj'] -> ['q_proj']" in failed


def test_a_model_folder_with_other_weights_config_or_tokenizer_fails(run, scratch, capsys):
    model = read_json(run / "01_calibrate" / "manifest.json")["notes"]["model_folder"]
    changed = Path(shutil.copytree(model, scratch / "model"))
    edit_manifest(run, "01_calibrate", lambda manifest: manifest["notes"].update(model_folder=str(changed)))
    with open(changed / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    (changed / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    write_json(changed / "config.json", read_json(changed / "config.json") | {"rms_norm_eps": 1e-3})
    failed = audited(run, capsys)
    for message in ("other weights", "other config", "another tokenizer than stage 01 used"):
        assert f"holds {message}" in failed


def test_without_the_model_folder_nothing_fails_and_what_was_not_checked_is_said(run, capsys):
    edit_manifest(run, "01_calibrate", lambda manifest: manifest["notes"].update(model_folder="/nowhere"))
    assert audit.main(run) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skip ")]
    assert len(skipped) == 3 and all("not on this machine" in line for line in skipped)
    edit_adapter(run, LORA, partial(set_b, "frozen", 0.25))
    assert "frozen rows of B are not zero" in audited(run, capsys)


def test_tables_differ_by_more_than_rounding_and_texts_are_not_shown():
    columns = {"seed": [1, None], "x": [1.0, None], "l": [[1, 2], []], "prompt": "bad"}
    stored = pd.DataFrame(columns, dtype=object)
    same = stored.assign(x=[1.0 + 1e-13, np.nan], l=[(1, 2), np.array([])])
    assert unequal(stored, same) == [] and unequal(stored, same[:1]) == ["2 rows, recomputed 1"]
    other = same.assign(x=[1.0 + 1e-11, 0.0], l=[[2, 1], []], prompt=["bad", "worse"])
    faults = [fault.split(" is ")[0] for fault in unequal(stored, other)]
    assert faults == ["seed 1: x", "row 1: x", "seed 1: l", "row 1: prompt differs"]


def test_a_special_token_that_is_predicted_is_an_answer():
    """Stage 05 shows it, where a response hides it."""
    answer = {"token_ids": np.array([]), "prediction": 2, "probability": 0.5}
    row = {"scoring": "choice", "choices": []}
    assert said(answer, row, lambda ids, skip_special: f"{ids} {skip_special}") == "(2,) False"
