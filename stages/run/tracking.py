"""Losses and scores in a tracker that a lab has already (--track). Nothing needs one, no result rests on it.

Every arm x optimizer x seed is a run of the tracker's, named as its adapter; the base model is "base".
TensorBoard's files lie in `<run>/tracking/<name>`; Trackio and Weights & Biases keep theirs where their own
settings say (project "cast", the run's folder as the group).
"""

import hashlib
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from backends.core.errors import InputError, reason

Name = Literal["", "tensorboard", "trackio", "wandb"]
T = TypeVar("T")
FOLDER, PROJECT = "tracking", "cast"
STEP = ("loss", "util_loss", "cos", "lr")
"""of a step's record"""


class Tracker(Protocol):
    """One run of a tracker."""

    def log(self, values: Mapping[str, float], step: int | None) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, written without torch or TensorFlow."""

    def __init__(self, run: Path, name: str):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = Event, Summary
        self.writer = EventFileWriter(str(run / FOLDER / name))

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        points = [self.summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.add_event(
            self.event(wall_time=time.time(), step=step or 0, summary=self.summary(value=points))
        )

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run of Trackio's; one that there is already goes on."""

    def __init__(self, run: Path, name: str):
        trackio = importlib.import_module("trackio")
        group = run.resolve().name
        self.run = trackio.init(
            project=PROJECT, name=f"{group}/{name}", group=group, resume="allow", embed=False
        )

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class WeightsAndBiases:
    """A run of wandb's; one that there is already goes on."""

    def __init__(self, run: Path, name: str):
        wandb = importlib.import_module("wandb")
        folder = run.resolve()
        digest = hashlib.sha256(f"{folder}/{name}".encode()).hexdigest()[:16]
        self.run = wandb.init(project=PROJECT, name=name, group=folder.name, id=digest, resume="allow")

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def check(name: Name) -> None:
    """InputError, one line, where a tracker is asked for that is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise InputError(
            f"--track {name} needs {name}, which is not installed: `pip install -r requirements-{name}.txt`"
        )


class Guarded:
    """A run of a tracker, or of none. One that fails is warned of, once, and the run goes on without it.

    Args:
        run: the run's folder.
        name: of the arm as tuned.
        warn: takes the warning.
    """

    def __init__(self, tracker: Name, run: Path, name: str, warn: Callable[[str], object]):
        self.what, self.warn, self.own = f"--track {tracker} failed on {name}", warn, None
        if tracker:
            self.own = self._try(lambda: TRACKERS[tracker](run, name))

    def log(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Values by name; what is None or NaN is left out. Without a step they are of the whole run."""
        if self.own is not None:
            known = {
                name: float(value)
                for name, value in values.items()
                if value is not None and not math.isnan(value)
            }
            self._try(lambda: self.own.log(known, step))

    def close(self) -> None:
        if self.own is not None:
            self._try(lambda: self.own.close())

    def _try(self, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception as error:  # a network, an account, a disk: types of their own
            self.own = None
            self.warn(f"{self.what} ({reason(error)}): it goes on without")
            return None


def tracked(tracker: Name, run: Path, name: str, warn: Callable[[str], object]) -> closing[Guarded]:
    """Around what is tracked: gives what logs (`Guarded`)."""
    return closing(Guarded(tracker, run, name, warn))


def of_step(record: Mapping) -> dict[str, float | None]:
    """What is logged of a step of tuning (a row of training.parquet)."""
    return {f"train/{name}": record[name] for name in STEP}
