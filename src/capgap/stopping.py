"""Ctrl-C and SIGTERM while stages run: a stage that can saves its state before it ends."""

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any

from capgap.errors import Interrupted
from capgap.stage import Say, Stage


class Stopped(Exception):
    """Work was ended by this signal; the same call goes on with it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Runs stages and processes that Ctrl-C, SIGTERM and a terminal that closes end in order. A
    context manager; `sent` is the first signal, 0 where none came."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.sent = 0
        # None: nothing is at work, or a process that is told
        self._waits: bool | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # what is ignored stays so: nohup lets a terminal close
        heeded = [one for one in self.NUMBERS if signal.getsignal(one) is not signal.SIG_IGN]
        self._before = {one: signal.signal(one, self._note) for one in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        again = bool(self.sent)
        self.sent = self.sent or number
        if self._process is not None:
            self._process.send_signal(number)
        # the second one does not wait
        elif self._waits is not None and (again or not self._waits):
            raise KeyboardInterrupt

    def check(self) -> None:
        """Stopped where a signal came while nothing was at work that could end for it."""
        if self.sent:
            raise Stopped(self.sent)

    def run(self, stage: Stage, say: Say) -> dict[str, Any]:
        """What the stage finds; Stopped where it was asked to end."""
        self.check()
        try:
            self._waits = stage.saves_when_asked
            return stage.run(say=say, should_stop=lambda: bool(self.sent))
        except (Interrupted, KeyboardInterrupt):
            raise Stopped(self.sent or signal.SIGINT) from None
        finally:
            self._waits = None

    def run_process(self, command: Sequence[str], **options: Any) -> int:
        """The exit code of a process in a group of its own, 128 and the number for a signal that
        killed it. What we are sent goes on to it."""
        # of our own group, a Ctrl-C in the terminal would reach it twice, and the second one does
        # not wait for its state to be saved
        with subprocess.Popen(command, start_new_session=True, **options) as process:
            self._process = process
            if self.sent:  # before there was one
                process.send_signal(self.sent)
            code = process.wait()
            self._process = None
        self.check()
        return 128 - code if code < 0 else code
