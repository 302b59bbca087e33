"""How much probability the candidates of next-token benchmarks get, in log, manifest and report."""

import pandas as pd

from stages.method.arms import BASE_RUN
from stages.run.classify import Evaluation
from stages.run.job import Job

LOW_PROBABILITY = 0.5
"""of the candidates of a next-token benchmark together: below it their score says little"""


def probability(
    own: list[Evaluation], responses: list[pd.DataFrame], rows: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """Benchmark -> model -> the probability that the candidates (letters, say) get together, on average over
    the rows that have some."""
    compete = rows.assign(compete=rows["choices"].map(len) > 0).groupby("split")["compete"]
    compete = {name: own.to_numpy() for name, own in compete}
    found: dict[str, dict[str, float]] = {}
    for evaluation, answered in zip(own, responses, strict=True):
        name = evaluation.benchmark.name
        if compete[name].any():
            of_model = answered["probability"].to_numpy(float)[compete[name]].mean()
            found.setdefault(name, {})[evaluation.run.name] = float(of_model)
    return found


def say(job: Job, likely: dict[str, dict[str, float]]) -> None:
    """Says how much probability candidates get, and where it is little."""
    for name, of_models in likely.items():
        job.say(f"{name}: its candidates get {of_models[BASE_RUN.name]:.2f} of the base model's probability")
        if low := [model for model, value in of_models.items() if value < LOW_PROBABILITY]:
            job.warn(
                f"{name}: of {len(low)} of {len(of_models)} models the candidates get less than "
                f"{LOW_PROBABILITY} of the probability, as {of_models[low[0]]:.2f} of {low[0]}: they answer "
                f"otherwise"
            )
