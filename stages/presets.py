"""The settings of a run, the presets that fill them, and the command line that overrides them.

Every stage takes the whole `Settings`; each one records in its manifest the fields that its result depends
on. A run folder keeps its settings in run.json, so that `python -m stages.02_conflict --run outputs/smollm`
needs no more.
"""

import contextlib
import dataclasses
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import backends
from backends.errors import InputError
from stages import artifacts
from stages.locks import parse_shard

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Settings:
    """CAST: which attention heads of an instruct LLM can be safety-tuned without hurting its abilities.

    Stages: 01_calibrate, 02_conflict, 03_sensitivity, 04_align, 05_evaluate, 06_correlate; then
    `stages.audit`.
    """

    preset: str = "smollm"
    """smollm, llama, qwen, mistral, tiny; or the folder of a model of your own (Llama, Qwen2 or Mistral
    architecture)"""
    run: str = ""
    """folder of this run's artifacts; default: outputs/<preset>"""
    backend: Literal["torch", "flax"] = "torch"
    """which implementation computes"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "tpu" (flax), …; auto: the accelerator where there is one"""
    model_parallel: int = 0
    """devices that share one copy of the model, cut by heads (flax); 0: as few as hold it"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the hardware multiplies faster in it, float32 elsewhere"""
    model: str = ""
    """hub id or folder of the model; set by the preset"""
    revision: str = "main"
    """revision of a model from the hub"""
    seed: int = 0
    """seed of data draws and bootstrap; training has its own, `seeds`"""

    # 01: data
    util: str = ""
    """own JSONL of utility rows (data/jsonl.py); --util-rows of them calibrate, the rest is the benchmark"""
    safe: str = ""
    """own JSONL of harmful prompts with safe completions; --safe-rows calibrate, the rest is the benchmark"""
    align: str = ""
    """own JSONL of alignment rows (prompt, target, data_type)"""
    util_source: str = "embedded/util"
    """pool that D_util is drawn from"""
    safe_source: str = "embedded/safe"
    """pool that D_safe is drawn from"""
    align_source: str = "embedded"
    """"embedded" or "wildjailbreak": where the four alignment types are drawn from"""
    util_rows: int = 128
    """rows of D_util"""
    safe_rows: int = 32
    """rows of D_safe"""
    align_rows: int = 480
    """rows of D_align, a quarter of each type"""
    benchmarks: tuple[str, ...] = ()
    """name=rows or name=rows:new-tokens; rows 0 = all there are; names as in data/benchmarks.py"""
    date: str = "26 Jul 2024"
    """date given to chat templates that print one"""
    system: str = ""
    """system prompt; empty: the template's own default"""

    # 02, 03: the map
    folds: int = 8
    """gradient folds, for the bootstrap interval of O"""
    mask: Literal["output", "query"] = "output"
    """what silencing a head zeroes: its slice before W_o, or its query"""
    sweep_tokens: int = 32
    """new tokens a response of the sweep"""
    variant: Literal["rank-difference", "reranked"] = "rank-difference"
    """Eq. 5 as printed, or with the re-ranked exponent that the paper's tables fit"""
    buckets: int = 4
    """M, the number of buckets"""
    resamples: int = 1000
    """bootstrap resamples of the map"""

    # 04: tuning
    arms: tuple[str, ...] = ("full", "random", "bucket1", "bucket2", "bucket3", "bucket4")
    """what is tuned: full, random (as many heads as a bucket), bucket1 (risky) .. bucketM (safe)"""
    optimizers: tuple[Literal["sft"], ...] = ("sft",)
    """sft: plain fine-tuning"""
    seeds: tuple[int, ...] = (21,)
    """training seeds: LoRA's A, the order of rows, and which heads `random` draws"""
    rank: int = 32
    """LoRA r"""
    alpha: float = 32.0
    """LoRA alpha"""
    lr: float = 1e-4
    """peak learning rate; decays linearly to 0"""
    epochs: int = 1
    """passes over D_align"""
    batch: int = 4
    """rows a forward pass"""
    accumulation: int = 2
    """forward passes a step"""
    max_length: int = 1024
    """tokens a training row is cut to"""

    shard: str = ""
    """i/n: compute only every n-th unit of stage 02, 03, 04 or 05, beside other shards; then run the stage
    without it"""

    @property
    def folder(self) -> Path:
        return Path(
            self.run or f"outputs/{Path(self.preset).name}{'-flax' if self.backend == 'flax' else ''}"
        )

    def subset(self, *names: str) -> dict:
        """The named fields as JSON values, for a manifest."""
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_PAPER = {
    # Section 4.1 and Tables 3 and 4 of the paper.
    "util_source": "mmlu_calibration",
    "safe_source": "wildjailbreak_safe",
    "align_source": "wildjailbreak",
    "util_rows": 500,
    "safe_rows": 500,
    "align_rows": 10_000,
    "benchmarks": (
        "mmlu=0",
        "csqa=0",
        "gsm8k=500:1024",
        "math=500:2048",
        "wildjailbreak=2000:256",
        "wildguard=0:256",
        "dan=0:256",
    ),
    "folds": 4,
    "sweep_tokens": 64,
    "seeds": (21, 42, 84),
}

PRESETS: dict[str, dict] = {
    "smollm": {
        "model": "embedded/smollm2-135m-instruct",
        "benchmarks": (
            "facts=200",
            "words=200",
            "problems=100:48",
            "adversarial=100:32",
            "vanilla=100:32",
            "benign=100:32",
        ),
        # A model of 135M parameters and 60 steps need a larger step than the paper's 8B models and 1,250.
        "lr": 3e-3,
    },
    "tiny": {
        "model": "random/tiny",
        "dtype": "float32",
        "util_rows": 16,
        "safe_rows": 8,
        "align_rows": 32,
        "benchmarks": (
            "facts=24",
            "words=24",
            "problems=6:8",
            "adversarial=6:8",
            "vanilla=6:8",
            "benign=6:8",
        ),
        "folds": 4,
        "sweep_tokens": 8,
        "resamples": 200,
        "rank": 4,
        "alpha": 4.0,
        "lr": 0.1,  # random weights hardly react to less in four steps
    },
    "llama": {"model": "meta-llama/Llama-3.1-8B-Instruct", **_PAPER},
    "qwen": {"model": "Qwen/Qwen2.5-7B-Instruct", **_PAPER},
    "mistral": {"model": "mistralai/Mistral-7B-Instruct-v0.2", **_PAPER},
}


def preset_settings(preset: str) -> Settings:
    """The settings of a preset, or of a model folder (the smollm preset's data, the paper's learning
    rate)."""
    if preset in PRESETS:
        return Settings(preset=preset, **PRESETS[preset])
    if Path(preset).is_dir():
        return Settings(**{**PRESETS["smollm"], "preset": preset, "model": preset, "lr": Settings.lr})
    if any(mark in preset for mark in "/.~"):
        raise InputError(
            f"no model folder {preset}: give a folder with config.json, or one of {', '.join(PRESETS)}"
        )
    raise InputError(f"unknown preset {preset!r}: choose {', '.join(PRESETS)}, or give a model folder")


def model_path(preset: str) -> Path:
    """Local folder of a preset's weights (a dense Hugging Face folder), fetched or made at first use."""
    from backends import models

    settings = preset_settings(preset)
    return models.local_folder(settings.model, settings.revision)


def _named(argv: list[str], option: str) -> str | None:
    for index, argument in enumerate(argv):
        if argument == option and index + 1 < len(argv):
            return argv[index + 1]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return None


def _from_run_file(path: Path) -> Settings:
    stored = artifacts.read_json(path)
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    if unknown := sorted(stored.keys() - fields.keys()):
        raise InputError(
            f"{path} has settings that this version does not know ({', '.join(unknown)}): use a new --run"
        )
    return Settings(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    )


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from a command line: preset, then the run's own run.json, then options.

    Raises InputError (one line) for an unknown preset or option, or a value that does not fit.
    """
    argv = sys.argv[1:] if argv is None else argv
    preset, run = _named(argv, "--preset"), _named(argv, "--run")
    folder = Path(run) if run else preset_settings(preset or "smollm").folder
    if (folder / RUN_FILE).is_file():
        default = dataclasses.replace(_from_run_file(folder / RUN_FILE), run=str(folder))
        if preset and preset != default.preset:
            raise InputError(
                f"{folder} belongs to preset {default.preset}, not {preset}: choose another --run"
            )
    else:
        default = preset_settings(preset or "smollm")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            settings, unknown = tyro.cli(
                Settings,
                args=argv,
                default=default,
                return_unknown_args=True,
                prog="python -m stages.<stage>",
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = re.sub(r"[│╭╮╰╯─]", " ", messages.getvalue()).split()
        told = re.split(r" (?:Argument helptext|For full helptext|─)", " ".join(words))[0]
        raise InputError(f"{told or 'bad command line'}: see --help") from None
    if unknown:
        raise InputError(f"unknown option {unknown[0]}: see --help")
    settings = dataclasses.replace(settings, run=str(settings.folder))
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Refuses values that no stage could work with. InputError names the option."""
    for name in ("util_rows", "safe_rows"):
        if getattr(settings, name) < settings.folds:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)} is fewer than --folds")
        if getattr(settings, name) % settings.folds:
            raise InputError(f"--{name.replace('_', '-')} must be a multiple of --folds {settings.folds}")
    positive = (
        "folds align_rows sweep_tokens buckets resamples rank alpha lr epochs batch accumulation max_length"
    )
    for name in positive.split():
        if getattr(settings, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(settings, name)}")
    parse_shard(settings.shard)
    backends.check(settings.backend, settings.model_parallel)
    if settings.model_parallel < 0:
        raise InputError(f"--model-parallel must not be negative, not {settings.model_parallel}")
    if settings.align_rows % 4:
        raise InputError(
            f"--align-rows {settings.align_rows} must be a multiple of 4 (a quarter of each type)"
        )
    names = {"full", "random", *(f"bucket{number}" for number in range(1, settings.buckets + 1))}
    for arm in settings.arms:
        if arm not in names:
            raise InputError(
                f"--arms: unknown arm {arm!r}, with --buckets {settings.buckets} there are {sorted(names)}"
            )
    for option in ("arms", "optimizers", "seeds", "benchmarks"):
        values = getattr(settings, option)
        if not values:
            raise InputError(f"--{option} must not be empty")
        if len(set(values)) < len(values):
            raise InputError(f"--{option} names something twice: {' '.join(map(str, values))}")
    for option in ("util", "safe", "align"):
        path = getattr(settings, option)
        if path and not Path(path).is_file():
            raise InputError(f"--{option}: no file {path}")


def remember(settings: Settings) -> None:
    """Keeps the settings as the run's own, for later stages and for whoever looks at the folder."""
    values = dataclasses.asdict(settings)
    del values["shard"]  # of one process, not of the run
    artifacts.write_json(settings.folder / RUN_FILE, values)


def main() -> None:
    """Prints the run folder that a command line means, after checking the whole of it."""
    try:
        print(parse().run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
