"""Commands and functions in processes of their own, forked from one that has imported what they
need: to start Python with torch and transformers takes seconds."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "capgap.sweep.tasks",
        "capgap.sweep.runner",
        "capgap.stages.adapt",
        "capgap.stages.distill",
        "torch.distributed.fsdp",
    ]
)


def capgap() -> None:
    from capgap.cli import main

    main()


def capgap_without_pictures() -> None:
    """The page of a report has the data of its charts; those are not drawn here, and nothing on the
    page would draw them."""
    from capgap.report import draw, page

    draw.write_picture = lambda picture, *paths: None
    page._runtime = str
    capgap()


class Started:
    """`capgap WORD ...` in its own process; used as subprocess.Popen is, whose texts it keeps.

    Another `main` is a function of a module, which finds the words in sys.argv.
    """

    def __init__(
        self,
        *words: object,
        env: dict[str, str] | None = None,
        main: Callable[[], None] = capgap,
    ) -> None:
        self.args = ["capgap", *map(str, words)]
        folder = Path(tempfile.mkdtemp(prefix="capgap-test-"))
        self._paths = [folder / name for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        asked = (main, self.args, self._paths, environment, os.getcwd())
        self._process = _SERVER.Process(target=_run, args=asked)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self._paths)
        shutil.rmtree(self._paths[0].parent, ignore_errors=True)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *words: object,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    main: Callable[[], None] = capgap,
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text."""
    return _ended([Started(*words, env=env, main=main)], timeout)


def run_code(code: str, *words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """As `python -c CODE WORD ...`."""
    return run(*words, timeout=timeout, main=functools.partial(_execute, code))


def start_ranks(count: int, *words: object, main: Callable[[], None] = capgap) -> list[Started]:
    """The processes of `torchrun --nproc-per-node COUNT`, whose warnings are errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error",
    }
    ranks = [{"RANK": str(one), "LOCAL_RANK": str(one)} for one in range(count)]
    return [Started(*words, main=main, env=os.environ | world | rank) for rank in ranks]


def run_ranks(
    count: int, *words: object, timeout: float = 240, main: Callable[[], None] = capgap
) -> subprocess.CompletedProcess[str]:
    """What all of them printed, the first one's first; with its exit code or another's failure."""
    return _ended(start_ranks(count, *words, main=main), timeout)


def kill_alone(process: Started) -> None:
    """Kills the process; back when those that it had started have noticed, and ended."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(30)
    until = time.monotonic() + 30
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below):
        assert time.monotonic() < until, "what was started goes on"
        time.sleep(0.02)


def _ended(processes: list[Started], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        told = [one.communicate(timeout) for one in processes]
    finally:
        for one in processes:
            one.kill()
    codes = [one.wait() for one in processes]
    out, err = ("".join(texts) for texts in zip(*told, strict=True))
    code = next((one for one in codes if one), 0)
    return subprocess.CompletedProcess(processes[0].args, code, out, err)


def _run(
    main: Callable[[], None], words: list[str], paths: list[Path], env: dict[str, str], folder: str
) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        stream.flush()
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream.fileno())
        os.close(opened)
    if env.get("PYTHONWARNINGS") == "error":
        # behind what libraries have asked for, as Python's own option is
        warnings.simplefilter("error", append=True)
    sys.argv = words
    _fork_servers()
    main()


def _execute(code: str) -> None:
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _fork_servers() -> None:
    """A sweep's workers are forked from a process that has imported what they need. It is a fork
    of ours, made before there are threads, in place of another Python that imports all again."""
    started = forkserver.util.spawnv_passfds

    def fork(path: Any, args: list[Any], passed: list[int]) -> int:
        if "forkserver" not in args[-1]:
            return started(path, args, passed)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                # it ends when nobody has the other end of its pipe, nor may it
                bounds = [2, *sorted(passed), os.sysconf("SC_OPEN_MAX")]
                for below, above in itertools.pairwise(bounds):
                    os.closerange(below + 1, above)
                exec(args[-1], {})
            os._exit(0)
        return pid

    forkserver.util.spawnv_passfds = fork
    try:
        forkserver.ensure_running()
    finally:
        forkserver.util.spawnv_passfds = started
