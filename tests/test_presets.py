"""Command lines: what is wrong ends in one line and exit code 2."""

import dataclasses
import subprocess
import sys

import pytest

from backends.errors import InputError
from data import benchmarks
from stages import artifacts, presets
from tests.conftest import ROOT


def test_presets_resolve_and_options_override():
    for preset in presets.PRESETS:
        settings = presets.parse(["--preset", preset, "--run", "/nowhere/yet"])
        assert settings.preset == preset and settings.run == "/nowhere/yet"
        assert benchmarks.asked(settings.benchmarks, False, False)
    settings = presets.parse(["--preset", "smollm", "--seeds", "1", "2", "--lr", "0.5", "--run=/nowhere/yet"])
    assert settings.seeds == (1, 2) and settings.lr == 0.5


def test_the_papers_protocol_is_the_papers():
    """Section 4.1, Tables 3 and 4."""
    for preset in ("llama", "qwen", "mistral"):
        settings = presets.preset_settings(preset)
        assert (settings.rank, settings.alpha, settings.lr, settings.epochs) == (32, 32.0, 1e-4, 1)
        assert (settings.batch, settings.accumulation, settings.max_length) == (4, 2, 1024)
        assert (settings.util_rows, settings.safe_rows, settings.align_rows) == (500, 500, 10_000)
        assert settings.seeds == (21, 42, 84) and settings.buckets == 4
        tokens = {one.name: one.new_tokens for one in benchmarks.asked(settings.benchmarks, False, False)}
        assert tokens["gsm8k"] == 1024 and tokens["math"] == 2048 and tokens["mmlu"] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "nope"], "unknown preset 'nope'"),
        (["--preset", "./no/folder"], "no model folder ./no/folder"),
        (["--presett", "tiny"], "unknown option --presett"),
        (["--rank", "many"], "--rank"),
        (["--mask", "keys"], "--mask"),
        (["--rank", "0"], "--rank must be positive"),
        (["--align-rows", "6"], "multiple of 4"),
        (["--util-rows", "14"], "multiple of --folds"),
        (["--util-rows", "2"], "fewer than --folds"),
        (["--arms", "bucket9"], "unknown arm 'bucket9'"),
        (["--seeds", "1", "1"], "twice"),
        (["--util", "/no/file.jsonl"], "no file /no/file.jsonl"),
        (["--model-parallel", "-1", "--backend", "flax"], "must not be negative"),
    ],
)
def test_bad_command_lines_are_one_line(argv, message):
    with pytest.raises(InputError, match=message) as raised:
        presets.parse(["--run", "/nowhere/yet", *argv])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("texts", "own", "message"),
    [
        (("nope=5",), (False, False), "unknown benchmark 'nope'"),
        (("facts=x", "vanilla=5"), (False, False), "should be name=rows"),
        (("facts=5",), (False, False), "at least one safety"),
        (("vanilla=5",), (False, False), "at least one utility"),
        (("facts=5", "mmlu=5", "vanilla=5"), (False, False), "only one of"),
        (("own_util=5", "vanilla=5"), (False, False), "needs rows of your own"),
    ],
)
def test_bad_benchmarks_are_named(texts, own, message):
    with pytest.raises(InputError, match=message):
        benchmarks.asked(texts, *own)


def test_own_rows_stand_in_for_the_presets():
    asked = benchmarks.asked(("facts=5", "words=5", "vanilla=5", "benign=5"), True, True)
    assert [one.name for one in asked] == ["benign", "own_util", "own_safe"]


def test_a_run_keeps_its_settings(scratch):
    settings = dataclasses.replace(presets.preset_settings("tiny"), run=str(scratch), seeds=(5,))
    presets.remember(settings)
    assert presets.parse(["--run", str(scratch)]) == settings
    assert presets.parse(["--preset", "tiny", "--run", str(scratch), "--rank", "2"]).rank == 2
    with pytest.raises(InputError, match="belongs to preset tiny, not smollm"):
        presets.parse(["--preset", "smollm", "--run", str(scratch)])
    stored = artifacts.read_json(scratch / presets.RUN_FILE) | {"warp": 9}
    artifacts.write_json(scratch / presets.RUN_FILE, stored)
    with pytest.raises(InputError, match="warp"):
        presets.parse(["--run", str(scratch)])


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        presets.parse(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for field in dataclasses.fields(presets.Settings):
        assert f"--{field.name.replace('_', '-')}" in told


@pytest.mark.parametrize(
    "module", ["01_calibrate", "02_conflict", "03_sensitivity", "04_align", "05_evaluate"]
)
def test_stages_end_with_one_line_and_code_2(module, scratch):
    ended = subprocess.run(
        [sys.executable, "-m", f"stages.{module}", "--run", str(scratch / "run"), "--rank", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: --rank must be positive, not 0\n"
