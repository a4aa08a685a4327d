"""`capgap plan --question`: a small grid for a large question, and what it is sure of."""

import json

import numpy as np
import pytest

from capgap.config import load_any_recipe, parse_recipe
from capgap.errors import UserError
from capgap.law.fit import fit
from capgap.law.question import SEEDS, TRUE_RATIO, ask, pretend, reach, reached
from capgap.sweep.plan import make_plan

STUDENTS = [16e6, 8e6, 4e6, 2e6, 1e6]
TEACHERS = list(np.geomspace(1.2e6, 96e6, 9))
BY_HAND = {
    "name": "tiny",
    "larger_teachers_only": True,
    "teachers": {"sizes": ["20k", "40k", "80k"], "tokens": "50k"},
    "students": {"sizes": ["15k", "30k"], "tokens_per_parameter": [2, 4]},
}


def test_the_interval_reaches_further_than_the_table_and_holds_the_truth():
    """As benchmarks/question.py with 100 tables: docs/results/question.md."""
    found = [reached(pretend(STUDENTS, TEACHERS, number), 256e6) for number in range(6)]
    told = [one for one in found if one is not None]
    assert len(told) >= 5
    assert sum(low <= TRUE_RATIO * 256e6 <= high for low, high in told) >= len(told) - 1


def test_it_is_wider_the_further_it_reaches():
    (line,) = fit(pretend(STUDENTS, TEACHERS, 0), draws=200).lines
    spans = [np.divide(*reach(line, STUDENTS, far)[::-1]) for far in (4e6, 64e6, 1024e6)]
    assert spans[0] < spans[1] < spans[2]


def test_a_grid_is_a_share_of_the_question():
    asked = ask(300_000_000, 6_000_000_000, [10**9, 3 * 10**9, 10**10], tables=2)
    assert asked.flops == sum((6 * 3e8 + 2 * size) * 6e9 for size in (1e9, 3e9, 1e10))
    assert asked.spacing == pytest.approx(10**0.5)
    shares = [grid.share for grid in asked.grids]
    assert shares == sorted(shares, reverse=True)
    for grid in asked.grids:
        assert grid.trained
        assert grid.reach == pytest.approx(300_000_000 / grid.students[0], rel=1e-6)
        ratios = np.divide(grid.tokens, grid.students)
        assert ratios == pytest.approx(20, rel=1e-5)
        students = sum(
            6 * size * tokens + 2 * teacher * tokens
            for size, tokens in zip(grid.students, grid.tokens, strict=True)
            for teacher in grid.teachers
            if teacher > size
        )
        trained = sum(6 * size * 10 * grid.teachers[-1] for size in grid.teachers)
        assert grid.flops == pytest.approx(SEEDS * (students + trained), rel=1e-4)


def test_teachers_that_are_there_are_taken():
    given = [round(3e6 * 2**step) for step in range(12)]
    kinds = {grid.trained for grid in ask(300_000_000, 6_000_000_000, given, tables=1).grids}
    assert kinds == {True, False}


def test_the_command_leads_to_a_recipe(typed, tmp_path):
    asked = ["plan", "--question", "--student", "100M", "--tokens", "2B", "--family", "pythia"]
    answer = typed(*asked)
    assert answer.code == 0, answer.err
    assert "Which teacher is best for 100M parameters on 2B tokens?" in answer.out
    found = json.loads(typed(*asked, "--json").out)
    assert found["student"] == 100_000_000
    command = answer.out.splitlines()[-1].removeprefix("next: capgap ").split()
    command[command.index("grid.toml")] = str(tmp_path / "grid.toml")
    assert typed(*command).code == 0
    recipe = load_any_recipe(tmp_path / "grid.toml")
    assert recipe.students.tokens_per_parameter == (20,)
    grid = found["grids"][found["answer"]]
    assert recipe.students.sizes == tuple(grid["students"])
    assert recipe.teachers.sizes == tuple(grid["teachers"])
    assert typed("plan", tmp_path / "grid.toml").code == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give either a recipe or --question"),
        (["laptop", "--question"], "give either a recipe or --question"),
        (["--question"], "--question needs --student and --tokens"),
        (
            ["--question", "--student", "1M", "--tokens", "1B", "--teachers", "7B"],
            "needs two teachers or more",
        ),
    ],
)
def test_mistakes_are_one_line(typed, words, line):
    answer = typed("plan", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert line in answer.err


def test_tokens_in_proportion_and_larger_teachers_alone():
    plan = make_plan(parse_recipe(BY_HAND))
    found = {(cell.student_size, cell.teacher.size, cell.asked_tokens) for cell in plan.cells}
    assert found == {
        *(
            (15_000, size, tokens)
            for size in (20_000, 40_000, 80_000)
            for tokens in (30_000, 60_000)
        ),
        *((30_000, size, tokens) for size in (40_000, 80_000) for tokens in (60_000, 120_000)),
    }


def test_one_kind_of_budget():
    for students in ({"sizes": ["15k"]}, BY_HAND["students"] | {"tokens": ["1M"]}):
        with pytest.raises(UserError, match="give either tokens or tokens_per_parameter"):
            parse_recipe(BY_HAND | {"students": students})
