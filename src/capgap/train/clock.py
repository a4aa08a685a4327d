"""Where the time goes: seconds by stage."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Adds up seconds by stage; stages do not nest.

    A GPU works through what it was given long before, so there the time between two marks in its
    own queue counts: work, and waiting for the host. Nobody waits for the marks until the seconds
    are asked for.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._seconds: dict[str, float] = {}
        self._under_way: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, mark = time.perf_counter(), self._mark()
        try:
            yield
        finally:
            if mark is None:
                self._add(name, time.perf_counter() - start)
            else:
                self._under_way.append((name, mark, self._mark()))
                self._read(wait=False)

    @property
    def seconds(self) -> dict[str, float]:
        """Of all stages that have ended."""
        self._read(wait=True)
        return dict(self._seconds)

    def _mark(self) -> Any:
        """A point in the GPU's queue; None on a CPU."""
        if self._device.type != "cuda":
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _read(self, *, wait: bool) -> None:
        """Takes the stages that the GPU has come through, or waits for all."""
        while self._under_way and (wait or self._under_way[0][2].query()):
            name, start, end = self._under_way.popleft()
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
