"""The paper's claims: what each verdict takes, from numbers made by hand."""

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
SAME, WORKED = MapSpec("m", "own_pool", 100), MapSpec("m", "gsm8k_calibration", 100)


class Run:
    """Arms with a utility and a safety each (the base model: 0.8 and 0.2), equal in every seed; resamples are
    these and noise, of which `noise` is what all arms share."""

    def __init__(self, noise: float = 0.0, seeds: int = 2):
        self.noise = np.random.default_rng(0).normal(0, noise, RESAMPLES)
        self.seeds, self.scores, self.ranked, self.draws = seeds, {}, {}, {"utility": {}, "safety": {}}
        self._add(BASE_RUN, 0.8, 0.2)

    def _add(self, run: ArmRun, utility: float, safety: float, own: tuple[float, float] = (0.0, 0.0)) -> None:
        random = np.random.default_rng(len(self.scores))
        for side, value, noise in zip(("utility", "safety"), (utility, safety), own, strict=True):
            shared = self.noise if side == "utility" else 0.0
            self.draws[side][run] = np.clip(value + shared + random.normal(0, noise, RESAMPLES), 0.0, 1.0)
        seeds = range(self.seeds) if run != BASE_RUN else [None]
        self.scores |= {ArmRun(run.arm, run.optimizer, seed): {"u": utility, "s": safety} for seed in seeds}

    def add(
        self, arm: str, utility: float, safety: float = 0.7, x: float = 0.5, optimizer="sft", **own
    ) -> "Run":
        (arm,) = parse([arm], 4)
        run = ArmRun(arm, optimizer, None)
        self.ranked[run] = x
        self._add(run, utility, safety, (own.get("utility_noise", 0.0), own.get("safety_noise", 0.0)))
        return self

    def results(self, *maps: MapSpec) -> Results:
        sides = {"u": "utility", "s": "safety"}
        tuned = [run for run in self.scores if run != BASE_RUN]
        ranked = [self.ranked[ArmRun(run.arm, run.optimizer, None)] for run in tuned]
        arms = pd.DataFrame(1.0, index=pd.Index(tuned, dtype=object), columns=costs.SELECTION)
        arms["ranked_mean"] = ranked
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
    run = Run(noise=0.05).add("bucket4", 0.7).add("bottom50", bottom50, utility_noise=noise)
    assert run.claim("(F.2)")[1] == verdict


def test_pcgrad_against_the_risky_zone():
    run = Run().add("full", 0.5, optimizer="pcgrad").add("bucket1", 0.6, optimizer="pcgrad")
    run.add("bucket4", 0.7, optimizer="pcgrad")
    assert run.claim("(RQ2)", optimizer="pcgrad")[1] == HOLDS
    assert run.claim("keeps more utility than tuning all heads", optimizer="pcgrad")[1] == HOLDS


ALL_HEADS = "keeps more utility than tuning all heads"


@pytest.mark.parametrize(
    ("full_utility", "verdict"),
    # The line from (0.2, 0.8) to (0.95, full) is at safety 0.59 at 0.8 - 0.52 (0.8 - full).
    [(0.30, HOLDS), (0.49, FAILS), (0.40, FAILS)],
)
def test_arms_of_unequal_safety_are_compared_on_the_line_from_the_base_model(full_utility, verdict):
    """59 % of safety keep more utility than 95 % in any case: that alone is no claim."""
    run = Run().add("bucket4", 0.57, safety=0.59).add("full", full_utility, safety=0.95)
    evidence, found = run.claim(ALL_HEADS)
    line = 0.8 - 0.52 * (0.8 - full_utility)
    assert found == verdict and f"at equal safety 57.0 % against {100 * line:.1f} %" in evidence


def test_the_safer_of_two_arms_is_the_one_that_is_interpolated():
    run = Run().add("bucket4", 0.6, safety=0.8).add("full", 0.65, safety=0.5)
    evidence, verdict = run.claim(ALL_HEADS)
    assert verdict == HOLDS and "at equal safety 70.0 % against 65.0 %" in evidence


def test_safety_that_differs_within_noise_is_equal():
    run = Run().add("bucket4", 0.60, safety=0.7).add("full", 0.61, safety=0.72, safety_noise=0.05)
    evidence, verdict = run.claim(ALL_HEADS)
    assert verdict == FAILS and "at equal safety" not in evidence
    run = Run().add("bucket4", 0.60, safety=0.7).add("full", 0.61, safety=0.1)
    assert run.claim(ALL_HEADS)[1] == UNKNOWN


def test_one_seed_decides_nothing():
    run = Run(seeds=1).add("bucket4", 0.7).add("full", 0.5).add("bottom50", 0.75)
    assert run.claim(ALL_HEADS)[1] == run.claim("(F.2)")[1] == ONE_SEED
    run = Run(seeds=1).add("bucket4", 0.7, utility_noise=0.1).add("full", 0.69, utility_noise=0.1)
    assert run.claim(ALL_HEADS)[1] == NOISE


def buckets(utilities, suffix="", x=(0.9, 0.7, 0.5, 0.3), run=None, **more) -> Run:
    run = run or Run(noise=0.05)
    for number, utility in enumerate(utilities, start=1):
        run.add(f"bucket{number}{suffix}", utility, x=x[number - 1], **more)
    return run


@pytest.mark.parametrize(
    ("utilities", "same", "worked"),
    [
        ((0.4, 0.5, 0.6, 0.7), HOLDS, FAILS),
        ((0.4, 0.5, 0.7, 0.6), FAILS, HOLDS),
        ((0.7, 0.5, 0.4, 0.6), FAILS, FAILS),
    ],
)
def test_which_bucket_keeps_most(utilities, same, worked):
    evidence, verdict = buckets(utilities, "@m").claim("(F.3)", SAME)
    assert verdict == same and ", ".join(f"{100 * one:.1f} %" for one in utilities) in evidence
    assert buckets(utilities, "@m").claim("F.4", WORKED)[1] == worked


def test_the_best_bucket_within_noise_at_equal_safety_and_without_gain():
    assert buckets((0.4, 0.5, 0.69, 0.7), "@m", utility_noise=0.1).claim("(F.3)", SAME)[1] == NOISE
    run = buckets((0.4, 0.5, 0.6), "@m").add("bucket4@m", 0.65, safety=0.4)
    # At a safety of 0.4 bucket 3 would keep 0.8 - 0.4 * 0.2.
    evidence, verdict = run.claim("(F.3)", SAME)
    assert verdict == FAILS and "72.0 %, 65.0 %" in evidence
    run = buckets((0.4, 0.5, 0.6), "@m").add("bucket4@m", 0.7, safety=0.1)
    assert run.claim("(F.3)", SAME)[1] == UNKNOWN


def test_c_against_o_and_s():
    """Costs rise with C; with O they do not, with S half."""
    rising, falling, mixed = (0.4, 0.5, 0.6, 0.7), (0.7, 0.6, 0.5, 0.4), (0.5, 0.4, 0.7, 0.6)

    def outcome(c, o, s, **more):
        run = buckets(c, **more)
        return buckets(s, "_S", run=buckets(o, "_O", run=run, **more), **more).claim("(F.1)")

    evidence, verdict = outcome(rising, falling, mixed)
    assert verdict == HOLDS and "+1.00 for C" in evidence and "−1.00 for O" in evidence
    assert outcome(mixed, rising, falling)[1] == FAILS
    assert outcome(rising, rising, falling)[1] == NOISE
    assert outcome(rising, falling, mixed, utility_noise=0.3)[1] == NOISE


@pytest.mark.parametrize(
    ("utilities", "seeds", "verdict"),
    [
        ((0.4, 0.5, 0.6, 0.7), 2, HOLDS),
        ((0.7, 0.6, 0.5, 0.4), 2, FAILS),
        ((0.6, 0.7, 0.5, 0.5), 2, NOISE),  # r < 0, as unrelated points may have it
        ((0.4, 0.5, 0.6, 0.7), 1, ONE_SEED),
        ((0.7, 0.6, 0.5, 0.4), 1, ONE_SEED),
    ],
)
def test_findings_give_the_verdict_of_the_claims(utilities, seeds, verdict):
    run = buckets(utilities, run=Run(seeds=seeds))
    assert run.claim("C predicts the cost")[1] == verdict
    results = run.results()
    (paragraph,) = findings(results, verdicts.claims(results), None)
    sentences = [sentence for sentence in paragraph if "claim" in sentence]
    assert [sentence.rpartition("predicts cost: ")[2] for sentence in sentences] == [f"{verdict}."]


def test_costs_of_two_arms():
    run = Run().add("bucket4", 0.7).add("bucket1", 0.6).add("random", 0.7)
    assert run.claim("than the Risky Zone") == ("0.20 against 0.40; lower in 2 of 2 seeds", HOLDS)
    assert run.claim("drawn at random") == ("0.20 against 0.20; lower in 0 of 2 seeds", NOISE)
    run = Run().add("bucket4", 0.7, safety=0.22, safety_noise=0.1).add("bucket1", 0.6)
    assert run.claim("than the Risky Zone")[1] == NOISE
    assert (
        Run().add("bucket4", 0.7, safety=0.1).add("bucket1", 0.6).claim("than the Risky Zone")[1] == UNKNOWN
    )
