"""The presets that fill a run's settings, and the command line that overrides them.

    python -m stages.run.presets --preset smollm        # checks a whole command line, prints the run's folder

A run folder keeps its settings in run.json, so that `python -m stages.02_conflict --run outputs/smollm` needs
no more.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import TypeVar

import tyro

import backends
from backends.core.errors import InputError
from stages.run.guard import guarded
from stages.run.settings import GROUP_OF, Settings, check
from stages.run.store import MANIFEST, RUN_FILE, read_json

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PAPER = {
    # Section 4.1 and Tables 3 and 4 of the paper.
    "util_source": "mmlu_calibration",
    "safe_source": "wildjailbreak_safe",
    "align_source": "wildjailbreak",
    "util_rows": 500,
    "safe_rows": 500,
    "align_rows": 10_000,
    "benchmarks": (
        *_words("mmlu=14042 csqa=1221 gsm8k=500:1024 math=500:2048"),
        *_words("wildjailbreak=2000:256 wildguard=754:256 dan=1405:256"),
        *_words("xstest=250:256 orbench=1319:256"),  # over-refusal, of which the paper has no table
    ),
    "folds": 4,
    "sweep_tokens": 64,
    # Section 4.2 and appendix F: Tables 1, 2, 7 to 11.
    "optimizers": ("sft", "pcgrad"),
    "maps": ("mmlu100=mmlu_calibration:100", "gsm8k100=gsm8k_calibration:100"),
    "ablations": _words("buckets_O buckets_S top50 top75 bottom50 bottom75 buckets@mmlu100 buckets@gsm8k100"),
    "seeds": (21, 42, 84),
}

_SMOLLM = {
    "model": "embedded/smollm2-135m-instruct",
    "dtype": "float32",  # so that every processor finds the same: bfloat16 moves half of the buckets
    # The reliability of C is 0.83 (docs/LOG.md), and no head need be ablated.
    "sensitivity": "gradient",
    "util_rows": 384,
    "safe_rows": 96,
    "folds": 8,
    "align_rows": 200,
    "benign_share": 0.55,
    "benchmarks": (
        "facts=120",
        "words=120",
        "problems=32:40",
        "adversarial=40:24",
        "vanilla=40:24",
        "benign=40:24",
    ),
    # Its rows are short: a step is one pass.
    "batch": 4,
    "accumulation": 1,
    # Chosen on the development split (--split development, seed 0, training seed 21), by what a random
    # quarter does; rows, share of benign ones, rows a step, rate -> points of safety gained, benign
    # requests refused (10 % before):
    #     240, 1/2, 8, 5e-3 -> 55, 70 %      200, 0.50, 4, 4e-3   -> 69, 78 %     240, 2/3, 4, 3e-3 -> -8, 8 %
    #     240, 1/2, 8, 3e-3 ->  9, 33 %      200, 0.55, 4, 4.5e-3 -> 60, 62 %     192, 2/3, 4, 5e-3 -> -8, 2 %
    #                                        200, 0.55, 4, 4e-3   -> 15, 30 %     200, .6, 4, 5e-3 -> 25, 48 %
    #                                        200, 0.55, 4, 3e-3   -> 18, 22 %
    # The last of the middle gains most of those that refuse less than a third of the benign requests.
    "lr": 3e-3,
}

PRESETS: dict[str, dict] = {
    "smollm": _SMOLLM,
    "smollm-study": {
        **_SMOLLM,
        # Does a map of arithmetic predict what arithmetic loses? Asked of the same draws.
        "maps": ("sums=embedded/sums:96",),
        # 32 arms beside the six that have names, each draw with a training seed of its own.
        "ablations": ("draws32",),
        "seeds": (21, 42, 84),
    },
    "smollm-neurons": {
        **_SMOLLM,
        "pairs": 32,
        "neurons": (256,),
        # The recipe that its rate was chosen with, as many harmful rows as benign ones. For 256 neurons 0.1,
        # 0.15, 0.2 gain 15, 24, 21 points of safety on the development split.
        "align_rows": 240,
        "benign_share": 0.5,
        "batch": 8,
        "lr": 5e-3,
        "gain_lr": 0.15,  # 15 outer steps
    },
    "tiny": {
        "model": "random/tiny",
        "dtype": "float32",
        "util_rows": 16,
        "safe_rows": 8,
        "align_rows": 32,
        "benchmarks": _words("facts=24 words=24 problems=6:8 adversarial=6:8 vanilla=6:8 benign=6:8"),
        "folds": 4,
        "sweep_tokens": 8,
        "resamples": 200,
        "rank": 4,
        "alpha": 4.0,
        "lr": 0.1,  # random weights hardly react to less in four steps
    },
    "smollm-paper": {
        "model": "embedded/smollm2-135m-instruct",
        **_PAPER,
        # Not the paper's: more points for the correlation, where a tuning is cheap.
        "ablations": (*_PAPER["ablations"], "bucketsof8", "bucketsof16"),
    },
    "llama": {"model": "meta-llama/Llama-3.1-8B-Instruct", "paper": "llama", **_PAPER},
    "qwen": {"model": "Qwen/Qwen2.5-7B-Instruct", "paper": "qwen", **_PAPER},
    "mistral": {"model": "mistralai/Mistral-7B-Instruct-v0.2", "paper": "mistral", **_PAPER},
}


_OWN = {
    # The map that repeats itself for its time, as in smollm; the embedded data in the default sizes.
    **{name: _SMOLLM[name] for name in ("sensitivity", "util_rows", "safe_rows", "folds")},
    "benchmarks": _words(
        "facts=200 words=200 problems=100:48 adversarial=100:32 vanilla=100:32 benign=100:32"
    ),
}


def preset_settings(preset: str) -> Settings:
    """The settings of a preset, or of a model folder (the embedded data, the default sizes and rates)."""
    if preset in PRESETS:
        return Settings().replace(preset=preset, **PRESETS[preset])
    if Path(preset).is_dir():
        return Settings().replace(preset=preset, model=preset, **_OWN)
    if any(mark in preset for mark in "/.~"):
        raise InputError(
            f"no model folder {preset}: give a folder with config.json, or one of {', '.join(PRESETS)}"
        )
    raise InputError(f"unknown preset {preset!r}: choose {', '.join(PRESETS)}, or give a model folder")


def stored_settings(folder: Path) -> Settings:
    """The settings that a run folder keeps. InputError where this version does not know one of them."""
    stored = read_json(folder / RUN_FILE)
    if unknown := sorted(stored.keys() - GROUP_OF.keys()):
        raise InputError(
            f"{folder / RUN_FILE} has settings that this version does not know ({', '.join(unknown)}): use a "
            f"new --run"
        )
    return Settings().replace(**stored)


def read_options(kind: type[T], argv: list[str], default: T, program: str) -> tuple[T, list[str]]:
    """A dataclass's fields as options, and the arguments that are none of them.

    Raises InputError (one line) for a value that does not fit.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(kind, args=argv, default=default, return_unknown_args=True, prog=program)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = re.sub(r"[│╭╮╰╯─]", " ", messages.getvalue()).split()
        message = re.split(r" (?:Argument helptext|For full helptext|─)", " ".join(words))[0]
        raise InputError(f"{message or 'bad command line'}: see --help") from None


def _value_of(argv: list[str], option: str) -> str | None:
    value = None  # the last one, as tyro takes it
    for index, argument in enumerate(argv):
        if argument == option and index + 1 < len(argv):
            value = argv[index + 1]
        elif argument.startswith(f"{option}="):
            value = argument.split("=", 1)[1]
    return value


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from a command line: preset, then the run's own run.json, then options.

    Raises InputError (one line) for an unknown preset or option, or a value that does not fit.
    """
    argv = sys.argv[1:] if argv is None else argv
    preset, run = _value_of(argv, "--preset"), _value_of(argv, "--run")
    folder = Path(run) if run else preset_settings(preset or "smollm").folder
    if (folder / RUN_FILE).is_file():
        default = stored_settings(folder).replace(run=str(folder))
        if preset and preset != default.run.preset:
            raise InputError(
                f"{folder} belongs to preset {default.run.preset}, not {preset}: choose another --run"
            )
    else:
        default = preset_settings(preset or "smollm")
    settings, unknown = read_options(Settings, argv, default, "python -m stages.<stage>")
    if unknown:
        raise InputError(f"unknown option {unknown[0]}: see --help")
    settings = settings.replace(run=str(settings.folder))
    check(settings)
    return settings


def checked(argv: list[str] | None = None) -> Settings:
    """Settings of a run that is made on this machine from its first stage on. InputError also where it lacks
    the device that later stages compute on."""
    settings = parse(argv)
    if not any(settings.folder.glob(f"*/{MANIFEST}")):  # what began on another machine may be at its report
        backends.check_device(settings.model.backend, settings.run.device)
    return settings


def main() -> None:
    """Prints the run folder that a command line means, after checking the whole of it."""
    guarded(lambda: print(checked().folder))


if __name__ == "__main__":
    main()
