"""The figures of stage 06 about tuned arms: what was gained, what it cost, and whether the map foretold it.

A figure whose arms were not tuned is None. `means` are rows of costs.with_intervals.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from stages import arms
from stages.reporting import correlations, costs, families
from stages.reporting.figures import (
    GREY,
    INK,
    MAP_COLOURS,
    HeadMap,
    arm_look,
    arm_name,
    bucket_look,
    score_range,
    ticks,
)

RISKY_RED, SAFE_BLUE, FULL_GREY = "#b2182b", "#2166ac", "#555555"
SIDES = ("safety", "utility")
AXES = {"safety": "safety: harmful prompts refused (%)", "utility": "utility: mean accuracy (%)"}
MANY = 8
"""buckets, of more only the first and the last are named"""
FILLS = {"filled": "full", "hollow": "none", "half": "left"}
"""how markers tell optimizers apart, in their order: word -> matplotlib's fillstyle"""


def percent(row: dict, name: str, several_seeds: bool) -> tuple[float, list[list[float]]]:
    """Mean score in percent, and its error bar downwards and upwards.

    Several seeds: their standard deviation (none for the base model). One: the 95 % interval over rows.
    """
    value = 100 * row[name]
    if several_seeds:
        below = above = 100 * (row[f"{name}_std"] or 0.0)
    else:
        below, above = value - 100 * row[f"{name}_low"], 100 * row[f"{name}_high"] - value
    return value, [[max(below, 0.0)], [max(above, 0.0)]]


def several(means: Sequence[dict]) -> bool:
    return max(row["n_seeds"] for row in means) > 1


def _bars(means: Sequence[dict]) -> str:
    return "s.d. over seeds" if several(means) else "95 % over benchmark rows"


def plane(axes: Axes) -> None:
    """Safety against utility, at least two points wide: arms that are all alike should look alike."""
    axes.margins(0.08)
    for limits, widen in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        if limits[1] - limits[0] < 2:
            widen(limits[0] - 1, limits[1] + 1)
    grid(axes)
    axes.set_xlabel(AXES["safety"])
    axes.set_ylabel(AXES["utility"])


def grid(axes: Axes) -> None:
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)


def _marker(look: dict, turn: int) -> dict:
    """An arm's marker in the way of the optimizer of this turn."""
    return look | {
        "fillstyle": list(FILLS.values())[turn % len(FILLS)],
        "markerfacecoloralt": "white",
        "markeredgecolor": look["color"] if turn else INK,
        "markeredgewidth": 1.4 if turn else 0.4,
    }


def localisation(heads: HeadMap, means: Sequence[dict], m: int) -> Figure | None:
    """Figure 1: where conflict is (C of each head), and where tuning each zone leads from the base model."""
    optimizer = next((row["optimizer"] for row in means if row["arm"] != costs.BASE), "")
    rows = {row["arm"]: row for row in means if row["optimizer"] == optimizer}
    ends = {"full": ("all heads", FULL_GREY)}
    ends |= {"bucket1": ("Risky Zone", RISKY_RED), f"bucket{m}": ("Safe Zone", SAFE_BLUE)} if m > 1 else {}
    ends = {arm: look for arm, look in ends.items() if arm in rows}
    if not ends:
        return None
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1.0, 1.5])
    low, high = score_range(heads.score)
    edges = {"edgecolors": "white", "linewidth": 0.3}
    shown = top.pcolormesh(heads.score.T, cmap=MAP_COLOURS, vmin=low, vmax=high, **edges)
    figure.colorbar(shown, ax=top, aspect=14, pad=0.01).set_label("$C(h)$")
    top.set(xlabel="layer", ylabel="head", title="Where safety and utility conflict: C of each head")
    top.set_xticks(*ticks(heads.score.shape[0]))
    top.set_yticks(*ticks(heads.score.shape[1]))
    top.spines[:].set_visible(False)
    top.tick_params(length=0)

    start = tuple(100 * means[0][name] for name in SIDES)
    bottom.plot(*start, **arm_look("base", m), markersize=13, linestyle="", zorder=4)
    bottom.annotate("base model", start, (8, 6), textcoords="offset points", fontsize=8.5)
    for arm, (_, colour) in ends.items():
        (x, x_bar), (y, y_bar) = (percent(rows[arm], side, several(means)) for side in SIDES)
        look = _marker(arm_look(arm, m) | {"color": colour}, 0)
        bars = {"xerr": x_bar, "yerr": y_bar, "capsize": 2, "elinewidth": 0.8}
        bottom.errorbar(x, y, **bars, **look, markersize=9, zorder=3)
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 7, "shrinkB": 6}
        bottom.annotate("", (x, y), start, arrowprops=arrow, zorder=2)
    plane(bottom)
    left, right = bottom.get_xlim()
    bottom.set_xticks([at for at in bottom.get_xticks() if left <= at <= min(right, 100)])
    bottom.set_xlim(left, right + 0.16 * (right - left))  # room for the names
    apart = 0.07 * np.ptp(bottom.get_ylim())
    height = -np.inf
    for arm in sorted(ends, key=lambda arm: rows[arm]["utility"]):
        name, colour = ends[arm]
        x, y = (100 * rows[arm][side] for side in SIDES)
        height = max(y, height + apart)  # names of arms that are alike stand above each other
        at = {"xytext": (7, 4), "textcoords": "offset points", "va": "bottom"}
        halo = [withStroke(linewidth=2.5, foreground="white")]
        bottom.annotate(name, (x, height), **at, color=colour, fontsize=8.5, path_effects=halo, zorder=5)
    bottom.set_title(f"Where tuning them leads ({optimizer}; bars: {_bars(means)})")
    return figure


def pareto(means: Sequence[dict], m: int, optimizers: Sequence[str]) -> Figure | None:
    """Figures 3 and 4: utility against safety of the base model and the arms of these optimizers.

    The front is that of the named arms: the best of some dozens of ablations (faint points) would be luck.
    """
    tuned = [row for row in means if row["optimizer"] in optimizers]
    main = [row for row in tuned if families.is_main(row["arm"], m)]
    if not main:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    faint = [row for row in tuned if not families.is_main(row["arm"], m)] if len(optimizers) == 1 else []
    spots = [[100 * row[name] for row in faint] for name in SIDES]
    axes.plot(*spots, linestyle="", marker="o", markersize=3.5, color="#bbbbbb", markeredgewidth=0, zorder=1)
    shown = [means[0], *main]
    points = [
        (*percent(row, "safety", several(means)), *percent(row, "utility", several(means))) for row in shown
    ]
    front = costs.pareto_front([point[0] for point in points], [point[2] for point in points])
    x, y = [points[index][0] for index in front], [points[index][2] for index in front]
    axes.step(x, y, where="pre", color=GREY, linewidth=1.2, linestyle="--", zorder=2)
    there = [one for one in optimizers if any(row["optimizer"] == one for row in main)]
    for row, (safety, safety_bar, utility, utility_bar) in zip(shown, points, strict=True):
        base = row["arm"] == costs.BASE
        look = _marker(arm_look(row["arm"], m), 0 if base else there.index(row["optimizer"]))
        bars = {"xerr": safety_bar, "yerr": utility_bar, "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(safety, utility, **bars, **look, markersize=12 if base else 8, linestyle="", zorder=3)
    named = list(dict.fromkeys(row["arm"] for row in shown))
    handles = {
        arm_name(arm, m): handle(**_marker(arm_look(arm, m), 0), markersize=12 if arm == costs.BASE else 8)
        for arm in named
    }
    if len(there) > 1:
        grey = {"color": GREY, "marker": "o"}
        handles |= {name: handle(**_marker(grey, turn), markersize=8) for turn, name in enumerate(there)}
    handles["Pareto front"] = Line2D([], [], color=GREY, linewidth=1.2, linestyle="--")
    if faint:
        handles[f"{len(faint)} ablation arms"] = handle(marker="o", markersize=3.5, color="#bbbbbb")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    plane(axes)
    axes.set_title(f"Safety gained and utility kept (bars: {_bars(means)})")
    return figure


def handle(**look) -> Line2D:
    return Line2D([], [], linestyle="", **look)


def cost_against_conflict(
    means: Sequence[dict], found: Sequence[dict], m: int, cost: str, source: str | None
) -> Figure | None:
    """Figures 5 (`source_cr`) and 6 (`ucr`): a cost ratio against the mean C of the run's own buckets."""
    buckets = [row for row in means[1:] if families.bucket_number(row["arm"], m)]
    if not buckets:
        return None
    figure = Figure(figsize=(4.4, 3.7), layout="constrained")
    axes = figure.subplots()
    optimizers = list(dict.fromkeys(row["optimizer"] for row in buckets))
    for index, optimizer in enumerate(optimizers):
        rows = [row for row in buckets if row["optimizer"] == optimizer]
        one = correlations.one_of(found, optimizer, cost)
        name = f"{optimizer} ({list(FILLS)[index % len(FILLS)]}): " if len(optimizers) > 1 else ""
        _cost_points(axes, rows, one, m, turn=index)
        _fitted_line(axes, rows, one, name, index)
    axes.set_xlabel("mean conflict score of the bucket  $\\bar{C}(B_i)$")
    _cost_axes(axes, any(row[cost] for row in buckets), cost, source, lines=len(optimizers))
    return figure


def finer_buckets(means: Sequence[dict], found: Sequence[dict], m: int, source: str | None) -> Figure | None:
    """UCR against mean C where the heads are cut into other numbers of buckets, a panel each."""
    own = families.own(m)
    found_families = {families.family(row["arm"], m) for row in means[1:]} - {None, own}
    counts = sorted(one.of for one in found_families if one == own._replace(of=one.of))
    if not counts:
        return None
    figure = Figure(figsize=(4.0 * len(counts) + 0.4, 3.7), layout="constrained")
    for axes, count in zip(np.atleast_1d(figure.subplots(1, len(counts))), counts, strict=True):
        one = own._replace(of=count)
        rows = [
            row for row in means[1:] if families.family(row["arm"], m) == one and row["optimizer"] == "sft"
        ]
        coefficients = correlations.one_of(found, "sft", "ucr", families.label(one, m))
        if coefficients is None:
            continue
        _cost_points(axes, rows, coefficients, m)
        _fitted_line(axes, rows, coefficients, "", 0)
        axes.set_xlabel(f"mean conflict score, {count} buckets")
        _cost_axes(axes, any(row["ucr"] for row in rows), "ucr", source)
    return figure


def _cost_axes(axes: Axes, any_cost: bool, cost: str, source: str | None, lines: int = 1) -> None:
    """`lines`: of words at the top, which need room."""
    axes.margins(x=0.14, y=0.08)
    top = (axes.get_ylim()[1] if any_cost else 1.0) * (1 + 0.08 * lines)
    axes.set_ylim(-0.06 * top, top)  # never negative; the room below is for points and names at 0
    axes.set_ylabel(f"{costs.cost_name(cost, source)}: utility lost per safety gained")
    axes.set_title(f"{costs.cost_name(cost, source)} against predicted conflict")
    grid(axes)


def _cost_points(axes: Axes, rows: list[dict], one: dict, m: int, turn: int = 0) -> None:
    """One optimizer's buckets; those that gained no safety stand as crosses on the axis."""
    # Names stand on the side that the fitted line leaves free.
    beside = (8, -11) if (one["pearson"] or 0.0) > 0 else (8, 5)
    for row in rows:
        arm = families.parse(row["arm"], m)
        name, look = f"$B_{{{arm.number}}}$", bucket_look(arm.number, arm.of)
        note = {"textcoords": "offset points", "fontsize": 8}
        if row["n_no_gain"]:
            at = (row["predicted"], 0.0)
            axes.plot(*at, marker="x", color=look["color"], markersize=9, clip_on=False, zorder=3)
            told = f"{name}: no safety gain"
            axes.annotate(told, at, (0, 9), rotation=90, ha="center", va="bottom", **note)
            continue
        at = (row["predicted"], row[one["cost"]])
        axes.errorbar(
            *at,
            yerr=row[f"{one['cost']}_std"] or 0.0,
            **_marker(look, turn),
            markersize=8 if arm.of <= MANY else 6,
            elinewidth=0.8,
            capsize=2,
            zorder=3,
        )
        # The marker's shape names the bucket of a second optimizer; many buckets stand in order.
        if not turn and (arm.of <= MANY or arm.number in (1, arm.of)):
            axes.annotate(name, at, beside, zorder=4, **note)


def _fitted_line(axes: Axes, rows: list[dict], one: dict, name: str, index: int) -> None:
    """The least-squares line of the points that the correlation rests on, and the correlation in words."""
    if one["pearson"] is None:
        few = one["n_points"] < correlations.FEWEST_POINTS
        points = f"{one['n_points']} usable points"
        words = f"no correlation: {points}" if few else "no correlation: costs all equal"
    else:
        words = f"$r$ = {one['pearson']:+.2f}, $\\rho$ = {one['spearman']:+.2f}, {one['n_points']} points"
        used = [row for row in rows if not row["n_no_gain"]]
        x = np.array([row["predicted"] for row in used])
        slope, intercept = np.polyfit(x, [row[one["cost"]] for row in used], 1)
        ends = np.array([x.min(), x.max()])
        dashes = ("-", "--", ":")[index % 3]
        axes.plot(ends, slope * ends + intercept, color=INK, linewidth=1, linestyle=dashes, zorder=2)
    place = {"transform": axes.transAxes, "fontsize": 8, "va": "top"}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.text(0.03, 0.985 - 0.075 * index, name + words, bbox=box, zorder=4, **place)


def trajectories(means: Sequence[dict], m: int) -> Figure | None:
    """Utility and safety against the share of heads tuned, from the top and the bottom of C (Table 9)."""
    rows = {row["arm"]: row for row in means if row["optimizer"] == "sft"}
    paths = {}
    for selection in ("top", "bottom"):
        names = {share: arms.name_of(arms.parse(f"{selection}{share}", m), m) for share in (25, 50, 75)}
        paths[selection] = {share: rows[arm] for share, arm in (names | {100: "full"}).items() if arm in rows}
    if not any({50, 75} & path.keys() for path in paths.values()):
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    looks = {"top": (RISKY_RED, "^", "highest C first"), "bottom": (SAFE_BLUE, "v", "lowest C first")}
    for axes, side in zip(figure.subplots(1, 2), ("utility", "safety"), strict=True):
        for selection, path in paths.items():
            colour, marker, name = looks[selection]
            if not path:
                continue
            values = [percent(row, side, several(means)) for row in path.values()]
            look = {"color": colour, "marker": marker, "markeredgecolor": INK, "markeredgewidth": 0.4}
            bars = {"yerr": np.hstack([bar for _, bar in values]), "capsize": 2, "elinewidth": 0.8}
            at = list(path), [value for value, _ in values]
            axes.errorbar(*at, **bars, **look, markersize=7, linewidth=1.2, label=name)
        dotted = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
        axes.axhline(100 * means[0][side], **dotted, label="base model")
        axes.set_xticks([25, 50, 75, 100])
        axes.set_xlabel("heads tuned (%)")
        axes.set_ylabel(AXES[side])
        grid(axes)
    axes.legend(loc="best")
    figure.suptitle(f"More and more heads (bars: {_bars(means)})", x=0.01, ha="left", fontsize=9.5)
    return figure


def all_figures(
    heads: HeadMap, means: Sequence[dict], found: Sequence[dict], m: int, source: str | None
) -> dict[str, Figure]:
    """File name -> figure, of those whose arms were tuned; the paper's by their numbers."""
    optimizers = list(dict.fromkeys(row["optimizer"] for row in means[1:]))
    geometric = any(one != "sft" for one in optimizers)
    made = {
        "figure1_localisation": localisation(heads, means, m),
        "figure3_pareto_sft": pareto(means, m, ["sft"]),
        "figure4_pareto_pcgrad": pareto(means, m, optimizers) if geometric else None,
        "figure5_source_cr": cost_against_conflict(means, found, m, "source_cr", source) if source else None,
        "figure6_ucr": cost_against_conflict(means, found, m, "ucr", source),
        "finer_buckets": finer_buckets(means, found, m, source),
        "ratio_trajectories": trajectories(means, m),
    }
    return {name: figure for name, figure in made.items() if figure is not None}
