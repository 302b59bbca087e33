"""Locks on files. A file system may have none (NFS without its service, some of FUSE). There a file that is
present stands in, with the process that made it: safe among processes of one machine; what a killed one of
another machine left has to be deleted by hand."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import SoftFileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
MOMENT = 2.0
"""seconds in which another process has looked whether a soft lock is held"""


def soft_warning(folder: Path) -> str:
    """What is said where a lock is a soft one."""
    return (
        f"the file system of {folder} has no locks: files {folder}/*.soft* stand in, and one that a killed "
        f"process of another machine leaves there has to be deleted"
    )


@contextmanager
def held(path: Path, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path`, alone or beside others that share it; yields whether it is a soft lock.

    Raises BlockingIOError where another process holds it and `wait` is not given, any other OSError where it
    cannot be written.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        else:
            yield False
            return
    with _soft(path, shared, wait):
        yield True


@contextmanager
def _soft(path: Path, shared: bool, wait: bool) -> Iterator[None]:
    """Who holds it alone has PATH.soft, who shares it PATH.soft-PROCESS; each then looks for the other."""
    alone = path.with_name(f"{path.name}.soft")
    own = path.with_name(f"{alone.name}-{os.getpid()}-{secrets.token_hex(4)}") if shared else alone
    with ExitStack() as kept:
        kept.enter_context(_present(own, -1 if wait else MOMENT))
        for other in [alone] if shared else sorted(path.parent.glob(f"{alone.name}-*")):
            with _present(other, -1 if wait else MOMENT):
                pass
        yield


@contextmanager
def _present(path: Path, seconds: float) -> Iterator[None]:
    """The file is there and this process's; one that a process of this machine left behind is taken over."""
    try:
        with SoftFileLock(path, timeout=seconds):
            yield
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "held by another process", str(path)) from None
