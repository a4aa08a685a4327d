"""Worker processes, and which task runs next on which. Knows nothing of models or screens."""

import multiprocessing
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any, Literal

from capgap.errors import Interrupted, UserError, WorkerDied, is_disk_full
from capgap.sweep.cells import Context, Task, Teacher, Work

Outcome = Literal["done", "stopped", "user_error", "crashed"]
STEPS_EVERY = 0.25  # seconds between two messages about steps
PARENT_CHECK_SECONDS = 1.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StepMessage:
    worker: int
    task: str
    tokens: int
    tokens_per_second: float
    loss: float | None


@dataclass(frozen=True)
class EndMessage:
    """How a task ended. `seconds` are those of its stages, `busy` of the whole task;
    `peak_memory` is the worker's so far, in bytes."""

    worker: int
    task: str
    outcome: Outcome
    message: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    peak_memory: int = 0


def work(
    worker: int,
    context: Context,
    tasks: "Queue[Task | None]",
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
    while (task := _next_task(tasks)) is not None:
        messages.put(_run(worker, context, task, messages, stop))


def _is_orphan() -> bool:
    """Whether the process that asks was killed: it can ask no more, nor stop anything."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _next_task(tasks: "Queue[Task | None]") -> Task | None:
    """Waits for a task; None at the end."""
    while not _is_orphan():
        try:
            return tasks.get(timeout=PARENT_CHECK_SECONDS)
        except queue.Empty:
            continue
    return None


def _run(
    worker: int,
    context: Context,
    task: Task,
    messages: "Queue[StepMessage | EndMessage]",
    stop: Event,
) -> EndMessage:
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
            messages.put(StepMessage(worker, task.id, progress.tokens, rate, loss))

    def should_stop() -> bool:
        return stop.is_set() or _is_orphan()

    outcome: Outcome = "done"
    message = ""
    try:
        run = TaskRun(context, clock, should_stop, on_step)
        run.run(task)
        message = "\n".join(run.warnings)
    except Interrupted:
        outcome = "stopped"
    except UserError as error:
        outcome, message = "user_error", str(error)
    except Exception as error:
        outcome, message = "crashed", traceback.format_exc()
        if is_disk_full(error):
            outcome = "user_error"
            message = (
                f"no disk space left in {context.out}: free some and run the same command again; "
                "what is finished is kept"
            )
    busy = time.monotonic() - start
    return EndMessage(worker, task.id, outcome, message, clock.seconds, busy, peak_memory())


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Speed:
    """Seconds a token = overhead + FLOPs a token / flops_per_second, for one worker. A forward pass
    has a third of the overhead of a training step."""

    overhead: float
    flops_per_second: float

    def seconds(self, work: Work) -> float:
        trained = sum(tokens for _, tokens in work.trained)
        tokens = trained + sum(tokens for _, tokens in work.read) / 3
        flops = work.training_flops + work.forward_flops
        return tokens * self.overhead + flops / self.flops_per_second


# Small models are bound by what every token costs whatever the size: on one CPU thread it was
# measured at about half a million floating-point operations a token and model.
RELATIVE = Speed(overhead=5e5, flops_per_second=1.0)


def relative_cost(task: Task) -> float:
    """Expected time in units of their own; that of a teacher that exists is next to none."""
    return RELATIVE.seconds(task.work) or 1.0


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


@dataclass
class _Worker:
    process: BaseProcess
    tasks: Any
    task: Task | None = None


@dataclass
class Workers:
    """A pool of worker processes; use as a context manager. They start with the first task, or
    when `start` is called."""

    context: Context
    number: int
    workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> "Workers":
        return self

    def start(self) -> None:
        """Starts the processes, unless they run."""
        if self.workers:
            return
        # forked from a process that has imported torch once; where CUDA was touched no fork works
        kind = "forkserver" if self.context.device == "cpu" else "spawn"
        start: Any = multiprocessing.get_context(kind)
        start.set_forkserver_preload(["capgap.sweep.tasks"])
        self.messages: Any = start.Queue()
        self.stop = start.Event()
        # half a start would leave a process that looks for what is gone
        with _uninterrupted():
            for index in range(self.number):
                tasks = start.Queue()
                given = (index, self.context, tasks, self.messages, self.stop)
                process = start.Process(target=work, args=given, daemon=True)
                process.start()
                self.workers.append(_Worker(process, tasks))

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

    def run(
        self,
        tasks: Iterable[Task],
        *,
        finished: set[str],
        should_stop: Callable[[], bool] = lambda: False,
        on_start: Callable[[int, Task], None],
        on_step: Callable[[StepMessage], None],
        on_end: Callable[[Task, EndMessage], None],
    ) -> None:
        """Runs all tasks, the costliest that can start first. `finished` (ids) grows with them.

        UserError if a task met a user's mistake, WorkerDied if its process ended, RuntimeError with
        its traceback if it broke, Interrupted when `should_stop` said so; the others save their
        state first.
        """
        # teachers first, since columns wait for them; then the longest, so that ends meet
        waiting = sorted(
            tasks, key=lambda one: (isinstance(one, Teacher), relative_cost(one)), reverse=True
        )
        if waiting:
            self.start()
        while waiting or any(worker.task is not None for worker in self.workers):
            if should_stop():
                raise Interrupted
            # every time: the messages of the others would else hide a worker that died
            self._check_alive()
            for index, worker in enumerate(self.workers):
                ready = (one for one in waiting if one.needs <= finished)
                task = None if worker.task is not None else next(ready, None)
                if task is not None:
                    waiting.remove(task)
                    worker.task = task
                    worker.tasks.put(task)
                    on_start(index, task)
            message = self._next_message()
            if isinstance(message, StepMessage):
                on_step(message)
            elif message is not None:
                worker = self.workers[message.worker]
                ended, worker.task = worker.task, None
                assert ended is not None
                on_end(ended, message)
                if message.outcome == "user_error":
                    raise UserError(message.message)
                if message.outcome == "crashed":
                    raise RuntimeError(f"{message.task} broke:\n{message.message}")
                assert message.outcome == "done"
                finished.add(ended.id)

    def _next_message(self) -> StepMessage | EndMessage | None:
        try:
            return self.messages.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return None

    def _check_alive(self) -> None:
        for worker in self.workers:
            if not worker.process.is_alive():
                doing = "waiting for work" if worker.task is None else f"at {worker.task.id}"
                raise WorkerDied(
                    f"the worker process {doing} ended with code {worker.process.exitcode}, "
                    "mostly for lack of memory: try fewer workers (run.workers=1); "
                    "the same command continues"
                )
