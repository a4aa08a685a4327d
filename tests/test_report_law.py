"""The pictures of the law say what the law says."""

import math
from pathlib import Path
from typing import Any

import pytest

from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.law.law import Curve, Law, Optimum
from capgap.report.charts import (
    OWN_GRID,
    THEIR_GRID,
    contrast_chart,
    cost_chart,
    curve_chart,
    law_chart,
    ratio_chart,
)
from capgap.report.draw import STAR, Absent, Picture, spec_of
from capgap.report.results import Results, answer_tables
from law_surface import ladder, sweep
from report_data import rows_of

STUDENTS = (30_000, 50_000, 80_000, 120_000)


def measured(law: Law) -> Results:
    return Results(folder=Path("."), sweep={}, records=(), law=law, samples={})


@pytest.fixture(scope="module")
def exact() -> Results:
    """Best teachers on T = 2.2 S + 20k, with little noise, and the same with other weights."""
    made = [
        record
        for init in ("fixed", "pruned")
        for record in sweep(
            STUDENTS,
            lambda s: ladder(1.1 * s, 1.5, 7),
            lambda s: 2.2 * s + 20_000,
            seed_noise=0.001,
            init=init,
        )
    ]
    records = list({record.id: record for record in made}.values())
    return measured(fit(cells_of(records), draws=200))


@pytest.fixture(scope="module")
def fixed(exact: Results) -> Any:
    return next(line for line in exact.law.lines if line.group.init == "fixed")


def picture_of(found: Any) -> Picture:
    assert isinstance(found, Picture), found
    return found


def changed(results: Results, **optimum: Any) -> Results:
    """The same with other optima."""
    curves: tuple[Curve, ...] = tuple(
        curve.model_copy(update={"optimum": curve.optimum.model_copy(update=optimum)})
        for curve in results.law.curves
    )
    return measured(results.law.model_copy(update={"curves": curves}))


def test_curves_hold_losses_fit_and_optimum_of_the_law(exact: Results, fixed: Any) -> None:
    picture = picture_of(curve_chart(exact, fixed.group))
    for curve in exact.law.of(fixed.group):
        key = f"{curve.student_size // 1000}k student"
        own = [row for row in rows_of(picture, "point") if row["key"] == key]
        places = [(row["x"], row["y"]) for row in own if row["style"].get("shape") != STAR]
        expected = [(point.teacher_parameters, point.loss) for point in curve.points]
        assert places == [pytest.approx(place, rel=1e-5) for place in expected]
        assert curve.fit is not None
        line = [row for row in rows_of(picture, "line") if row["key"] == key]
        assert [row["y"] for row in line] == pytest.approx(curve.fit.loss[::3], rel=1e-5)
        band = [row for row in rows_of(picture, "area") if row["key"] == key]
        assert [row["low"] for row in band] == pytest.approx(curve.fit.low[::3], rel=1e-5)
        (star,) = [row for row in own if row["style"].get("shape") == STAR]
        assert star["x"] == pytest.approx(curve.optimum.teacher_parameters, rel=1e-5)
        assert star["style"].get("filled") == (True if curve.optimum.status == "interior" else None)
        (span,) = [r for r in rows_of(picture, "rule") if r["key"] == key and "left" in r]
        assert (span["left"], span["right"]) == pytest.approx(curve.optimum.interval, rel=1e-5)


def test_students_are_told_apart_without_colour(exact: Results, fixed: Any) -> None:
    spec = spec_of(picture_of(curve_chart(exact, fixed.group)))
    scales = [one["encoding"]["shape"] for one in spec["layer"] if "shape" in one["encoding"]]
    shapes = scales[0]["scale"]["range"]
    assert len(set(shapes)) == len(STUDENTS)
    dashes = [one["mark"]["strokeDash"] for one in spec["layer"] if one["mark"]["type"] == "line"]
    assert len({tuple(dash) for dash in dashes}) == len(STUDENTS)


def test_costs_are_the_laws_and_worse_teachers_are_hollow(exact: Results, fixed: Any) -> None:
    picture = picture_of(cost_chart(exact, fixed.group))
    rows = rows_of(picture, "point")
    points = [(curve, point) for curve in exact.law.of(fixed.group) for point in curve.points]
    for filled in (True, False):
        held = [row["y"] for row in rows if bool(row["style"].get("filled")) == filled]
        told = [point.cost for _, point in points if point.worse != filled]
        assert sorted(held) == pytest.approx(sorted(told), rel=1e-5)
        assert held
    (bar, *_) = rows_of(picture, "rule")
    assert bar["high"] - bar["low"] == pytest.approx(2 * points[0][1].cost_stderr, rel=1e-3)


def test_the_law_shows_optima_resolution_line_and_what_is_published(
    exact: Results, fixed: Any
) -> None:
    picture = picture_of(law_chart(exact, fixed))
    marks = {row["x"]: row["y"] for row in rows_of(picture, "point")}
    bars = {row["x"]: row for row in rows_of(picture, "rule") if row["key"] == OWN_GRID}
    for curve in exact.law.of(fixed.group):
        size = curve.student_parameters
        assert marks[size] == pytest.approx(curve.optimum.teacher_parameters, rel=1e-5)
        assert (bars[size]["low"], bars[size]["high"]) == curve.optimum.neighbours
    lines = rows_of(picture, "line")
    assert fixed.is_identified
    drawn = [row["y"] for row in lines if row["key"].startswith("fitted line")]
    assert drawn == pytest.approx(fixed.band.mid, rel=1e-5)
    published = [row for row in lines if row["key"].startswith("published slope 2.498")]
    assert all(row["y"] == pytest.approx(2.498 * row["x"], rel=1e-4) for row in published)
    wedge = [row for row in rows_of(picture, "area") if row["key"] == THEIR_GRID]
    assert all(row["high"] / row["low"] == pytest.approx(5 / 3, rel=1e-4) for row in wedge)


def test_a_line_that_is_refused_is_not_drawn_and_said(exact: Results, fixed: Any) -> None:
    picture = picture_of(law_chart(exact, fixed.model_copy(update={"refused": "too_wide"})))
    assert not [row for row in rows_of(picture, "line") if row["key"].startswith("fitted")]
    assert picture.notes[0].startswith("No line is fitted")


def test_the_published_line_is_whole_at_its_own_sizes(exact: Results, fixed: Any) -> None:
    factor = 10_000
    curves = [
        curve.model_copy(
            update={
                "student_parameters": curve.student_parameters * factor,
                "points": tuple(
                    p.model_copy(update={"teacher_parameters": p.teacher_parameters * factor})
                    for p in curve.points
                ),
            }
        )
        for curve in exact.law.curves
    ]
    large = measured(exact.law.model_copy(update={"curves": tuple(curves)}))
    lines = rows_of(picture_of(law_chart(large, fixed)), "line")
    one = next(row for row in lines if row["key"].startswith("published T"))
    assert one["y"] == pytest.approx(2.498 * one["x"] - 11_498_000, rel=1e-4)


def test_an_open_interval_goes_to_the_edge_with_an_arrow(exact: Results, fixed: Any) -> None:
    end = {"status": "largest", "teacher_parameters": 2e5, "interval": (1e5, None)}
    edge = changed(exact, **end, ratio=4.0, ratio_interval=(2.0, None))
    for picture in (picture_of(law_chart(edge, fixed)), picture_of(ratio_chart(edge, "llama"))):
        rows = rows_of(picture, "point")
        arrows = [row for row in rows if row["style"].get("shape") == "triangle-up"]
        others = [row for row in rows if "shape" not in row["style"]]
        assert len(arrows) == len(others) >= len(STUDENTS)
        assert not any(row["style"].get("filled") for row in others)
        limits = spec_of(picture)["layer"][0]["encoding"]["y"]["scale"]["domain"]
        bars = [row for row in rows_of(picture, "rule") if row["key"] != OWN_GRID]
        assert all(row["high"] > limits[1] for row in bars)
    curves = rows_of(picture_of(curve_chart(edge, fixed.group)), "point")
    stars = [row for row in curves if row["style"].get("shape") == STAR]
    assert stars
    assert not any(row["style"].get("filled") for row in stars)
    notes = picture_of(curve_chart(edge, fixed.group)).notes
    assert any("largest teacher cannot be told from the best" in note for note in notes)


def test_ratios_stand_over_tokens_per_parameter(exact: Results) -> None:
    rows = rows_of(picture_of(ratio_chart(exact, "llama")), "point")
    found = {(row["key"], row["y"]) for row in rows}
    for curve in exact.law.curves:
        ratio = float(f"{curve.optimum.ratio:.6g}")
        assert (curve.init, ratio) in found
        place = next(row["x"] for row in rows if (row["key"], row["y"]) == (curve.init, ratio))
        assert place == pytest.approx(curve.tokens / curve.student_parameters, rel=0.04)


def test_contrasts_are_the_laws_for_a_teacher_twice_as_large(exact: Results) -> None:
    picture = picture_of(contrast_chart(exact, "llama"))
    rows = [row for row in rows_of(picture, "rule") if "left" in row]
    marks = {row["y"]: row for row in rows_of(picture, "point")}
    assert len(rows) == len(exact.law.contrasts) == len(marks) > 0
    for row, contrast in zip(rows, exact.law.contrasts, strict=True):
        slope, mark = contrast.slope, marks[row["y"]]
        expected = [math.log(2) * end for end in (slope.low, slope.value, slope.high)]
        assert [row["left"], mark["x"], row["right"]] == pytest.approx(expected, rel=1e-4)
        assert bool(mark["style"].get("filled")) == contrast.is_told
    assert "larger teachers for the first" in str(spec_of(picture))


def test_what_the_law_does_not_know_is_a_sentence(exact: Results, fixed: Any) -> None:
    flat = changed(
        exact,
        status="flat",
        teacher_parameters=None,
        interval=None,
        ratio=None,
        ratio_interval=None,
    )
    assert isinstance(law_chart(flat, fixed), Absent)
    assert isinstance(ratio_chart(flat, "llama"), Absent)
    nothing = measured(exact.law.model_copy(update={"curves": (), "contrasts": ()}))
    alone = fixed.group.model_copy(update={"curves": ()})
    for absent in (cost_chart(nothing, alone), contrast_chart(nothing, "llama")):
        assert isinstance(absent, Absent)
        assert absent.reason.endswith(".")
    # without a best teacher there is no star, and the curve is still there
    assert rows_of(picture_of(curve_chart(flat, fixed.group)), "line")


def test_the_answers_table_has_the_teachers_that_will_do(exact: Results, fixed: Any) -> None:
    table = next(one for one in answer_tables(exact) if one.title == str(fixed.group))
    for row, curve in zip(table.rows, exact.law.of(fixed.group), strict=True):
        held = [point.teacher_parameters for point in curve.will_do]
        first = row[1].split(" to ")[0].split(",")[0].removeprefix("all: ")
        assert first == f"{min(held) / 1000:.3g}k"
        worst = max(point.cost or 0 for point in curve.points if point.worse)
        assert row[2].endswith(f"{worst:.3f}")
    assert isinstance(exact.law.curves[0].optimum, Optimum)
