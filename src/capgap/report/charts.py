"""Figures of the cells: curves with their optimum, gain and teachers. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from capgap.law.cells import Kind
from capgap.records import RunRecord
from capgap.report import words
from capgap.report.data import (
    Results,
    belongs,
    curves_of,
    done,
    heldout_loss,
    slug,
    student_sizes,
)
from capgap.report.figures import (
    Absent,
    Axis,
    Chart,
    Figure,
    HeatMap,
    Pair,
    Series,
    size_ticks,
    span,
)
from capgap.report.style import look

Curve = Mapping[str, Any]

LOSS_UNIT = "nats per token"
SIZE_UNIT = "non-embedding parameters"


def student_look(results: Results, student_size: int) -> Any:
    """The colour, marker and dash of a student: the same in every figure."""
    return look(student_sizes(results).index(student_size))


def student_name(student_size: int) -> str:
    return f"{words.size(student_size)} student"


def curve_chart(results: Results, kind: Kind, *, relative: bool = False) -> Figure:
    """Student loss over teacher size, one line per student, with its fit and its optimum.

    `relative` draws the loss above the lowest one of each student, so that students of different
    size can be compared in one picture.
    """
    stem = "curves-relative" if relative else "curves"
    what = "Loss above the student's best teacher" if relative else "Student loss over teacher size"
    name, title = f"{stem}-{slug(kind)}", f"{what}: {kind}"
    curves = curves_of(results, kind)
    if not curves:
        return Absent(name, title, "No cell of this kind has finished yet.")
    sizes = [point["teacher_parameters"] for curve in curves for point in curve["points"]]
    limits = span(sizes)
    series: list[Series] = []
    notes: list[str] = []
    for curve in curves:
        base = min(point["loss"] for point in curve["points"]) if relative else 0.0
        bars = "comparison_stderr" if relative else "loss_stderr"
        series += _one_curve(results, curve, base=base, bars=bars)
        notes += status_notes(curve)
    if relative:
        caption = (
            "What a student loses with another teacher than its best: look how fast the line "
            "rises to both sides, and whether it rises to the right at all. Bars are one standard "
            "error of the comparison between teachers."
        )
    else:
        caption = (
            "Look for a dip inside the grid: left of it the teacher is too weak, right of it too "
            "far away. Bars are one standard error over documents; all points are measured on the "
            "same documents, so differences are more certain than the bars suggest."
        )
    label = "loss above the best" if relative else "held-out loss of the student"
    return Chart(
        name,
        title,
        caption,
        Axis("teacher size", SIZE_UNIT, log=True, limits=limits, ticks=size_ticks(sizes, limits)),
        Axis(label, LOSS_UNIT),
        tuple(legend_once(series)),
        tuple(notes),
    )


def _one_curve(results: Results, curve: Curve, *, base: float, bars: str) -> list[Series]:
    points = sorted(curve["points"], key=lambda point: point["teacher_parameters"])
    style = student_look(results, curve["student_size"])
    group = f"student-{curve['student_size']}"
    x = tuple(point["teacher_parameters"] for point in points)
    y = tuple(point["loss"] - base for point in points)
    errors = [point.get(bars) for point in points]
    series = [
        Series(
            student_name(curve["student_size"]),
            x,
            y,
            colour=style.colour,
            marker=style.marker,
            y_interval=tuple(
                (middle - error, middle + error) if error is not None else None
                for middle, error in zip(y, errors, strict=True)
            ),
            hover=tuple(_point_text(curve, point) for point in points),
            group=group,
        )
    ]
    line = _fit_line(curve) or (x, tuple(point["loss"] for point in points))
    series.append(
        Series(
            "fit",
            line[0],
            tuple(value - base for value in line[1]),
            "line",
            colour=style.colour,
            dash=style.dash,
            width=2.0 if curve.get("fit") else 1.0,
            group=group,
            in_legend=False,
        )
    )
    optimum = curve.get("optimum") or {}
    if optimum.get("status") == "interior" and optimum.get("teacher_parameters"):
        best = optimum["teacher_parameters"]
        low = optimum.get("loss")
        series.append(
            Series(
                "optimum with its interval",
                (best,),
                ((low if low is not None else min(line[1])) - base,),
                colour=style.colour,
                marker="star",
                size=15,
                x_interval=(closed(optimum.get("interval"), span(x)),),
                hover=(optimum_text(curve),),
                group="optimum",
                shared=True,
            )
        )
    return series


def _fit_line(curve: Curve) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    fit = curve.get("fit")
    return (tuple(fit["teacher_parameters"]), tuple(fit["loss"])) if fit else None


def _point_text(curve: Curve, point: Mapping[str, Any]) -> str:
    teacher = point["teacher_parameters"]
    lines = [
        f"{student_name(curve['student_size'])}, teacher {words.size(teacher)} "
        f"({teacher / curve['student_parameters']:.2g} {words.TIMES} the student)",
        f"loss {words.loss(point['loss'], point.get('loss_stderr'))}",
    ]
    if point.get("gain") is not None:
        lines.append(f"gain over CE alone {words.gain(point['gain'], point.get('gain_stderr'))}")
    if point.get("teacher_loss") is not None:
        lines.append(f"the teacher's own loss {words.loss(point['teacher_loss'])}")
    if len(point.get("losses") or ()) > 1:
        lines.append("by seed: " + ", ".join(f"{value:.3f}" for value in point["losses"]))
    return "<br>".join(lines)


def optimum_text(curve: Curve) -> str:
    optimum = curve["optimum"]
    size = words.size_with_interval(optimum["teacher_parameters"], optimum.get("interval"))
    ratio = words.with_interval(optimum.get("ratio"), optimum.get("ratio_interval"))
    return f"best teacher {size}<br>T/S {ratio}"


def status_notes(curve: Curve) -> list[str]:
    """What the reader must know about a curve without an optimum inside the grid."""
    sentences = {
        "smallest": "the smallest teacher cannot be told from the best; it may lie below the grid.",
        "largest": "the largest teacher cannot be told from the best; it may lie above the grid.",
        "flat": "no teacher is better than the others beyond the noise.",
        "too_few_points": "too few teachers have finished to place an optimum.",
    }
    status = (curve.get("optimum") or {}).get("status")
    if status not in sentences:
        return []
    return [f"{student_name(curve['student_size'])}: {sentences[status]}"]


def legend_once(series: Iterable[Series]) -> list[Series]:
    """Hide repeated legend entries: the marks of optimum and edge mean the same everywhere."""
    seen: set[str] = set()
    kept = []
    for one in series:
        kept.append(replace(one, in_legend=one.in_legend and one.name not in seen))
        seen.add(one.name)
    return kept


def closed(interval: words.Interval | None, limits: Pair) -> Pair | None:
    """An interval to draw: an open end reaches to the limit of the axis."""
    if not interval:
        return None
    low, high = interval
    return (limits[0] if low is None else low, limits[1] if high is None else high)


def gain_map(results: Results, kind: Kind) -> Figure:
    """Gain over the matched cross-entropy baseline, teacher by student; missing stays missing."""
    name, title = f"gain-{slug(kind)}", f"Gain over cross-entropy alone: {kind}"
    curves = {curve["student_size"]: curve for curve in curves_of(results, kind)}
    cells = [r for r in results.records if r.kind == "cell" and belongs(r, kind)]
    points = {(s, p["teacher_size"]): p for s, c in curves.items() for p in c["points"]}
    students = sorted({s for s, _ in points} | {r.student_size or 0 for r in cells})
    teachers = sorted({t for _, t in points} | {r.teacher_size or 0 for r in cells})
    failed = {(r.student_size, r.teacher_size) for r in cells if r.status == "failed"}
    if all(point.get("gain") is None for point in points.values()):
        return Absent(name, title, "No cell has a matched cross-entropy baseline to compare with.")
    values, texts = [], []
    for student in students:
        row = [points.get((student, teacher)) for teacher in teachers]
        values.append(tuple(point["gain"] if point else None for point in row))
        texts.append(
            tuple(
                _gain_text(point, (student, teacher) in failed)
                for teacher, point in zip(teachers, row, strict=True)
            )
        )
    return HeatMap(
        name,
        title,
        "Positive (blue) means that distillation beat the same student trained as long on "
        "cross-entropy alone; read along a row for the best teacher. Dotted cells have no number.",
        Axis("teacher size", SIZE_UNIT),
        Axis("student size", SIZE_UNIT),
        tuple(words.size(teacher) for teacher in teachers),
        tuple(words.size(student) for student in students),
        tuple(values),
        tuple(texts),
        f"gain ({LOSS_UNIT})",
    )


def _gain_text(point: Mapping[str, Any] | None, failed: bool) -> str:
    if point is None:
        return "failed" if failed else "not run"
    return "no baseline" if point.get("gain") is None else words.gain(point["gain"])


def teacher_chart(results: Results, architecture: str) -> Figure:
    """The teachers' own held-out loss over their size, one line per token budget and seed."""
    name, title = f"teachers-{architecture}", f"The teachers' own loss: {architecture}"
    teachers = [r for r in done(results.records, "teacher") if r.architecture == architecture]
    if not teachers:
        return Absent(name, title, "No teacher of this architecture has finished yet.")
    groups: dict[int, list[RunRecord]] = defaultdict(list)
    for teacher in sorted(teachers, key=lambda r: r.parameters.non_embedding):
        groups[teacher.seed].append(teacher)
    sizes = [teacher.parameters.non_embedding for teacher in teachers]
    limits = span(sizes)
    series = []
    for position, (seed, held) in enumerate(sorted(groups.items())):
        style = look(position)
        x = tuple(float(r.parameters.non_embedding) for r in held)
        y = tuple(heldout_loss(r) for r in held)
        errors = [r.heldout.loss_stderr if r.heldout else None for r in held]
        group = f"seed-{seed}"
        series.append(
            Series(
                f"seed {seed}",
                x,
                y,
                colour=style.colour,
                marker=style.marker,
                y_interval=tuple(
                    (v - e, v + e) if e is not None else None
                    for v, e in zip(y, errors, strict=True)
                ),
                hover=tuple(
                    f"teacher {words.size(r.parameters.non_embedding)}, seed {seed}<br>"
                    f"{words.size(r.tokens)} tokens<br>loss {words.loss(heldout_loss(r))}"
                    for r in held
                ),
                group=group,
                in_legend=len(groups) > 1,
            )
        )
        series.append(
            Series(
                "line", x, y, "line", style.colour, dash=style.dash, group=group, in_legend=False
            )
        )
    undertrained = [
        warning["message"]
        for warning in results.law.get("validity", ())
        if warning["name"] == "teacher_loss_not_falling"
        and warning["where"].startswith(f"{architecture},")
    ]
    return Chart(
        name,
        title,
        "The line must fall: where a larger teacher is no better than a smaller one, it is "
        "undertrained, and the student's curve says nothing about the capacity gap there.",
        Axis("teacher size", SIZE_UNIT, log=True, limits=limits, ticks=size_ticks(sizes, limits)),
        Axis("held-out loss of the teacher", LOSS_UNIT),
        tuple(series),
        tuple(undertrained),
    )
