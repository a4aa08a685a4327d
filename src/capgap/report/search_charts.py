"""How a search came to its choice, from search.json. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from capgap.report import words
from capgap.report.charts import LOSS_UNIT, legend_once
from capgap.report.data import Results
from capgap.report.figures import Absent, Axis, Chart, Figure, Series
from capgap.report.style import look

Choice = tuple[float, Mapping[str, Any]]


def search_chart(results: Results) -> Figure:
    """The expected loss of each student's choice so far, above its last value, by FLOPs spent."""
    name, title = "search", "How the search came to its choice"
    search = results.search
    choices: dict[int, list[Choice]] = defaultdict(list)
    for one in search.get("rounds", ()):
        for choice in one["choices"]:
            choices[choice["student_parameters"]].append((100 * one["spent"], choice))
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
    heights = [
        end
        for one in series
        for i, middle in enumerate(one.y)
        for end in (middle, *((one.y_interval[i] or ()) if one.y_interval else ()))
    ]
    low, high = min(heights), max(heights)
    room = 0.08 * (high - low) or 0.01
    limits = (low - room, high + room)
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
        (f"Strategy: {search['strategy']}. It stopped because: {search['stopped']}.",),
    )


def _trace(student: int, choices: Sequence[Choice], position: int, shift: float) -> list[Series]:
    """The stepped line of one student, its rounds, and those that changed the teacher."""
    style, group = look(position), f"student-{student}"
    end = choices[-1][1]["expected_loss"]
    places = [spent + shift for spent, _ in choices]
    heights = [choice["expected_loss"] - end for _, choice in choices]
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
    teachers = [choice["teacher_parameters"] for _, choice in choices]
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


def _bar(height: float, choice: Mapping[str, Any]) -> tuple[float, float] | None:
    error = choice.get("stderr")
    return None if error is None else (height - error, height + error)


def _round_text(student: int, choice: Choice, before: int | None) -> str:
    spent, held = choice
    teacher = words.size(held["teacher_parameters"])
    change = "" if before is None else f" (before: {words.size(before)})"
    return (
        f"{words.size(student)} student, {spent:.3g}% spent<br>teacher {teacher}{change}<br>"
        f"expected loss {words.loss(held['expected_loss'], held.get('stderr'))}"
    )
