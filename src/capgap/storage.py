"""Object stores and other disks that a URL names, such as s3://bucket/folder, by way of fsspec.

What lies there has a place on the local disk, in CAPGAP_CACHE, where all work is done; texts that
leave the process name the URL in its stead. Light: fsspec is imported when a store is opened.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from capgap.errors import UserError, first_line, is_disk_full
from capgap.machine import install_command

# Seconds that a store may fail before work ends; the first and the longest pause between two tries
PATIENCE = 60.0
PAUSES = (0.1, 10.0)
EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs"}
# Those that refuse to make what is there, also to one of two at the same moment
EXCLUSIVE = (*EXTRAS, "file", "memory")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*[^/])/*")
# fsspec's files in memory do not to one of two threads
_MAKING = threading.Lock()
_Kind = TypeVar("_Kind")
# What is read, and what is written
Use = Literal["staged", "mirrors"]
# Bytes, and whatever the store tells of a file that changes with it
Version = tuple[int, str]


class Unreachable(UserError):
    """A store does not answer, or refuses."""


def is_url(text: object) -> bool:
    return isinstance(text, str) and _URL.fullmatch(text) is not None


def cache_folder() -> Path:
    return Path(os.environ.get("CAPGAP_CACHE") or "~/.cache/capgap").expanduser().resolve()


def place(url: str, use: Use) -> Path:
    """Where a URL's local copy lies. No place is within another, whatever the URLs."""
    scheme, _, path = url.partition("://")
    parts = [part for part in path.split("/") if part]
    if {".", ".."} & {*parts} or len(parts) < 2:
        raise UserError(f"{url}: give the folder's own URL, such as s3://bucket/folder")
    return cache_folder().joinpath(use, str(len(parts)), scheme, *parts)


def as_urls(text: str) -> str:
    """A text that names places of the cache, with the URLs that they stand for."""
    cache = re.escape(str(cache_folder()))
    return re.sub(
        rf"{cache}/(?:staged|mirrors)/\d+/([a-z][a-z0-9+.-]*)/",
        lambda found: f"{found[1]}://" + "/" * (found[1] == "file"),
        text,
    )


def is_copy(*paths: object) -> bool:
    """Whether one of them lies in this machine's cache, for a URL."""
    return any(as_urls(str(path)) != str(path) for path in paths)


class Store:
    """Files below a URL, or below a local folder, by their names within.

    What fails is tried again for `patience` seconds, then Unreachable, at once where access is
    refused. UserError at once for a store that fsspec does not know, or whose package is missing.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        from fsspec.core import url_to_fs

        self.url, self._patience = url, patience
        self.scheme = url.partition("://")[0] if is_url(url) else "file"
        # what others do must be seen
        options = {"use_listings_cache": False}
        options |= {"auto_mkdir": True} if self.scheme == "file" else {}
        try:
            self.fs, self.root = url_to_fs(url.rstrip("/"), **options)
        except ImportError as error:
            extra = EXTRAS.get(self.scheme)
            why = f"`{install_command(extra)}`" if extra else first_line(error)
            raise UserError(f"{url} needs a package that is not installed: {why}") from None
        except ValueError as error:
            raise UserError(f"{url}: {first_line(error)}") from None

    def names(self, prefix: str = "") -> dict[str, Version]:
        """The files in a folder, or the one that is called so, by their names."""
        found = self._tried(lambda: self.fs.find(self._path(prefix), detail=True))
        return {name[len(self.root) :].strip("/"): _version(info) for name, info in found.items()}

    def fetch(self, name: str, path: Path) -> None:
        """Into the file `path`. FileNotFoundError."""
        self._tried(lambda: self.fs.get_file(self._path(name), str(path)), lambda: True)

    def put(self, path: Path, name: str) -> Version:
        """Writes the file `path`. FileNotFoundError where it is gone."""

        def sent() -> Version:
            self.fs.put_file(str(path), self._path(name))
            return _version(self.fs.info(self._path(name)))

        return self._tried(sent, is_missing=lambda: not path.exists())

    def read(self, name: str) -> bytes:
        """FileNotFoundError."""
        return self._tried(lambda: bytes(self.fs.cat_file(self._path(name))), lambda: True)

    def write(self, name: str, data: bytes) -> None:
        path = Path(self._path(name))
        # an object store never shows half a file
        aside = path.with_name(f".{path.name}.tmp") if self.scheme == "file" else path
        self._tried(lambda: self.fs.pipe_file(str(aside), data))
        if aside != path:
            aside.replace(path)

    def create(self, name: str, data: bytes) -> bool:
        """Makes a file where there is none, False where there is; `data` are like nobody else's.
        UserError for a store that does not promise that."""
        if self.scheme not in EXCLUSIVE:
            raise UserError(
                f"{self.url}: {self.scheme} does not keep two processes from making the same "
                f"file, so results cannot lie there: use one of {', '.join(EXCLUSIVE)}"
            )
        path = self._path(name)

        def made() -> None:
            with _MAKING, self.fs.open(path, "xb") as stream:
                stream.write(data)

        try:
            self._tried(made)
        except FileExistsError:
            # ours, where the answer to an earlier try was lost
            return self.read(name) == data
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Whatever of these is there."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._tried(partial(self.fs.rm, paths), lambda: True)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._tried(partial(self.fs.rm, path), lambda: True)

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
            # of connections those libraries raise what they like
            except Exception as error:
                is_ours = type(error).__module__ == "builtins" and not isinstance(error, OSError)
                is_gone = isinstance(error, FileNotFoundError)
                if is_ours or is_disk_full(error) or (is_gone and is_missing()):
                    raise
                is_refused = is_gone or isinstance(error, PermissionError | NotADirectoryError)
                is_refused = is_refused or "Credentials" in type(error).__name__
                if is_refused or time.monotonic() + pause > deadline:
                    raise Unreachable(f"{self.url}: {first_line(error)}") from error
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _version(info: dict[str, Any]) -> Version:
    told = ("ETag", "etag", "generation", "mtime", "created", "LastModified")
    tag = next((info[key] for key in told if key in info), "")
    return info["size"] or 0, str(tag.timestamp() if hasattr(tag, "timestamp") else tag)
