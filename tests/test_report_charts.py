"""What the figures show, against numbers computed another way."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from capgap.law.cells import Kind
from capgap.report import words
from capgap.report.charts import curve_chart, gain_map, teacher_chart
from capgap.report.compute import compute_chart, flops_of, pareto_front
from capgap.report.data import Results, best_and_largest, load_results
from capgap.report.figures import Absent, Chart, HeatMap, count_ticks, size_ticks
from capgap.report.interactive import to_plotly
from capgap.report.law_charts import law_chart
from capgap.report.sections import report_sections
from capgap.report.training import block_means, cross_entropy_chart, kl_chart, linear_ticks
from report_data import BEST_RATIO, STUDENTS, TEACHERS, Plan, write_output

LLAMA = Kind("llama", "pruned", 400_000)
FAILED = "llama-s70k-t250k-pruned-400k-seed0"
MISSING = "llama-s40k-t160k-pruned-400k-seed0"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Results:
    plan = Plan(failed=(FAILED,), missing=(MISSING,))
    return load_results(write_output(tmp_path_factory.mktemp("full"), plan))


def test_pareto_front_is_what_brute_force_finds() -> None:
    rng = random.Random(3)
    for _ in range(50):
        points = [(float(rng.randint(1, 9)), float(rng.randint(1, 9))) for _ in range(12)]
        best = sorted(
            {
                (cost, loss)
                for cost, loss in points
                if not any(c <= cost and v <= loss and (c, v) != (cost, loss) for c, v in points)
            }
        )
        assert pareto_front(points) == best


def test_gains_are_baseline_minus_cell_and_missing_cells_stay_missing(full: Results) -> None:
    chart = gain_map(full, LLAMA)
    assert isinstance(chart, HeatMap)
    losses = {r.id: r.heldout.loss for r in full.records if r.heldout}
    for (row, student), (column, teacher) in itertools.product(
        enumerate(STUDENTS), enumerate(TEACHERS)
    ):
        name = f"llama-s{student // 1000}k-t{teacher // 1000}k-pruned-400k-seed0"
        value = chart.values[row][column]
        if name in losses:
            assert value == pytest.approx(losses[f"{name}-ce"] - losses[name], abs=1e-9)
            assert chart.texts[row][column] == words.gain(value)
        else:
            assert value is None
            assert chart.texts[row][column] == ("failed" if name == FAILED else "not run")


def test_a_cell_without_its_baseline_says_so(tmp_path: Path) -> None:
    chart = gain_map(load_results(write_output(tmp_path, Plan(baselines="ends"))), LLAMA)
    assert isinstance(chart, HeatMap)
    assert chart.texts[0][1:-1] == ("no baseline",) * (len(TEACHERS) - 2)
    assert chart.values[0][0] is not None


def test_curves_hold_the_recorded_losses_and_the_optimum_is_the_planted_one(full: Results) -> None:
    chart = curve_chart(full, LLAMA)
    assert isinstance(chart, Chart)
    points = {s.name: s for s in chart.series if s.name.endswith("student")}
    assert list(points) == ["40k student", "70k student", "120k student"]
    cells = [r for r in full.records if r.kind == "cell" and r.student_size == 120_000]
    assert sorted(points["120k student"].y) == pytest.approx(
        sorted(r.heldout.loss for r in cells if r.heldout)
    )
    stars = [s for s in chart.series if s.marker == "star"]
    assert [s.in_legend for s in stars] == [True] + [False] * (len(stars) - 1)
    for star, student in zip(stars, STUDENTS, strict=True):
        assert star.x[0] == pytest.approx(BEST_RATIO * student, rel=0.15)
        interval = star.x_interval[0]
        assert interval is not None
        assert interval[0] < star.x[0] < interval[1]


def test_relative_curves_start_at_zero(full: Results) -> None:
    chart = curve_chart(full, LLAMA, relative=True)
    assert isinstance(chart, Chart)
    for series in chart.series:
        if series.name.endswith("student"):
            assert min(series.y) == 0


def test_the_fit_line_is_the_smooth_curve_of_the_law(full: Results) -> None:
    chart = curve_chart(full, LLAMA)
    assert isinstance(chart, Chart)
    line = next(s for s in chart.series if s.name == "fit")
    fit = full.law["curves"][0]["fit"]
    assert line.x == tuple(fit["teacher_parameters"])
    assert line.y == tuple(fit["loss"])


def test_the_published_line_keeps_its_slope_where_its_intercept_cannot_be_drawn(
    full: Results,
) -> None:
    chart = law_chart(full, LLAMA)
    assert isinstance(chart, Chart)
    line = next(s for s in chart.series if s.name.startswith("Zhang"))
    assert line.y[0] / line.x[0] == pytest.approx(2.498)
    assert any("-11.5M" in note for note in chart.notes)
    levels = {s.y[0] for s in chart.series if s.name == "teachers of the grid"}
    assert levels == set(TEACHERS)


def test_the_published_line_is_drawn_whole_at_its_own_sizes(full: Results) -> None:
    factor = 10_000
    curves = [
        c
        | {
            "student_parameters": c["student_parameters"] * factor,
            "points": [
                p | {"teacher_parameters": p["teacher_parameters"] * factor} for p in c["points"]
            ],
            "optimum": c["optimum"]
            | {
                "teacher_parameters": c["optimum"]["teacher_parameters"] * factor,
                "interval": [end * factor for end in c["optimum"]["interval"]],
            },
        }
        for c in full.law["curves"]
    ]
    large = replace(full, law={**full.law, "curves": curves, "laws": []})
    chart = law_chart(large, LLAMA)
    assert isinstance(chart, Chart)
    line = next(s for s in chart.series if s.name.startswith("Zhang"))
    assert line.y[5] == pytest.approx(2.498 * line.x[5] - 11_498_000)


def _with_optimum(results: Results, **optimum: Any) -> Results:
    curves = [c | {"optimum": c["optimum"] | optimum} for c in results.law["curves"]]
    return replace(results, law={**results.law, "curves": curves})


def test_an_open_interval_reaches_the_limit_of_the_axis(full: Results) -> None:
    open_above = _with_optimum(full, status="largest", teacher_parameters=5e5, interval=[3e5, None])
    chart = law_chart(open_above, LLAMA)
    assert isinstance(chart, Chart)
    marks = [s for s in chart.series if s.marker == "triangle-open"]
    assert len(marks) == len(STUDENTS)
    assert chart.y.limits is not None
    assert all(mark.y_interval == ((3e5, chart.y.limits[1]),) for mark in marks)
    assert any("largest teacher cannot be told" in note for note in chart.notes)
    curves = curve_chart(open_above, LLAMA)
    assert isinstance(curves, Chart)
    assert not [s for s in curves.series if s.marker == "star"]


def test_a_law_without_an_optimum_is_a_sentence(full: Results) -> None:
    flat = _with_optimum(full, status="flat", teacher_parameters=None, interval=None)
    assert isinstance(law_chart(flat, LLAMA), Absent)


def test_compute_leaves_the_teacher_out_where_it_is_given(full: Results) -> None:
    cell = next(r for r in full.records if r.kind == "cell")
    parts = cell.flops
    assert parts.student
    assert parts.evaluation
    assert parts.teacher_forward
    assert flops_of(cell, teacher_training=False) == (
        parts.student + parts.evaluation + parts.teacher_forward
    )
    whole = compute_chart(full, "llama", teacher_training=True)
    given = compute_chart(full, "llama", teacher_training=False)
    assert isinstance(whole, Chart)
    assert isinstance(given, Chart)
    assert "teachers" in {s.name for s in whole.series}
    assert "teachers" not in {s.name for s in given.series}


def test_seeds_are_one_point_of_compute_and_one_line_of_teachers_each(tmp_path: Path) -> None:
    plan = Plan(seeds=(0, 1), students=(40_000,), law=False)
    results = load_results(write_output(tmp_path, plan))
    chart = compute_chart(results, "llama", teacher_training=True)
    assert isinstance(chart, Chart)
    points = next(s for s in chart.series if s.name == "40k student")
    assert len(points.x) == len(TEACHERS)
    teachers = teacher_chart(results, "llama")
    assert isinstance(teachers, Chart)
    assert [s.name for s in teachers.series if s.kind == "points"] == ["seed 0", "seed 1"]


def test_training_curves_are_of_the_best_and_the_largest_teacher(full: Results) -> None:
    for ends in best_and_largest(full, LLAMA):
        cells = [
            r
            for r in full.records
            if r.kind == "cell" and r.student_size == ends.student_size and r.heldout
        ]
        assert ends.best == min(cells, key=lambda r: r.heldout.loss if r.heldout else 9)
        assert ends.largest.teacher_size == max(TEACHERS)
    kl, ce = kl_chart(full, LLAMA), cross_entropy_chart(full, LLAMA)
    assert isinstance(kl, Chart)
    assert isinstance(ce, Chart)
    assert len(kl.series) == len(ce.series) == 2 * len(STUDENTS)


def test_block_means_keep_the_mean_and_skip_what_is_missing() -> None:
    values = [float(i) for i in range(240)]
    means = block_means(values, values, most=60)
    assert len(means) == 60
    assert sum(y for _, y in means) / 60 == pytest.approx(sum(values) / 240)
    assert block_means([1.0, 2.0, 3.0], [1.0, None, math.nan]) == [(1.0, 1.0)]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(students=(40_000,), teachers=TEACHERS[:2], finished=False, samples=False),
        Plan(students=(40_000,), teachers=TEACHERS[:1], baselines="none"),
        Plan(teachers=(), law=False, samples=False),
        # only the teachers have been trained
        Plan(architectures=("gpt2", "llama"), tokens=(), samples=False),
        Plan(inits=("fixed", "scratch"), tokens=(200_000, 400_000), students=(40_000,)),
    ],
)
def test_every_figure_of_a_partial_sweep_is_valid_for_plotly(tmp_path: Path, plan: Plan) -> None:
    results = load_results(write_output(tmp_path, plan))
    figures = [figure for section in report_sections(results) for figure in section.figures]
    assert len({figure.name for figure in figures}) == len(figures)
    for figure in figures:
        if isinstance(figure, Absent):
            assert figure.reason.endswith(".")
            continue
        described = to_plotly(figure)
        json.dumps(described, allow_nan=False)
        # colours are names until the page puts them in: plotly checks all the rest
        plotly.graph_objects.Figure(_coloured(described))


def _coloured(value: Any) -> Any:
    """The figure with one real colour in the place of every colour name."""
    if isinstance(value, str):
        return "#123456" if value.startswith("@") else value
    if isinstance(value, list):
        return [_coloured(item) for item in value]
    if isinstance(value, dict):
        return {key: _coloured(item) for key, item in value.items()}
    return value


def test_ticks_are_inside_and_readable() -> None:
    assert [text for _, text in count_ticks((5e4, 8e5))] == ["50k", "100k", "200k", "500k"]
    assert [text for _, text in size_ticks([1e5, 1.01e5, 1e6], (9e4, 1.1e6))] == [
        "100k",
        "200k",
        "500k",
        "1M",
    ]
    assert [text for _, text in linear_ticks(399_360)] == ["0", "100k", "200k", "300k", "400k"]


def test_numbers_are_rounded_to_what_their_interval_allows() -> None:
    assert words.with_interval(1.9234, (1.512, 2.389)) == "1.9 (1.5 to 2.4)"
    assert words.with_interval(2.4981, (2.466, 2.531)) == "2.50 (2.47 to 2.53)"
    assert words.with_interval(8.5, (2.07, None)) == "at least 2.1"
    assert words.size_with_interval(95_432, (71_900, 131_000)) == "95k (72k to 130k)"
    assert words.size_with_interval(95_432, (None, 131_000)) == "at most 130k"
    assert words.between(60_000, (None, 100_000)) == "60k (up to 100k)"
    assert words.power(1.24e15) == "1.2\u00d710\u00b9\u2075"
    assert words.duration(4325) == "1 h 12 min"


def test_chains_have_a_mark_of_their_own_in_the_chart_of_compute(tmp_path: Path) -> None:
    results = load_results(write_output(tmp_path, Plan(inits=("pruned", "chain"))))
    chart = compute_chart(results, "llama", teacher_training=False)
    assert isinstance(chart, Chart)
    marks = {one.name: one.marker for one in chart.series if one.name.startswith("40k student")}
    assert set(marks) == {"40k student", "40k student, through an assistant"}
    assert len(set(marks.values())) == 2
    counts = {one.name: len(one.x) for one in chart.series}
    assert counts["40k student"] == counts["40k student, through an assistant"] > 1
