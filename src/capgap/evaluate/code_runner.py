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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capgap.errors import first_line

GUARD = Path(__file__).with_name("code_guard.py")
SANDBOX = "bwrap"
FOLDER = "/program"
# isolated: no paths or settings of the user's
_PYTHON = [sys.executable, "-I", "-c"]


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
    """Runs a program in an empty folder in memory, without a network and without other processes:
    docs/evaluation.md#programs-of-a-model says what that holds back.

    It sees Python's own files and the system's libraries, and can change nothing of them. Its
    output is thrown away. It passes when it comes to its end without an error; one that leaves
    early does not.
    """
    limits = limits or CodeLimits()
    key = secrets.token_hex()
    order = json.dumps({"program": program, "key": key} | asdict(limits)).encode()
    with _sandbox(limits, GUARD.read_text(), subprocess.DEVNULL) as process:
        try:
            output, _ = process.communicate(order, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "out of time")
    try:
        answer: Any = json.loads(output)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or answer.get("key") != key:
        # the sandbox reports signals as a shell does
        number = process.returncode - 128
        early = "left early" if number <= 0 else "killed"
        return Outcome(False, "out of time" if number == signal.SIGXCPU else early)
    error = answer.get("error")
    if error is None:
        return Outcome(True, None)
    # the name of a type is the program's to choose, and the record keeps it: only Python's own
    name, colon, text = str(error).partition(":")
    kind = getattr(builtins, name, None)
    is_known = isinstance(kind, type) and issubclass(kind, BaseException)
    return Outcome(False, f"{name if is_known else 'another error'}{colon}{text}")


def sandbox_problem() -> str | None:
    """Why programs cannot be run on this machine; None where they can."""
    if shutil.which(SANDBOX) is None:
        return (
            f"programs are run by bubblewrap alone, and {SANDBOX} is not here: install the "
            "system package bubblewrap"
        )
    with _sandbox(CodeLimits(), "", subprocess.PIPE) as process:
        _, output = process.communicate()
    if process.returncode == 0:
        return None
    return f"programs cannot be run: {first_line(OSError(output.decode(errors='replace')))}"


@contextmanager
def _sandbox(limits: CodeLimits, code: str, errors: int) -> "Iterator[subprocess.Popen[bytes]]":
    """Python on `code`, with processes, network, users and files of its own. Whatever was started
    in it ends with the block, and with us; `errors`: where its standard error goes."""
    inside = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    inside += ["--uid", "65534", "--gid", "65534", "--clearenv"]
    for name, value in {"HOME": FOLDER, "TMPDIR": FOLDER, "OPENBLAS_NUM_THREADS": "1"}.items():
        inside += ["--setenv", name, value]
    for path in _readable():
        inside += ["--ro-bind-try", path, path]
    inside += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/dev/shm"]
    inside += ["--size", str(limits.folder_bytes), "--tmpfs", FOLDER, "--remount-ro", "/"]
    with subprocess.Popen(
        [SANDBOX, *inside, "--chdir", FOLDER, "--", *_PYTHON, code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        env={"PATH": os.environ.get("PATH", os.defpath)},
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _readable() -> list[str]:
    """What Python and its extension modules read."""
    prefixes = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})
    parts = [
        os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64", "pyvenv.cfg")
    ]
    # in the order of links: the interpreter by the name it was started by, and where it lies
    programs = [sys.executable, os.path.realpath(sys.executable)]
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    return [*system, *parts, *programs]
