"""Pictures of the law: curves, costs, contrasts, best teachers. Pure functions.

What is best, what will do and what can be told comes from `Curve.optimum` and `Point.worse`, never
from the lowest cell.
"""

from collections.abc import Iterable, Sequence
from math import log

import altair
import numpy as np

from capgap.law.law import Contrast, Curve, Group, Interval, Line, Point
from capgap.law.published import PUBLISHED_LINE, PUBLISHED_RESOLUTION, PUBLISHED_SURFACE
from capgap.law.surface import RATIOS
from capgap.report import draw, numbers
from capgap.report.draw import LIGHT, Absent, Frame, Look, Pair, Picture, Row, in_words, row
from capgap.report.results import Results, init_rank, safe, slug

TEACHER = "teacher size (non-embedding parameters)"
STUDENT = "student size (non-embedding parameters)"
LOSS = "nats per token"
ENDS = {
    "smallest": "the smallest teacher cannot be told from the best, which may be smaller still",
    "largest": "the largest teacher cannot be told from the best, which may be larger still",
    "flat": "neither the smallest nor the largest teacher can be told from the best",
    "too_few_points": "too few teachers have finished for a curve",
}
REFUSED = {
    "too_few_students": "No line is fitted: fewer than three students have a best teacher, or "
    "fewer than two have it inside the teachers tried.",
    "includes_zero": "No line is fitted: the interval of its slope reaches zero.",
    "too_wide": "No line is fitted: its slope is known to no better than a factor of four.",
}
CONTRASTS = {
    "tokens": "more or fewer tokens",
    "init": "cut or the same start",
    "chain": "with an assistant or not",
    "student": "larger or smaller student",
}
SURFACE_STUDENT = 1e9  # that the published surface is asked for
OWN_GRID, THEIR_GRID = "what this grid resolves", "what the published grid resolves"
SURFACE = "published surface (arXiv 2502.08606)"
DASHED, WEDGE = Look(draw.MUTED, dash=draw.DASHED), Look(LIGHT["series-4"])


def student_name(size: int | None) -> str:
    return f"{numbers.size(size)} student"


def student_looks(results: Results, sizes: Iterable[int]) -> dict[str, Look]:
    """The looks of these students: the same in every picture of a report."""
    order = results.students
    return {student_name(size): draw.look(order.index(size)) for size in sorted(set(sizes))}


def curve_chart(results: Results, group: Group) -> Picture:
    """Student loss over teacher size, a line for each student, with its fit and its optimum."""
    curves = results.law.of(group)
    frame = _frame(results, curves, f"held-out loss of the student ({LOSS})")
    measured = [
        row(_key(c), p.teacher_parameters, p.loss, _point_text(c, p), p.loss_stderr)
        for c in curves
        for p in c.points
    ]
    fitted = [one for curve in curves for one in _fitted(curve)]
    stars = [star for c in curves for star in _star(c, draw.limits_of(frame.x))]
    title = f"Student loss over teacher size: {group}"
    return Picture(
        f"curves-{slug(group)}",
        title,
        "Points are measured, with one standard error; the line is the fit with its interval. A "
        "star is its best teacher, hollow where that may lie beyond the teachers tried.",
        [
            *frame.draw("bands lines", fitted),
            *frame.draw("bars points", measured),
            *frame.draw("spans", stars),
            *frame.draw("points", stars, shape=draw.STAR, size=110),
        ],
        f"{title}. {in_words(_best(c) for c in curves)}",
        _notes(curves),
    )


def cost_chart(results: Results, group: Group) -> Picture | Absent:
    """Cost of each teacher above the best one of its student, by the fit."""
    names = f"cost-{slug(group)}", f"What each teacher costs: {group}"
    curves = [c for c in results.law.of(group) if any(p.cost is not None for p in c.points)]
    if not curves:
        return Absent(*names, "What a teacher costs is not known: nothing tells what noise is.")
    frame = _frame(results, curves, f"loss above the student's best teacher ({LOSS})")
    # bars of one teacher's students would hide one another
    shifts = [1.012 ** (number - (len(curves) - 1) / 2) for number in range(len(curves))]
    rows = [
        row(_key(c), p.teacher_parameters * shift, p.cost, _point_text(c, p), p.cost_stderr)
        | {"hollow": p.worse}
        for c, shift in zip(curves, shifts, strict=True)
        for p in c.points
        if p.cost is not None
    ]
    will_do = "; ".join(
        f"{_key(c)} {numbers.sizes(p.teacher_parameters for p in c.will_do)}" for c in curves
    )
    return Picture(
        *names,
        "Filled marks are teachers that will do: not worse than the best beyond noise. Hollow "
        "ones are worse. Bars are one standard error of the difference to the best.",
        [*frame.draw("lines", rows, strokeWidth=1, opacity=0.6), *frame.draw("bars points", rows)],
        f"{names[1]}. Teachers that will do: {will_do}.",
        _notes(curves),
    )


def contrast_chart(results: Results, architecture: str) -> Picture | Absent:
    """Influences on the best teacher: slopes of curves beside each other, with their intervals."""
    names = safe(f"contrasts-{architecture}"), f"What moves the best teacher: {architecture}"
    rows = [_contrast(c) for c in results.law.contrasts if c.architecture == architecture]
    if not rows:
        return Absent(*names, "No two curves share their teachers: there is nothing to compare.")
    present = {one["key"] for one in rows}
    looks = {k: draw.look(i) for i, k in enumerate(CONTRASTS.values()) if k in present}
    # in two lines: a narrow screen has no room for the names beside the bars
    axis = altair.Axis(labelExpr="split(datum.label, ' | ')", labelLimit=200, grid=True)
    y = {"type": "nominal", "title": None, "sort": [one["y"] for one in rows], "axis": axis}
    wants = ["\u2190 larger teachers for the first", "for the second \u2192"]
    frame = Frame(draw.linear_axis(wants), y, looks)
    return Picture(
        *names,
        "By how much more the loss of the first set of curves rises than that of the second for a "
        f"teacher twice as large ({LOSS}): left of zero the first wants larger teachers. Bars are "
        f"intervals at {results.law.confidence:.0%}; hollow marks cannot be told from zero.",
        [
            *frame.draw("uprights", [row(rows[0]["key"], 0.0, None)], color=draw.TEXT),
            *frame.draw("spans", rows),
            *frame.draw("points", rows, size=90),
        ],
        f"{names[1]}. {in_words(rows)}",
        height=46 * len(rows) + 10,
    )


def law_chart(results: Results, line: Line) -> Picture | Absent:
    """The best teacher over the student's size: measured, fitted and published, with what the grid
    can resolve."""
    names = f"law-{slug(line.group)}", f"Best teacher over student size: {line.group}"
    all_curves = results.law.of(line.group)
    curves = [curve for curve in all_curves if curve.optimum.interval is not None]
    refused = [REFUSED[line.refused]] if line.refused else []
    if not curves:
        return Absent(*names, " ".join(["No student's best teacher can be told.", *refused]))
    x = draw.size_axis(STUDENT, [curve.student_parameters for curve in curves], 1.3)
    y = _teachers(all_curves, 1.3) | {"title": "best teacher (non-embedding parameters)"}
    across, up = draw.limits_of(x), draw.limits_of(y)
    fitted, published = _fitted_line(line), _published_line(across, up[0])
    looks = student_looks(results, [c.student_size for c in curves])
    looks |= {OWN_GRID: Look(LIGHT["series-5"])} | {one["key"]: Look(draw.TEXT) for one in fitted}
    looks |= {published[0]["key"]: DASHED, THEIR_GRID: WEDGE}
    frame = Frame(x, y, looks)
    ends = [(c.student_parameters, _closed(c.optimum.neighbours, up)) for c in curves]
    resolved = [row(OWN_GRID, size, None, low=low, high=high) for size, (low, high) in ends]
    best = [_best(c, x=c.student_parameters, limits=up) for c in curves]
    return Picture(
        *names,
        "A mark is a student's best teacher with its interval, hollow where it may lie beyond the "
        "teachers tried (arrow). The wide bar is what the grid alone can tell, from neighbour to "
        "neighbour. The published line was read from teachers of 70M to 2.8B.",
        [
            *frame.draw("bands", _wedge(np.geomspace(*across, 20), ratios=False)),
            *frame.draw("bars", resolved, strokeWidth=16, opacity=0.2),
            *frame.draw("bands", fitted),
            *frame.draw("lines", [*fitted, *published]),
            *_marked(frame, best),
        ],
        " ".join([f"{names[1]}.", in_words(best), *refused]),
        (*refused, *_notes(all_curves)),
    )


def ratio_chart(results: Results, architecture: str) -> Picture | Absent:
    """T/S of every student's best teacher against its tokens per parameter, all kinds together."""
    names = safe(f"ratios-{architecture}"), f"Best T/S against training tokens: {architecture}"
    own = [c for c in results.law.curves if c.architecture == architecture and c.tokens]
    curves = [curve for curve in own if curve.optimum.ratio_interval is not None]
    if not curves:
        return Absent(*names, "No student's best teacher can be told.")
    across = draw.span([c.tokens / c.student_parameters for c in curves], 1.6)
    surface = []
    for tokens in np.geomspace(*across, 24).tolist():
        best = PUBLISHED_SURFACE.best_teacher(SURFACE_STUDENT, tokens * SURFACE_STUDENT)
        surface += [row(SURFACE, tokens, best.ratio)] if best.ratio < 0.999 * RATIOS[1] else []
    ends = [end for c in curves for end in (c.optimum.ratio, *(c.optimum.ratio_interval or ()))]
    ends += [*PUBLISHED_RESOLUTION, *(one["y"] for one in surface)]
    up = draw.span(filter(None, ends), 1.3)
    inits = sorted({c.init for c in curves}, key=lambda init: (init_rank(init), init))
    line = f"published {PUBLISHED_LINE.slope:.3g} (arXiv 2311.07052)"
    looks = {init: draw.look(init_rank(init)) for init in inits}
    looks |= {line: DASHED, THEIR_GRID: WEDGE}
    looks |= {SURFACE: Look(draw.TEXT, dash=draw.DOTTED)} if surface else {}
    x = draw.log_axis("training tokens per student parameter", across, draw.FACTOR)
    frame = Frame(x, draw.log_axis("best teacher / student", up, draw.FACTOR), looks)
    # inits of one student would hide one another
    marks = [
        _best(c, c.init, c.tokens / c.student_parameters * 1.03 ** inits.index(c.init), up)
        for c in curves
    ]
    published = [row(line, end, PUBLISHED_LINE.slope) for end in across]
    return Picture(
        *names,
        "Filled marks lie inside the teachers tried; hollow ones are bounds, with an arrow to "
        "where the best may lie. What is published is for far larger models; the surface is for a "
        f"{numbers.size(SURFACE_STUDENT)} student from scratch with compute-optimal teachers.",
        [
            *frame.draw("bands", _wedge(across, ratios=True)),
            *frame.draw("lines", [*published, *surface]),
            *_marked(frame, marks),
        ],
        f"{names[1]}. {in_words(marks)}",
    )


def _key(curve: Curve) -> str:
    return student_name(curve.student_size)


def _teachers(curves: Iterable[Curve], margin: float = 1.12) -> Row:
    sizes = [point.teacher_parameters for curve in curves for point in curve.points]
    return draw.size_axis(TEACHER, sizes, margin)


def _frame(results: Results, curves: Sequence[Curve], title: str) -> Frame:
    looks = student_looks(results, [curve.student_size for curve in curves])
    return Frame(_teachers(curves), draw.linear_axis(title), looks)


def _notes(curves: Sequence[Curve]) -> tuple[str, ...]:
    """Notes on curves whose optimum may lie beyond the teachers tried."""
    by_status = {s: [_key(c) for c in curves if c.optimum.status == s] for s in ENDS}
    return tuple(f"{numbers.listed(k)}: {ENDS[s]}." for s, k in by_status.items() if k)


def _point_text(curve: Curve, point: Point) -> str:
    size, ratio = point.teacher_parameters, point.teacher_parameters / curve.student_parameters
    worse = "worse beyond noise" if point.worse else "will do"
    seeds = ", ".join(f"{value:.3f}" for value in point.losses)
    parts = (
        (size, f"{_key(curve)}, teacher {numbers.size(size)} (T/S {ratio:.2g})"),
        (size, f"loss {numbers.loss(point.loss, point.loss_stderr)}"),
        (point.cost, f"{numbers.loss(point.cost, point.cost_stderr)} above the best: {worse}"),
        (point.gain, f"gain over cross-entropy {numbers.gain(point.gain, point.gain_stderr)}"),
        (point.teacher_loss, f"the teacher's own loss {numbers.loss(point.teacher_loss)}"),
        (point.losses[1:] or None, f"by seed: {seeds}"),
    )
    return "\n".join(text for known, text in parts if known is not None)


def _fitted(curve: Curve) -> list[Row]:
    """The fitted curve with its band; without one the line through what was measured."""
    fit, key = curve.fit, _key(curve)
    if fit is None:
        return [row(key, p.teacher_parameters, p.loss) for p in curve.points]
    points = zip(fit.teacher_parameters, fit.loss, fit.low, fit.high, strict=True)
    # every third is enough for the eye
    return [row(key, x, y, low=low, high=high) for x, y, low, high in list(points)[::3]]


def _closed(interval: Interval | None, limits: Pair) -> Pair:
    """An interval to draw: an open end reaches beyond the limit of the axis, where it is cut."""
    low, high = interval or (None, None)
    return limits[0] / 2 if low is None else low, limits[1] * 2 if high is None else high


def _best(curve: Curve, key: str = "", x: float = 0.0, limits: Pair = (1.0, 1.0)) -> Row:
    """A best teacher with its interval: its T/S where the key is the init, else its parameters."""
    optimum = curve.optimum
    size, interval = optimum.teacher_parameters, optimum.interval
    ratio, ratio_interval = optimum.ratio, optimum.ratio_interval
    found = "best teacher cannot be told"
    if size is not None:
        found = f"best teacher {numbers.size_with_interval(size, interval)}\n"
        found += f"T/S {numbers.with_interval(ratio, ratio_interval)}"
    tip = f"{_key(curve)}, {curve.init}, {numbers.size(curve.tokens)} tokens\n{found}"
    y, interval = (ratio, ratio_interval) if key == curve.init else (size, interval)
    low, high = _closed(interval, limits)
    hollow = optimum.status != "interior"
    return row(key or _key(curve), x, y, tip, low=low, high=high, hollow=hollow)


def _star(curve: Curve, limits: Pair) -> list[Row]:
    """The best teacher on the fitted curve, if it is known."""
    best, fit = curve.optimum.teacher_parameters, curve.fit
    if best is None or fit is None:
        return []
    height = float(np.interp(log(best), np.log(fit.teacher_parameters), fit.loss))
    found = _best(curve, limits=limits)
    return [found | {"x": best, "y": height, "left": found["low"], "right": found["high"]}]


def _marked(frame: Frame, rows: list[Row]) -> list[altair.Chart]:
    """Best teachers with their intervals, and arrows where those are open."""
    low, high = draw.limits_of(frame.y)
    inset = (high / low) ** 0.02
    solid = {"hollow": False}
    up = [one | solid | {"y": high / inset} for one in rows if one["high"] > high]
    down = [one | solid | {"y": low * inset} for one in rows if one["low"] < low]
    return [
        *frame.draw("bars", rows, strokeWidth=2),
        *frame.draw("points", rows, size=100),
        *frame.draw("points", up, shape="triangle-up", size=80),
        *frame.draw("points", down, shape="triangle-down", size=80),
    ]


def _wedge(across: Iterable[float], *, ratios: bool) -> list[Row]:
    """Between which best teachers, or their T/S, the published grid cannot tell."""
    low, high = PUBLISHED_RESOLUTION
    scales = [(float(x), 1.0 if ratios else float(x)) for x in across]
    return [row(THEIR_GRID, x, None, low=low * by, high=high * by) for x, by in scales]


def _fitted_line(line: Line) -> list[Row]:
    """The law's line with its band; empty where none is identified."""
    if line.band is None or line.slope is None or not line.is_identified:
        return []
    slope = numbers.with_interval(line.slope.value, (line.slope.low, line.slope.high))
    key, band = f"fitted line, slope {slope}", line.band
    rows = zip(band.student, band.low, band.mid, band.high, strict=True)
    # a wide interval reaches zero and below, which a logarithmic axis cannot show
    return [row(key, s, mid, low=max(low, 1.0), high=high) for s, low, mid, high in rows if mid > 0]


def _published_line(students: Pair, smallest: float) -> list[Row]:
    """The published line over these students."""
    slope, intercept = PUBLISHED_LINE.slope, PUBLISHED_LINE.intercept
    key = f"published T = {slope:.4g} S {numbers.MINUS} {numbers.size(abs(intercept))}"
    if PUBLISHED_LINE.optimal_teacher(students[1]) < smallest:
        # an intercept of millions of parameters means nothing for students far below that
        intercept, key = 0.0, f"published slope {slope:.4g}, without its intercept"
    points = [(size, slope * size + intercept) for size in np.geomspace(*students, 20).tolist()]
    return [row(key, x, y) for x, y in points if y > 0]


def _contrast(one: Contrast) -> Row:
    """A row of the contrasts, for a teacher twice as large."""
    budgets = () if one.tokens is None else tuple(map(numbers.size, one.tokens))
    tokens = " and ".join(dict.fromkeys(budgets))
    large, small = numbers.size(one.students[-1]), numbers.size(one.students[0])
    first, second = one.inits
    pair = {
        "tokens": f"{' less '.join(budgets) or 'more less fewer'} tokens | {first}",
        "student": f"{large} less {small} student | {first}, {tokens} tokens",
    }.get(one.what, f"{first} less {second} | {tokens} tokens")
    value, left, right = (log(2) * end for end in (one.slope.value, one.slope.low, one.slope.high))
    slope = f"{numbers.gain(value)} ({numbers.gain(left)} to {numbers.gain(right)})"
    tip, hollow = f"{pair.replace(' | ', ', ')}\n{slope} {LOSS}", not one.is_told
    return row(CONTRASTS[one.what], value, pair, tip, left=left, right=right, hollow=hollow)
