"""What the law says in plain sentences, each with its number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capgap.law.cells import Kind
from capgap.law.comparisons import compared_curves
from capgap.law.curve import Curve
from capgap.law.forms import FormFit
from capgap.law.linear import LinearLaw
from capgap.law.own_surface import surface_sentence
from capgap.law.published import PUBLISHED_LINES
from capgap.law.validity import Warned
from capgap.sizes import format_count


@dataclass(frozen=True)
class Gain:
    """A mean difference in nats per token with its standard error."""

    value: float
    stderr: float


def verdict(
    curves: Sequence[Curve],
    gains: Sequence[Sequence[Gain | None]],
    laws: Sequence[LinearLaw],
    forms: Sequence[Sequence[FormFit]],
    surfaces: Sequence[Mapping[str, Any]],
    record_warnings: Sequence[Warned],
    *,
    confidence: float,
) -> list[str]:
    """Sentences in the order a reader asks: the answer in short, which teacher for each student, is
    there a curse, what does distilling gain, what moves the best teacher, is there a line, is
    there a surface. `gains` [curves][teachers]."""
    if not curves:
        return ["No finished cell: nothing can be said about teachers."]
    sentences = [_headline(curves)]
    sentences += [_best_teacher(curve, confidence) for curve in curves]
    for law in laws:
        own = [i for i, curve in enumerate(curves) if curve.points.data.kind == law.kind]
        sentences.append(_curse(law.kind, [curves[i] for i in own]))
        sentences.append(_gain(law.kind, [curves[i] for i in own], [gains[i] for i in own]))
    sentences += compared_curves(curves, laws, confidence)
    sentences += [_law(law, confidence) for law in laws]
    sentences += [
        _best_form(law.kind, own) for law, own in zip(laws, forms, strict=True) if _compared(own)
    ]
    sentences += [surface_sentence(entry) for entry in surfaces if entry["supervised"]]
    ladders = [w.where for w in record_warnings if w.name == "teacher_loss_not_falling"]
    if ladders:
        sentences.append(
            f"Caution: {len(ladders)} of the teachers "
            f"{'is' if len(ladders) == 1 else 'are'} no better than a smaller one "
            f"({'; '.join(sorted(set(ladders)))}), so part of what the curves show is how well "
            "the teachers were trained."
        )
    return sentences


def _headline(curves: Sequence[Curve]) -> str:
    """One sentence for the students cut out of their teachers, or as the sweep has them, at the
    largest token budget."""
    inits = {curve.points.data.kind.init for curve in curves}
    init = "pruned" if "pruned" in inits else min(inits)
    tokens = max(c.points.data.kind.tokens for c in curves if c.points.data.kind.init == init)
    shown = [
        curve
        for curve in curves
        if (curve.points.data.kind.init, curve.points.data.kind.tokens) == (init, tokens)
    ]
    several = len({curve.points.data.kind.architecture for curve in shown}) > 1
    groups: dict[tuple[str, str, float], list[Curve]] = {}
    for curve in shown:
        architecture = f"{curve.points.data.kind.architecture} " if several else ""
        key = (architecture, curve.optimum.status, curve.optimum.grid_best)
        groups.setdefault(key, []).append(curve)
    answers = [
        f"{architecture}{_students(alike)}: {_in_short(alike)}"
        for (architecture, _, _), alike in groups.items()
    ]
    return f"With {format_count(tokens)} tokens and {init} students, {'; '.join(answers)}."


def _students(curves: Sequence[Curve]) -> str:
    sizes = [format_count(curve.student_parameters) for curve in curves]
    if len(sizes) == 1:
        return f"for the {sizes[0]} student"
    return f"for the {', '.join(sizes[:-1])} and {sizes[-1]} students"


def _in_short(curves: Sequence[Curve]) -> str:
    """What to take, for students with the same status and the same best cell."""
    best = curves[0].optimum.grid_best
    ratios = sorted(best / curve.student_parameters for curve in curves)
    times = f"{ratios[0]:.1f}" + (f" to {ratios[-1]:.1f}" if len(ratios) > 1 else "")
    teacher = f"{format_count(best)}, {times} times the student"
    return {
        "interior": f"take the teacher of {teacher}",
        # the best cell may lie inside, yet not beyond noise from the edge
        "smallest": f"take a small teacher (best cell: {teacher}); smaller may be better still",
        "largest": f"take a large teacher (best cell: {teacher}); larger may be better still",
        "flat": f"no teacher is better than the others beyond noise (best cell: {teacher})",
        "too_few_points": f"too few teachers were tried (best cell: {teacher})",
    }[curves[0].optimum.status]


def _best_teacher(curve: Curve, confidence: float) -> str:
    data, optimum = curve.points.data, curve.optimum
    student = curve.student_parameters
    sizes = f"{format_count(data.teacher_parameters[0])} to " + format_count(
        data.teacher_parameters[-1]
    )
    span = f"the losses over teachers of {sizes} span {np.ptp(curve.points.losses):.4f} nats"
    best = f"the best cell has teacher {format_count(optimum.grid_best)}"
    if optimum.status == "too_few_points":
        if optimum.interval is not None:
            around = " and ".join(format_count(end) for end in optimum.interval if end is not None)
            best += f", and the optimum lies between its neighbours, {around}"
        return f"{data}: {data.num_teachers} teachers are too few for a curve; {best}."
    if optimum.status == "flat" or optimum.teacher_parameters is None or optimum.interval is None:
        return f"{data}: which teacher is best cannot be told from noise; {span}, and {best}."
    low, high = optimum.interval
    teacher, ratio = format_count(optimum.teacher_parameters), optimum.teacher_parameters / student
    if low is not None and high is not None:
        return (
            f"{data}: the best teacher has about {teacher} parameters, {ratio:.2f} times the "
            f"student ({confidence:.0%} interval {low / student:.2f} to {high / student:.2f})."
        )
    side, bound, word = (
        ("smallest", high, "at most") if low is None else ("largest", low, "at least")
    )
    edge = data.teacher_parameters[0 if low is None else -1]
    number = f"{word} {(bound or edge) / student:.2f} times the student"
    return (
        f"{data}: the {side} teacher ({format_count(edge)}, {edge / student:.2f} times the "
        f"student) cannot be told from the best; the optimum is {number} at {confidence:.0%} "
        "confidence, and may lie outside the grid."
    )


def _curse(kind: Kind, curves: Sequence[Curve]) -> str:
    cursed = [curve for curve in curves if curve.curse.beyond_noise]
    worst = max(cursed or curves, key=lambda curve: curve.curse.largest_minus_best)
    curse, data = worst.curse, worst.points.data
    if curse.stderr is None:
        return f"{kind}: no curse; the largest teacher is the best one for every student."
    loss = (
        f"for student {format_count(worst.student_parameters)} the largest teacher "
        f"({format_count(data.teacher_parameters[-1])}) is {curse.largest_minus_best:.4f} nats "
        f"(standard error {curse.stderr:.4f}) worse than the best "
        f"({format_count(worst.optimum.grid_best)})"
    )
    if cursed:
        return (
            f"{kind}: a larger teacher can be worse, beyond noise, for {len(cursed)} of "
            f"{len(curves)} students; {loss}."
        )
    return f"{kind}: no curse beyond noise in {len(curves)} students; at most, {loss}."


def _gain(kind: Kind, curves: Sequence[Curve], gains: Sequence[Sequence[Gain | None]]) -> str:
    parts = []
    for curve, own in zip(curves, gains, strict=True):
        gain = own[int(np.argmin(curve.points.losses))]
        if gain is not None:
            parts.append(
                f"{gain.value:+.4f} nats (standard error {gain.stderr:.4f}) for student "
                f"{format_count(curve.student_parameters)}"
            )
    if not parts:
        return f"{kind}: the gain of distilling is unknown: no best teacher has a baseline."
    return (
        f"{kind}: against the same student trained without a teacher, the best teacher gains "
        f"{', '.join(parts)}."
    )


def _law(law: LinearLaw, confidence: float) -> str:
    ratio = ""
    if law.ratio is not None:
        ratio = (
            f" As one ratio, T* = {law.ratio.value:.2f} S ({confidence:.0%} interval "
            f"{law.ratio.low:.2f} to {law.ratio.high:.2f})."
        )
    if law.status == "not_identified" or law.slope is None or law.intercept is None:
        return f"{law.kind}: a linear law is not identified: {law.reason}.{ratio}"
    line = PUBLISHED_LINES[0]
    inside = law.slope.low <= line.slope <= law.slope.high
    sign = "-" if law.intercept.value < 0 else "+"
    return (
        f"{law.kind}: T* = {law.slope.value:.2f} S {sign} "
        f"{format_count(abs(law.intercept.value))}, slope {law.slope.low:.2f} to "
        f"{law.slope.high:.2f} at {confidence:.0%} confidence; the published {line.slope} lies "
        f"{'inside' if inside else 'outside'}.{ratio}"
    )


def _compared(forms: Sequence[FormFit]) -> bool:
    return sum(form.prediction_error is not None for form in forms) > 1


def _best_form(kind: Kind, forms: Sequence[FormFit]) -> str:
    """Which form predicts a student that it has not seen, and is T* linear in S?"""
    written = {"linear": "T* = a S + b", "ratio": "T* = r S", "power": "T* = k S^m"}
    errors = [
        f"{written[form.form]} {form.prediction_error:.1%}"
        for form in forms
        if form.prediction_error is not None
    ]
    sentence = (
        f"{kind}: of a student left out, the best teacher is predicted best by "
        f"{written[forms[0].form]} (typical errors: {', '.join(errors)})"
    )
    power = next((form for form in forms if form.form == "power"), None)
    if power is None:
        return f"{sentence}."
    exponent = power.coefficients["exponent"]
    bent = not exponent.low <= 1 <= exponent.high
    return (
        f"{sentence}; the exponent m is {exponent.value:.2f} ({exponent.low:.2f} to "
        f"{exponent.high:.2f}), so T* is {'not ' if bent else ''}"
        f"{'proportional to S' if bent else 'compatible with being proportional to S'}."
    )
