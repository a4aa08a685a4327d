"""Programs of a model's: what they may do, and what holds them back."""

import ast
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from capgap.evaluate import code_guard, code_runner
from capgap.evaluate.code_runner import GUARD, CodeLimits, run_program, sandbox_problem

PROBLEM = sandbox_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
# so short that a program that hangs costs a test little
SHORT = CodeLimits(seconds=6.0, cpu_seconds=1)


def test_honest_programs_pass():
    honest = (
        "import math, re, collections, hashlib\n"
        "open('notes.txt', 'w').write('mine')\n"
        "import os\nos.mkdir('folder')\nos.rename('notes.txt', 'folder/notes.txt')\n"
        "assert open('folder/notes.txt').read() == 'mine'\n"
        "assert math.sqrt(4) == 2"
    )
    outcome = run_program(honest, SHORT)
    assert (outcome.passed, outcome.reason) == (True, None)


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempt = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        subprocess.run([sys.executable, "-c", attempt], check=True)
        assert not run_program(attempt, SHORT).passed


def test_other_processes_are_neither_seen_nor_met():
    me = os.getpid()
    for attempt in (
        f"import os\nos.kill({me}, 0)",
        f"open('/proc/{me}/status')",
        "import os\nassert [one for one in os.listdir('/proc') if one.isdigit()] > ['9']",
    ):
        assert not run_program(attempt, SHORT).passed, attempt


def test_nothing_that_a_program_starts_outlives_it(tmp_path):
    """A helper that it leaves behind is in the same sandbox, and ends with it."""
    helper = (
        "import os, time\nif os.fork() == 0:\n    time.sleep(300)\n    os._exit(0)\nos._exit(0)"
    )
    run_program(helper, SHORT)
    names = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            names.append(place.read_bytes())
        except OSError:  # it has ended since
            continue
    assert not [name for name in names if name.startswith(b"bwrap\0--unshare-all")]


def test_nothing_outside_is_written_or_removed(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for attempt in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('more')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.chmod({str(kept)!r}, 0)",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import sqlite3\nsqlite3.connect({str(kept)!r}).execute('create table a (b)')",
        "import multiprocessing.shared_memory as m\nm.SharedMemory(create=True, size=1 << 21)",
        "import os\nos.mkdir('/new')",
        f"import os\nos.chmod({os.__file__!r}, 0o777)",
        f"open({os.__file__!r}, 'a')",
    ):
        assert not run_program(attempt, SHORT).passed, attempt
        assert [path.name for path in tmp_path.iterdir()] == ["kept"], attempt
        assert kept.read_text() == "kept"


def test_nothing_outside_is_read(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    for attempt in (
        f"open({str(tmp_path / 'secret')!r})",
        f"import os\nos.open({str(tmp_path / 'secret')!r}, os.O_RDONLY)",
        f"import os\nos.stat({str(tmp_path / 'secret')!r})",
        f"import os\nos.listdir({str(tmp_path)!r})",
        f"import os\nos.symlink({str(tmp_path)!r}, 'way')\nopen('way/secret')",
        "open('/etc/passwd')",
        "import os\nos.listdir('/home')",
        "import os\nassert 'HF_TOKEN' in open('/proc/self/environ').read()",
    ):
        assert not run_program(attempt, SHORT).passed, attempt


def test_what_python_comes_with_can_be_read():
    program = (
        "import ctypes.util, datetime, decimal, random, sqlite3, ssl, uuid, zoneinfo\n"
        "import numpy\n"
        "random.SystemRandom().random()\n"
        "import os\nassert os.listdir('.') == [] and os.listdir() == []\n"
        "assert datetime.datetime.now(zoneinfo.ZoneInfo('UTC'))"
    )
    outcome = run_program(program, SHORT)
    assert (outcome.passed, outcome.reason) == (True, None)


def test_memory_time_and_files_end():
    hungry = run_program("kept = [bytearray(1 << 30) for _ in range(100)]", SHORT)
    assert (hungry.passed, hungry.reason) == (False, "MemoryError: ")
    busy = run_program("while True:\n    pass", SHORT)
    assert (busy.passed, busy.reason) == (False, "out of time")
    large = "with open('large', 'wb') as file:\n    for _ in range(9):\n        "
    assert not run_program(f"{large}file.write(bytes(10**6))", SHORT).passed
    many = "for number in range(40):\n    open(str(number), 'wb').write(bytes(10**6))"
    assert run_program(many, SHORT).reason == "OSError: [Errno 28] No space left on device"


def test_one_that_sleeps_is_ended():
    outcome = run_program("import time\ntime.sleep(60)", CodeLimits(seconds=1.0))
    assert (outcome.passed, outcome.reason) == (False, "out of time")


def test_a_stubborn_one_is_ended_too():
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    assert not run_program(stubborn, CodeLimits(seconds=3.0, cpu_seconds=1)).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError: "),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise type('a secret', (Exception,), {})('text')", "another error: text"),
        ("import json\njson.loads('')", "another error: Expecting value: line 1 column 1 (char 0)"),
        ("import os\nos._exit(0)", "left early"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed"),
        ("import sys\nprint('{}')\nsys.stdout.flush()\nimport os\nos._exit(0)", "left early"),
    ],
)
def test_only_a_program_that_comes_to_its_end_passes(program, reason):
    outcome = run_program(program)
    assert (outcome.passed, outcome.reason) == (False, reason)


def test_secrets_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ").passed


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(code_runner, "SANDBOX", "no such program")
    assert "install the system package bubblewrap" in str(sandbox_problem())
    with pytest.raises(FileNotFoundError):
        run_program("pass")


def test_a_sandbox_that_the_machine_forbids_is_told(monkeypatch, tmp_path):
    forbidden = tmp_path / "bwrap"
    forbidden.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
    )
    forbidden.chmod(0o755)
    monkeypatch.setattr(code_runner, "SANDBOX", str(forbidden))
    assert sandbox_problem() == (
        "programs cannot be run: bwrap: No permissions to create a new namespace"
    )


def test_a_limit_is_never_above_the_one_that_is_there(monkeypatch):
    there = {resource.RLIMIT_NOFILE: 32, resource.RLIMIT_CPU: 5}
    found = {}
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (1, there.get(kind, resource.RLIM_INFINITY))
    )
    monkeypatch.setattr(resource, "setrlimit", found.__setitem__)
    code_guard.limit({"cpu_seconds": 5, "memory_bytes": 1 << 30, "file_bytes": 1 << 20})
    assert found[resource.RLIMIT_NOFILE] == (32, 32)
    assert found[resource.RLIMIT_CPU] == (5, 5)
    assert found[resource.RLIMIT_AS] == (1 << 30, 1 << 30)


def test_the_guard_stands_alone():
    """Its process is isolated: a module of ours would not be found, and would take a second."""
    found = ast.walk(ast.parse(GUARD.read_text()))
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"json", "os", "resource", "sys"}
