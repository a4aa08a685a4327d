"""Programs that a model wrote, each in a process that can do little: see `code_guard`."""

import builtins
import contextlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GUARD = Path(__file__).with_name("code_guard.py")
_ERRORS = {
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


@dataclass(frozen=True)
class CodeLimits:
    """What a program may take. `kernel` False leaves the audit hook alone, as on a kernel that has
    neither Landlock nor seccomp; `hook` False leaves it out."""

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    kernel: bool = True
    hook: bool = True


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program ran to its end. Else `reason`: the error that it raised, with "another
    error" for a type that Python does not come with; "out of time", "killed" or "left early".
    `layers`: what held it back, None where it did not live to tell."""

    passed: bool
    reason: str | None
    layers: dict[str, bool] | None


def run_program(program: str, limits: CodeLimits | None = None) -> Outcome:
    """Runs a program in a folder of its own that is removed afterwards, without a network.

    Its output is thrown away. It passes when it comes to its end without an error; one that leaves
    early does not.
    """
    limits = limits or CodeLimits()
    key = secrets.token_hex()
    order = json.dumps({"program": program, "key": key} | asdict(limits))
    with _folder() as folder:
        process = subprocess.Popen(
            # isolated: no paths or settings of the user's
            [sys.executable, "-I", str(GUARD)],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(order.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "out of time", None)
        finally:
            _end(process)
    return _outcome(told, key, process.returncode)


def code_layers() -> dict[str, bool] | None:
    """What holds programs back on this machine, asked of a program that does nothing; None where
    that one does not run."""
    return run_program("pass").layers


def _outcome(told: bytes, key: str, code: int) -> Outcome:
    try:
        answer: dict[str, Any] = json.loads(told)
    except ValueError:
        answer = {}
    if not isinstance(answer, dict) or answer.get("key") != key:
        reason = (
            "out of time" if code == -signal.SIGXCPU else "killed" if code < 0 else "left early"
        )
        return Outcome(False, reason, None)
    error = answer.get("error")
    return Outcome(error is None, None if error is None else _known(error), answer.get("layers"))


def _known(error: object) -> str:
    """An error, its type named only where it is Python's own: the name is the program's to choose,
    and the record keeps it."""
    name, colon, text = str(error).partition(":")
    return f"{name if name in _ERRORS else 'another error'}{colon}{text}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the program and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder that is removed afterwards, whatever a program has made of it."""
    folder = tempfile.mkdtemp(prefix="capgap-code-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: str) -> None:
    """Folders within folders are moved up to the first before they are emptied: the depth then
    costs no recursion, no long paths and no open files."""
    if os.path.islink(folder):
        os.unlink(folder)
        return
    os.chmod(folder, 0o700)
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # names that the program cannot have taken
        names = (
            f"{key}-{number}" for key in (secrets.token_hex(),) for number in itertools.count()
        )
        waiting = _empty(top, top, names)
        while waiting:
            name = waiting.pop()
            with contextlib.suppress(OSError):
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    waiting += _empty(inner, top, names)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(folder)


def _empty(folder: int, top: int, names: Iterator[str]) -> list[str]:
    """Removes the files of an open folder and moves its folders to `top`, under the names given
    back. What cannot be removed stays."""
    moved = []
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                # a folder that may not be written cannot be moved
                os.chmod(entry.name, 0o700, dir_fd=folder)
                name = next(names)
                os.rename(entry.name, name, src_dir_fd=folder, dst_dir_fd=top)
                moved.append(name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return moved
