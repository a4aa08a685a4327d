"""The figures of the law: its line, and how far each student is from it. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from capgap.law.cells import Kind
from capgap.law.published import PUBLISHED_TEACHERS
from capgap.report import words
from capgap.report.charts import (
    SIZE_UNIT,
    Curve,
    closed,
    legend_once,
    optimum_text,
    status_notes,
    student_look,
    student_name,
)
from capgap.report.data import Results, curves_of, law_of, slug
from capgap.report.figures import (
    Absent,
    Axis,
    Chart,
    Figure,
    Pair,
    Series,
    count_ticks,
    percent_ticks,
    size_ticks,
    span,
    steps,
)

EDGES = {"smallest": "triangle-down-open", "largest": "triangle-open"}
OPEN_END = "open interval: may lie beyond"

STEPS_OF_A_LINE = 60


def placed_at(curve: Curve) -> float | None:
    """Where the best teacher of a curve is drawn; None where it cannot be told."""
    optimum = curve.get("optimum") or {}
    known = optimum.get("status") in ("interior", *EDGES)
    value: float | None = optimum.get("teacher_parameters") if known else None
    return value


def law_chart(results: Results, kind: Kind) -> Figure:
    """The best teacher over the student's size: found, fitted and published, with what the grid
    can resolve."""
    name, title = f"law-{slug(kind)}", f"Best teacher over student size: {kind}"
    curves = curves_of(results, kind)
    placed = [c for c in curves if placed_at(c)]
    law = law_of(results, kind)
    if not placed:
        reason = (law or {}).get("reason") or "no student has a best teacher that can be told"
        return Absent(name, title, f"Nothing to draw: {reason.rstrip('.')}.")
    students = [curve["student_parameters"] for curve in placed]
    teachers = sorted({p["teacher_parameters"] for curve in curves for p in curve["points"]})
    x_limits = span(students, margin=1.4)
    y_limits = span([*teachers, *(placed_at(curve) or 0 for curve in placed)], margin=1.3)
    series = [bar for curve in placed for bar in _resolution(curve, y_limits)]
    series += [_grid_line(size, x_limits, first=i == 0) for i, size in enumerate(teachers)]
    notes = [note for curve in curves for note in status_notes(curve)]
    if law and law["status"] == "identified" and law.get("band"):
        series += _law_line(law)
    elif law and law.get("reason"):
        notes.insert(0, f"No line is fitted: {law['reason'].rstrip('.')}.")
    for position, published in enumerate(results.law.get("published", ())):
        line, note = _published_line(published, x_limits, y_limits, position)
        series.append(line)
        notes.append(note)
    series += [_best_teacher(results, curve, y_limits) for curve in placed]
    return Chart(
        name,
        title,
        "Each mark is the best teacher of one student with its fitted interval. The wide bar "
        "behind it reaches from one neighbour of the best measured cell to the other: what the "
        "grid alone can tell. Compare the slope with the published line.",
        Axis("student size", SIZE_UNIT, True, x_limits, size_ticks(students, x_limits)),
        Axis("best teacher", SIZE_UNIT, True, y_limits, count_ticks(y_limits)),
        tuple(legend_once(series)),
        tuple(notes),
    )


def _grid_line(size: float, x_limits: Pair, *, first: bool) -> Series:
    return Series(
        "teachers of the grid",
        x_limits,
        (size, size),
        "line",
        colour="rule",
        width=1,
        group="grid",
        in_legend=first,
    )


def _law_line(law: Mapping[str, Any]) -> list[Series]:
    band = law["band"]
    # a wide interval reaches zero and below, which a logarithmic axis cannot show
    low = tuple(max(value, 1.0) for value in band["low"])
    middle = [(x, y) for x, y in zip(band["student"], band["mid"], strict=True) if y > 0]
    slope = words.with_interval(law.get("slope"), law.get("slope_interval"))
    x = tuple(band["student"])
    return [
        Series("interval of the line", x, low, "band", colour="band", y_high=tuple(band["high"])),
        Series(
            f"fitted, slope {slope}",
            tuple(x for x, _ in middle),
            tuple(y for _, y in middle),
            "line",
            colour="text",
        ),
    ]


def _published_line(
    published: Mapping[str, Any], x_limits: Pair, y_limits: Pair, position: int
) -> tuple[Series, str]:
    slope, intercept = published["slope"], published.get("intercept") or 0.0
    note = f"Published line: {published['name']}."
    if y_limits[1] < PUBLISHED_TEACHERS[0]:
        low, high = (words.size(size) for size in PUBLISHED_TEACHERS)
        note += f" It was read from teachers of {low} to {high}; the axes stay on the data."
    if slope * x_limits[1] + intercept < y_limits[0]:
        # an intercept of millions of parameters means nothing for students far below that
        note = (
            f"{note} Its intercept of {words.size(intercept)} parameters is left out: with it, "
            "no teacher of the size drawn here would be on the line."
        )
        intercept = 0.0
    x = steps(x_limits, STEPS_OF_A_LINE)
    kept = [(value, slope * value + intercept) for value in x if slope * value + intercept > 0]
    line = Series(
        f"{published['name'].split(',')[0]}, slope {slope:.3g}",
        tuple(a for a, _ in kept),
        tuple(b for _, b in kept),
        "line",
        colour="muted",
        dash="dash" if position % 2 == 0 else "dot",
    )
    return line, note


def _best_teacher(results: Results, curve: Curve, y_limits: Pair) -> Series:
    optimum = curve["optimum"]
    style = student_look(results, curve["student_size"])
    edge = optimum["status"] in EDGES
    return Series(
        "open interval: may lie beyond" if edge else student_name(curve["student_size"]),
        (curve["student_parameters"],),
        (placed_at(curve) or 0.0,),
        colour=style.colour,
        marker=EDGES[optimum["status"]] if edge else style.marker,
        size=12,
        y_interval=(closed(optimum.get("interval"), y_limits),),
        hover=(f"{student_name(curve['student_size'])}<br>{optimum_text(curve)}",),
        shared=edge,
    )


def _resolution(curve: Curve, y_limits: Pair) -> list[Series]:
    """From neighbour to neighbour of the best measured cell, which no fit can make narrower."""
    optimum = curve["optimum"]
    interval = closed(optimum.get("grid_interval"), y_limits)
    if interval is None:
        return []
    student = float(curve["student_parameters"])
    told = words.between(optimum["grid_best"], optimum["grid_interval"])
    return [
        Series(
            "grid resolution",
            (student, student),
            interval,
            "line",
            colour="resolution",
            width=11,
            hover=(f"{student_name(curve['student_size'])}<br>best cell {told}",) * 2,
            group="resolution",
            shared=True,
        )
    ]


def residual_chart(results: Results, kind: Kind) -> Figure:
    """ln of the best teacher found over the law's, by student size, where a law is identified."""
    name, title = f"residuals-{slug(kind)}", f"How far each student is from the law: {kind}"
    law = law_of(results, kind)
    if law is None or law["status"] != "identified":
        reason = (law or {}).get("reason") or "too little has been measured"
        return Absent(name, title, f"No law is identified: {reason.rstrip('.')}.")
    expected = {
        curve["student_size"]: law["slope"] * curve["student_parameters"] + law["intercept"]
        for curve in curves_of(results, kind)
        if placed_at(curve)
    }
    curves = [c for c in curves_of(results, kind) if expected.get(c["student_size"], 0) > 0]
    if not curves:
        return Absent(name, title, "The law's line is below zero for every student.")
    students = [curve["student_parameters"] for curve in curves]
    x_limits = span(students, margin=1.4)
    ends = [
        math.log(end / expected[curve["student_size"]])
        for curve in curves
        for end in (placed_at(curve), *(curve["optimum"].get("interval") or ()))
        if end
    ]
    reach = 1.25 * max(0.08, *map(abs, ends))
    limits = (-reach, reach)
    series = [*_law_in_itself(law, x_limits, reach)]
    for curve in curves:
        series.append(_residual(results, curve, expected[curve["student_size"]], limits))
    return Chart(
        name,
        title,
        "Marks should lie on both sides of the line without an order: a bow or a slope says that "
        "the law is not the line. Bars are the intervals of the best teachers; what is open goes "
        "to the edge.",
        Axis("student size", SIZE_UNIT, True, x_limits, size_ticks(students, x_limits)),
        Axis(
            "best teacher against the law",
            "%, log scale",
            limits=limits,
            ticks=percent_ticks(limits),
        ),
        tuple(legend_once(series)),
        tuple(note for curve in curves for note in status_notes(curve)),
    )


def _law_in_itself(law: Mapping[str, Any], x_limits: Pair, reach: float) -> list[Series]:
    """The line at 0 and the interval of the law about it."""
    series = []
    band = law.get("band")
    if band:
        rows = zip(*(band[n] for n in ("student", "low", "mid", "high")), strict=True)
        held = [row for row in rows if row[2] > 0]
        series.append(
            Series(
                "interval of the law",
                tuple(row[0] for row in held),
                tuple(math.log(row[1] / row[2]) if row[1] > 0 else -reach for row in held),
                "band",
                colour="band",
                y_high=tuple(math.log(row[3] / row[2]) for row in held),
            )
        )
    series.append(Series("the law", x_limits, (0.0, 0.0), "line", colour="text"))
    return series


def _residual(results: Results, curve: Curve, expected: float, limits: Pair) -> Series:
    optimum, style = curve["optimum"], student_look(results, curve["student_size"])
    edge = optimum["status"] in EDGES
    place = math.log((placed_at(curve) or expected) / expected)
    interval = optimum.get("interval")
    logs = interval and [None if end is None else math.log(end / expected) for end in interval]
    return Series(
        OPEN_END if edge else student_name(curve["student_size"]),
        (curve["student_parameters"],),
        (place,),
        colour=style.colour,
        marker=EDGES[optimum["status"]] if edge else style.marker,
        size=12,
        y_interval=(closed(logs, limits),),
        hover=(
            f"{student_name(curve['student_size'])}<br>{optimum_text(curve)}<br>"
            f"the law says {words.rough_size(expected)}",
        ),
        shared=edge,
    )
