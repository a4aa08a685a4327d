"""Limits of time and memory for what a stranger's file makes Python do."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capgap.errors import UserError


@contextmanager
def limited(what: str, *, seconds: float, memory: int) -> Iterator[None]:
    """UserError, beginning with `what`, for work within that takes longer, or more bytes than
    `memory` on top of what this process has.

    In the main thread, where signals arrive, and on Linux, which counts memory; elsewhere nothing
    is limited.
    """
    told = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not told.is_file():
        yield
        return
    taken = int(told.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = min(one for one in (taken + memory, soft, hard) if one != resource.RLIM_INFINITY)

    def late(*_: object) -> None:
        raise UserError(f"{what} takes more than {seconds:g} s: it may have no end")

    before = signal.signal(signal.SIGALRM, late)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        # again and again, since what a signal raises may be swallowed where it arrives
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    except MemoryError:
        raise UserError(f"{what} takes more than {memory // 10**6} MB of memory") from None
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
