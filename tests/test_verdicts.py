"""The claims that ablations decide: what each verdict takes, from numbers made by hand."""

import numpy as np
import pytest

from stages.maps import Map
from stages.reporting import correlations, verdicts

RESAMPLES = 200
BASE = {"arm": "base", "optimizer": "none", "utility": 0.8, "safety": 0.2, "n_seeds": 1}
SAME = {"m": Map("m", "own_pool", 100)}
WORKED = {"m": Map("m", "gsm8k_calibration", 100)}


class Run:
    """Arms with a utility each; the resamples are the utility plus noise that all arms share."""

    def __init__(self, noise: float = 0.0):
        self.noise = np.random.default_rng(0).normal(0, noise, RESAMPLES) if noise else np.zeros(RESAMPLES)
        self.means = [dict(BASE)]
        self.drawn = {("base", "none"): {"utility": 0.8 + 0 * self.noise, "safety": 0.2 + 0 * self.noise}}

    def add(self, arm: str, utility: float, x: float = 0.5, optimizer: str = "sft", own_noise: float = 0.0):
        gain, loss = 0.5, 0.8 - utility
        row = {"arm": arm, "optimizer": optimizer, "utility": utility, "safety": 0.2 + gain, "predicted": x}
        row |= {"safety_gain": gain, "ucr": max(0.0, loss / gain), "ucr_of_means": max(0.0, loss / gain)}
        row |= {"ucr_of_means_low": 0.0, "n_seeds": 1, "n_no_gain": 0, "flag": "", "seed": 21}
        self.means.append(row | {"source_cr": None, "over_refusal_cr": None})
        own = np.random.default_rng(len(self.means)).normal(0, own_noise, RESAMPLES) if own_noise else 0.0
        self.drawn[arm, optimizer] = {"utility": utility + self.noise + own, "safety": 0.7 + 0 * self.noise}
        return self

    def claims(self, others=None, util_source="own_pool") -> dict[tuple[str, str], tuple[str, str]]:
        rows = self.means[1:]
        stand_in = {"mean_conflict": 0.5, "mean_sensitivity": 1.0}
        found = correlations.correlations([row | stand_in for row in rows], 4, resamples=10, seed=0)
        told = verdicts.claims(self.means, rows, found, self.drawn, 4, None, others or {}, util_source)
        return {(row["optimizer"], row["claim"]): (row["evidence"], row["verdict"]) for row in told}


def one(claims: dict, words: str) -> tuple[str, str]:
    (found,) = [outcome for (_, claim), outcome in claims.items() if words in claim]
    return found


def test_ablation_claims_only_where_their_arms_are():
    claims = Run().add("full", 0.5).add("bucket1", 0.6).add("bucket4", 0.7).claims(SAME)
    assert not any(mark in claim for _, claim in claims for mark in ("F.1", "F.2", "F.3", "F.4", "RQ2"))


@pytest.mark.parametrize(
    ("bottom50", "own_noise", "verdict"),
    [(0.6, 0.0, verdicts.HOLDS), (0.8, 0.0, verdicts.FAILS), (0.69, 0.1, verdicts.NOISE)],
)
def test_a_quarter_against_a_half(bottom50, own_noise, verdict):
    run = Run(noise=0.2).add("bucket4", 0.7).add("bottom50", bottom50, own_noise=own_noise)
    assert one(run.claims(), "(F.2)")[1] == verdict


def test_pcgrad_against_the_risky_zone():
    run = Run().add("full", 0.5, optimizer="pcgrad").add("bucket1", 0.6, optimizer="pcgrad")
    claims = run.add("bucket4", 0.7, optimizer="pcgrad").claims()
    assert one(claims, "(RQ2)")[1] == verdicts.HOLDS
    assert (
        claims["pcgrad", "Tuning the Safe Zone keeps more utility than tuning all heads"][1] == verdicts.HOLDS
    )


def buckets(utilities, suffix="", x=(0.9, 0.7, 0.5, 0.3), run=None, **more) -> Run:
    run = run or Run(noise=0.1)
    for number, utility in enumerate(utilities, start=1):
        run.add(f"bucket{number}{suffix}", utility, x[number - 1], **more)
    return run


@pytest.mark.parametrize(
    ("utilities", "data", "u"),
    [
        ((0.4, 0.5, 0.6, 0.7), verdicts.HOLDS, verdicts.FAILS),
        ((0.4, 0.5, 0.7, 0.6), verdicts.FAILS, verdicts.HOLDS),
        ((0.7, 0.5, 0.4, 0.6), verdicts.FAILS, verdicts.FAILS),
    ],
)
def test_which_bucket_keeps_most(utilities, data, u):
    evidence, verdict = one(buckets(utilities, "@m").claims(SAME), "(F.3)")
    assert verdict == data and ", ".join(f"{100 * one:.1f} %" for one in utilities) in evidence
    assert one(buckets(utilities, "@m").claims(WORKED), "F.4")[1] == u
    assert not any("F.4" in claim for _, claim in buckets(utilities, "@m").claims(SAME))


def test_the_best_bucket_within_noise_and_without_gain():
    run = buckets((0.4, 0.5, 0.69, 0.7), "@m", own_noise=0.1)
    assert one(run.claims(SAME), "(F.3)")[1] == verdicts.NOISE
    run.means[-1]["safety_gain"] = -0.1
    assert one(run.claims(SAME), "(F.3)")[1] == verdicts.UNKNOWN


def test_c_against_o_and_s():
    """Costs rise with C; with O they do not, with S half."""
    rising, falling, mixed = (0.4, 0.5, 0.6, 0.7), (0.7, 0.6, 0.5, 0.4), (0.5, 0.4, 0.7, 0.6)

    def told(c, o, s, **more):
        run = buckets(c, **more)
        return one(buckets(s, "_S", run=buckets(o, "_O", run=run, **more), **more).claims(), "(F.1)")

    evidence, verdict = told(rising, falling, mixed)
    assert verdict == verdicts.HOLDS and "+1.00 for C" in evidence and "−1.00 for O" in evidence
    assert told(mixed, rising, falling)[1] == verdicts.FAILS
    assert told(rising, rising, falling)[1] == verdicts.NOISE
    assert told(rising, falling, mixed, own_noise=0.3)[1] == verdicts.NOISE
