"""All words of the answer: a law in at most six sentences of at most thirty words.

Everything is read from the curves (`Point.worse`, `Point.cost`, `Optimum`), never from the lowest
cell, so that no two sentences can contradict each other.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from capgap.law.law import Contrast, Curve, Estimate, Law, Line
from capgap.law.published import PUBLISHED_RESOLUTION
from capgap.report.numbers import listed
from capgap.sizes import format_count

MOST_SENTENCES = 6
MOST_WORDS = 30
MOST_NAMED = 3  # teachers of a search in one sentence
DOUBLED = 0.6931471805599453  # ln 2: slopes are told for a teacher twice as large
# An exponent nearer to 1 than this makes no difference that anybody could use
PROPORTIONAL = 0.05
# An interval of the exponent that is wider says nothing that is worth a number
WIDEST_EXPONENT = 3.0


def sentences(law: Law) -> list[str]:
    """Which teachers will do; what tokens change; cut or capacity; whether a teacher can be too
    large; what distilling gains; the law, if there is one. The first is the headline."""
    if not law.curves:
        return ["No student has been distilled yet: nothing can be said about teachers."]
    names = list(dict.fromkeys(curve.architecture for curve in law.curves))
    if len(names) == 1:
        return _of_one(law, names[0])[:MOST_SENTENCES]
    # of several architectures the answers first, then how the best teacher grows
    told = [f"{name}: {_of_one(law, name)[0]}" for name in names]
    laws = [
        f"{name}: {own[-1]}"
        for name in names
        if len(own := _of_one(law, name)) > 1 and "the student" in own[-1]
    ]
    return [*told[: MOST_SENTENCES - 1], *laws][:MOST_SENTENCES]


def _of_one(law: Law, architecture: str) -> list[str]:
    curves = [curve for curve in law.curves if curve.architecture == architecture]
    shown = main_curves(curves)
    if all(point.cost is None for curve in curves for point in curve.points):
        return [_unknown(shown)]
    contrasts = [one for one in law.contrasts if one.architecture == architecture]
    init = shown[0].init
    tokens = next((c for c in contrasts if c.what == "tokens" and c.inits[0] == init), None)
    cuts = [c for c in contrasts if c.what == "init"]
    lines = [one for one in law.lines if one.group.architecture == architecture]
    found = [
        which_teachers(shown),
        "" if tokens is None else _of_tokens(tokens, law.confidence),
        _of_cut(cuts),
        _of_chain([c for c in contrasts if c.what == "chain"], law.confidence),
        _of_size(shown),
        _of_gain(shown),
        _of_line(_main_line(lines, init), law),
    ]
    return [sentence for sentence in found if sentence]


def main_curves(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that the answer is about: of students cut out of their teachers, or as the sweep
    has them, at each student's smallest and largest token budget."""
    inits = {curve.init for curve in curves}
    init = "pruned" if "pruned" in inits else min(inits)
    own = [curve for curve in curves if curve.init == init]
    ends: dict[int, list[int]] = {}
    for curve in own:
        ends.setdefault(curve.student_size, []).append(curve.tokens)
    return [
        curve
        for curve in own
        if curve.tokens in (min(ends[curve.student_size]), max(ends[curve.student_size]))
    ]


def answer(law: Law, search: Mapping[str, Any] | None) -> list[str]:
    """The sentences of a search's folder, by its search.json, or of a law."""
    return search_sentences(search) if search else sentences(law)


def search_sentences(trace: Mapping[str, Any]) -> list[str]:
    """What a search chose, from search.json: the answer of a grid of which only a part was run, in
    place of the law's, for which too little was run on purpose."""
    if not trace["choices"]:
        return ["No run of the search has finished: nothing is chosen yet."]
    by_teacher: dict[int, list[int]] = {}
    for one in trace["choices"]:
        by_teacher.setdefault(one["teacher_size"], []).append(one["student_size"])
    taken = "; ".join(
        f"the {format_count(teacher)} teacher for {_listed(students)}"
        for teacher, students in sorted(by_teacher.items())
    )
    if len(by_teacher) > MOST_NAMED:
        ratios = [one["ratio"] for one in trace["choices"]]
        taken = f"teachers {_span(min(ratios), max(ratios), 1)} times the student, as in the table"
    found = [f"Of the teachers tried, take {taken}."]
    safe = [one["safe_probability"] for one in trace["choices"]]
    if all(share is not None for share in safe):
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


def _unknown(curves: Sequence[Curve]) -> str:
    best = {curve.optimum.best for curve in curves}
    lowest = f"; the lowest loss is with {_listed(sorted(best))}" if len(best) < 3 else ""
    return (
        "Nothing can be said beyond noise, which is unknown: no run was repeated, and no student "
        f"has four teachers{lowest}."
    )


def which_teachers(curves: Sequence[Curve]) -> str:
    """Which teachers will do for each student, as a set, and what the others cost."""
    budgets = sorted({curve.tokens for curve in curves})
    students = {curve.student_size for curve in curves}
    if len(budgets) > 1 and len(students) * len(budgets) > len(curves):
        budgets = []  # every student has budgets of its own
    if len(budgets) < 2:
        return _first_that_fits(
            lambda: _by_set(curves), lambda: _by_ratio(curves), lambda: _shortly(curves)
        )
    parts = [[curve for curve in curves if curve.tokens == tokens] for tokens in budgets]
    few, many = (format_count(tokens) for tokens in (budgets[0], budgets[-1]))

    def both(tell: Callable[[Sequence[Curve]], str]) -> str:
        first, last = tell(parts[0]), tell(parts[-1])
        return f"With {few} tokens {first}; with {many}, {last}." if first and last else ""

    ways = (_set_with_cost, _set_alone, _ratios_alone, _ends_alone)
    return _first_that_fits(*(lambda way=way: both(way) for way in ways))


def _first_that_fits(*ways: Callable[[], str]) -> str:
    told = ""
    for way in ways:
        told = way()
        if told and len(told.split()) <= MOST_WORDS:
            break
    return told


def _sets(curves: Sequence[Curve]) -> dict[tuple[int, ...], list[Curve]]:
    """Curves by the teachers that will do."""
    found: dict[tuple[int, ...], list[Curve]] = {}
    for curve in curves:
        found.setdefault(tuple(p.teacher_size for p in curve.will_do), []).append(curve)
    return found


def _by_set(curves: Sequence[Curve]) -> str:
    """For one student, or several of which the same teachers will do."""
    sets = _sets(curves)
    sizes = [curve.student_size for curve in curves]
    if len(sets) > 2 or len(set(sizes)) < len(sizes):
        return ""
    if len(sets) == 2:
        parts = [
            f"for {_listed([c.student_parameters for c in own])} {_set_alone(own)}"
            for own in sets.values()
        ]
        return _sentence("; ".join(parts) + _cost_of_others(curves))
    if all(not point.worse for curve in curves for point in curve.points):
        return _flat(curves)
    return _sentence(_set_with_noise(curves) + _cost_of_others(curves))


def _flat(curves: Sequence[Curve]) -> str:
    points = [point for curve in curves for point in curve.points]
    sizes = [point.teacher_size for point in points]
    most = max(point.cost or 0.0 for point in points)
    loss = min(point.loss for point in points)
    return (
        f"Teachers of {format_count(min(sizes))} to {format_count(max(sizes))} make no difference "
        f"beyond noise (at most {most:.3f} nats, {most / loss:.1%}): take the cheapest, "
        f"{format_count(min(sizes))}."
    )


def _set_with_noise(curves: Sequence[Curve]) -> str:
    points = curves[0].will_do
    if len(points) == 1:
        return f"take the {format_count(points[0].teacher_size)} teacher"
    if not _ratios_alone(curves):
        return ""
    within = max(point.cost or 0.0 for curve in curves for point in curve.will_do)
    noise = f"within {within:.3f} nats, which is noise"
    cheapest = format_count(points[0].teacher_size)
    held = {point.teacher_size for point in points}
    return f"any teacher {_from_to(curves[0], held)} will do ({noise}), {cheapest} the cheapest"


def _set_with_cost(curves: Sequence[Curve]) -> str:
    told = _set_alone(curves)
    others = [point for curve in curves for point in curve.points if point.worse]
    if not others or not told:
        return told
    worst = max(others, key=lambda point: point.cost or 0.0)
    return f"{told} ({format_count(worst.teacher_size)} costs {worst.cost:.3f} nats)"


def _set_alone(curves: Sequence[Curve]) -> str:
    """The teachers that will do for all of these students."""
    if all(not point.worse for curve in curves for point in curve.points):
        return "all teachers do alike"
    common = set.intersection(*({p.teacher_size for p in c.will_do} for c in curves))
    if not common:
        return ""
    if len(common) == 1:
        return f"take the {format_count(*common)} teacher"
    told = _from_to(curves[0], common)
    return f"any {told} will do, {format_count(min(common))} the cheapest"


def _from_to(curve: Curve, held: Collection[int]) -> str:
    """Runs of neighbours that will do: "from 200k to 480k", "of 60k or 200k to 480k"."""
    runs = runs_of(curve, held)
    return ("of " if " or " in runs else "from ") + runs


def runs_of(curve: Curve, held: Collection[int] | None = None) -> str:
    """Teachers that will do, or these, neighbours as a range: "60k or 200k to 480k"."""
    held = {point.teacher_size for point in curve.will_do} if held is None else held
    told = []
    for will_do, run in groupby((p.teacher_size for p in curve.points), held.__contains__):
        names = [format_count(size) for size in run]
        told += [" to ".join(dict.fromkeys((names[0], names[-1])))] if will_do else []
    return " or ".join(told)


def _ratio_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """T/S of teachers that will do for every one of the students; the first is the larger one
    where there is no such ratio."""
    ratios = [
        [point.teacher_parameters / curve.student_parameters for point in curve.will_do]
        for curve in curves
    ]
    return max(map(min, ratios)), min(map(max, ratios))


def _by_ratio(curves: Sequence[Curve]) -> str:
    within = max(point.cost or 0.0 for curve in curves for point in curve.will_do)
    noise = f" (within {within:.3f} nats, which is noise)" if within >= 0.0005 else ""
    return _sentence(f"{_ratios_alone(curves)}{noise}{_cost_of_others(curves)}")


def _ratios_alone(curves: Sequence[Curve]) -> str:
    low, high = _ratio_range(curves)
    return f"teachers {_span(low, high, 1)} times the student will do" if low <= high else ""


def _ends_alone(curves: Sequence[Curve]) -> str:
    """Of the smallest and the largest student, where nothing holds for all."""
    small, large = (pick(curves, key=lambda curve: curve.student_parameters) for pick in (min, max))
    parts = [
        f"{runs_of(curve)} for the {format_count(curve.student_parameters)} student"
        for curve in (small, large)
    ]
    return f"take {parts[0]}, {parts[1]}"


def _shortly(curves: Sequence[Curve]) -> str:
    return _sentence(_ratios_alone(curves) or f"{_ends_alone(curves)} (the table has all)")


def _cost_of_others(curves: Sequence[Curve]) -> str:
    """What the teachers that will not do cost, in nats and per cent."""
    others = [
        (point.cost or 0.0, (point.cost or 0.0) / min(p.loss for p in curve.points), point)
        for curve in curves
        for point in curve.points
        if point.worse
    ]
    if not others:
        return ""
    (least, _, one), (most, share, _) = (
        pick(others, key=lambda other: other[:2]) for pick in (min, max)
    )
    if len({point.teacher_size for _, _, point in others}) == 1:
        return f"; {format_count(one.teacher_size)} costs {most:.3f} nats ({share:.1%})"
    # one teacher may cost one student less, beyond noise, than another costs another within it
    if least <= max(point.cost or 0.0 for curve in curves for point in curve.will_do):
        return f"; the others cost up to {most:.3f} nats ({share:.1%})"
    return f"; the others cost {_span(least, most)} nats (up to {share:.1%})"


def _of_tokens(contrast: Contrast, confidence: float) -> str:
    between, instead = "one budget to the other", "with the larger budget of each student"
    if contrast.tokens is not None:
        many, few = map(format_count, contrast.tokens)
        between, instead = f"{few} to {many}", f"with {many} instead of {few}"
    sign = -1 if contrast.is_told and contrast.slope.value > 0 else 1
    slope, factor = contrast.slope, -sign * DOUBLED
    low, high = sorted((factor * slope.low, factor * slope.high))
    span = f"{_span(low, high)} nats"
    if not contrast.is_told:
        return (
            f"Whether more tokens want a larger teacher cannot be told: from {between}, one twice "
            f"as large gains {span} ({confidence:.0%})."
        )
    size, verb = ("larger", "gains") if sign > 0 else ("smaller", "loses")
    return (
        f"More tokens want a {size} teacher: {instead}, one twice as large {verb} "
        f"{factor * slope.value:.3f} nats more ({confidence:.0%}: {span})."
    )


def _of_cut(contrasts: Sequence[Contrast]) -> str:
    """Students cut out of each teacher beside students with the same first weights for all."""
    if not contrasts:
        return ""
    against = [one for one in contrasts if one.is_told and one.slope.value < 0]
    told = [one for one in contrasts if one.is_told and one.slope.value > 0]
    if against and not told:
        one = min(against, key=lambda contrast: contrast.fewest)
        return (
            f"Students gain by being cut out of large teachers: with {format_count(one.fewest)} "
            f"tokens one twice as large gives {-DOUBLED * one.slope.value:.3f} nats more than "
            "without a cut."
        )
    if not told:
        few = format_count(min(one.fewest for one in contrasts))
        when = f"from {few} tokens on" if len(contrasts) > 1 else f"with {few} tokens"
        return (
            f"The cut does not make the difference: {when}, students with the same first weights "
            "for every teacher show the same curve, within noise."
        )
    first = min(told, key=lambda one: one.fewest)
    last = max(contrasts, key=lambda one: one.fewest)
    amount = DOUBLED * first.slope.value
    rest = ""
    if last is not first:
        rest = f", with {format_count(last.fewest)} {DOUBLED * last.slope.value:.3f}"
        rest += "" if last.is_told else " (noise)"
    return (
        f"The cut itself makes large teachers costly: with {format_count(first.fewest)} tokens "
        f"one twice as large costs {amount:.3f} nats more than without a cut{rest}."
    )


def _of_chain(contrasts: Sequence[Contrast], confidence: float) -> str:
    """What an assistant between teacher and student brings for the same FLOPs."""
    if not contrasts:
        return ""
    one = max(contrasts, key=lambda contrast: contrast.fewest)
    level = one.level
    amount = f"{abs(level.value):.3f} nats ({confidence:.0%}: {level.low:.3f} to {level.high:.3f})"
    if level.holds(0.0):
        return f"An assistant between teacher and student brings nothing beyond noise: {amount}."
    side = "lower" if level.value < 0 else "higher"
    return (
        f"Through an assistant students end {amount} {side} than cut at once, for the same FLOPs."
    )


def _of_size(curves: Sequence[Curve]) -> str:
    """Whether too large a teacher is harmful."""
    cursed = [curve for curve in curves if curve.cursed]
    if not cursed:
        return "Too large a teacher does no harm here: the largest is not worse beyond noise."
    costs = sorted(curve.points[-1].cost or 0.0 for curve in cursed)
    budgets = {curve.tokens for curve in curves}
    harmed = {curve.tokens for curve in cursed}
    when = f" with {_listed(sorted(harmed))} tokens" if harmed < budgets else ""
    students = {curve.student_size for curve in curves if curve.tokens in harmed}
    hurt = {curve.student_size for curve in cursed}
    who = f"{len(hurt)} of {len(students)} students " if len(students) > 1 else ""
    return (
        f"Too large a teacher is harmful{when}: the largest costs {who}"
        f"{_span(costs[0], costs[-1])} nats more than the best."
    )


def _of_gain(curves: Sequence[Curve]) -> str:
    """What distilling gains over the same student alone, at equal tokens and at equal FLOPs."""
    best = [(curve, point) for curve in curves if (point := curve.gainer) is not None]
    gains = [(curve.tokens, point.gain or 0.0) for curve, point in best]
    if not gains:
        return ""
    errors = [point.gain_stderr for _, point in best if point.gain_stderr is not None]
    error = f" (± {max(errors):.3f})" if errors else ""
    longer = [point.gain_flops for _, point in best if point.gain_flops is not None]
    rest = f", {_span(min(longer), max(longer))} for as many FLOPs" if longer else ""
    whole = [gain for _, gain in gains]
    budgets = sorted({tokens for tokens, _ in gains})

    def by_budget() -> str:
        students = {curve.student_size for curve, _ in best}
        if len(budgets) != 2 or len(gains) != 2 * len(students):
            return ""
        few, many = (_gained([gain for t, gain in gains if t == tokens]) for tokens in budgets)
        many = many.removeprefix("gains ") if few.startswith("gains") else many
        less, more = map(format_count, budgets)
        return (
            f"Distilling from the best teacher {few} nats with {less} tokens and {many} with "
            f"{more}{error}, compared with the same student alone{rest}."
        )

    def together() -> str:
        return (
            f"Distilling from the best teacher {_gained(whole)} nats{error}, compared with the "
            f"same student alone on as many tokens{rest}."
        )

    if round(max(whole), 3) <= 0:
        span = _span(min(whole), max(whole))
        return f"Distilling gains nothing over the same student trained alone: {span} nats{error}."
    told = by_budget()
    return told if told and len(told.split()) <= MOST_WORDS else together()


def _gained(gains: Sequence[float]) -> str:
    low, high = min(gains), max(gains)
    if round(high, 3) <= 0:
        return f"loses {_span(-high, -low)}"
    return f"gains {_span(low, high)}" if round(low, 3) >= 0 else f"changes by {_span(low, high)}"


def _main_line(lines: Sequence[Line], init: str) -> Line | None:
    """The law to tell: identified before not, of as many tokens a parameter before of the same
    tokens, with more tokens before fewer."""
    own = [line for line in lines if line.group.init == init]
    return max(
        own,
        key=lambda line: (
            line.is_identified,
            line.located,
            line.group.tokens is None,
            line.group.tokens or line.group.tokens_per_parameter or 0,
        ),
        default=None,
    )


def _of_line(line: Line | None, law: Law) -> str:
    if line is None:
        return ""
    known = line.is_identified and line.ratio is not None
    if not known or line.exponent is None or _is_wide(line.exponent):
        return _no_line(line, law)
    assert line.ratio is not None
    times = Estimate(
        value=2**line.exponent.value, low=2**line.exponent.low, high=2**line.exponent.high
    )
    bent = line.exponent.low > 1 + PROPORTIONAL or line.exponent.high < 1 - PROPORTIONAL
    twice = (
        f"Twice the student wants {times.value:.1f} times the teacher ({law.confidence:.0%}: "
        f"{_span(times.low, times.high, 1)})"
    )
    if bent:
        # no one ratio then
        return f"{twice}, not in proportion."
    span = _span(line.ratio.low, line.ratio.high, 1)
    return (
        f"{twice}; the best is {line.ratio.value:.1f} times the student ({span}), "
        f"{_beside_published(line.ratio)}."
    )


def _beside_published(ratio: Estimate) -> str:
    """The published line was read from a grid too: what that resolves is what is compared."""
    low, high = PUBLISHED_RESOLUTION
    if ratio.high < low or ratio.low > high:
        return f"unlike the published {_span(low, high, 1)}"
    return f"as published ({_span(low, high, 1)})"


def _no_line(line: Line, law: Law) -> str:
    students = line.located + line.bounded
    if line.refused == "too_few_students":
        why = f"{line.bounded} of {students} students have it at an end of the teachers tried"
        if len(law.of(line.group)) < 3:
            why = "that takes three students"
        elif students < 3 or not line.bounded:
            why = "too few students have teachers enough to place it"
        return f"How the best teacher grows with the student is not known: {why}."
    assert line.exponent is not None
    low, high = line.exponent.low, line.exponent.high
    told = "How fast the best teacher grows with the student cannot be told"
    if _is_wide(line.exponent):
        return f"{told} from these students."
    span = _span(2**low, 2**high, 1)
    return f"{told}: twice the student may want {span} times the teacher ({law.confidence:.0%})."


def _is_wide(exponent: Estimate) -> bool:
    steep = max(abs(exponent.low), abs(exponent.high)) > 2 * WIDEST_EXPONENT
    return steep or exponent.high - exponent.low > WIDEST_EXPONENT


def _span(low: float, high: float, digits: int = 3) -> str:
    """Two numbers, or one where they are written alike."""
    # no negative zero
    first, last = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (low, high))
    return first if first == last else f"{first} to {last}"


def _listed(sizes: Sequence[int]) -> str:
    return listed([format_count(size) for size in sizes])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""
