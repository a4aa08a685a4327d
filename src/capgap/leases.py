"""Who does which task in a folder that several processes on several machines work in.

A lease is a file that is only ever made where there is none: LEASES/TASK/1, and by whoever takes it
over LEASES/TASK/2. The highest number counts. Its owner rewrites it again and again; an owner that
is not heard of for `run.lease_seconds` has lost it. No clock is compared with another's: who waits
takes the time itself.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from capgap.errors import UserError, warn_once
from capgap.storage import Store, as_urls

# An owner is heard of so often before it counts as gone
BEATS = 10


class Leases:
    """The tasks that `owner` has taken in `folder`; a context manager, inside of which others hear
    of them, and at whose end they may take them. `sync` is called behind every take and before
    every release: what others did before is then here, and ours where they see it."""

    def __init__(
        self,
        folder: Path | str,
        owner: str | None = None,
        *,
        stale: float,
        sync: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = Store(as_urls(str(folder)))
        self.owner, self.sync = owner or uuid.uuid4().hex, sync
        self.beat, self.stale, self.clock = stale / BEATS, stale, clock
        self._mine: dict[str, str] = {}
        self._lost: set[str] = set()
        self._told: dict[str, dict[str, Any]] = {}
        # what was read of another's lease, and since when it has said the same
        self._heard: dict[str, tuple[Any, float]] = {}
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="leases", daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        for task in list(self._mine):
            self.release(task)

    def take(self, task: str) -> bool:
        """Whether it is ours now."""
        number, name = self._newest(task)
        if name is not None and not self._is_free(name):
            return False
        mine = f"{task}/{number + 1}"
        if not self.store.create(mine, self._said(task, beat=0)):
            return False
        with self._guard:
            self._mine[task] = mine
            self._lost.discard(task)
        self.sync()
        return True

    def release(self, task: str) -> None:
        """Others may take it."""
        if task in self._mine and task not in self._lost:
            self.sync()
        with self._guard:
            name = self._mine.pop(task, None)
            if name is not None and task not in self._lost:
                self._say(name, beat=-1)

    def tell(self, task: str, progress: dict[str, Any]) -> None:
        """What others may read of a task with the next beat."""
        self._told[task] = progress

    def told(self, task: str) -> dict[str, Any]:
        """What its owner last said of a task."""
        name = self._newest(task)[1]
        return {} if name is None else self._read(name)

    def lost(self) -> set[str]:
        """Those of ours that others have taken over."""
        return set(self._lost)

    def _newest(self, task: str) -> tuple[int, str | None]:
        names = (name.rpartition("/")[2] for name in self.store.names(task))
        number = max((int(name) for name in names if name.isdigit()), default=0)
        return number, f"{task}/{number}" if number else None

    def _is_free(self, name: str) -> bool:
        """Given back, or of an owner that is heard of no more, or our own of an earlier try."""
        said = self._read(name)
        if said.get("beat") == -1 or said.get("owner") == self.owner or _is_gone(said):
            return True
        before, since = self._heard.get(name, (None, 0.0))
        if said != before or name not in self._heard:
            self._heard[name] = (said, self.clock())
            return False
        return self.clock() - since > self.stale

    def _go_on(self) -> None:
        beat = 0
        while not self._ended.wait(self.beat):
            beat += 1
            with self._guard:
                for task, name in self._mine.items():
                    # storage that fails for a while must not end what runs
                    with suppress(OSError, UserError):
                        if self._newest(task)[1] != name:
                            self._lost.add(task)
                        elif task not in self._lost:
                            self._say(name, beat=beat)

    def _read(self, name: str) -> dict[str, Any]:
        """Nothing of what is gone, or is being written."""
        try:
            said = json.loads(self.store.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _said(self, task: str, beat: int) -> bytes:
        said = {"owner": self.owner, "beat": beat, "process": [*_place(), os.getpid()]}
        said |= {"host": os.uname().nodename, "progress": self._told.get(task)}
        return json.dumps(said).encode()

    def _say(self, name: str, beat: int) -> None:
        task = name.rpartition("/")[0]
        try:
            self.store.write(name, self._said(task, beat))
        except (OSError, UserError) as error:
            warn_once(f"no word of {task} in {self.store.url}: {error}")


def _place() -> list[Any]:
    """Within which numbers of processes mean something: a machine, or a container of it."""
    try:
        return [os.uname().nodename, os.stat("/proc/self/ns/pid").st_ino]
    except OSError:
        return [os.uname().nodename, None]


def _is_gone(said: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended that did not give its lease back."""
    *place, number = said.get("process") or [None]
    if number is None or place != _place():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
