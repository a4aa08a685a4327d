"""Which teacher to take for a student of this size and these tokens, by published laws and by one's
own sweep. Imports no torch."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from capgap.errors import UserError
from capgap.evaluate.measured import Measurement
from capgap.law.law import Law, Value
from capgap.law.published import Candidate, find_family, find_model
from capgap.law.rules import (
    SIZES_REACH,
    LineRule,
    SurfaceRule,
    own_rule,
    published_rule,
    surface_rules,
)
from capgap.machine import hours, parse_gpus
from capgap.sizes import format_count, forward_flops, parse_count, parse_size, training_flops

# Standard errors that a difference must exceed: 95% that it is more than noise
BEYOND_NOISE = 1.645
# Tokens for each of the student's parameters, below which a letter was forgotten
LEAST_TOKENS = 0.01
# Of teachers that nothing else tells apart, one with fewer tokens than this share of the most read
# comes after the others: text and recipes have become better with the years too
LITTLE_READ = 0.3


class Student(Value):
    """Parameters without and with embeddings, as a student of the first candidate's family has
    them; family where it was named."""

    non_embedding: int
    total: int
    family: str | None


class Measure(Value):
    """How a candidate reads the user's text (`evaluate.measured`). above_lowest: nats a byte above
    the best of them. no_better_than: a candidate that is no larger and reads it at least as well.
    rank_surprisal: of the student on text that the candidate writes, where a student read it."""

    nats_per_byte: float
    nats_per_byte_stderr: float | None
    nats_per_token: float
    entropy: float
    entropy_per_byte: float
    overconfidence: float
    calibration_error: float
    tokens: int
    bytes: int
    seconds: float
    above_lowest: float
    above_lowest_stderr: float | None
    no_better_than: str | None
    rank_surprisal: float | None


class Row(Value):
    """A candidate. Losses in nats per token of the surface's text; difference: of the expected loss
    above the lowest one, a share of it, with its standard error; told_worse: whether that is beyond
    noise. in_line: whether the line's interval holds its size."""

    teacher: str
    family: str | None
    year: str | None
    non_embedding: int
    total: int
    ratio: float
    teacher_tokens: int | None
    teacher_loss: float
    expected_loss: float
    difference: float
    difference_stderr: float
    told_worse: bool
    in_line: bool
    is_larger: bool
    flops_total: int
    hours: float | None
    measured: Measure | None
    cautions: tuple[str, ...]


class Alone(Value):
    """The student without a teacher, on the same tokens or for the same FLOPs as the first row."""

    name: str
    tokens: int
    expected_loss: float
    flops_total: int
    hours: float | None


class SurfaceAdvice(Value):
    """What a surface says, by candidate. teacher_losses: of their own, nats per token of the
    surface's text; expected_losses: of the student. nearest: the larger one under which that is
    lowest. anchor: whose own loss fixes the scale of measured ones."""

    name: str
    source: str
    error: float
    nearest: str | None
    anchor: str | None
    caution: str | None
    teacher_losses: dict[str, float]
    expected_losses: dict[str, float]


class Advice(Value):
    """The candidates, best first, and what they rest on. take: the first one, None where none is
    larger than the student. agreed: whether line and surface both allow it."""

    student: Student
    tokens: int
    take: str | None
    agreed: bool
    recommendations: tuple[Row, ...]
    without_teacher: tuple[Alone, ...]
    linear_law: LineRule
    surface: SurfaceAdvice
    other_surfaces: tuple[SurfaceAdvice, ...]
    tokenizers: tuple[str, ...]
    measure: dict[str, str | int] | None


def recommend(
    student: str | int,
    tokens: str | int,
    candidates: Sequence[Candidate],
    *,
    law: Law | None = None,
    gpus: str | None = None,
    measurement: Measurement | None = None,
) -> Advice:
    """The candidates for a student, best first. Sizes are as people write them: "3B", "300M total",
    a published model's name. law: of one's own sweep, beside the published ones.

    The first surface, one's own where it was read from such students, else the published one, gives
    every candidate an expected loss. Those that it puts above the lowest by more than the noise of
    the difference come last, if it was read from such students. Among the others those are first
    that the line's interval holds, by one's own sweep where there is one, or that are nearest to
    it; then those that have read much, then the cheaper. Where one's own sweep had such a student,
    its curve counts before the surface. A candidate that is no larger than the student is never
    taken.

    With a `measurement` of all candidates their own losses on the user's text decide. One factor
    for all puts them on the surface's scale: the best of them keeps the loss that the surface gives
    it. A candidate whose own loss is no lower than that of one that is no larger comes after the
    others.

    UserError for sizes that are none, for next to no tokens, and for a law that says nothing of
    such a student.
    """
    asked, read = student_of(student, candidates), parse_count(tokens)
    size = asked.non_embedding
    own = None if law is None else own_rule(law, size, read)
    surface, *others = surface_rules(law, size, read)
    if law is not None and own is None and not others:
        raise UserError(_of_no_use(law, size, read))
    if read < LEAST_TOKENS * size:
        raise UserError(
            f"`tokens` {format_count(read)} is next to nothing for a student of "
            f"{format_count(size)} parameters: give tokens as 126B or 400M"
        )
    machines = None if gpus is None else parse_gpus(gpus)
    question = _Question(asked, read, tuple(candidates), measurement, machines)
    rule, told = own or published_rule(size), question.surface(surface)
    rows = [question.row(one, rule, surface, told) for one in candidates]
    most_read = max((row.teacher_tokens or 0 for row in rows if row.is_larger), default=0)
    reaches = told.caution is None

    def rank(row: Row) -> tuple[float, ...]:
        outdone = row.measured is not None and row.measured.no_better_than is not None
        little = (row.teacher_tokens or most_read) < LITTLE_READ * most_read
        beyond = row.difference if row.told_worse and reaches else 0.0
        outside = rule.distance(row.non_embedding)
        # what was measured of such a student counts before a surface
        measured = outside if rule.measured else 0.0
        return (not row.is_larger, measured, beyond, outdone, outside, little, row.flops_total)

    rows.sort(key=rank)
    first = rows[0]
    return Advice(
        student=asked,
        tokens=read,
        take=first.teacher if first.is_larger else None,
        agreed=first.is_larger and first.in_line and not (reaches and first.told_worse),
        recommendations=tuple(rows),
        without_teacher=question.alone(first, surface),
        linear_law=rule,
        surface=told,
        other_surfaces=tuple(question.surface(other) for other in others),
        tokenizers=_tokenizers(asked, candidates),
        measure=None if measurement is None else measurement.as_dict(),
    )


def _of_no_use(law: Law, student: int, tokens: int) -> str:
    def named(counts: Iterable[int]) -> str:
        return ", ".join(dict.fromkeys(map(format_count, sorted(counts))))

    return (
        f"this law says nothing of a student of {format_count(student)} on {format_count(tokens)} "
        f"tokens: it has students of {named(curve.student_parameters for curve in law.curves)} on "
        f"{named(curve.tokens for curve in law.curves)} tokens, and no line over students. Ask "
        "for one of these, sweep students on both sides of yours, or leave `law` away"
    )


def student_of(size: str | int, candidates: Sequence[Candidate]) -> Student:
    """By its size without embeddings, its total ("300M total"), or a published model's name."""
    known = find_model(str(size))
    if known is not None:
        return Student(non_embedding=known.non_embedding, total=known.total, family=known.family)
    given, is_total = parse_size(size)
    first = candidates[0]
    if not is_total:
        return Student(non_embedding=given, total=first.student_total(given), family=None)
    largest = bisect_right(range(1, given + 1), given, key=first.student_total)
    return Student(non_embedding=max(1, largest), total=given, family=None)


def _tokenizers(student: Student, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Families whose tokenizers differ; empty where there is one, or nobody knows."""
    named = [student.family, *(one.family for one in candidates)]
    families = list(dict.fromkeys(name for name in named if name is not None))
    tokenizers = {find_family(name).tokenizer for name in families}
    return tuple(families) if len(tokenizers) > 1 else ()


@dataclass(frozen=True)
class _Question:
    """What is asked; gpus: how many of which, for the hours."""

    student: Student
    tokens: int
    candidates: tuple[Candidate, ...]
    measurement: Measurement | None
    gpus: tuple[int, str] | None

    def surface(self, rule: SurfaceRule) -> SurfaceAdvice:
        size = self.student.non_embedding
        anchor = None
        above = {
            one.name: rule.teacher_loss(one.non_embedding, one.tokens) for one in self.candidates
        }
        if self.measurement is not None:
            # a text's difficulty and the length of tokens fall out; what stays is by how many per
            # cent each is above the best
            measured = {name: self.measurement.models[name].nats_per_byte for name in above}
            anchor = min(measured, key=measured.__getitem__)
            scale = above[anchor] / measured[anchor]
            above = {name: scale * own for name, own in measured.items()}
        losses = {
            name: float(rule.surface.loss(size, self.tokens, own)) for name, own in above.items()
        }
        larger = [one.name for one in self.candidates if one.non_embedding > size]
        reads = rule.has_read(size, self.tokens)
        return SurfaceAdvice(
            name=rule.name,
            source=rule.source,
            error=rule.error,
            nearest=min(larger, key=losses.__getitem__, default=None),
            anchor=anchor,
            caution=None if reads else "it was read from other sizes or tokens",
            teacher_losses=above,
            expected_losses=losses,
        )

    def row(self, one: Candidate, rule: LineRule, surface: SurfaceRule, told: SurfaceAdvice) -> Row:
        size, above, losses = self.student.non_embedding, told.teacher_losses, told.expected_losses
        lowest = told.nearest or min(losses, key=losses.__getitem__)
        error = surface.difference_error(size, self.tokens, (above[one.name], above[lowest]))
        difference = losses[one.name] / losses[lowest] - 1
        cautions = []
        if one.tokens is None and told.anchor in (None, one.name):
            taken = surface.teacher_tokens_name
            cautions.append(f"its training tokens are not known: {taken} are taken")
        low, high = surface.teachers
        if not low / SIZES_REACH <= one.non_embedding <= high * SIZES_REACH:
            cautions.append("its size lies outside of what the surface was read from")
        measured, more = self._measured(one)
        flops = training_flops(self._total(one), self.tokens)
        return Row(
            teacher=one.name,
            family=one.family,
            year=one.year,
            non_embedding=one.non_embedding,
            total=one.total,
            ratio=one.non_embedding / size,
            teacher_tokens=one.tokens,
            teacher_loss=above[one.name],
            expected_loss=losses[one.name],
            difference=difference,
            difference_stderr=error,
            told_worse=difference > BEYOND_NOISE * error and one.name != lowest,
            in_line=rule.holds(one.non_embedding),
            is_larger=one.non_embedding > size,
            measured=measured,
            cautions=(*cautions, *more),
            **self._cost(flops + forward_flops(one.total, self.tokens)),
        )

    def alone(self, first: Row, surface: SurfaceRule) -> tuple[Alone, ...]:
        """The student without a teacher, beside the first row."""
        total = self._total(next(one for one in self.candidates if one.name == first.teacher))
        equal = round(first.flops_total / training_flops(total, 1))
        own = surface.surface.supervised
        return tuple(
            Alone(
                name=name,
                tokens=tokens,
                expected_loss=float(own.loss(self.student.non_embedding, tokens)),
                **self._cost(training_flops(total, tokens)),
            )
            for name, tokens in (("no teacher", self.tokens), ("no teacher, equal FLOPs", equal))
        )

    def _cost(self, flops: int) -> dict[str, Any]:
        return {
            "flops_total": flops,
            "hours": None if self.gpus is None else hours(flops, self.gpus),
        }

    def _total(self, teacher: Candidate) -> int:
        """The student's parameters with the embeddings of this teacher's family, unless it has its
        own."""
        if teacher.shape is None or self.student.family is not None:
            return self.student.total
        return teacher.student_total(self.student.non_embedding)

    def _measured(self, one: Candidate) -> tuple[Measure | None, list[str]]:
        """How a candidate reads the text, and cautions: where it reads no better than one that is
        no larger, or hardly better, and where its tokenizer changes the text."""
        if self.measurement is None:
            return None, []
        models, cautions, outdone = self.measurement.models, [], None
        mine = models[one.name]
        best = min(models, key=lambda name: models[name].nats_per_byte)
        rivals = [
            other for other in self.candidates if other is not one and other.total <= one.total
        ]
        if rivals:
            rival = min(rivals, key=lambda other: models[other.name].nats_per_byte)
            above, error = mine.above(models[rival.name])
            smaller = rival.total < one.total
            size = "smaller" if smaller else "as large"
            noise = "its noise is not known"
            if error is not None:
                noise = f"paired standard error {error:.4f}"
            if above > 0 or (above == 0 and smaller):
                outdone = rival.name
                cautions.append(
                    f"no better than {rival.name}, which is {size}: its own loss is {above:.4f} "
                    f"nats/byte higher ({noise})"
                )
            elif smaller and (error is None or -above <= BEYOND_NOISE * error):
                cautions.append(
                    f"better than {rival.name}, which is smaller, by {-above:.4f} nats/byte only, "
                    f"which may be noise ({noise})"
                )
        if mine.changed_documents:
            cautions.append(
                f"its tokenizer does not give back {mine.changed_documents} of "
                f"{len(mine.document_bytes)} documents as they are: its loss is that of a slightly "
                "different text"
            )
        above, error = mine.above(models[best])
        measure = Measure(
            **mine.as_dict(),
            above_lowest=above,
            # a difference to itself has no error
            above_lowest_stderr=None if one.name == best else error,
            no_better_than=outdone,
            rank_surprisal=self.measurement.rank_surprisal.get(one.name),
        )
        return measure, cautions
