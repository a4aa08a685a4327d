"""Folders and files that the tool writes and reads again.

They belong to one process at a time, are never half written, say what they were made for, and are
checked by hash when they are read.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from capgap.errors import UserError, is_disk_full, patiently, warn_once
from capgap.scrub import scrub
from capgap.storage import as_urls

LOCK = ".lock"
CHECKSUM = "checksum"


class InUse(UserError):
    """Another process is at work there."""


class Damaged(UserError):
    """A file does not hold what was written into it, or another version wrote it."""


@contextmanager
def locked(out: Path, *, shared: bool = False) -> Iterator[int]:
    """The folder `out`, made if need be, is this process's while inside, or `shared` with others
    that share it; gives the lock, an open file.

    UserError: not writable. InUse: another process is at work there.
    """
    with _opened(out / LOCK) as lock:
        _lock(lock.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX, out)
        yield lock.fileno()


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """What is written to the file `path` is written by this process alone while inside.

    UserError: its folder is not writable. InUse: another process is at work on it.
    """
    lock = path.with_name(f".{path.name}{LOCK}")
    with _opened(lock) as opened:
        _lock(opened.fileno(), fcntl.LOCK_EX, path)
        _check_there(opened.fileno(), lock, path)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Waits until no other process makes something in the folder of `path`; leaves no file."""
    folder = os.open(_made(path.parent), os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            # some network file systems have no locks on folders
            warn_once(f"no lock on {path.parent} ({error.strerror}): prepare in one process")
        yield
    finally:
        os.close(folder)


@contextmanager
def file_written(path: Path) -> Iterator[Path]:
    """A file name to write to, whose file takes the place of `path` when all is well."""
    aside = _made(path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield aside
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` when all is well and vanishes
    otherwise.

    UserError: not writable, no space. InUse: another process fills one for the same place.
    """
    partial = _made(path.parent) / f".{path.name}.partial"
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except (FileNotFoundError, FileExistsError):
        raise InUse(f"another process has just written {path}") from None
    try:
        _lock(lock, fcntl.LOCK_EX, path)
        _check_there(lock, partial, path)
        # left by a process that was killed
        shutil.rmtree(replaced, ignore_errors=True)
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield partial
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_disk_full(error):
                raise UserError(
                    f"no disk space left for {path}: free some, or name a folder on another disk"
                ) from error
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(lock)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8, never half of it; storage that is away is waited for."""

    def write() -> None:
        with file_written(Path(path)) as aside:
            aside.write_text(text, encoding="utf-8", newline="")

    patiently(write)


def write_json(path: Path | str, obj: Any) -> None:
    """Writes `obj` as JSON, never half of it; a dict with its checksum, which `read_json` compares.
    Arrays and numpy numbers become plain ones, secrets become `***`.

    Raises ValueError for NaN and infinities, which JSON does not have: write None instead.
    """
    value = plain(obj)
    if isinstance(value, dict):
        value[CHECKSUM] = digest(value)
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def plain(value: Any) -> Any:
    """The value as JSON holds it, without secrets, and by URL what lies at one."""
    text = json.dumps(scrub(value), allow_nan=False, default=_plain, ensure_ascii=False)
    return json.loads(as_urls(text))


def read_json(path: Path | str, *, schema: int | None = None, **keys: type) -> dict[str, Any]:
    """The object in a JSON file, without its checksum, where there is one. `keys` are those that it
    must have, with their types.

    UserError: no such file. Damaged: no such object, another checksum or schema.
    """
    path = Path(path)
    try:
        found = json.loads(patiently(lambda: path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({error}): bring it back, or delete it") from None
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged (no JSON object): bring it back, or delete it")
    if schema is not None and found.get("schema") != schema:
        raise Damaged(
            f"{path} was written by another version of capgap (schema {found.get('schema')!r}, "
            f"this one reads {schema}): make it again in another folder"
        )
    if found.pop(CHECKSUM, None) not in (None, digest(found)):
        raise Damaged(
            f"{path} is not as it was written (another checksum): bring it back, or take its "
            f"{CHECKSUM!r} out if the change is yours"
        )
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind):
            raise Damaged(f"{path} is damaged (no {key!r}): bring it back, or delete it")
    return found


def digest(value: Any) -> str:
    """sha256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file, read once a process unless its size or its time changes. UserError: it
    cannot be read."""
    try:
        status = path.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first key of `here` and then of `there` with another value, in words; None if all are
    alike."""
    before, now = flat(there), flat(here)
    for key in now | before:
        if before.get(key) != now.get(key):
            return f"{key} is {_told(now.get(key))}, was {_told(before.get(key))}"
    return None


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by whole keys such as `students.tokens`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{above}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def find_run(record: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the record of a stopped or finished run says, None where nothing has begun; `record`
    is a file in the run's output folder.

    UserError where the folder holds something else, or was asked for something else.
    """
    out = record.parent
    if record.exists():
        found = read_json(record, schema=1, asked=dict, finished=bool)
        # as the record holds it, or a run whose source has a password could not be continued
        other = difference(found["asked"], plain(asked))
        if other is not None:
            raise UserError(f"{out} holds another run ({other}): choose another folder")
        return found
    check_free(record)
    return None


def check_free(record: Path) -> None:
    """UserError where the folder of a new run's record holds more than text prepared for it."""
    check_empty(record.parent, ours=(LOCK, f".{record.name}.", "corpus", ".corpus"))


@contextmanager
def begun(record: Path, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The record that `find_run` finds, or else a new one, written; its folder is this process's
    while inside."""
    find_run(record, asked)  # what it refuses gets no lock either
    with locked(record.parent):
        found = find_run(record, asked)
        if found is None:
            found = {"schema": 1, "finished": False, "asked": plain(asked)}
            write_json(record, found)
        yield found


def check_empty(out: Path, ours: Iterable[str] = ()) -> None:
    """UserError for a file or a folder that holds something; names that begin like one of `ours`,
    as a kill may leave them, count as nothing."""
    if not out.exists():
        return
    if not out.is_dir() or not all(one.name.startswith(tuple(ours)) for one in out.iterdir()):
        raise UserError(f"{out} holds something else: choose another folder, or empty it")


def _opened(lock: Path) -> IO[str]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a")
    except OSError as error:
        raise UserError(
            f"cannot write into {lock.parent}: {error.strerror}; choose another folder"
        ) from None


def _lock(descriptor: int, kind: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(f"another process is at work in {path}") from None


def _check_there(lock: int, place: Path, path: Path) -> None:
    """InUse where what was locked is gone from its place: who held it has finished."""
    try:
        is_there = os.path.samestat(os.fstat(lock), place.stat())
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise InUse(f"another process has just written {path}")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    return folder


def _told(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "not given" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """What numpy and pathlib objects are in JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
