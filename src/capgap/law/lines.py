"""Curves -> the teachers that will do, the best one of each student, and the laws over students:
T* = a S + b, T* = r S and T* = k S^m.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas
from scipy.special import log_ndtr
from scipy.stats import chi2

from capgap.law.data import CURVE
from capgap.law.law import Band, Estimate, Group, Interval, Line, Optimum, Point, Refusal, Status
from capgap.law.model import MIN_TEACHERS, Floats, Integers, Posterior

# Status by whether the smallest and the largest teacher will do, so that the best may lie beyond
STATUS: dict[tuple[bool, bool], Status] = {
    (False, False): "interior",
    (True, False): "smallest",
    (False, True): "largest",
    (True, True): "flat",
}
# A slope known to worse than this factor between the ends of its interval answers nothing: it
# could not even tell half the published slope from twice it.
WIDEST_SLOPE_FACTOR = 4.0
BAND_POINTS = 25
# Scatter about the law that noise alone makes less often than this widens its intervals
SCATTER_CONFIDENCE = 0.9
# Share of half a spacing that even staggered grids do not resolve: a kink at the optimum, or a
# shape that changes with the student, moves the optima by about as much, and no scatter shows it
UNKNOWN_SHAPE = 0.3
Form = Literal["linear", "ratio", "power"]
FORMS: tuple[Form, ...] = get_args(Form)


class Ladder:
    """The teachers of a curve: of each the rows of the table, and its size as asked for and as
    reached, with ln(T/S) of the reached one."""

    def __init__(self, rows: pandas.DataFrame) -> None:
        by_teacher = rows.groupby("teacher_size")
        self.rows: list[Integers] = [own.index.to_numpy() for _, own in by_teacher]
        self.sizes = [int(size) for size, _ in by_teacher]
        self.teachers: Floats = by_teacher["teacher_parameters"].mean().to_numpy(float)
        # students cut out of different teachers may differ by the 2% that a shape can miss
        self.student = float(rows["student_parameters"].mean())
        self.gaps: Floats = np.log(self.teachers / self.student)
        self.key: dict[str, Any] = rows[CURVE].head(1).to_dict("records")[0]


@dataclass(frozen=True)
class Best:
    """The best teacher of one student, for a law.

    teachers: ln T of its grid, ascending. value: ln T*; draws [draws] of it, within the grid: one
    at an end says only that T* is not inside. Without a curve `draws` is None, and T* lies within
    `half` of the value. half: half the grid's spacing around it. is_flat: whether neither end of
    the grid is worse, beyond noise.
    """

    student: float
    teachers: Floats
    value: float
    draws: Floats | None
    half: float
    is_flat: bool = False


# What a teacher costs above the best in nats, its standard error, whether that is beyond noise
Cost = tuple[float | None, float | None, bool]
UNKNOWN: Cost = (None, None, False)


def compare_teachers(losses: Sequence[Floats], confidence: float) -> list[list[Cost]]:
    """The teachers of each curve [draws, teachers] of several that one answer is given for.

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
    return [
        [(cost, error, cost > limit * error) for cost, error in np.transpose(own).tolist()]
        for own in found
    ]


def find_optimum(
    posterior: Posterior | None,
    curve: int,
    own: Ladder,
    points: Sequence[Point],
    confidence: float,
) -> tuple[Optimum, Best | None]:
    """Where a curve is lowest, for the reader and for a law; without a posterior nothing is known.

    The interval is never narrower than half the spacing of the grid to either side: between two
    teachers the shape of a curve is assumed, not measured.
    """
    logs, middle = np.log(own.teachers), np.log(own.student)
    worse = [point.worse for point in points]
    lowest = int(np.argmin([p.loss if p.cost is None else p.cost for p in points]))
    places = [None, *own.teachers.tolist(), None]
    around = places[lowest], places[lowest + 2]

    def optimum(
        status: Status, size: float | None = None, interval: Interval | None = None
    ) -> Optimum:
        low, high = (None if end is None else end / own.student for end in interval or (None, None))
        return Optimum(
            status=status,
            teacher_parameters=size,
            interval=interval,
            ratio=None if size is None else size / own.student,
            ratio_interval=None if interval is None else (low, high),
            best=own.sizes[lowest],
            neighbours=around,
        )

    if posterior is None:
        return optimum("too_few_points"), None
    if len(points) < MIN_TEACHERS:
        if None in around or not (worse[lowest - 1] and worse[lowest + 1]):
            return optimum("too_few_points"), None
        # a bare minimum on the grid: anywhere between the neighbours
        low, high = float(logs[lowest - 1]), float(logs[lowest + 1])
        best = Best(own.student, logs, (low + high) / 2, None, (high - low) / 2)
        return optimum("too_few_points", interval=around), best
    draws = posterior.lowest(curve, (logs[0] - middle, logs[-1] - middle)) + middle
    fine = np.linspace(logs[0], logs[-1], 401)
    value = float(fine[posterior.losses(curve, fine - middle).mean(0).argmin()])
    # half the distance between the teachers around it; on a teacher, the wider side
    gaps = np.diff(logs)
    near = (logs[:-1] <= value + 0.01 * gaps) & (value - 0.01 * gaps <= logs[1:])
    half = float(gaps[near].max() / 2)
    opened = not worse[0], not worse[-1]
    status = STATUS[opened]
    best = Best(own.student, logs, value, draws, half, status == "flat")
    if status == "flat":
        return optimum(status), best
    low, high = interval_of(draws, confidence)
    ends = max(logs[0], min(low, value - half)), min(logs[-1], max(high, value + half))
    low_end, high_end = (
        None if is_open else float(np.exp(end)) for is_open, end in zip(opened, ends, strict=True)
    )
    return optimum(status, float(np.exp(value)), (low_end, high_end)), best


def fit_line(
    group: Group, found: Sequence[Best], *, confidence: float, rng: np.random.Generator, draws: int
) -> Line:
    """The laws of a group of students, by least squares weighted by what is known of each optimum;
    one at an end of its grid enters as a bound (censored).

    Intervals come from the draws. Where the optima scatter about the law by more than their noise,
    they widen to match.
    """
    evidence = gather(found, rng, draws) if found else None
    flat = np.array([one.is_flat for one in found], dtype=bool)
    located = 0 if evidence is None else int(((evidence.side[0] == 0) & ~flat).sum())
    bounded = len(found) - located
    empty = Line(group=group, refused="too_few_students", located=located, bounded=bounded)
    if evidence is None or not located:
        return empty
    by_form = {form: _coefficients(evidence, form) for form in FORMS}
    ratio = to_estimate(by_form["ratio"][:, 0], confidence)
    if located < 2 or len(found) < 3:
        return empty.model_copy(update={"ratio": ratio})
    slope = to_estimate(by_form["linear"][:, 0], confidence)
    refused: Refusal | None = None
    if slope.low <= 0:
        refused = "includes_zero"
    elif slope.high > WIDEST_SLOPE_FACTOR * slope.low:
        refused = "too_wide"
    errors = {form: _prediction_error(evidence, form) for form in FORMS}
    grid = np.geomspace(evidence.students.min(), evidence.students.max(), BAND_POINTS)
    lines = by_form["linear"][:, :1] * grid + by_form["linear"][:, 1:]
    low, high = interval_of(lines[1:], confidence).tolist()
    return Line(
        group=group,
        refused=refused,
        located=located,
        bounded=bounded,
        slope=slope,
        intercept=to_estimate(by_form["linear"][:, 1], confidence),
        ratio=ratio,
        exponent=to_estimate(by_form["power"][:, 0], confidence),
        # students of nearly one size leave it to any power of ten
        factor=to_estimate(np.exp(np.clip(by_form["power"][:, 1], -600, 600)), confidence),
        prediction_errors={form: error for form, error in errors.items() if error is not None},
        band=Band(student=grid.tolist(), low=low, mid=lines[0].tolist(), high=high),
    )


@dataclass(frozen=True)
class Evidence:
    """Arrays [1 + draws, students], the estimate itself in the first row: ln T*, and whether it
    stands at an end, +1 at the smallest teacher (T* is below) and -1 at the largest, else 0.
    students in parameters, deviation [students] of ln T*."""

    students: Floats
    optima: Floats
    side: Floats
    deviation: Floats


def gather(found: Sequence[Best], rng: np.random.Generator, draws: int) -> Evidence:
    """Draws of the optima, with what the grids do not resolve.

    Where a student's own draws are narrower than its grid, the optimum moves within half a spacing:
    by one amount for all students, because students cut at the same fractions share the cells of
    their grids, and by one of each student's own, because the best cell of each may hide another
    optimum. Where grids are staggered, the students' scatter shows most of it already.
    """
    share = max(UNKNOWN_SHAPE, shared_resolution(found))
    together = rng.uniform(-1, 1, draws)
    optima, side, deviation = [], [], []
    for one in found:
        apart = np.clip(together + rng.uniform(-1, 1, draws), -1, 1)
        low, high = float(one.teachers[0]), float(one.teachers[-1])
        if one.draws is None:
            drawn = one.value + one.half * apart
        else:
            own = float(np.subtract(*np.quantile(one.draws, [0.95, 0.05]))) / 2
            unsupported = np.sqrt(max(0.0, (share * one.half) ** 2 - own**2))
            inside = (one.draws > low + 1e-9) & (one.draws < high - 1e-9)
            drawn = np.where(inside, one.draws + unsupported * apart, one.draws)
        row = np.concatenate([[one.value], drawn])
        optima.append(row)
        side.append(np.where(row <= low + 1e-9, 1.0, np.where(row >= high - 1e-9, -1.0, 0.0)))
        deviation.append(max(float(drawn.std()), 0.05 * one.half, 1e-6))
    return Evidence(
        np.array([one.student for one in found]),
        np.array(optima).T,
        np.array(side).T,
        np.array(deviation),
    )


def shared_resolution(found: Sequence[Best]) -> float:
    """The share of half a grid's spacing by which the optima of all students could be off together:
    1 where their cells stand at the same T/S, 0 where they are staggered over half a spacing.

    Between two teachers the shape of a curve is assumed, and a wrong shape moves the optimum by
    an amount that depends on where it lies between them. Where that is the same place for every
    student, the scatter of the optima cannot show it and more students do not average it out.
    """
    smooth = [one for one in found if one.draws is not None]
    smooth = [one for one in smooth if one.teachers[0] < one.value < one.teachers[-1]]
    if not smooth:
        return 1.0
    middle = np.mean([one.value - np.log(one.student) for one in smooth])
    # where the common ratio lies between two teachers, 0 to 1 in each student's own grid; a circle,
    # because on a teacher and just below it are neighbours
    places = np.sort(
        [
            np.interp(middle, one.teachers - np.log(one.student), np.arange(len(one.teachers))) % 1
            for one in smooth
        ]
    )
    gaps = np.diff(places, append=places[0] + 1.0)
    return float(max(0.0, 2 * gaps.max() - 1))


def _coefficients(evidence: Evidence, form: Form) -> Floats:
    """[1 + draws, coefficients]: slope and intercept, ratio, or exponent and ln factor."""
    optima, deviation, students = evidence.optima, evidence.deviation, evidence.students
    if form == "power":
        middle = float(np.log(students).mean())
        # about the mean, where slope and height do not trade off
        design = np.stack([np.log(students) - middle, np.ones_like(students)], axis=1)
        found = _regress(design, optima, evidence.side, deviation)
        return np.stack([found[:, 0], found[:, 1] - found[:, 0] * middle], axis=1)
    if form == "ratio":
        logs = optima - np.log(students)
        found = _regress(np.ones((len(students), 1)), logs, evidence.side, deviation)
        return np.asarray(np.exp(found))
    # in units of the largest student the normal equations are well scaled
    unit = students.max()
    design = np.stack([students / unit, np.ones_like(students)], axis=1)
    sizes = np.exp(optima)
    found = _regress(design, sizes, evidence.side, deviation * sizes[0])
    return found / np.array([unit, 1.0])


def _regress(design: Floats, values: Floats, side: Floats, deviation: Floats) -> Floats:
    """Weighted least squares of each row of values [draws, students], those beside an end censored.

    Expectation-maximisation: a value known only by a bound stands at its expected place given the
    line, then the line is fitted again.
    """
    solve = np.linalg.pinv(design / deviation[:, None]) / deviation
    found: Floats = values @ solve.T
    rows = np.flatnonzero((side != 0).any(axis=1))
    bounds, held = values[rows], side[rows]
    for _ in range(1000):
        if not len(rows):
            break
        line = found[rows] @ design.T
        z = held * (bounds - line) / deviation
        mills = np.exp(-0.5 * z * z - 0.5 * np.log(2 * np.pi) - log_ndtr(z))
        expected = np.where(held != 0, line - held * deviation * mills, bounds)
        updated = expected @ solve.T
        change = np.abs(updated - found[rows]).max()
        found[rows] = updated
        if change < 1e-7 * np.abs(updated).max():
            break
    free = int((side[0] == 0).sum()) - design.shape[1]
    if free > 0:
        residuals = ((values[0] - design @ found[0]) / deviation)[side[0] == 0]
        scatter = float(residuals @ residuals)
        if scatter > chi2.ppf(SCATTER_CONFIDENCE, free):
            found = found[0] + np.sqrt(scatter / free) * (found - found[0])
    return found


def _prediction_error(evidence: Evidence, form: Form) -> float | None:
    """Every located student predicted from the others; None with fewer than three."""
    located = np.flatnonzero(evidence.side[0] == 0)
    if len(located) < 3:
        return None
    errors = []
    for left_out in located:
        rest = np.arange(len(evidence.students)) != left_out
        others = Evidence(
            evidence.students[rest],
            evidence.optima[:1, rest],
            evidence.side[:1, rest],
            evidence.deviation[rest],
        )
        one, other = (*_coefficients(others, form)[0], 0.0)[:2]
        student = float(evidence.students[left_out])
        linear = one * student + other
        if form != "power" and linear <= 0:
            return None
        logs = one * np.log(student) + other if form == "power" else np.log(linear)
        errors.append(logs - evidence.optima[0, left_out])
    return float(np.sqrt(np.mean(np.square(errors))))


def interval_of(draws: Floats, confidence: float) -> Floats:
    """[2, ...] the ends of the interval that holds so many of the draws [draws, ...]."""
    tail = (1 - confidence) / 2
    return np.quantile(draws, [tail, 1 - tail], axis=0)


def to_estimate(draws: Floats, confidence: float, value: float | None = None) -> Estimate:
    """The interval of draws about a value, by default the first of them, which is no draw then."""
    if value is None:
        value, draws = float(draws[0]), draws[1:]
    low, high = interval_of(draws, confidence)
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
