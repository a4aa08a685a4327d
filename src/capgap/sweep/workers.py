"""Worker processes of this machine: one a core or one a GPU, or several that share every task."""

import gc
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from capgap.errors import (
    Interrupted,
    UserError,
    WorkerDied,
    first_line,
    is_disk_full,
    is_out_of_memory,
    is_storage_away,
)
from capgap.machine import (
    VISIBLE_GPUS,
    free_memory,
    gpu_memory,
    resolve_device,
    usable_cores,
    visible_gpus,
)
from capgap.mirror import fetch
from capgap.stage import Say
from capgap.sweep.cells import Context, Task
from capgap.sweep.memory import gpu_bytes, host_bytes
from capgap.sweep.schedule import EndMessage, Engine, Outcome, StepMessage
from capgap.sweep.sharing import Sharing

if TYPE_CHECKING:
    from capgap.models.parallel import Ranks

STEPS_EVERY = 0.25  # seconds between two messages about steps
POLL_SECONDS = 0.2
# Tasks on a GPU at once, at most; what of its memory is theirs; and what the process of each takes
# of it and of the host's for CUDA and torch
MOST_ON_A_GPU = 8
MEMORY_SHARE = 0.9
CUDA_BYTES, HOST_BYTES = 10**9, 4 * 10**9
# How a task ends on all of its ranks, if it does on one
ALIKE = ("done", "stopped")
Message = StepMessage | EndMessage
# multiprocessing's Connection, which is generic for mypy alone
Pipe = Any


def work(place: str, context: Context, environment: dict[str, str], pipe: Pipe) -> None:
    """Runs tasks that come, each with what it takes at once, with the other ranks that the
    environment tells of, until None comes or the parent is gone: while a task runs both stop it.
    Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ.update(environment)
    import torch
    from transformers.utils import logging

    from capgap.models.parallel import joined

    if context.threads is not None:
        torch.set_num_threads(context.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def tell(message: Message) -> None:
        with suppress(BrokenPipeError):
            pipe.send(message)

    context = replace(context, device=resolve_device(context.recipe.run.device))
    with joined(context.device, context.batch_windows, context.recipe.run.shard_size) as ranks:
        while (given := _received(pipe)) is not None:
            task, micro_batch_tokens = given
            own = context.with_micro_batch(micro_batch_tokens)
            ended = run_task(place, own, task, tell, pipe.poll, ranks)
            if torch.cuda.is_initialized():
                # others may share the GPU
                gc.collect()
                torch.cuda.empty_cache()
            # what one rank alone fails of, the others wait for
            if ranks.is_first or ended.outcome not in ALIKE:
                tell(ended)


def _received(pipe: Pipe) -> Any:
    """What the other side sent; None where it is gone."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def run_task(
    place: str,
    context: Context,
    task: Task,
    tell: Callable[[StepMessage], None],
    should_stop: Callable[[], bool],
    ranks: "Ranks | None" = None,
) -> EndMessage:
    """A task in this process, or its part of one that several ranks share, and how it ended."""
    from capgap.models.parallel import ALONE
    from capgap.sweep.tasks import TaskRun
    from capgap.train.loop import Progress
    from capgap.train.metrics import StageClock

    ranks = ranks or ALONE
    clock = StageClock(context.device)
    start = sent = time.monotonic()
    learner_tokens = 0

    def on_step(progress: Progress) -> None:
        nonlocal sent, learner_tokens
        learner_tokens += progress.learner_tokens
        now = time.monotonic()
        if ranks.is_first and now - sent > STEPS_EVERY:
            sent = now
            last = [one for step in progress.reports for one in step.learners.values()][-1:]
            loss = last[0]["loss"] if last else None
            rate = learner_tokens / (now - start)
            tell(StepMessage(task.id, progress.tokens, rate, loss))

    outcome: Outcome = "done"
    message = ""
    try:
        ranks.first(lambda: fetch(*context.files_of(task)))
        run = TaskRun(context, clock, should_stop, on_step, ranks)
        run.run(task)
        message = "\n".join(run.warnings)
    except Interrupted:
        outcome = "stopped"
    except Exception as error:
        outcome, message = "crashed", traceback.format_exc()
        if isinstance(error, UserError):
            outcome, message = "user_error", str(error)
        if is_storage_away(error):
            outcome, message = "lost", first_line(error)
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
    if outcome in ALIKE:
        peak = sum(ranks.collect(peak))
    return EndMessage(task.id, outcome, message, clock.seconds, busy, peak, place)


def run_shared(
    context: Context,
    task: Task,
    tell: Callable[[StepMessage], None],
    should_stop: Callable[[], bool],
) -> EndMessage:
    """A task in processes that share it. Interrupted when `should_stop` said so."""
    with Workers(context, 1, visible_gpus(context.recipe.run.device)) as engine:
        engine.start()
        engine.submit(task, None)
        while not should_stop():
            for message in engine.messages():
                if isinstance(message, EndMessage):
                    return message
                tell(message)
        raise Interrupted


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


@dataclass
class _Worker:
    """A process, or ranks that share every task, each with its pipe. `store` is where the ranks
    find each other, and lives as long as they do."""

    number: int
    sharing: Sharing
    place: str = ""
    ranks: list[tuple[BaseProcess, Pipe]] = field(default_factory=list)
    store: Any = None
    task: str | None = None

    def give(self, given: tuple[Task, int | None] | None) -> None:
        for _, pipe in self.ranks:
            # of one that died the next look tells
            with suppress(BrokenPipeError):
                pipe.send(given)

    def end(self) -> None:
        """Its task is over."""
        if self.task is not None:
            self.sharing.end(self.task)
        self.task = None

    def kill(self) -> None:
        self.end()
        for process, pipe in self.ranks:
            process.kill()
            process.join()
            pipe.close()
        self.ranks = []


@dataclass
class Workers(Engine):
    """An engine of so many workers on all GPUs in turn, each of `run.gpus_per_column` processes.
    They start with the first task, or when `start` is called. Where the recipe leaves their number
    open, and there is one for every GPU, more come as `Sharing` finds it worth it."""

    context: Context
    number: int
    gpus: tuple[str, ...] = ()
    say: Say = lambda text: None
    workers: list[_Worker] = field(default_factory=list)
    alone: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Starts the processes, unless they run."""
        if self.workers:
            return
        # forked from a process that has imported torch once; where CUDA was touched no fork works
        kind = "forkserver" if self.context.device == "cpu" else "spawn"
        start: Any = multiprocessing.get_context(kind)
        start.set_forkserver_preload(["capgap.sweep.tasks"])
        self.begin = start
        # half a start would leave a process that looks for what is gone
        with _uninterrupted():
            shared = self._shared()
            self.workers = [
                _Worker(number, shared[number % len(shared)])
                for number in range(sum(one.most for one in shared))
            ]
            for worker in self.workers[: self.number]:
                self._begin(worker)

    def _shared(self) -> list[Sharing]:
        """One for every GPU, or group of them; on a CPU for every worker."""
        run, each = self.context.recipe.run, self.context.recipe.run.gpus_per_column
        places = min(self.number, len(self.gpus) // each or self.number)
        if run.workers != "auto" or each > 1 or self.number != len(self.gpus):
            numbers = [len(range(place, self.number, places)) for place in range(places)]
            return [Sharing(number, kept=number, is_settled=True) for number in numbers]
        most = max(1, min(MOST_ON_A_GPU, usable_cores() // places))
        return [Sharing(most, MEMORY_SHARE * gpu_memory(index)) for index in range(places)]

    def _begin(self, worker: _Worker) -> None:
        """Its processes, which see their GPUs alone where there are some."""
        count = self.context.recipe.run.gpus_per_column
        worker.place = f"worker {worker.number + 1}"
        shared: dict[str, str] = {}
        if self.gpus:
            first = worker.number % (len(self.gpus) // count) * count
            shared[VISIBLE_GPUS] = ",".join(self.gpus[first : first + count])
            worker.place = f"GPU {shared[VISIBLE_GPUS]}"
            if worker.number >= len(self.gpus) // count:
                worker.place += f" ({worker.number // (len(self.gpus) // count) + 1})"
        if count > 1:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            # as torchrun's: it is here, at a port that is free, and the ranks come to it
            worker.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(worker.store.port)}
            shared |= {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for rank in range(count):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
            ours, theirs = self.begin.Pipe()
            given = (worker.place, self.context, own, theirs)
            process = self.begin.Process(target=work, args=given, daemon=True)
            process.start()
            theirs.close()
            worker.ranks.append((process, ours))

    def __exit__(self, *exception: object) -> None:
        """Lets running tasks save their state, then ends all workers."""
        for worker in self.workers:
            worker.give(None)
        deadline = time.monotonic() + 60
        for process, _ in (rank for worker in self.workers for rank in worker.ranks):
            # a full pipe would keep a worker from ending
            while process.is_alive() and time.monotonic() < deadline:
                self._messages()
                process.join(0.05)
            if process.is_alive():
                process.kill()

    def has_place(self) -> bool:
        return any(self._free(0))

    def fits(self, task: Task, micro_batch_tokens: int | None) -> bool:
        needs = self._needs(task, micro_batch_tokens)
        free = list(self._free(needs))
        # whatever a task alone on its GPU takes of the host's memory
        if not needs or any(not worker.sharing.running for worker in free):
            return bool(free)
        return bool(free) and free_memory() > HOST_BYTES + host_bytes(self.context, task)

    def _free(self, needs: float) -> Iterator[_Worker]:
        return (one for one in self.workers if one.task is None and one.sharing.has_room(needs))

    def _needs(self, task: Task, micro_batch_tokens: int | None) -> float:
        """Bytes of a GPU; all that there are for one that lacked them beside others."""
        if task.id in self.alone:
            return math.inf
        # of numbers that a user gave, or on a CPU, nothing is reckoned
        if math.isinf(self.workers[0].sharing.memory):
            return 0
        context = self.context.with_micro_batch(micro_batch_tokens)
        return CUDA_BYTES + gpu_bytes(context, task)

    def submit(self, task: Task, micro_batch_tokens: int | None) -> str:
        needs = self._needs(task, micro_batch_tokens)
        # where there are fewest, in a process that runs
        free = self._free(needs)
        worker = min(free, key=lambda one: (len(one.sharing.running), not one.ranks))
        with _uninterrupted():
            for one in self.workers:
                # what waits for work beside it holds memory of the GPU
                is_beside = one.sharing is worker.sharing and one is not worker
                if is_beside and one.task is None and needs:
                    one.kill()
            if not worker.ranks:
                self._begin(worker)
        worker.task = task.id
        worker.sharing.begin(task.id, needs)
        worker.give((task, micro_batch_tokens))
        return worker.place

    def messages(self) -> list[Message]:
        """WorkerDied where a process ended by itself."""
        # every time: the messages of the others would else hide a worker that died
        for worker, (process, _) in ((one, rank) for one in self.workers for rank in one.ranks):
            if not process.is_alive():
                doing = "waiting for work" if worker.task is None else f"at {worker.task}"
                raise WorkerDied(
                    f"the worker process {doing} ended with code {process.exitcode}, "
                    "mostly for lack of memory: try fewer workers (run.workers=1); "
                    "the same command continues"
                )
        return self._messages()

    def cancel(self, task: str) -> None:
        """Its processes are killed; others begin with the next task."""
        next(worker for worker in self.workers if worker.task == task).kill()

    def _messages(self) -> list[Message]:
        """What came since; ranks of which one has failed are killed."""
        senders: Any = {pipe: worker for worker in self.workers for _, pipe in worker.ranks}
        found: list[Message] = []
        for pipe in wait(list(senders), POLL_SECONDS):
            worker = senders[pipe]
            message = _received(pipe) if worker.ranks else None
            if isinstance(message, StepMessage):
                decided = worker.sharing.step(message.task, message.tokens)
                if decided:
                    self.say(f"{worker.place.partition(' (')[0]}: {decided}")
            elif message is not None:
                # beside others it is no fault of its batch
                was_shared = worker.sharing.was_shared(message.task)
                if message.outcome == "out_of_memory" and was_shared:
                    self.alone.add(message.task)
                    message = replace(message, outcome="lost")
                worker.end()
                if message.outcome not in ALIKE and len(worker.ranks) > 1:
                    worker.kill()
            found += [] if message is None else [message]
        return found
