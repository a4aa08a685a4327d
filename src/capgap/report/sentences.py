"""The answer in words: a law in at most six sentences of at most thirty words.

Everything is read from the curves (`Point.worse`, `Point.cost`, `Optimum`), never from the lowest
cell, so that no two sentences can contradict each other.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from math import log
from typing import Any

from capgap.law.law import Contrast, Curve, Law, Line, runs_of
from capgap.law.published import PUBLISHED_RESOLUTION
from capgap.report.numbers import ranges, sizes, span
from capgap.sizes import format_count

MOST_SENTENCES = 6
MOST_WORDS = 30
MOST_NAMED = 3  # teachers of a search in one sentence
DOUBLED = log(2)  # slopes are given for a teacher twice as large
# An exponent nearer to 1 than this makes no difference that anybody could use
PROPORTIONAL = 0.05
# An interval of the exponent that is wider says nothing that is worth a number
WIDEST_EXPONENT = 3.0


def sentences(law: Law) -> list[str]:
    """At most six: which teachers will do; what tokens change; cut or capacity; whether a teacher
    can be too large; what distilling gains; the law, if there is one. The first is the headline."""
    if not law.curves:
        return ["No student has been distilled yet: nothing can be said about teachers."]
    names = dict.fromkeys(curve.architecture for curve in law.curves)
    by_name = {name: _of_architecture(law, name) for name in names}
    if len(by_name) == 1:
        return next(iter(by_name.values()))[:MOST_SENTENCES]
    # of several architectures the answers first, then how the best teacher grows
    answers = [f"{name}: {own[0]}" for name, own in by_name.items()]
    laws = [f"{n}: {own[-1]}" for n, own in by_name.items() if own[1:] and "the student" in own[-1]]
    return [*answers[: MOST_SENTENCES - 1], *laws][:MOST_SENTENCES]


def _of_architecture(law: Law, architecture: str) -> list[str]:
    curves = [curve for curve in law.curves if curve.architecture == architecture]
    shown = main_curves(curves)
    if all(point.cost is None for curve in curves for point in curve.points):
        best = sorted({curve.optimum.best for curve in shown})
        lowest = f"; the lowest loss is with {sizes(best)}" if len(best) < 3 else ""
        return [
            "Nothing can be said beyond noise, which is unknown: no run was repeated, and no "
            f"student has four teachers{lowest}."
        ]
    init = shown[0].init
    contrasts: dict[str, list[Contrast]] = {}
    for one in law.contrasts:
        if one.architecture == architecture and (one.what != "tokens" or one.inits[0] == init):
            contrasts.setdefault(one.what, []).append(one)
    lines = [one for one in law.lines if one.group.architecture == architecture]
    found = [
        which_teachers(shown),
        *(_of_tokens(one, law.confidence) for one in contrasts.get("tokens", ())[:1]),
        *_of_cut(contrasts.get("init", ())),
        *_of_chain(contrasts.get("chain", ()), law.confidence),
        _of_size(shown),
        *_of_gain(shown),
        *_of_line(_main_line(lines, init), law),
    ]
    return [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in found]


def main_curves(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that the answer is about: of students cut out of their teachers, or as the sweep
    has them, at each student's smallest and largest token budget."""
    inits = {curve.init for curve in curves}
    init = "pruned" if "pruned" in inits else min(inits)
    budgets: dict[int, list[int]] = {}
    for curve in curves:
        if curve.init == init:
            budgets.setdefault(curve.student_size, []).append(curve.tokens)
    ends = {size: (min(tokens), max(tokens)) for size, tokens in budgets.items()}
    return [c for c in curves if c.init == init and c.tokens in ends[c.student_size]]


def answer(law: Law, search: Mapping[str, Any] | None) -> list[str]:
    """The sentences of a search's folder, by its search.json, or of a law."""
    return search_sentences(search) if search else sentences(law)


def search_sentences(trace: Mapping[str, Any]) -> list[str]:
    """The choice of a search, from search.json: the answer of a grid of which only a part was run,
    instead of the law's, for which too little was run on purpose."""
    choices = trace["choices"]
    if not choices:
        return ["No run of the search has finished: nothing is chosen yet."]
    by_teacher: dict[int, list[int]] = {}
    for one in choices:
        by_teacher.setdefault(one["teacher_size"], []).append(one["student_size"])
    taken = "; ".join(
        f"the {format_count(teacher)} teacher for {sizes(students)}"
        for teacher, students in sorted(by_teacher.items())
    )
    if len(by_teacher) > MOST_NAMED:
        ratios = [one["ratio"] for one in choices]
        taken = f"teachers {span(ratios, 1)} times the student, as in the table"
    found = [f"Of the teachers tried, take {taken}."]
    safe = [one["safe_probability"] for one in choices]
    if None not in safe:
        found.append(
            f"Another teacher is better by more than {trace['tolerance']:.2%} of the loss with a "
            f"probability of at most {1 - min(safe):.0%}."
        )
    budget = format_count(trace["rungs"][-1])
    found.append(
        f"The search has spent {trace['spent_fraction']:.0%} of the full grid's compute, for "
        f"students on {budget} tokens."
    )
    return found


def which_teachers(curves: Sequence[Curve]) -> str:
    """Which teachers will do for each student and what the others cost, in the first of several
    ways that holds for all students, and for few and many tokens alike."""
    budgets = sorted({curve.tokens for curve in curves})
    ends, parts = (budgets[0], budgets[-1]), [curves]
    # unless every student has budgets of its own
    if len(budgets) > 1 and len({c.student_size for c in curves}) * len(budgets) == len(curves):
        parts = [[curve for curve in curves if curve.tokens == tokens] for tokens in ends]
    ways = (_same_teachers, _ratios, _common_teachers, _of_each_end)
    for way, detail in product(ways, (2, 1, 0)):
        texts = [way(own) and way(own) + _notes(own, detail) for own in parts]
        text = texts[0]
        if len(texts) > 1:
            few, many = map(format_count, ends)
            text = f"with {few} tokens {text}; with {many}, {texts[1]}"
        if all(texts) and len(text.split()) <= MOST_WORDS:
            return text
    return "which teachers will do differs from student to student: the table has all"


def _same_teachers(curves: Sequence[Curve]) -> str:
    """Where the same teachers will do for all students."""
    if not any(point.worse for curve in curves for point in curve.points):
        cheapest = min(point.teacher_size for curve in curves for point in curve.points)
        return f"all teachers do alike, {format_count(cheapest)} the cheapest"
    sets = {tuple(point.teacher_size for point in curve.will_do) for curve in curves}
    return _common_teachers(curves) if len(sets) == 1 else ""


def _common_teachers(curves: Sequence[Curve]) -> str:
    """The teachers that will do for every student."""
    common = set.intersection(*({p.teacher_size for p in c.will_do} for c in curves))
    cheapest = format_count(min(common, default=0))
    if len(common) < 2:
        return f"take the {cheapest} teacher" if common else ""
    return f"any teacher of {teachers_of(curves[0], common)} will do, {cheapest} the cheapest"


def teachers_of(curve: Curve, these: Collection[int] | None = None) -> str:
    """Teachers that will do, or these, neighbours as a range: "60k or 200k to 480k"."""
    held = {point.teacher_size for point in curve.will_do} if these is None else these
    return ranges(runs_of((p.teacher_size, p.teacher_size in held) for p in curve.points))


def _ratios(curves: Sequence[Curve]) -> str:
    """T/S of teachers that will do for every student."""
    ratios = [
        [point.teacher_parameters / curve.student_parameters for point in curve.will_do]
        for curve in curves
    ]
    low, high = max(map(min, ratios)), min(map(max, ratios))
    return f"teachers {span((low, high), 1)} times the student will do" if low <= high else ""


def _of_each_end(curves: Sequence[Curve]) -> str:
    """The teachers of the smallest and the largest student, where nothing holds for all."""
    ends = (pick(curves, key=lambda curve: curve.student_parameters) for pick in (min, max))
    takes = [f"{teachers_of(c)} for the {format_count(c.student_parameters)} student" for c in ends]
    return f"take {', '.join(dict.fromkeys(takes))}"


def _notes(curves: Sequence[Curve], detail: int) -> str:
    """In brackets the cost of the teachers that will not do; with more detail its share of the
    loss, and the noise among those that will do; with none nothing."""
    within = max(point.cost or 0.0 for curve in curves for point in curve.will_do)
    others = [(p.cost or 0.0, p.loss) for curve in curves for p in curve.points if p.worse]
    cost, loss = max(others, default=(0.0, 1.0))
    notes = []
    if detail > 1 and within >= 0.0005:
        notes.append(f"within {within:.3f} nats, which is noise")
    if detail > 1 and others:
        notes.append(f"others cost up to {cost:.3f} nats, {cost / (loss - cost):.1%}")
    elif detail and others:
        notes.append(f"others: up to {cost:.3f} nats")
    return f" ({'; '.join(notes)})" if notes else ""


def _of_tokens(contrast: Contrast, confidence: float) -> str:
    between, instead = "one budget to the other", "with the larger budget of each student"
    if contrast.tokens is not None:
        many, few = map(format_count, contrast.tokens)
        between, instead = f"{few} to {many}", f"with {many} instead of {few}"
    slope, sign = contrast.slope, -1 if contrast.is_told and contrast.slope.value > 0 else 1
    gain = -sign * DOUBLED * slope.value
    within = f"{span([-sign * DOUBLED * end for end in (slope.low, slope.high)])} nats"
    if not contrast.is_told:
        return (
            f"whether more tokens want a larger teacher cannot be told: from {between}, one twice "
            f"as large gains {within} ({confidence:.0%})"
        )
    size, verb = ("larger", "gains") if sign > 0 else ("smaller", "loses")
    return (
        f"more tokens want a {size} teacher: {instead}, one twice as large {verb} {gain:.3f} nats "
        f"more ({confidence:.0%}: {within})"
    )


def _of_cut(contrasts: Sequence[Contrast]) -> Iterator[str]:
    """Students cut out of each teacher beside students with the same first weights for all."""
    known = [one for one in contrasts if one.is_told]
    if not contrasts:
        return
    if not known:
        yield (
            "the cut does not make the difference: students with the same first weights for every "
            "teacher show the same curve, within noise"
        )
        return
    first = min(known, key=lambda one: one.fewest)
    amounts = f"{format_count(first.fewest)} tokens one twice as large"
    amount = f"{abs(DOUBLED * first.slope.value):.3f} nats more than without a cut"
    if first.slope.value < 0:
        yield f"students gain by being cut out of large teachers: with {amounts} gives {amount}"
        return
    last = max(contrasts, key=lambda one: one.fewest)
    rest = f", with {format_count(last.fewest)} {DOUBLED * last.slope.value:.3f}"
    rest += "" if last.is_told else " (noise)"
    rest = "" if last is first else rest
    yield f"the cut itself makes large teachers costly: with {amounts} costs {amount}{rest}"


def _of_chain(contrasts: Sequence[Contrast], confidence: float) -> Iterator[str]:
    """Gain of an assistant between teacher and student for the same FLOPs."""
    for one in sorted(contrasts, key=lambda contrast: -contrast.fewest)[:1]:
        level = one.level
        amount = f"{abs(level.value):.3f} nats"
        amount += f" ({confidence:.0%}: {level.low:.3f} to {level.high:.3f})"
        side = "lower" if level.value < 0 else "higher"
        if level.holds(0.0):
            yield f"an assistant between teacher and student brings nothing beyond noise: {amount}"
        else:
            yield (
                f"through an assistant students end {amount} {side} than cut at once, for the same "
                "FLOPs"
            )


def _of_size(curves: Sequence[Curve]) -> str:
    """Whether too large a teacher is harmful."""
    cursed = [curve for curve in curves if curve.cursed]
    if not cursed:
        return "too large a teacher does no harm here: the largest is not worse beyond noise"
    harmed = sorted({curve.tokens for curve in cursed})
    when = f" with {sizes(harmed)} tokens" if len(harmed) < len({c.tokens for c in curves}) else ""
    students = {curve.student_size for curve in curves if curve.tokens in harmed}
    hurt = len({curve.student_size for curve in cursed})
    costs = span([curve.points[-1].cost or 0.0 for curve in cursed])
    return (
        f"too large a teacher is harmful{when}: the largest costs {hurt} of {len(students)} "
        f"students {costs} nats more than the best"
    )


def _of_gain(curves: Sequence[Curve]) -> Iterator[str]:
    """Gain of distilling over the same student alone, at equal tokens and at equal FLOPs."""
    best = [(curve, point) for curve in curves if (point := curve.gainer) is not None]
    by_budget: dict[int, list[float]] = {}
    for curve, point in best:
        by_budget.setdefault(curve.tokens, []).append(point.gain or 0.0)
    if not best:
        return
    errors = [point.gain_stderr for _, point in best if point.gain_stderr is not None]
    error = f" (± {max(errors):.3f})" if errors else ""
    longer = [point.gain_flops for _, point in best if point.gain_flops is not None]
    rest = f", {span(longer)} for as many FLOPs" if longer else ""
    gains = [point.gain or 0.0 for _, point in best]
    if round(max(gains), 3) <= 0:
        yield f"distilling gains nothing over the same student trained alone: {span(gains)} nats"
        return
    gained = f"{_gained(gains)} nats"
    few, many = min(by_budget), max(by_budget)
    if len(by_budget) == 2 and len(by_budget[few]) == len(by_budget[many]):
        later = _gained(by_budget[many]).removeprefix("gains ")
        gained = f"{_gained(by_budget[few])} nats with {format_count(few)} tokens and {later} with "
        gained += format_count(many)
    alone = f"compared with the same student alone{rest}"
    yield f"distilling from the best teacher {gained}{error}, {alone}"


def _gained(gains: Sequence[float]) -> str:
    if round(max(gains), 3) <= 0:
        return f"loses {span([-gain for gain in gains])}"
    return f"{'gains' if round(min(gains), 3) >= 0 else 'changes by'} {span(gains)}"


def _main_line(lines: Sequence[Line], init: str) -> Line | None:
    """The law to tell: identified before not, of as many tokens a parameter before of the same
    tokens, with more tokens before fewer."""
    return max(
        (line for line in lines if line.group.init == init),
        key=lambda line: (
            line.is_identified,
            line.located,
            line.group.tokens is None,
            line.group.tokens or line.group.tokens_per_parameter or 0,
        ),
        default=None,
    )


def _of_line(line: Line | None, law: Law) -> Iterator[str]:
    if line is None:
        return
    if line.exponent is None or line.refused == "too_few_students":
        students = line.located + line.bounded
        why = f"{line.bounded} of {students} students have it at an end of the teachers tried"
        if students < 3 or not line.bounded:
            why = "that takes three students with teachers enough to place it"
        yield f"how the best teacher grows with the student is not known: {why}"
        return
    low, high = line.exponent.low, line.exponent.high
    if max(abs(low), abs(high)) > 2 * WIDEST_EXPONENT or high - low > WIDEST_EXPONENT:
        yield "how fast the best teacher grows with the student cannot be told from these students"
        return
    times = f"{law.confidence:.0%}: {span((2**low, 2**high), 1)}"
    if not line.is_identified or line.ratio is None:
        yield (
            "how fast the best teacher grows with the student cannot be told: twice the student "
            f"may want {span((2**low, 2**high), 1)} times the teacher ({law.confidence:.0%})"
        )
    else:
        twice = f"twice the student wants {2**line.exponent.value:.1f} times the teacher ({times})"
        # the published line was read from a grid too: what that resolves is what is compared
        least, most = PUBLISHED_RESOLUTION
        published = f"as published ({span((least, most), 1)})"
        if line.ratio.high < least or line.ratio.low > most:
            published = f"unlike the published {span((least, most), 1)}"
        ratio = f"the best is {line.ratio.value:.1f} times the student"
        ratio += f" ({span((line.ratio.low, line.ratio.high), 1)}), {published}"
        bent = low > 1 + PROPORTIONAL or high < 1 - PROPORTIONAL
        # no one ratio then
        yield f"{twice}, not in proportion" if bent else f"{twice}; {ratio}"
