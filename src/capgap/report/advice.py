"""Advice for a person: which teacher to take, what that rests on, and the tables behind it."""

from collections.abc import Iterator

from capgap.law.advise import Advice, Alone, Row
from capgap.law.question import Question
from capgap.report.numbers import ranges
from capgap.sizes import format_count, format_percent
from capgap.stage import text_table

CONTESTED = (
    "Whether more tokens want a larger teacher is contested: Gemma 3 (arXiv 2503.19786) and this "
    "project's sweeps say yes, the published surface (arXiv 2502.08606) no."
)
RANK_SURPRISAL = (
    "; rank-surprisal: of the student on what each teacher writes (arXiv 2601.14249), lower is "
    "said to be better: a prior from one forward pass, which does not rank here"
)


def advice_sentences(advice: Advice) -> list[str]:
    """The teacher to take and why, the most important first."""
    return [text[:1].upper() + text[1:] for text in _sentences(advice)]


def _sentences(advice: Advice) -> Iterator[str]:
    line, surface = advice.linear_law, advice.surface
    own_line = line.source.startswith("your sweep")
    line_name = line.source if own_line else "the linear law"
    if advice.tokenizers:
        who = "student and teachers have" if advice.student.family else "these have"
        yield (
            f"{who} different tokenizers ({', '.join(advice.tokenizers)}): a student learns only "
            "from a teacher of its own, so choose the tokenizer first, or give the student another "
            "with `capgap adapt`."
        )
    yield _verdict(advice)
    if advice.take is not None:
        yield from _line_against_first(advice, line_name)
        yield from _surfaces_against_first(advice)
        if surface.caution is None:
            yield from _without_teacher(advice)
    if line.caution:
        yield f"{line_name}: {line.caution}."
    if surface.caution:
        yield (
            f"{surface.name}: {surface.caution}, so its losses are extrapolated and do not rank."
        )
    if not own_line:
        yield CONTESTED


def _verdict(advice: Advice) -> str:
    line, rows = advice.linear_law, advice.recommendations
    look, wanted = "what size to look for is not known", ranges(line.runs)
    if line.interval is not None:
        look = f"look for one of {wanted} parameters ({line.source})"
    if advice.take is None:
        size = format_count(advice.student.non_embedding)
        return f"take none of these: no candidate is larger than the student of {size}; {look}."
    times = f"{rows[0].ratio:.1f} times the student"
    if any(row.in_line and row.is_larger for row in rows):
        return f"take {advice.take}, {times}."
    if line.interval is None:
        return f"take {advice.take} if it must be one of these: no line says which size is best."
    if advice.surface.caution is None:
        return (
            f"take {advice.take}, {times}, by the surface alone: the line asks for {wanted} "
            "parameters, which none of these has."
        )
    return (
        f"none of these has a good size: {look}; if it must be one of these, {advice.take} is "
        f"nearest, {times}."
    )


def _line_against_first(advice: Advice, name: str) -> Iterator[str]:
    first, line = advice.recommendations[0], advice.linear_law
    if line.interval is None:
        return
    wants = f"{name} wants {ranges(line.runs)} parameters"
    within = [row for row in advice.recommendations if row.in_line and row.is_larger]
    if first.in_line:
        yield f"{wants}, and {first.teacher} has {format_count(first.non_embedding)}."
    elif within:
        other = min(within, key=lambda row: row.difference)
        yield f"{wants}: {other.teacher}, but {_why_not(other, advice)}."


def _why_not(row: Row, advice: Advice) -> str:
    if row.measured is not None and row.measured.no_better_than is not None:
        return f"it reads your text no better than {row.measured.no_better_than}"
    if row.told_worse and advice.surface.caution is None:
        error = f"± {row.difference_stderr:.1%}"
        return f"the surface puts it {row.difference:.1%} of the loss above the lowest ({error})"
    return f"it has read fewer tokens than {advice.take}"


def _surfaces_against_first(advice: Advice) -> Iterator[str]:
    first, surface = advice.recommendations[0], advice.surface
    if surface.caution is None:
        measured = "" if surface.anchor is None else ", from their own losses on your text"
        if first.teacher == surface.nearest:
            yield f"{surface.name}{measured} gives it the lowest loss."
        else:
            within = "" if first.told_worse else ", within what it can tell apart"
            yield (
                f"{surface.name}{measured} puts {surface.nearest} lowest and {first.teacher} "
                f"{first.difference:.2%} above it (± {first.difference_stderr:.2%}{within})."
            )
    elif surface.anchor is not None:
        yield f"your text is read best by {surface.anchor}."
    for other in advice.other_surfaces:
        if other.nearest is not None and other.caution is None:
            losses = other.expected_losses
            apart = losses[first.teacher] / losses[other.nearest] - 1
            yield (
                f"{other.name} puts {other.nearest} lowest and {first.teacher} {apart:.1%} above "
                "it."
            )


def _without_teacher(advice: Advice) -> Iterator[str]:
    first, (same, equal) = advice.recommendations[0], advice.without_teacher
    if first.expected_loss >= same.expected_loss:
        yield (
            f"by the surface no teacher helps: without one the loss is {same.expected_loss:.3f}, "
            "because so many tokens teach the student as much."
        )
    elif first.expected_loss >= equal.expected_loss:
        yield (
            "by the surface the same compute without a teacher is worth as much: "
            f"{format_count(equal.tokens)} tokens alone give {equal.expected_loss:.3f}, "
            f"{first.teacher} {first.expected_loss:.3f}."
        )


def advice_text(found: Advice) -> str:
    """The sentences, and tables of what they rest on (docs/cli.md has the keys)."""
    student, surface = found.student, found.surface
    lines = [
        *advice_sentences(found),
        f"\nA student of {format_count(student.non_embedding)} parameters without embeddings, "
        f"{format_count(student.total)} in all, on {format_count(found.tokens)} tokens:\n",
        _ranking(found),
    ]
    if found.measure is not None:
        lines += ["", _measurements(found)]
    cautions: dict[str, list[str]] = {}
    for row in found.recommendations:
        for caution in row.cautions:
            cautions.setdefault(caution, []).append(row.teacher)
    return "\n".join(
        [
            *lines,
            "",
            *(f"{', '.join(names)}: {caution}" for caution, names in cautions.items()),
            f"losses are of the text of {surface.source}, to {format_percent(surface.error)}; "
            "above the lowest: with the standard error of that difference",
        ]
    )


def _ranking(found: Advice) -> str:
    names = ["teacher", "size", "T/S", "read", "since", "expected loss", "above the lowest"]
    names += ["FLOPs"] + (["hours"] if found.recommendations[0].hours is not None else [])

    def costs(one: Row | Alone, above: str) -> list[str]:
        hours = [] if one.hours is None else [f"{one.hours:,.0f}"]
        return [f"{one.expected_loss:.3f}", above, f"{one.flops_total:.2e}", *hours]

    rows, marks = [], [""]
    for row in found.recommendations:
        read = "-" if row.teacher_tokens is None else format_count(row.teacher_tokens)
        size = [format_count(row.non_embedding), f"{row.ratio:.2f}", read, row.year or "-"]
        above = f"{row.difference:.2%} ± {row.difference_stderr:.2%}" if row.difference else ""
        rows.append([row.teacher, *size, *costs(row, above)])
        own = ["size of the line"] if row.in_line else []
        own += ["lowest on the surface"] if row.teacher == found.surface.nearest else []
        marks.append("; ".join(own) if row.is_larger else "no larger than the student")
    for one in found.without_teacher:
        rows.append([one.name, "", "", format_count(one.tokens), "", *costs(one, "")])
        marks.append("")
    marked = zip(text_table(names, rows, left=1).splitlines(), marks, strict=True)
    return "\n".join(f"{line}  {mark}".rstrip() for line, mark in marked)


def _measurements(found: Advice) -> str:
    names = ["teacher", "nats/byte", "above the best", "nats/token", "entropy", "loss - entropy"]
    names.append("calibration error")
    told = [(row.teacher, one) for row in found.recommendations if (one := row.measured)]
    rows = [
        [
            teacher,
            _with_error(one.nats_per_byte, one.nats_per_byte_stderr),
            _with_error(one.above_lowest, one.above_lowest_stderr) if one.above_lowest else "",
            f"{one.nats_per_token:.3f}",
            f"{one.entropy:.3f}",
            f"{one.overconfidence:+.3f}",
            f"{one.calibration_error:.1%}",
        ]
        for teacher, one in told
    ]
    ratios = [one.rank_surprisal for _, one in told]
    if ranked := any(ratio is not None for ratio in ratios):
        names.append("rank-surprisal")
        for own, ratio in zip(rows, ratios, strict=True):
            own.append("" if ratio is None else f"{ratio:.2f}")
    measure = found.measure or {}
    kind = "documents" if int(measure["documents"]) > 1 else "document, so no noise is known,"
    return text_table(names, rows, left=1) + (
        f"\non {measure['documents']} {kind} of {measure['corpus']}, {measure['bytes']:,} bytes, "
        f"in windows of {measure['window']} tokens; ± is a standard error over documents"
        + (RANK_SURPRISAL if ranked else "")
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def question_text(asked: Question) -> str:
    """The grids of a question, and which of them answers it."""
    names = ["grid", "students", "teachers", "they are", "of the cost", "reach", "best teacher"]
    rows = []
    for number, grid in enumerate(asked.grids, 1):
        students, teachers = (
            f"{len(sizes)}: {format_count(min(sizes))} to {format_count(max(sizes))}"
            for sizes in (grid.students, grid.teachers)
        )
        factor = "not known" if grid.factor is None else f"to a factor of {grid.factor:.1f}"
        made = "trained" if grid.trained else "yours"
        share = format_percent(grid.share)
        rows.append([str(number), students, teachers, made, share, f"{grid.reach:g}x", factor])
    answer = "No grid here tells neighbours apart: give fewer teachers, or try them."
    if asked.answer is not None:
        grid = asked.grids[asked.answer]
        answer = (
            f"Grid {asked.answer + 1} answers for {format_percent(grid.share)} of that: it tells "
            f"the best teacher to a factor of {grid.factor:.1f}, {grid.reach:g} times beyond its "
            "largest student."
        )
    table = "The student is too small for a smaller grid."
    return "\n".join(
        [
            f"Which teacher is best for {format_count(asked.student)} parameters on "
            f"{format_count(asked.tokens)} tokens? Trying all takes {asked.flops:.2g} FLOPs; "
            f"neighbours among them are {asked.spacing:.1f} times apart.",
            f"{answer}\n",
            text_table(names, rows, left=1) if rows else table,
            f"\nTwo seeds, {asked.tokens / asked.student:.3g} tokens for each of a student's "
            "parameters. The factor is the 90% interval in pretended sweeps with the noise and the "
            "luck of this project's own (docs/results). It holds if the best teacher grows as a "
            "power of the student on the whole way, which no small grid can tell.",
        ]
    )
