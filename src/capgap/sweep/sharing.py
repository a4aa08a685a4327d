"""How many tasks a GPU runs at once: one more as long as that is measured to gain."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Until models are compiled, from when the last task of those that run has begun its steps; then
# how long speeds are taken
SETTLE_SECONDS = 20.0
MEASURE_SECONDS = 20.0
# How much more work all together have to do than one fewer, for it to be worth the memory
GAIN = 1.1


@dataclass
class Sharing:
    """Of one GPU, on which at most `most` tasks run in `memory` bytes. `kept` at once are worth it,
    `allowed` may run now: so many, or one more that is tried.

    Tasks differ, so each is compared with itself: by the mean ratio of their tokens/s with n at
    once to those with n - 1, times n / (n - 1). What is settled holds until no task is left of
    those that it was measured with; of others that last as long one fewer is measured too.
    """

    most: int = 1
    memory: float = math.inf
    clock: Callable[[], float] = time.monotonic
    kept: int = 1
    is_settled: bool = False
    running: dict[str, float] = field(default_factory=dict)
    rates: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.allowed = self.kept
        self._is_proven = True
        self._beside: set[str] = set()
        self._tokens: dict[str, int] = {}

    def has_room(self, needs: float) -> bool:
        """For a task of so many bytes; for any, where it is alone."""
        if not self.running:
            return True
        taken = sum(self.running.values())
        return len(self.running) < self.allowed and taken + needs < self.memory

    def begin(self, task: str, needs: float) -> None:
        self._tokens.pop(task, None)
        self._beside.discard(task)
        self.running[task] = needs
        if len(self.running) > 1:
            self._beside |= self.running.keys()
        measured = {name for rates in self.rates.values() for name in rates}
        if measured and not self.running.keys() & measured:
            self.allowed = self.kept
            self.is_settled, self.rates, self._is_proven = False, {}, self.kept == 1
        self._anew()

    def end(self, task: str) -> None:
        del self.running[task]
        self._anew()

    def was_shared(self, task: str) -> bool:
        """Whether others ran beside it since it began, which it may have lacked the memory of."""
        return task in self._beside

    def _anew(self) -> None:
        """Speeds are taken from here on."""
        self._from = self.clock() + SETTLE_SECONDS
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def step(self, task: str, tokens: int) -> str | None:
        """Hears how far a task is; returns what was decided by it, if anything."""
        if tokens < self._tokens.get(task, math.inf):
            # it makes its first steps, or those of the next model of a chain
            for rates in self.rates.values():
                rates.pop(task, None)
            self._anew()
        self._tokens[task] = tokens
        now, number = self.clock(), len(self.running)
        is_whole = number == self.allowed and self.running.keys() <= self._tokens.keys()
        if self.is_settled or not is_whole or now < self._from:
            return None
        if now > self._first.setdefault(task, (now, tokens))[0]:
            self._last[task] = (now, tokens)
        if len(self._last) < number or now < self._from + MEASURE_SECONDS:
            return None
        speeds = {}
        for name, (began, first) in self._first.items():
            ended, last = self._last[name]
            speeds[name] = (last - first) / (ended - began)
        if not all(speeds.values()):
            # one did something else all the time
            self._anew()
            return None
        self.rates[number] = speeds
        return self._decide(number)

    def _decide(self, number: int) -> str | None:
        said = None
        self._anew()
        if number == self.kept and not self._is_proven:
            self.kept = self.allowed = number - 1
            self._is_proven = True
            return None
        if number > self.kept:
            gain = self._gain(number)
            if gain is None or gain < GAIN:
                # unknown where none of those measured before is left: these are, then it is tried
                self.allowed, self.is_settled = self.kept, gain is not None
            else:
                self.kept = number
            if gain is not None:
                said = f"{number} tasks at once do {gain:.2f} times the work of {number - 1}"
                said += f": {self.kept} from here on"
        if number == self.kept:
            more = self._gain(number + 1)
            self.is_settled = number == self.most or (more is not None and more < GAIN)
            self.allowed = number if self.is_settled else number + 1
        return said

    def _gain(self, number: int) -> float | None:
        """Work of so many to that of one fewer; None where no task ran in both."""
        now, before = self.rates.get(number, {}), self.rates.get(number - 1, {})
        ratios = [now[name] / before[name] for name in now.keys() & before.keys()]
        return statistics.mean(ratios) * number / (number - 1) if ratios else None
