"""Which task runs next, and on which worker process. Knows nothing of models or screens."""

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from capgap.errors import UserError
from capgap.sweep.context import Context
from capgap.sweep.plan import Column, Teacher, Work
from capgap.sweep.worker import EndMessage, StepMessage, work

POLL_SECONDS = 0.2


class WorkerDied(RuntimeError):
    """A worker process ended on its own, mostly because the system ran out of memory."""


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


def relative_cost(task: Teacher | Column) -> float:
    """Expected time in units of their own; that of a teacher that exists is next to none."""
    return RELATIVE.seconds(task.work) or 1.0


@dataclass
class _Worker:
    process: BaseProcess
    tasks: Any
    task: Teacher | Column | None = None


@dataclass
class Workers:
    """A pool of worker processes; use as a context manager."""

    context: Context
    number: int
    workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> "Workers":
        spawn = multiprocessing.get_context("spawn")
        self.messages: Any = spawn.Queue()
        self.stop = spawn.Event()
        for index in range(self.number):
            tasks = spawn.Queue()
            process = spawn.Process(
                target=work,
                args=(index, self.context, tasks, self.messages, self.stop),
                daemon=True,
            )
            process.start()
            self.workers.append(_Worker(process, tasks))
        return self

    def __exit__(self, *exception: object) -> None:
        """Lets running tasks save their state, then ends all workers."""
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
        tasks: Iterable[Teacher | Column],
        *,
        finished: set[str],
        on_step: Callable[[StepMessage], None],
        on_end: Callable[[Teacher | Column, EndMessage], None],
        on_start: Callable[[int, Teacher | Column], None],
    ) -> None:
        """Runs all tasks, the costliest that can start first. `finished` (ids) grows with them.

        UserError if a task met a user's mistake, RuntimeError with its traceback if one broke; the
        others save their state first.
        """
        waiting = sorted(tasks, key=_priority, reverse=True)
        while waiting or any(worker.task is not None for worker in self.workers):
            # every time: the messages of the others would else hide a worker that died
            self._check_alive()
            self._give_out(waiting, finished, on_start)
            message = self._next_message()
            if isinstance(message, StepMessage):
                on_step(message)
            elif isinstance(message, EndMessage):
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

    def _give_out(
        self,
        waiting: list[Teacher | Column],
        finished: set[str],
        on_start: Callable[[int, Teacher | Column], None],
    ) -> None:
        for index, worker in enumerate(self.workers):
            if worker.task is not None:
                continue
            for task in waiting:
                if isinstance(task, Teacher) or task.needs <= finished:
                    waiting.remove(task)
                    worker.task = task
                    worker.tasks.put(task)
                    on_start(index, task)
                    break

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


def _priority(task: Teacher | Column) -> tuple[bool, float]:
    """Teachers first, since columns wait for them; then the longest, so that ends meet."""
    return isinstance(task, Teacher), relative_cost(task)
