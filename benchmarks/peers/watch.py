"""Time and memory of the process that runs an engine."""

import time
from itertools import pairwise
from pathlib import Path

import torch


class Stopwatch:
    """The moments when steps ended, those of a GPU's work too."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.laps: list[tuple[float, float]] = []

    def lap(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.laps.append((time.perf_counter(), time.process_time()))

    def seconds(self, *, skip: int) -> dict[str, list[float]]:
        """Of every step after the first `skip`, at least one: of the wall, and of all threads."""
        wall, cpu = zip(*self.laps[skip - 1 :], strict=True)
        return {
            name: [end - start for start, end in pairwise(moments)]
            for name, moments in (("wall", wall), ("cpu", cpu))
        }


class MemoryMeter:
    """Bytes held when it is made, and the most held since: of a GPU, or of this process on Linux.

    What a process holds is its resident set; its high-water mark is set back at the start, so what
    building the models took does not count.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forgets what was held before."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            # 5 sets the mark of the resident set back (proc(5))
            Path("/proc/self/clear_refs").write_text("5")
            self.held = _status_bytes("VmRSS")

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
