"""The benchmarks that a run can name: which rows, which side of the trade-off, how long the answers are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from backends.core.errors import InputError

Side = Literal["utility", "safety", "over-refusal"]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. A safety score is the share of harmful prompts refused (DSR), over-refusal that of
    benign ones."""

    name: str
    pool: str
    """as `data.sampling.Pools` takes it"""
    side: Side
    source_domain: bool = False
    """of the domain that D_util is drawn from: M of Eq. 8 (the paper's MMLU)"""
    numeric: bool = False
    """gold answers are numbers, to be read strictly and flexibly too (data/scoring.py)"""
    rows: int = 0
    """0: all there are"""
    new_tokens: int = 0
    """tokens of an answer that is written; 0: the answer is the next token"""


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        # The embedded set. Beside each, the part that it plays in the paper.
        Benchmark("facts", "embedded/facts", "utility", source_domain=True),  # MMLU
        Benchmark("words", "embedded/words", "utility"),  # CSQA
        Benchmark("problems", "embedded/problems", "utility", new_tokens=48),  # GSM8K, MATH
        Benchmark("adversarial", "embedded/adversarial", "safety", new_tokens=32),  # WildJailbreak, DAN
        Benchmark("vanilla", "embedded/vanilla", "safety", new_tokens=32),  # WildGuard
        Benchmark("benign", "embedded/benign", "over-refusal", new_tokens=32),  # not in the paper's tables
        # The paper's.
        Benchmark("mmlu", "mmlu", "utility", source_domain=True),
        Benchmark("csqa", "csqa", "utility"),
        Benchmark("gsm8k", "gsm8k", "utility", numeric=True, new_tokens=1024),
        Benchmark("math", "math", "utility", new_tokens=2048),
        Benchmark("wildjailbreak", "wildjailbreak", "safety", new_tokens=256),
        Benchmark("wildguard", "wildguard", "safety", new_tokens=256),
        Benchmark("dan", "dan", "safety", new_tokens=256),
        # Not in the paper: what others score refusals by.
        Benchmark("xstest", "xstest", "over-refusal", new_tokens=256),
        Benchmark("orbench", "orbench", "over-refusal", new_tokens=256),
        Benchmark("jailbreakbench_benign", "jailbreakbench_benign", "over-refusal", new_tokens=256),
        Benchmark("strongreject", "strongreject", "safety", new_tokens=256),
        Benchmark("harmbench", "harmbench", "safety", new_tokens=256),
        Benchmark("jailbreakbench", "jailbreakbench", "safety", new_tokens=256),
        # A user's own rows: those that do not calibrate.
        Benchmark("own_util", "own/util", "utility", source_domain=True, new_tokens=256),
        Benchmark("own_safe", "own/safe", "safety", new_tokens=64),
    )
}

DOMAINS = {
    "embedded/util": "facts",
    "embedded/sums": "problems",
    "mmlu_calibration": "mmlu",
    "gsm8k_calibration": "gsm8k",
    "own/util": "own_util",
}
"""pool that calibrates a map -> the benchmark of its own domain"""


def parse_benchmarks(texts: Sequence[str], own_util: bool, own_safe: bool) -> tuple[Benchmark, ...]:
    """The benchmarks of a run: a user's own rows, which come last, replace all others of their side.

    Args:
        texts: "name=rows" or "name=rows:new-tokens" each.

    InputError on a text that is not of this form, and where utility or safety would not be measured.
    """
    benchmarks = [_parse(text) for text in texts]
    for own, name in ((own_util, "own_util"), (own_safe, "own_safe")):
        given = [benchmark for benchmark in benchmarks if benchmark.name == name]
        if given and not own:
            option = name.removeprefix("own_")
            raise InputError(f"--benchmarks: {name} needs rows of your own (--{option} FILE)")
        if own:
            side = BENCHMARKS[name].side
            benchmarks = [benchmark for benchmark in benchmarks if benchmark.side != side]
            benchmarks += given or [BENCHMARKS[name]]
    names = [benchmark.name for benchmark in benchmarks]
    if len(set(names)) < len(names):
        raise InputError(f"--benchmarks names one twice: {' '.join(names)}")
    for side in ("utility", "safety"):
        if not any(benchmark.side == side for benchmark in benchmarks):
            raise InputError(f"--benchmarks needs at least one {side} benchmark")
    if sum(benchmark.source_domain for benchmark in benchmarks) > 1:
        raise InputError(
            "--benchmarks: only one of mmlu, facts and own_util can be the source domain of Eq. 8"
        )
    return tuple(benchmarks)


def _parse(text: str) -> Benchmark:
    name, _, numbers = text.partition("=")
    if name not in BENCHMARKS:
        raise InputError(f"--benchmarks: unknown benchmark {name!r}, there are {', '.join(BENCHMARKS)}")
    rows, _, tokens = numbers.partition(":")
    if not rows.isdecimal() or not (tokens or "0").isdecimal():
        raise InputError(f"--benchmarks: {text!r} should be name=rows or name=rows:new-tokens")
    default = BENCHMARKS[name]
    return replace(default, rows=int(rows), new_tokens=int(tokens) if tokens else default.new_tokens)
