"""What a training step reports, taken off the device without making it wait, and its seconds."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.distill.losses import ColumnLoss
from capgap.train.learner import OF_A_TEACHER, Learner

CURVE_POINTS = 60
# Sums over the labels of one step that count, kept on the device until they are read
SUMS = ("loss", "ce", "kl", "agreement", "teacher_ce", "teacher_entropy")
COLUMNS = (*SUMS, "counted", "gradient_norm")
# Steps whose numbers are still under way: a CPU has no queue that waiting for them would empty
LAG = {"cpu": 0}


@dataclass(frozen=True)
class StepReports:
    """A step of so many tokens, by learner: learning rate, gradient norm, and means of SUMS in nats
    per counted label (`agreement` a share of them), None for what no teacher gave. `seconds`: from
    the step before to it, None where they are not known."""

    step: int
    tokens: int
    seconds: float | None
    learners: dict[str, dict[str, float | None]]


@dataclass
class Taken:
    """A step that was taken, its numbers perhaps still on their way from the device.

    `windows` are those of all ranks, in their order; `values` [ranks, learners, COLUMNS], the
    gradient norm being the same on all.
    """

    step: int
    tokens: int
    learners: Sequence[Learner]
    rates: Sequence[float]
    windows: NDArray[np.int64]
    values: Tensor
    arrived: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        values = self.values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> NDArray[np.float64]:
        """Waits for these numbers alone, not for work that was given to the device after them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.numpy()


@dataclass
class CurveSums:
    """Sums over the steps since the curve's last point."""

    steps: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        self.steps += 1
        self.values |= {name: self.values.get(name, 0.0) + new for name, new in values.items()}

    def means(self) -> dict[str, float | None]:
        """Means per counted label, the gradient norm per step; None for what no teacher gave."""
        means: dict[str, float | None] = {
            name: self.values[name] / self.values["counted"] if name in self.values else None
            for name in ("ce", *OF_A_TEACHER)
        }
        return means | {"gradient_norm": self.values["gradient_norm"] / self.steps}


class Reporter:
    """Reads the steps in order and keeps every learner's curve and failure."""

    def __init__(self, learners: Sequence[Learner], device: torch.device, teacher: bool) -> None:
        self.lag = LAG.get(device.type, 1)
        self.teacher = teacher
        self.sums = {learner.id: CurveSums() for learner in learners}
        self.unread: deque[Taken] = deque()
        self.read_at: float | None = None

    def read(self, *, all_steps: bool) -> list[StepReports]:
        """Takes the steps that have arrived; with `all_steps` it waits for those under way too."""
        steps = []
        while len(self.unread) > (0 if all_steps else self.lag):
            taken = self.unread.popleft()
            values = taken.read()
            now = time.perf_counter()
            seconds = None if self.read_at is None else now - self.read_at
            self.read_at = now
            each = zip(taken.learners, taken.rates, values.swapaxes(0, 1), strict=True)
            reports = {
                learner.id: report
                for learner, rate, rows in each
                if (report := self._report(learner, taken, rate, rows)) is not None
            }
            steps.append(StepReports(taken.step, taken.tokens, seconds, reports))
        return steps

    def _report(
        self, learner: Learner, taken: Taken, rate: float, rows: NDArray[np.float64]
    ) -> dict[str, float | None] | None:
        """rows [ranks, COLUMNS]. None where the learner has failed, or fails at this step since its
        loss or gradient is not finite."""
        if learner.failure is not None:
            return None
        values = dict(zip(COLUMNS, rows.sum(0).tolist(), strict=True))
        norm = values["gradient_norm"] = float(rows[0, -1])
        # a batch in which no label counts has no loss
        counted = values["counted"] = max(values["counted"], 1.0)
        loss = values["loss"] / counted
        if not (math.isfinite(loss) and math.isfinite(norm)):
            learner.failure = _failure(taken, rows[:, 0], loss, norm)
            return None
        if not (self.teacher and learner.alpha > 0):
            for name in OF_A_TEACHER:
                del values[name]
        sums = self.sums[learner.id]
        sums.add(values)
        done = taken.step + 1
        if done % max(1, learner.steps // CURVE_POINTS) == 0 or done == learner.steps:
            point = {"step": done, "tokens": done * taken.tokens, "learning_rate": rate}
            for column, value in (sums.means() | point).items():
                learner.curve[column].append(value)
            self.sums[learner.id] = CurveSums()
        means = {name: values[name] / counted if name in values else None for name in SUMS}
        return {"learning_rate": rate, "gradient_norm": norm} | means


def _failure(taken: Taken, losses: NDArray[np.float64], loss: float, norm: float) -> dict[str, Any]:
    """The step, and the ranks and windows it came from: of all ranks where only the gradient, which
    all share, is not finite."""
    ranks = np.flatnonzero(~np.isfinite(losses)).tolist() or list(range(len(losses)))
    shares = np.split(taken.windows, len(losses))
    where = "" if len(losses) == 1 else f" on rank {', '.join(map(str, ranks))}"
    return {
        "message": f"non-finite loss ({loss}) or gradient norm ({norm}){where}",
        "step": taken.step,
        "windows": [int(index) for rank in ranks for index in shares[rank]],
    }


def column_sums(column: ColumnLoss) -> Tensor:
    """SUMS and the labels that count, [students, SUMS and 1] in float64; 0 for what no teacher
    gave."""
    teacher = column.teacher
    of_teacher = (None, None) if teacher is None else (teacher.ce, teacher.entropy)
    rows = []
    for one in column.students:
        values = (one.loss.detach(), one.ce, one.kl, one.agreement, *of_teacher, column.tokens)
        zero = torch.zeros_like(one.ce)
        rows.append(torch.stack([(zero if value is None else value).double() for value in values]))
    return torch.stack(rows)


class StageClock:
    """Adds up seconds by stage; stages do not nest.

    A GPU works through what it was given long before, so there the time between two marks in its
    own queue counts: work, and waiting for the host. Nobody waits for the marks until the seconds
    are asked for.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._seconds: dict[str, float] = defaultdict(float)
        self._under_way: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, mark = time.perf_counter(), self._mark()
        try:
            yield
        finally:
            if mark is None:
                self._seconds[name] += time.perf_counter() - start
            else:
                self._under_way.append((name, mark, self._mark()))
                self._read(wait=False)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of all stages that have ended."""
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
            self._seconds[name] += start.elapsed_time(end) / 1000
