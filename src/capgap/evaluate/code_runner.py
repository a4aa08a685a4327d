"""Programs that a model wrote, each in a process that can do little: see `code_guard`."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GUARD = Path(__file__).with_name("code_guard.py")


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
    """`passed`: the program ran to its end. Else `reason`: the error that it raised, "out of time",
    "killed" or "left early". `layers`: what held it back, None where it did not live to tell."""

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
    with tempfile.TemporaryDirectory(prefix="capgap-code-") as folder:
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


def code_layers() -> dict[str, bool]:
    """What holds programs back on this machine, asked of a program that does nothing."""
    found = run_program("pass").layers
    assert found is not None
    return found


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
    return Outcome(answer["error"] is None, answer["error"], answer["layers"])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the program and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
