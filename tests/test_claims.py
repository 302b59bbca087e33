"""The paper's claims: what each verdict takes, from numbers made by hand."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from stages.method.arms import BASE_RUN, OWN, ArmRun, parse
from stages.report import claims as verdicts
from stages.report import costs, tables
from stages.report.findings import findings
from stages.report.results import Results
from stages.report.words import AGAINST_BY_ONE, FAILS, FOR_BY_ONE, HOLDS, NOISE, UNKNOWN
from stages.run.maps import MapSpec
from tests.fabricated import correlate, results_of

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


def buckets(utilities, suffix="", x=(0.9, 0.7, 0.5, 0.3), run=None, **more) -> Run:
    run = run or Run(noise=0.05)
    for number, utility in enumerate(utilities, start=1):
        run.add(f"bucket{number}{suffix}", utility, x=x[number - 1], **more)
    return run


def zones(optimizer: str = "sft", noise=0.0, seeds: int = 2, **utilities: float) -> Run:
    run = Run(seeds=seeds, noise=0.05)
    for arm, utility in utilities.items():
        run.add(arm, utility, optimizer=optimizer, noise=(noise, 0.0))
    return run


def c_o_s(c, o, s, **more) -> Run:
    return buckets(s, "_S", run=buckets(o, "_O", run=buckets(c, **more), **more), **more)


ALL_HEADS = "keeps more utility than tuning all heads"


@pytest.mark.parametrize(
    ("run", "claim", "verdict"),
    [
        # A quarter against a half, and PCGrad.
        (zones(bucket4=0.7, bottom50=0.6), "(F.2)", HOLDS),
        (zones(bucket4=0.7, bottom50=0.8), "(F.2)", FAILS),
        (zones(bucket4=0.7, bottom50=0.69, noise=0.1), "(F.2)", NOISE),
        (zones("pcgrad", full=0.5, bucket1=0.6, bucket4=0.7), "(RQ2)", HOLDS),
        (zones("pcgrad", full=0.5, bucket1=0.6, bucket4=0.7), ALL_HEADS, HOLDS),
        # One seed decides nothing.
        (zones(bucket4=0.7, bottom50=0.75, seeds=1), "(F.2)", AGAINST_BY_ONE),
        (zones(bucket4=0.7, full=0.5, seeds=1), ALL_HEADS, FOR_BY_ONE),
        (zones(bucket4=0.7, full=0.69, noise=0.1, seeds=1), ALL_HEADS, NOISE),
        # Which bucket keeps most: of 4, an inner one.
        (buckets(UP, "@m"), "(F.3)", HOLDS),
        (buckets(UP, "@m"), "F.4", FAILS),
        (buckets((0.4, 0.5, 0.7, 0.6), "@m"), "(F.3)", FAILS),
        (buckets((0.4, 0.5, 0.7, 0.6), "@m"), "F.4", HOLDS),
        (buckets((0.7, 0.5, 0.4, 0.6), "@m"), "F.4", FAILS),
        (buckets((0.4, 0.5, 0.69, 0.7), "@m", noise=(0.1, 0.0)), "(F.3)", NOISE),
        (buckets((0.4, 0.5, 0.6), "@m").add("bucket4@m", 0.7, safety=0.1), "(F.3)", UNKNOWN),
        # C against O and S: costs rise with C; with O they do not, with S half.
        (c_o_s(MIXED, UP, DOWN), "(F.1)", FAILS),
        (c_o_s(UP, UP, DOWN), "(F.1)", NOISE),
        (c_o_s(UP, DOWN, (0.5, 0.4, 0.7, 0.6), noise=(0.3, 0.0)), "(F.1)", NOISE),
    ],
)
def test_verdicts(run, claim, verdict):
    optimizer = "pcgrad" if any(unit.optimizer == "pcgrad" for unit in run.scores) else "sft"
    assert run.claim(claim, WORKED if claim == "F.4" else SAME, optimizer=optimizer)[1] == verdict


def test_ablation_claims_only_where_their_arms_are():
    table = verdicts.claims(zones(full=0.5, bucket1=0.6, bucket4=0.7).results(SAME))
    assert not table["claim"].str.contains(r"F\.|RQ2").any()


def test_evidence():
    evidence, verdict = c_o_s(UP, DOWN, (0.5, 0.4, 0.7, 0.6)).claim("(F.1)")
    assert verdict == HOLDS and "+1.00 for C" in evidence and "−1.00 for O" in evidence
    evidence, verdict = buckets((0.4, 0.5, 0.6), "@m").add("bucket4@m", 0.65, safety=0.4).claim("(F.3)", SAME)
    # At a safety of 0.4 bucket 3 would keep 0.8 - 0.4 * 0.2.
    assert verdict == FAILS and "72.0 %, 65.0 %" in evidence
    run = Run().add("bucket4", 0.7).add("bucket1", 0.6).add("random", 0.7)
    assert run.claim("than the Risky Zone") == ("0.20 against 0.40; lower in 2 of 2 seeds", HOLDS)
    assert run.claim("drawn at random") == ("0.20 against 0.20; lower in 0 of 2 seeds", NOISE)
    for safety, noise, verdict in ((0.22, 0.1, NOISE), (0.1, 0.0, UNKNOWN)):  # a gain within noise, none
        run = Run().add("bucket4", 0.7, safety, noise=(0.0, noise)).add("bucket1", 0.6)
        assert run.claim("than the Risky Zone")[1] == verdict


@pytest.mark.parametrize(
    ("safe", "full", "equal", "verdict"),
    [
        # 59 % of safety keep more utility than 95 % in any case: that alone is no claim. The line from the
        # base model, (0.2, 0.8), to (0.95, utility) is at safety 0.59 at 0.8 - 0.52 (0.8 - utility).
        ((0.57, 0.59), (0.30, 0.95), "57.0 % against 54.0 %", HOLDS),
        ((0.57, 0.59), (0.49, 0.95), "57.0 % against 63.9 %", FAILS),
        ((0.60, 0.80), (0.65, 0.50), "70.0 % against 65.0 %", HOLDS),  # the safer one is interpolated
        ((0.60, 0.70), (0.61, 0.72, (0.0, 0.05)), "", FAILS),  # safety differs within noise
        ((0.60, 0.70), (0.61, 0.10), "", UNKNOWN),
    ],
)
def test_arms_of_unequal_safety_are_compared_on_the_line_from_the_base_model(safe, full, equal, verdict):
    evidence, found = Run().add("bucket4", *safe).add("full", *full).claim(ALL_HEADS)
    assert found == verdict and evidence.partition("; at equal safety ")[2] == equal


@pytest.mark.parametrize(
    ("utilities", "seeds", "verdict"),
    [(UP, 2, HOLDS), (DOWN, 2, FAILS), (MIXED, 2, NOISE), (UP, 1, FOR_BY_ONE), (DOWN, 1, AGAINST_BY_ONE)],
)
def test_findings_give_the_verdict_of_the_claims(utilities, seeds, verdict):
    results = (run := buckets(utilities, run=Run(seeds=seeds))).results()
    assert run.claim("C predicts the cost")[1] == verdict
    _, paragraph = findings(results, verdicts.claims(results), None)
    (sentence,) = [sentence for sentence in paragraph if "claim" in sentence]
    assert sentence.rpartition("predicts cost: ")[2] == f"{verdict}."


@pytest.mark.parametrize(
    ("utilities", "x", "equal"), [((0.6,) * 4, 0.9, "costs"), (UP, 0.5, "values of C"), (UP, 0.9, "")]
)
def test_what_is_equal_is_named_where_there_is_no_correlation(utilities, x, equal):
    run = buckets(utilities, x=(x, 0.5, 0.5, 0.5), run=Run())
    results, said = run.results(), []
    evidence, verdict = run.claim("C predicts the cost")
    paragraph = findings(results, verdicts.claims(results), None)[1]
    (row,) = tables.correlation_table(results).rows.to_dict("records")
    correlate.warn_of_limits(SimpleNamespace(warn=said.append), results)
    assert (verdict == UNKNOWN) == bool(equal)
    for text in (evidence, " ".join(paragraph), row["flag"] or "", " ".join(said)):
        assert re.findall(r"(?:the|their) ((?:costs|values)[^.;]*) are all equal", text) == (
            [equal] if equal else []
        )
