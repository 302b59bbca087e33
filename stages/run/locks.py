"""Who may write into a run folder: one process, or one for each shard of a stage."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backends.core.errors import InputError

Shard = tuple[int, int] | frozenset[str]
"""i of n, from 1; or units by name"""
BY_NAME = "units="
LAUNCH_LOCK = ".lock-launch"
"""file that a launch holds, so that there is one at a time; it says which one"""


def parse_shard(text: str) -> Shard | None:
    """ "2/8" -> (2, 8); "units=a,b" -> {"a", "b"}; "" -> None. InputError on anything else."""
    if not text:
        return None
    if text.startswith(BY_NAME):
        return frozenset(filter(None, text.removeprefix(BY_NAME).split(",")))
    number, slash, count = text.partition("/")
    if slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise InputError(f"--shard {text}: i/n with i from 1 to n, for example 2/8, or {BY_NAME}NAME,NAME")


@contextmanager
def run_lock(run: Path, shard: Shard | None) -> Iterator[None]:
    """Holds a run folder: a whole stage alone, shards beside other shards but each i/n only once.

    Whoever names units sees to it that no two processes have the same (Ray's engine does).

    Raises InputError where it is held already, or cannot be written.
    """
    with ExitStack() as held:
        try:
            run.mkdir(parents=True, exist_ok=True)
            whole = held.enter_context(open(run / ".lock", "a"))
            fcntl.flock(whole, (fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if isinstance(shard, tuple):
                own = held.enter_context(open(run / f".lock-{shard[0]}-of-{shard[1]}", "a"))
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run} is in use by another process: wait for it, or choose another --run"
            ) from None
        except OSError as error:
            raise InputError(f"{run} cannot be written ({error.strerror}): choose another --run") from None
        yield
