"""One curve -> its optimum, with an interval and a status.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from capgap.law.cells import Floats
from capgap.law.noise import Points
from capgap.law.smooth import SmoothCurve

EDGE = 1e-9
Status = Literal["interior", "smallest", "largest", "flat", "too_few_points"]
Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Optimum:
    """The best teacher of a curve.

    status:
        interior: the smallest and the largest teacher are both worse than the best one, beyond
            noise, and the interval reaches neither of them;
        smallest, largest: that end of the grid cannot be told from the optimum, which may lie
            beyond it; the interval is open there (None);
        flat: the teachers, or both ends of the grid, cannot be told from the best one;
        too_few_points: fewer than four teachers; nothing is fitted.
    interval: of T in parameters at the curve's confidence; None for flat. For too_few_points that
        of the cells alone, `grid_interval`, where the neighbours are worse beyond noise, else None.
    grid_best, grid_interval: the best cell as measured and its neighbours, all that a bare
        minimum on a grid can tell; always given, open (None) at an edge of the grid.
    half_spacing: half the distance in ln T between the teachers around the optimum.
    draws: ln T of the minimum of each resampled curve [resamples], clipped to the grid.
    """

    status: Status
    teacher_parameters: float | None
    interval: Interval | None
    grid_best: float
    grid_interval: Interval
    loss: float | None
    half_spacing: float
    draws: Floats | None


@dataclass(frozen=True)
class Curse:
    """Whether the largest teacher is worse than the best one, in nats per token."""

    largest_minus_best: float
    stderr: float | None  # None where the largest is the best
    beyond_noise: bool


@dataclass(frozen=True)
class Curve:
    """A curve with all that was concluded from it."""

    points: Points
    optimum: Optimum
    curse: Curse

    @property
    def student_parameters(self) -> int:
        return self.points.data.student_parameters


def fit_curve(points: Points, *, confidence: float) -> Curve:
    """Find the optimum of one curve.

    Its place is where the smooth curve (`smooth`) is lowest, its interval the percentile interval
    of the draws' minima within the grid. The interval is never narrower than half the spacing of
    the grid to either side: between two teachers the shape of a curve is assumed, not measured.
    """
    curse = _curse(points, confidence)
    if points.smooth is None:
        return Curve(points, _grid_optimum(points, confidence), curse)
    return Curve(points, _fitted_optimum(points, points.smooth, confidence), curse)


def worse_beyond_noise(points: Points, teacher: int, confidence: float) -> bool:
    """Whether this teacher is worse than the best one as measured, beyond noise.

    The best was picked for being low, so the difference is held against the largest difference
    to any teacher that noise alone makes (as in Dunnett's test), over the paired draws.
    """
    noise = points.measured - points.losses
    largest = (noise[:, [teacher]] - noise).max(axis=1)
    difference = points.losses[teacher] - points.losses.min()
    return bool(difference > np.quantile(largest, confidence))


def _fitted_optimum(points: Points, smooth: SmoothCurve, confidence: float) -> Optimum:
    data = points.data
    logs = np.log(data.teacher_parameters)
    student = float(np.log(data.student_parameters))
    gap, gap_draws = smooth.minimum()
    best, draws = gap + student, gap_draws + student
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    half = _half_spacing(logs, best)
    # what is drawn at an end has been cut off there
    open_below = low <= logs[0] + EDGE or not worse_beyond_noise(points, 0, confidence)
    last = data.num_teachers - 1
    open_above = high >= logs[-1] - EDGE or not worse_beyond_noise(points, last, confidence)
    low, high = max(logs[0], min(low, best - half)), min(logs[-1], max(high, best + half))
    status: Status = "interior"
    if (open_below and open_above) or not _teachers_differ(points, confidence):
        status = "flat"
    elif open_below:
        status = "smallest"
    elif open_above:
        status = "largest"
    cells = _grid_optimum(points, confidence)
    found = replace(cells, status=status, half_spacing=half, draws=draws)
    if status == "flat":
        return replace(found, interval=None)
    return replace(
        found,
        teacher_parameters=float(np.exp(best)),
        interval=(
            None if open_below else float(np.exp(low)),
            None if open_above else float(np.exp(high)),
        ),
        loss=float(smooth.losses(np.array([gap]))[0][0]),
    )


def _grid_optimum(points: Points, confidence: float) -> Optimum:
    """What the cells alone say: the best one, and that the optimum lies between its neighbours."""
    sizes, best = points.data.teacher_parameters, int(np.argmin(points.losses))
    around = [i for i in (best - 1, best + 1) if 0 <= i < len(sizes)]
    grid: Interval = (
        float(sizes[best - 1]) if best > 0 else None,
        float(sizes[best + 1]) if best + 1 < len(sizes) else None,
    )
    logs = np.log(sizes)
    located = bool(around) and all(worse_beyond_noise(points, i, confidence) for i in around)
    return Optimum(
        status="too_few_points",
        teacher_parameters=None,
        interval=grid if located else None,
        grid_best=float(sizes[best]),
        grid_interval=grid,
        loss=None,
        half_spacing=_half_spacing(logs, float(logs[best])) if around else 0.0,
        draws=None,
    )


def _half_spacing(logs: Floats, place: float) -> float:
    """Half the distance between the teachers around `place`; on a teacher, the wider side."""
    gaps = np.diff(logs)
    near = 0.01 * gaps
    around = (logs[:-1] <= place + near) & (place - near <= logs[1:])
    return float(gaps[around].max() / 2)


def _teachers_differ(points: Points, confidence: float) -> bool:
    """Whether the range of losses over the teachers exceeds what noise alone makes."""
    noise = points.measured - points.losses
    return bool(np.ptp(points.losses) > np.quantile(np.ptp(noise, axis=1), confidence))


def _curse(points: Points, confidence: float) -> Curse:
    best, last = int(np.argmin(points.losses)), points.data.num_teachers - 1
    if best == last:
        return Curse(0.0, None, False)
    difference = float(points.losses[last] - points.losses[best])
    stderr = float((points.measured[:, last] - points.measured[:, best]).std())
    # a curve called flat has no curse: both statements rest on the same test of all teachers
    beyond = _teachers_differ(points, confidence) and worse_beyond_noise(points, last, confidence)
    return Curse(difference, stderr, beyond)
