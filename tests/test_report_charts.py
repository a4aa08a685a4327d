"""What the pictures of records show, against numbers computed another way."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import altair
import pytest

from capgap.report import numbers
from capgap.report.draw import COLOURS, Absent, Picture, round_ticks, size_axis, spec_of
from capgap.report.page import report_sections
from capgap.report.results import Results, load_results
from capgap.report.run_charts import (
    MOST_POINTS,
    block_means,
    compute_chart,
    flops_of,
    gain_map,
    pareto_front,
    search_chart,
    teacher_chart,
    training_chart,
)
from report_data import STUDENTS, TEACHERS, Plan, rows_of, write_output

FAILED = "llama-s70k-t250k-pruned-400k-seed0"
MISSING = "llama-s40k-t160k-pruned-400k-seed0"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Results:
    plan = Plan(failed=(FAILED,), missing=(MISSING,))
    return load_results(write_output(tmp_path_factory.mktemp("full"), plan))


def picture_of(found: Any) -> Picture:
    assert isinstance(found, Picture), found
    return found


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
    picture = picture_of(gain_map(full, full.lines[0].group))
    cells = {(row["y"], row["x"]): row for row in rows_of(picture, "rect")}
    texts = {(row["y"], row["x"]): row["text"] for row in rows_of(picture, "text")}
    losses = {r.id: r.heldout.loss for r in full.records if r.heldout}
    for student, teacher in itertools.product(STUDENTS, TEACHERS):
        name = f"llama-s{student // 1000}k-t{teacher // 1000}k-pruned-400k-seed0"
        place = (numbers.size(student), numbers.size(teacher))
        if name in losses:
            gain = losses[f"{name}-ce"] - losses[name]
            assert cells[place]["gain"] == pytest.approx(gain, rel=1e-5)
            assert texts[place] == numbers.gain(gain)
        else:
            assert place not in cells
            assert texts[place] == ("failed" if name == FAILED else "not run")
    assert "not by the highest number" in picture.caption


def test_a_cell_without_its_baseline_says_so(tmp_path: Path) -> None:
    results = load_results(write_output(tmp_path, Plan(baselines="ends")))
    picture = picture_of(gain_map(results, results.lines[0].group))
    words = [row["text"] for row in rows_of(picture, "text")]
    between = [sum(teacher > student for teacher in TEACHERS) - 2 for student in STUDENTS]
    assert words.count("no baseline") == sum(between)
    none = load_results(write_output(tmp_path / "none", Plan(baselines="none")))
    assert isinstance(gain_map(none, none.lines[0].group), Absent)


def test_compute_leaves_the_teacher_out_where_it_is_given(full: Results) -> None:
    cell = next(r for r in full.records if r.kind == "cell")
    parts = cell.flops
    known = (parts.student or 0) + (parts.evaluation or 0) + (parts.teacher_forward or 0)
    assert flops_of(cell, given=True) == known
    whole = picture_of(compute_chart(full, "llama", given=False))
    given = picture_of(compute_chart(full, "llama", given=True))
    assert {row["key"] for row in rows_of(whole, "point")} >= {"teachers", "40k student"}
    assert "teachers" not in {row["key"] for row in rows_of(given, "point")}
    # distilled students are filled, baselines and teachers hollow
    filled = [row for row in rows_of(given, "point") if row["style"].get("filled")]
    assert len(filled) == sum(r.kind == "cell" and r.status == "done" for r in full.records)
    assert all("distilled" in row["tip"] for row in filled)


def test_seeds_are_one_point_of_compute_and_one_line_of_teachers_each(tmp_path: Path) -> None:
    plan = Plan(seeds=(0, 1), students=(40_000,), law=False)
    results = load_results(write_output(tmp_path, plan))
    points = rows_of(picture_of(compute_chart(results, "llama", given=False)), "point")
    own = [r for r in points if r["key"] == "40k student" and r["style"].get("filled")]
    assert len(own) == len(TEACHERS)
    teachers = rows_of(picture_of(teacher_chart(results, "llama")), "point")
    assert {row["key"] for row in teachers} == {"seed 0", "seed 1"}
    runs = [record for record in results.records if record.kind == "teacher"]
    losses = {
        (f"seed {r.seed}", r.parameters.non_embedding): r.heldout.loss for r in runs if r.heldout
    }
    assert {(row["key"], row["x"]): row["y"] for row in teachers} == pytest.approx(losses, rel=1e-5)


def test_chains_have_a_mark_of_their_own_in_the_chart_of_compute(tmp_path: Path) -> None:
    results = load_results(write_output(tmp_path, Plan(inits=("pruned", "chain"), law=False)))
    points = rows_of(picture_of(compute_chart(results, "llama", given=True)), "point")
    wedges = [row for row in points if row["style"].get("shape") == "triangle-left"]
    assert wedges
    assert all(", chain," in row["tip"] for row in wedges)


def test_training_curves_are_of_the_best_teacher_by_the_law_and_of_the_largest(
    full: Results,
) -> None:
    group = full.lines[0].group
    for curve in full.law.of(group):
        cells = full.cells_of(curve)
        assert curve.optimum.best in cells
        assert MISSING not in {cell.id for cell in cells.values()}
    for measure in ("ce", "kl", "agreement"):
        picture = picture_of(training_chart(full, group, measure))
        ends = rows_of(picture, "point")
        assert len(ends) == 2 * len(STUDENTS)
        assert sum(bool(row["style"].get("filled")) for row in ends) == len(STUDENTS)
        best = next(row for row in ends if row["style"].get("filled"))
        size = full.law.of(group)[0].optimum.best
        assert f"distilled, teacher {numbers.size(size)}" in best["tip"]
        cell = full.cells_of(full.law.of(group)[0])[size]
        means = block_means(cell.curve.tokens, getattr(cell.curve, measure))
        line = [
            (row["x"], row["y"])
            for row in rows_of(picture, "line")
            if row["key"] == best["key"] and row["style"]["strokeDash"] == [1, 0]
        ]
        assert line == [pytest.approx(place, rel=1e-5) for place in means]


def test_block_means_keep_the_mean_and_skip_what_is_missing() -> None:
    values = [float(i) for i in range(10 * MOST_POINTS)]
    means = block_means(values, values)
    assert len(means) == MOST_POINTS
    assert sum(y for _, y in means) / len(means) == pytest.approx(sum(values) / len(values))
    assert block_means([1.0, 2.0, 3.0], [1.0, None, math.nan]) == [(1.0, 1.0)]


def test_a_search_shows_every_round_and_where_the_teacher_changed(full: Results) -> None:
    rounds = [(0.1, 60_000, 3.0), (0.2, 100_000, 2.9), (0.3, 100_000, 2.8)]
    steps = [
        {
            "spent_fraction": spent,
            "choices": [
                {"student_size": 40_000, "teacher_size": t, "loss": loss, "loss_stderr": 0.1},
                {"student_size": 70_000, "teacher_size": t, "loss": None},
            ],
        }
        for spent, t, loss in rounds
    ]
    search = {"steps": steps, "budget": 0.4, "stop": "budget"}
    results = Results(Path("."), {}, (), full.law, {}, search)
    picture = picture_of(search_chart(results))
    points = rows_of(picture, "point")
    assert sorted(row["y"] for row in points) == pytest.approx([0.0, 0.1, 0.2])
    (changed,) = [row for row in points if not row["style"].get("filled")]
    assert "teacher 100k (before: 60k)" in changed["tip"]
    assert {row["x"] for row in rows_of(picture, "rule") if row["key"] == "budget"} == {40.0}
    nothing = Results(Path("."), {}, (), full.law, {}, {"steps": [], "budget": 0.4})
    assert isinstance(search_chart(nothing), Absent)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(students=(40_000,), teachers=TEACHERS[:2], finished=False, samples=False),
        Plan(students=(40_000,), teachers=TEACHERS[:1], baselines="none", law=False),
        Plan(teachers=(), law=False, samples=False),
        # only the teachers have been trained
        Plan(architectures=("gpt2", "llama"), tokens=(), samples=False, law=False),
        Plan(inits=("fixed", "scratch"), tokens=(200_000, 400_000), students=(40_000,)),
    ],
)
def test_every_picture_of_a_partial_sweep_is_valid_vega_lite(tmp_path: Path, plan: Plan) -> None:
    results = load_results(write_output(tmp_path, plan))
    figures = [figure for held in report_sections(results).values() for figure in held]
    assert len({figure.name for figure in figures}) == len(figures)
    lights = {light for light, _ in COLOURS.values()} | {"#dd8a57", "#f4f2ee", "#6fa6dd", "#111111"}
    for figure in figures:
        if isinstance(figure, Absent):
            assert figure.reason.endswith(".")
            continue
        altair.layer(*figure.marks).to_dict(validate=True)
        text = json.dumps(spec_of(figure), allow_nan=False)
        # every colour has one for dark ground, or stands on a colour of its own
        assert {word for word in text.split('"') if word.startswith("#")} <= lights
        assert len(figure.alt) > 40


def test_no_colour_is_changed_twice() -> None:
    light, dark = zip(*COLOURS.values(), strict=True)
    assert len(set(light)) == len(light)
    assert not set(light) & set(dark)


def test_ticks_are_inside_and_readable() -> None:
    assert round_ticks((5e4, 8e5)) == [5e4, 1e5, 2e5, 5e5]
    assert round_ticks((9e19, 3e24), 5) == pytest.approx([1e20, 1e21, 1e22, 1e23, 1e24])
    axis = size_axis("size", [1e5, 1.01e5, 135e3, 1e6])
    assert axis["axis"]["values"] == [1e5, 135e3, 1e6]


def test_numbers_are_rounded_to_what_their_interval_allows() -> None:
    assert numbers.with_interval(1.9234, (1.512, 2.389)) == "1.9 (1.5 to 2.4)"
    assert numbers.with_interval(2.4981, (2.466, 2.531)) == "2.50 (2.47 to 2.53)"
    assert numbers.with_interval(8.5, (2.07, None)) == "at least 2.1"
    assert numbers.size_with_interval(95_432, (71_900, 131_000)) == "95k (72k to 130k)"
    assert numbers.size_with_interval(95_432, (None, 131_000)) == "at most 130k"
    assert numbers.power(1.24e15) == "1.2\u00d710\u00b9\u2075"
    assert numbers.duration(4325) == "1 h 12 min"
    assert numbers.listed(["30k", "40k", "54k"]) == "30k, 40k and 54k"
