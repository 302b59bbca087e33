"""Does the map move while a model is tuned (--drift), and what re-diagnosed buckets drew: tables, a figure.

All of it rests on maps by gradients, the base model's too, whatever --sensitivity is; all on the same rows.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stages.method.arms import Arm, ArmRun
from stages.method.conflict_map import maps_by_outcome
from stages.method.drift import Drift, by_layer, map_drift
from stages.method.heads import HeadMap, read_map
from stages.report.figures import GREY, INK, heat_map, new_figure
from stages.report.responses import runs_of
from stages.report.words import QUANTITIES, arm_words
from stages.run.job import Job
from stages.run.schemas import ARMS, DRIFT, HEADS

LABELS = ["arm", "optimizer", "seed"]
SHOWN = {"optimization_conflict": ("o", "#1b9e77"), "functional_sensitivity": ("s", "#7570b3")}
SHOWN |= {"conflict_score": ("D", INK)}
"""quantities of the figure -> marker and colour"""


def row_of(found: Drift) -> dict:
    """As columns of a table."""
    row = found._asdict()
    return {f"rho_{name}": rho for name, rho in row.pop("correlations").items()} | row


def drift_tables(
    drift: pd.DataFrame, base: HeadMap, arms: Mapping[ArmRun, Mapping]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each tuned model, and for each of its layers.

    Args:
        drift: drift.parquet.
        arms: rows of arms.parquet.
    """
    models, layers = [], []
    for run, row in arms.items():
        own = drift[(drift[LABELS] == pd.Series(run.labels)).all(axis=1)]
        tuned, heads = read_map(own), np.zeros(base.bucket.shape, bool)
        heads[row["layers"], row["heads"]] = True
        models.append(run.labels | row_of(map_drift(base, tuned, heads)))
        each = enumerate(by_layer(base, tuned, heads))
        layers += [run.labels | {"layer": layer} | row_of(found) for layer, found in each]
    return pd.DataFrame(models), pd.DataFrame(layers)


def redraw_table(arms: Mapping[ArmRun, Mapping], every: int) -> pd.DataFrame:
    """Every re-draw of re-diagnosed buckets: before which step, and how many heads entered (and left)."""
    rows = []
    for run, row in arms.items():
        if run.arm.rediagnosed:
            steps = enumerate(np.asarray(row["entered"]).tolist(), 1)
            rows += [run.labels | {"step": number * every, "entered": entered} for number, entered in steps]
    return pd.DataFrame(rows, columns=[*LABELS, "step", "entered"])


def fields(job: Job, by_name: Mapping[str, Arm]) -> dict[str, pd.DataFrame]:
    """The tables of `Results`; those of drift are empty where it was not measured."""
    frame, chosen = job.read(ARMS), job.settings.map
    arms = dict(zip(runs_of(frame, by_name), frame.to_dict("records"), strict=True))
    models, layers = pd.DataFrame(), pd.DataFrame()
    if job.run.has(DRIFT):
        base = maps_by_outcome(job.read(HEADS), chosen.variant, chosen.buckets)["gradient"]
        models, layers = drift_tables(job.read(DRIFT), base, arms)
    redraws = redraw_table(arms, job.settings.tuning.rediagnose)
    return {"drift": models, "drift_layers": layers, "redraws": redraws}


def label(arm: Arm, m: int) -> str:
    """An arm in tables and figure, all draws together."""
    return f"{arm.of} drawn arms" if arm.draw else arm_words(arm, m)


def means(table: pd.DataFrame, arms: Mapping[str, Arm], m: int) -> pd.DataFrame:
    """Means over seeds, and over draws, of one of the tables: of each arm and optimizer (and layer)."""
    named = table.assign(label=[label(arms[name], m) for name in table["arm"]])
    keys = ["label", "optimizer", *(["layer"] if "layer" in table else [])]
    numbers = named.drop(columns=["arm", "seed"]).set_index(keys).astype(float)
    return numbers.groupby(level=keys, sort=False).mean().reset_index()


def figure(models: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """Of each arm: rank correlations of O, S and C with the base model's map, and the share of each layer's
    heads that changed bucket. Both tables are `means`."""
    names = [
        name if optimizer in ("sft", "maml") else f"{name}, {optimizer}"
        for name, optimizer in zip(models["label"], models["optimizer"], strict=True)
    ]
    shares = layers["changed"].to_numpy().reshape(len(models), -1)  # (arms, L)
    drawing, (left, right) = new_figure(9.0, 1.3 + 0.27 * len(models), ncols=2, width_ratios=[1.0, 1.25])
    rows = np.arange(len(models)) + 0.5
    for name, (marker, colour) in SHOWN.items():
        x = models[f"rho_{name}"].to_numpy(float)
        left.scatter(x, rows, marker=marker, color=colour, s=22, label=QUANTITIES[name], zorder=3)
    left.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    left.set(ylim=(len(models), 0), xlabel="Spearman's ρ with the base model's map")
    left.set_title("Heads' order after tuning (1: as before)")
    left.set_yticks(rows, names)
    drawing.legend(loc="outside lower left", ncols=len(SHOWN))
    shown = heat_map(right, shares, "Reds", 0.0, 1.0)
    right.set(ylim=(len(models), 0), xlabel="layer", title="Share of a layer's heads that changed bucket")
    right.set_yticks([])
    drawing.colorbar(shown, ax=right, aspect=15)
    return drawing
