"""Optima over students -> the linear law T* = a S + b and the ratio law T* = r S.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import log_ndtr
from scipy.stats import chi2

from capgap.law.cells import Floats, Kind
from capgap.law.curve import Curve, Optimum

# A slope known to worse than this factor between the ends of its interval answers nothing: it
# could not even tell half the published slope from twice it.
WIDEST_SLOPE_FACTOR = 4.0
BAND_POINTS = 25
# Scatter about the law that noise alone makes less often than this widens its intervals
SCATTER_CONFIDENCE = 0.9


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Band:
    """The line over students, all in parameters, at the law's confidence."""

    student: Floats
    low: Floats
    mid: Floats
    high: Floats


@dataclass(frozen=True)
class LinearLaw:
    """The law of one kind of curves.

    `slope`, `intercept` and `band` are None where fewer than three students say anything, or
    fewer than two have their optimum inside the grid; `ratio` is None where none has.
    `students` counts the students that entered: optima inside the grid and at an edge.
    """

    kind: Kind
    status: Literal["identified", "not_identified"]
    reason: str
    students: int
    slope: Estimate | None
    intercept: Estimate | None
    ratio: Estimate | None
    band: Band | None


@dataclass(frozen=True)
class Evidence:
    """Located optima, and bounds for those at an edge of the grid.

    `optima` [1 + resamples, located] in parameters, the estimate itself in the first row;
    `deviation` and `bound_deviation` are standard deviations in parameters; `side` is +1 where
    the optimum lies below its bound and -1 where it lies above.
    """

    students: Floats
    optima: Floats
    deviation: Floats
    bound_students: Floats
    bounds: Floats
    bound_deviation: Floats
    side: Floats


def fit_linear(curves: Sequence[Curve], *, confidence: float, grid_shift: Floats) -> LinearLaw:
    """Fit the optima of the curves of one kind, by maximum likelihood with a normal error in
    proportion to T; an optimum at an edge of the grid enters as a bound (censored).

    Intervals come from the draws of the optima. Where a curve's own draws are narrower than what
    the grids of all students resolve (`shared_resolution`), `grid_shift` (uniform on -1..1,
    [resamples]) moves its optimum within half a spacing, for all students at once: students cut at
    the same fractions share the cells of their grids, so averaging over students does not make up
    for a coarse grid. A bare minimum among too few teachers lies anywhere between its neighbours.
    Where the optima scatter about the law by more than their noise, intervals widen to match.
    """
    evidence = gather_evidence(curves, confidence, grid_shift)
    located, bounded = len(evidence.students), len(evidence.bounds)
    ratio = _ratio(evidence, confidence) if located else None
    kind, students = curves[0].points.data.kind, located + bounded
    if located < 2 or students < 3:
        reason = _too_few(curves)
        return LinearLaw(kind, "not_identified", reason, students, None, None, ratio, None)

    draws = fit_draws(evidence, intercept=True)
    slope = to_estimate(draws[:, 0], confidence)
    intercept = to_estimate(draws[:, 1], confidence)
    band = _band(evidence, draws, confidence)
    written = f"the slope is {slope.value:.2f} with interval {slope.low:.2f} to {slope.high:.2f}"
    if slope.low <= 0:
        status, reason = "not_identified", f"{written}, which includes zero"
    elif slope.high > WIDEST_SLOPE_FACTOR * slope.low:
        status, reason = "not_identified", f"{written}, too wide to tell one line from another"
    else:
        status, reason = "identified", f"{written}, from {_counted(curves)}"
    return LinearLaw(
        kind,
        "identified" if status == "identified" else "not_identified",
        reason,
        students,
        slope,
        intercept,
        ratio,
        band,
    )


def gather_evidence(curves: Sequence[Curve], confidence: float, grid_shift: Floats) -> Evidence:
    tail = (1 - confidence) / 2
    shared = shared_resolution(curves)
    students, optima, deviation = [], [], []
    bound_students, bounds, bound_deviation, side = [], [], [], []
    for curve in curves:
        optimum = curve.optimum
        if optimum.interval is None:
            continue
        low, high = optimum.interval
        if low is not None and high is not None:
            best, logs = _located(optimum, tail, shared, grid_shift)
            students.append(curve.student_parameters)
            optima.append(np.concatenate([[best], np.exp(logs)]))
            deviation.append(best * float(logs.std()))
        elif (bound := high if low is None else low) is not None:
            bound_students.append(curve.student_parameters)
            bounds.append(bound)
            bound_deviation.append(bound * optimum.half_spacing)
            side.append(1.0 if low is None else -1.0)
    return Evidence(
        students=np.array(students, dtype=np.float64),
        optima=np.array(optima).T if optima else np.empty((1 + len(grid_shift), 0)),
        deviation=np.array(deviation),
        bound_students=np.array(bound_students, dtype=np.float64),
        bounds=np.array(bounds),
        bound_deviation=np.array(bound_deviation),
        side=np.array(side),
    )


def _located(
    optimum: Optimum, tail: float, shared: float, grid_shift: Floats
) -> tuple[float, Floats]:
    """T* in parameters and draws of ln T*."""
    if optimum.draws is None or optimum.teacher_parameters is None:
        # a bare minimum on the grid: anywhere between the neighbours
        assert optimum.interval is not None
        low, high = np.log(np.array(optimum.interval, dtype=float))
        middle = (low + high) / 2
        return float(np.exp(middle)), middle + grid_shift * (high - low) / 2
    ends = np.quantile(optimum.draws, [tail, 1 - tail])
    resolution = shared * optimum.half_spacing
    own = float(ends[1] - ends[0]) / 2
    unsupported = np.sqrt(max(0.0, resolution**2 - own**2))
    return optimum.teacher_parameters, optimum.draws + unsupported * grid_shift


def shared_resolution(curves: Sequence[Curve]) -> float:
    """The share of half a grid's spacing by which the optima of all students could be off together:
    1 where their cells stand at the same T/S, 0 where they are staggered over half a spacing.

    Between two teachers the shape of a curve is assumed, and a wrong shape moves the optimum by
    an amount that depends on where it lies between them. Where that is the same place for every
    student, the scatter of the optima cannot show it and more students do not average it out.
    """
    located = [curve for curve in curves if curve.optimum.draws is not None]
    located = [curve for curve in located if curve.optimum.status == "interior"]
    if not located:
        return 1.0
    ratios = [
        np.log(curve.points.data.teacher_parameters / curve.student_parameters) for curve in located
    ]
    middle = np.mean(
        [
            np.log((curve.optimum.teacher_parameters or 1.0) / curve.student_parameters)
            for curve in located
        ]
    )
    # where the common ratio lies between two teachers, 0 to 1 in each student's own grid; a circle,
    # because on a teacher and just below it are neighbours
    places = np.sort(
        [np.interp(middle, own, np.arange(len(own), dtype=float)) % 1.0 for own in ratios]
    )
    gaps = np.diff(places, append=places[0] + 1.0)
    return float(max(0.0, 2 * gaps.max() - 1))


def fit_draws(evidence: Evidence, *, intercept: bool) -> Floats:
    """Coefficients [1 + resamples, 1 or 2] (slope, then intercept), the estimate first.

    Expectation-maximisation: an optimum known only by a bound stands at its expected place given
    the line, then the line is fitted again. It starts at the fit of the located optima, which is
    already the answer where the line keeps to all bounds.
    """
    # students in units of the largest one keep the normal equations well scaled
    unit = max(evidence.students.max(), evidence.bound_students.max(initial=0.0))
    located = _design(evidence.students / unit, intercept)
    bounded = _design(evidence.bound_students / unit, intercept)
    coefficients: Floats = evidence.optima @ _weighted_solve(located, evidence.deviation).T
    if len(evidence.bounds):
        solve = _weighted_solve(
            np.vstack([located, bounded]),
            np.concatenate([evidence.deviation, evidence.bound_deviation]),
        )
        for _ in range(2000):
            places = _expected_places(evidence, coefficients @ bounded.T)
            updated = np.hstack([evidence.optima, places]) @ solve.T
            change = np.abs(updated - coefficients).max()
            coefficients = updated
            if change < 1e-7 * np.abs(coefficients).max():
                break
    free = len(evidence.students) - located.shape[1]
    if free > 0:
        residuals = (evidence.optima[0] - located @ coefficients[0]) / evidence.deviation
        scatter = float(residuals @ residuals)
        if scatter > chi2.ppf(SCATTER_CONFIDENCE, free):
            widened = np.sqrt(scatter / free) * (coefficients - coefficients[0])
            coefficients = coefficients[0] + widened
    return coefficients / np.array([unit, 1.0])[: coefficients.shape[1]]


def _expected_places(evidence: Evidence, line: Floats) -> Floats:
    """Mean of a normal about the line [draws, bounded], cut off at each bound."""
    z = evidence.side * (evidence.bounds - line) / evidence.bound_deviation
    log_density = -0.5 * z * z - 0.5 * np.log(2 * np.pi)
    return line - evidence.side * evidence.bound_deviation * np.exp(log_density - log_ndtr(z))


def _design(students: Floats, intercept: bool) -> Floats:
    columns = [students, np.ones_like(students)] if intercept else [students]
    return np.stack(columns, axis=1)


def _weighted_solve(design: Floats, deviation: Floats) -> Floats:
    return np.linalg.pinv(design / deviation[:, None]) / deviation


def _ratio(evidence: Evidence, confidence: float) -> Estimate:
    return to_estimate(fit_draws(evidence, intercept=False)[:, 0], confidence)


def to_estimate(draws: Floats, confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws[1:], [tail, 1 - tail])
    return Estimate(float(draws[0]), float(low), float(high))


def _band(evidence: Evidence, draws: Floats, confidence: float) -> Band:
    students = np.concatenate([evidence.students, evidence.bound_students])
    grid = np.geomspace(students.min(), students.max(), BAND_POINTS)
    lines = draws[:, :1] * grid + draws[:, 1:]
    tail = (1 - confidence) / 2
    low, high = np.quantile(lines[1:], [tail, 1 - tail], axis=0)
    return Band(grid, low, lines[0], high)


def _counted(curves: Sequence[Curve]) -> str:
    words: dict[Any, str] = {
        "interior": "with the optimum inside the grid",
        "smallest": "with it at the smallest teacher",
        "largest": "with it at the largest teacher",
        "flat": "flat within noise",
        "too_few_points": "with too few teachers",
    }
    counts = Counter(curve.optimum.status for curve in curves)
    parts = [f"{counts[status]} {text}" for status, text in words.items() if counts[status]]
    total = len(curves)
    return f"{total} student{'s' if total > 1 else ''}: " + ", ".join(parts)


def _too_few(curves: Sequence[Curve]) -> str:
    return (
        "a line needs at least three students, two of them with the optimum inside the grid; "
        f"here are {_counted(curves)}"
    )
