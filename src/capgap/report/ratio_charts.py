"""T/S against tokens per parameter, beside what is published. Pure functions."""

from __future__ import annotations

from capgap.law.published import PUBLISHED_LINES, PUBLISHED_RESOLUTION, PUBLISHED_SURFACE
from capgap.report import words
from capgap.report.charts import Curve, closed, legend_once, optimum_text, student_name
from capgap.report.data import Results, curves_of, kinds_of, safe
from capgap.report.figures import (
    Absent,
    Axis,
    Chart,
    Figure,
    Pair,
    Series,
    factor_ticks,
    span,
    steps,
)
from capgap.report.law_charts import EDGES, OPEN_END, placed_at
from capgap.report.style import look

# the student that the published surface is asked for
SURFACE_STUDENT = 1e9
STEPS_OF_A_SURFACE = 24


def ratio_chart(results: Results, architecture: str) -> Figure:
    """T/S of every student's best teacher against its tokens per parameter, all kinds together."""
    name, title = (
        safe(f"ratios-{architecture}"),
        f"Best T/S against training tokens: {architecture}",
    )
    kinds = [kind for kind in kinds_of(results) if kind.architecture == architecture]
    curves = [c for kind in kinds for c in curves_of(results, kind) if placed_at(c) and c["tokens"]]
    if not curves:
        reason = "No student of known tokens has a best teacher that can be told."
        return Absent(name, title, reason)
    x_limits = span([_tokens_per_parameter(curve) for curve in curves], margin=1.6)
    surface = _surface_line(x_limits)
    ends = [
        end
        for curve in curves
        for end in (curve["optimum"]["ratio"], *(curve["optimum"].get("ratio_interval") or ()))
        if end
    ]
    y_limits = span([*ends, *PUBLISHED_RESOLUTION, *(surface.y if surface else ())], margin=1.4)
    series = _published_ratio(x_limits) + ([surface] if surface else [])
    inits = sorted({kind.init for kind in kinds}, key=_order)
    for position, init in enumerate(inits):
        # inits of one student would hide one another
        shift = 1.035 ** (position - (len(inits) - 1) / 2)
        held = [curve for curve in curves if curve["init"] == init]
        series += _ratios(init, held, shift, y_limits)
    notes = (
        [] if surface else [f"The published surface has no best teacher within {words.TIMES}1000."]
    )
    return Chart(
        name,
        title,
        "Is it one ratio for all, or does it grow or fall with the tokens? Solid marks lie inside "
        "the grid; hollow ones are bounds, with an arrow to where the best teacher may lie. Both "
        "published lines are for far larger models; the surface is for a "
        f"{words.size(SURFACE_STUDENT)} student from scratch with compute-optimal teachers.",
        Axis("training tokens", "per student parameter", True, x_limits, factor_ticks(x_limits)),
        Axis(
            "best teacher / student",
            "ratio of parameters",
            True,
            y_limits,
            factor_ticks(y_limits),
        ),
        tuple(legend_once(series)),
        tuple(notes),
    )


def _tokens_per_parameter(curve: Curve) -> float:
    ratio: float = curve["tokens"] / curve["student_parameters"]
    return ratio


def _order(init: str) -> tuple[int, str]:
    """pruned, fixed, scratch and chain have the same look in every report."""
    known = ("pruned", "fixed", "scratch", "chain")
    return (known.index(init) if init in known else len(known), init)


def _published_ratio(x_limits: Pair) -> list[Series]:
    low, high = PUBLISHED_RESOLUTION
    slope = PUBLISHED_LINES[0].slope
    return [
        Series(
            f"its resolution: {low:.1f} to {high:.2f}",
            x_limits,
            (low, low),
            "band",
            colour="published",
            y_high=(high, high),
            hatch=True,
        ),
        Series(
            f"{slope:.1f} (arXiv 2311.07052)",
            x_limits,
            (slope, slope),
            "line",
            colour="muted",
            dash="dash",
        ),
    ]


def _surface_line(x_limits: Pair) -> Series | None:
    """The best T/S of the published surface, where it has one below the largest it looks at."""
    found = []
    for tokens in steps(x_limits, STEPS_OF_A_SURFACE):
        best = PUBLISHED_SURFACE.best_teacher(SURFACE_STUDENT, tokens * SURFACE_STUDENT)
        if best.ratio < 999:
            found.append((tokens, best.ratio))
    if not found:
        return None
    return Series(
        "surface (arXiv 2502.08606)",
        tuple(tokens for tokens, _ in found),
        tuple(ratio for _, ratio in found),
        "line",
        colour="text",
        dash="dashdot",
    )


def _ratios(init: str, curves: list[Curve], shift: float, y_limits: Pair) -> list[Series]:
    style = look(_order(init)[0])
    series = []
    for edge in (False, True):
        held = [c for c in curves if (c["optimum"]["status"] in EDGES) == edge]
        if not held:
            continue
        series.append(
            Series(
                f"{init}, bound" if edge else init,
                tuple(shift * _tokens_per_parameter(curve) for curve in held),
                tuple(curve["optimum"]["ratio"] for curve in held),
                colour=style.colour,
                marker=style.marker + ("-open" if edge else ""),
                size=10,
                y_interval=tuple(
                    closed(curve["optimum"].get("ratio_interval"), y_limits) for curve in held
                ),
                hover=tuple(_ratio_text(curve) for curve in held),
                group=init,
            )
        )
    inset = (y_limits[1] / y_limits[0]) ** 0.025
    for curve in curves:
        for end, place in zip((0, 1), (y_limits[0] * inset, y_limits[1] / inset), strict=True):
            interval = curve["optimum"].get("ratio_interval")
            if interval and interval[end] is None:
                series.append(
                    Series(
                        OPEN_END,
                        (shift * _tokens_per_parameter(curve),),
                        (place,),
                        colour=style.colour,
                        marker="triangle" if end else "triangle-down",
                        size=9,
                        group=init,
                        shared=True,
                    )
                )
    return series


def _ratio_text(curve: Curve) -> str:
    return (
        f"{curve['init']}, {student_name(curve['student_size'])}, {words.size(curve['tokens'])} "
        f"tokens<br>{optimum_text(curve)}"
    )
