"""What advice rests on: lines and loss surfaces, published ones and those of one's own sweep."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np

from capgap.law.law import Curve, Law, Line
from capgap.law.model import Floats
from capgap.law.own_surface import SIZES_REACH, TOKENS_REACH, OwnSurface, own_surface
from capgap.law.published import (
    PUBLISHED_LINES,
    PUBLISHED_RESOLUTION,
    PUBLISHED_SURFACE,
    PUBLISHED_TEACHERS,
)
from capgap.law.surface import DistillationSurface, TeacherTokens
from capgap.sizes import format_count

# What the published surface was read from, non-embedding parameters and tokens, and is good to
SURFACE_SIZES = (143e6, 12.6e9)
SURFACE_TOKENS = (4e9, 512e9)
SURFACE_ERROR = 0.01
# A weak prior on the logarithm of a coefficient, so that one the design says nothing about is loose
LOOSE = 100.0


@dataclass(frozen=True)
class LineRule:
    """The best teacher by a linear law or by a curve of one's own, and what its source leaves; all
    None where it says nothing of such a student. caution: why it may not hold here.
    is_measured: whether it is a curve of such a student."""

    source: str
    teacher: float | None
    low: float | None
    high: float | None
    caution: str | None
    is_measured: bool = False

    def holds(self, teacher: float) -> bool:
        """Whether a teacher's size is one that the source leaves."""
        return self.low is not None and self.distance(teacher) == 0

    def distance(self, teacher: float) -> float:
        """Of ln T from what the source leaves; 0 where it says nothing."""
        if self.low is None or self.high is None:
            return 0.0
        low, high = self.low / SIZES_REACH, self.high * SIZES_REACH
        return float(max(np.log(low / teacher), np.log(teacher / high), 0.0))


@dataclass(frozen=True)
class SurfaceRule:
    """A loss surface with what it was read from: (student, tokens) combinations, and sizes of
    teachers. error: of a loss, as a share. `teacher_tokens`: what a teacher whose tokens are not
    known is taken to have read."""

    name: str
    source: str
    surface: DistillationSurface
    error: float
    teachers: tuple[float, float]
    combinations: tuple[tuple[float, float], ...]
    has_read: Callable[[float, float], bool]
    teacher_tokens: TeacherTokens
    teacher_tokens_name: str

    def teacher_loss(self, size: float, tokens: float | None) -> float:
        """What the surface expects of a teacher itself, nats per token of the surface's text."""
        read = tokens or float(self.teacher_tokens.of(size))
        return float(self.surface.supervised.loss(size, read))

    def difference_error(
        self, student: float, tokens: float, teacher_losses: tuple[float, float]
    ) -> float:
        """Standard error, as a share of the loss, of the difference that two teachers make to one
        student: by the coefficients' covariance, not by the error of a loss, most of which both
        have in common."""
        slopes = _slopes(
            self.surface,
            lambda surface: np.diff(np.log(surface.loss(student, tokens, teacher_losses))),
        )
        return float(np.sqrt(np.maximum(slopes @ _covariance(self) @ slopes.T, 0.0)).item())

    def __hash__(self) -> int:
        return id(self)


@cache
def _covariance(rule: SurfaceRule) -> Floats:
    """Of the coefficients, as least squares leaves it where losses scatter by the rule's error:
    every combination alone, and with five teachers."""
    students, tokens = np.array(rule.combinations).T
    teachers = np.geomspace(*rule.teachers, 5)

    def losses(surface: DistillationSurface) -> Floats:
        alone = surface.supervised
        above = alone.loss(teachers, rule.teacher_tokens.of(teachers))
        taught = surface.loss(students, tokens, above[:, None])
        every = [alone.loss(students, tokens), above, taught.ravel()]
        return np.log(np.concatenate(every))

    slopes = _slopes(rule.surface, losses)
    known = slopes.T @ slopes / rule.error**2
    return np.asarray(np.linalg.inv(known + np.eye(len(known)) / LOOSE**2))


def _slopes(
    surface: DistillationSurface, function: Callable[[DistillationSurface], Floats]
) -> Floats:
    """[values, coefficients] along the logarithm of every coefficient that is there (c0 itself)."""
    step, found = 1e-4, []

    def moved(part: str, name: str, value: float) -> DistillationSurface:
        if part == "own":
            return replace(surface, **{name: value})  # type: ignore[arg-type]
        return replace(surface, supervised=replace(surface.supervised, **{name: value}))

    own = {name: value for name, value in asdict(surface).items() if name != "supervised"}
    for part, coefficients in (("supervised", asdict(surface.supervised)), ("own", own)):
        for name, value in coefficients.items():
            if value:
                ends = (
                    value + sign * step if name == "c0" else value * np.exp(sign * step)
                    for sign in (1, -1)
                )
                above, below = (function(moved(part, name, end)) for end in ends)
                found.append((above - below) / (2 * step))
    return np.stack(found, axis=-1)


def _published_combinations() -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(student), float(tokens))
        for student in np.geomspace(*SURFACE_SIZES, 8)
        for tokens in np.geomspace(*SURFACE_TOKENS, 6)
    )


PUBLISHED_RULE = SurfaceRule(
    name="the published surface",
    source="arXiv 2502.08606",
    surface=PUBLISHED_SURFACE,
    error=SURFACE_ERROR,
    teachers=SURFACE_SIZES,
    combinations=_published_combinations(),
    has_read=lambda student, _: (
        SURFACE_SIZES[0] / SIZES_REACH <= student <= SURFACE_SIZES[1] * SIZES_REACH
    ),
    teacher_tokens=PUBLISHED_SURFACE.supervised.compute_optimal_tokens(),
    teacher_tokens_name="compute-optimal tokens",
)


def published_rule(student: int) -> LineRule:
    """The published line; its interval is what the grid that it was read from resolves."""
    line, (low, high) = PUBLISHED_LINES[0], PUBLISHED_RESOLUTION
    teacher = line.optimal_teacher(student)
    least, most = (size / line.slope for size in PUBLISHED_TEACHERS)
    caution = None
    if not least * 2 <= student <= most:
        sizes = " to ".join(format_count(size) for size in PUBLISHED_TEACHERS)
        caution = f"it was read from teachers of {sizes}, so this is an extrapolation"
    if teacher < student:
        return LineRule(line.name, None, None, None, "it says nothing of students so small")
    return LineRule(line.name, teacher, min(low * student, teacher), high * student, caution)


def own_rule(law: Law, student: int, tokens: int) -> LineRule | None:
    """What one's own sweep says of a student: by its own curve where it was one of the sweep, else
    by the line; None where it says nothing.

    Of several curves or lines the one for students cut out of their teachers, with the most tokens.
    """
    curves = [curve for curve in law.curves if _is_of(curve, student, tokens)]
    if curves:
        return _by_curve(max(curves, key=lambda one: (one.init == "pruned", one.tokens)))
    lines = [line for line in law.lines if line.is_identified and line.slope and line.intercept]
    if not lines:
        return None
    return _by_line(
        max(lines, key=lambda one: (one.group.init == "pruned", one.group.tokens or 0)), student
    )


def _is_of(curve: Curve, student: int, tokens: int) -> bool:
    size = max(curve.student_parameters / student, student / curve.student_parameters)
    budget = max(curve.tokens / tokens, tokens / curve.tokens)
    known = all(point.cost is not None for point in curve.points)
    return known and size <= SIZES_REACH and budget <= TOKENS_REACH


def _by_curve(curve: Curve) -> LineRule:
    name = f"your sweep's {format_count(curve.student_parameters)} student"
    sizes = [float(point.teacher_parameters) for point in curve.will_do]
    best = next(p for p in curve.points if p.teacher_size == curve.optimum.best)
    caution = (
        "no teacher was better than another beyond noise"
        if (len(sizes) == len(curve.points))
        else None
    )
    return LineRule(
        name, float(best.teacher_parameters), min(sizes), max(sizes), caution, is_measured=True
    )


def _by_line(line: Line, student: int) -> LineRule:
    assert line.slope is not None
    assert line.intercept is not None
    assert line.band is not None
    name = f"your sweep ({line.group})"
    first, last = line.band.student[0], line.band.student[-1]
    if first / SIZES_REACH <= student <= last * SIZES_REACH:
        teacher, low, high = (
            float(np.interp(student, line.band.student, end))
            for end in (line.band.mid, line.band.low, line.band.high)
        )
        return LineRule(name, teacher, max(low, 1.0), high, None)
    caution = (
        f"it was read from students of {format_count(first)} to {format_count(last)}, so this is "
        "an extrapolation"
    )
    teacher, low, high = (
        max(1.0, slope * student + line.intercept.value)
        for slope in (line.slope.value, line.slope.low, line.slope.high)
    )
    return LineRule(name, teacher, low, high, caution)


def surface_rules(law: Law | None, student: int, tokens: int) -> list[SurfaceRule]:
    """The surfaces to advise by, the one that ranks first: one's own where it was read from such
    students and tokens, else the published one; of one's own that were not, none."""
    entries = () if law is None else law.surfaces
    fitted = [own for entry in entries if (own := own_surface(entry)) is not None]
    return [*(_own_rule(own) for own in fitted if own.has_read(student, tokens)), PUBLISHED_RULE]


def _own_rule(own: OwnSurface) -> SurfaceRule:
    return SurfaceRule(
        name="the surface of your sweep",
        source=f"your sweep ({own.architecture}, scratch)",
        surface=own.surface,
        error=max(own.error, 1e-6),
        teachers=own.teachers,
        combinations=own.cells,
        has_read=own.has_read,
        teacher_tokens=own.teacher_tokens,
        teacher_tokens_name="the sweep teachers' tokens",
    )
