"""Programs that a model wrote, each in a sandbox of its own: bubblewrap's, which Flatpak uses."""

import builtins
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capgap.errors import first_line

GUARD = Path(__file__).with_name("code_guard.py")
SANDBOX = "bwrap"
FOLDER = "/program"
_ERRORS = {
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


@dataclass(frozen=True)
class CodeLimits:
    """What a program may take; `folder_bytes`: of all its files together."""

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    folder_bytes: int = 1 << 24


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program ran to its end. Else `reason`: the error that it raised, with "another
    error" for a type that Python does not come with; "out of time", "killed" or "left early"."""

    passed: bool
    reason: str | None


def run_program(program: str, limits: CodeLimits | None = None) -> Outcome:
    """Runs a program in an empty folder in memory, without a network and without other processes.

    It sees Python's own files and the system's libraries, and can change nothing of them. Its
    output is thrown away. It passes when it comes to its end without an error; one that leaves
    early does not.
    """
    limits = limits or CodeLimits()
    key = secrets.token_hex()
    order = json.dumps({"program": program, "key": key} | asdict(limits))
    process = _start(
        limits,
        # isolated: no paths or settings of the user's
        [sys.executable, "-I", "-c", GUARD.read_text()],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        told, _ = process.communicate(order.encode(), timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        return Outcome(False, "out of time")
    finally:
        _end(process)
    return _outcome(told, key, process.returncode)


def sandbox_problem() -> str | None:
    """Why programs cannot be run on this machine; None where they can."""
    if shutil.which(SANDBOX) is None:
        return (
            f"programs are run by bubblewrap alone, and {SANDBOX} is not here: install the "
            "system package bubblewrap"
        )
    process = _start(CodeLimits(), [sys.executable, "-I", "-c", ""], stderr=subprocess.PIPE)
    _, told = process.communicate()
    _end(process)
    if process.returncode == 0:
        return None
    return f"programs cannot be run: {first_line(OSError(told.decode(errors='replace')))}"


def _start(limits: CodeLimits, command: list[str], **streams: Any) -> "subprocess.Popen[bytes]":
    """A command in a sandbox: processes, network, users and files of its own; all of it ends with
    us."""
    inside = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    inside += ["--uid", "65534", "--gid", "65534", "--clearenv"]
    for name, value in {"HOME": FOLDER, "TMPDIR": FOLDER, "OPENBLAS_NUM_THREADS": "1"}.items():
        inside += ["--setenv", name, value]
    for path in _readable():
        inside += ["--ro-bind-try", path, path]
    inside += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/dev/shm"]
    inside += ["--size", str(limits.folder_bytes), "--tmpfs", FOLDER, "--remount-ro", "/"]
    return subprocess.Popen(
        [SANDBOX, *inside, "--chdir", FOLDER, "--", *command],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        **streams,
    )


def _readable() -> list[str]:
    """Places that Python and its extension modules read."""
    prefixes = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})
    parts = [
        os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64", "pyvenv.cfg")
    ]
    # in the order of links: the interpreter by the name it was started by, and where it lies
    programs = [sys.executable, os.path.realpath(sys.executable)]
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    return [*system, *parts, *programs]


def _outcome(told: bytes, key: str, code: int) -> Outcome:
    try:
        answer: dict[str, Any] = json.loads(told)
    except ValueError:
        answer = {}
    if not isinstance(answer, dict) or answer.get("key") != key:
        # the sandbox tells signals as a shell does
        number = code - 128 if code > 128 else 0
        reason = "out of time" if number == signal.SIGXCPU else "killed" if number else "left early"
        return Outcome(False, reason)
    error = answer.get("error")
    return Outcome(error is None, None if error is None else _known(error))


def _known(error: object) -> str:
    """An error, its type named only where it is Python's own: the name is the program's to choose,
    and the record keeps it."""
    name, colon, text = str(error).partition(":")
    return f"{name if name in _ERRORS else 'another error'}{colon}{text}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the sandbox, and with it whatever was started in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
