"""Checks of stage 04: steps, rows and rates; and adapters that move only their heads or neurons."""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from backends.base import Selection
from backends.core import schedules, seeds
from backends.core.packing import cut_rows
from data.rendering import example
from stages.checks.finished import Faults, FinishedRun, Result, unequal
from stages.method.arms import ArmRun, bucket_heads
from stages.method.heads import COLUMN
from stages.run.adapters import drawn_heads, gain_recipe, lora_recipe, tasks_of
from stages.run.schemas import ALIGNMENT, ARMS, HEADS, TRAINING
from stages.run.store import differences, read_json

ADAPTERS = "04_align/adapters"
LORA = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.q_proj\.lora_([AB])\.weight")
GAINS = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.down_proj\.(ia3_l)")
PLAIN = {"modules_to_save": None, "peft_type": "LORA", "target_modules": ["q_proj"], "lora_dropout": 0.0}
PLAIN |= {"bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False}
"""settings of an adapter that is LoRA on W_q and nothing else"""
GAINS_ONLY = {"modules_to_save": None, "peft_type": "IA3"}
GAINS_ONLY |= dict.fromkeys(("target_modules", "feedforward_modules"), ["down_proj"])


def stored_arms(run: FinishedRun) -> Iterator[tuple[ArmRun, dict]]:
    """Every arm of the settings, and its row of arms.parquet."""
    return zip(run.settings.arm_runs, run.read(ARMS).to_dict("records"), strict=True)


def selection(row: Mapping) -> Selection:
    """The neurons of a row of arms.parquet."""
    names = ("safety_neurons", "utility_neurons")
    return Selection(*(tuple(tuple(neuron.tolist()) for neuron in row[name]) for name in names))


# Steps


def steps(run: FinishedRun) -> Result:
    """training.parquet against the rows, order and rates that the recipes give: arms of a seed and kind
    differ in nothing else. Re-diagnosed buckets were drawn when they should be, first from the map."""
    rows = run.read(ALIGNMENT)
    examples = cut_rows([example(row) for row in rows.to_dict("records")], run.settings.data.max_length)
    tasks, computed, faults = tasks_of(rows, examples), [], []
    for tuned, row in stored_arms(run):
        if tuned.arm.of_neurons:
            recipe = gain_recipe(run.settings, tuned)
            count = schedules.outer_steps(tasks, selection(row), recipe)
            drawn = (schedules.draw_task_rows(tasks, step, recipe) for step in range(count))
            tokens = [schedules.gain_step_tokens(*pair, recipe) for pair in drawn]
        else:
            recipe = lora_recipe(run.settings, tuned)
            order = seeds.batch_order(len(examples), recipe)
            tokens = [schedules.step_tokens([examples[row] for row in batch], recipe) for batch in order]
        rates = [schedules.learning_rate(step, len(tokens), recipe) for step in range(len(tokens))]
        computed += [
            tuned.labels | {"step": step, "lr": lr, "tokens": tokens[step]} for step, lr in enumerate(rates)
        ]
        faults += draw_faults(run, tuned, len(tokens))
    faults += unequal(run.read(TRAINING), pd.DataFrame(computed))
    return faults, f"{len(computed)} steps of all arms"


def draw_faults(run: FinishedRun, tuned: ArmRun, steps: int) -> Faults:
    """What is wrong with the steps at which an arm's heads were drawn, their number, and the first ones. (The
    others follow from the model as it was then.)"""
    training, labels = run.read(TRAINING), tuned.labels
    own = training[(training[list(labels)] == pd.Series(labels)).all(axis=1)]
    at = own["step"][own["drawn"].notna()].tolist()
    if not tuned.arm.rediagnosed:
        return [f"{tuned.name}: heads were drawn before step {step}" for step in at]
    if at != [*range(0, steps, run.settings.tuning.rediagnose)]:
        return [f"{tuned.name}: heads were drawn before steps {at}"]
    found = drawn_heads(training, tuned)
    heads = run.read(HEADS, tuned.arm.map)
    ranked = heads[COLUMN[tuned.arm.ranked_by]].to_numpy().reshape(run.heads)
    first = [tuple(head) for head in bucket_heads(tuned.arm, ranked).tolist()]
    wrong = [step for step, drawn in zip(at, found, strict=True) if len(set(drawn)) != len(first)]
    faults = [f"{tuned.name}: step {step} did not draw {len(first)} heads" for step in wrong]
    return faults + ([] if found[0] == first else [f"{tuned.name}: its first heads are not the bucket's"])


# Adapters


def adapters(run: FinishedRun) -> Result:
    """PEFT's settings, as many parameters as arms.parquet says, gains inside their bounds and all others
    exactly 1, frozen rows of B exactly zero: merged, they leave their rows of W_q bit for bit the base's."""
    faults, moved = [], 0
    for tuned, row in stored_arms(run):
        found, free, own = (gains_faults if tuned.arm.of_neurons else lora_faults)(run, tuned, row)
        if free != row["trainable_parameters"]:
            found.append(f"trainable_parameters is {row['trainable_parameters']}, recomputed {free}")
        if free and not own:
            found.append("nothing that it may move has moved")
        faults, moved = faults + [f"{tuned.name}: {fault}" for fault in found], moved + own
    return faults, f"{moved} rows of B and gains moved, all of chosen heads and neurons"


def lora_faults(run: FinishedRun, tuned: ArmRun, row: Mapping) -> tuple[Faults, int, int]:
    """What is wrong with a LoRA adapter, its parameters, and how many rows of B have moved. That of a
    re-diagnosed bucket has all layers."""
    tuning, free, moved = run.settings.tuning, 0, 0
    layers = [*range(run.heads[0])] if tuned.arm.rediagnosed else sorted(set(row["layers"].tolist()))
    wanted = {"r": tuning.rank, "lora_alpha": tuning.alpha, "layers_to_transform": layers}
    faults, tensors = config_faults(run, tuned, PLAIN | wanted), lora(run, tuned)
    if [layer for layer, _, _ in tensors] != layers:
        faults.append("A and B are not those of its heads' layers")
    for layer, a, b in tensors:
        if not len(a) == b.shape[1] == tuning.rank or not (np.isfinite(a).all() and np.isfinite(b).all()):
            faults.append(f"layer {layer}: A {a.shape} or B {b.shape} is of another rank, or not finite")
            continue
        chosen = np.isin(np.arange(run.heads[1]), row["heads"][row["layers"] == layer])
        chosen, nonzero = np.repeat(chosen, len(b) // run.heads[1]), (b != 0).any(axis=1)  # [H * D]
        if len(strays := np.flatnonzero(nonzero & ~chosen)):
            faults.append(f"layer {layer}: {len(strays)} frozen rows of B are not zero (row {strays[0]}, …)")
        free += a.size + b[chosen].size if chosen.any() else 0
        moved += int(nonzero.sum())
    return faults, free, moved


def gains_faults(run: FinishedRun, tuned: ArmRun, row: Mapping) -> tuple[Faults, int, int]:
    """What is wrong with an IA3 adapter, its free gains, and how many gains have moved."""
    faults, found = config_faults(run, tuned, GAINS_ONLY), gains(run, tuned)
    least, most = schedules.gain_bounds(selection(row), *found.shape)
    for layer, neuron in np.argwhere(~((found >= least) & (found <= most))).tolist():  # NaN too
        at = layer, neuron
        faults.append(f"the gain of neuron {at} is {found[at]}, allowed is {least[at]} to {most[at]}")
    return faults, int((least < most).sum()), int((found != 1).sum())


def config_faults(run: FinishedRun, tuned: ArmRun, wanted: Mapping) -> Faults:
    config = read_json(run.folder / ADAPTERS / tuned.name / "adapter_config.json")
    changed = differences({name: config.get(name) for name in wanted}, wanted)
    return [f"adapter_config.json: {changed}"] if changed else []


def tensors_of(run: FinishedRun, tuned: ArmRun, pattern: re.Pattern) -> dict[tuple[int, str], np.ndarray]:
    """(layer, part) -> tensor, by the groups of `pattern`. ValueError on other tensors, or a damaged file."""
    path, tensors = run.folder / ADAPTERS / tuned.name / "adapter_model.safetensors", {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if not (found := pattern.fullmatch(name)):
                    raise ValueError(f"{path} holds {name}, which is no part of this adapter")
                tensors[int(found[1]), found[2]] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return tensors


def lora(run: FinishedRun, tuned: ArmRun) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(layer, A [r, E], B [H * D, r]) by layer. LookupError where one of the two is missing."""
    tensors = tensors_of(run, tuned, LORA)
    return [
        (layer, tensors[layer, "A"], tensors[layer, "B"]) for layer in sorted({key[0] for key in tensors})
    ]


def gains(run: FinishedRun, tuned: ArmRun) -> np.ndarray:
    """[L, F]. LookupError where a layer is missing."""
    tensors = tensors_of(run, tuned, GAINS)
    return np.concatenate([tensors[layer, "ia3_l"].reshape(1, -1) for layer in range(run.heads[0])])
