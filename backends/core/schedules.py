"""Schedules of both tunings: learning rates, steps, and which rows a step reads."""

from collections.abc import Sequence

import numpy as np

from backends.base import Example, GainRecipe, Recipe, Selection, Task
from backends.core import seeds

BETAS = (0.9, 0.999)
"""of AdamW"""


def learning_rate(step: int, steps: int, recipe: Recipe | GainRecipe) -> float:
    """Linear decay from recipe.lr at step 0 towards 0 after the last step."""
    return recipe.lr * (1.0 - step / steps)


def adam_pace(steps: int, own: np.ndarray) -> np.ndarray:
    """What an Adam's step number `steps` (from 1) has to be multiplied by for parameters whose gradients were
    zero until their own first step, `own` steps ago (1: this is it), so that they move as by an Adam that
    starts with them: the two differ in the corrections of their moments' bias alone. 1 where both are equal.

    Exact but for Adam's eps. Uncorrected, parameters that join after 1,000 steps take steps of up to five
    times the length.

    >>> adam_pace(1000, np.array([1, 1000])).round(3).tolist()
    [0.398, 1.0]
    """
    first, second = ((1 - beta**steps) / (1 - beta**own) for beta in BETAS)
    return first / np.sqrt(second)


def step_tokens(batch: Sequence[Example], recipe: Recipe) -> int:
    """Tokens that a step reads, without padding."""
    return sum(min(len(row.prompt_ids) + len(row.target_ids), recipe.max_length) for row in batch)


# Gains


def outer_steps(tasks: Sequence[Task], neurons: Selection, recipe: GainRecipe) -> int:
    """As many as read the tasks' rows `epochs` times; 0 where there is no neuron to tune."""
    if not neurons.safety and not neurons.utility:
        return 0
    rows = sum(len(task.safe) + len(task.util) for task in tasks)
    return recipe.epochs * -(-rows // (2 * recipe.batch))


def draw_task_rows(tasks: Sequence[Task], step: int, recipe: GainRecipe) -> tuple[Task, Task]:
    """Support and query rows of an outer step, as a task each.

    Tasks take turns, in a new order each round. A task's rows are split once: those at even places are
    support, the others query, so that the outer step never sees a row that an inner step did.
    """
    turn, place = divmod(step, len(tasks))
    task = tasks[seeds.stream(recipe.seed, "gains", "task", turn).permutation(len(tasks))[place]]
    generator = seeds.stream(recipe.seed, "gains", "rows", step)

    def draw(rows: Sequence[Example]) -> tuple[Example, ...]:
        size = min(max(1, recipe.batch // 2), len(rows))
        return tuple(rows[index] for index in generator.choice(len(rows), size, replace=False))

    support, query = (
        Task(task.name, draw(task.safe[half::2]), draw(task.util[half::2])) for half in range(2)
    )
    return support, query


def gain_step_tokens(support: Task, query: Task, recipe: GainRecipe) -> int:
    """Tokens that an outer step reads, without padding."""
    inner, outer = (
        sum(len(row.prompt_ids) + len(row.target_ids) for row in (*task.safe, *task.util))
        for task in (support, query)
    )
    return recipe.inner_steps * inner + outer


def gain_bounds(neurons: Selection, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest gain of every neuron, float32 [L, F]; both 1 for those that are not tuned."""
    least, most = np.ones((2, layers, width), np.float32)
    for chosen, bound, value in ((neurons.safety, most, np.inf), (neurons.utility, least, 0.0)):
        if chosen:
            bound[tuple(np.array(chosen).T)] = value
    return least, most


def utility_weight(recipe: GainRecipe) -> float:
    """Weight of the utility loss in what is minimised."""
    return (1.0 - recipe.lam) * (1.0 if recipe.utility_objective == "preserve" else -1.0)
