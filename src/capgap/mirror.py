"""Local copies of what URLs name: what is read is fetched and checked by hash, what is written is
also sent while work goes on.

A copy has an index: of every file the store's version, and the size and time that the local one had
when both were alike. Whichever differs from it has changed.
"""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from capgap.artifact import InUse, digest, file_hash, file_written, read_json, write_json
from capgap.errors import UserError, warn_once
from capgap.leases import Leases
from capgap.machine import started
from capgap.storage import Store, Use, Version, as_urls, cache_folder, is_url, place

SYNC_SECONDS = 5.0
LOOK_SECONDS = 1.0
# Whoever writes into a folder alone is gone when it is not heard of for so long
STALE_SECONDS = 60.0
CONNECTIONS = 8
CACHE_BYTES = "CAPGAP_CACHE_BYTES"


class Copy:
    """The local copy of what lies at a URL, a folder or a file."""

    leases: Leases | None = None

    def __init__(self, url: str, use: Use, *, patience: float | None = None) -> None:
        self.path, self.use, self._patience = place(url, use), use, patience
        self.url = as_urls(str(self.path))
        self._index_file = cache_folder() / "index" / f"{digest([use, self.url])[:32]}.json"
        self._index_file.parent.mkdir(parents=True, exist_ok=True)

    @cached_property
    def store(self) -> Store:
        return Store(self.url, self._patience)

    @contextmanager
    def held(self, kind: int = fcntl.LOCK_SH) -> Iterator[None]:
        """Nobody removes the copy while inside."""
        with self._index_file.with_suffix(".use").open("a") as lock:
            fcntl.flock(lock, kind)
            yield

    def pull(self, *names: str, is_start: bool = False, light: bool = False) -> dict[str, Version]:
        """Fetches what has changed in the store, of these files and folders or of all, `light`
        without weights; returns what is there. What is gone here was deleted here, unless a session
        starts: then it is fetched again, what is gone there goes here too, and of a whole copy
        whatever the store has not once it has changed; what is read is checked by hash."""
        with self._index() as index:
            there: dict[str, Version] = {}
            for name in names or ("",):
                there |= self.store.names(name)
            there = {name: version for name, version in there.items() if not _is_hidden(name)}
            known = {n: tuple(index[n]["version"]) for n in index if _is_in(n, names)}
            # of several processes the first one checks
            checks = is_start and self.use == "staged" and started()[0] == 0

            def is_stale(name: str) -> bool:
                path = self.path / name
                if light and path.suffix == ".safetensors":
                    return False
                if known.get(name) != there[name] or not path.is_file():
                    return is_start or known.get(name) != there[name]
                return checks and file_hash(path) != index[name]["sha256"]

            def fetch_into_index(name: str) -> None:
                path = self.path / name
                # gone meanwhile
                with suppress(FileNotFoundError), file_written(path) as aside:
                    self.store.fetch(name, aside)
                    # of one version on all machines: it is a part of what identifies text
                    os.utime(aside, ns=(0, int(digest(there[name])[:12], 16)))
                    entry = {"version": there[name], "sha256": file_hash(aside)}
                    index[name] = entry | {"here": _state(aside)}

            stale = list(filter(is_stale, there))
            if is_start and stale:
                _make_room(sum(there[name][0] for name in stale))
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(fetch_into_index, stale))
            if is_start:
                gone = known.keys() - there.keys()
                here = set() if names or known == there else self._files().keys() - there.keys()
                for name in gone | here:
                    (self.path / name).unlink(missing_ok=True)
                    index.pop(name, None)
        return there

    def push(self) -> None:
        """Sends what has changed here in the order in which it was written, so that what describes
        comes behind what it describes; then deletes what is gone here."""
        if self.leases is not None and self.leases.lost():
            raise InUse(f"another process has taken over {self.url}")
        with self._index() as index:
            here = self._files()
            changed = [name for name, at in here.items() if index.get(name, {}).get("here") != at]
            gone = index.keys() - here.keys()
            try:
                for name in sorted(changed, key=lambda one: here[one][1]):
                    version = self.store.put(self.path / name, name)
                    index[name] = {"version": version, "here": here[name]}
            except FileNotFoundError:
                return  # replaced meanwhile: the next round sends what took its place
            self.store.remove(sorted(gone))
            for name in gone:
                del index[name]

    @contextmanager
    def alone(self, *, wait: float = 0.0) -> Iterator[None]:
        """Nobody else writes there while inside, wherever it runs. InUse: somebody does, and still
        after `wait` seconds."""
        folder, _, name = self.store.url.rpartition("/")
        leases = Leases(f"{folder}/.{name}.lease", stale=STALE_SECONDS)
        # the one that its user knows
        leases.store.url = self.url
        with leases:
            until = time.monotonic() + wait
            while not leases.take("writer"):
                if time.monotonic() >= until:
                    raise InUse(f"another process is at work in {self.url}")
                warn_once(f"another process is at work in {self.url}: waits to hear of it")
                time.sleep(LOOK_SECONDS)
            self.leases = leases
            yield

    def remove(self) -> int:
        """Gives its bytes back: 0 where it is in use, or holds what is not sent yet."""
        alone = self.held(fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(BlockingIOError), alone, self._index() as index:
            here = self._files()
            if self.use == "staged" or here == {n: one["here"] for n, one in index.items()}:
                index.clear()
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.unlink(missing_ok=True)
                return sum(size for size, _ in here.values())
        return 0

    @contextmanager
    def _index(self) -> Iterator[dict[str, Any]]:
        """The index, this thread's alone while inside, and kept."""
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
                    found = {"url": self.url, "use": self.use, "files": index}
                    write_json(self._index_file, found)

    def _files(self) -> dict[str, list[int]]:
        """What is there by name, but for what is not finished: artifact.py hides it."""
        found = {"": _state(self.path)} if self.path.is_file() else {}
        for path in self.path.rglob("*"):
            name = str(path.relative_to(self.path))
            with suppress(FileNotFoundError):
                if path.is_file() and not _is_hidden(name):
                    found[name] = _state(path)
        return found


def local(name: str | Path, *, light: bool = False) -> str:
    """What a user names to be read: of a URL the local copy, `light` without weights; ~ at the
    beginning is the home; anything else as it is. UserError: there is nothing."""
    if is_url(name):
        return str(_staged(str(name), light, cache_folder())[0])
    return str(Path(name).expanduser()) if str(name).startswith("~") else str(name)


@cache
def _staged(url: str, light: bool, _: Path) -> tuple[Path, ExitStack]:
    """Fetched once a process, which then goes on with that; nobody removes it meanwhile."""
    found, held = Copy(url, "staged"), ExitStack()
    held.enter_context(found.held())
    if not found.pull(is_start=True, light=light):
        raise UserError(f"there is nothing at {url}")
    return found.path, held


def mirror_of(path: Path) -> tuple[Copy, str] | None:
    """The copy of the output folder that a path lies in, and its name there; None on a disk."""
    root = cache_folder() / "mirrors"
    if not path.is_relative_to(root):
        return None
    count, *parts = path.relative_to(root).parts
    end = int(count) + 1
    return Copy(as_urls(str(root.joinpath(count, *parts[:end]))), "mirrors"), "/".join(parts[end:])


def fetch(*paths: Path) -> None:
    """What the store has of these files and folders of one output folder; on a disk they are."""
    found = list(filter(None, map(mirror_of, paths)))
    if found:
        found[0][0].pull(*(name for _, name in found))


def is_there(path: Path) -> bool:
    """Whether a file or folder is here, or in the store of its output folder."""
    found = mirror_of(path)
    return path.exists() or (found is not None and bool(found[0].store.names(found[1])))


def discard(folder: Path) -> None:
    """Deletes a folder, also what others have sent of it."""
    shutil.rmtree(folder, ignore_errors=True)
    if found := mirror_of(folder):
        found[0].store.remove(found[0].store.names(found[1]))


def sync(out: Path, *names: str) -> None:
    """Sends what is new in an output folder, and fetches these files and folders of it."""
    if found := mirror_of(out):
        found[0].push()
        if names:
            found[0].pull(*names)


@contextmanager
def exclusive(out: Path, *names: str) -> Iterator[None]:
    """This process alone makes these files of an output folder that several share. InUse."""
    with ExitStack() as stack:
        if found := mirror_of(out):
            stack.enter_context(found[0].alone())
        sync(out, *names)
        yield
        sync(out)


@contextmanager
def mirrored(urls: Sequence[str], shared: Sequence[str] = ()) -> Iterator[None]:
    """What is written into local copies is sent now and then, and in the end. What was there is
    here first: all of it, or of folders that several processes share what is `shared`, which is
    then fetched now and then. InUse, as `Copy.alone`."""
    world = started()[1]
    if urls and int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world:
        raise UserError(f"{urls[0]}: processes on several machines need a common disk to write to")
    with ExitStack() as stack:
        for url in urls:
            copy, is_first = Copy(url, "mirrors"), started()[0] == 0
            stack.enter_context(copy.held())
            if is_first and not shared:
                stack.enter_context(copy.alone(wait=1.5 * STALE_SECONDS))
            copy.pull(*shared, is_start=is_first)
            if is_first:
                stack.enter_context(_sent(copy, shared))
        yield


@contextmanager
def _sent(copy: Copy, shared: Sequence[str]) -> Iterator[None]:
    # tries once a round, or a store that fails would keep others from the copy
    own = Copy(copy.url, "mirrors", patience=0.0)
    own.leases = copy.leases
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(SYNC_SECONDS):
            try:
                own.push()
                if shared:
                    own.pull(*shared)
            except (OSError, UserError) as error:
                warn_once(f"not sent yet, work goes on: {error}")

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        copy.push()


def _make_room(needed: int) -> None:
    """Removes copies, the least recently used first, until so many bytes fit into the cache."""
    try:
        limit = float(os.environ.get(CACHE_BYTES, "100e9"))
    except ValueError:
        raise UserError(f"{CACHE_BYTES} is {os.environ[CACHE_BYTES]!r}, no number") from None
    files = (cache_folder() / "index").glob("*.json")
    found = [read_json(path) for path in sorted(files, key=lambda path: path.stat().st_mtime)]
    sizes = [sum(one["here"][0] for one in each["files"].values()) for each in found]
    over = needed + sum(sizes) - limit
    for each in found:
        if over > 0:
            over -= Copy(each["url"], each["use"]).remove()


def _state(path: Path) -> list[int]:
    """Bytes, and when it was changed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_hidden(name: str) -> bool:
    """As unfinished files are, and a name that leads out of its folder."""
    return any(part.startswith(".") for part in name.split("/"))


def _is_in(name: str, folders: Sequence[str]) -> bool:
    return not folders or any(f"{name}/".startswith(f"{one}/") for one in folders)
