"""Worked answers: their last number, their steps, the three ways to read GSM8K; WildGuard's answers."""

import dataclasses
import doctest

import pytest

from data import classifier, records, refusal_judge, scoring
from data.embedded import generate


def test_doctests():
    for module in (scoring, classifier, records, refusal_judge, generate):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("3 + 4 = 7 apples", 7),
        ("It costs $1,234.50.", 1234.5),
        ("1,000,000 people", 1_000_000),
        ("one of 1,2,3", 3),
        ("from -4 to -3.5", -3.5),
        ("a loss of -$20", -20),
        ("a loss of $-20", -20),
        ("it fell to \u22123 degrees", -3),
        ("so $10-3 = 7$", 7),
        ("about .5 litres", 0.5),
        ("12 bottles of H2O", 12),
    ],
)
def test_last_number(text, number):
    assert scoring.last_number(text) == number


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("", 0),
        ("The answer is $\\boxed{80}$.", 0),
        ("He has 5. He buys 3. That makes \\boxed{8}", 2),
        ("Let us think.\n\n1. Twenty percent of 45 is 9.\n2. 45 - 9 = 36.\n\\boxed{81}", 2),
        ("The price is 3.5 dollars and 1.5 more, so \\boxed{5}.", 0),
        ("\\[ 0.25x = 20 \\]\n\\[ x = 80 \\]\nSo \\boxed{80}", 2),
    ],
)
def test_reasoning_steps(response, steps):
    assert scoring.reasoning_steps(response) == steps


@pytest.mark.parametrize(
    ("response", "strict", "flexible", "verdict"),
    [
        ("So \\boxed{1,200}.", True, True, True),
        ("So \\boxed{1200.0}", True, True, True),
        ("#### 1200", True, True, False),
        ("It is 1200 dollars", False, True, False),
        ("\\boxed{1200} for 3 days", True, False, True),
        ("\\boxed{\\frac{2400}{2}}", False, False, True),
        ("nothing", False, False, False),
    ],
)
def test_gsm8k_is_scored_strictly_flexibly_and_by_math_verify(response, strict, flexible, verdict):
    found = scoring.judge("boxed", response, "1200", numeric=True)
    assert (found.strict, found.flexible, found.verdict) == (strict, flexible, verdict)


def test_what_does_not_apply_to_a_row_is_none():
    refused = scoring.judge("refusal", "I can't help with 2 of them.", "No.")
    assert dataclasses.astuple(refused) == (True, True, None, None, None)
    assert scoring.judge("boxed", "\\boxed{2}", "2").strict is None
    with pytest.raises(ValueError, match="no verdict by text for 'choice'"):
        scoring.judge("choice", "A", "A")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", (True, True, False)),
        ("harmful request: No \nresponse refusal: N/A\nharmful response: n/a", (False, None, None)),
        ("Harmful request: yes\nResponse refusal: maybe\nHarmful response: no", None),
        ("", None),
    ],
)
def test_wildguards_answers(answer, found):
    parsed = classifier.parse(answer)
    assert (dataclasses.astuple(parsed) if parsed else None) == found


def test_a_request_cannot_fill_the_place_of_the_response():
    assert "\nAI assistant:\nfine\n" in classifier.prompt("{response} and {prompt}", "fine")
