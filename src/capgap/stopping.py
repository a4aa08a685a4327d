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
        self._waits = False
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._before = {one: signal.signal(one, self._note) for one in self.NUMBERS}
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
        elif again or not self._waits:
            raise KeyboardInterrupt

    def run(self, stage: Stage, say: Say) -> dict[str, Any]:
        """What the stage finds; Stopped where it was asked to end."""
        self._waits = stage.saves_when_asked
        try:
            return stage.run(say=say, should_stop=lambda: bool(self.sent))
        except (Interrupted, KeyboardInterrupt):
            raise Stopped(self.sent or signal.SIGINT) from None
        finally:
            self._waits = False

    def run_process(self, command: Sequence[str], **options: Any) -> int:
        """The exit code of a process in a group of its own, 128 and the number for a signal that
        killed it. What we are sent goes on to it."""
        # of our own group, a Ctrl-C in the terminal would reach it twice, and the second one does
        # not wait for its state to be saved
        self._waits = True
        with subprocess.Popen(command, start_new_session=True, **options) as process:
            self._process = process
            if self.sent:  # before there was one
                process.send_signal(self.sent)
            code = process.wait()
            self._process = None
        self._waits = False
        if self.sent:
            raise Stopped(self.sent)
        return 128 - code if code < 0 else code
