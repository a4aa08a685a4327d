"""One curve -> its optimum, with an interval and a status.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from capgap.law.cells import Floats
from capgap.law.noise import MIN_TEACHERS, Points, log_sizes, point_weights, quadratic

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
    interval: of T in parameters at the curve's confidence; None for flat and too_few_points.
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
    coefficients: Floats | None  # c0, c1, c2 of loss = c0 + c1 u + c2 u^2
    center_log: float  # u = ln T - center_log
    optimum: Optimum
    curse: Curse

    @property
    def student_parameters(self) -> int:
        return self.points.data.student_parameters


def fit_curve(points: Points, *, confidence: float) -> Curve:
    """Smooth one curve in ln T and find its optimum.

    A quadratic in ln T is fitted by least squares, weighted by the number of runs, to the points
    and to every draw of them; the interval is the percentile interval of the minima, clipped to
    the grid. It is never narrower than half the spacing of the grid to either side: between two
    teachers the shape of the curve is assumed, not measured.
    """
    u, center = log_sizes(points.data)
    curse = _curse(points, confidence)
    coefficients = None
    if points.data.num_teachers < MIN_TEACHERS:
        optimum = _grid_optimum(points)
    else:
        solve = quadratic(u, point_weights(points.data))
        coefficients = solve @ points.losses
        best = float(_minimum(coefficients[None], u)[0])
        draws = _minimum(points.smooth @ solve.T, u)
        optimum = _fitted_optimum(points, coefficients, best, draws, confidence)
    return Curve(points, coefficients, center, optimum, curse)


def worse_beyond_noise(points: Points, teacher: int, confidence: float) -> bool:
    """Whether this teacher is worse than the best one as measured, beyond noise.

    The best was picked for being low, so the difference is held against the largest difference
    to any teacher that noise alone makes (as in Dunnett's test), over the paired draws.
    """
    noise = points.measured - points.losses
    largest = (noise[:, [teacher]] - noise).max(axis=1)
    difference = points.losses[teacher] - points.losses.min()
    return bool(difference > np.quantile(largest, confidence))


def _minimum(coefficients: Floats, u: Floats) -> Floats:
    """Where each parabola [draws, 3] is lowest within the range of u: [draws]."""
    c1, c2 = coefficients[:, 1], coefficients[:, 2]
    low, high = u[0], u[-1]
    rising = c1 * (high - low) + c2 * (high**2 - low**2) > 0
    convex = c2 > 0
    vertex = -c1 / np.where(convex, 2 * c2, 1.0)
    return np.where(convex, np.clip(vertex, low, high), np.where(rising, low, high))


def _fitted_optimum(
    points: Points, coefficients: Floats, best: float, draws: Floats, confidence: float
) -> Optimum:
    u, center = log_sizes(points.data)
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    half = _half_spacing(u, best)
    last = points.data.num_teachers - 1
    open_below = low <= u[0] or not worse_beyond_noise(points, 0, confidence)
    open_above = high >= u[-1] or not worse_beyond_noise(points, last, confidence)
    low, high = max(u[0], min(low, best - half)), min(u[-1], max(high, best + half))
    status: Status = "interior"
    if (open_below and open_above) or not _teachers_differ(points, confidence):
        status = "flat"
    elif open_below:
        status = "smallest"
    elif open_above:
        status = "largest"
    grid = _grid_optimum(points)
    if status == "flat":
        return Optimum(
            "flat", None, None, grid.grid_best, grid.grid_interval, None, half, draws + center
        )
    return Optimum(
        status=status,
        teacher_parameters=float(np.exp(best + center)),
        interval=(
            None if open_below else float(np.exp(low + center)),
            None if open_above else float(np.exp(high + center)),
        ),
        grid_best=grid.grid_best,
        grid_interval=grid.grid_interval,
        loss=float(coefficients @ [1.0, best, best**2]),
        half_spacing=half,
        draws=draws + center,
    )


def _grid_optimum(points: Points) -> Optimum:
    """What the cells alone say: the best one, and that the optimum lies between its neighbours."""
    sizes, best = points.data.teacher_parameters, int(np.argmin(points.losses))
    below = float(sizes[best - 1]) if best > 0 else None
    above = float(sizes[best + 1]) if best + 1 < len(sizes) else None
    u, _ = log_sizes(points.data)
    half = _half_spacing(u, float(u[best])) if len(sizes) > 1 else 0.0
    return Optimum(
        "too_few_points", None, None, float(sizes[best]), (below, above), None, half, None
    )


def _half_spacing(u: Floats, place: float) -> float:
    """Half the distance between the teachers around `place`; on a teacher, the wider side."""
    gaps = np.diff(u)
    tolerance = 1e-9
    around = (u[:-1] <= place + tolerance) & (place - tolerance <= u[1:])
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
