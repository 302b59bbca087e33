"""Words for people: verdicts, numbers, arms, families of buckets, costs. No logic reads them back."""

from stages.method.arms import LAM, OWN, Arm

NO_GAIN = "no safety gain"
HOLDS, FAILS = "holds", "does not hold"
FOR_BY_ONE, AGAINST_BY_ONE = "one seed, for it", "one seed, against it"
NOISE, UNKNOWN = "within noise", "cannot be told"
"""verdicts on a claim; of one training seed only the direction"""

QUANTITIES = {
    "optimization_conflict": "O",
    "h_gen": "H gen",
    "h_safe": "H safe",
    "functional_sensitivity": "S",
    "conflict_score": "C",
    "bucket": "buckets (kappa)",
}
"""columns of heads.parquet"""

SEEN = 0.05
"""p below which a relation is said to be one"""


def relation(p: float) -> str:
    return "a relation" if p < SEEN else "no relation that can be told from chance"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares as signed percentage points."""
    return f"{100 * difference:+.1f} points".replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def zone(bucket: int, of: int) -> str:
    """ " (Risky Zone)", " (Safe Zone)" or nothing; with a single bucket there are no zones."""
    return {1: " (Risky Zone)", of: " (Safe Zone)"}.get(bucket, "") if of > 1 else ""


def arm_words(arm: Arm, m: int) -> str:
    """An arm for a sentence in a run of `m` buckets: "bucket 4 (Safe Zone)", "bottom 50 % of C"."""
    if arm.of_neurons:
        drawn = "random " if arm.kind == "randomneurons" else ""
        lam = f" at lam {arm.lam:g}" if arm.lam != LAM else ""
        return f"{arm.neurons} + {arm.neurons} {drawn}neurons{lam}"
    if arm.kind in ("base", "full", "random"):
        return {"full": "all heads", "random": "random heads"}.get(arm.kind, arm.kind)
    if arm.is_zone(m):
        return f"bucket {arm.bucket}{zone(arm.bucket, m)}"
    where = f" of map {arm.map}" if arm.map != OWN else ""
    if arm.share:
        return f"{arm.kind} {arm.share} % of {arm.ranked_by}{where}"
    if arm.draw:
        return f"draw {arm.draw} of {arm.of}{where}"
    of = f" of {arm.of}" if arm.of != m else ""
    ranked_by = f" by {arm.ranked_by}" if arm.ranked_by != "C" else ""
    again = ", re-diagnosed" if arm.rediagnosed else ""
    return f"bucket {arm.bucket}{of}{ranked_by}{where}{again}"


def family_words(arm: Arm, m: int) -> str:
    """The family of a bucket, all buckets of one ranking: "C", "O", "C of 8", "C by mmlu100"."""
    of = f" of {arm.of}" if arm.of != m else ""
    return f"{arm.ranked_by}{of}{f' by {arm.map}' if arm.map != OWN else ''}"


def cost_name(cost: str, source: str | None) -> str:
    """A cost ratio as readers know it: "UCR", "MMLU-CR" of the benchmark `source`, "over-refusal-CR".

    >>> cost_name("source_cr", "own_util")
    'OWN-UTIL-CR'
    """
    domain = (source or "source").upper().replace("_", "-")
    return {"ucr": "UCR", "source_cr": f"{domain}-CR", "over_refusal_cr": "over-refusal-CR"}[cost]


def cost_column(cost: str, source: str | None) -> str:
    """A cost ratio as a column of the paper's tables: "ucr", "mmlu_cr"."""
    return cost_name(cost, source).lower().replace("-", "_")
