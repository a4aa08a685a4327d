"""The law as values: the object that `fit` returns and law.json holds.

Sizes are non-embedding parameters (T a teacher's, S a student's), losses nats per token. Intervals
are at the law's confidence; an end that is None is open. `size` is what was asked for, `parameters`
what was reached.
"""

from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capgap.artifact import read_json
from capgap.errors import UserError
from capgap.sizes import format_count

SCHEMA: Literal[2] = 2
Interval = tuple[float | None, float | None]
Status = Literal["interior", "smallest", "largest", "flat", "too_few_points"]
Compared = Literal["tokens", "init", "chain", "student"]


class Value(BaseModel):
    """Immutable, and without fields that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Value):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the interval contains it."""
        return self.low <= value <= self.high


class Point(Value):
    """One teacher of one student, a mean over seeds.

    cost: how far the curve is above its lowest teacher here, in nats; None where no curve is
    fitted. worse: whether that is beyond noise. gain: loss of the same student without a teacher on
    as many tokens less its own; gain_flops: for as many FLOPs. `losses` and `seeds` are run by run.
    """

    teacher_size: int
    teacher_parameters: int
    teacher_loss: float | None
    teacher_loss_stderr: float | None
    loss: float
    loss_stderr: float | None
    cost: float | None
    cost_stderr: float | None
    worse: bool
    gain: float | None
    gain_stderr: float | None
    gain_flops: float | None
    gain_flops_stderr: float | None
    losses: tuple[float, ...]
    seeds: tuple[int, ...]


class Fit(Value):
    """The smooth curve with its interval, over teachers."""

    teacher_parameters: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Optimum(Value):
    """Where a curve is lowest.

    status: `interior`, the smallest and the largest teacher are both worse than the best beyond
    noise; `smallest`, `largest`, that one is not, so that the best may lie beyond it; `flat`,
    neither is; `too_few_points`, no curve is fitted. `interval` of T, None for `flat`; of too few
    points, from neighbour to neighbour of a lowest cell if both are worse beyond noise. `best`: the
    size of the teacher where the curve, or without one the loss, is lowest; `neighbours`: the
    teachers beside it.
    """

    status: Status
    teacher_parameters: float | None
    interval: Interval | None
    ratio: float | None
    ratio_interval: Interval | None
    best: int
    neighbours: Interval


class Group(Value):
    """Curves that share a law: of students on the same tokens, or on as many tokens for each of
    their parameters. curves: indices of `Law.curves`."""

    architecture: str
    init: str
    tokens: int | None
    tokens_per_parameter: float | None
    curves: tuple[int, ...]

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.architecture}, {self.init}, {format_count(self.tokens)} tokens"
        ratio = f"{self.tokens_per_parameter:.3g} tokens per parameter"
        return f"{self.architecture}, {self.init}, {ratio}"


class Curve(Value):
    """All teachers of one student. own_noise: standard deviation of one run."""

    architecture: str
    init: str
    tokens: int
    student_size: int
    student_parameters: int
    points: tuple[Point, ...]
    fit: Fit | None
    optimum: Optimum
    own_noise: float | None

    @property
    def will_do(self) -> tuple[Point, ...]:
        """The teachers that are not worse than the best beyond noise."""
        return tuple(point for point in self.points if not point.worse)

    @property
    def gainer(self) -> Point | None:
        """The teacher of known gain that costs least of those that will do."""
        known = [point for point in self.will_do if point.gain is not None]
        return min(known, key=lambda point: point.cost or 0.0, default=None)

    @property
    def cursed(self) -> bool:
        """Whether the largest teacher is worse than the best one, beyond noise."""
        return self.points[-1].worse


def runs_of(sizes: Iterable[tuple[float, bool]]) -> list[tuple[float, float]]:
    """The first and the last size of every run of neighbours that will do."""
    runs = [list(run) for will_do, run in groupby(sizes, itemgetter(1)) if will_do]
    return [(run[0][0], run[-1][0]) for run in runs]


class Band(Value):
    """A line over students, all in parameters."""

    student: tuple[float, ...]
    low: tuple[float, ...]
    mid: tuple[float, ...]
    high: tuple[float, ...]


Refusal = Literal["too_few_students", "includes_zero", "too_wide"]


class Line(Value):
    """The law of a group: T* = slope S + intercept, T* = ratio S, T* = factor S^exponent.

    refused: why the line is not identified, None where it is. located: students whose optimum lies
    within their teachers; `bounded`, at an end of them. prediction_errors: by form, root mean
    square of ln(predicted / found) of each located student, left out once.
    """

    group: Group
    refused: Refusal | None
    located: int
    bounded: int
    slope: Estimate | None = None
    intercept: Estimate | None = None
    ratio: Estimate | None = None
    exponent: Estimate | None = None
    factor: Estimate | None = None
    prediction_errors: dict[str, float] = {}
    band: Band | None = None

    @property
    def is_identified(self) -> bool:
        return self.refused is None


class Contrast(Value):
    """Two sets of curves beside each other, over the same teachers and seeds: what the teachers'
    luck and the documents do to both cancels.

    what: `tokens`, more less fewer; `init`, students cut out of their teachers less those with
    `fixed` first weights; `chain`, through an assistant less cut at once; `student`, a group's
    largest less its smallest. tokens: of the first and the second, None where not all students
    have the same budgets. slope: by how many nats the loss of the first rises more than that
    of the second for a teacher e times larger, mean over pairs of curves; `stderr` its standard
    error. level: by how many nats the first is higher, mean over teachers. per_log_tokens: the
    slope for e times the tokens.
    """

    what: Compared
    architecture: str
    inits: tuple[str, str]
    tokens: tuple[int, int] | None
    students: tuple[int, ...]
    slope: Estimate
    stderr: float
    level: Estimate
    per_log_tokens: Estimate | None

    @property
    def fewest(self) -> int:
        """Tokens of the second; 0 for budgets of their own."""
        return 0 if self.tokens is None else self.tokens[1]

    @property
    def is_told(self) -> bool:
        """Whether the slopes differ."""
        return not self.slope.holds(0.0)


class Luck(Value):
    """How far teachers of an architecture are off what their sizes say, the same for all their
    students: standard deviation in nats. trainings: how many taught; `known`: whether the data say
    anything about noise at all."""

    architecture: str
    deviation: Estimate | None
    trainings: int
    known: bool


class SurfacePart(Value):
    """A fitted formula of `surface`; docs/output.md has its status."""

    form: str
    status: str
    coefficients: dict[str, float]
    intervals: dict[str, Interval]
    at_bounds: tuple[str, ...]
    condition: float | None
    deviation: float
    points: int


class Surface(Value):
    """The loss surface of an architecture's students from scratch, or why there is none.

    error: root mean square of what is left, as a share of the mean loss. cells: the combinations
    (student, tokens) between which something was measured.
    """

    architecture: str
    reason: str | None
    supervised: SurfacePart | None = None
    distillation: SurfacePart | None = None
    teacher_tokens: tuple[float, float] | None = None
    error: float | None = None
    teachers: tuple[float, float] | None = None
    cells: tuple[tuple[float, float], ...] = ()


class Warned(Value):
    """What weakens a result: a name, what it concerns, and a sentence."""

    name: str
    where: str
    message: str


class Excluded(Value):
    """A run that no fit uses."""

    id: str
    reason: str


class Law(Value):
    """All that a table of cells says about teachers."""

    schema_: Literal[2] = Field(default=SCHEMA, alias="schema")
    scale: Literal["non_embedding"] = "non_embedding"
    confidence: float
    curves: tuple[Curve, ...]
    contrasts: tuple[Contrast, ...]
    lines: tuple[Line, ...]
    lucks: tuple[Luck, ...]
    surfaces: tuple[Surface, ...]
    warnings: tuple[Warned, ...]
    excluded: tuple[Excluded, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the content of law.json."""
        return self.model_dump(mode="json", by_alias=True)

    def of(self, group: Group) -> list[Curve]:
        """The curves of a group, smallest student first."""
        return [self.curves[index] for index in group.curves]


def read_law(path: Path | str) -> Law:
    """A law.json. UserError where it is none, is broken, or was written by an older version."""
    if not Path(path).is_file():
        raise UserError(f"no law {path}: it is the law.json in a sweep's output folder")
    values = read_json(path)
    schema = values.get("schema")
    if schema is None:
        raise UserError(f"{path} is no law.json: it has no schema")
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}, and this version of capgap reads {SCHEMA}: make it "
            "again with `capgap report` or `capgap fit`"
        )
    try:
        return Law.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; make it again") from None
