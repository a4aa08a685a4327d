"""Errors a user can cause and mend."""

import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

# What a disk on a network says while it is away; a mistake of the user's never has these
AWAY = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
)
PATIENCE_SECONDS = 60.0


class UserError(Exception):
    """A mistake in what the user gave: one line with the wrong value and the fix.

    The command line prints it without a traceback and exits with code 2. `rank`: of the process
    that met it, where several work together; None where all meet the same.
    """

    rank: int | None = None


class Interrupted(Exception):
    """Work was asked to stop; its state is saved, and the same call goes on with it."""


class Failed(RuntimeError):
    """Work came to no good end; the command exits with `code`."""

    code = 1


class WorkerDied(Failed):
    """A worker process ended on its own, mostly because the system ran out of memory."""


@contextmanager
def border(what: str) -> Iterator[None]:
    """Around a call of another library with what the user gave: whatever that raises becomes one
    line that begins with `what`, such as "cannot load the model m".

    A full disk, too little memory and our own errors stay what they are.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    # what those libraries raise is no part of what they promise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{what}: {first_line(error)}") from error


def check_regular(path: Path, what: str) -> None:
    """UserError for a pipe or a device, which would be waited for or read without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is no file: give {what} as one")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, or its type's name."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.endswith(":")]
    return (told or lines or [type(error).__name__])[0]


@functools.cache
def warn_once(line: str) -> None:
    """One line on standard error, however often it is found out in this process."""
    logging.getLogger("capgap").warning("warning: %s", line)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory for what was asked; torch has a type for GPUs."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(one in str(error) for one in words)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full.

    safetensors, tokenizers and shutil.copytree tell it in words alone.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


def is_storage_away(told: object) -> bool:
    """Whether an error, or what was printed of one, says that storage fails which may come back."""
    is_known = isinstance(told, OSError) and told.errno in AWAY
    return is_known or any(os.strerror(code) in str(told) for code in AWAY)


def patiently(act: Callable[[], Found]) -> Found:
    """What `act` gives, which is tried again for PATIENCE_SECONDS while storage is away."""
    pause = 0.25
    while True:
        try:
            return act()
        except (OSError, UserError) as error:
            if pause > PATIENCE_SECONDS / 2 or not is_storage_away(error):
                raise
            warn_once(f"storage fails and is tried again: {first_line(error)}")
        time.sleep(pause)
        pause *= 2
