"""Programs of a model's: what they may do, and what holds them back."""

import ast
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from capgap.evaluate import code_guard
from capgap.evaluate.code_runner import GUARD, CodeLimits, code_layers, run_program

# so short that a program that hangs costs a test little
SHORT = {"seconds": 6.0, "cpu_seconds": 1}
HAS_KERNEL = {name for name, there in (code_layers() or {}).items() if there}
BOTH = [
    pytest.param(CodeLimits(**SHORT), id="all"),
    pytest.param(CodeLimits(**SHORT, kernel=False), id="hook alone"),
    pytest.param(
        CodeLimits(**SHORT, hook=False),
        id="kernel alone",
        marks=pytest.mark.skipif(
            not {"seccomp", "landlock"} <= HAS_KERNEL, reason="this kernel has not both"
        ),
    ),
]


@pytest.mark.parametrize("limits", BOTH)
def test_honest_programs_pass(limits):
    honest = (
        "import math, re, collections, hashlib\n"
        "open('notes.txt', 'w').write('mine')\n"
        "import os\nos.mkdir('folder')\nos.rename('notes.txt', 'folder/notes.txt')\n"
        "assert open('folder/notes.txt').read() == 'mine'\n"
        "assert math.sqrt(4) == 2"
    )
    outcome = run_program(honest, limits)
    assert (outcome.passed, outcome.reason) == (True, None)


@pytest.mark.parametrize("limits", BOTH)
@pytest.mark.parametrize(
    "attempt",
    [
        "import socket\nsocket.socket()",
        "import _socket\n_socket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.fork()",
        "import os\nos.system('true') and exit(1)",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os, signal\nos.kill(os.getppid(), 0)",
    ],
)
def test_no_network_and_no_other_process(limits, attempt):
    # whoever stops it, it must not come to its end
    assert not run_program(f"{attempt}\n", limits).passed


@pytest.mark.parametrize("limits", BOTH)
def test_nothing_outside_is_written_or_removed(limits, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for attempt in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('more')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.chmod({str(kept)!r}, 0)",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import os\nos.symlink({str(tmp_path)!r}, 'way')\nopen('way/new', 'w')",
    ):
        assert not run_program(attempt, limits).passed, attempt
        assert [path.name for path in tmp_path.iterdir()] == ["kept"], attempt
        assert kept.read_text() == "kept"


@pytest.mark.parametrize("limits", BOTH)
def test_nothing_outside_is_read(limits, tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    for attempt in (
        f"open({str(tmp_path / 'secret')!r})",
        f"import os\nos.open({str(tmp_path / 'secret')!r}, os.O_RDONLY)",
        f"import os\nos.listdir({str(tmp_path)!r})",
        f"import os\nos.symlink({str(tmp_path)!r}, 'way')\nopen('way/secret')",
        "open('/etc/passwd')",
        "import os\nos.listdir('/home')",
        "open('/proc/self/environ')",
    ):
        assert not run_program(attempt, limits).passed, attempt


@pytest.mark.parametrize("limits", BOTH)
def test_what_python_comes_with_can_be_read(limits):
    program = (
        "import ctypes.util, datetime, decimal, random, sqlite3, ssl, uuid, zoneinfo\n"
        "import numpy\n"
        "random.SystemRandom().random()\n"
        "import os\nassert os.listdir('.') == [] and os.listdir() == []\n"
        "assert datetime.datetime.now(zoneinfo.ZoneInfo('UTC'))"
    )
    outcome = run_program(program, limits)
    assert (outcome.passed, outcome.reason) == (True, None)


@pytest.mark.parametrize("limits", BOTH)
def test_memory_time_and_files_end(limits):
    hungry = run_program("kept = [bytearray(1 << 30) for _ in range(100)]", limits)
    assert (hungry.passed, hungry.reason) == (False, "MemoryError: ")
    busy = run_program("while True:\n    pass", limits)
    assert (busy.passed, busy.reason) == (False, "out of time")
    large = "with open('large', 'wb') as file:\n    for _ in range(9):\n        "
    large = run_program(f"{large}file.write(bytes(10**6))", limits)
    assert not large.passed


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
        ("import sys\nprint('{}')\nsys.stdout.flush()\nimport os\nos._exit(0)", "left early"),
    ],
)
def test_only_a_program_that_comes_to_its_end_passes(program, reason):
    outcome = run_program(program)
    assert (outcome.passed, outcome.reason) == (False, reason)


def test_secrets_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ").passed


def test_the_folder_is_gone_afterwards(tmp_path):
    inside = "import os\nraise ValueError(os.getcwd())"
    folder = Path(str(run_program(inside).reason).removeprefix("ValueError: "))
    assert folder.name.startswith("capgap-code-")
    assert not folder.exists()


@pytest.mark.parametrize(
    "program",
    [
        "for _ in range(1200):\n    os.mkdir('a')\n    os.chdir('a')",
        "for a in 'xy':\n    os.makedirs(f'{a}/z/w')\n    open(f'{a}/z/f', 'w')",
        "os.symlink('/', 'a')\nos.mkdir('b', 0)\nos.mkfifo('c')\nopen(b'\\xff', 'w')",
        "os.rmdir(os.getcwd())",
    ],
)
def test_the_folder_is_gone_whatever_is_in_it(program, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = run_program(f"import os\n{program}", CodeLimits(hook=False))
    # the last one may not be allowed to remove its folder
    assert outcome.passed or "rmdir" in program
    assert list(tmp_path.iterdir()) == []


def test_a_limit_is_never_above_the_one_that_is_there(monkeypatch):
    there = {resource.RLIMIT_NOFILE: 32, resource.RLIMIT_CPU: 5}
    found = {}
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (1, there.get(kind, resource.RLIM_INFINITY))
    )
    monkeypatch.setattr(resource, "setrlimit", found.__setitem__)
    code_guard._limit({"cpu_seconds": 5, "memory_bytes": 1 << 30, "file_bytes": 1 << 20})
    assert found[resource.RLIMIT_NOFILE] == (32, 32)
    assert found[resource.RLIMIT_CPU] == (5, 5)
    assert found[resource.RLIMIT_AS] == (1 << 30, 1 << 30)


@pytest.mark.parametrize(("version", "holds"), [(-1, False), (2, False), (3, True)])
def test_landlock_that_lets_files_be_cut_off_does_not_count(version, holds, tmp_path, monkeypatch):
    def syscall(number, attributes, *_):
        return version if number == 444 and attributes is None else 0

    kernel = SimpleNamespace(syscall=syscall, prctl=lambda *_: 0)
    monkeypatch.setattr(code_guard.ctypes, "CDLL", lambda *_, **__: kernel)
    assert code_guard._guard_files(str(tmp_path)) is holds


def test_the_guard_stands_alone():
    """Its process is isolated: a module of ours would not be found, and would take a second."""
    found = ast.walk(ast.parse(GUARD.read_text()))
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"ctypes", "json", "os", "platform", "resource", "struct", "sys"}
