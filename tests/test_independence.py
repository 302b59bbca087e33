"""Flax is a second opinion: with a fault in what torch computes with, the two no longer agree.

Each case plants one fault in a helper of the backends, wherever a module of either wing holds it, and runs
one verb on both. Were the helper Flax's too, the fault would be in both, and they would still agree.
"""

import ast
import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable

import numpy as np
import pytest

import backends
from backends.base import Backend, GainRecipe, Recipe, Redraw, Selection, Task
from backends.core import adapters as peft_folder
from tests.conftest import BACKENDS, ROOT, make_examples
from tests.families import VOCABULARY

AGREE = 1e-3
"""how far two wings may be apart, relative to the largest number; a fault has to show ten times as clearly"""
HEADS = [(0, 1), (2, 0), (2, 3)]
SAFE, UTIL, CHOICES = make_examples(4, seed=1), make_examples(4, seed=2), make_examples(8, seed=3, choices=4)
RECIPE = Recipe(rank=4, alpha=8.0, lr=2e-2, batch=2, accumulation=2, max_length=64, seed=3, epochs=2)
TASK = Task("all", tuple(make_examples(6, seed=4)), tuple(make_examples(6, seed=5)))
GAINS = GainRecipe(lr=0.2, inner_lr=2.0, batch=4, max_length=64, seed=3, epochs=2)
NEURONS = Selection(safety=((0, 1), (2, 0)), utility=((0, 2), (1, 5)))

Verb = Callable[[Backend], list[np.ndarray]]


def tuned(own: Backend, recipe: Recipe = RECIPE, redraw: Redraw | None = None) -> list[np.ndarray]:
    """Losses, and ΔW of every layer."""
    run = own.tune(make_examples(8, seed=9, shared=20), HEADS, recipe, UTIL, redraw)
    losses = [step["loss"] for step in run]
    a, b, scale = peft_folder.read(run.adapter, own.shape)
    return [np.array(losses), scale * np.einsum("lhdr,lre->lhde", b, a)]


def projected(own: Backend) -> list[np.ndarray]:
    return tuned(own, dataclasses.replace(RECIPE, optimizer="pcgrad"))


def redrawn(own: Backend) -> list[np.ndarray]:
    return tuned(own, redraw=Redraw(2, lambda _: [(0, 1), (1, 3)]))


def gained(own: Backend) -> list[np.ndarray]:
    run = own.tune_gains([TASK], NEURONS, GAINS)
    losses = [[step["loss"], step["util_loss"]] for step in run]
    return [np.array(losses), peft_folder.read_gains(run.adapter, own.shape)]


def attributed(own: Backend) -> list[np.ndarray]:
    return [own.attribute_neurons(SAFE[:2], steps=8).score]


def differentiated(own: Backend) -> list[np.ndarray]:
    found = own.head_gradients(SAFE, UTIL, folds=2)
    return [found.gram, found.gate_safe, found.gate_util]


def answered(own: Backend) -> list[np.ndarray]:
    return [own.logits(SAFE), own.grade(SAFE).outcome]


def chosen(own: Backend) -> list[np.ndarray]:
    return [prediction for _, prediction in own.sweep_choices(CHOICES, HEADS)]


def graded(own: Backend) -> list[np.ndarray]:
    return [outcome for _, outcome in own.sweep_grades(SAFE, HEADS)]


def generated(own: Backend) -> list[np.ndarray]:
    return own.generate(SAFE, 6)


def swept(own: Backend) -> list[np.ndarray]:
    return [tokens for _, found in own.sweep_generations(SAFE, HEADS, 6) for tokens in found]


VERBS = (
    tuned,
    projected,
    redrawn,
    gained,
    attributed,
    differentiated,
    answered,
    chosen,
    graded,
    generated,
    swept,
)

FAULTS: list[tuple[str, str, Callable, Verb]] = [
    (
        "backends.core.packing.training_rows",
        "reads a row's first two tokens in the wrong order",
        lambda right: lambda rows: ([swapped(row) for row in right(rows)[0]], right(rows)[1]),
        differentiated,
    ),
    (
        "backends.core.packing.passes",
        "forgets the last row of a pass",
        lambda right: lambda rows, size: [some[:-1] or some for some in right(rows, size)],
        tuned,
    ),
    (
        "backends.core.packing.by_tokens",
        "puts the longest row in the place of all others",
        lambda right: lambda rows, budget: [[some[0]] * len(some) for some in right(rows, budget)],
        differentiated,
    ),
    (
        "backends.core.packing.join",
        "reads a line's first two tokens in the wrong order",
        lambda right: lambda *args: misread(right(*args)),
        tuned,
    ),
    (
        "backends.core.packing.lines",
        "reads a line's first two tokens in the wrong order",
        lambda right: lambda *args, **named: [misread(line) for line in right(*args, **named)],
        answered,
    ),
    (
        "backends.core.packing.candidates",
        "takes the tokens beside the candidates",
        lambda right: lambda rows: np.minimum(right(rows) + 1, VOCABULARY - 1),
        chosen,
    ),
    (
        "backends.core.packing.by_layer",
        "takes the heads beside those of a layer",
        lambda right: lambda heads: ((at, [(head + 1) % 4 for head in own]) for at, own in right(heads)),
        graded,
    ),
    (
        "backends.core.drafts.Decoding._append",
        "appends the token beside the model's",
        lambda right: (
            lambda self, answers, fed: right(
                self, [[token - 1 if token > 3 else token for token in own] for own in answers], fed
            )
        ),
        generated,
    ),
    (
        "backends.core.drafts.sweep",
        "gives a prompt another one's response",
        lambda right: lambda *args: ((head, found[::-1]) for head, found in right(*args)),
        swept,
    ),
    (
        "backends.core.integration.quadrature",
        "places nodes too early on a path",
        lambda right: lambda steps: (right(steps)[0] ** 2, right(steps)[1]),
        attributed,
    ),
    (
        "backends.core.integration.integrate",
        "weighs every path double",
        lambda right: lambda *args: (2 * right(*args)[0], *right(*args)[1:]),
        attributed,
    ),
    (
        "backends.torch.tune.project",
        "follows the alignment gradient in spite of a conflict",
        lambda right: lambda gradients, against, symmetric: (gradients, *right(gradients, against)[1:]),
        projected,
    ),
    (
        "backends.torch.tune.free",
        "frees a head beside the chosen ones",
        lambda right: lambda plan: tuple(np.maximum(own, np.roll(own, 1, axis=-1)) for own in right(plan)),
        tuned,
    ),
    (
        "backends.core.schedules.adam_pace",
        "lets rows that join late take an old Adam's steps",
        lambda right: lambda steps, own: np.ones(own.shape),
        redrawn,
    ),
    (
        "backends.core.schedules.gain_bounds",
        "binds no gain",
        lambda right: lambda *args: unbound(*right(*args)),
        gained,
    ),
    (
        "backends.core.schedules.utility_weight",
        "maximises the utility loss",
        lambda right: lambda recipe: -right(recipe),
        gained,
    ),
]
"""helper, what its fault does, the fault (given the helper that is right), and the verb that shows it"""


def swapped(row: np.ndarray) -> np.ndarray:
    return np.concatenate([row[1::-1], row[2:]])


def unbound(least: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(least < most, -np.inf, 1).astype(np.float32), most


def misread(line):
    return dataclasses.replace(line, ids=swapped(line.ids))


def apart(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Of two wings' results, relative to the largest number of each part; infinite where shapes differ."""
    if [part.shape for part in left] != [part.shape for part in right]:
        return np.inf
    return max(
        float(np.abs(one.astype(float) - other).max() / (np.abs(one).max() or 1))
        for one, other in zip(left, right, strict=True)
    )


def plant(monkeypatch, where: str, fault: Callable) -> None:
    """Puts fault(helper) in the helper's place, in every module of the backends that has it."""
    place, _, name = where.rpartition(".")
    room, _, last = place.rpartition(".")
    owner = sys.modules.get(place) or getattr(sys.modules[room], last)  # a module, or a class in one
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, fault(right))
    for module in [module for known, module in sys.modules.items() if known.startswith("backends.")]:
        for held in [held for held, value in vars(module).items() if value is right]:
            monkeypatch.setattr(module, held, fault(right))


@pytest.fixture(scope="module")
def wings(models) -> list[Backend]:
    for module in pkgutil.walk_packages(backends.__path__, "backends."):
        importlib.import_module(module.name)
    return [backends.load(name, models["llama-gqa"], device="cpu") for name in BACKENDS]


def results(wings: list[Backend], verb: Verb) -> list[list[np.ndarray]]:
    for own in wings:
        own.kept.drop()  # what a sweep with another helper computed
    return [verb(own) for own in wings]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_both_wings_agree(wings, verb):
    assert apart(*results(wings, verb)) < AGREE


@pytest.mark.parametrize(
    ("where", "fault", "verb"),
    [
        pytest.param(where, fault, verb, id=f"{where.split('.', 1)[1]} {what}")
        for where, what, fault, verb in FAULTS
    ],
)
def test_a_fault_in_what_torch_uses_is_not_flaxs(wings, monkeypatch, where, fault, verb):
    plant(monkeypatch, where, fault)
    try:
        assert apart(*results(wings, verb)) > 10 * AGREE
    finally:
        for own in wings:
            own.kept.drop()


WING = sorted((ROOT / "backends" / "flax").glob("*.py"))
COMPUTES_NOTHING = {
    "backends.base": None,
    "backends.models": None,
    "backends.core.adapters": None,
    "backends.core.budgets": {"machine_bytes"},
    "backends.core.checks": None,
    "backends.core.errors": None,
    "backends.core.kept": None,
    "backends.core.loaded": {"Loaded"},
    "backends.core.progress": None,
    "backends.core.schedules": {"BETAS", "learning_rate"},
    "backends.core.seeds": {"lora_a"},
    "backends.core.tuning": {"LoraPlan", "GainPlan", "GainStep"},
}
"""module -> what the Flax wing may take from it (None: all): records, formats, checks, schedules and seeds"""


@pytest.mark.parametrize("path", WING, ids=lambda path: path.stem)
def test_flax_takes_nothing_that_computes(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]:
        for alias in node.names if node.module.split(".")[0] == "backends" else ():
            module, taken = node.module, {alias.name}
            if f"{module}.{alias.name}" in sys.modules:  # a module: what is read of it
                held = alias.asname or alias.name
                module, taken = (
                    f"{module}.{alias.name}",
                    {
                        used.attr
                        for used in ast.walk(tree)
                        if isinstance(used, ast.Attribute) and ast.unparse(used.value) == held
                    },
                )
            allowed = taken if module.startswith("backends.flax") else COMPUTES_NOTHING.get(module, set())
            assert allowed is None or taken <= allowed, f"{path.name}: {module} {taken - allowed}"
