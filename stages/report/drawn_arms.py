"""Do the maps predict the cost of arms drawn for that (--ablations draws32)?

A point is an arm of a quarter of the heads, drawn with preferences along O and along S of one map that are
independent of one another (stages.method.arms). Every map of the run is asked what they cost (App. F.4), by
every kind of outcome that its S can be made of: O, S and C are means over an arm's heads. Costs are counted
(accuracy lost) and graded (log p of the right answers lost), of each utility benchmark and of their mean, as
measured and at equal safety gained.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.method.arms import BASE_RUN, OWN, ArmRun
from stages.method.conflict_map import maps_by_outcome
from stages.method.heads import COLUMN, HeadMap, Sensitivity
from stages.method.metrics import SensitivityVariant
from stages.method.prediction import predict, residuals, smallest_r
from stages.report.figures import GREY, INK, new_figure
from stages.report.responses import Responses
from stages.report.words import SEEN, relation, signed

OUTCOMES = {"counted": "verdict", "graded": "graded"}
"""of a response"""
DEPTH = "depth"
"""mean layer of an arm's heads, 0 the first and 1 the last"""
OTHERS = {"C": (DEPTH,), "O": ("S", DEPTH), "S": ("O", DEPTH), DEPTH: ("C",)}
"""predictor -> those that its partial correlation holds fixed; C is made of O and S"""
MEASURED, EQUAL = "as measured", "at equal safety"
TOGETHER = "utility"
"""the mean of the utility benchmarks"""
COLUMNS = ["draws", "map", "sensitivity", "benchmark", "outcome", "at", "predictor", "n"]
COLUMNS += ["r", "low", "high", "p", "p_heads", "slope", "partial", "smallest_r"]


class MapBy(NamedTuple):
    """A map of the run by one kind of outcome."""

    name: str
    sensitivity: Sensitivity
    """what S is made of"""


@dataclass(frozen=True)
class Family:
    """The arms that were drawn along one map, [A] each."""

    along: MapBy
    predictors: Mapping[MapBy, Mapping[str, np.ndarray]]
    """map that predicts -> C, O, S, depth -> means over each arm's heads"""
    gained: np.ndarray
    """safety"""
    overlap: np.ndarray
    """how many heads two arms share, [A, A]"""
    lost: Sequence[tuple[str, str, np.ndarray]]
    """benchmark (or their mean), outcome, cost"""


def predicting_maps(
    maps: Mapping[str, pd.DataFrame], variant: SensitivityVariant, m: int
) -> dict[MapBy, HeadMap]:
    """Every map by every kind of outcome that was computed, from the heads.parquet of each."""
    return {
        MapBy(name, kind): head_map
        for name, columns in maps.items()
        for kind, head_map in maps_by_outcome(columns, variant, m).items()
    }


def families(
    costs: pd.DataFrame,
    arms: pd.DataFrame,
    responses: Responses,
    maps: Mapping[MapBy, HeadMap],
    sensitivity: Sensitivity,
) -> list[Family]:
    """The draws of each map, as they were tuned.

    Args:
        costs: costs.arm_costs, the base model first.
        arms: arms.parquet, by ArmRun.
        maps: every map of the run, by every kind of outcome.
        sensitivity: what arms were drawn along.
    """
    drawn: dict[str, list[ArmRun]] = {}
    for run in costs.index[1:]:
        if run.arm.draw is not None:
            drawn.setdefault(run.arm.map, []).append(run)
    found = []
    for name, runs in drawn.items():
        along = MapBy(name, sensitivity)
        own = [np.array([row["layers"], row["heads"]]) for row in arms.loc[runs].to_dict("records")]
        by_map = {other: predictors(head_map, own) for other, head_map in maps.items()}
        gained = costs.loc[runs, "safety_gain"].to_numpy(float)
        found.append(Family(along, by_map, gained, shared_heads(own), [*losses(responses, runs)]))
    return found


def predictors(head_map: HeadMap, heads: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Means over each arm's heads, [A] each.

    Args:
        heads: of each arm: layers and heads, [2, n].
    """
    found = {by: np.array([head_map.by(by)[tuple(own)].mean() for own in heads]) for by in COLUMN}
    last = max(1, head_map.shape[0] - 1)
    return found | {DEPTH: np.array([np.mean(layers) / last for layers, _ in heads])}


def shared_heads(heads: Sequence[np.ndarray]) -> np.ndarray:
    """How many heads two arms share, [A, A]."""
    sets = [set(map(tuple, own.T.tolist())) for own in heads]
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


def predictions(drawn: Sequence[Family], generator: np.random.Generator) -> pd.DataFrame:
    """A row a family of draws, map, what its S is made of, benchmark, outcome, condition and predictor: the
    columns of `method.prediction.Prediction`.

    The map along which arms were drawn comes first: its numbers are the same whatever other maps there are.
    """
    pairs = [(family, family.along) for family in drawn]
    pairs += [(family, other) for family in drawn for other in family.predictors if other != family.along]
    rows = []
    for family, by in pairs:
        x, count = family.predictors[by], len(family.gained)
        for benchmark, outcome, cost in family.lost:
            for at, fixed in ((MEASURED, {}), (EQUAL, {"safety": family.gained})):
                for predictor, own in x.items():
                    if predictor == DEPTH and by != family.along:
                        continue  # the same for every map
                    if predictor == "O" and by != MapBy(by.name, family.along.sensitivity):
                        continue  # the same whatever S is made of
                    others = {other: x[other] for other in OTHERS[predictor]}
                    found = predict(own, cost, fixed, others, generator, family.overlap)
                    labels = {"draws": family.along.name, "map": by.name, "sensitivity": by.sensitivity}
                    labels |= {"benchmark": benchmark, "outcome": outcome, "at": at, "predictor": predictor}
                    rows.append(labels | {"smallest_r": smallest_r(count)} | found._asdict())
    return pd.DataFrame(rows, columns=COLUMNS)


def figure(drawn: Sequence[Family], predicted: pd.DataFrame) -> Figure | None:
    """Graded cost against mean C of the run's own map, over the arms drawn along it, at equal safety: a panel
    a benchmark. None where no such arm was tuned."""
    own = next((family for family in drawn if family.along.name == OWN), None)
    lost = own.lost if own else ()
    costs = {name: cost for name, outcome, cost in lost if outcome == "graded" and name != TOGETHER}
    if not costs:
        return None
    rows = predicted[(predicted[["draws", "map"]] == OWN).all(axis=1) & (predicted["at"] == EQUAL)]
    rows = rows[(rows["predictor"] == "C") & (rows["outcome"] == "graded")]
    rows = rows[rows["sensitivity"] == own.along.sensitivity].set_index("benchmark")
    drawing, panels = new_figure(3.1 * len(costs) + 0.3, 3.4, ncols=len(costs), squeeze=False)
    for axes, (name, cost) in zip(panels[0], costs.items(), strict=True):
        cost_panel(axes, own, cost, rows.loc[name])
    panels[0][0].set_ylabel("log p of right answers lost, at equal safety")
    return drawing


def cost_panel(axes: Axes, family: Family, cost: np.ndarray, row: pd.Series) -> None:
    """One benchmark: what is left of C and of its cost [A] when the safety gained is held fixed, about their
    means; `row` of the predictions says what their correlation is."""
    base = family.gained[:, None]
    x, y = (
        values.mean() + residuals(values, base) for values in (family.predictors[family.along]["C"], cost)
    )
    told = not pd.isna(row["r"])
    seen = told and row["p_heads"] < SEEN
    axes.scatter(x, y, s=16, color=INK if seen else GREY, linewidths=0, zorder=3)
    words = "cannot be told"
    if told:
        ends = np.array([x.min(), x.max()])
        line = (
            {"color": INK, "linewidth": 1.2} if seen else {"color": GREY, "linewidth": 1, "linestyle": "--"}
        )
        axes.plot(ends, y.mean() + row["slope"] * (ends - x.mean()), **line, zorder=2)
        words = f"$r$ = {signed(row['r'])} ({signed(row['low'])} to {signed(row['high'])}), p = "
        words += f"{row['p_heads']:.2f}:\n{relation(row['p_heads'])}"
    axes.set_title(f"{row.name}\n{words}", fontsize=8.5)
    axes.set_xlabel("mean C of an arm's heads")
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
