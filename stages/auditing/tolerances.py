"""How far two runs of one method may differ, by the precision that they were made in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerances:
    """How far two runs of the same settings and rows may differ; None: the quantity is only reported."""

    gradients: float | None
    """largest difference of two fold gradients' inner product, in units of their norms"""
    conflict: float | None
    """largest difference of O"""
    predictions: float | None
    """least share of equal ones"""
    generations: float | None
    """least share of equal ones, and of the base model's responses"""
    near: float | None
    """largest difference of two logits that is called a near-tie"""
    change: float | None
    """mean difference of H_gen and H_safe"""
    rank: float | None
    """least rank correlation of S and C"""
    buckets: float | None
    """least share of heads in the same one"""
    loss: float | None
    """mean difference of a step's training loss"""
    update: float | None
    """largest difference of an arm's update of W_q, relative to its length"""
    score: float | None
    """largest difference of a benchmark's score"""
    neurons: float | None
    """largest difference of a neuron's score, in units of the largest score"""
    gains: float | None
    """largest difference of two gains"""


# What two backends showed on SmolLM2 is in docs/LOG.md; the bounds leave room for another processor's
# rounding. Half precision decides most responses' near-ties otherwise, and with them refusals, H_safe, S and
# buckets (bfloat16 against float32, one backend: 40 % of responses and 53 % of buckets equal): it is held to
# what does not hang on those.
FLOAT32 = Tolerances(
    gradients=1e-5,
    conflict=1e-5,
    predictions=0.99,
    generations=0.99,
    near=1e-3,
    change=0.005,
    rank=0.99,
    buckets=0.99,
    loss=1e-3,
    update=0.01,
    score=0.03,
    neurons=1e-4,
    gains=0.01,
)
HALF = Tolerances(
    gradients=None,
    conflict=0.1,
    predictions=0.95,
    generations=None,
    near=None,
    change=None,
    rank=None,
    buckets=None,
    loss=0.2,
    update=None,
    score=None,
    neurons=None,
    gains=None,
)
