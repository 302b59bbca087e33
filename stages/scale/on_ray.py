"""Units on Ray's actors: each holds the model and is handed units until none is pending.

An actor that dies, or whose node does, costs the unit it was at. Ray Core only
(https://docs.ray.io/en/latest/ray-core/actors.html).
"""

import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from tabulate import tabulate

from backends.core.errors import InputError
from stages.run.provenance import ROOT
from stages.run.settings import Settings
from stages.scale.engine import LOCAL, SECONDS, Call, Options, Outcome

try:
    import ray
except ImportError:
    ray = None

PASSED = ("CAST_DATA", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "XDG_CACHE_HOME")
"""environment variables that the stages read"""
CPUS = 4
"""of an actor, where nodes have so many"""
LOGS = "/tmp/ray/session_latest/logs"
"""on a node"""


class Worker:
    """An actor: one process, which keeps its model from call to call."""

    def compute(self, call: Call) -> Outcome:
        return call()


def connect(address: str) -> None:
    """Joins the Ray cluster at `address` (LOCAL: starts one on this machine). InputError where it cannot."""
    if ray is None:
        raise InputError("--ray needs Ray: `.venv/bin/pip install -r requirements-ray.txt`")
    host, _, port = address.rpartition(":")
    start = "start it by `ray start --head`, or leave the address out to use this machine"
    if port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise InputError(
                f"--ray {address}: nothing answers there ({error.strerror or 'no time'}): {start}"
            ) from None
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    environment = {"PYTHONPATH": ":".join(places), "TOKENIZERS_PARALLELISM": "false", **passed}
    options = {"log_to_driver": False, "logging_level": "error", "runtime_env": {"env_vars": environment}}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address, **options, **({"include_dashboard": False} if address == LOCAL else {}))
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise InputError(f"--ray {address}: no Ray there ({str(error).splitlines()[0]}): {start}") from None
    except RuntimeError as error:
        if "mismatch" not in str(error).lower():
            raise
        raise InputError(
            f"--ray {address}: the cluster runs another version of Ray or Python "
            f"({' '.join(str(error).split())}): start it from this .venv"
        ) from None


class Node(NamedTuple):
    """A machine of the cluster, and what it has."""

    name: str
    cpus: int
    gpus: int


def alive() -> list[Node]:
    """The nodes that there are now."""
    nodes = [(node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [Node(name, int(has.get("CPU", 0)), int(has.get("GPU", 0))) for name, has in nodes]


class Size(NamedTuple):
    """What an actor takes of its node."""

    gpus: int
    cpus: int

    def __str__(self) -> str:
        return f"actors of {self.gpus} GPUs and {self.cpus} CPUs"

    def room(self, nodes: Sequence[Node]) -> int:
        """How many actors fit."""
        return sum(
            min(node.cpus // self.cpus, node.gpus // self.gpus if self.gpus else node.cpus) for node in nodes
        )


def actor_size(device: str, options: Options, nodes: Sequence[Node]) -> Size:
    """What an actor takes. InputError where fewer fit than requested.

    By default one GPU where there are any, and CPUS processors or a GPU's share of the smallest node.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    own_gpus = options.gpus_per_actor
    if own_gpus is None:
        own_gpus = 0 if device == "cpu" else int(gpus > 0 or device != "auto")
    shares = [node.cpus * own_gpus // node.gpus for node in nodes if own_gpus and node.gpus]
    shares = shares or [node.cpus for node in nodes if node.cpus]
    size = Size(own_gpus, options.cpus_per_actor or max(1, min([CPUS, *shares])))
    if (room := size.room(nodes)) < max(1, options.actors):
        raise InputError(
            f"{options.actors or 1} {size} do not fit: the cluster has {len(nodes)} nodes, {gpus} GPUs and "
            f"{cpus} CPUs, room for {room}; fewer --actors, --gpus-per-actor or --cpus-per-actor"
        )
    return size


class RayEngine:
    """See engine.Engine. `settings.run.run` may be relative to the present folder, as on every node."""

    def __init__(self, settings: Settings, options: Options):
        device = settings.run.device
        if ":" in device:
            raise InputError(f"--device {device}: with --ray an actor has GPUs of its own; say cuda")
        connect(options.ray)
        try:
            self.size = actor_size(device, options, alive())
        except InputError:
            self.close()
            raise
        self.count = options.actors or self.size.room(alive())
        self.idle: list = []
        self.busy: dict = {}
        """what is waited for -> its actor, and the call; None: the actor is coming up"""

    def plan(self) -> str:
        table = tabulate(alive(), headers=("node", "CPUs", "GPUs"), tablefmt="plain")
        return f"{table}\n{self.count} {self.size}"

    def start(self) -> None:
        print(f"[launch] {self.count} {self.size}", flush=True)
        for _ in range(self.count):
            self._hire()

    def batches(self, waiting: deque[str]) -> list[list[str]]:
        """Many units at first, so that work which they share (a sweep's clean pass) is done few times; few at
        last, so that all actors end together."""
        found = []
        while waiting and len(found) < len(self.idle):
            found.append([waiting.popleft() for _ in range(-(-len(waiting) // (2 * self.count)))])
        return found

    def _hire(self) -> None:
        """Asks for an actor, which comes when there is room."""
        actor = ray.remote(Worker).options(num_cpus=self.size.cpus, num_gpus=self.size.gpus).remote()
        self.busy[actor.__ray_ready__.remote()] = actor, None

    def submit(self, calls: Sequence[Call]) -> None:
        for call in calls:
            actor = self.idle.pop()
            self.busy[actor.compute.remote(call)] = actor, call

    def ended(self) -> list[tuple[Call, Outcome | str]]:
        found = []
        for done in ray.wait([*self.busy], num_returns=1, timeout=SECONDS)[0]:
            actor, call = self.busy.pop(done)
            try:
                outcome = ray.get(done)
                self.idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                outcome = f"{type(error.cause).__name__}: {_line(error.cause)}"
                self.idle.append(actor)
            except ray.exceptions.RayError as error:
                outcome = f"its process died ({_line(error)}; logs: {LOGS} on its node)"
                self._replace(actor, call is not None, outcome)
            if call is not None:
                found.append((call, outcome))
        return found

    def _replace(self, actor, had_begun: bool, why: str) -> None:
        """Lets go of a dead actor; asks for another where there is room. InputError where none is left."""
        with suppress(ray.exceptions.RayError):
            ray.kill(actor)
        if had_begun and self.size.room(alive()) > len(self.busy) + len(self.idle):
            self._hire()
        if not self.busy and not self.idle:
            raise InputError(
                f"no actor is left, and no room for another ({why}): when there is, the same command goes on"
            )

    def close(self) -> None:
        ray.shutdown()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
