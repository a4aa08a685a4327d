"""Commands in processes of their own, forked from one that has imported what they need: to start
Python with torch and transformers takes seconds."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["capgap.sweep.tasks"])


class Started:
    """`capgap WORD ...` in its own process; used as subprocess.Popen is, whose texts it keeps."""

    def __init__(self, *words: object, env: dict[str, str] | None = None) -> None:
        self.args = ["capgap", *map(str, words)]
        folder = Path(tempfile.mkdtemp(prefix="capgap-test-"))
        self._paths = [folder / name for name in ("out", "err")]
        asked = (self.args, self._paths, dict(os.environ if env is None else env), os.getcwd())
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
    *words: object, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text."""
    started = Started(*words, env=env)
    try:
        out, err = started.communicate(timeout)
    finally:
        started.kill()
    return subprocess.CompletedProcess(started.args, started.wait(), out, err)


def _run(words: list[str], paths: list[Path], env: dict[str, str], folder: str) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        stream.flush()
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream.fileno())
        os.close(opened)
    sys.argv = words
    from capgap.cli import main

    main()
