"""The words of advice: which teacher to take, and what that rests on."""

from collections.abc import Iterator

from capgap.law.advise import Advice, Row, SurfaceAdvice
from capgap.law.rules import LineRule
from capgap.sizes import format_count

CONTESTED = (
    "Whether more tokens want a larger teacher is contested: Gemma 3 (arXiv 2503.19786) and this "
    "project's sweeps say yes, the published surface (arXiv 2502.08606) no."
)


def advice_sentences(advice: Advice) -> list[str]:
    """What to take and why, the most important first."""
    found = [*_tokenizers(advice), _verdict(advice), *_why(advice), *_alone(advice)]
    line, surface = advice.linear_law, advice.surface
    beyond = [f"{_capital(_name(line))}: {line.caution}."] if line.caution else []
    if surface.caution:
        told = f"{surface.caution}, so its losses are extrapolated and do not rank"
        beyond.append(f"{_capital(surface.name)}: {told}.")
    own = advice.linear_law.source.startswith("your sweep")
    return [*found, *beyond, *([] if own else [CONTESTED])]


def _tokenizers(advice: Advice) -> Iterator[str]:
    if not advice.tokenizers:
        return
    names = ", ".join(advice.tokenizers)
    who = "Student and teachers have" if advice.student.family else "These have"
    yield (
        f"{who} different tokenizers ({names}): a student learns only from a teacher of its own, "
        "so choose the tokenizer first, or give the student another with `capgap adapt`."
    )


def _verdict(advice: Advice) -> str:
    rows = advice.recommendations
    size = format_count(advice.student.non_embedding)
    if advice.take is None:
        return (
            f"Take none of these: no candidate is larger than the student of {size}; "
            f"{_look_for(advice.linear_law)}."
        )
    if any(row.in_line and row.is_larger for row in rows):
        return f"Take {advice.take}, {rows[0].ratio:.1f} times the student."
    if advice.linear_law.interval is None:
        return f"Take {advice.take} if it must be one of these: no line says which size is best."
    if advice.surface.caution is None:
        return (
            f"Take {advice.take}, {rows[0].ratio:.1f} times the student, by the surface alone: the "
            f"line asks for {_sizes(advice.linear_law)} parameters, which none of these has."
        )
    return (
        f"None of these has a good size: {_look_for(advice.linear_law)}; if it must be one of "
        f"these, {advice.take} is nearest, {rows[0].ratio:.1f} times the student."
    )


def _look_for(line: LineRule) -> str:
    if line.interval is None:
        return "what size to look for is not known"
    return f"look for one of {_sizes(line)} parameters ({line.source})"


def _sizes(line: LineRule) -> str:
    """What a line leaves: "42k or 100k to 155k"."""
    runs = [dict.fromkeys(map(format_count, run)) for run in line.runs]
    return " or ".join(" to ".join(run) for run in runs)


def _why(advice: Advice) -> Iterator[str]:
    """Line and surface, each for itself, and where they part."""
    if advice.take is None:
        return
    first, line = advice.recommendations[0], advice.linear_law
    if line.interval is not None:
        within = [row for row in advice.recommendations if row.in_line and row.is_larger]
        told = f"{_capital(_name(line))} wants {_sizes(line)} parameters"
        if first.in_line:
            yield f"{told}, and {first.teacher} has {format_count(first.non_embedding)}."
        elif within:
            other = min(within, key=lambda row: row.difference)
            yield f"{told}: {other.teacher}, {_why_not(other, advice)}."
    if advice.surface.caution is None:
        yield _of_surface(first, advice)
    elif advice.surface.anchor is not None:
        yield f"Your text is read best by {advice.surface.anchor}."
    for surface in advice.other_surfaces:
        if surface.nearest is not None and surface.caution is None:
            losses = surface.expected_losses
            apart = losses[first.teacher] / losses[surface.nearest] - 1
            yield (
                f"{_capital(surface.name)} puts {surface.nearest} lowest and {first.teacher} "
                f"{apart:.1%} above it."
            )


def _why_not(row: Row, advice: Advice) -> str:
    if row.measured is not None and row.measured.no_better_than is not None:
        return f"but it reads your text no better than {row.measured.no_better_than}"
    if row.told_worse and advice.surface.caution is None:
        return (
            f"but the surface puts it {row.difference:.1%} of the loss above the lowest "
            f"(± {row.difference_stderr:.1%})"
        )
    return f"but it has read fewer tokens than {advice.take}"


def _of_surface(first: Row, advice: Advice) -> str:
    surface = advice.surface
    measured = "" if surface.anchor is None else ", from their own losses on your text"
    if first.teacher == surface.nearest:
        return f"{_capital(surface.name)}{measured} gives it the lowest loss."
    sign = "" if first.told_worse else ", within what it can tell apart"
    return (
        f"{_capital(surface.name)}{measured} puts {surface.nearest} lowest and {first.teacher} "
        f"{first.difference:.2%} above it (± {first.difference_stderr:.2%}{sign})."
    )


def _alone(advice: Advice) -> Iterator[str]:
    if advice.take is None or advice.surface.caution is not None:
        return
    first = advice.recommendations[0]
    same, equal = advice.without_teacher
    if first.expected_loss >= same.expected_loss:
        yield (
            f"By the surface no teacher helps: without one the loss is {same.expected_loss:.3f}, "
            "because so many tokens teach the student as much."
        )
    elif first.expected_loss >= equal.expected_loss:
        yield (
            "By the surface the same compute without a teacher is worth as much: "
            f"{format_count(equal.tokens)} tokens alone give {equal.expected_loss:.3f}, "
            f"{first.teacher} {first.expected_loss:.3f}."
        )


def _name(one: LineRule | SurfaceAdvice) -> str:
    if isinstance(one, SurfaceAdvice):
        return one.name
    return one.source if one.source.startswith("your sweep") else "the linear law"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
