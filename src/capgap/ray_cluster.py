"""A connection to a Ray cluster (extra `capgap[ray]`), without its noise."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from capgap.errors import border
from capgap.machine import install_command, usable_cores
from capgap.stage import FieldError

LOOK_SECONDS = 2.0
CONNECT_SECONDS = 10.0
# Ray itself ends a process without a word, a minute after it last heard of the head
HEAD_SECONDS = 30.0
USER_ERROR = 2


class Head:
    """Of a cluster: whether it `is_there`, by a look every LOOK_SECONDS.

    Ends this process with one line where it has been gone for HEAD_SECONDS: whoever waits for an
    answer of Ray's hears of nothing else.
    """

    def __init__(self, address: str) -> None:
        self.address, self.is_there = address, True
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="head", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        heard = time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            try:
                socket.create_connection(_place(self.address), timeout=LOOK_SECONDS).close()
                self.is_there, heard = True, time.monotonic()
            except OSError as error:
                self.is_there = False
                if time.monotonic() - heard > HEAD_SECONDS:
                    print(
                        f"\ncapgap: the head of the Ray cluster, {self.address}, is gone "
                        f"({error.strerror}): start the cluster again; the same command continues",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(USER_ERROR)


def _place(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def check_installed() -> None:
    """UserError without Ray."""
    if find_spec("ray") is None:
        raise FieldError("on", f"ray needs it installed: `{install_command('ray')}`")


@contextmanager
def connected() -> Iterator[Head]:
    """The cluster that RAY_ADDRESS or this machine knows, else one that is started here."""
    check_installed()
    import ray

    with ExitStack() as stack:
        stack.enter_context(_standard_output_to_nobody())
        quiet: Any = {"log_to_driver": False, "logging_level": "error"}
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            with border(f"cannot join the Ray cluster {address or 'of this machine'}"):
                if address and re.fullmatch(r"(?!ray:)[^/]+:\d+", address):
                    # Ray itself would ask again for minutes
                    socket.create_connection(_place(address), timeout=CONNECT_SECONDS).close()
                try:
                    ray.init(address=address or "auto", **quiet)
                except ConnectionError:
                    if address:
                        raise
                    ray.init(num_cpus=usable_cores(), include_dashboard=False, **quiet)
            stack.callback(ray.shutdown)
        head = Head(ray.get_runtime_context().gcs_address)
        stack.callback(head.close)
        yield head


@contextmanager
def _standard_output_to_nobody() -> Iterator[None]:
    """Answers go there, and what Ray's processes print does not belong to them."""
    sys.stdout.flush()
    kept = os.dup(1)
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nobody)
