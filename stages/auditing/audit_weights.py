"""The audit's checks of weights: the base model, and adapters that move only their heads' rows of W_q
(those of neurons: audit_neurons)."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from backends import models
from stages.arms import MAML
from stages.auditing.audit_run import Finding, Run, finding, unlike

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LOADING = ("02_conflict", "03_sensitivity", "04_align", "05_evaluate")
AGREED = ("id", "revision", "weights_sha256", "backend", "dtype")
"""what all stages that load the model must agree on; the device may differ"""
NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.q_proj\.lora_([AB])\.weight")
Q_PROJ = "model.layers.{}.self_attn.q_proj.weight"


def base(run: Run) -> list[Finding]:
    """One model in all stages, and, where its folder is here, these very weights and this many heads."""
    recorded = {stage: run.manifests[stage]["model"] for stage in LOADING}
    first = recorded[LOADING[0]]
    faults = [
        f"{stage}: {name} is {model.get(name)!r}, in {LOADING[0]} {first.get(name)!r}"
        for stage, model in recorded.items()
        for name in AGREED
        if model.get(name) != first.get(name) or not model.get(name)
    ]
    asked = run.settings("01_calibrate")
    faults += [
        f"{LOADING[0]}: model {name} is {first.get(key)!r}, 01_calibrate has {asked[name]!r}"
        for name, key in (("model", "id"), ("revision", "revision"))
        if asked[name] != first.get(key)
    ]
    known = [str(first.get(name)) for name in ("id", "backend", "dtype")]
    figure = f"{', '.join(known)}, weights {str(first.get('weights_sha256'))[:12]}"
    same = finding("one model in all stages", faults, figure)
    what = "weights of the model's folder"
    if run.model_folder is None:
        return [same, Finding(what, None, "the model's folder is not on this machine")]
    config = models.read_config(run.model_folder)
    grid = (config["num_hidden_layers"], config["num_attention_heads"])
    wrong = [] if grid == run.grid else [f"{grid} layers x heads, gradients.parquet has {run.grid}"]
    if models.weights_sha256(run.model_folder) != first.get("weights_sha256"):
        wrong.append(f"{run.model_folder} holds other weights (sha256)")
    return [same, finding(what, wrong, f"sha256 as recorded, {grid[0]} layers of {grid[1]} heads")]


@dataclass
class Rows:
    """What became of an adapter's rows of B, and of W_q's when it is merged."""

    chosen: int = 0
    moved: int = 0
    frozen: int = 0
    trained: int = 0
    """parameters: A, and the chosen rows of B"""
    changed: int = 0
    """chosen rows of W_q that merging changes"""
    faults: list[str] = field(default_factory=list)


def adapters(run: Run) -> list[Finding]:
    """Every adapter: PEFT's settings, frozen rows of B exactly zero, and what merging it would change."""
    weights = base_weights(run)
    return [one for arm in run.arms if arm["optimizer"] != MAML for one in adapter(run, arm, weights)]


def adapter(run: Run, arm: dict, weights: dict[int, Path] | None) -> list[Finding]:
    unit = f"{arm['arm']}-{arm['optimizer']}-{arm['seed']}"
    folder, settings = run.folder / "04_align" / "adapters" / unit, run.settings("04_align")
    layers = sorted(set(arm["layers"]))
    tensors = read_lora(folder / ADAPTER_FILES[1])
    if odd := sorted(tensors.keys() ^ {(layer, part) for layer in layers for part in "AB"}):
        return [
            Finding(f"adapter {unit}", False, f"{unit}: A and B are not those of its heads' layers ({odd})")
        ]
    rows = Rows(faults=unlike_config(folder / ADAPTER_FILES[0], layers, settings))
    for layer in layers:
        chosen = [head for at, head in zip(arm["layers"], arm["heads"], strict=True) if at == layer]
        lora = tensors[layer, "A"], tensors[layer, "B"]
        count_rows(rows, layer, lora, np.isin(np.arange(run.grid[1]), chosen), settings, weights)
    if not rows.moved:
        rows.faults.append("no chosen row of B has moved from zero")
    rows.faults += unlike(
        "trainable_parameters", ["arms.parquet"], [arm["trainable_parameters"]], [rows.trained]
    )
    faults = [f"{unit}: {fault}" for fault in rows.faults]
    figure = f"{rows.moved} of {rows.chosen} chosen rows of B moved, {rows.frozen} frozen ones zero"
    found = [finding(f"adapter {unit}", faults, f"{figure}, {rows.trained} parameters")]
    if weights is None:
        return [*found, Finding(f"merging {unit}", None, "the model's folder is not on this machine")]
    figure = (
        f"changes {rows.changed} rows of W_q, all of the chosen heads; all others are bit for bit the base's"
    )
    return found if faults else [*found, Finding(f"merging {unit}", True, figure)]


def unlike_config(path: Path, layers: list[int], settings: dict) -> list[str]:
    """What of PEFT's configuration is not plain LoRA on W_q of these layers, at the run's rank and alpha."""
    config = json.loads(path.read_text(encoding="utf-8"))
    wanted = {
        "peft_type": "LORA",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "layers_to_transform": layers,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    return [
        f"{name} is {config.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if config.get(name) != value
    ]


def count_rows(
    rows: Rows,
    layer: int,
    lora: tuple[np.ndarray, np.ndarray],
    chosen: np.ndarray,
    settings: dict,
    weights: dict[int, Path] | None,
) -> None:
    """Adds one layer to `rows`; `lora` is A [r, E] and B [H * D, r], `chosen` bool [H]."""
    a, b = lora
    rank, dim = settings["rank"], len(b) // len(chosen)
    if len(a) != rank or b.shape != (dim * len(chosen), rank):
        rows.faults.append(f"layer {layer} has A {a.shape} and B {b.shape} at rank {rank}")
        return
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        rows.faults.append(f"layer {layer}: A or B is not finite")
        return
    own = np.repeat(chosen, dim)  # (H * D,)
    nonzero = (b != 0).any(axis=1)
    if len(strays := np.flatnonzero(nonzero & ~own)):
        rows.faults.append(
            f"layer {layer}: {len(strays)} frozen rows of B are not zero (first: row {strays[0]})"
        )
    rows.chosen, rows.frozen = rows.chosen + int(own.sum()), rows.frozen + int((~own).sum())
    rows.moved, rows.trained = rows.moved + int((nonzero & own).sum()), rows.trained + a.size + b[own].size
    if weights is not None:
        differs = changed_rows(weights[layer], Q_PROJ.format(layer), a, b, settings["alpha"] / rank)
        if len(strays := np.flatnonzero(differs & ~own)):
            rows.faults.append(
                f"merged, row {strays[0]} of layer {layer}'s W_q changes, which no chosen head has"
            )
        rows.changed += int((differs & own).sum())


def read_lora(path: Path) -> dict[tuple[int, str], np.ndarray]:
    """(layer, "A" or "B") -> tensor. ValueError on any other tensor, or a damaged file."""
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                found = NAME.fullmatch(name)
                if not found:
                    raise ValueError(f"{path} holds {name}, which is no LoRA of W_q")
                tensors[int(found[1]), found[2]] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return tensors


def base_weights(run: Run) -> dict[int, Path] | None:
    """Layer -> the file that holds its W_q; None where the model's folder is not here."""
    if run.model_folder is None:
        return None
    holder: dict[str, Path] = {}
    for path in sorted(run.model_folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            holder |= dict.fromkeys(file.keys(), path)
    return {layer: holder[Q_PROJ.format(layer)] for layer in range(run.grid[0])}


def changed_rows(path: Path, name: str, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """bool [H * D]: rows of W_q that W + scale * B A, rounded to W's own dtype, changes.

    By value: a zero of W may lose its sign, which no product can tell.
    """
    delta = np.float32(scale) * (b.astype(np.float32) @ a.astype(np.float32))  # (H * D, E)
    with safe_open(path, framework="numpy") as file:
        weight = file.get_tensor(name)
    return ((weight.astype(np.float32) + delta).astype(weight.dtype) != weight).any(axis=1)
