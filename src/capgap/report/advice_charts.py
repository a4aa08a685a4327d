"""Advice as a picture: published models as teachers of one student."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from capgap.law.families import published_families
from capgap.law.recommend import candidates_of, recommend
from capgap.law.rules import PUBLISHED_RULE, SurfaceRule
from capgap.report import words
from capgap.report.charts import LOSS_UNIT, SIZE_UNIT
from capgap.report.figures import Axis, Chart, Pair, Series, count_ticks, span, steps
from capgap.report.labels import place_labels
from capgap.report.static import write_picture
from capgap.report.style import OPEN
from capgap.sizes import format_percent

# with more models than this, only families are named
MOST_LABELS = 14
STEPS = 80
# share above the lowest loss from which models stand on the upper edge: one whose teacher is far
# too small would flatten all others
WORST = 0.1
# the student of arXiv 2311.07052: MiniMA-3B
EXAMPLE = (3_000_000_000, 126_000_000_000)
MARKERS = ("circle", "square", "diamond", "triangle", "cross", "pentagon", "triangle-down", "plus")
COLOURS = 6


def advice_chart(
    found: Mapping[str, Any],
    *,
    surface: SurfaceRule | None = None,
    name: str = "advice",
    title: str = "",
) -> Chart:
    """What `capgap.law.recommend.recommend` has found by a surface, by default the published one:
    every candidate at its size and the student's expected loss, with the surface's error, its
    valley, and the linear law's T*."""
    surface = surface or PUBLISHED_RULE
    student, tokens = found["student"], found["tokens"]
    rows = sorted(found["recommendations"], key=lambda row: row["non_embedding"])
    best = surface.surface.best_teacher(student, tokens, teacher_tokens=surface.teacher_tokens)
    line, error = found["linear_law"], found["surface"]["error"]
    sizes = [row["non_embedding"] for row in rows]
    limits = span(
        [*sizes, *line["interval"], min(best.ratio * student, 4 * max(sizes))], margin=1.6
    )
    losses = [row["expected_loss"] for row in rows]
    curve_x, curve_y = _on_the_surface(surface, student, tokens, limits)
    lowest = min(*losses, min(curve_y))
    edge = (1 + WORST) * lowest
    # a surface that fits to the last digit still wants room below its lowest point
    low = lowest * (1 - 1.6 * max(error, 0.002))
    high = min(max(*losses, lowest * (1 + 2 * error)) * (1 + 1.2 * error), edge * (1 + error))
    x = Axis("teacher size", SIZE_UNIT, True, limits, count_ticks(limits))
    y = Axis("expected student loss", LOSS_UNIT, limits=(low, high))
    near = [(a, b) for a, b in zip(curve_x, curve_y, strict=True) if b <= high * (1 + error)]
    series = [
        *_linear_law(line, (low, high)),
        Series(
            f"surface, {surface.teacher_tokens_name}",
            tuple(a for a, _ in near),
            tuple(b for _, b in near),
            "line",
            colour="text",
        ),
        Series(
            f"its error of {format_percent(error)}",
            tuple(a for a, _ in near),
            tuple(b * (1 - error) for _, b in near),
            "band",
            colour="band",
            y_high=tuple(b * (1 + error) for _, b in near),
        ),
    ]
    if max(losses) > edge:
        series.append(
            Series(
                f"{WORST:.0%} above the lowest, or more",
                limits,
                (edge, edge),
                "line",
                colour="muted",
                dash="dot",
                width=1.5,
                shared=True,
            )
        )
    cautions = {"linear law": line["caution"], "surface": found["surface"]["caution"]}
    notes = [f"The {source} was {caution}." for source, caution in cautions.items() if caution]
    if limits[0] <= best.ratio * student <= limits[1]:
        series.append(_valley(best.ratio * student, best.loss))
    else:
        notes.append(
            "The best teacher on the surface is outside of the picture: "
            f"{words.rough_size(best.ratio * student)}."
        )
    series += _families(rows, x, y, edge, [one for one in series if one.kind == "line"])
    return Chart(
        name,
        title or f"Teachers of a {words.size(student)} student, {words.size(tokens)} tokens",
        "Lower is better, but models within the band cannot be told apart by the surface: among "
        "them the linear law decides. Models below the curve have read more than the "
        f"curve's ({surface.teacher_tokens_name}). Losses are those of the surface's own text: "
        "their differences count.",
        x,
        y,
        tuple(series),
        tuple(notes),
    )


def draw_advice(
    found: Mapping[str, Any], path: Path, *, surface: SurfaceRule | None = None
) -> Path:
    """Draw the advice into one file, .png or .svg; UserError where there is none to write."""
    return write_picture(advice_chart(found, surface=surface), path)


def _on_the_surface(
    rule: SurfaceRule, student: float, tokens: float, limits: Pair
) -> tuple[list[float], list[float]]:
    """The student's loss over teachers that have read what the surface takes them to."""
    sizes = np.array(steps(limits, STEPS))
    taught = rule.surface.supervised.loss(sizes, rule.teacher_tokens.of(sizes))
    return sizes.tolist(), rule.surface.loss(student, tokens, taught).tolist()


def _linear_law(line: Mapping[str, Any], limits: Pair) -> list[Series]:
    """T* as an upright line, and the interval that its source leaves."""
    (low, high), (bottom, top) = line["interval"], limits
    best = line["teacher"]
    return [
        Series(
            f"linear law: T* = {words.size(best)}",
            (best, best),
            limits,
            "line",
            colour="muted",
            dash="dash",
            hover=(f"T* = {words.size(best)}<br>{line['source']}",) * 2,
        ),
        Series(
            f"its interval: {words.size(low)} to {words.size(high)}",
            (low, high),
            (bottom, bottom),
            "band",
            colour="published",
            y_high=(top, top),
            hatch=True,
        ),
    ]


def _valley(size: float, loss: float) -> Series:
    return Series(
        f"lowest on the surface: {words.rough_size(size)}",
        (size,),
        (loss,),
        colour="text",
        marker="star",
        size=14,
        hover=(f"best teacher on it {words.rough_size(size)}<br>loss {loss:.3f}",),
    )


@cache
def _family_of() -> dict[str, tuple[int, str]]:
    """Name of a model -> position and title of its family."""
    return {
        model.name: (position, family.title)
        for position, family in enumerate(published_families().values())
        for model in family.models
    }


def _families(
    rows: list[dict[str, Any]], x: Axis, y: Axis, edge: float, lines: list[Series]
) -> list[Series]:
    """One series for every family: its own marker, the same in every picture. What lies above
    `edge` stands on it."""
    places = [(float(row["non_embedding"]), min(row["expected_loss"], edge)) for row in rows]
    texts = [
        row["teacher"] + (f" ({row['expected_loss']:.2f})" if row["expected_loss"] > edge else "")
        for row in rows
    ]
    sides: tuple[str, ...] = ()
    if len(rows) <= MOST_LABELS:
        sides = place_labels(places, texts, x, y, lines=[(line.x, line.y) for line in lines])
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        # after all families: what belongs to none
        groups[_family_of().get(row["teacher"], (len(_family_of()), "your teachers"))].append(index)
    series = []
    for (position, title), held in sorted(groups.items()):
        own = position == len(_family_of())
        hollow = position >= len(MARKERS)
        series.append(
            Series(
                title,
                tuple(places[i][0] for i in held),
                tuple(places[i][1] for i in held),
                colour="series-1" if own else f"series-{position % COLOURS}",
                marker="hexagon"
                if own
                else MARKERS[position % len(MARKERS)] + (OPEN if hollow else ""),
                size=9,
                hover=tuple(_model_text(rows[i]) for i in held),
                labels=tuple(texts[i] for i in held) if sides else (),
                label_at=tuple(sides[i] for i in held) if sides else (),
            )
        )
    return series


def _model_text(row: Mapping[str, Any]) -> str:
    read = row["teacher_tokens"]
    return (
        f"{row['teacher']}: {words.size(row['non_embedding'])}, T/S {row['ratio']:.2f}<br>"
        f"expected loss {row['expected_loss']:.3f}, {row['margin']:.1%} above the lowest<br>"
        + (f"read {words.size(read)} tokens" if read else "its tokens are not published")
    )


def families_chart() -> Chart:
    """Every member of every published family as the teacher of MiniMA-3B."""
    student, tokens = EXAMPLE
    models = [m.name for family in published_families().values() for m in family.models]
    return advice_chart(
        recommend(student, tokens, candidates_of(None, models)),
        name="families-published",
        title=f"Published families as teachers: {words.size(student)} student, "
        f"{words.size(tokens)} tokens",
    )
