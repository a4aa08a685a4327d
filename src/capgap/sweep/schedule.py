"""Which task runs next, on whatever runs tasks: processes of this machine, or a cluster's nodes.

Knows nothing of models or screens, and no clock but the one that it is given.
"""

import heapq
import math
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from capgap.errors import Interrupted, UserError
from capgap.leases import Leases
from capgap.sweep.cells import Task, Teacher, Work

Outcome = Literal["done", "stopped", "user_error", "crashed", "out_of_memory", "lost", "taken"]
# Where the tasks of a sweep run: processes of this machine, alone in the folder or beside others
# that share it; the nodes of a Ray cluster
Where = Literal["here", "shared", "ray"]
# How often a task is begun whose process, node or memory fails it
ATTEMPTS = 5
# Between two looks at what others have done in a folder that several work in
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class StepMessage:
    task: str
    tokens: int
    tokens_per_second: float
    loss: float | None


@dataclass(frozen=True)
class EndMessage:
    """How a task ended, and where. `seconds` are those of its stages, `busy` of the whole task;
    `peak_memory` is that of its process so far, in bytes."""

    task: str
    outcome: Outcome
    message: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    peak_memory: int = 0
    place: str = ""

    @property
    def cost(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("seconds", "busy", "peak_memory")}


@dataclass(frozen=True)
class Attempt:
    """A try that failed, for the records. `micro_batch_tokens`: what the next one takes at once,
    None for the recipe's."""

    task: str
    place: str
    outcome: Outcome
    reason: str
    micro_batch_tokens: int | None = None

    def sentence(self) -> str:
        """What happened, and what is done."""
        how = ""
        if self.outcome == "out_of_memory" and self.micro_batch_tokens is not None:
            how = f" with {self.micro_batch_tokens:,} tokens at once"
        what = self.outcome.replace("_", " ")
        return f"{self.task} on {self.place}: {what} ({self.reason}); tried again{how}"


class Engine(AbstractContextManager["Engine"]):
    """What runs tasks. Leaving it lets running ones save their state."""

    def __exit__(self, *exception: object) -> None:
        """There is nothing to end."""

    def start(self) -> None:
        """Begins what takes a while, where something does; `submit` does it otherwise."""

    @abstractmethod
    def has_place(self) -> bool:
        """Whether another task can begin now."""

    def fits(self, task: Task, micro_batch_tokens: int | None) -> bool:
        """Whether there is a place for this one, where places differ."""
        return True

    @abstractmethod
    def submit(self, task: Task, micro_batch_tokens: int | None) -> str:
        """Begins a task; returns where. UserError where nothing could ever run it."""

    @abstractmethod
    def messages(self) -> Sequence[StepMessage | EndMessage]:
        """What came since, after waiting for a moment; raises what ends the sweep."""

    def cancel(self, task: str) -> None:
        """Ends a running task, whose state others have; none where tasks hold their own leases."""


class Alone:
    """Whose a task is, as `Leases` tell it, where no process works in the folder but this one."""

    def take(self, task: str) -> bool:
        return True

    def release(self, task: str) -> None:
        pass

    def lost(self) -> set[str]:
        return set()


Claims = Alone | Leases


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


class _Waiting:
    """Tasks that have not begun: those whose needs are met, the costliest first, and the others.

    A grid has thousands: nothing here looks at all of them."""

    def __init__(self, tasks: Iterable[Task], finished: Collection[str]) -> None:
        # teachers first, since columns wait for them; then the longest, so that ends meet
        ordered = sorted(
            tasks, key=lambda one: (isinstance(one, Teacher), relative_cost(one)), reverse=True
        )
        self.tasks = {task.id: task for task in ordered}
        self._rank = {name: rank for rank, name in enumerate(self.tasks)}
        self._missing = {task.id: set(task.needs) - set(finished) for task in ordered}
        self._waits_for: dict[str, list[str]] = {}
        for name, missing in self._missing.items():
            for need in missing:
                self._waits_for.setdefault(need, []).append(name)
        self._ready = [(rank, name) for name, rank in self._rank.items() if not self._missing[name]]
        self._later: list[tuple[float, str]] = []

    def finish(self, need: str) -> None:
        """What only waited for it is ready."""
        for name in self._waits_for.pop(need, ()):
            self._missing[name].discard(need)
            if not self._missing[name] and name in self.tasks:
                heapq.heappush(self._ready, (self._rank[name], name))

    def next(self, now: float) -> Task | None:
        """Takes one that may begin."""
        while self._later and self._later[0][0] <= now:
            name = heapq.heappop(self._later)[1]
            heapq.heappush(self._ready, (self._rank[name], name))
        while self._ready:
            name = heapq.heappop(self._ready)[1]
            if name in self.tasks:
                return self.tasks.pop(name)
        return None

    def give_back(self, task: Task, when: float = -math.inf) -> None:
        """It may begin again, or not before a time."""
        self.tasks[task.id] = task
        heapq.heappush(self._later, (when, task.id))


@dataclass
class Schedule:
    """Runs tasks on an engine, each after those that it needs, the costliest first.

    is_done: whether a task is recorded, by whomever. micro_batch: what a task takes at once after
    it had no memory for more, None where it cannot be less. `attempts` are those that failed, from
    earlier sessions too. is_shared: other processes run tasks of the same folder.
    """

    engine: Engine
    claims: Claims
    is_done: Callable[[Task], bool]
    micro_batch: Callable[[int | None], int | None]
    should_stop: Callable[[], bool]
    on_start: Callable[[Task, str], None]
    on_step: Callable[[StepMessage], None]
    on_end: Callable[[Task, EndMessage], None]
    on_failure: Callable[[Attempt], None]
    attempts: list[Attempt] = field(default_factory=list)
    is_shared: bool = False
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._tries: Counter[str] = Counter()
        self._micro_batches = {one.task: one.micro_batch_tokens for one in self.attempts}

    def run(self, tasks: Iterable[Task], finished: set[str]) -> None:
        """Runs all tasks; `finished` (ids) grows with them.

        UserError if a task met a user's mistake or failed too often, RuntimeError with its
        traceback if it broke, Interrupted when `should_stop` said so, what the engine raises; the
        others save their state first.
        """
        waiting = _Waiting(tasks, finished)
        running: dict[str, Task] = {}

        def finish(name: str) -> None:
            finished.add(name)
            waiting.finish(name)

        def elsewhere(task: Task) -> None:
            finish(task.id)
            self.on_end(task, EndMessage(task.id, "taken"))

        if waiting.tasks:
            self.engine.start()
        looked = self.clock()
        while waiting.tasks or running:
            if self.should_stop():
                raise Interrupted
            while self.engine.has_place():
                task = waiting.next(self.clock())
                if task is None:
                    break
                micro_batch = self._micro_batches.get(task.id)
                fits = self.engine.fits(task, micro_batch)
                if not fits and not self.is_shared:
                    # smaller ones do not begin before it: it would wait for the last of them
                    waiting.give_back(task)
                    break
                # where others work too, one of them may be at it
                if not fits or not self.claims.take(task.id):
                    waiting.give_back(task, self.clock() + LOOK_SECONDS)
                elif self.is_shared and self.is_done(task):
                    self.claims.release(task.id)
                    elsewhere(task)
                else:
                    running[task.id] = task
                    self.on_start(task, self.engine.submit(task, micro_batch))
            for message in self.engine.messages():
                if isinstance(message, StepMessage):
                    self.on_step(message)
                elif message.task in running:
                    ended = running.pop(message.task)
                    if self._ended(ended, message):
                        finish(ended.id)
                    else:
                        waiting.give_back(ended, self.clock() + self._pause(message))
            if self.is_shared and self.clock() - looked > LOOK_SECONDS:
                looked = self.clock()
                for task in list(filter(self.is_done, waiting.tasks.values())):
                    del waiting.tasks[task.id]
                    elsewhere(task)
                for name in self.claims.lost() & running.keys():
                    self.engine.cancel(name)
                    waiting.give_back(running.pop(name))

    def _pause(self, message: EndMessage) -> float:
        """Seconds until a task is begun again: at once, then later and later, since what failed
        may be storage that will be back."""
        tries = self._tries[message.task]
        return LOOK_SECONDS if message.outcome == "taken" else LOOK_SECONDS * (2 ** (tries - 1) - 1)

    def _ended(self, task: Task, message: EndMessage) -> bool:
        """Whether it is done; raises where it should not be tried again."""
        self.on_end(task, message)
        self.claims.release(task.id)
        if message.outcome == "user_error":
            raise UserError(message.message)
        if message.outcome == "crashed":
            raise RuntimeError(f"{task.id} broke:\n{message.message}")
        if message.outcome in ("done", "taken"):
            return message.outcome == "done"
        before = self._micro_batches.get(task.id)
        smaller = self.micro_batch(before) if message.outcome == "out_of_memory" else before
        attempt = Attempt(task.id, message.place, message.outcome, message.message, smaller)
        self.attempts.append(attempt)
        self._micro_batches[task.id] = smaller
        self.on_failure(attempt)
        self._tries[task.id] += 1
        if message.outcome == "out_of_memory" and smaller is None:
            raise UserError(f"{task.id} has no memory for one window: {message.message}")
        if self._tries[task.id] >= ATTEMPTS:
            raise UserError(
                f"{task.id} failed {ATTEMPTS} times, at last on {message.place}: "
                f"{message.message}; the same command tries again"
            )
        return False
