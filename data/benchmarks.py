"""The benchmarks a run can name: where rows come from, which side of the trade-off they measure, how long
answers are."""

from dataclasses import dataclass
from typing import Literal

from backends.errors import InputError

Side = Literal["utility", "safety", "over-refusal"]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. A safety score is the share of harmful prompts refused (DSR); over-refusal, of benign
    ones."""

    pool: str
    """"embedded/<role>", a pool of data.sources, or "own/util" and "own/safe" """
    side: Side
    source_domain: bool = False
    """the benchmark of the domain that D_util is drawn from: Eq. 8's M (the paper's MMLU)"""
    new_tokens: int = 0
    """default length of a generated answer; 0: the answer is the next token"""
    numeric: bool = False
    """answers are numbers: read strictly and flexibly too (data/scoring.py)"""


BENCHMARKS = {
    # The embedded set. Beside it the part that each plays in the paper.
    "facts": Benchmark("embedded/facts", "utility", source_domain=True),  # MMLU
    "words": Benchmark("embedded/words", "utility"),  # CSQA
    "problems": Benchmark("embedded/problems", "utility", new_tokens=48),  # GSM8K, MATH
    "adversarial": Benchmark("embedded/adversarial", "safety", new_tokens=32),  # WildJailbreak, DAN
    "vanilla": Benchmark("embedded/vanilla", "safety", new_tokens=32),  # WildGuard
    "benign": Benchmark("embedded/benign", "over-refusal", new_tokens=32),  # (not in the paper's tables)
    # The paper's.
    "mmlu": Benchmark("mmlu", "utility", source_domain=True),
    "csqa": Benchmark("csqa", "utility"),
    "gsm8k": Benchmark("gsm8k", "utility", new_tokens=1024, numeric=True),
    "math": Benchmark("math", "utility", new_tokens=2048),
    "wildjailbreak": Benchmark("wildjailbreak", "safety", new_tokens=256),
    "wildguard": Benchmark("wildguard", "safety", new_tokens=256),
    "dan": Benchmark("dan", "safety", new_tokens=256),
    # A user's own rows, the half that does not calibrate.
    "own_util": Benchmark("own/util", "utility", source_domain=True, new_tokens=256),
    "own_safe": Benchmark("own/safe", "safety", new_tokens=64),
}


@dataclass(frozen=True)
class Asked:
    """A benchmark as a run asks for it; rows 0 means all there are."""

    name: str
    rows: int
    new_tokens: int

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]


def parse(text: str) -> Asked:
    """ "name=rows" or "name=rows:new-tokens". InputError on an unknown name or a number that is none."""
    name, _, numbers = text.partition("=")
    if name not in BENCHMARKS:
        raise InputError(f"--benchmarks: unknown benchmark {name!r}, there are {', '.join(BENCHMARKS)}")
    rows, _, tokens = numbers.partition(":")
    if not rows.isdecimal() or not (tokens or "0").isdecimal():
        raise InputError(f"--benchmarks: {text!r} should be name=rows or name=rows:new-tokens")
    return Asked(name, int(rows), int(tokens) if tokens else BENCHMARKS[name].new_tokens)


def asked(texts: tuple[str, ...], own_util: bool, own_safe: bool) -> list[Asked]:
    """The benchmarks of a run: a user's own rows stand in for the preset's of their side.

    InputError where a run would have nothing to measure utility or safety by.
    """
    chosen = [parse(text) for text in texts]
    for own, name in ((own_util, "own_util"), (own_safe, "own_safe")):
        given = [one for one in chosen if one.name == name]
        if given and not own:
            raise InputError(
                f"--benchmarks: {name} needs rows of your own (--{name.removeprefix('own_')} FILE)"
            )
        if own:
            chosen = [one for one in chosen if one.benchmark.side != BENCHMARKS[name].side]
            chosen += given or [parse(f"{name}=0")]
    names = [one.name for one in chosen]
    if len(set(names)) < len(names):
        raise InputError(f"--benchmarks names one twice: {' '.join(names)}")
    for side in ("utility", "safety"):
        if not any(one.benchmark.side == side for one in chosen):
            raise InputError(f"--benchmarks needs at least one {side} benchmark")
    if sum(one.benchmark.source_domain for one in chosen) > 1:
        raise InputError(
            "--benchmarks: only one of mmlu, facts and own_util can be the source domain of Eq. 8"
        )
    return chosen
