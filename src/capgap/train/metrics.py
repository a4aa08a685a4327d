"""What a training step reports, taken off the device without making it wait."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.distill.losses import ColumnLoss
from capgap.train.learner import Learner

CURVE_POINTS = 60
# Sums over the labels of one step that count, kept on the device until they are read
SUMS = ("loss", "ce", "kl", "agreement", "teacher_ce", "teacher_entropy")
COLUMNS = (*SUMS, "counted", "gradient_norm")
OF_A_TEACHER = ("kl", "agreement", "teacher_ce", "teacher_entropy")
# Steps whose numbers are still under way: a CPU has no queue that waiting for them would empty
LAG = {"cpu": 0}


@dataclass(frozen=True)
class StepReport:
    """One learner's step: means in nats per counted label (`agreement` a share of them), None for
    what no teacher gave."""

    step: int
    tokens: int
    learning_rate: float
    gradient_norm: float
    loss: float
    ce: float
    kl: float | None
    agreement: float | None
    teacher_ce: float | None
    teacher_entropy: float | None


@dataclass(frozen=True)
class StepReports:
    """A step's reports by learner, and the seconds from the step before to it, None where they are
    not known."""

    seconds: float | None
    learners: dict[str, StepReport]


@dataclass(frozen=True)
class Taken:
    """A step that was taken, its numbers perhaps still on their way.

    `windows` are those of all ranks, in their order; `values` [ranks, learners, COLUMNS], the
    gradient norm being the same on all.
    """

    step: int
    tokens: int
    learners: Sequence[Learner]
    rates: Sequence[float]
    windows: NDArray[np.int64]
    values: "HostCopy"


class Reporter:
    """Reads the steps in order and keeps every learner's curve and failure."""

    def __init__(self, learners: Sequence[Learner], device: torch.device, teacher: bool) -> None:
        self.lag = LAG.get(device.type, 1)
        self.teacher = teacher
        self.sums = {learner.id: CurveSums() for learner in learners}
        self.unread: deque[Taken] = deque()
        self.read_at: float | None = None

    def add(self, taken: Taken) -> None:
        self.unread.append(taken)

    def read(self, *, all_steps: bool) -> list[StepReports]:
        """Takes the steps that have arrived; with `all_steps` it waits for those under way too."""
        found = []
        while len(self.unread) > (0 if all_steps else self.lag):
            taken = self.unread.popleft()
            reports: dict[str, StepReport] = {}
            rows = taken.values.read()
            now = time.perf_counter()
            seconds = None if self.read_at is None else now - self.read_at
            self.read_at = now
            for place, (learner, rate) in enumerate(zip(taken.learners, taken.rates, strict=True)):
                if learner.failure is not None:
                    continue
                report = self._report(learner, taken, rate, rows[:, place])
                if report is not None:
                    reports[learner.id] = report
            found.append(StepReports(seconds, reports))
        return found

    def _report(
        self, learner: Learner, taken: Taken, rate: float, rows: NDArray[np.float64]
    ) -> StepReport | None:
        """rows [ranks, COLUMNS]"""
        *sums, counted, _ = (float(value) for value in rows.sum(0))
        norm = float(rows[0, -1])
        # a batch in which no label counts has no loss
        counted = max(counted, 1.0)
        loss = sums[0] / counted
        if not (math.isfinite(loss) and math.isfinite(norm)):
            learner.failure = _failure(taken, rows[:, 0], loss, norm)
            return None
        has_teacher = self.teacher and learner.alpha > 0
        values = {
            name: value
            for name, value in zip(SUMS, sums, strict=True)
            if has_teacher or name not in OF_A_TEACHER
        }
        values |= {"gradient_norm": norm, "counted": counted}
        self._add_to_curve(learner, taken, rate, values)
        means = {name: values[name] / counted if name in values else None for name in SUMS}
        return StepReport(taken.step, taken.tokens, rate, norm, **means)  # type: ignore[arg-type]

    def _add_to_curve(
        self, learner: Learner, taken: Taken, rate: float, values: dict[str, float]
    ) -> None:
        so_far = self.sums[learner.id]
        so_far.add(values)
        every = max(1, learner.steps // CURVE_POINTS)
        done = taken.step + 1
        if done % every and done != learner.steps:
            return
        for column, value in so_far.means().items():
            learner.curve[column].append(value)
        learner.curve["step"].append(done)
        learner.curve["tokens"].append(done * taken.tokens)
        learner.curve["learning_rate"].append(rate)
        self.sums[learner.id] = CurveSums()


def _failure(taken: Taken, losses: NDArray[np.float64], loss: float, norm: float) -> dict[str, Any]:
    """The step, and the ranks and windows it came from: of all ranks where only the gradient, which
    all share, is not finite."""
    ranks = [rank for rank, one in enumerate(losses) if not math.isfinite(one)]
    ranks = ranks or list(range(len(losses)))
    shares = np.split(taken.windows, len(losses))
    where = "" if len(losses) == 1 else f" on rank {', '.join(map(str, ranks))}"
    return {
        "message": f"non-finite loss ({loss}) or gradient norm ({norm}){where}",
        "step": taken.step,
        "windows": [int(index) for rank in ranks for index in shares[rank]],
    }


def column_sums(column: ColumnLoss) -> Tensor:
    """What SUMS names and the labels that count, [students, SUMS and 1] in float64; 0 for what no
    teacher gave."""
    teacher = column.teacher
    rows = []
    for student in column.students:
        found = (
            student.loss.detach(),
            student.ce,
            student.kl,
            student.agreement,
            None if teacher is None else teacher.ce,
            None if teacher is None else teacher.entropy,
            column.tokens,
        )
        zero = torch.zeros_like(student.ce)
        rows.append(torch.stack([(zero if value is None else value).double() for value in found]))
    return torch.stack(rows)


class HostCopy:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self.arrived = None
        self.values = values
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
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def means(self) -> dict[str, float | None]:
        """Means per counted label, the gradient norm per step; None for what no teacher gave."""
        per_token = ("ce", "kl", "teacher_ce", "teacher_entropy", "agreement")
        means: dict[str, float | None] = {
            name: self.values[name] / self.values["counted"] if name in self.values else None
            for name in per_token
        }
        means["gradient_norm"] = self.values["gradient_norm"] / self.steps
        return means
