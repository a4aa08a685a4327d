"""Local copies of what URLs name: what is read is fetched and checked by hash, what is written is
also sent while work goes on.

A copy has an index: of every file the store's version and the size and time that the local one had
when both were alike. Whichever differs from it has changed.
"""

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from capgap.artifact import InUse, digest, file_hash, read_json, write_json
from capgap.errors import UserError, warn_once
from capgap.leases import Leases
from capgap.machine import started
from capgap.storage import Store, Use, Version, as_urls, cache_folder, is_url, place

SYNC_SECONDS = 5.0
LOOK_SECONDS = 1.0
# Whoever writes into a folder alone is gone when it is not heard of for so long
STALE_SECONDS = 60.0
CONNECTIONS = 8
WEIGHTS = ".safetensors"


class Copy:
    """The local copy of what lies at a URL, a folder or a file."""

    def __init__(self, url: str, use: Use, *, patience: float | None = None) -> None:
        self.path, self.use, self._patience = place(url, use), use, patience
        # as it is written everywhere
        self.url = as_urls(str(self.path))
        self._index_file = cache_folder() / "index" / f"{digest([use, self.url])[:32]}.json"
        self.leases: Leases | None = None

    @cached_property
    def store(self) -> Store:
        return Store(self.url, self._patience)

    @contextmanager
    def held(self, kind: int = fcntl.LOCK_SH) -> Iterator[None]:
        """The copy is not removed while inside; BlockingIOError where a process is in another
        `kind`."""
        self._index_file.parent.mkdir(parents=True, exist_ok=True)
        with self._index_file.with_suffix(".use").open("a") as lock:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            yield

    def pull(
        self,
        *names: str,
        is_start: bool = False,
        is_exact: bool = False,
        checks: bool = False,
        light: bool = False,
    ) -> dict[str, Version]:
        """Fetches what has changed in the store, of these files and folders or of all; returns what
        is there. What is gone here was deleted here, unless a session starts; then what is gone
        there goes here too, and if something changed there all that it has not (`is_exact`).
        `checks`: by hash, whether files are still as they were fetched; `light`: no weights."""
        with self._index() as index:
            there: dict[str, Version] = {}
            for name in names or ("",):
                there |= self.store.names(name)
            there = {name: version for name, version in there.items() if not _is_hidden(name)}
            known = {n: Version(*index[n]["version"]) for n in index if _is_in(n, names)}
            gone = known.keys() - there.keys()

            def is_stale(name: str) -> bool:
                path = self.path / name
                if light and name.endswith(WEIGHTS):
                    return False
                if known.get(name) != there[name] or not path.is_file():
                    return is_start or known.get(name) != there[name]
                return checks and file_hash(path) != index[name]["sha256"]

            stale = [name for name in there if is_stale(name)]
            if self.use == "staged" and stale:
                _make_room(sum(there[name].size for name in stale))

            def fetched(name: str) -> dict[str, Any]:
                self.store.fetch(name, self.path / name)
                sha256 = file_hash(self.path / name)
                return _entry(there[name], _state(self.path / name), sha256=sha256)

            with ThreadPoolExecutor(CONNECTIONS) as pool:
                index.update(zip(stale, pool.map(fetched, stale), strict=True))
            if is_start:
                is_other = is_exact and known != there
                for name in self._files().keys() - there.keys() if is_other else gone:
                    (self.path / name).unlink(missing_ok=True)
                for name in gone:
                    del index[name]
        return there

    def push(self) -> None:
        """Sends what has changed here in the order in which it was written, so that what describes
        comes behind what it describes; then deletes what is gone here."""
        if self.leases is not None and self.leases.lost():
            raise InUse(f"another process has taken over {self.url}")
        with self._index() as index:
            here = self._files()
            changed = (name for name, at in here.items() if index.get(name, {}).get("here") != at)
            is_whole = True
            for name in sorted(changed, key=lambda one: here[one][1]):
                try:
                    version = self.store.put(self.path / name, name)
                    index[name] = _entry(version, here[name])
                except FileNotFoundError:
                    is_whole = False
            gone = index.keys() - here.keys()
            if is_whole and gone:
                self.store.remove(sorted(gone))
                for name in gone:
                    del index[name]

    @contextmanager
    def alone(self, *, wait: float = 0.0) -> Iterator[None]:
        """Nobody else writes there while inside, wherever it runs. InUse: somebody does, and still
        after `wait` seconds."""
        folder, _, name = self.url.rpartition("/")
        store = Store(f"{folder}/.{name}.lease")
        # the one that its user knows
        store.url = self.url
        with Leases(store, stale=STALE_SECONDS) as leases:
            until = time.monotonic() + wait
            while not leases.take("writer"):
                if time.monotonic() >= until:
                    raise InUse(f"another process is at work in {self.url}")
                time.sleep(LOOK_SECONDS)
            self.leases = leases
            yield

    def remove(self) -> int:
        """Gives its bytes back, 0 where it is in use or holds what is not sent yet."""
        try:
            with self.held(fcntl.LOCK_EX), self._index() as index:
                here = self._files()
                sent = {name: entry["here"] for name, entry in index.items()}
                if self.use == "mirrors" and here != sent:
                    return 0
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.unlink(missing_ok=True)
                index.clear()
        except BlockingIOError:
            return 0
        self._index_file.unlink()
        return sum(size for size, _ in here.values())

    @contextmanager
    def _index(self) -> Iterator[dict[str, Any]]:
        """The index, this thread's alone while inside, and kept."""
        self._index_file.parent.mkdir(parents=True, exist_ok=True)
        with self._index_file.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            index: dict[str, Any] = {}
            if self._index_file.exists():
                index = read_json(self._index_file, files=dict)["files"]
                os.utime(self._index_file)
            before = dict(index)
            try:
                yield index
            finally:
                if index != before:
                    what = {"url": self.url, "use": self.use, "files": index}
                    write_json(self._index_file, what)

    def _files(self) -> dict[str, list[int]]:
        """What is there by name, but for what is not finished: artifact.py hides it."""
        paths = [self.path, *(self.path.rglob("*") if self.path.is_dir() else ())]
        found = {}
        for path in paths:
            name = "" if path == self.path else str(path.relative_to(self.path))
            if not _is_hidden(name) and path.is_file():
                try:
                    found[name] = _state(path)
                except FileNotFoundError:
                    continue
        return found


def local(name: str | Path, *, light: bool = False) -> str:
    """What a user names to be read: of a URL its local copy, fetched if need be, and `light`
    without weights; ~ at the beginning is the home; anything else as it is. UserError."""
    if is_url(name):
        return str(_staged(str(name), light, cache_folder())[0])
    return str(Path(name).expanduser()) if str(name).startswith("~") else str(name)


@cache
def _staged(url: str, light: bool, _: Path) -> tuple[Path, ExitStack]:
    """Fetched once a process, which then goes on with that; nobody removes it meanwhile."""
    found, held = Copy(url, "staged"), ExitStack()
    held.enter_context(found.held())
    # of several processes the first one checks
    if not found.pull(is_start=True, checks=started()[0] == 0, light=light):
        raise UserError(f"there is nothing at {url}")
    return found.path, held


def mirror_of(path: Path) -> tuple[Copy, str] | None:
    """The copy of an output folder that a path lies in, and its name there."""
    root = cache_folder() / "mirrors"
    if not path.is_relative_to(root):
        return None
    count, *parts = path.relative_to(root).parts
    end = int(count) + 1
    url = as_urls(str(root.joinpath(count, *parts[:end])))
    return Copy(url, "mirrors"), "/".join(parts[end:])


def fetch(*paths: Path) -> None:
    """What the store has of these files and folders of one output folder; nothing for others."""
    found = [one for one in map(mirror_of, paths) if one is not None]
    if found:
        found[0][0].pull(*(name for _, name in found))


def is_there(path: Path) -> bool:
    """Whether a file or folder is here, or in the store of its output folder."""
    found = mirror_of(path)
    return path.exists() or (found is not None and bool(found[0].store.names(found[1])))


def sync(out: Path, *names: str) -> None:
    """Sends what is new in an output folder, and fetches these files and folders of it."""
    found = mirror_of(out)
    if found is not None:
        found[0].push()
        if names:
            found[0].pull(*names)


def discard(folder: Path) -> None:
    """Deletes a folder, also what others have sent of it."""
    shutil.rmtree(folder, ignore_errors=True)
    found = mirror_of(folder)
    if found is not None:
        found[0].store.remove(found[0].store.names(found[1]))


@contextmanager
def exclusive(out: Path, *names: str) -> Iterator[None]:
    """This process alone makes these files of an output folder that several share. InUse."""
    found = mirror_of(out)
    with nullcontext() if found is None else found[0].alone():
        sync(out, *names)
        yield
        sync(out, *names)


@contextmanager
def mirrored(url: str, shared: tuple[str, ...], say: Callable[[str], None]) -> Iterator[None]:
    """What is written into the local copy is sent now and then, and in the end. What was there is
    here first: all of it, or of a folder that several processes share what is `shared`, which is
    then fetched now and then. InUse, as `Copy.alone`."""
    copy = Copy(url, "mirrors")
    is_first = started()[0] == 0
    with ExitStack() as stack:
        stack.enter_context(copy.held())
        if is_first and not shared:
            stack.enter_context(copy.alone(wait=1.5 * STALE_SECONDS))
        copy.pull(*shared, is_start=is_first, is_exact=not shared)
        if not is_first:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=_go_on, args=(copy, shared, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            copy.push()


def _go_on(copy: Copy, shared: tuple[str, ...], ended: threading.Event) -> None:
    """Tries once a round: a store that fails must not keep others from the copy."""
    own = Copy(copy.url, "mirrors", patience=0.0)
    own.leases = copy.leases
    while not ended.wait(SYNC_SECONDS):
        try:
            own.push()
            if shared:
                own.pull(*shared)
        except (OSError, UserError) as error:
            warn_once(f"not sent yet, work goes on: {error}")


def _make_room(needed: int) -> None:
    """Removes copies, the least recently used first, until so many bytes fit into the cache."""
    text = os.environ.get("CAPGAP_CACHE_BYTES", "100e9")
    try:
        limit = float(text)
    except ValueError:
        raise UserError(f"CAPGAP_CACHE_BYTES is {text!r}, no number of bytes") from None
    files = list((cache_folder() / "index").glob("*.json"))
    found = {path: json.loads(path.read_text()) for path in files}
    sizes = {p: sum(e["here"][0] for e in one["files"].values()) for p, one in found.items()}
    total = needed + sum(sizes.values())
    for path in sorted(files, key=lambda one: one.stat().st_mtime):
        if total > limit:
            total -= Copy(found[path]["url"], found[path]["use"]).remove()


def _entry(version: Version, here: list[int], **more: Any) -> dict[str, Any]:
    return {"version": list(version), "here": here, **more}


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_hidden(name: str) -> bool:
    """As unfinished files are; a name that leads out of its folder is one too."""
    return any(part.startswith(".") for part in name.split("/"))


def _is_in(name: str, folders: tuple[str, ...]) -> bool:
    return not folders or any(f"{name}/".startswith(f"{one}/") for one in folders)
