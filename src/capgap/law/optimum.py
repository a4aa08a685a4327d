"""Fitted curves -> the teachers that will do, the best one with its interval, and the curse.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capgap.law.law import Interval, Optimum, Status
from capgap.law.lines import Best
from capgap.law.model import MIN_TEACHERS, Floats, Posterior

# by whether the smallest and the largest teacher will do, so that the best may lie beyond
STATUS: dict[tuple[bool, bool], Status] = {
    (False, False): "interior",
    (True, False): "smallest",
    (False, True): "largest",
    (True, True): "flat",
}


@dataclass(frozen=True)
class Comparison:
    """Teachers of one curve beside each other, arrays [teachers]: what the curve says that each
    costs above the best in nats, its standard error, and whether that is beyond noise."""

    cost: Floats
    stderr: Floats
    worse: NDArray[np.bool_]


def compare_teachers(losses: Sequence[Floats], confidence: float) -> list[Comparison]:
    """Of curves [draws, teachers] that one answer is given for.

    The best of several was picked for being low, and students of the same teachers err together: a
    difference is beyond noise where it exceeds, in its standard errors, the largest one that noise
    alone makes anywhere among them (as in Dunnett's test), so that the whole answer has the
    confidence.
    """
    largest = np.zeros(len(losses[0]))
    found = []
    for drawn in losses:
        mean = drawn.mean(axis=0)
        best = int(mean.argmin())
        errors = drawn - mean
        for other in {0, best, drawn.shape[1] - 1}:
            apart = errors - errors[:, [other]]
            spread = apart.std(axis=0)
            held = spread > 1e-12 * max(1.0, float(np.abs(mean).max()))
            if held.any():
                largest = np.maximum(largest, np.abs(apart[:, held] / spread[held]).max(axis=1))
        found.append((mean - mean[best], (errors - errors[:, [best]]).std(axis=0)))
    limit = float(np.quantile(largest, confidence))
    return [Comparison(cost, error, cost > limit * error) for cost, error in found]


def find_optimum(
    posterior: Posterior | None,
    curve: int,
    sizes: Sequence[int],
    teachers: Floats,
    student: float,
    lowest: int,
    comparison: Comparison | None,
    confidence: float,
) -> tuple[Optimum, Best | None]:
    """Where a curve over `teachers` (in parameters; asked for: `sizes`) is lowest, for the reader
    and for a law. lowest: which of them it is at; without a `comparison` there is nothing to say.

    The interval is never narrower than half the spacing of the grid to either side: between two
    teachers the shape of a curve is assumed, not measured.
    """
    logs = np.log(teachers)
    around = (
        float(teachers[lowest - 1]) if lowest > 0 else None,
        float(teachers[lowest + 1]) if lowest + 1 < len(logs) else None,
    )

    def optimum(status: Status, size: float | None, interval: Interval | None) -> Optimum:
        low, high = (None if end is None else end / student for end in interval or (None, None))
        return Optimum(
            status=status,
            teacher_parameters=size,
            interval=interval,
            ratio=None if size is None else size / student,
            ratio_interval=None if interval is None else (low, high),
            best=sizes[lowest],
            neighbours=around,
        )

    if posterior is None or comparison is None:
        return optimum("too_few_points", None, None), None
    if len(sizes) < MIN_TEACHERS:
        if None in around or not comparison.worse[[lowest - 1, lowest + 1]].all():
            return optimum("too_few_points", None, None), None
        # a bare minimum on the grid: anywhere between the neighbours
        low, high = float(logs[lowest - 1]), float(logs[lowest + 1])
        held = Best(student, logs, (low + high) / 2, None, (high - low) / 2)
        return optimum("too_few_points", None, around), held
    draws = posterior.lowest(curve, (logs[0] - np.log(student), logs[-1] - np.log(student)))
    draws = draws + np.log(student)
    fine = np.linspace(logs[0], logs[-1], 401)
    best = float(fine[posterior.losses(curve, fine - np.log(student)).mean(0).argmin()])
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    half = half_spacing(logs, best)
    low, high = max(logs[0], min(low, best - half)), min(logs[-1], max(high, best + half))
    opened = not comparison.worse[0], not comparison.worse[-1]
    status = STATUS[opened]
    held = Best(student, logs, best, draws, half, status == "flat")
    if status == "flat":
        return optimum(status, None, None), held
    interval = (
        None if opened[0] else float(np.exp(low)),
        None if opened[1] else float(np.exp(high)),
    )
    return optimum(status, float(np.exp(best)), interval), held


def half_spacing(logs: Floats, place: float) -> float:
    """Half the distance between the teachers around `place`; on a teacher, the wider side."""
    gaps = np.diff(logs)
    near = 0.01 * gaps
    around = (logs[:-1] <= place + near) & (place - near <= logs[1:])
    return float(gaps[around].max() / 2)
