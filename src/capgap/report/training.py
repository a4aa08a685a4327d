"""What happened during training: cross-entropy, KL and agreement over tokens. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from capgap.law.cells import Kind, baseline_key, baselines_by_key
from capgap.records import RunRecord
from capgap.report import words
from capgap.report.charts import LOSS_UNIT, legend_once, student_look, student_name
from capgap.report.data import Results, best_and_largest, slug
from capgap.report.figures import Absent, Axis, Chart, Figure, Pair, Series

MOST_POINTS = 60
FIRST_PART = 0.12
NO_CURVE = "No finished cell of this kind has a training curve with this measure."


def cross_entropy_chart(results: Results, kind: Kind) -> Figure:
    """Training cross-entropy over tokens of each student's best cell and of its baseline."""
    matched = baselines_by_key(results.records)
    series = []
    for ends in best_and_largest(results, kind):
        series += _line(results, ends.best, "ce")
        baseline = matched.get(baseline_key(ends.best))
        if baseline is not None:
            series += _line(results, baseline, "ce", dashed="dashed: cross-entropy alone")
    return _chart(
        f"training-{slug(kind)}",
        f"Training loss: {kind}",
        "Solid: each student with its best teacher; dashed: the same start trained on "
        "cross-entropy alone. Look whether the lines have flattened out, and which ends lower.",
        Axis("training cross-entropy", LOSS_UNIT),
        series,
    )


def kl_chart(results: Results, kind: Kind) -> Figure:
    """KL(teacher || student) over tokens, for each student's best and largest teacher."""
    return _chart(
        f"kl-{slug(kind)}",
        f"Distance to the teacher: {kind}",
        "KL from the teacher to the student, for each student's best teacher (solid) and its "
        "largest (dashed): a large teacher that stays far away is one the student cannot follow.",
        Axis("KL(teacher ‖ student)", LOSS_UNIT),
        _best_and_largest_lines(results, kind, "kl"),
    )


def agreement_chart(results: Results, kind: Kind) -> Figure:
    """Share of tokens where teacher and student put the same token first."""
    return _chart(
        f"agreement-{slug(kind)}",
        f"Agreement with the teacher: {kind}",
        "How often teacher and student name the same most likely token, for each student's best "
        "teacher (solid) and its largest (dashed): a gap between the two is the capacity gap.",
        Axis("agreement", "share of tokens"),
        _best_and_largest_lines(results, kind, "agreement"),
    )


def _best_and_largest_lines(results: Results, kind: Kind, measure: str) -> list[Series]:
    series = []
    for ends in best_and_largest(results, kind):
        series += _line(results, ends.best, measure)
        if ends.largest.id != ends.best.id:
            series += _line(results, ends.largest, measure, dashed="dashed: largest teacher")
    return series


def _line(results: Results, run: RunRecord, measure: str, *, dashed: str = "") -> list[Series]:
    points = block_means(run.curve.tokens, getattr(run.curve, measure))
    if len(points) < 2:
        return []
    size = run.student_size or 0
    what = "cross-entropy alone" if run.kind == "baseline" else "distilled"
    if run.teacher_size is not None:
        what += f", teacher {words.size(run.teacher_size)}"
    return [
        Series(
            dashed or student_name(size),
            tuple(x for x, _ in points),
            tuple(y for _, y in points),
            "line",
            colour=student_look(results, size).colour,
            dash="dash" if dashed else "solid",
            hover=tuple(
                f"{student_name(size)}, {what}<br>{words.size(x)} tokens: {y:.3f}"
                for x, y in points
            ),
            group="dashed" if dashed else "",
            shared=bool(dashed),
        )
    ]


def block_means(
    x: Sequence[float | None], y: Sequence[float | None], *, most: int = MOST_POINTS
) -> list[Pair]:
    """Means over equal blocks of neighbouring points: at most `most`, missing values left out."""
    held = [
        (a, b)
        for a, b in zip(x, y, strict=False)
        if a is not None and b is not None and math.isfinite(b)
    ]
    block = max(1, math.ceil(len(held) / most))
    parts = [held[i : i + block] for i in range(0, len(held), block)]
    return [(fmean(a for a, _ in part), fmean(b for _, b in part)) for part in parts]


def _chart(name: str, title: str, caption: str, y: Axis, series: Sequence[Series]) -> Figure:
    if not series:
        return Absent(name, title, NO_CURVE)
    last = max(max(one.x) for one in series)
    # the first steps fall so far that what follows would be a flat line
    later = [b for s in series for a, b in zip(s.x, s.y, strict=True) if a > FIRST_PART * last]
    room = 0.06 * (max(later) - min(later)) or 0.01
    ticks = linear_ticks(last)
    x_limits = (0, max(last, ticks[-1][0]))
    return Chart(
        name,
        title,
        caption,
        Axis("training tokens of the student", "tokens", False, x_limits, ticks),
        replace(y, limits=(min(later) - room, max(later) + room)),
        tuple(legend_once(series)),
        (
            f"Each line shows the means of at most {MOST_POINTS} blocks of steps; "
            "the first steps may lie outside the picture.",
        ),
    )


def linear_ticks(last: float) -> tuple[tuple[float, str], ...]:
    """Four to six round ticks from 0 to about `last`, written as counts."""
    rough = last / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(lead * power for lead in (1, 2, 5, 10) if lead * power >= rough)
    return tuple((i * step, words.size(i * step)) for i in range(int(last / step + 0.01) + 1))
