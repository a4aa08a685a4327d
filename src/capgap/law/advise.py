"""Which teacher for a student of this size and these tokens: what the published laws, and one's own
sweep, say of the models at hand. Imports no torch."""

from collections.abc import Sequence

from capgap.errors import UserError
from capgap.evaluate.measured import Measurement
from capgap.hardware import hours, parse_gpus
from capgap.law.candidates import Candidate, published
from capgap.law.families import find_family, find_model
from capgap.law.law import Law, Value
from capgap.law.rules import (
    PUBLISHED_RULE,
    SIZES_REACH,
    LineRule,
    SurfaceRule,
    own_rule,
    published_rule,
    surface_rules,
)
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
    the best of them. no_better_than: one that is no larger and reads it at least as well.
    rank_surprisal: of the student on text that it writes, where there is a student to read it."""

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
    """`advise` for sizes as people write them ("3B", "300M total", a published model's name), by
    the law of one's own sweep, if there is one, and the published ones.

    UserError for sizes that are none, and for a law that says nothing of such a student.
    """
    asked, read = student_of(student, candidates), parse_count(tokens)
    size = asked.non_embedding
    rule = None if law is None else own_rule(law, size, read)
    surfaces = surface_rules(law, size, read)
    if law is not None and rule is None and len(surfaces) == 1:
        raise UserError(_of_no_use(law, size, read))
    machines = None if gpus is None else parse_gpus(gpus)
    return advise(
        asked, read, candidates, own=rule, surfaces=surfaces, gpus=machines, measurement=measurement
    )


def _of_no_use(law: Law, student: int, tokens: int) -> str:
    sizes = sorted({curve.student_parameters for curve in law.curves})
    budgets = sorted({curve.tokens for curve in law.curves})
    students, read = (
        ", ".join(dict.fromkeys(map(format_count, found))) for found in (sizes, budgets)
    )
    return (
        f"this law says nothing of a student of {format_count(student)} on {format_count(tokens)} "
        f"tokens: it has students of {students} on {read} tokens, and no line over students. Ask "
        "for one of these, sweep students on both sides of yours, or leave --law away"
    )


def student_of(size: str | int, candidates: Sequence[Candidate]) -> Student:
    """By its size without embeddings, its total ("300M total"), or a published model's name."""
    known = find_model(str(size))
    if known is not None:
        own = published(known)
        return Student(non_embedding=own.non_embedding, total=own.total, family=own.family)
    given, is_total = parse_size(size)
    first = candidates[0]
    if not is_total:
        return Student(non_embedding=given, total=first.student_total(given), family=None)
    low, high = 1, given + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first.student_total(middle) <= given else (low, middle)
    return Student(non_embedding=low, total=given, family=None)


def advise(
    student: Student,
    tokens: int,
    candidates: Sequence[Candidate],
    *,
    own: LineRule | None = None,
    surfaces: Sequence[SurfaceRule] = (),
    gpus: tuple[int, str] | None = None,
    measurement: Measurement | None = None,
) -> Advice:
    """The candidates, best first.

    The first of the surfaces, by default the published one, gives every candidate an expected loss.
    Those that it puts above the lowest by more than the difference's own noise come last, if it was
    read from such students. Among the others those are first that the line's interval holds, by
    one's own sweep where there is one, or that are nearest to it; then those that have read much,
    then the cheaper. Where one's own sweep had such a student, its curve counts before the surface.
    One that is no larger than the student is never taken.

    With a `measurement` of all candidates their own losses on the user's text decide. One factor
    for all puts them on the surface's scale: that of the best of them, which keeps the loss that
    the surface gives it. A candidate whose own loss is no lower than that of one that is no larger
    comes after the others.
    """
    if tokens < LEAST_TOKENS * student.non_embedding:
        raise UserError(
            f"--tokens {format_count(tokens)} is next to nothing for a student of "
            f"{format_count(student.non_embedding)} parameters: give tokens as 126B or 400M"
        )
    surface, *others = surfaces or [PUBLISHED_RULE]
    rule, size = own or published_rule(student.non_embedding), student.non_embedding
    told = _surface(surface, student, tokens, candidates, measurement)
    above, losses = told.teacher_losses, told.expected_losses
    lowest = told.nearest or min(losses, key=losses.__getitem__)
    rows = []
    for one in candidates:
        error = surface.difference_error(size, tokens, (above[one.name], above[lowest]))
        difference = losses[one.name] / losses[lowest] - 1
        flops = training_flops(_total(student, one), tokens) + forward_flops(one.total, tokens)
        rows.append(
            Row(
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
                flops_total=flops,
                hours=None if gpus is None else hours(flops, gpus),
                measured=None if measurement is None else _measured(one, candidates, measurement),
                cautions=tuple(_cautions(one, candidates, surface, told.anchor, measurement)),
            )
        )
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
    taken = next(one for one in candidates if one.name == first.teacher)
    return Advice(
        student=student,
        tokens=tokens,
        take=first.teacher if first.is_larger else None,
        agreed=first.is_larger and first.in_line and not (reaches and first.told_worse),
        recommendations=tuple(rows),
        without_teacher=_alone(student, _total(student, taken), tokens, first, surface, gpus),
        linear_law=rule,
        surface=told,
        other_surfaces=tuple(
            _surface(one, student, tokens, candidates, measurement) for one in others
        ),
        tokenizers=_tokenizers(student, candidates),
        measure=None if measurement is None else measurement.as_dict(),
    )


def _total(student: Student, teacher: Candidate) -> int:
    """The student's parameters with the embeddings of this teacher's family, unless it has one."""
    if teacher.embedding is None or student.family is not None:
        return student.total
    return teacher.student_total(student.non_embedding)


def _tokenizers(student: Student, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Families whose tokenizers differ; empty where there is one, or nobody knows."""
    named = [student.family, *(one.family for one in candidates)]
    families = list(dict.fromkeys(name for name in named if name is not None))
    tokenizers = {find_family(name).models[0].tokenizer for name in families}
    return tuple(families) if len(tokenizers) > 1 else ()


def _teacher_losses(
    rule: SurfaceRule, candidates: Sequence[Candidate], measurement: Measurement | None
) -> tuple[str | None, dict[str, float]]:
    """Every candidate's own loss on a surface's scale, and whose fixes that scale if they were
    measured: the best one keeps what the surface gives it. A text's difficulty and the length of
    tokens fall out; what stays is by how many per cent each is above the best."""
    losses = {one.name: rule.teacher_loss(one.non_embedding, one.tokens) for one in candidates}
    if measurement is None:
        return None, losses
    measured = {name: measurement.models[name].nats_per_byte for name in losses}
    best = min(measured, key=measured.__getitem__)
    return best, {name: losses[best] / measured[best] * own for name, own in measured.items()}


def _measured(one: Candidate, candidates: Sequence[Candidate], measurement: Measurement) -> Measure:
    models = measurement.models
    best = min(models, key=lambda name: models[name].nats_per_byte)
    mine = models[one.name]
    above, error = mine.above(models[best])
    rival = _rival(one, candidates, measurement)
    outdone = None
    if rival is not None:
        lead = mine.above(models[rival.name])[0]
        if lead > 0 or (lead == 0 and rival.total < one.total):
            outdone = rival.name
    return Measure(
        **mine.as_dict(),
        above_lowest=above,
        # a difference to itself has no error
        above_lowest_stderr=None if one.name == best else error,
        no_better_than=outdone,
        rank_surprisal=measurement.rank_surprisal.get(one.name),
    )


def _rival(
    one: Candidate, candidates: Sequence[Candidate], measurement: Measurement
) -> Candidate | None:
    """The best reader of those that are no larger."""
    rivals = [other for other in candidates if other is not one and other.total <= one.total]
    models = measurement.models
    return min(rivals, key=lambda other: models[other.name].nats_per_byte, default=None)


def _beside(one: Candidate, rival: Candidate, measurement: Measurement) -> str | None:
    """A caution where a model reads no better than one that is no larger, or hardly better."""
    above, error = measurement.models[one.name].above(measurement.models[rival.name])
    smaller = rival.total < one.total
    size = "smaller" if smaller else "as large"
    noise = "its noise is not known" if error is None else f"paired standard error {error:.4f}"
    if above > 0 or (above == 0 and smaller):
        return (
            f"no better than {rival.name}, which is {size}: its own loss is {above:.4f} "
            f"nats/byte higher ({noise})"
        )
    if smaller and (error is None or -above <= BEYOND_NOISE * error):
        return (
            f"better than {rival.name}, which is smaller, by {-above:.4f} nats/byte only, "
            f"which may be noise ({noise})"
        )
    return None


def _cautions(
    one: Candidate,
    candidates: Sequence[Candidate],
    surface: SurfaceRule,
    anchor: str | None,
    measurement: Measurement | None,
) -> list[str]:
    found = []
    if one.tokens is None and anchor in (None, one.name):
        found.append(f"its training tokens are not known: {surface.teacher_tokens_name} are taken")
    low, high = surface.teachers
    if not low / SIZES_REACH <= one.non_embedding <= high * SIZES_REACH:
        found.append("its size lies outside of what the surface was read from")
    if measurement is None:
        return found
    mine, rival = measurement.models[one.name], _rival(one, candidates, measurement)
    told = None if rival is None else _beside(one, rival, measurement)
    found += [] if told is None else [told]
    if mine.changed_documents:
        found.append(
            f"its tokenizer does not give back {mine.changed_documents} of "
            f"{len(mine.document_bytes)} documents as they are: its loss is that of a slightly "
            "different text"
        )
    return found


def _alone(
    student: Student,
    total: int,
    tokens: int,
    first: Row,
    surface: SurfaceRule,
    gpus: tuple[int, str] | None,
) -> tuple[Alone, ...]:
    equal = round(first.flops_total / training_flops(total, 1))
    found = []
    for name, read in (("no teacher", tokens), ("no teacher, equal FLOPs", equal)):
        flops = training_flops(total, read)
        found.append(
            Alone(
                name=name,
                tokens=read,
                expected_loss=float(surface.surface.supervised.loss(student.non_embedding, read)),
                flops_total=flops,
                hours=None if gpus is None else hours(flops, gpus),
            )
        )
    return tuple(found)


def _surface(
    rule: SurfaceRule,
    student: Student,
    tokens: int,
    candidates: Sequence[Candidate],
    measurement: Measurement | None,
) -> SurfaceAdvice:
    anchor, above = _teacher_losses(rule, candidates, measurement)
    size = student.non_embedding
    losses = {name: float(rule.surface.loss(size, tokens, loss)) for name, loss in above.items()}
    larger = [one.name for one in candidates if one.non_embedding > size]
    caution = None
    if not rule.has_read(size, tokens):
        caution = "it was read from other sizes or tokens"
    return SurfaceAdvice(
        name=rule.name,
        source=rule.source,
        error=rule.error,
        nearest=min(larger, key=losses.__getitem__, default=None),
        anchor=anchor,
        caution=caution,
        teacher_losses=above,
        expected_losses=losses,
    )
