"""Runs the steps of a recipe, each as a process of its own, and keeps what became of them."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capgap.config import RunRecipe
from capgap.errors import UserError
from capgap.locking import LOCK, locked_folder
from capgap.pipeline.results import result_of
from capgap.pipeline.state import RECORD, Decision, RunState, check_step, decide
from capgap.pipeline.steps import SHARED, Step, plan_steps
from capgap.sizes import clock_time

Say = Callable[[str], None]


class StepFailed(Exception):
    """A step ended with this exit code; its own output has said why."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(f"the step {step} ended with exit code {code}")
        self.step = step
        self.code = code


def plan_pipeline(
    recipe: RunRecipe, out: Path, *, again_from: str | None = None, until: str | None = None
) -> list[Decision]:
    """What `run_pipeline` would do, without doing it."""
    out = out.absolute()
    return _selected(recipe, RunState(out, recipe.name), out, again_from, until)


def run_pipeline(
    recipe: RunRecipe,
    out: Path,
    *,
    again_from: str | None = None,
    until: str | None = None,
    quiet: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Runs what is not done or has changed, up to the step `until`; returns run.json.

    Every step's process has our standard error; what it prints goes there too, so that standard
    output stays the caller's. UserError: the user's mistakes, an output folder in use; StepFailed
    where a step's command failed or was stopped, which the same call continues.
    """
    # the same folder, wherever the next call is made from
    out = out.absolute()
    with _claimed(out) as lock, _Signals() as signals:
        state = RunState(out, recipe.name)
        decisions = _selected(recipe, state, out, again_from, until)
        state.forget_others(plan_steps(recipe, out))
        state.record["recipe"] = recipe.model_dump(mode="json")
        for number, decision in enumerate(decisions, 1):
            head = f"[{number}/{len(decisions)}] {decision.step.name}"
            if decision.state == "done":
                say(f"{head}: done before")
                continue
            say(f"{head}: {_announced(decision)}")
            code = _run(
                decision,
                state,
                signals,
                processes=recipe.hardware.processes,
                quiet=quiet,
                lock=lock,
            )
            # whatever the step made of it: one that was about to end does so well
            if signals.sent:
                code = 128 + signals.sent[0]
            if code != 0:
                raise StepFailed(decision.step.name, code)
            kept = state.begun(decision.step) or {}
            told = f", {kept['result']}" if kept["result"] else ""
            say(f"{head}: {clock_time(kept['seconds'])}{told}")
        return state.record


def _selected(
    recipe: RunRecipe, state: RunState, out: Path, again_from: str | None, until: str | None
) -> list[Decision]:
    steps = plan_steps(recipe, out)
    names = [step.name for step in steps]
    for name in (again_from, until):
        if name is not None:
            check_step(name, names)
    if until is not None:
        if again_from is not None and names.index(again_from) > names.index(until):
            raise UserError(f"--from {again_from} comes after --until {until}")
        steps = steps[: names.index(until) + 1]
    return decide(steps, state, again_from=again_from)


def _announced(decision: Decision) -> str:
    if decision.why == "it never ran":
        return "starts"
    verb = "goes on" if decision.state == "continue" else "starts again"
    return f"{verb}: {decision.why}"


class _Signals:
    """What we are sent goes on to the process of the step, which saves its state before it ends. A
    context manager; `sent` are the signals so far, a terminal that closes as a SIGTERM."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        self._before = {one: signal.signal(one, self._note) for one in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for(self, process: "subprocess.Popen[bytes]") -> int:
        """Its exit code; also what came before it was there is passed on to it."""
        self._process = process
        for number in self.sent:
            process.send_signal(number)
        code = process.wait()
        self._process = None
        return code

    def _note(self, number: int, frame: object) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self.sent.append(number)
        if self._process is not None:
            self._process.send_signal(number)


def _run(
    decision: Decision,
    state: RunState,
    signals: _Signals,
    *,
    processes: int,
    quiet: bool,
    lock: int,
) -> int:
    """The exit code of the step's process, which is kept with what it made."""
    step = decision.step
    if decision.state == "run":
        for path in step.writes:
            _remove(path)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    argv = step.argv()
    begun = state.begun(step) or {}
    state.keep(
        step,
        status="running",
        # what comes after knows by it whether it rests on this start or on one before
        id=secrets.token_hex(4) if decision.state == "run" else begun["id"],
        inputs=decision.inputs | {"after": state.made_by(step.after)},
        command=["capgap", *argv],
        started=began,
        result=None,
    )
    start = time.monotonic()
    code = _process(step, argv, signals, processes=processes, quiet=quiet, lock=lock)
    seconds = time.monotonic() - start
    if code == 0:
        state.keep(step, status="done", seconds=seconds, result=result_of(step))
    else:
        stopped = bool(signals.sent) or code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        state.keep(step, status="stopped" if stopped else "failed", seconds=seconds)
    return code


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _process(
    step: Step,
    argv: Sequence[str],
    signals: _Signals,
    *,
    processes: int,
    quiet: bool,
    lock: int,
) -> int:
    """The exit code, 128 and the number for a signal that killed it.

    It has the folder's lock too: should we be killed, nobody else starts beside it.
    """
    start = ["capgap"]
    if processes > 1 and step.command in SHARED:
        start = ["capgap.pipeline.processes", str(processes)]
    command = [sys.executable, "-m", *start, *argv, *(["--quiet"] if quiet else [])]
    # a group of its own: a Ctrl-C in the terminal would else reach it twice, and the second one
    # does not wait for its state to be saved
    with subprocess.Popen(
        command,
        stdout=sys.stderr.fileno(),
        # a random.py in the working folder is not Python's
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        start_new_session=True,
        pass_fds=(lock,),
    ) as process:
        code = signals.wait_for(process)
    return 128 - code if code < 0 else code


@contextmanager
def _claimed(out: Path) -> Iterator[int]:
    """The folder belongs to a run and, while inside, to this process alone: its lock."""
    foreign = out.exists() and not (out / RECORD).exists()
    if foreign and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise UserError(f"{out} is no empty folder and no run: choose another --out")
    with locked_folder(out) as lock:
        yield lock
