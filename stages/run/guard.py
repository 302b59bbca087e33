"""How a command ends: well, or in one clear line."""

import errno
import os
import sys
from collections.abc import Callable

from backends.core.errors import InputError


def guarded(program: Callable[[], object]) -> None:
    """Calls a program. Only defects of ours end in a traceback."""
    try:
        program()
    except InputError as error:
        _stop(2, f"error: {error}")
    except BrokenPipeError:  # of `--help | head`: who reads has seen enough; Python would flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _stop(130, "stopped. What was finished is kept: the same command goes on from there.")
    except MemoryError as error:
        _stop(2, f"error: out of memory ({error}): fewer rows, a smaller model or --dtype bfloat16")
    except Exception as error:
        # torch's and JAX's; neither may be imported here.
        if type(error).__name__ == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in str(error):
            _stop(2, "error: the device is out of memory: a smaller model, --dtype bfloat16, or --device cpu")
        # safetensors reports a full disk by an exception of its own, with the system's words in it.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left" not in str(error):
            raise
        where = getattr(error, "filename", None) or "run folder"
        _stop(2, f"error: the disk is full ({where}): make space, then the same command goes on")


def _stop(code: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
