"""What ablating each head does to every calibration row, from the tables of stages 02 and 03."""

import numpy as np
import pandas as pd

from backends.core.errors import InputError
from stages.method.heads import Sensitivity
from stages.method.uncertainty import Effects
from stages.run import judging
from stages.run.job import Job
from stages.run.schemas import CALIBRATION, GRADIENT_LISTS, GRADIENTS


def read_gradients(job: Job, map_name: str) -> dict[str, np.ndarray]:
    """Gram matrices [L, H, 2F, 2F], and gate gradients [L, H, N] of D_safe and of the map's utility rows.

    Raises InputError where they are another model's.
    """
    gradients, shape = job.read(GRADIENTS, map_name), (job.shape.layers, job.shape.heads)
    if len(gradients) != shape[0] * shape[1]:
        file = GRADIENTS.path(map_name)
        raise InputError(f"{file} has {len(gradients)} heads, the model another number: other --run")
    found = {name: np.stack(gradients[name]).reshape(*shape, -1) for name in GRADIENT_LISTS}
    side = 2 * job.settings.data.folds
    return found | {"gram": found["gram"].reshape(*shape, side, side)}


def effects_of(
    job: Job, map_name: str, judged: dict[str, pd.DataFrame], gradients: dict[str, np.ndarray]
) -> dict[Sensitivity, Effects]:
    """Effects on the rows of D_util (a map's) and of D_safe, in their order, by every kind of outcome that
    was computed.

    Args:
        judged: part of the sweep -> its judged table.
    """
    rows, shape = job.read(CALIBRATION), (job.shape.layers, job.shape.heads)
    util, safe = (rows["example_id"][rows["split"] == split] for split in (map_name, "safe"))
    found: dict[Sensitivity, Effects] = {}
    if "generations" in judged:
        answered = [judged[part] for part in ("choices", "answers") if part in judged]
        correct = judging.outcomes(answered, "correct", util, shape)
        refused = judging.outcomes([judged["generations"]], "refused", safe, shape)
        found["counted"] = Effects(correct.effects, refused.effects)
    if "graded" in judged:
        sides = (judging.outcomes([judged["graded"]], "graded", own, shape) for own in (util, safe))
        found["graded"] = Effects(*(side.effects for side in sides))
    # To first order: a gate goes from 1 to 0.
    found["gradient"] = Effects(-gradients["gate_util"], -gradients["gate_safe"])
    return found


def base_rates(job: Job, map_name: str, judged: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Accuracy on a map's utility rows and refusal rate of the clean model."""
    rows = job.read(CALIBRATION)
    util = rows["example_id"][rows["split"] == map_name]
    clean = {part: table[table["layer"].isna()] for part, table in judged.items()}
    answered = pd.concat([clean[part] for part in ("choices", "answers") if part in clean])
    return {
        "accuracy": float(answered.set_index("example_id")["correct"][util].mean()),
        "refusal_rate": float(clean["generations"]["refused"].mean()),
    }
