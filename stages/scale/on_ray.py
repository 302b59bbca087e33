"""Units on Ray's actors: each holds the model and is handed units by name until none is pending.

Every node has to see the run folder (a shared file system). An actor that dies, or whose node does, costs the
unit it was at. Ray Core only (https://docs.ray.io/en/latest/ray-core/actors.html).
"""

import contextlib
import io
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from backends.core.errors import InputError
from stages.run.locks import BY_NAME, LAUNCH_LOCK
from stages.run.provenance import ROOT, package_versions
from stages.run.settings import Settings
from stages.scale.engine import LOCAL, RETRIES, SECONDS, Options, Watch, compute, watch

try:
    import ray
except ImportError:
    ray = None

PASSED = ("CAST_DATA", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "XDG_CACHE_HOME")
"""environment variables that the stages read"""
PATIENCE = 60
"""seconds that actors have to come before those that are there begin"""
CPUS = 4
"""of an actor, where nodes have so many"""
LOGS = "/tmp/ray/session_latest/logs"
"""on a node"""


# In an actor's process


class Hello(NamedTuple):
    """An actor's first answer."""

    node: str
    versions: dict[str, str]
    sees: bool  # the run folder


class Outcome(NamedTuple):
    """What became of a call that returned."""

    error: str | None  # bad input, one line
    output: str  # the stage's own lines
    seconds: float
    work: float  # processor seconds


class Worker:
    """An actor: one process, one model."""

    def __init__(self, settings: Settings, folder: str, token: str):
        self.settings, self.sees = settings, False
        if Path(folder).is_dir():
            os.chdir(folder)  # settings name files as the driver sees them
            written = settings.folder / LAUNCH_LOCK
            self.sees = written.is_file() and written.read_text() == token

    def hello(self) -> Hello:
        node = f"{socket.gethostname()} {ray.get_runtime_context().get_node_id()[:6]}"
        return Hello(node, package_versions(), self.sees)

    def make(self, name: str, units: Sequence[str] | None) -> Outcome:
        """Computes units of a stage; None: the whole stage, which joins what is there."""
        shard = "" if units is None else BY_NAME + ",".join(units)
        began, worked = time.monotonic(), time.process_time()
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            error = compute(self.settings, name, shard)
        return Outcome(error, output.getvalue(), time.monotonic() - began, time.process_time() - worked)


# The cluster


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


def check(hello: Hello, settings: Settings) -> None:
    """InputError where an actor cannot work on the run."""
    if not hello.sees:
        raise InputError(
            f"node {hello.node} does not see {settings.folder}: a run on several nodes needs its folder, and "
            f"this project, on a file system that all of them share, at the same path"
        )
    mine = package_versions()
    if other := sorted(name for name in mine if mine[name] != hello.versions.get(name)):
        raise InputError(
            f"node {hello.node} has {other[0]} {hello.versions.get(other[0])}, here it is {mine[other[0]]}: "
            f"use one .venv"
        )


# In the driver's process


@dataclass
class Tally:
    """What the actors of a node did."""

    actors: int = 0
    units: int = 0
    seconds: float = 0.0
    work: float = 0.0  # processor seconds
    died: int = 0


class RayEngine:
    """See engine.Engine. `settings.run.run` may be relative to the present folder, as on every node."""

    def __init__(self, settings: Settings, options: Options):
        device = settings.run.device
        if ":" in device:
            raise InputError(f"--device {device}: with --ray an actor has GPUs of its own; say cuda")
        connect(options.ray)
        self.settings = settings
        try:
            self.size = actor_size(device, options, alive())
        except InputError:
            self.close()
            raise
        self.count = options.actors or self.size.room(alive())
        self.token = secrets.token_hex(8)
        self.nodes: dict[str, Tally] = {}
        self.where: dict = {}
        """node of each actor that has said hello"""
        self.greeting: dict = {}
        """actors by the call that waits for them"""
        self.idle: deque = deque()
        self.last_lost = ""
        """why the last actor that could not start did not"""

    def plan(self) -> str:
        table = tabulate(alive(), headers=("node", "CPUs", "GPUs"), tablefmt="plain")
        return f"{table}\n{self.count} {self.size}"

    def start(self) -> None:
        """Starts the actors and waits for them; those that find no room in time join when there is some."""
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        (self.settings.folder / LAUNCH_LOCK).write_text(self.token)
        for _ in range(self.count):
            self._hire()
        began, waiting = time.monotonic(), False
        while self.greeting and not (waiting and self.where):
            self._welcome(ray.wait(list(self.greeting), num_returns=1, timeout=SECONDS)[0])
            if not waiting and time.monotonic() - began > PATIENCE:
                waiting = True
                if not self.where:
                    print("[launch] the cluster has no room yet: waiting", flush=True)
        there = f"{len(self.where)} of {self.count} {self.size} on {len(self.nodes)} nodes"
        print(f"[launch] {there}", flush=True)

    def _hire(self) -> None:
        options = {"num_cpus": self.size.cpus, "num_gpus": self.size.gpus}
        actor = ray.remote(Worker).options(**options).remote(self.settings, os.getcwd(), self.token)
        self.greeting[actor.hello.remote()] = actor

    def _welcome(self, hellos: Sequence) -> None:
        """Takes in the actors that have said hello. InputError where one cannot work."""
        for call in hellos:
            actor = self.greeting.pop(call)
            try:
                hello: Hello = ray.get(call)
            except ray.exceptions.RayError as error:  # gone before it was there
                self.last_lost = f" (the last one: {' '.join(str(error).split())[-300:]})"
                continue
            check(hello, self.settings)
            self.where[actor] = hello.node
            self.nodes.setdefault(hello.node, Tally()).actors += 1
            self.idle.append(actor)

    def run(self, name: str) -> None:
        with watch(name, self.settings) as watched:
            self._units(name, watched)
        print(self._join(name).output, end="", flush=True)

    def _wait_for_one(self, name: str) -> None:
        """Waits for an idle actor. InputError where none can come."""
        while not self.idle:
            if not self.greeting:
                raise InputError(
                    f"no actor is there to compute {name}, and no room for another{self.last_lost}: when "
                    f"there is, the same command goes on"
                )
            self._welcome(ray.wait(list(self.greeting), num_returns=1)[0])

    def _join(self, name: str) -> Outcome:
        """One actor makes the stage from its parts while the others wait."""
        for _ in range(RETRIES + 1):
            self._wait_for_one(name)
            actor = self.idle.popleft()
            outcome, why = self._collect(actor, actor.make.remote(name, None))
            if outcome is not None:
                return outcome
        raise InputError(f"{name} failed {RETRIES + 1} times: {why}")

    def _units(self, name: str, watched: Watch) -> None:
        """Computes every unit of a stage that is not finished."""
        waiting, running, failed = deque(watched.pending(watched.begun_with)), {}, Counter()
        while waiting or running:
            self._hand_out(name, waiting, running)
            if not running:
                self._wait_for_one(name)
                continue
            ready, _ = ray.wait([*running, *self.greeting], num_returns=1, timeout=SECONDS)
            for call in ready:
                if call in self.greeting:
                    self._welcome([call])
                    continue
                actor, units = running.pop(call)
                tally = self.nodes[self.where[actor]]
                _, why = self._collect(actor, call)
                again = watched.pending(units)
                tally.units += len(units) - len(again)
                if again and (why or not running):
                    failed[again[0]] += 1
                    if failed[again[0]] > RETRIES:
                        raise InputError(f"unit {again[0]} of {name} failed {RETRIES + 1} times: {why}")
                    waiting.extendleft(reversed(again))
                else:
                    waiting.extend(again)  # what a classifier is to judge may not be answered yet
            watched.show(f"{len(running)} of {len(self.where)} actors at work")

    def _hand_out(self, name: str, waiting: deque[str], running: dict) -> None:
        """Gives units to idle actors: many at first, so that work which units share (a sweep's clean pass) is
        done few times; few at last, so that all actors end together."""
        while waiting and self.idle:
            units = [waiting.popleft() for _ in range(-(-len(waiting) // (2 * len(self.where))))]
            actor = self.idle.popleft()
            running[actor.make.remote(name, units)] = (actor, units)

    def _collect(self, actor, call) -> tuple[Outcome | None, str]:
        """What came of a call, or why nothing did; a dead actor is replaced where there is room.

        Raises InputError where the stage refused its input: no other actor would do better.
        """
        node = self.where[actor]
        try:
            outcome: Outcome = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            self.idle.append(actor)
            return None, f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())[:200]}"
        except ray.exceptions.RayError as error:
            self.nodes[node].died += 1
            del self.where[actor]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
            if self.size.room(alive()) > len(self.where) + len(self.greeting):
                self._hire()
            return None, f"its process died ({' '.join(str(error).split())[:200]}; logs: {LOGS} on {node})"
        if outcome.error is not None:
            raise InputError(outcome.error)
        self.nodes[node].seconds += outcome.seconds
        self.nodes[node].work += outcome.work
        self.idle.append(actor)
        return outcome, ""

    def summary(self) -> str:
        rows = [(node, *astuple(tally)) for node, tally in sorted(self.nodes.items())]
        headers = ("node", "actors", "units", "at work (s)", "processor (s)", "died")
        return tabulate(rows, headers=headers, tablefmt="plain", floatfmt=".0f")

    def close(self) -> None:
        ray.shutdown()
