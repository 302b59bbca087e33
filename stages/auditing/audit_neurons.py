"""The audit's checks of NeuronTune: ranks, which neurons an arm tunes, its steps, and its gains.

What attributions are made of (activations, gradients) is no artifact, so that scores are believed; both
backends compute them, and `stages.compare` holds them against each other.
"""

import json
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from backends.neurons import GainRecipe, Selection, bounds, draw, outer_rate, outer_steps, step_tokens
from data.rendering import example
from stages import arms, neurons
from stages.auditing.audit_run import NEURONS, Arm, Finding, Run, finding, unlike
from stages.auditing.audit_weights import ADAPTER_FILES

NAME = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"
CONFIG = {
    "peft_type": "IA3",
    "target_modules": ["down_proj"],
    "feedforward_modules": ["down_proj"],
    "modules_to_save": None,
}


def scores(run: Run) -> list[Finding]:
    """Every neuron once, in order, its scores finite and not negative, its ranks those of its scores."""
    if NEURONS not in run.tables:
        return []
    table = run.table(NEURONS)
    places = list(zip(table["layer"].to_pylist(), table["neuron"].to_pylist(), strict=True))
    shape = tuple(int(top) + 1 for top in np.max(places, axis=0))
    faults = [] if places == list(np.ndindex(*shape)) else [f"not every neuron of {shape} once, in order"]
    if shape[0] != run.grid[0]:
        faults.append(f"{shape[0]} layers, gradients.parquet has {run.grid[0]}")
    for side in ("safety", "utility"):
        values = table[side].to_numpy()
        if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            faults.append(f"{side} scores are negative, not finite or all 0")
        again = neurons.ranks(values.reshape(shape)).ravel() if not faults else []
        if not faults:
            faults += unlike(f"{side}_rank", places, table[f"{side}_rank"].to_numpy(), again)
    return [
        finding("neurons.parquet: ranks", faults, f"{shape[0]} x {shape[1]} neurons, ranked by both scores")
    ]


def own_arms(run: Run) -> list[dict]:
    return [arm for arm in run.arms if arm["optimizer"] == arms.MAML]


def selection(run: Run, arm: dict) -> Selection:
    """The neurons of an arm, chosen again."""
    parsed = arms.parse(arm["arm"], run.settings("04_align")["buckets"])
    return neurons.of_arm(parsed, run.table(NEURONS), arm["seed"])


def arms_of_neurons(run: Run) -> list[Finding]:
    """Each arm tunes just the neurons of its name, on the rows and at the rates that the settings give."""
    if not own_arms(run):
        return []
    settings = run.settings("04_align")
    rows = run.table("01_calibrate/alignment.parquet").to_pylist()
    tasks = neurons.tasks(rows, [example(row) for row in rows])
    training = run.table("04_align/training.parquet").to_pylist()
    faults, counted = [], {}
    for arm in own_arms(run):
        unit = f"{arm['arm']}-{arm['optimizer']}-{arm['seed']}"
        chosen = selection(run, arm)
        every = [*chosen.safety, *chosen.utility]
        for column, wanted in (("safety_neurons", chosen.safety), ("utility_neurons", chosen.utility)):
            if arm[column] != [list(neuron) for neuron in wanted]:
                faults.append(f"{unit}: {column} are not those that neurons.parquet gives")
        computed = {"adapter": f"adapters/{unit}", "n_heads": 0, "n_neurons": len(every)}
        computed |= {"trainable_parameters": len(every), "n_layers": len({layer for layer, _ in every})}
        for column, value in computed.items():
            faults += unlike(column, [unit], [arm[column]], [value])
        counted[arm["arm"]] = len(every)
        own = [row for row in training if (row["arm"], row["seed"]) == (arm["arm"], arm["seed"])]
        faults += unlike_steps(unit, own, tasks, chosen, recipe(settings, arm))
    return [finding("arms of neurons, their rows and steps", faults, f"{counted}")]


def recipe(settings: dict, arm: dict) -> GainRecipe:
    return GainRecipe(
        lam=arms.parse(arm["arm"], settings["buckets"]).lam,
        lr=settings["gain_lr"],
        inner_steps=settings["gain_inner_steps"],
        epochs=settings["epochs"],
        batch=settings["batch"] * settings["accumulation"],
        max_length=settings["max_length"],
        seed=arm["seed"],
    )


def unlike_steps(
    unit: str, rows: Sequence[dict], tasks: Sequence, chosen: Selection, given: GainRecipe
) -> list[str]:
    """Faults of an arm's rows in training.parquet: steps, rates and tokens."""
    count = outer_steps(tasks, chosen, given)
    if [row["step"] for row in rows] != list(range(count)):
        return [f"{unit}: {len(rows)} steps in training.parquet, {count} asked"]
    if not count:
        return []
    places = [f"{unit} step {step}" for step in range(count)]
    rates = [outer_rate(step, count, given) for step in range(count)]
    read = [step_tokens(*draw(tasks, step, given), given) for step in range(count)]
    faults = unlike("lr", places, [row["lr"] for row in rows], rates)
    return faults + unlike("tokens", places, [row["tokens"] for row in rows], read)


def adapters(run: Run) -> list[Finding]:
    """Every IA3 adapter: PEFT's settings, gains inside their bounds, all others exactly 1."""
    return [adapter(run, arm) for arm in own_arms(run)]


def adapter(run: Run, arm: dict) -> Finding:
    unit = f"{arm['arm']}-{arm['optimizer']}-{arm['seed']}"
    folder, chosen = run.folder / "04_align" / "adapters" / unit, selection(run, arm)
    config = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    faults = [
        f"{unit}: {name} is {config.get(name)!r}, not {value!r}"
        for name, value in CONFIG.items()
        if config.get(name) != value
    ]
    found = gains(run, (arm["arm"], arm["optimizer"], arm["seed"]))
    least, most = bounds(chosen, *found.shape)
    free = least < most
    if not np.isfinite(found).all():
        faults.append(f"{unit}: gains are not finite")
    elif len(strays := np.argwhere((found < least) | (found > most))):
        layer, neuron = strays[0]
        faults.append(
            f"{unit}: the gain of neuron ({layer}, {neuron}) is {found[layer, neuron]}, allowed is "
            f"{least[layer, neuron]} to {most[layer, neuron]}"
        )
    if free.any() and (found[free] == 1).all():
        faults.append(f"{unit}: no gain has moved from 1")
    figure = f"{(found[free] != 1).sum()} of {free.sum()} gains moved, {(~free).sum()} others exactly 1"
    return finding(f"adapter {unit}", faults, figure)


def gains(run: Run, label: Arm) -> np.ndarray:
    """Gains [L, F] of an arm. ValueError where the file is damaged or holds anything else."""
    path = run.folder / "04_align" / "adapters" / "-".join(map(str, label)) / ADAPTER_FILES[1]
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    names = [NAME.format(layer) for layer in range(run.grid[0])]
    if odd := sorted(tensors.keys() ^ set(names)):
        raise ValueError(f"{path} holds other gains than those of {run.grid[0]} layers ({odd[0]})")
    return np.concatenate([tensors[name] for name in names])
