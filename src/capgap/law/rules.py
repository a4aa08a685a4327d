"""What advice rests on: lines and loss surfaces, published ones and those of one's own sweep."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.optimize import linprog

from capgap.law.law import Curve, Law, Line, Surface, Value, runs_of
from capgap.law.model import Floats
from capgap.law.published import (
    PUBLISHED_LINE,
    PUBLISHED_RESOLUTION,
    PUBLISHED_SURFACE,
    PUBLISHED_TEACHERS,
)
from capgap.law.surface import DistillationSurface, SupervisedSurface, TeacherTokens
from capgap.sizes import format_count

# What is asked for is round, what was made missed it by a little; tokens are rounded to batches
SIZES_REACH, TOKENS_REACH = 1.05, 1.25
# What the published surface was read from, non-embedding parameters and tokens, and is good to
SURFACE_SIZES = (143e6, 12.6e9)
SURFACE_TOKENS = (4e9, 512e9)
SURFACE_ERROR = 0.01
# A weak prior on the logarithm of a coefficient, so that one the design says nothing about is loose
LOOSE = 100.0


class LineRule(Value):
    """The best teacher by a linear law or by a curve of one's own, and the interval that it leaves;
    both None where it says nothing of such a student. caution: why it may not hold here. measured:
    the sizes of a curve of such a student, and whether each will do."""

    source: str
    teacher: float | None = None
    interval: tuple[float, float] | None = None
    caution: str | None = None
    measured: tuple[tuple[float, bool], ...] = ()

    def holds(self, teacher: float) -> bool:
        """Whether a teacher's size is one that the source leaves."""
        return self.interval is not None and self.distance(teacher) == 0

    @property
    def runs(self) -> list[tuple[float, float]]:
        """The sizes that it leaves: its interval, or what will do between what will not."""
        return runs_of(self.measured) or ([] if self.interval is None else [self.interval])

    def distance(self, teacher: float) -> float:
        """Of ln T from what the source leaves; 0 where it says nothing."""
        if self.interval is None:
            return 0.0
        apart = {size: abs(float(np.log(teacher / size))) for size, _ in self.measured}
        if apart and not dict(self.measured)[min(apart, key=apart.__getitem__)]:
            # nearest to one that will not do, maybe between two that will
            return min(apart[size] for size, will_do in self.measured if will_do)
        low, high = self.interval[0] / SIZES_REACH, self.interval[1] * SIZES_REACH
        return float(max(np.log(low / teacher), np.log(teacher / high), 0.0))


@dataclass(frozen=True)
class SurfaceRule:
    """A loss surface with what it was read from: (student, tokens) combinations, and the smallest
    and largest teacher. error: of a loss, as a share. teacher_tokens: what a teacher whose tokens
    are not known is taken to have read."""

    name: str
    source: str
    surface: DistillationSurface
    error: float
    teachers: tuple[float, float]
    combinations: tuple[tuple[float, float], ...]
    teacher_tokens: TeacherTokens
    teacher_tokens_name: str

    def has_read(self, student: float, tokens: float) -> bool:
        """Whether (student, tokens) lies between combinations that were measured."""
        logs = np.log(np.array(self.combinations))
        asked, reach = np.log([student, tokens]), np.log([SIZES_REACH, TOKENS_REACH])
        found = linprog(
            np.zeros(len(logs)),
            A_ub=np.vstack([(logs - asked).T, (asked - logs).T]),
            b_ub=np.concatenate([reach, reach]),
            A_eq=np.ones((1, len(logs))),
            b_eq=[1.0],
        )
        return bool(found.success)

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

        def difference(surface: DistillationSurface) -> Floats:
            return np.diff(np.log(surface.loss(student, tokens, teacher_losses)))

        slopes = _slopes(self.surface, difference)
        return float(np.sqrt(np.maximum(slopes @ self._covariance @ slopes.T, 0.0)).item())

    @cached_property
    def _covariance(self) -> Floats:
        """Covariance of the coefficients, as least squares leaves it where losses scatter by the
        rule's error: every combination alone, and with five teachers."""
        students, tokens = np.array(self.combinations).T
        teachers = np.geomspace(*self.teachers, 5)

        def losses(surface: DistillationSurface) -> Floats:
            alone = surface.supervised
            above = alone.loss(teachers, self.teacher_tokens.of(teachers))
            taught = surface.loss(students, tokens, above[:, None])
            return np.log(np.concatenate([alone.loss(students, tokens), above, taught.ravel()]))

        slopes = _slopes(self.surface, losses)
        known = slopes.T @ slopes / self.error**2
        return np.asarray(np.linalg.inv(known + np.eye(len(known)) / LOOSE**2))


def _slopes(
    surface: DistillationSurface, function: Callable[[DistillationSurface], Floats]
) -> Floats:
    """[values, coefficients] along the logarithm of every coefficient that is there (c0 itself)."""
    step, slopes = 1e-4, []
    own = asdict(surface)
    alone = own.pop("supervised")
    for coefficients in (alone, own):
        for name, value in coefficients.items():
            if not value:
                continue
            ends = []
            for sign in (1, -1):
                moved = value + sign * step if name == "c0" else value * np.exp(sign * step)
                coefficients[name] = moved
                ends.append(function(DistillationSurface(SupervisedSurface(**alone), **own)))
            coefficients[name] = value
            slopes.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(slopes, axis=-1)


PUBLISHED_RULE = SurfaceRule(
    name="the published surface",
    source="arXiv 2502.08606",
    surface=PUBLISHED_SURFACE,
    error=SURFACE_ERROR,
    teachers=SURFACE_SIZES,
    combinations=tuple(product(np.geomspace(*SURFACE_SIZES, 8), np.geomspace(*SURFACE_TOKENS, 6))),
    teacher_tokens=PUBLISHED_SURFACE.supervised.compute_optimal_tokens(),
    teacher_tokens_name="compute-optimal tokens",
)


def published_rule(student: int) -> LineRule:
    """The published line; its interval is what the grid that it was read from resolves."""
    line, (low, high) = PUBLISHED_LINE, PUBLISHED_RESOLUTION
    teacher = line.optimal_teacher(student)
    least, most = (size / line.slope for size in PUBLISHED_TEACHERS)
    caution = None
    if not least * 2 <= student <= most:
        sizes = " to ".join(format_count(size) for size in PUBLISHED_TEACHERS)
        caution = f"it was read from teachers of {sizes}, so this is an extrapolation"
    if teacher < student:
        return LineRule(source=line.name, caution="it says nothing of students so small")
    interval = (min(low * student, teacher), high * student)
    return LineRule(source=line.name, teacher=teacher, interval=interval, caution=caution)


def own_rule(law: Law, student: int, tokens: int) -> LineRule | None:
    """What one's own sweep says of a student: by its own curve where it was one of the sweep, else
    by the line; None where it says nothing.

    Of several curves or lines the one for students cut out of their teachers, with tokens nearest
    to those asked for.
    """
    curves = [
        curve
        for curve in law.curves
        if all(point.cost is not None for point in curve.points)
        and _apart(curve.student_parameters, student) <= np.log(SIZES_REACH)
        and _apart(curve.tokens, tokens) <= np.log(TOKENS_REACH)
    ]
    if curves:
        return _by_curve(
            min(curves, key=lambda one: (one.init != "pruned", _apart(one.tokens, tokens)))
        )

    def read(line: Line) -> float:
        return line.group.tokens or (line.group.tokens_per_parameter or 0.0) * student

    lines = [line for line in law.lines if line.is_identified]
    line = min(
        lines,
        key=lambda one: (one.group.init != "pruned", _apart(read(one), tokens)),
        default=None,
    )
    return None if line is None else _by_line(line, student, tokens, read(line))


def _apart(one: float, other: float) -> float:
    return abs(float(np.log(one / other)))


def _by_curve(curve: Curve) -> LineRule:
    sizes = [float(point.teacher_parameters) for point in curve.will_do]
    best = next(p for p in curve.points if p.teacher_size == curve.optimum.best)
    all_do = len(sizes) == len(curve.points)
    return LineRule(
        source=f"your sweep's {format_count(curve.student_parameters)} student",
        teacher=float(best.teacher_parameters),
        interval=(min(sizes), max(sizes)),
        caution="no teacher was better than another beyond noise" if all_do else None,
        measured=tuple((float(p.teacher_parameters), not p.worse) for p in curve.points),
    )


def _by_line(line: Line, student: int, tokens: int, read: float) -> LineRule:
    """read: the tokens that the line was read on."""
    assert line.slope is not None
    assert line.band is not None
    band, slope, cautions = line.band, line.slope, []
    first, last = band.student[0], band.student[-1]
    if not first / SIZES_REACH <= student <= last * SIZES_REACH:
        cautions.append(
            f"it was read from students of {format_count(first)} to {format_count(last)}, so this "
            "is an extrapolation"
        )
    if _apart(read, tokens) > np.log(TOKENS_REACH):
        other = f"{format_count(read)} tokens, not on {format_count(tokens)}"
        if line.group.tokens is None:
            ratio = line.group.tokens_per_parameter
            other = f"{ratio:.3g} tokens a parameter, not on {tokens / student:.3g}"
        cautions.append(f"it was read on {other}")
    # beyond the band its end goes on by every slope of the interval: wider than the law's own
    beyond = student - min(max(student, first), last)
    steps = (slope.value * beyond, *sorted((slope.low * beyond, slope.high * beyond)))
    ends = (np.interp(student, band.student, end) for end in (band.mid, band.low, band.high))
    teacher, low, high = (max(1.0, float(e) + s) for e, s in zip(ends, steps, strict=True))
    return LineRule(
        source=f"your sweep ({line.group})",
        teacher=teacher,
        interval=(low, high),
        caution="; ".join(cautions) or None,
    )


def surface_rules(law: Law | None, student: int, tokens: int) -> list[SurfaceRule]:
    """The surfaces to advise by, the one that ranks first: one's own where it was read from such
    students and tokens, else the published one; of one's own that were not, none."""
    entries = () if law is None else law.surfaces
    fitted = [own for entry in entries if (own := own_surface(entry)) is not None]
    return [*(own for own in fitted if own.has_read(student, tokens)), PUBLISHED_RULE]


def own_surface(entry: Surface) -> SurfaceRule | None:
    """The surface that one of the `surfaces` of a law holds; None where none was fitted."""
    if entry.distillation is None or entry.supervised is None or entry.teacher_tokens is None:
        return None
    assert entry.error is not None
    assert entry.teachers is not None
    supervised = SupervisedSurface(**entry.supervised.coefficients)
    return SurfaceRule(
        name="the surface of your sweep",
        source=f"your sweep ({entry.architecture}, scratch)",
        surface=DistillationSurface(supervised, **entry.distillation.coefficients),
        error=max(entry.error, 1e-6),
        teachers=entry.teachers,
        combinations=entry.cells,
        teacher_tokens=TeacherTokens(*entry.teacher_tokens),
        teacher_tokens_name="the sweep teachers' tokens",
    )
