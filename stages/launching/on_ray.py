"""Units on Ray's actors: each holds the model and is handed units by name until none is left.

The driver keeps no state: what is finished lies in the run folder, which every node has to see (a shared file
system). An actor that dies, or whose node does, costs the unit it was at; a driver that dies is started again
and goes on from the parts. Ray Core only (https://docs.ray.io/en/latest/ray-core/actors.html).
"""

import contextlib
import io
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backends.errors import InputError
from stages import artifacts
from stages.launching.watching import RETRIES, SECONDS, compute, table, watch
from stages.locks import BY_NAME, LAUNCH_LOCK
from stages.provenance import package_versions
from stages.settings import Settings

try:
    import ray
except ImportError:
    ray = None

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = "local"
"""the address that stands for Ray on this machine alone"""
PASSED = ("CAST_DATA", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "XDG_CACHE_HOME")
"""variables that the driver's stages would read"""
PATIENCE = 60
"""seconds that actors have to come before those that are there begin"""
CPUS = 4
"""of an actor, where nodes have so many"""


class Hello(NamedTuple):
    """What an actor says when it is there."""

    node: str
    versions: dict[str, str]
    sees: bool
    """the run folder"""


class Outcome(NamedTuple):
    """What became of a call."""

    error: str
    """a user's mistake, one line; empty: none"""
    said: str
    """the stage's own lines"""
    seconds: float
    work: float
    """processor seconds"""


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
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            error = compute(self.settings, name, shard)
        return Outcome(error, said.getvalue(), time.monotonic() - began, time.process_time() - worked)


@dataclass
class Tally:
    """What a node did."""

    actors: int = 0
    units: int = 0
    seconds: float = 0.0
    """that actors were at work"""
    work: float = 0.0
    """processor seconds"""
    lost: int = 0
    """actors that died"""


def connect(address: str) -> None:
    """Joins the Ray cluster at `address` (HERE: starts one on this machine). InputError where it cannot."""
    if ray is None:
        raise InputError("--ray needs Ray: `.venv/bin/pip install -r requirements-ray.txt`")
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise InputError(
                f"--ray {address}: nothing answers there ({error.strerror or 'no time'}): start it by "
                f"`ray start --head`, or leave the address out to use this machine"
            ) from None
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    environment = {"PYTHONPATH": ":".join(places), "TOKENIZERS_PARALLELISM": "false", **passed}
    options = {"log_to_driver": False, "logging_level": "error", "runtime_env": {"env_vars": environment}}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address, **options, **({"include_dashboard": False} if address == HERE else {}))
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise InputError(
            f"--ray {address}: no Ray there ({str(error).splitlines()[0]}): start it by `ray start --head`, "
            f"or leave the address out to use this machine"
        ) from None
    except RuntimeError as error:
        if "mismatch" not in str(error).lower():
            raise
        raise InputError(
            f"--ray {address}: the cluster runs another version of Ray or Python "
            f"({' '.join(str(error).split())}): start it from this .venv"
        ) from None


class Place(NamedTuple):
    """What an actor takes, and how many fit."""

    gpus: int
    cpus: int
    room: int


def place(settings: Settings, gpus: int | None, cpus: int, actors: int) -> Place:
    """What actors take of the nodes there are. InputError where too little is there.

    Args:
        gpus, cpus: an actor's; None, 0: one GPU where there are any, CPUS processors where there are not.
        actors: wanted; 0: as many as fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    all_cpus, all_gpus = (sum(each) for each in zip(*has, strict=True))
    if gpus is None:
        gpus = 0 if settings.device == "cpu" else int(all_gpus > 0 or settings.device != "auto")
    # An actor's share of the smallest node; a GPU's work has some for processors too.
    shares = [own * gpus // own_gpus for own, own_gpus in has if gpus and own_gpus]
    shares = shares or [own for own, _ in has if own]
    cpus = cpus or max(1, min([CPUS, *shares]))
    room = sum(min(own // cpus, own_gpus // gpus if gpus else own) for own, own_gpus in has)
    if room < max(1, actors):
        raise InputError(
            f"{actors or 1} actors of {gpus} GPUs and {cpus} CPUs do not fit: the cluster has {len(nodes)} "
            f"nodes, {all_gpus} GPUs and {all_cpus} CPUs, room for {room}; fewer --actors, --gpus-per-actor "
            f"or --cpus-per-actor"
        )
    return Place(gpus, cpus, room)


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


class RayEngine:
    """See watching.Engine.

    Args:
        settings: of the run; `run` may be relative to the present folder, as on every node.
        gpus, cpus, actors: as in `place`.
    """

    def __init__(self, settings: Settings, address: str, gpus: int | None, cpus: int, actors: int):
        if ":" in settings.device:
            raise InputError(f"--device {settings.device}: with --ray an actor has GPUs of its own; say cuda")
        connect(address)
        self.settings, self.asked = settings, (gpus, cpus, actors)
        try:
            self.place = place(settings, *self.asked)
        except InputError:
            self.close()
            raise
        self.count = actors or self.place.room
        self.nodes: dict[str, Tally] = {}
        self.where: dict = {}
        """node of each actor that has said hello"""
        self.greeting: dict = {}
        """actors by the call that waits for them"""
        self.idle: deque = deque()
        self.lost = ""
        """why the last actor that could not start did not"""

    def start(self) -> None:
        """Starts the actors and waits for them; those that find no room in time join when there is some.

        Raises InputError where one cannot work.
        """
        self.token = secrets.token_hex(8)
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        (self.settings.folder / LAUNCH_LOCK).write_text(self.token)
        for _ in range(self.count):
            self._hire()
        began, told = time.monotonic(), False
        while self.greeting and not (self.where and time.monotonic() - began > PATIENCE):
            self._welcome(ray.wait(list(self.greeting), num_returns=1, timeout=SECONDS)[0])
            if not (self.where or told) and time.monotonic() - began > PATIENCE:
                told = True
                print("[launch] the cluster has no room yet: waiting", flush=True)
        print(
            f"[launch] {len(self.where)} of {self.count} actors of {self.place.gpus} GPUs and "
            f"{self.place.cpus} CPUs on {len(self.nodes)} nodes",
            flush=True,
        )

    def layout(self) -> list[str]:
        """Where actors would be, as lines of a table."""
        rows = [("node", "CPUs", "GPUs")]
        for node in ray.nodes():
            has = node["Resources"]
            counts = (str(int(has.get(kind, 0))) for kind in ("CPU", "GPU"))
            rows += [(node["NodeManagerHostname"], *counts)] if node["Alive"] else []
        return [*table(rows), f"{self.count} actors of {self.place.gpus} GPUs and {self.place.cpus} CPUs"]

    def _hire(self) -> None:
        options = {"num_cpus": self.place.cpus, "num_gpus": self.place.gpus}
        actor = ray.remote(Worker).options(**options).remote(self.settings, os.getcwd(), self.token)
        self.greeting[actor.hello.remote()] = actor

    def _welcome(self, hellos: Sequence) -> None:
        """Takes in the actors that have said hello. InputError where one cannot work."""
        for call in hellos:
            actor = self.greeting.pop(call)
            try:
                hello: Hello = ray.get(call)
            except ray.exceptions.RayError as error:  # gone before it was there
                self.lost = f" (the last one: {' '.join(str(error).split())[-300:]})"
                continue
            check(hello, self.settings)
            self.where[actor] = hello.node
            self.nodes.setdefault(hello.node, Tally()).actors += 1
            self.idle.append(actor)

    def run(self, name: str) -> None:
        folder = self.settings.folder / name
        if not self.where:
            self.start()
        if not (folder / artifacts.MANIFEST).is_file():
            self._alone(name, ())  # says which units there are
            self._units(name, folder)
        print(self._alone(name, None).said, end="", flush=True)

    def _alone(self, name: str, units: Sequence[str] | None) -> Outcome:
        """A call that one actor makes while the others wait."""
        for _ in range(RETRIES + 1):
            self._wanted(name)
            actor = self.idle.popleft()
            call = actor.make.remote(name, units)
            outcome, why = self._collect(actor, call)
            if outcome is not None:
                return outcome
        raise InputError(f"{name} failed {RETRIES + 1} times: {why}")

    def _wanted(self, name: str) -> None:
        """Waits for an idle actor. InputError where none can come."""
        while not self.idle:
            if not self.greeting:
                raise InputError(
                    f"no actor is left to compute {name}, and there is no room for another{self.lost}: when "
                    f"there is, the same command goes on"
                )
            self._welcome(ray.wait(list(self.greeting), num_returns=1)[0])

    def _units(self, name: str, folder: Path) -> None:
        """Computes every unit of a stage that is not finished."""
        units, finished = artifacts.planned(folder)
        waiting = deque(unit for unit in units if unit not in finished)
        running: dict = {}
        failed: Counter = Counter()
        with watch(folder) as bar:
            while waiting or running:
                while waiting and self.idle:
                    # Many at first, so that work which units share (a sweep's clean pass) is done few times;
                    # few at last, so that all end together.
                    size = -(-len(waiting) // (2 * len(self.where)))
                    some = [waiting.popleft() for _ in range(size)]
                    actor = self.idle.popleft()
                    running[actor.make.remote(name, some)] = (actor, some)
                if not running:
                    self._wanted(name)
                    continue
                ready, _ = ray.wait([*running, *self.greeting], num_returns=1, timeout=SECONDS)
                for call in ready:
                    if call in self.greeting:
                        self._welcome([call])
                        continue
                    actor, some = running.pop(call)
                    tally = self.nodes[self.where[actor]]
                    _, why = self._collect(actor, call)
                    left = [unit for unit in some if not (folder / "parts" / f"{unit}.parquet").is_file()]
                    tally.units += len(some) - len(left)
                    if not left:
                        continue
                    if not why and running:
                        waiting.extend(left)  # what a classifier is to judge may not be answered yet
                        continue
                    failed[left[0]] += 1
                    if failed[left[0]] > RETRIES:
                        raise InputError(f"unit {left[0]} of {name} failed {failed[left[0]]} times: {why}")
                    waiting.extendleft(reversed(left))
                bar.look(f"{len(running)} of {len(self.where)} actors at work")

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
            self.nodes[node].lost += 1
            del self.where[actor]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
            with contextlib.suppress(InputError):  # no room now: the others go on
                if place(self.settings, *self.asked[:2], 1).room > len(self.where) + len(self.greeting):
                    self._hire()
            logs = f"logs: /tmp/ray/session_latest/logs on {node}"
            return None, f"its process died ({' '.join(str(error).split())[:200]}; {logs})"
        if outcome.error:
            raise InputError(outcome.error)
        self.nodes[node].seconds += outcome.seconds
        self.nodes[node].work += outcome.work
        self.idle.append(actor)
        return outcome, ""

    def told(self) -> list[str]:
        rows = [("node", "actors", "units", "at work", "processor", "died")]
        rows += [
            (
                node,
                str(one.actors),
                str(one.units),
                f"{one.seconds:.0f} s",
                f"{one.work:.0f} s",
                str(one.lost),
            )
            for node, one in sorted(self.nodes.items())
        ]
        return table(rows)

    def close(self) -> None:
        ray.shutdown()
