"""How a search came to its choice, from search.json. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from capgap.report import words
from capgap.report.charts import LOSS_UNIT, legend_once
from capgap.report.data import Results
from capgap.report.figures import Absent, Axis, Chart, Figure, Series
from capgap.report.style import look

ENDED = {
    "safe": "It ended because every choice is safe.",
    "budget": "It ended because nothing more fits into the budget.",
    "exhausted": "It ended because every run of the grid was made.",
    None: "It has not ended.",
}

Choice = tuple[float, Mapping[str, Any]]


def search_chart(results: Results) -> Figure:
    """The expected loss of each student's choice so far, above its last value, by FLOPs spent."""
    name, title = "search", "How the search came to its choice"
    search = results.search
    choices: dict[int, list[Choice]] = defaultdict(list)
    for step in search.get("steps", ()):
        for choice in step["choices"]:
            if choice["loss"] is not None:
                choices[choice["student_size"]].append((100 * step["spent_fraction"], choice))
    if not choices:
        reason = "The search has not finished a round yet." if search else "No search was made."
        return Absent(name, title, reason)
    budget = 100 * search["budget"]
    last = max(spent for held in choices.values() for spent, _ in held)
    right = 1.06 * max(budget, last)
    series: list[Series] = []
    for position, student in enumerate(sorted(choices)):
        # bars of one round would hide one another
        shift = 0.008 * right * (position - (len(choices) - 1) / 2)
        series += _trace(student, choices[student], position, shift)
    heights = [height for one in series for height in one.y]
    low, high = min(heights), max(heights)
    # the first rounds know next to nothing, and their bars would leave no room for the rest
    room = 0.5 * (high - low) or 0.01
    limits = (low - room, high + room)
    series = [_within(one, limits) for one in series]
    series.append(
        Series(
            f"budget: {budget:.3g}% of the whole grid",
            (budget, budget),
            limits,
            "line",
            colour="muted",
            dash="dash",
            shared=True,
        )
    )
    return Chart(
        name,
        title,
        "What was expected of the chosen teacher after every round, against what is expected of "
        "the last choice: a line that has settled early would have been as good for less. Hollow "
        "marks are rounds that changed the teacher.",
        Axis("spent", "% of the FLOPs of the whole grid", limits=(0.0, right)),
        Axis("loss above the last choice's", LOSS_UNIT, limits=limits),
        tuple(legend_once(series)),
        (f"Strategy: {search['strategy']}. {ENDED[search.get('stop')]}",),
    )


def _trace(student: int, choices: Sequence[Choice], position: int, shift: float) -> list[Series]:
    """The stepped line of one student, its rounds, and those that changed the teacher."""
    style, group = look(position), f"student-{student}"
    end = choices[-1][1]["loss"]
    places = [spent + shift for spent, _ in choices]
    heights = [choice["loss"] - end for _, choice in choices]
    # a choice holds until the next round
    corners = []
    for place, height, after in zip(places, heights, [*places[1:], places[-1]], strict=True):
        corners += [(place, height), (after, height)]
    series = [
        Series(
            "line",
            tuple(x for x, _ in corners),
            tuple(y for _, y in corners),
            "line",
            colour=style.colour,
            dash=style.dash,
            width=1.5,
            group=group,
            in_legend=False,
        )
    ]
    teachers = [choice["teacher_size"] for _, choice in choices]
    before = [None, *teachers[:-1]]
    changed = [old is not None and old != new for old, new in zip(before, teachers, strict=True)]
    for hollow in (False, True):
        held = [i for i in range(len(choices)) if changed[i] == hollow]
        if held:
            series.append(
                Series(
                    "hollow: another teacher" if hollow else f"{words.size(student)} student",
                    tuple(places[i] for i in held),
                    tuple(heights[i] for i in held),
                    colour=style.colour,
                    marker=style.marker + ("-open" if hollow else ""),
                    size=9,
                    y_interval=tuple(_bar(heights[i], choices[i][1]) for i in held),
                    hover=tuple(
                        _round_text(student, choices[i], before[i] if hollow else None)
                        for i in held
                    ),
                    group=group,
                    shared=hollow,
                )
            )
    return series


def _within(one: Series, limits: tuple[float, float]) -> Series:
    """The same with its bars cut off at the axis."""
    low, high = limits
    bars = tuple(bar and (max(bar[0], low), min(bar[1], high)) for bar in one.y_interval)
    return replace(one, y_interval=bars)


def _bar(height: float, choice: Mapping[str, Any]) -> tuple[float, float] | None:
    error = choice.get("loss_stderr")
    return None if error is None else (height - error, height + error)


def _round_text(student: int, choice: Choice, before: int | None) -> str:
    spent, held = choice
    teacher = words.size(held["teacher_size"])
    change = "" if before is None else f" (before: {words.size(before)})"
    return (
        f"{words.size(student)} student, {spent:.3g}% spent<br>teacher {teacher}{change}<br>"
        f"expected loss {words.loss(held['loss'], held.get('loss_stderr'))}"
    )
