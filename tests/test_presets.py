"""Presets and a run's own settings; what is refused is in test_refusals."""

import pytest

from data.benchmarks import parse_benchmarks
from stages.run import presets
from stages.run.job import Job
from stages.run.pipeline import declaration
from stages.run.settings import GROUP_OF, option


def test_presets_parse_and_options_override():
    for preset in presets.PRESETS:
        settings = presets.parse(["--preset", preset, "--run", "/nowhere/yet"])
        assert settings.run.preset == preset and str(settings.folder) == "/nowhere/yet"
        assert settings.benchmarks and settings.arm_runs
    settings = presets.parse(["--preset", "smollm", "--seeds", "1", "2", "--lr", "0.5", "--run=/nowhere/yet"])
    assert settings.tuning.seeds == (1, 2) and settings.tuning.lr == 0.5


def test_the_papers_protocol_is_the_papers():
    """Section 4.1, Tables 3 and 4."""
    for preset in ("llama", "qwen", "mistral"):
        settings = presets.preset_settings(preset)
        tuning, data = settings.tuning, settings.data
        assert (tuning.rank, tuning.alpha, tuning.lr, tuning.epochs) == (32, 32.0, 1e-4, 1)
        assert (tuning.batch, tuning.accumulation, data.max_length) == (4, 2, 1024)
        assert (data.util_rows, data.safe_rows, data.align_rows) == (500, 500, 10_000)
        assert tuning.seeds == (21, 42, 84) and settings.map.buckets == 4 and settings.model.paper == preset
        tokens = {benchmark.name: benchmark.new_tokens for benchmark in settings.benchmarks}
        assert tokens["gsm8k"] == 1024 and tokens["math"] == 2048 and tokens["mmlu"] == 0


def test_the_study_is_smollm_with_more_arms():
    """The same rows, map and recipe, beside it a map of sums; six arms with three seeds, 32 draws with a seed
    each."""
    smollm, study = (presets.preset_settings(name) for name in ("smollm", "smollm-study"))
    assert [(spec.name, spec.pool, spec.rows) for spec in study.maps[1:]] == [("sums", "embedded/sums", 96)]
    study = study.replace(maps=())
    for group in ("model", "data", "map", "evaluation"):
        assert getattr(study, group) == getattr(smollm, group)
    assert study.replace(seeds=smollm.tuning.seeds, ablations=()).tuning == smollm.tuning
    assert smollm.map.sensitivity == "gradient" and smollm.model.dtype == "float32"
    named = [run for run in study.arm_runs if run.arm.draw is None]
    drawn = [run for run in study.arm_runs if run.arm.draw is not None]
    assert {(run.arm.name, run.seed) for run in named} == {
        (name, seed)
        for name in ("full", "random", "bucket1", "bucket2", "bucket3", "bucket4")
        for seed in (21, 42, 84)
    }
    assert len({run.seed for run in drawn}) == len(drawn) == 32 and len(named) == 18
    assert set(run.optimizer for run in study.arm_runs) == {"sft"}


def test_own_rows_replace_the_presets():
    found = parse_benchmarks(("facts=5", "words=5", "vanilla=5", "benign=5"), own_util=True, own_safe=True)
    assert [benchmark.name for benchmark in found] == ["benign", "own_util", "own_safe"]


def test_a_run_keeps_its_settings(scratch):
    settings = presets.preset_settings("tiny").replace(run=str(scratch), seeds=(5,))
    stage = declaration("01_calibrate")
    Job(stage, settings).remember()
    Job(stage, settings.replace(shard="1/2", lr=5.0)).remember()  # a shard leaves them as they are
    assert presets.parse(["--run", str(scratch)]) == settings
    assert presets.parse(["--preset", "tiny", "--run", str(scratch), "--rank", "2"]).tuning.rank == 2


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        presets.parse(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert [name for name in GROUP_OF if option(name) not in output] == []
