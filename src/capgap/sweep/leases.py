"""Who does which task in a folder that several processes on several machines work in.

A lease is a file that is only ever made where there is none: LEASES/TASK/1, and by whoever takes it
over LEASES/TASK/2. The highest number counts. Its owner rewrites it again and again; an owner that
is not heard of for `run.lease_seconds` has lost it. No clock is compared with another's: who waits
takes the time itself.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from capgap.artifact import read_json, write_json
from capgap.errors import UserError, patiently, warn_once

# An owner is heard of so often before it counts as gone
BEATS = 10


class Leases:
    """The tasks that `owner` has taken in `folder`; a context manager, inside of which others hear
    of them, and at whose end they may take them."""

    def __init__(
        self,
        folder: Path,
        owner: str | None = None,
        *,
        stale: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.owner = folder, owner or uuid.uuid4().hex
        self.beat, self.stale, self.clock = stale / BEATS, stale, clock
        self._mine: dict[str, Path] = {}
        self._lost: set[str] = set()
        self._told: dict[str, dict[str, Any]] = {}
        # what was read of another's lease, and since when it has said the same
        self._heard: dict[Path, tuple[Any, float]] = {}
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
        number, path = self._newest(task)
        if path is not None and not self._is_free(path):
            return False
        mine = self.folder / task / str(number + 1)

        def make() -> None:
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.open("x").close()

        try:
            patiently(make)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror}") from None
        with self._guard:
            self._mine[task] = mine
            self._lost.discard(task)
            self._say(mine, beat=0)
        return True

    def release(self, task: str) -> None:
        with self._guard:
            path = self._mine.pop(task, None)
            if path is not None and task not in self._lost:
                self._say(path, beat=-1)

    def tell(self, task: str, progress: dict[str, Any]) -> None:
        """What others may read of a task with the next beat."""
        self._told[task] = progress

    def told(self, task: str) -> dict[str, Any]:
        """What its owner last said of a task."""
        path = self._newest(task)[1]
        try:
            return {} if path is None else read_json(path)
        except UserError:
            return {}

    def lost(self) -> set[str]:
        return set(self._lost)

    def _newest(self, task: str) -> tuple[int, Path | None]:
        folder = self.folder / task
        names = os.listdir(folder) if folder.is_dir() else []
        number = max((int(name) for name in names if name.isdigit()), default=0)
        return number, folder / str(number) if number else None

    def _is_free(self, path: Path) -> bool:
        """Given back, or of an owner that is heard of no more, or our own of an earlier try."""
        try:
            said = read_json(path)
        except UserError:
            # it is being written for the first time
            said = {}
        if said.get("beat") == -1 or said.get("owner") == self.owner or _is_gone(said):
            return True
        before, since = self._heard.get(path, (None, 0.0))
        if said != before or path not in self._heard:
            self._heard[path] = (said, self.clock())
            return False
        return self.clock() - since > self.stale

    def _go_on(self) -> None:
        beat = 0
        while not self._ended.wait(self.beat):
            beat += 1
            with self._guard:
                for task, path in self._mine.items():
                    # storage that fails for a while must not end what runs
                    with suppress(OSError):
                        if self._newest(task)[1] != path:
                            self._lost.add(task)
                        elif task not in self._lost:
                            self._say(path, beat=beat)

    def _say(self, path: Path, beat: int) -> None:
        try:
            said = {"owner": self.owner, "beat": beat, "process": [*_place(), os.getpid()]}
            said |= {"host": os.uname().nodename, "progress": self._told.get(path.parent.name)}
            write_json(path, said)
        except (OSError, UserError) as error:
            warn_once(f"no word of {path.parent.name} in {self.folder}: {error}")


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
