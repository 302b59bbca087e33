"""How the figures of stage 06 look, and those of the map; the same input gives the same bytes.

Bucket colours are ColorBrewer's RdBu (safe for colour-blind readers), red = Risky Zone, blue = Safe Zone; a
bucket also has its own marker or digit, so that a grey print still tells them apart. Per-head arrays are [L,
H].
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from backends.core.files import write_atomic
from stages.method.arms import Arm
from stages.method.arrays import FloatArray
from stages.method.heads import HeadMap
from stages.report.words import arm_words, zone

STYLE = {
    # Whatever matplotlibrc the machine has: figures are made and saved in this style, after a reset.
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.facecolor": "white",
    "svg.hashsalt": "cast",
    "svg.fonttype": "path",
    "figure.dpi": 100,
}
FORMATS = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 200}}
BUCKET_MARKERS = ("^", "D", "s", "v", "P", "p", "h", "<", ">")
STABLE = 0.5
"""a head that falls into its own bucket in fewer resamples than this gets no digit"""
INK, GREY, PURPLE = "#222222", "#777777", "#762a83"
LOOKS = {
    "base": {"color": "black", "marker": "*"},
    "full": {"color": "#444444", "marker": "X"},
    "neurons": {"color": PURPLE, "marker": "o"},
    "randomneurons": {"color": GREY, "marker": "s"},
}
"""kind of arm -> colour and marker"""
OTHER_LOOK = {"color": "#999999", "marker": "o"}


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes the figure in all FORMATS, without dates, so that equal figures are equal files."""
    for suffix, options in FORMATS.items():
        write_atomic(
            folder / f"{name}.{suffix}",
            lambda path, suffix=suffix, options=options: figure.savefig(path, format=suffix, **options),
        )


def bucket_colours(m: int) -> list[tuple[float, float, float]]:
    """One colour a bucket, 1 (red) .. m (blue), the pale middle of RdBu left out."""
    positions = np.concatenate([np.linspace(0.06, 0.32, (m + 1) // 2), np.linspace(0.94, 0.68, m // 2)[::-1]])
    return [tuple(matplotlib.colormaps["RdBu"](position)[:3]) for position in positions]


def bucket_look(bucket: int, of: int) -> dict:
    """Colour and marker of a bucket."""
    return {"color": bucket_colours(of)[bucket - 1], "marker": BUCKET_MARKERS[(bucket - 1) % 9]}


def arm_look(arm: Arm, m: int) -> dict:
    """Colour and marker of an arm, the same in every figure."""
    return bucket_look(arm.bucket, m) if arm.is_zone(m) else LOOKS.get(arm.kind, OTHER_LOOK)


def bucket_name(bucket: int, of: int) -> str:
    """ "B1 (Risky Zone)" .. "B4 (Safe Zone)", as matplotlib typesets it."""
    return f"$B_{{{bucket}}}${zone(bucket, of)}"


def arm_name(arm: Arm, m: int) -> str:
    """An arm in a legend; arms of neurons differ by K, which stands beside their points."""
    if arm.of_neurons:
        return "NeuronTune (K)" if arm.kind == "neurons" else "random neurons (K)"
    return bucket_name(arm.bucket, m) if arm.is_zone(m) else arm_words(arm, m)


def new_figure(width: float, height: float, **panels: object) -> tuple[Figure, Axes | np.ndarray]:
    """A figure, in inches, and its axes; `panels` as in `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**panels)


def heat_map(axes: Axes, values: np.ndarray, cmap: str | Colormap, low: float, high: float) -> QuadMesh:
    """Rows x columns as coloured cells."""
    shown = axes.pcolormesh(values, cmap=cmap, vmin=low, vmax=high, edgecolors="white", linewidth=0.4)
    for size, ticks in zip(values.shape, (axes.set_yticks, axes.set_xticks), strict=True):
        labels = np.arange(0, size, -(-size // 16))  # about a dozen
        ticks(labels + 0.5, labels)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return shown


def score_map(axes: Axes, score: FloatArray) -> QuadMesh:
    """C as a heat map; a map without differences has one colour."""
    low, high = float(score.min()), float(score.max())
    return heat_map(axes, score, "RdYlBu_r", *((low, high) if low < high else (low - 0.5, high + 0.5)))


def conflict_map(heads: HeadMap, kept: FloatArray) -> Figure:
    """Layer x head: C as a heat map (the paper's Figure 7), beside it the buckets and each layer's mean C.

    Args:
        kept: share of resamples in which each head stays in its bucket, [L, H].
    """
    layers, width = heads.shape
    cell = float(np.clip(5.4 / max(layers, width), 0.14, 0.4))
    panel = max(width * cell, 2.3)  # inches; a narrow model gets oblong cells, so that its titles fit
    size = (2 * panel + 2.1, max(layers * cell, 1.6) + 1.35)
    figure, panels = new_figure(*size, ncols=3, sharey=True, width_ratios=[panel, panel, 1.0])
    left, middle, right = panels
    score, below = heads.conflict_score, {"location": "bottom", "aspect": 25, "pad": 0.02}
    figure.colorbar(score_map(left, score), ax=left, **below).set_label("conflict score $C(h)$")
    left.set(title="Conflict score of each head", xlabel="head", ylabel="layer", ylim=(layers, 0))

    colours = bucket_colours(heads.m)
    painted = heat_map(middle, heads.bucket, ListedColormap(colours), 0.5, heads.m + 0.5)
    for layer, head in np.argwhere(kept >= STABLE):
        bucket = heads.bucket[layer, head]
        dark = np.dot(colours[bucket - 1], (0.299, 0.587, 0.114)) < 0.5
        look = {"ha": "center", "va": "center", "color": "white" if dark else INK}
        middle.text(head + 0.5, layer + 0.53, str(bucket), fontsize=min(cell * 34, 8), **look)
    middle.set(title="Bucket (digit: kept in half of resamples)", xlabel="head")
    scale = figure.colorbar(painted, ax=middle, **below)
    scale.set_ticks(range(1, heads.m + 1), labels=[f"$B_{{{number}}}$" for number in range(1, heads.m + 1)])
    scale.ax.tick_params(length=0)
    scale.outline.set_visible(False)
    scale.set_label("Risky Zone  ⟵  bucket  ⟶  Safe Zone" if heads.m > 1 else "bucket")

    right.barh(np.arange(layers) + 0.5, score.mean(axis=1), height=0.8, color="#bbbbbb")
    right.axvline(score.mean(), color=INK, linewidth=0.8, linestyle=":")
    right.set(title="Layer mean", xlabel="mean $C$")
    right.xaxis.set_major_locator(MaxNLocator(3))
    return figure


def conflict_against_sensitivity(heads: HeadMap) -> Figure:
    """Each head's O against S, coloured by bucket, with lines of equal C between the buckets."""
    figure, axes = new_figure(6.2, 4.2)
    for number in range(1, heads.m + 1):
        own = heads.bucket == number
        points = heads.optimization_conflict[own], heads.functional_sensitivity[own]
        look = bucket_look(number, heads.m) | {"edgecolors": INK, "linewidths": 0.3, "s": 22, "zorder": 3}
        axes.scatter(*points, **look, label=f"{bucket_name(number, heads.m)}, {own.sum()} heads")
    axes.margins(0.05)
    limits, bounds = axes.get_xlim(), axes.get_ylim()
    x = np.linspace(max(limits[0], 1e-6), limits[1], 200)
    for number in range(1, heads.m):
        border = heads.conflict_score[heads.bucket == number].min()
        axes.plot(x, border / x, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    for line, value in ((axes.axvline, 0.5), (axes.axhline, 1.0)):
        line(value, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
    axes.set(xlim=limits, ylim=bounds)
    axes.set_xlabel("optimization conflict $O(h)$   (> 0.5: gradients oppose)")
    axes.set_ylabel("functional sensitivity $S(h)$   (> 1: utility head)")
    axes.set_title("Heads by the two factors of $C = O \\cdot S$ (dashed: equal $C$)")
    figure.legend(loc="outside right upper")
    return figure
