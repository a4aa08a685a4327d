"""An output folder belongs to one process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capgap.errors import UserError

LOCK = ".lock"


class InUse(UserError):
    """Another process is at work in the folder."""


@contextmanager
def locked_folder(out: Path, *, shared: bool = False) -> Iterator[int]:
    """The folder, made if need be, is this process's while inside, or `shared` with others that
    share it; gives the lock, an open file.

    UserError: not writable. InUse: another process is at work there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a")
    except OSError as error:
        raise UserError(
            f"cannot write into {out}: {error.strerror}; choose another --out"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"another process is at work in {out}") from None
        yield lock.fileno()
