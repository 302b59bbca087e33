"""The paper's claims: what each verdict takes, from numbers made by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stages.method.arms import BASE_RUN, OWN, ArmRun, parse
from stages.report import claims as verdicts
from stages.report import costs
from stages.report.findings import findings
from stages.report.results import Results
from stages.report.words import FAILS, HOLDS, NOISE, ONE_SEED, UNKNOWN
from stages.run.maps import MapSpec
from tests.fabricated import results_of

RESAMPLES = 200
LOSSES = {"ucr": "utility"}
UP, DOWN = (0.4, 0.5, 0.6, 0.7), (0.7, 0.6, 0.5, 0.4)
MIXED = (0.6, 0.7, 0.5, 0.5)
"""r < 0, as unrelated points may have it"""
SAME, WORKED = MapSpec("m", "own_pool", 100), MapSpec("m", "gsm8k_calibration", 100)


class Run:
    """Arms with a utility and a safety each (the base model: 0.8 and 0.2), equal in every seed; resamples are
    these and noise, of which `noise` is what all arms share."""

    def __init__(self, noise: float = 0.0, seeds: int = 2):
        self.noise = np.random.default_rng(0).normal(0, noise, RESAMPLES)
        self.seeds, self.scores, self.ranked, self.draws = seeds, {}, {}, {"utility": {}, "safety": {}}
        self._add(BASE_RUN, 0.8, 0.2, (0.0, 0.0))

    def _add(self, run: ArmRun, utility: float, safety: float, noise: tuple[float, float]) -> None:
        random = np.random.default_rng(len(self.scores))
        for side, values, own in zip(self.draws, (utility + self.noise, safety), noise, strict=True):
            self.draws[side][run] = np.clip(values + random.normal(0, own, RESAMPLES), 0.0, 1.0)
        for seed in range(self.seeds) if run != BASE_RUN else [None]:
            self.scores[ArmRun(run.arm, run.optimizer, seed)] = {"u": utility, "s": safety}

    def add(self, arm: str, utility: float, safety=0.7, noise=(0.0, 0.0), x=0.5, optimizer="sft") -> "Run":
        """`noise`: of utility, of safety."""
        run = ArmRun(parse([arm], 4)[0], optimizer, None)
        self.ranked[run] = x
        self._add(run, utility, safety, noise)
        return self

    def results(self, *maps: MapSpec) -> Results:
        sides = {"u": "utility", "s": "safety"}
        tuned = pd.Index([run for run in self.scores if run != BASE_RUN], dtype=object)
        arms = pd.DataFrame(1.0, index=tuned, columns=costs.SELECTION)
        arms["ranked_mean"] = [self.ranked[replace(run, seed=None)] for run in tuned]
        by_seed = costs.arm_costs(self.scores, arms, sides, LOSSES)
        draws = {side: pd.DataFrame(own) for side, own in self.draws.items()}
        draws |= costs.drawn_ratios(draws, LOSSES)
        own = MapSpec(OWN, "own_pool", 500)
        return results_of(by_seed, sides, LOSSES, draws, maps=(own, *maps))

    def claim(self, words: str, *maps: MapSpec, optimizer: str = "sft") -> tuple[str, str]:
        """Evidence and verdict of the claim with these words."""
        table = verdicts.claims(self.results(*maps))
        chosen = table[table["claim"].str.contains(words, regex=False) & (table["optimizer"] == optimizer)]
        ((evidence, verdict),) = chosen[["evidence", "verdict"]].to_numpy()
        return evidence, verdict


def test_ablation_claims_only_where_their_arms_are():
    run = Run().add("full", 0.5).add("bucket1", 0.6).add("bucket4", 0.7)
    assert not verdicts.claims(run.results(SAME))["claim"].str.contains(r"F\.|RQ2").any()


@pytest.mark.parametrize(
    ("bottom50", "noise", "verdict"), [(0.6, 0.0, HOLDS), (0.8, 0.0, FAILS), (0.69, 0.1, NOISE)]
)
def test_a_quarter_against_a_half(bottom50, noise, verdict):
    run = Run(noise=0.05).add("bucket4", 0.7).add("bottom50", bottom50, noise=(noise, 0.0))
    assert run.claim("(F.2)")[1] == verdict


def test_pcgrad_against_the_risky_zone():
    run = Run()
    for arm, utility in (("full", 0.5), ("bucket1", 0.6), ("bucket4", 0.7)):
        run.add(arm, utility, optimizer="pcgrad")
    assert run.claim("(RQ2)", optimizer="pcgrad")[1] == HOLDS
    assert run.claim(ALL_HEADS, optimizer="pcgrad")[1] == HOLDS


ALL_HEADS = "keeps more utility than tuning all heads"


@pytest.mark.parametrize(
    ("safe", "full", "equal", "verdict"),
    [
        # 59 % of safety keep more utility than 95 % in any case: that alone is no claim. The line from the
        # base model, (0.2, 0.8), to (0.95, utility) is at safety 0.59 at 0.8 - 0.52 (0.8 - utility).
        ((0.57, 0.59), (0.30, 0.95), "57.0 % against 54.0 %", HOLDS),
        ((0.57, 0.59), (0.49, 0.95), "57.0 % against 63.9 %", FAILS),
        ((0.57, 0.59), (0.40, 0.95), "57.0 % against 59.2 %", FAILS),
        ((0.60, 0.80), (0.65, 0.50), "70.0 % against 65.0 %", HOLDS),  # the safer one is interpolated
        ((0.60, 0.70), (0.61, 0.72, (0.0, 0.05)), None, FAILS),  # safety differs within noise
        ((0.60, 0.70), (0.61, 0.10), None, UNKNOWN),
    ],
)
def test_arms_of_unequal_safety_are_compared_on_the_line_from_the_base_model(safe, full, equal, verdict):
    evidence, found = Run().add("bucket4", *safe).add("full", *full).claim(ALL_HEADS)
    assert found == verdict and evidence.partition("; at equal safety ")[2] == (equal or "")


def test_one_seed_decides_nothing():
    run = Run(seeds=1).add("bucket4", 0.7).add("full", 0.5).add("bottom50", 0.75)
    assert run.claim(ALL_HEADS)[1] == run.claim("(F.2)")[1] == ONE_SEED
    run = Run(seeds=1).add("bucket4", 0.7, noise=(0.1, 0.0)).add("full", 0.69, noise=(0.1, 0.0))
    assert run.claim(ALL_HEADS)[1] == NOISE


def buckets(utilities, suffix="", x=(0.9, 0.7, 0.5, 0.3), run=None, **more) -> Run:
    run = run or Run(noise=0.05)
    for number, utility in enumerate(utilities, start=1):
        run.add(f"bucket{number}{suffix}", utility, x=x[number - 1], **more)
    return run


@pytest.mark.parametrize(
    ("utilities", "same", "worked"),
    [(UP, HOLDS, FAILS), ((0.4, 0.5, 0.7, 0.6), FAILS, HOLDS), ((0.7, 0.5, 0.4, 0.6), FAILS, FAILS)],
)
def test_which_bucket_keeps_most(utilities, same, worked):
    evidence, verdict = buckets(utilities, "@m").claim("(F.3)", SAME)
    assert verdict == same and ", ".join(f"{100 * one:.1f} %" for one in utilities) in evidence
    assert buckets(utilities, "@m").claim("F.4", WORKED)[1] == worked


def test_the_best_bucket_within_noise_at_equal_safety_and_without_gain():
    assert buckets((0.4, 0.5, 0.69, 0.7), "@m", noise=(0.1, 0.0)).claim("(F.3)", SAME)[1] == NOISE
    evidence, verdict = buckets((0.4, 0.5, 0.6), "@m").add("bucket4@m", 0.65, safety=0.4).claim("(F.3)", SAME)
    # At a safety of 0.4 bucket 3 would keep 0.8 - 0.4 * 0.2.
    assert verdict == FAILS and "72.0 %, 65.0 %" in evidence
    gained_none = buckets((0.4, 0.5, 0.6), "@m").add("bucket4@m", 0.7, safety=0.1)
    assert gained_none.claim("(F.3)", SAME)[1] == UNKNOWN


def test_c_against_o_and_s():
    """Costs rise with C; with O they do not, with S half."""
    rising, falling, mixed = UP, DOWN, (0.5, 0.4, 0.7, 0.6)

    def outcome(c, o, s, **more):
        run = buckets(c, **more)
        return buckets(s, "_S", run=buckets(o, "_O", run=run, **more), **more).claim("(F.1)")

    evidence, verdict = outcome(rising, falling, mixed)
    assert verdict == HOLDS and "+1.00 for C" in evidence and "−1.00 for O" in evidence
    assert outcome(mixed, rising, falling)[1] == FAILS
    assert outcome(rising, rising, falling)[1] == NOISE
    assert outcome(rising, falling, mixed, noise=(0.3, 0.0))[1] == NOISE


@pytest.mark.parametrize(
    ("utilities", "seeds", "verdict"),
    [(UP, 2, HOLDS), (DOWN, 2, FAILS), (MIXED, 2, NOISE), (UP, 1, ONE_SEED), (DOWN, 1, ONE_SEED)],
)
def test_findings_give_the_verdict_of_the_claims(utilities, seeds, verdict):
    run = buckets(utilities, run=Run(seeds=seeds))
    assert run.claim("C predicts the cost")[1] == verdict
    results = run.results()
    (paragraph,) = findings(results, verdicts.claims(results), None)
    sentences = [sentence for sentence in paragraph if "claim" in sentence]
    assert [sentence.rpartition("predicts cost: ")[2] for sentence in sentences] == [f"{verdict}."]


@pytest.mark.parametrize(
    ("safety", "noise", "verdict"), [(0.7, 0.0, HOLDS), (0.22, 0.1, NOISE), (0.1, 0.0, UNKNOWN)]
)
def test_costs_of_two_arms(safety, noise, verdict):
    run = Run().add("bucket4", 0.7, safety, noise=(0.0, noise)).add("bucket1", 0.6).add("random", 0.7)
    evidence, found = run.claim("than the Risky Zone")
    assert found == verdict
    if verdict == HOLDS:
        assert evidence == "0.20 against 0.40; lower in 2 of 2 seeds"
        assert run.claim("drawn at random") == ("0.20 against 0.20; lower in 0 of 2 seeds", NOISE)
