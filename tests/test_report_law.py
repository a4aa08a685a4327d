"""The pictures of the law: its line, residuals, ratios, surfaces and a search."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.law.cells import Kind
from capgap.law.fit import fit_law
from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.surface import TeacherTokens
from capgap.report.data import Results, load_results
from capgap.report.figures import Absent, Chart, percent_ticks
from capgap.report.interactive import to_plotly
from capgap.report.law_charts import law_chart, residual_chart
from capgap.report.ratio_charts import ratio_chart
from capgap.report.search_charts import search_chart
from capgap.report.static import write_static
from capgap.report.surface_charts import published_surface_chart, surface_chart
from law_surface import ladder, sweep
from report_data import Plan, write_output

FIXED = Kind("llama", "fixed", 400_000)
STUDENTS = (30_000, 50_000, 80_000, 120_000)


def measured(law: dict[str, Any]) -> Results:
    return Results(folder=Path("."), sweep={}, records=(), law=law, samples={})


@pytest.fixture(scope="module")
def exact() -> Results:
    """Best teachers on T = 2.2 S + 20k to the last digit, without noise."""
    records = sweep(STUDENTS, lambda s: ladder(1.1 * s, 1.5, 7), lambda s: 2.2 * s + 20_000)
    return measured(fit_law(records, resamples=200))


@pytest.fixture(scope="module")
def edge() -> Results:
    """The same with a student whose best teacher lies above its grid."""
    records = sweep(STUDENTS, lambda s: ladder(1.1 * s, 1.5, 7), lambda s: 2.2 * s + 20_000)
    above = sweep([200_000], lambda s: ladder(1.1 * s, 1.5, 5), lambda s: 9 * s)
    cells = [record for record in above if record.kind != "teacher"]
    return measured(fit_law([*records, *cells], resamples=200))


def chart_of(figure: Any) -> Chart:
    assert isinstance(figure, Chart), figure
    return figure


def named(chart: Chart, start: str) -> list[Any]:
    return [series for series in chart.series if series.name.startswith(start)]


def test_bars_of_the_grid_reach_from_neighbour_to_neighbour(exact: Results) -> None:
    chart = chart_of(law_chart(exact, FIXED))
    bars = named(chart, "grid resolution")
    assert [bar.in_legend for bar in bars] == [True, False, False, False]
    for bar, student in zip(bars, STUDENTS, strict=True):
        teachers = ladder(1.1 * student, 1.5, 7)
        best = min(teachers, key=lambda t: abs(math.log(t / (2.2 * student + 20_000))))
        at = teachers.index(best)
        assert bar.x == (student, student)
        assert bar.y == (teachers[at - 1], teachers[at + 1])
        mark = next(one for one in chart.series if one.kind == "points" and one.x == (student,))
        assert bar.width > 3 * 2
        assert bar.y[0] < mark.y[0] < bar.y[1]


def test_an_open_bar_of_the_grid_reaches_the_axis(edge: Results) -> None:
    chart = chart_of(law_chart(edge, FIXED))
    bar = named(chart, "grid resolution")[-1]
    assert chart.y.limits is not None
    assert bar.y == (ladder(220_000, 1.5, 5)[-2], chart.y.limits[1])
    assert any("70M to 2.8B; the axes stay on the data" in note for note in chart.notes)


def test_students_on_the_law_have_no_residual(exact: Results) -> None:
    chart = chart_of(residual_chart(exact, FIXED))
    marks = [one for one in chart.series if one.kind == "points"]
    assert [one.x[0] for one in marks] == list(STUDENTS)
    for mark in marks:
        assert mark.y[0] == pytest.approx(0, abs=2e-3)
        low, high = mark.y_interval[0]
        assert low < mark.y[0] < high
    (line,) = named(chart, "the law")
    assert line.y == (0, 0)
    assert chart.y.limits is not None
    assert chart.y.limits[0] == -chart.y.limits[1]


def test_a_residual_is_the_logarithm_of_found_over_law(exact: Results) -> None:
    curves = [
        curve
        | {"optimum": curve["optimum"] | {"teacher_parameters": 110_000.0, "interval": [9e4, 2e5]}}
        for curve in exact.law["curves"][:1]
    ]
    law = exact.law["laws"][0] | {"slope": 2.0, "intercept": 40_000.0}
    moved = measured({**exact.law, "curves": curves, "laws": [law]})
    chart = chart_of(residual_chart(moved, FIXED))
    mark = next(one for one in chart.series if one.kind == "points")
    assert mark.y[0] == pytest.approx(math.log(1.1))
    assert mark.y_interval[0] == pytest.approx((math.log(0.9), math.log(2.0)))


def test_an_edge_is_a_triangle_that_is_open_to_the_axis(edge: Results) -> None:
    chart = chart_of(residual_chart(edge, FIXED))
    (bound,) = named(chart, "open interval")
    assert bound.marker == "triangle-open"
    assert chart.y.limits is not None
    assert bound.y_interval[0][1] == chart.y.limits[1]
    assert any("largest teacher cannot be told" in note for note in chart.notes)


def test_without_a_law_there_are_no_residuals(exact: Results) -> None:
    few = measured(fit_law(sweep([50_000], lambda s: ladder(s, 1.5, 6), lambda s: 2.2 * s)))
    absent = residual_chart(few, FIXED)
    assert isinstance(absent, Absent)
    assert "at least three students" in absent.reason
    assert isinstance(residual_chart(exact, Kind("gpt2", "fixed", 1)), Absent)
    below = exact.law["laws"][0] | {"intercept": -1e9}
    assert isinstance(residual_chart(measured({**exact.law, "laws": [below]}), FIXED), Absent)


@pytest.mark.parametrize("reach", [0.05, 0.1, 0.3, 0.6, 1.2, 3.0, 6.0])
def test_percents_stand_where_their_logarithm_is(reach: float) -> None:
    ticks = percent_ticks((-reach, reach))
    assert 3 <= len(ticks) <= 11
    assert (0.0, "0%") in ticks
    for place, text in ticks:
        percent = float(text.rstrip("%").replace("\u2212", "-"))
        assert math.expm1(place) == pytest.approx(percent / 100)


def test_ratios_stand_at_their_tokens_per_parameter(tmp_path: Path) -> None:
    plan = Plan(inits=("pruned", "scratch"), tokens=(400_000, 1_600_000))
    results = load_results(write_output(tmp_path, plan))
    chart = chart_of(ratio_chart(results, "llama"))
    pruned = [c for c in results.law["curves"] if c["init"] == "pruned"]
    assert {c["optimum"]["status"] for c in pruned} == {"interior"}
    (marks,) = [one for one in chart.series if one.name == "pruned" and one.kind == "points"]
    for i, curve in enumerate(pruned):
        # beside its place, because the other init has the same one
        assert marks.x[i] == pytest.approx(curve["tokens"] / curve["student_parameters"], rel=0.03)
        assert marks.y[i] == curve["optimum"]["ratio"]
        assert marks.y_interval[i] == tuple(curve["optimum"]["ratio_interval"])
    looks = {one.name: one.marker for one in chart.series if one.name in ("pruned", "scratch")}
    assert len(set(looks.values())) == 2
    arrows = named(chart, "open interval")
    ends = [c["optimum"]["ratio_interval"] for c in results.law["curves"] if c["init"] == "scratch"]
    assert len(arrows) == sum(end.count(None) for end in ends) > 0
    assert {arrow.marker for arrow in arrows} == {"triangle-down"}
    (shade,) = named(chart, "its resolution")
    assert (shade.y[0], shade.y_high[0]) == pytest.approx((2.0, 10 / 3))
    (surface,) = named(chart, "surface")
    at = surface.x[7]
    best = PUBLISHED_SURFACE.best_teacher(1e9, at * 1e9)
    assert surface.y[7] == pytest.approx(best.ratio)
    assert chart.y.log
    assert isinstance(ratio_chart(results, "gpt2"), Absent)


def test_the_valley_is_where_each_student_has_its_lowest_loss() -> None:
    students, teachers = (2e8, 1e10), (1e9, 1e12)
    chart = chart_of(
        surface_chart(
            PUBLISHED_SURFACE,
            "surface",
            "a surface",
            students=students,
            teachers=teachers,
            tokens_per_parameter=80,
        )
    )
    (valley,) = named(chart, "valley")
    grid = np.geomspace(*teachers, 3000)
    alone = PUBLISHED_SURFACE.supervised
    taught = alone.loss(grid, alone.compute_optimal_tokens().of(grid))
    step = math.log(grid[1] / grid[0])
    assert len(valley.x) > 50
    for student, teacher in list(zip(valley.x, valley.y, strict=True))[::9]:
        best = grid[PUBLISHED_SURFACE.loss(student, 80 * student, taught).argmin()]
        # best_teacher looks in steps of 0.1%
        assert math.log(teacher / best) == pytest.approx(0, abs=step + 0.0015)
    (line,) = named(chart, "T = 2.5 S")
    assert all(t == pytest.approx(2.5 * s) for s, t in zip(line.x, line.y, strict=True))


def test_contours_are_lines_of_the_loss_they_are_labelled_with() -> None:
    chart = chart_of(published_surface_chart(80))
    lines, texts = named(chart, "equal loss"), named(chart, "labels")
    assert len({text.labels for text in texts}) >= 6
    alone = PUBLISHED_SURFACE.supervised
    for line, text in zip(lines, texts, strict=True):
        student, teacher = np.array(line.x), np.array(line.y)
        taught = alone.loss(teacher, alone.compute_optimal_tokens().of(teacher))
        losses = PUBLISHED_SURFACE.loss(student, 80 * student, taught)
        # between points of the grid the loss is interpolated
        assert losses == pytest.approx(float(text.labels[0]), abs=2e-3)
        assert (text.x[0], text.y[0]) in zip(line.x, line.y, strict=True)


def test_a_surface_of_fixed_tokens_and_teachers_of_given_tokens() -> None:
    common: dict[str, Any] = {"students": (2e8, 1e10), "teachers": (2e8, 1e12)}
    chart = chart_of(
        surface_chart(
            PUBLISHED_SURFACE, "s", "s", tokens=2e11, teacher_tokens=TeacherTokens(50), **common
        )
    )
    (valley,) = named(chart, "valley")
    best = PUBLISHED_SURFACE.best_teacher(valley.x[20], 2e11, teacher_tokens=TeacherTokens(50))
    assert valley.y[20] == pytest.approx(best.ratio * valley.x[20])
    low = {"students": (2e8, 1e10), "teachers": (2e8, 4e8)}
    outside = chart_of(surface_chart(PUBLISHED_SURFACE, "s", "s", tokens=2e11, **low))
    assert "outside of the picture" in outside.notes[0]


SEARCH = {
    "strategy": "halving",
    "budget": 0.35,
    "stop": "safe",
    "steps": [
        {
            "round": number,
            "spent_fraction": spent,
            "choices": [
                {
                    "student_size": student,
                    "teacher_size": teachers[number],
                    "loss": 3.5 + 0.1 * 0.5**number,
                    "loss_stderr": 0.02,
                }
                for student, teachers in ((40_000, (6, 6, 9)), (70_000, (9, 20, 20)))
            ],
        }
        for number, spent in enumerate((0.1, 0.2, 0.3))
    ],
}


def test_a_search_ends_at_zero_and_marks_changes_of_the_teacher(tmp_path: Path) -> None:
    folder = write_output(tmp_path, Plan(students=(40_000,), law=False, samples=False))
    assert isinstance(search_chart(load_results(folder)), Absent)
    (folder / "search.json").write_text(json.dumps(SEARCH))
    chart = chart_of(search_chart(load_results(folder)))
    lines = [one for one in chart.series if one.kind == "line" and one.group]
    assert len(lines) == 2
    assert all(line.y[-1] == 0 for line in lines)
    assert lines[0].y[0] == pytest.approx(0.1 - 0.025)
    assert list(lines[0].x[::2]) == pytest.approx([10, 20, 30], abs=0.3)
    changed = named(chart, "hollow")
    assert [one.y[0] for one in changed] == pytest.approx([0.0, 0.025])
    assert "(before: 6)" in changed[0].hover[0]
    (budget,) = named(chart, "budget")
    assert budget.x == (35, 35)
    begun = replace(load_results(folder), search={**SEARCH, "steps": []})
    assert "not finished a round" in search_chart(begun).reason  # type: ignore[union-attr]


def test_a_real_search_is_drawn(edge: Results) -> None:
    """What a search wrote (docs/results/search.md): the bars of its first rounds are cut off."""
    path = Path(__file__).parents[1] / "docs/results/search/search.json"
    chart = chart_of(search_chart(replace(edge, search=json.loads(path.read_text()))))
    low, high = chart.y.limits or (0.0, 0.0)
    bars = [bar for one in chart.series for bar in one.y_interval if bar is not None]
    assert len(bars) == 3 * 9
    assert all(low <= bar[0] <= bar[1] <= high for bar in bars)
    assert "nothing more fits" in chart.notes[0]


def test_both_renderers_draw_every_picture_of_the_law(edge: Results, tmp_path: Path) -> None:
    searched = replace(edge, search=SEARCH)
    figures = [
        law_chart(edge, FIXED),
        residual_chart(edge, FIXED),
        ratio_chart(edge, "llama"),
        published_surface_chart(20),
        search_chart(searched),
    ]
    for figure in figures:
        chart = chart_of(figure)
        assert chart.x.unit
        assert chart.y.unit
        described = to_plotly(chart)
        json.dumps(described, allow_nan=False)
        drawn = [s for s in chart.series if s.kind != "text"]
        assert len(described["data"]) == len(drawn) + sum(s.kind == "band" for s in drawn)
        for path in write_static(chart, tmp_path):
            assert path.stat().st_size > 8000
    labels = itertools.chain.from_iterable(s.labels for s in chart_of(figures[3]).series)
    notes = to_plotly(chart_of(figures[3]))["layout"]["annotations"]
    assert [note["text"] for note in notes] == list(labels)


def test_students_of_unknown_tokens_have_no_place_among_the_ratios(exact: Results) -> None:
    curves = [curve | {"tokens": 0} for curve in exact.law["curves"]]
    absent = ratio_chart(measured({**exact.law, "curves": curves}), "llama")
    assert isinstance(absent, Absent)
