"""Worker processes of this machine, one a core or one a GPU."""

import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

from capgap.errors import (
    Interrupted,
    UserError,
    WorkerDied,
    first_line,
    is_disk_full,
    is_out_of_memory,
)
from capgap.machine import VISIBLE_GPUS
from capgap.mirror import fetch
from capgap.sweep.cells import Context, Task
from capgap.sweep.schedule import EndMessage, Engine, Outcome, StepMessage

STEPS_EVERY = 0.25  # seconds between two messages about steps
PARENT_CHECK_SECONDS = 1.0
POLL_SECONDS = 0.2


# What a worker is given: a task, and what it takes at once in place of the recipe's micro-batch
Given = tuple[Task, int | None]


def work(
    place: str,
    context: Context,
    tasks: "Queue[Given | None]",
    messages: "Queue[StepMessage | EndMessage]",
    stop: Event,
) -> None:
    """Runs tasks until None comes. Ctrl-C is the parent's to handle: it sets `stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch
    from transformers.utils import logging

    if context.threads is not None:
        torch.set_num_threads(context.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def stops() -> bool:
        return stop.is_set() or _is_orphan()

    while (given := _next_task(tasks)) is not None:
        task, micro_batch_tokens = given
        own = context.with_micro_batch(micro_batch_tokens)
        messages.put(run_task(place, own, task, messages.put, stops))


def _is_orphan() -> bool:
    """Whether the process that asks was killed: it can ask no more, nor stop anything."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _next_task(tasks: "Queue[Given | None]") -> Given | None:
    """Waits for a task; None at the end."""
    while not _is_orphan():
        try:
            return tasks.get(timeout=PARENT_CHECK_SECONDS)
        except queue.Empty:
            continue
    return None


def run_task(
    place: str,
    context: Context,
    task: Task,
    tell: Callable[[StepMessage], None],
    should_stop: Callable[[], bool],
) -> EndMessage:
    """A task in this process, and how it ended."""
    from capgap.sweep.tasks import TaskRun
    from capgap.train.loop import Progress
    from capgap.train.metrics import StageClock

    clock = StageClock(context.device)
    start = sent = time.monotonic()
    learner_tokens = 0

    def on_step(progress: Progress) -> None:
        nonlocal sent, learner_tokens
        learner_tokens += progress.learner_tokens
        now = time.monotonic()
        if now - sent > STEPS_EVERY:
            sent = now
            last = [one for step in progress.reports for one in step.learners.values()][-1:]
            loss = last[0].loss if last else None
            rate = learner_tokens / (now - start)
            tell(StepMessage(task.id, progress.tokens, rate, loss))

    outcome: Outcome = "done"
    message = ""
    try:
        fetch(*context.files_of(task))
        run = TaskRun(context, clock, should_stop, on_step)
        run.run(task)
        message = "\n".join(run.warnings)
    except Interrupted:
        outcome = "stopped"
    except UserError as error:
        outcome, message = "user_error", str(error)
    except Exception as error:
        outcome, message = "crashed", traceback.format_exc()
        if is_out_of_memory(error):
            outcome, message = "out_of_memory", first_line(error)
        if is_disk_full(error):
            outcome = "user_error"
            message = (
                f"no disk space left in {context.out}: free some and run the same command again; "
                "what is finished is kept"
            )
    busy = time.monotonic() - start
    peak = peak_memory()
    return EndMessage(task.id, outcome, message, clock.seconds, busy, peak, place)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that come while inside are heeded behind it."""
    sent: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        sent.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for heeded, handler in before.items():
            signal.signal(heeded, handler)
        if sent:
            signal.raise_signal(sent[0])


@contextmanager
def _seen(gpu: str | None) -> Iterator[None]:
    """A process that is started inside sees that GPU alone, by number 0."""
    before = os.environ.get(VISIBLE_GPUS)
    if gpu is not None:
        os.environ[VISIBLE_GPUS] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            os.environ.pop(VISIBLE_GPUS)
            if before is not None:
                os.environ[VISIBLE_GPUS] = before


@dataclass
class _Worker:
    number: int
    place: str
    process: BaseProcess
    tasks: Any
    task: str | None = None


@dataclass
class Workers(Engine):
    """An engine of worker processes, on all GPUs in turn. They start with the first task, or when
    `start` is called."""

    context: Context
    number: int
    gpus: tuple[str, ...] = ()
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> None:
        """Starts the processes, unless they run."""
        if self.workers:
            return
        # forked from a process that has imported torch once; where CUDA was touched no fork works
        kind = "forkserver" if self.context.device == "cpu" else "spawn"
        start: Any = multiprocessing.get_context(kind)
        start.set_forkserver_preload(["capgap.sweep.tasks"])
        self.begin, self.talk = start, start.Queue()
        self.stop = start.Event()
        # half a start would leave a process that looks for what is gone
        with _uninterrupted():
            for number in range(self.number):
                self._begin(number)

    def _begin(self, number: int) -> None:
        """A worker process, which sees one GPU where there are some."""
        gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
        place = f"worker {number + 1}" if gpu is None else f"GPU {gpu}"
        tasks = self.begin.Queue()
        given = (place, self.context, tasks, self.talk, self.stop)
        process = self.begin.Process(target=work, args=given, daemon=True)
        with _seen(gpu):
            process.start()
        self.workers.append(_Worker(number, place, process, tasks))

    def __exit__(self, *exception: object) -> None:
        """Lets running tasks save their state, then ends all workers."""
        if not self.workers:
            return
        self.stop.set()
        for worker in self.workers:
            worker.tasks.put(None)
        deadline = time.monotonic() + 60
        for worker in self.workers:
            # a full pipe would keep a worker from ending
            while worker.process.is_alive() and time.monotonic() < deadline:
                self._next_message()
                worker.process.join(0.05)
            if worker.process.is_alive():
                worker.process.kill()

    def has_place(self) -> bool:
        return any(worker.task is None for worker in self.workers)

    def submit(self, task: Task, micro_batch_tokens: int | None) -> str:
        worker = next(one for one in self.workers if one.task is None)
        worker.task = task.id
        worker.tasks.put((task, micro_batch_tokens))
        return worker.place

    def messages(self) -> "list[StepMessage | EndMessage]":
        """WorkerDied where a process ended by itself."""
        # every time: the messages of the others would else hide a worker that died
        for worker in self.workers:
            if not worker.process.is_alive():
                doing = "waiting for work" if worker.task is None else f"at {worker.task}"
                raise WorkerDied(
                    f"the worker process {doing} ended with code {worker.process.exitcode}, "
                    "mostly for lack of memory: try fewer workers (run.workers=1); "
                    "the same command continues"
                )
        message = self._next_message()
        if isinstance(message, EndMessage):
            self._worker_of(message.task).task = None
        return [] if message is None else [message]

    def cancel(self, task: str) -> None:
        worker = self._worker_of(task)
        worker.process.kill()
        worker.process.join()
        self.workers.remove(worker)
        self._begin(worker.number)

    def _worker_of(self, task: str) -> _Worker:
        return next(worker for worker in self.workers if worker.task == task)

    def _next_message(self) -> StepMessage | EndMessage | None:
        try:
            return self.talk.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return None
