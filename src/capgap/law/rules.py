"""What advice rests on: lines and loss surfaces, the published ones and those of a user's sweep."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.errors import UserError
from capgap.law.own_surface import OwnSurface, surfaces_of
from capgap.law.published import PUBLISHED_LINES, PUBLISHED_SURFACE
from capgap.law.surface import DistillationSurface, TeacherTokens
from capgap.sizes import format_count

Range = tuple[float, float]
# A surface of one's own says nothing of token budgets further than this from its own
TOKENS_REACH = 2.0
# Sizes that are asked for are round ones; what was made out of them missed them by a little
SIZES_REACH = 1.05


@dataclass(frozen=True)
class LinearRule:
    """T* of a linear law, and the interval that its source leaves."""

    source: str
    teacher: float
    low: float
    high: float
    caution: str | None


@dataclass(frozen=True)
class SurfaceRule:
    """A loss surface, the share of a loss that it is good to, and the ranges that it was read from:
    students and teachers in non-embedding parameters, students' tokens, None where any will do.

    `teacher_tokens`: what a teacher whose tokens are not known is taken to have read.
    """

    name: str
    source: str
    surface: DistillationSurface
    error: float
    students: Range
    teachers: Range
    tokens: Range | None
    teacher_tokens: TeacherTokens
    teacher_tokens_name: str

    def teacher_loss(self, size: int, tokens: int | None) -> float:
        """What the surface expects of a teacher itself, nats per token of the surface's text."""
        read = tokens or float(self.teacher_tokens.of(size))
        return float(self.surface.supervised.loss(size, read))

    def caution(self, student: int, tokens: int) -> str | None:
        """Why the surface is no good for such a student, if it is not."""
        low, high = self.students
        if not low / SIZES_REACH <= student <= high * SIZES_REACH:
            return f"read from students of {format_count(low)} to {format_count(high)}"
        if self.tokens is not None:
            low, high = self.tokens
            if not low / TOKENS_REACH <= tokens <= high * TOKENS_REACH:
                return f"read from students on {format_count(low)} to {format_count(high)} tokens"
        return None

    def has_read(self, teacher: float) -> bool:
        """Whether a teacher is of a size that the surface was read from."""
        low, high = self.teachers
        return low / SIZES_REACH <= teacher <= high * SIZES_REACH


# What the published surface was read from, in non-embedding parameters, and is good to
SURFACE_RANGE = (143e6, 12.6e9)
PUBLISHED_RULE = SurfaceRule(
    name="the published surface",
    source="arXiv 2502.08606",
    surface=PUBLISHED_SURFACE,
    error=0.01,
    students=SURFACE_RANGE,
    teachers=SURFACE_RANGE,
    tokens=None,
    teacher_tokens=PUBLISHED_SURFACE.supervised.compute_optimal_tokens(),
    teacher_tokens_name="compute-optimal tokens",
)


def published_rule(student: int) -> LinearRule:
    """The published line; its interval is the grid's that it was read from, T/S 2.0 to 3.33, and
    goes down to the line itself where that lies lower."""
    line = PUBLISHED_LINES[0]
    teacher = max(line.optimal_teacher(student), float(student))
    caution = None
    if not 56e6 <= student <= 1.1e9:
        caution = (
            f"read from teachers of 70M to 2.8B, so for a student of {format_count(student)} it is "
            "an extrapolation"
        )
    return LinearRule(line.name, teacher, min(2.0 * student, teacher), student / 0.3, caution)


def read_law(path: Path) -> dict[str, Any]:
    """A law.json; UserError where it is none, or holds neither a line nor a surface."""
    try:
        law = json.loads(path.read_text(encoding="utf-8"))
        laws = law["laws"]
        is_of_use = bool(_identified(law) or surfaces_of(law))
    except FileNotFoundError:
        raise UserError(f"no law {path}: it is the law.json in a sweep's output folder") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is no law.json of a sweep ({error})") from None
    if not is_of_use:
        reasons = "; ".join(f"{one['init']}: {one['reason']}" for one in laws) or "it has no curve"
        raise UserError(
            f"{path} identifies no law ({reasons}) and has no loss surface: leave --law away, or "
            "sweep more"
        )
    return dict(law)


def own_rule(law: Mapping[str, Any], student: int) -> LinearRule | None:
    """What the line of a sweep of the user's own says; None where it identifies none.

    Of several the one for students cut out of their teachers, at the most tokens.
    """
    fitted = _identified(law)
    if not fitted:
        return None
    line = max(fitted, key=lambda one: (one["init"] == "pruned", one["tokens"]))
    slopes = line["slope_interval"]
    teacher, low, high = (
        max(1.0, slope * student + line["intercept"]) for slope in (line["slope"], *slopes)
    )
    students = line["band"]["student"]
    caution = None
    if not students[0] / SIZES_REACH <= student <= students[-1] * SIZES_REACH:
        caution = (
            f"read from students of {format_count(students[0])} to {format_count(students[-1])}, "
            f"so for {format_count(student)} it is an extrapolation"
        )
    name = (
        f"your sweep ({line['architecture']}, {line['init']}, {format_count(line['tokens'])} "
        "tokens)"
    )
    return LinearRule(name, teacher, low, high, caution)


def surface_rules(law: Mapping[str, Any] | None, student: int, tokens: int) -> list[SurfaceRule]:
    """The surfaces to advise by, the one that ranks first: the user's own where it was read from
    such students and tokens, else the published one."""
    own = [] if law is None else [_own_surface_rule(one) for one in surfaces_of(law)]
    good = [rule for rule in own if rule.caution(student, tokens) is None]
    poor = [rule for rule in own if rule not in good]
    return [*good, PUBLISHED_RULE, *poor]


def _identified(law: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [line for line in law["laws"] if line["status"] == "identified"]


def _own_surface_rule(own: OwnSurface) -> SurfaceRule:
    return SurfaceRule(
        name="the surface of your sweep",
        source=f"your sweep ({own.architecture}, scratch)",
        surface=own.surface,
        error=own.error,
        students=own.students,
        teachers=own.teachers,
        tokens=own.tokens,
        teacher_tokens=own.teacher_tokens,
        teacher_tokens_name="the sweep teachers' tokens",
    )
