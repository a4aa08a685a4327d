"""How many tasks a GPU runs at once: one more as long as that is measured to gain."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Until a task that begins has built and compiled its models; then how long speeds are taken
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
    those that it was measured with: later ones are smaller.
    """

    most: int = 1
    memory: float = math.inf
    clock: Callable[[], float] = time.monotonic
    kept: int = 1
    allowed: int = 1
    is_settled: bool = False
    running: dict[str, int] = field(default_factory=dict)
    rates: dict[int, dict[str, float]] = field(default_factory=dict)

    def has_room(self, needs: int) -> bool:
        """For a task of so many bytes; for any, where it is alone."""
        if not self.running:
            return True
        taken = sum(self.running.values())
        return len(self.running) < self.allowed and taken + needs <= self.memory

    def begin(self, task: str, needs: int) -> None:
        self.running[task] = needs
        if not self.running.keys() & {name for rates in self.rates.values() for name in rates}:
            self.is_settled, self.rates = False, {}
        self._anew()

    def end(self, task: str) -> None:
        del self.running[task]
        self._anew()

    def lacked_memory(self) -> bool:
        """After a task ended so: whether there were others, which now are enough."""
        if self.running:
            self.kept = self.allowed = len(self.running)
            self.is_settled = True
        return bool(self.running)

    def _anew(self) -> None:
        """Speeds are taken from here on."""
        self._from = self.clock() + SETTLE_SECONDS
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def step(self, task: str, tokens: int) -> str | None:
        """Hears how far a task is; returns what was decided by it, if anything."""
        now, number = self.clock(), len(self.running)
        if self.is_settled or number != self.allowed or now < self._from:
            return None
        if now > self._first.setdefault(task, (now, tokens))[0]:
            self._last[task] = (now, tokens)
        if len(self._last) < number or now < self._from + MEASURE_SECONDS:
            return None
        spans = {name: (one, self._last[name]) for name, one in self._first.items()}
        if any(end[1] <= begin[1] for begin, end in spans.values()):
            # the next model of a chain began to count anew
            self._anew()
            return None
        speeds = {n: (end[1] - begin[1]) / (end[0] - begin[0]) for n, (begin, end) in spans.items()}
        self.rates[number] = speeds
        return self._decide(number)

    def _decide(self, number: int) -> str | None:
        said = None
        self._anew()
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
