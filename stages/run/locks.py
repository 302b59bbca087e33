"""Who may write into a run folder: one process, or one for each shard of a stage."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backends.core.errors import InputError
from backends.core.locking import held

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
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise InputError(f"--shard {text}: i/n with i from 1 to n, for example 2/8, or {BY_NAME}NAME,NAME")


def units_of_shard(shard: Shard | None, units: list[str], stage: str) -> list[str]:
    """Those of a stage's units that a shard computes, in order; None: all. InputError where it names one that
    there is not."""
    if isinstance(shard, frozenset):
        if unknown := sorted(shard - set(units)):
            raise InputError(f"--shard: {stage} has no unit {unknown[0]}; it has {', '.join(units)}")
        return [unit for unit in units if unit in shard]
    if shard is None:
        return units
    number, count = shard
    return units[number - 1 :: count]


@contextmanager
def run_lock(run: Path, shard: Shard | None) -> Iterator[bool]:
    """Holds a run folder: a whole stage alone, shards beside other shards but each i/n only once. Yields
    whether the file system has no locks (backends.core.locking).

    Whoever names units sees to it that no two processes have the same (Ray's engine does).

    Raises InputError where it is held already, or cannot be written.
    """
    with ExitStack() as kept:
        try:
            run.mkdir(parents=True, exist_ok=True)
            soft = kept.enter_context(held(run / ".lock", shared=shard is not None))
            if isinstance(shard, tuple):
                kept.enter_context(held(run / f".lock-{shard[0]}-of-{shard[1]}"))
        except BlockingIOError as error:
            left = f" ({error.filename}: delete it if that one was killed)" if error.filename else ""
            raise InputError(
                f"{run} is in use by another process{left}: wait for it, or choose another --run"
            ) from None
        except OSError as error:
            raise InputError(f"{run} cannot be written ({error.strerror}): choose another --run") from None
        yield soft
