"""Fitted curves -> the teachers that will do, the best one with its interval, and the curse.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from capgap.law.model import Floats, Posterior

Bools = NDArray[np.bool_]

Status = Literal["interior", "smallest", "largest", "flat", "too_few_points"]
Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Comparison:
    """Teachers of one curve beside each other, arrays [teachers]: what the curve says that each
    costs above the best in nats, its standard error, and whether that is beyond noise."""

    cost: Floats
    stderr: Floats
    worse: Bools


@dataclass(frozen=True)
class Placed:
    """Where a curve is lowest: ln T `value`, and draws [draws] of it within the grid.

    status: `interior`, both the smallest and the largest teacher are worse than the best beyond
    noise; `smallest`, `largest`, that one is not, so that the optimum may lie beyond it; `flat`,
    neither is. interval: of T in parameters, None for flat and an end that is None open.
    half_spacing: half the distance in ln T between the teachers around it.
    """

    status: Status
    teacher_parameters: float | None
    interval: Interval | None
    value: float
    half_spacing: float
    draws: Floats


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
    posterior: Posterior,
    curve: int,
    teachers: Floats,
    student: float,
    comparison: Comparison,
    confidence: float,
) -> Placed:
    """The optimum of a curve over `teachers`, in parameters.

    Its interval is never narrower than half the spacing of the grid to either side: between two
    teachers the shape of a curve is assumed, not measured.
    """
    logs = np.log(teachers)
    draws = posterior.lowest(curve, (logs[0] - np.log(student), logs[-1] - np.log(student)))
    draws = draws + np.log(student)
    mean = posterior.losses(curve, np.linspace(logs[0], logs[-1], 401) - np.log(student)).mean(0)
    best = float(np.linspace(logs[0], logs[-1], 401)[mean.argmin()])
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    half = half_spacing(logs, best)
    low, high = max(logs[0], min(low, best - half)), min(logs[-1], max(high, best + half))
    open_below, open_above = not comparison.worse[0], not comparison.worse[-1]
    status: Status = "interior"
    if open_below and open_above:
        return Placed("flat", None, None, best, half, draws)
    if open_below:
        status = "smallest"
    elif open_above:
        status = "largest"
    interval = (
        None if open_below else float(np.exp(low)),
        None if open_above else float(np.exp(high)),
    )
    return Placed(status, float(np.exp(best)), interval, best, half, draws)


def half_spacing(logs: Floats, place: float) -> float:
    """Half the distance between the teachers around `place`; on a teacher, the wider side."""
    gaps = np.diff(logs)
    near = 0.01 * gaps
    around = (logs[:-1] <= place + near) & (place - near <= logs[1:])
    return float(gaps[around].max() / 2)
