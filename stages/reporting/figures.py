"""How the figures of stage 06 look, and those of the map; the same input gives the same bytes.

Bucket colours are ColorBrewer's RdBu (safe for colour-blind readers), red = Risky Zone, blue = Safe Zone; a
bucket also has its own marker or digit, so that a grey print still tells them apart. Per-head arrays are [L,
H].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stages import artifacts
from stages.checks import FloatArray, IntArray
from stages.reporting import families

STYLE = {
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
MAP_COLOURS = "RdYlBu_r"
BUCKET_MARKERS = ("^", "D", "s", "v", "P", "p", "h", "<", ">")
SURE = 0.5
"""a head whose bucket is its own in fewer resamples than this gets no digit"""
INK, GREY = "#222222", "#777777"


@dataclass(frozen=True)
class HeadMap:
    """The columns of heads.parquet that the figures show, each [L, H]."""

    conflict: FloatArray
    sensitivity: FloatArray
    score: FloatArray
    bucket: IntArray
    own_probability: FloatArray
    """share of resamples in which the head falls into its bucket; NaN where that is not known"""

    @property
    def m(self) -> int:
        return int(self.bucket.max())


@contextmanager
def style() -> Iterator[None]:
    """Our drawing style, whatever matplotlibrc the machine has; figures must be made and saved inside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes the figure in all FORMATS, without dates, so that equal figures are equal files."""
    for suffix, options in FORMATS.items():
        artifacts.write_atomic(
            folder / f"{name}.{suffix}",
            lambda path, suffix=suffix, options=options: figure.savefig(path, format=suffix, **options),
        )


def bucket_colours(m: int) -> list[tuple[float, float, float]]:
    """One colour a bucket, 1 (red) .. m (blue), the pale middle of RdBu left out."""
    positions = np.concatenate([np.linspace(0.06, 0.32, (m + 1) // 2), np.linspace(0.94, 0.68, m // 2)[::-1]])
    return [tuple(matplotlib.colormaps["RdBu"](position)[:3]) for position in positions]


def arm_look(arm: str, m: int) -> dict:
    """Colour and marker of an arm, the same in every figure."""
    number = families.bucket_number(arm, m) if arm != families.BASE else None
    return bucket_look(number, m) if number else _LOOKS.get(arm, {"color": "#999999", "marker": "o"})


def bucket_look(number: int, m: int) -> dict:
    return {
        "color": bucket_colours(m)[number - 1],
        "marker": BUCKET_MARKERS[(number - 1) % len(BUCKET_MARKERS)],
    }


_LOOKS = {"base": {"color": "black", "marker": "*"}, "full": {"color": "#444444", "marker": "X"}}


def zone(number: int, m: int) -> str:
    """ "B1 (Risky Zone)" .. "B4 (Safe Zone)"; with a single bucket there are no zones."""
    names = {1: " (Risky Zone)", m: " (Safe Zone)"} if m > 1 else {}
    return f"$B_{{{number}}}${names.get(number, '')}"


def arm_name(arm: str, m: int) -> str:
    number = families.bucket_number(arm, m) if arm != families.BASE else None
    return families.words(arm, m) if number is None else zone(number, m)


def conflict_map(heads: HeadMap) -> Figure:
    """Layer x head: C as a heat map (the paper's Figure 7), beside it the buckets and each layer's mean C."""
    layers, width = heads.score.shape
    cell = float(np.clip(5.4 / max(layers, width), 0.14, 0.4))
    panel = max(width * cell, 2.3)  # inches; a narrow model gets oblong cells, so that its titles fit
    figure = Figure(figsize=(2 * panel + 2.1, max(layers * cell, 1.6) + 1.35), layout="constrained")
    ratios = [panel, panel, 1.0]
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=ratios)

    edges = {"edgecolors": "white", "linewidth": 0.4}
    low, high = score_range(heads.score)
    shown = left.pcolormesh(heads.score, cmap=MAP_COLOURS, vmin=low, vmax=high, **edges)
    figure.colorbar(shown, ax=left, location="bottom", aspect=25, pad=0.02).set_label("conflict score $C(h)$")
    left.set_title("Conflict score of each head")

    colours = bucket_colours(heads.m)
    painted = middle.pcolormesh(
        heads.bucket, cmap=ListedColormap(colours), vmin=0.5, vmax=heads.m + 0.5, **edges
    )
    for layer, head in np.ndindex(*heads.bucket.shape):
        if heads.own_probability[layer, head] >= SURE:  # False for NaN
            number = int(heads.bucket[layer, head])
            dark = np.dot(colours[number - 1], (0.299, 0.587, 0.114)) < 0.5
            middle.text(
                head + 0.5,
                layer + 0.53,
                str(number),
                ha="center",
                va="center",
                fontsize=min(cell * 34, 8),
                color="white" if dark else INK,
            )
    middle.set_title("Bucket (digit: at least 50 % sure)")
    scale = figure.colorbar(painted, ax=middle, location="bottom", aspect=25, pad=0.02)
    scale.set_ticks(range(1, heads.m + 1), labels=[f"$B_{{{number}}}$" for number in range(1, heads.m + 1)])
    scale.ax.tick_params(length=0)
    scale.outline.set_visible(False)
    scale.set_label("Risky Zone  ⟵  bucket  ⟶  Safe Zone" if heads.m > 1 else "bucket")

    centres = np.arange(layers) + 0.5
    right.barh(centres, heads.score.mean(axis=1), height=0.8, color="#bbbbbb")
    right.axvline(heads.score.mean(), color=INK, linewidth=0.8, linestyle=":")
    right.set_title("Layer mean")
    right.set_xlabel("mean $C$")
    right.xaxis.set_major_locator(MaxNLocator(3))
    for axes in (left, middle):
        axes.set_xlabel("head")
        axes.set_xticks(*ticks(width))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    left.set_ylabel("layer")
    left.set_yticks(*ticks(layers))
    left.set_ylim(layers, 0)
    return figure


def score_range(score: FloatArray) -> tuple[float, float]:
    """Ends of the colour scale."""
    low, high = float(score.min()), float(score.max())
    # One colour for a map without differences, not an error.
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def ticks(count: int) -> tuple[FloatArray, list[int]]:
    """Centres and labels of about a dozen of `count` cells."""
    step = max(1, -(-count // 16))
    labels = list(range(0, count, step))
    return np.array(labels) + 0.5, labels


def conflict_against_sensitivity(heads: HeadMap) -> Figure:
    """Each head's O against S, coloured by bucket, with lines of equal C between the buckets."""
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, colour in enumerate(bucket_colours(heads.m), start=1):
        at = heads.bucket == number
        axes.scatter(
            heads.conflict[at],
            heads.sensitivity[at],
            s=22,
            color=[colour],
            marker=BUCKET_MARKERS[(number - 1) % len(BUCKET_MARKERS)],
            edgecolors=INK,
            linewidths=0.3,
            label=f"{zone(number, heads.m)}, {int(at.sum())} heads",
            zorder=3,
        )
    axes.margins(0.05)
    limits, bounds = axes.get_xlim(), axes.get_ylim()
    x = np.linspace(max(limits[0], 1e-6), limits[1], 200)
    for number in range(1, heads.m):
        border = heads.score[heads.bucket == number].min()
        axes.plot(x, border / x, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    for line, value in ((axes.axvline, 0.5), (axes.axhline, 1.0)):
        line(value, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
    axes.set(xlim=limits, ylim=bounds)
    axes.set_xlabel("optimization conflict $O(h)$   (> 0.5: gradients oppose)")
    axes.set_ylabel("functional sensitivity $S(h)$   (> 1: utility head)")
    axes.set_title("Heads by the two factors of $C = O \\cdot S$ (dashed: equal $C$)")
    figure.legend(loc="outside right upper")
    return figure
