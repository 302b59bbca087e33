"""The figures of stage 06 about tuned arms: what was gained, what it cost, and whether the map predicted it.

A figure whose arms were not tuned is None.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.method.arms import BASE_RUN, OWN, SHARES, ArmRun, head_arm
from stages.report import drawn_arms
from stages.report.figures import GREY, INK, LOOKS, arm_look, arm_name, bucket_look, new_figure, score_map
from stages.report.results import FULL, Results
from stages.report.words import cost_name

RISKY_RED, SAFE_BLUE, FULL_GREY = "#b2182b", "#2166ac", "#555555"
AXES = {
    "safety": "safety: harmful prompts refused (%)",
    "utility": "utility: mean accuracy (%)",
    "over_refusal": "over-refusal: benign requests refused (%)",
}
MANY = 8
"""buckets, of more only the first and the last are named"""
FILLS = {"filled": "full", "hollow": "none", "half": "left"}
"""how markers tell optimizers apart, in their order: word -> matplotlib's fillstyle"""


def percent(results: Results, run: ArmRun, side: str) -> tuple[float, np.ndarray]:
    """Mean score in percent, and its 95 % interval as an error bar, [2, 1]."""
    value, low, high = (100 * results.means.loc[run, f"{side}{end}"] for end in ("", "_low", "_high"))
    return value, np.maximum([[value - low], [high - value]], 0.0)


def grid(axes: Axes) -> None:
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)


def marker(look: dict, turn: int = 0, size: float = 8) -> dict:
    """A marker in the way of the optimizer of this turn."""
    return look | {
        "linestyle": "",
        "markersize": 12 if look == LOOKS["base"] else size,
        "fillstyle": list(FILLS.values())[turn % len(FILLS)],
        "markerfacecoloralt": "white",
        "markeredgecolor": look["color"] if turn else INK,
        "markeredgewidth": 1.4 if turn else 0.4,
    }


def plane(axes: Axes, results: Results, markers: Mapping[ArmRun, dict]) -> dict[ArmRun, tuple[float, float]]:
    """Draws arms by safety and utility, with their intervals and K; returns where.

    At least two points wide: arms that are all alike should look alike.
    """
    places = {}
    for run, own in markers.items():
        (x, x_bar), (y, y_bar) = (percent(results, run, side) for side in ("safety", "utility"))
        axes.errorbar(x, y, xerr=x_bar, yerr=y_bar, elinewidth=0.8, capsize=2, zorder=3, **own)
        places[run] = x, y
        if run.arm.of_neurons:
            note = {"textcoords": "offset points", "fontsize": 7.5, "color": own["color"]}
            axes.annotate(f"{run.arm.neurons}", (x, y), (6, 5), **note)
    axes.margins(0.08)
    for limits, widen in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        if limits[1] - limits[0] < 2:
            widen(limits[0] - 1, limits[1] + 1)
    grid(axes)
    axes.set(xlabel=AXES["safety"], ylabel=AXES["utility"])
    return places


def localisation(results: Results) -> Figure | None:
    """Figure 1: where conflict is (C of each head), and where tuning each zone leads from the base model."""
    m, optimizer = results.m, next(iter(results.optimizers), "")
    ends = {results.find(FULL, optimizer): FULL_GREY}
    if m > 1:
        ends |= {results.bucket(1, optimizer): RISKY_RED, results.bucket(m, optimizer): SAFE_BLUE}
    markers = {run: marker(arm_look(run.arm, m) | {"color": colour}) for run, colour in ends.items() if run}
    if not markers:
        return None
    figure, (top, bottom) = new_figure(6.4, 6.0, nrows=2, height_ratios=[1.0, 1.5])
    shown = score_map(top, results.heads[OWN].conflict_score.T)
    figure.colorbar(shown, ax=top, aspect=14, pad=0.01).set_label("$C(h)$")
    top.set(xlabel="layer", ylabel="head", title="Where safety and utility conflict: C of each head")

    places = plane(bottom, results, {BASE_RUN: marker(LOOKS["base"])} | markers)
    for run, own in markers.items():
        arrow = {"arrowstyle": "-|>", "color": own["color"], "linewidth": 1.8, "shrinkA": 7, "shrinkB": 6}
        bottom.annotate("", places[run], places[BASE_RUN], arrowprops=arrow, zorder=2)
    names = [arm_name(run.arm, m) for run in markers]
    bottom.legend([Line2D([], [], **own) for own in markers.values()], names, loc="best")
    bottom.set_title(f"Where tuning them leads ({optimizer}; bars: 95 %)")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorted, the points that no other beats in one of the two without losing in the other.

    >>> pareto_front([(0.1, 0.9), (0.5, 0.8), (0.4, 0.7), (0.9, 0.2)])
    [(0.1, 0.9), (0.5, 0.8), (0.9, 0.2)]
    """
    beaten = {(x, y) for x, y in points for s, u in points if (s, u) != (x, y) and s >= x and u >= y}
    return sorted(point for point in points if point not in beaten)


def pareto(results: Results, shown: Sequence[ArmRun], faint: Sequence[ArmRun], title: str) -> Figure | None:
    """Figures 3 and 4, and NeuronTune beside CAST: utility against safety of the base model and these arms.

    The front is that of the named arms: the best of some dozens of ablations (faint points) would be luck.
    """
    if not shown:
        return None
    figure, axes = new_figure(6.4, 4.2)
    spot = {"linestyle": "", "marker": "o", "markersize": 3.5, "color": "#bbbbbb", "markeredgewidth": 0}
    means = 100 * results.means.loc[list(faint), ["safety", "utility"]]
    axes.plot(means["safety"], means["utility"], **spot, zorder=1)
    optimizers = list(dict.fromkeys(run.optimizer for run in shown if not run.arm.of_neurons))
    turns = {optimizer: turn for turn, optimizer in enumerate(optimizers)}
    looks = {run: arm_look(run.arm, results.m) for run in (BASE_RUN, *shown)}
    markers = {run: marker(look, turns.get(run.optimizer, 0)) for run, look in looks.items()}
    places = plane(axes, results, markers)
    dashed = {"color": GREY, "linewidth": 1.2, "linestyle": "--"}
    axes.step(*zip(*pareto_front(list(places.values())), strict=True), where="pre", **dashed, zorder=2)
    entries = {arm_name(run.arm, results.m): marker(look) for run, look in looks.items()}
    if len(turns) > 1:
        entries |= {name: marker({"color": GREY, "marker": "o"}, turn) for name, turn in turns.items()}
    entries |= {"Pareto front": dashed} | ({f"{len(faint)} ablation arms": spot} if faint else {})
    handles = [Line2D([], [], **look) for look in entries.values()]
    figure.legend(handles, entries.keys(), loc="outside right upper")
    axes.set_title(f"{title} (bars: 95 %)")
    return figure


# Cost against conflict


def cost_against_conflict(results: Results, cost: str, counts: Sequence[int]) -> Figure | None:
    """Figures 5 (`source_cr`) and 6 (`ucr`): a cost ratio against the mean C of buckets, a panel for each
    number of buckets."""
    if not counts:
        return None
    figure, panels = new_figure(4.0 * len(counts) + 0.4, 3.7, ncols=len(counts), squeeze=False)
    for axes, of in zip(panels[0], counts, strict=True):
        buckets = [run for run in results.tuned if run.arm.is_zone(of)]
        optimizers = list(dict.fromkeys(run.optimizer for run in buckets))
        for turn, optimizer in enumerate(optimizers):
            own = [run for run in buckets if run.optimizer == optimizer]
            name = f"{optimizer} ({list(FILLS)[turn % len(FILLS)]}): " if len(optimizers) > 1 else ""
            cost_points(axes, results, own, cost, turn, name)
        axes.margins(x=0.14, y=0.08)
        any_cost = (results.means.loc[buckets, cost] > 0).any()
        # Room for a line of words for each optimizer at the top, and below for points and names at 0.
        top = (axes.get_ylim()[1] if any_cost else 1.0) * (1 + 0.08 * len(optimizers))
        axes.set_ylim(-0.06 * top, top)
        name = cost_name(cost, results.source)
        axes.set(xlabel=f"mean conflict score of each of {of} buckets", title=f"{name} against conflict")
        axes.set_ylabel(f"{name}: utility lost per safety gained")
        grid(axes)
    return figure


def cost_points(axes: Axes, results: Results, runs: list[ArmRun], cost: str, turn: int, name: str) -> None:
    """One optimizer's buckets, the least-squares line of those that gained safety, and the correlation in
    words after `name`; buckets without a gain stand as crosses on the axis. `turn`: of the optimizer."""
    found = results.correlation(runs[0].optimizer, cost, of=runs[0].arm.of)
    means = results.means.loc[runs]
    fitted = not pd.isna(found["pearson"])
    # Names stand on the side that the line leaves free.
    beside = (8, -11) if fitted and found["pearson"] > 0 else (8, 5)
    note = {"textcoords": "offset points", "fontsize": 8}
    for run, row in means.iterrows():
        bucket, of, look = run.arm.bucket, run.arm.of, bucket_look(run.arm.bucket, run.arm.of)
        if np.isnan(row[cost]):
            at = (row["ranked_mean"], 0.0)
            axes.plot(*at, marker="x", color=look["color"], markersize=9, clip_on=False, zorder=3)
            upright = {"rotation": 90, "ha": "center", "va": "bottom"}
            axes.annotate(f"$B_{{{bucket}}}$: no safety gain", at, (0, 9), **upright, **note)
            continue
        at = (row["ranked_mean"], row[cost])
        spread = {"yerr": np.nan_to_num(row[f"{cost}_std"]), "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(*at, **spread, **marker(look, turn, 8 if of <= MANY else 6), zorder=3)
        # The marker's shape names the bucket of a second optimizer; many buckets stand in order.
        if not turn and (of <= MANY or bucket in (1, of)):
            axes.annotate(f"$B_{{{bucket}}}$", at, beside, zorder=4, **note)
    if fitted:
        words = f"$r$ = {found['pearson']:+.2f}, $\\rho$ = {found['spearman']:+.2f}, "
        words += f"{found['n_points']} points"
        used = means.dropna(subset=cost)
        slope, intercept = np.polyfit(used["ranked_mean"], used[cost], 1)
        ends = np.array([used["ranked_mean"].min(), used["ranked_mean"].max()])
        dashes = ("-", "--", ":")[turn % 3]
        axes.plot(ends, slope * ends + intercept, color=INK, linewidth=1, linestyle=dashes, zorder=2)
    else:
        equal, few = f"{found['all_equal']} all equal", f"{found['n_points']} usable points"
        words = f"no correlation: {equal if found['all_equal'] else few}"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    at = {"transform": axes.transAxes, "fontsize": 8, "va": "top", "bbox": box, "zorder": 4}
    axes.text(0.03, 0.985 - 0.075 * turn, name + words, **at)


# More and more heads, or neurons


def trajectories(results: Results) -> Figure | None:
    """Utility and safety against the share of heads tuned, from the top and the bottom of C (Table 9)."""
    if not any(run.arm.share and run.arm.map == OWN for run in results.tuned):
        return None
    paths = {}
    for kind, colour, shape, name in (
        ("top", RISKY_RED, "^", "highest C first"),
        ("bottom", SAFE_BLUE, "v", "lowest C first"),
    ):
        arms = {share: head_arm(kind, share, results.m) for share in SHARES} | {100: FULL}
        runs = {share: run for share, arm in arms.items() if (run := results.find(arm, "sft"))}
        paths[name] = runs, {"color": colour, "marker": shape, "markersize": 7, "markeredgecolor": INK}
    at = {share: f"{share}" for share in (*SHARES, 100)}
    return curves(results, paths, ["utility", "safety"], at, ("heads tuned (%)", "More and more heads"))


def over_threshold(results: Results) -> Figure | None:
    """Safety, utility and over-refusal against the neuron-count threshold K."""
    own = sorted(results.neurons, key=lambda run: run.arm.neurons)
    counts = sorted({run.arm.neurons for run in own})
    if len(counts) < 2:
        return None
    several = len({run.arm.lam for run in own}) > 1
    paths = {}
    for run in own:
        kind, lam = run.arm.kind, run.arm.lam
        name = ("chosen neurons" if kind == "neurons" else "random neurons") + f", lam {lam:g}" * several
        look = LOOKS[kind] | {"alpha": 0.4 + 0.6 * lam if several else 1.0}
        look |= {"linestyle": "-" if kind == "neurons" else ":"}
        paths.setdefault(name, ({}, look))[0][counts.index(run.arm.neurons)] = run
    sides = [side for side in AXES if side in results.draws]
    at = {index: f"{count}" for index, count in enumerate(counts)}
    return curves(results, paths, sides, at, ("K: neurons of each kind", "NeuronTune: more and more neurons"))


def curves(
    results: Results,
    paths: Mapping[str, tuple[Mapping[float, ArmRun], dict]],
    sides: Sequence[str],
    at: Mapping[float, str],
    words: tuple[str, str],
) -> Figure:
    """A panel for each of `sides`, in it paths (name -> arms by x, look) and the base model; `at`: ticks and
    their labels, `words`: label of the x axis, title."""
    figure, panels = new_figure(3.6 * len(sides), 3.4, ncols=len(sides))
    for axes, side in zip(panels, sides, strict=True):
        for name, (path, look) in paths.items():
            values = [percent(results, run, side) for run in path.values()]
            if values:
                spread = {"yerr": np.hstack([bar for _, bar in values]), "capsize": 2, "elinewidth": 0.8}
                axes.errorbar([*path], [value for value, _ in values], **spread, **look, label=name)
        base = 100 * results.means.loc[BASE_RUN, side]
        axes.axhline(base, color=INK, linewidth=0.8, linestyle=":", label="base model")
        axes.set_xticks([*at], labels=[*at.values()])
        axes.set(xlabel=words[0], ylabel=AXES[side])
        grid(axes)
    axes.legend(loc="best")
    figure.suptitle(f"{words[1]} (bars: 95 %)", x=0.01, ha="left", fontsize=9.5)
    return figure


def all_figures(results: Results) -> dict[str, Figure]:
    """File name -> figure, of those whose arms were tuned; the paper's by their numbers."""
    sft = [run for run in results.main if run.optimizer == "sft"]
    projected = results.main if len(results.main) > len(sft) else []
    beside = [*sft, *results.neurons] if results.neurons else []
    counts = sorted({run.arm.of for run in results.tuned if run.arm.is_zone(run.arm.of or 0)})
    own, finer = ([of for of in counts if (of == results.m) == main] for main in (True, False))
    kept, both = "Safety gained and utility kept", "CAST's heads and NeuronTune's neurons"
    made = {
        "figure1_localisation": localisation(results),
        "figure3_pareto_sft": pareto(results, sft, results.ablations, kept),
        "figure4_pareto_pcgrad": pareto(results, projected, [], kept),
        "figure5_source_cr": cost_against_conflict(results, "source_cr", own if results.source else []),
        "figure6_ucr": cost_against_conflict(results, "ucr", own),
        "finer_buckets": cost_against_conflict(results, "ucr", finer),
        "drawn_arms": drawn_arms.figure(results.drawn, results.predictions),
        "ratio_trajectories": trajectories(results),
        "neurontune_threshold": over_threshold(results),
        "neurontune_pareto": pareto(results, beside, [], both),
    }
    return {name: figure for name, figure in made.items() if figure}
