"""The figures of stage 06 about NeuronTune: the trade-off over K, and both systems on one plane.

`means` are rows of costs.with_intervals; a figure without arms is None.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from stages.reporting import costs, families
from stages.reporting.figures import GREY, INK, arm_look, arm_name
from stages.reporting.trade_offs import AXES, SIDES, grid, handle, percent, plane, several

PURPLE, GREEN = "#762a83", "#1b7837"
LINES = {"neurons": (PURPLE, "o", "-"), "randomneurons": (GREY, "s", ":")}
"""kind -> colour, marker, line"""


def split(means: Sequence[dict], m: int) -> tuple[list[dict], list[dict]]:
    """Rows of the base model and of arms of heads; rows of arms of neurons."""
    own = [row for row in means if families.of_neurons(row["arm"], m)]
    return [row for row in means if row not in own], own


def curves(own: Sequence[dict], m: int) -> dict[tuple[str, float], list[dict]]:
    """(kind, lam) -> arms by K."""
    found: dict[tuple[str, float], list[dict]] = {}
    for row in sorted(own, key=lambda row: families.parse(row["arm"], m).number):
        arm = families.parse(row["arm"], m)
        found.setdefault((arm.kind, arm.lam), []).append(row)
    return found


def over_threshold(means: Sequence[dict], m: int) -> Figure | None:
    """Safety, utility and over-refusal against the neuron-count threshold K."""
    heads, own = split(means, m)
    sides = [*SIDES, *(["over_refusal"] if means[0]["over_refusal"] is not None else [])]
    counts = sorted({families.parse(row["arm"], m).number for row in own})
    if len(counts) < 2:
        return None
    figure = Figure(figsize=(3.6 * len(sides), 3.3), layout="constrained")
    names = AXES | {"over_refusal": "over-refusal: benign requests refused (%)"}
    several_lam = len({lam for _, lam in curves(own, m)}) > 1
    for axes, side in zip(figure.subplots(1, len(sides)), sides, strict=True):
        for (kind, lam), rows in curves(own, m).items():
            colour, marker, dashes = LINES[kind]
            values = [percent(row, side, several(means)) for row in rows]
            axes.errorbar(
                [counts.index(families.parse(row["arm"], m).number) for row in rows],
                [value for value, _ in values],
                yerr=np.hstack([bar for _, bar in values]),
                color=colour,
                alpha=0.4 + 0.6 * lam if several_lam else 1.0,
                marker=marker,
                linestyle=dashes,
                capsize=2,
                elinewidth=0.8,
                label=("random neurons" if kind != "neurons" else "chosen neurons")
                + (f", lam {lam:g}" if several_lam else ""),
            )
        base = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
        axes.axhline(100 * heads[0][side], **base, label="base model")
        axes.set_xticks(range(len(counts)), labels=counts)
        axes.set_xlabel("K: neurons of each kind")
        axes.set_ylabel(names[side])
        grid(axes)
    axes.legend(loc="best")
    figure.suptitle("NeuronTune: more and more neurons", x=0.01, ha="left", fontsize=9.5)
    return figure


def both_systems(means: Sequence[dict], m: int) -> Figure | None:
    """Utility against safety of CAST's main arms by plain fine-tuning and of NeuronTune's."""
    heads, own = split(means, m)
    if not own:
        return None
    shown = [row for row in heads if row["arm"] == costs.BASE or row["optimizer"] == "sft"]
    shown = [row for row in shown if families.is_main(row["arm"], m)] + own
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    handles = {}
    points = [[percent(row, side, several(means)) for side in SIDES] for row in shown]
    front = costs.pareto_front([x for (x, _), _ in points], [y for _, (y, _) in points])
    line = [[points[at][axis][0] for at in front] for axis in (0, 1)]
    axes.step(*line, where="pre", color=GREY, linewidth=1.2, linestyle="--", zorder=2)
    for row, ((x, x_bar), (y, y_bar)) in zip(shown, points, strict=True):
        look = {"markersize": 12 if row["arm"] == costs.BASE else 8, "markeredgecolor": INK}
        if row in own:
            arm = families.parse(row["arm"], m)
            colour, marker, _ = LINES[arm.kind]
            look |= {"color": colour, "marker": marker}
            note = {"textcoords": "offset points", "fontsize": 7.5, "color": colour}
            axes.annotate(f"{arm.number}", (x, y), (6, 5), **note)
            name = "NeuronTune (K)" if arm.kind == "neurons" else "random neurons (K)"
        else:
            look |= arm_look(row["arm"], m)
            name = arm_name(row["arm"], m)
        bars = {"xerr": x_bar, "yerr": y_bar, "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(x, y, **bars, **look, markeredgewidth=0.4, linestyle="", zorder=3)
        handles.setdefault(name, handle(**look, markeredgewidth=0.4))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    plane(axes)
    axes.set_title("CAST's heads and NeuronTune's neurons (dashed: Pareto front)")
    return figure


def all_figures(means: Sequence[dict], m: int) -> dict[str, Figure]:
    """File name -> figure."""
    made = {"neurontune_threshold": over_threshold(means, m), "neurontune_pareto": both_systems(means, m)}
    return {name: figure for name, figure in made.items() if figure is not None}
