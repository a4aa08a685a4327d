"""A loss surface over student and teacher, with the valley of best teachers. Pure functions."""

from __future__ import annotations

import numpy as np
from contourpy import LineType, contour_generator
from numpy.typing import NDArray

from capgap.law.own_surface import OwnSurface
from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.rules import SURFACE_RANGE
from capgap.law.surface import DistillationSurface, TeacherTokens
from capgap.report import words
from capgap.report.charts import LOSS_UNIT, SIZE_UNIT
from capgap.report.data import safe
from capgap.report.figures import Axis, Chart, Pair, Series, count_ticks, steps

# T/S between which the best teacher is looked for; one at an end is none
RATIOS = (0.25, 1000.0)
GRID = 100
LINES = 8


def surface_chart(
    surface: DistillationSurface,
    name: str,
    title: str,
    *,
    students: Pair,
    teachers: Pair,
    tokens: float | None = None,
    tokens_per_parameter: float | None = None,
    teacher_tokens: TeacherTokens | None = None,
    notes: tuple[str, ...] = (),
) -> Chart:
    """Lines of equal student loss over student and teacher size, both in parameters, with the
    valley of best teachers and T = 2.5 S.

    Students learn from `tokens`, all alike, or from `tokens_per_parameter`: one of the two.
    Teachers were trained compute-optimally, or on `teacher_tokens`.
    """
    assert (tokens is None) != (tokens_per_parameter is None)
    sizes, above = np.geomspace(*students, GRID), np.geomspace(*teachers, GRID)
    read = np.full_like(sizes, tokens) if tokens else (tokens_per_parameter or 0.0) * sizes
    alone = surface.supervised
    taught = (teacher_tokens or alone.compute_optimal_tokens()).of(above)
    losses = surface.loss(sizes, read, alone.loss(above, taught)[:, None])
    valley = _valley(surface, sizes, read, teacher_tokens)
    inside = [row for row in valley if teachers[0] <= row[1] <= teachers[1]]
    series: list[Series] = []
    if inside:
        series.append(
            Series(
                "within 0.1% of the lowest loss",
                tuple(row[0] for row in inside),
                tuple(max(row[2], teachers[0]) for row in inside),
                "band",
                colour="band",
                y_high=tuple(min(row[3], teachers[1]) for row in inside),
            )
        )
    series += _contours(sizes, above, losses)
    if inside:
        series.append(
            Series(
                "valley of best teachers",
                tuple(row[0] for row in inside),
                tuple(row[1] for row in inside),
                "line",
                width=3.5,
                hover=tuple(
                    f"student {words.size(s)}<br>best teacher {words.size(t)}<br>T/S {t / s:.1f}"
                    for s, t, _, _ in inside
                ),
            )
        )
    series.append(_published_line(students, teachers))
    if not inside:
        notes = ("The lowest loss is outside of the picture for every student.", *notes)
    return Chart(
        name,
        title,
        "Along a line of equal loss the best student is the smallest: where the line reaches "
        "furthest to the left is the best teacher. A wide band means that the choice matters "
        "little.",
        Axis("student size", SIZE_UNIT, True, students, count_ticks(students)),
        Axis("teacher size", SIZE_UNIT, True, teachers, count_ticks(teachers)),
        tuple(series),
        notes,
    )


Row = tuple[float, float, float, float]


def _valley(
    surface: DistillationSurface,
    sizes: NDArray[np.floating],
    read: NDArray[np.floating],
    teacher_tokens: TeacherTokens | None,
) -> list[Row]:
    """(student, best teacher, and the smallest and largest one as good as it), by student; without
    those whose best teacher is at the end of what was looked at."""
    rows = []
    for size, tokens in zip(sizes.tolist(), read.tolist(), strict=True):
        best = surface.best_teacher(size, tokens, teacher_tokens=teacher_tokens, ratios=RATIOS)
        if RATIOS[0] * 1.001 < best.ratio < RATIOS[1] / 1.001:
            low, high = best.within
            rows.append((size, best.ratio * size, low * size, high * size))
    return rows


def _contours(
    sizes: NDArray[np.floating], above: NDArray[np.floating], losses: NDArray[np.floating]
) -> list[Series]:
    """Lines of equal loss at round values, in about equal steps over the students, with labels."""
    lowest = losses.min(axis=0)
    places = np.linspace(0, len(sizes) - 1, LINES + 2)[1:-1]
    levels = sorted({round(float(lowest[round(place)]), 2) for place in places})
    generator = contour_generator(np.log(sizes), np.log(above), losses, line_type=LineType.Separate)
    series: list[Series] = []
    labels = []
    for level in levels:
        for piece in generator.lines(level):
            line = np.asarray(piece)
            x, y = (tuple(np.exp(line[:, axis]).tolist()) for axis in (0, 1))
            series.append(
                Series(
                    f"equal loss, {LOSS_UNIT}",
                    x,
                    y,
                    "line",
                    colour="muted",
                    width=1.2,
                    hover=(f"loss {level:.2f}",) * len(x),
                    group="contours",
                    in_legend=not series,
                )
            )
            labels.append(_label_place(line, np.log(above)))
    texts = tuple(
        Series(
            "labels",
            (float(np.exp(place[0])),),
            (float(np.exp(place[1])),),
            "text",
            colour="muted",
            labels=(one.hover[0].removeprefix("loss "),),
            label_at=("middle center",),
            in_legend=False,
        )
        for one, place in zip(series, labels, strict=True)
    )
    return [*series, *texts]


def _label_place(line: NDArray[np.floating], above: NDArray[np.floating]) -> NDArray[np.floating]:
    """The point of a line that is nearest to the row of labels, near the top."""
    row = above[0] + 0.92 * (above[-1] - above[0])
    place: NDArray[np.floating] = line[int(np.abs(line[:, 1] - row).argmin())]
    return place


def _published_line(students: Pair, teachers: Pair) -> Series:
    held = [(s, 2.5 * s) for s in steps(students, GRID) if teachers[0] <= 2.5 * s <= teachers[1]]
    return Series(
        "T = 2.5 S (arXiv 2311.07052)",
        tuple(student for student, _ in held),
        tuple(teacher for _, teacher in held),
        "line",
        colour="series-1",
        dash="dash",
        width=2.5,
    )


def published_surface_chart(tokens_per_parameter: float) -> Chart:
    """The published surface (arXiv 2502.08606) for students of so many tokens per parameter."""
    low, high = (words.size(size) for size in SURFACE_RANGE)
    return surface_chart(
        PUBLISHED_SURFACE,
        f"surface-published-{tokens_per_parameter:g}",
        f"Published surface: {tokens_per_parameter:g} tokens per student parameter",
        students=SURFACE_RANGE,
        teachers=(SURFACE_RANGE[0], 1e12),
        tokens_per_parameter=tokens_per_parameter,
        notes=(
            "arXiv 2502.08606: students from scratch, teachers trained compute-optimally. It was "
            f"read from models of {low} to {high}; larger teachers are an extrapolation.",
        ),
    )


def own_surface_chart(own: OwnSurface, tokens: float) -> Chart:
    """The surface fitted to a sweep's students from scratch, on so many tokens, between the sizes
    of its students and teachers."""
    return surface_chart(
        own.surface,
        f"surface-{safe(own.architecture)}-{tokens:.0f}",
        f"Surface of this sweep: {own.architecture} from scratch, {words.size(tokens)} tokens",
        students=_around(own.students),
        teachers=_around(own.teachers),
        tokens=tokens,
        teacher_tokens=own.teacher_tokens,
        notes=(
            f"It fits the sweep's losses to {own.error:.2%}; a teacher is known by its loss alone, "
            "as the sweep's teachers were trained.",
        ),
    )


def _around(limits: Pair) -> Pair:
    """A little more than what was measured; a single size gets a range of its own."""
    margin = 1.1 if limits[1] > 1.05 * limits[0] else 1.5
    return limits[0] / margin, limits[1] * margin
