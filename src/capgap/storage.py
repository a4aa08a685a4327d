"""Object stores and other disks that a URL names, such as s3://bucket/folder, by way of fsspec.

What lies there has a place on the local disk, in CAPGAP_CACHE, where all work is done; texts that
leave the process name the URL in its stead. Light: fsspec is imported when a store is opened.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from capgap.errors import UserError, first_line, is_disk_full
from capgap.machine import install_command

# How long a store may fail before work ends, and between two tries
PATIENCE = 60.0
PAUSES = (0.1, 10.0)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# Those that refuse to make what is there, also for two at the same moment
EXCLUSIVE = (*EXTRAS, "file", "memory")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*[^/])/*")
_MEMORY = threading.Lock()
_Kind = TypeVar("_Kind")
# What is read, and what is written
Use = Literal["staged", "mirrors"]


class Unreachable(UserError):
    """A store does not answer, or refuses."""


class Version(NamedTuple):
    """Of a file: bytes, and whatever the store tells that changes with what it holds."""

    size: int
    tag: str


def is_url(text: object) -> bool:
    return isinstance(text, str) and _URL.fullmatch(text) is not None


def cache_folder() -> Path:
    """Where local copies lie: CAPGAP_CACHE, or else ~/.cache/capgap."""
    return Path(os.environ.get("CAPGAP_CACHE") or "~/.cache/capgap").expanduser().resolve()


def place(url: str, use: Use) -> Path:
    """Where a URL's local copy lies. No place is within another, whatever the URLs."""
    match = _URL.fullmatch(url)
    assert match is not None, url
    parts = [part for part in match[2].split("/") if part]
    if {".", ".."} & {*parts} or len(parts) < 2:
        raise UserError(f"{url}: give the folder's own URL, such as s3://bucket/folder")
    return cache_folder().joinpath(use, str(len(parts)), match[1], *parts)


def as_urls(text: str) -> str:
    """A text that names places of the cache, with the URLs that they stand for."""
    cache = re.escape(str(cache_folder()))
    found = re.sub(rf"{cache}/(?:staged|mirrors)/\d+/([a-z][a-z0-9+.-]*)/", r"\1://", text)
    return found.replace("file://", "file:///") if found != text else text


class Store:
    """What lies below a URL, or below a local folder: files by their names within.

    What fails is tried again for `patience` seconds, then Unreachable; at once where access is
    refused. UserError at once: a store that fsspec does not know, or whose package is not there.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url, self._patience = url, patience
        match = _URL.fullmatch(url)
        self.scheme = match[1] if match else "file"
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        # what others do must be seen
        options: dict[str, Any] = {"use_listings_cache": False}
        if self.scheme == "file":
            options["auto_mkdir"] = True
        try:
            self.fs, self.root = url_to_fs(url.rstrip("/"), **options)
        except ImportError:
            extra = EXTRAS.get(self.scheme)
            how = install_command(extra) if extra else f"fsspec's package for {self.scheme}"
            raise UserError(f"{url}: {self.scheme} needs its package installed: {how}") from None
        except ValueError as error:
            raise UserError(f"{url}: {first_line(error)}") from None

    def names(self, prefix: str = "") -> dict[str, Version]:
        """The files below, or the one that is called so, by their names."""
        found = self._tried(lambda: self.fs.find(self._path(prefix), detail=True))
        files = ((name, info) for name, info in found.items() if info["type"] == "file")
        return {name[len(self.root) :].strip("/"): _version(info) for name, info in files}

    def fetch(self, name: str, path: Path) -> None:
        """The file as `path`, whole or not at all. FileNotFoundError."""
        aside = path.with_name(f".{path.name}.{os.getpid()}.fetched")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._tried(lambda: self.fs.get_file(self._path(name), str(aside)), lambda: True)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> Version:
        """Writes the file `path`. FileNotFoundError where it is gone."""

        def sent() -> Version:
            self._whole(name, partial(self.fs.put_file, str(path)))
            return _version(self.fs.info(self._path(name)))

        return self._tried(sent, is_missing=lambda: not path.exists())

    def read(self, name: str) -> bytes:
        """FileNotFoundError."""
        return self._tried(lambda: bytes(self.fs.cat_file(self._path(name))), lambda: True)

    def write(self, name: str, data: bytes) -> None:
        self._tried(lambda: self._whole(name, lambda path: self.fs.pipe_file(path, data)))

    def create(self, name: str, data: bytes) -> bool:
        """Makes a file where there is none, False where there is; `data` are like nobody else's.

        UserError for a store that does not promise it to one of two at the same moment.
        """
        if self.scheme not in EXCLUSIVE:
            raise UserError(
                f"{self.url}: {self.scheme} does not keep two processes from making the same "
                f"file, so results cannot lie there: use one of {', '.join(EXCLUSIVE)}"
            )
        path = self._path(name)

        def made() -> None:
            if self.scheme == "file":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as stream:
                    stream.write(data)
                return
            with _MEMORY if self.scheme == "memory" else nullcontext():
                self.fs.pipe_file(path, data, mode="create")

        try:
            self._tried(made)
        except FileExistsError:
            # ours, where the answer to an earlier try was lost
            return self.read(name) == data
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Whatever of these is there."""
        for path in map(self._path, names):
            with suppress(FileNotFoundError):
                self._tried(partial(self.fs.rm_file, path), lambda: True)

    def _whole(self, name: str, write: Callable[[str], Any]) -> None:
        """An object store never shows half a file; a disk does not where it is renamed."""
        path = self._path(name)
        if self.scheme != "file":
            write(path)
            return
        aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
        write(str(aside))
        aside.replace(path)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def _tried(
        self, work: Callable[[], _Kind], is_missing: Callable[[], bool] = lambda: False
    ) -> _Kind:
        """is_missing: whether a FileNotFoundError tells of the file, and not of a bucket."""
        deadline = time.monotonic() + (PATIENCE if self._patience is None else self._patience)
        pause, longest = PAUSES
        while True:
            try:
                return work()
            except FileExistsError:
                raise
            except FileNotFoundError as error:
                if is_missing():
                    raise
                raise Unreachable(f"{self.url}: {first_line(error)}") from None
            except Exception as error:
                # of connections those libraries raise what they like
                is_ours = type(error).__module__ == "builtins" and not isinstance(error, OSError)
                if is_ours or is_disk_full(error):
                    raise
                is_refused = isinstance(error, PermissionError | NotADirectoryError)
                is_refused = is_refused or "Credentials" in type(error).__name__
                if is_refused or time.monotonic() + pause > deadline:
                    raise Unreachable(f"{self.url}: {first_line(error)}") from error
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _version(info: dict[str, Any]) -> Version:
    told = ("ETag", "etag", "generation", "mtime", "created", "LastModified")
    tag = next((info[key] for key in told if key in info), "")
    return Version(info["size"] or 0, str(tag.timestamp() if hasattr(tag, "timestamp") else tag))
