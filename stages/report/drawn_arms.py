"""Does the map predict the cost of arms drawn for that (--ablations draws32)?

A point is an arm of a quarter of the heads, drawn with preferences along O and along S that are independent
of one another (stages.method.arms). Costs are counted (accuracy lost) and graded (log p of the right answers
lost), of each utility benchmark and of their mean, as measured and at equal safety gained.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from stages.method.arms import BASE_RUN, ArmRun
from stages.method.heads import COLUMN
from stages.method.prediction import predict, smallest_r
from stages.report.responses import Responses

OUTCOMES = {"counted": "verdict", "graded": "loglikelihood"}
"""of a response"""
DEPTH = "depth"
"""mean layer of an arm's heads, 0 the first and 1 the last"""
OTHERS = {"C": (DEPTH,), "O": ("S", DEPTH), "S": ("O", DEPTH), DEPTH: ("C",)}
"""predictor -> those that its partial correlation holds fixed; C is made of O and S"""
MEASURED, EQUAL = "as measured", "at equal safety"
TOGETHER = "utility"
"""the mean of the utility benchmarks"""
COLUMNS = ["map", "benchmark", "outcome", "at", "predictor", "n"]
COLUMNS += ["r", "low", "high", "p", "p_heads", "slope", "partial", "smallest_r"]


def families(costs: pd.DataFrame) -> dict[str, list[ArmRun]]:
    """The draws of each map, as they were tuned."""
    found: dict[str, list[ArmRun]] = {}
    for run in costs.index[1:]:
        if run.arm.draw is not None:
            found.setdefault(run.arm.map, []).append(run)
    return found


def predictors(means: pd.DataFrame, layers: pd.Series, last: int) -> dict[str, np.ndarray]:
    """Means over each arm's heads, [A] each.

    Args:
        means: rows of costs.arm_costs.
        layers: of each arm's heads.
        last: the model's last layer.
    """
    found = {name: means[f"mean_{column}"].to_numpy(float) for name, column in COLUMN.items()}
    return found | {DEPTH: np.array([np.mean(own) / max(1, last) for own in layers])}


def shared_heads(arms: pd.DataFrame) -> np.ndarray:
    """How many heads two arms share, [A, A], from their rows of arms.parquet."""
    sets = [set(zip(row["layers"], row["heads"], strict=True)) for row in arms.to_dict("records")]
    return np.array([[len(one & other) for other in sets] for one in sets], float)


def losses(responses: Responses, runs: list[ArmRun]) -> Iterator[tuple[str, str, np.ndarray]]:
    """What each arm lost against the base model: benchmark (or their mean), outcome, cost [A]."""
    for outcome, column in OUTCOMES.items():
        means = {}
        for run in (BASE_RUN, *runs):
            rows = responses.of[run]
            own = rows[rows["side"] == "utility"]
            means[run] = own.groupby("benchmark", sort=False)[column].mean()
        table = pd.DataFrame(means).T.dropna(axis=1)  # (1 + A, benchmarks)
        lost = table.iloc[0] - table.iloc[1:]
        for name in lost.columns:
            yield name, outcome, lost[name].to_numpy(float)
        if len(lost.columns) > 1:
            yield TOGETHER, outcome, lost.mean(axis=1).to_numpy(float)


def predictions(
    costs: pd.DataFrame,
    arms: pd.DataFrame,
    responses: Responses,
    last: int,
    generator: np.random.Generator,
) -> pd.DataFrame:
    """A row a map, benchmark, outcome, condition and predictor: columns of `method.prediction.Prediction`.

    Args:
        costs: costs.arm_costs, the base model first.
        arms: arms.parquet, by ArmRun.
        last: the model's last layer.
    """
    rows = []
    for name, runs in families(costs).items():
        x = predictors(costs.loc[runs], arms.loc[runs, "layers"], last)
        overlap = shared_heads(arms.loc[runs])
        gained = costs.loc[runs, "safety_gain"].to_numpy(float)
        for benchmark, outcome, cost in losses(responses, runs):
            for at, fixed in ((MEASURED, {}), (EQUAL, {"safety": gained})):
                for predictor, own in x.items():
                    others = {other: x[other] for other in OTHERS[predictor]}
                    found = predict(own, cost, fixed, others, generator, overlap)
                    labels = {"map": name, "benchmark": benchmark, "outcome": outcome, "at": at}
                    labels |= {"predictor": predictor, "smallest_r": smallest_r(len(runs))}
                    rows.append(labels | found._asdict())
    return pd.DataFrame(rows, columns=COLUMNS)
