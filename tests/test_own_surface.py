"""Surfaces fitted to a user's own cells: truths come back, and advice rests on them."""

import csv
import json
from pathlib import Path

import pytest

from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.rules import PUBLISHED_RULE, own_surface, surface_rules
from capgap.law.surface import DistillationSurface, SupervisedSurface, TeacherTokens
from capgap.law.table import read_table
from capgap.records import read_records
from capgap.report.published_charts import own_surface_chart
from report_data import Plan, write_output

# losses of small models on small text, with a best teacher of two to four times the student
ALONE = SupervisedSurface(E=1.4, A=60.0, B=300.0, alpha=0.36, beta=0.4)
TRUTH = DistillationSurface(
    ALONE, A=300.0, B=1500.0, alpha=0.37, beta=0.4, gamma=1.0, c0=2.0, c1=20.0, f1=0.1, d1=1.0
)
STUDENTS, TEACHERS = (20_000, 32_000, 50_000), (40_000, 64_000, 100_000, 160_000, 260_000)
READ = TeacherTokens(20.0)


def write_table(
    path: Path,
    *,
    init: str = "scratch",
    tokens: tuple[int, ...] = (300_000, 1_200_000, 4_800_000),
    told: bool = True,
) -> Path:
    names = "architecture init tokens student_parameters teacher_parameters loss teacher_loss"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names.split(), "baseline_loss", *(["teacher_tokens"] if told else [])])
        for budget in tokens:
            for student in STUDENTS:
                baseline = float(ALONE.loss(student, budget))
                for teacher in TEACHERS:
                    above = float(ALONE.loss(teacher, READ.of(teacher)))
                    loss = float(TRUTH.loss(student, budget, above))
                    row = ["llama", init, budget, student, teacher, loss, above, baseline]
                    writer.writerow([*row, *([int(READ.of(teacher))] if told else [])])
    return path


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "cells.csv"
    return fit(read_table(write_table(path)), draws=100)


def test_a_known_surface_comes_back(law):
    (entry,) = law.surfaces
    assert entry.reason is None
    assert entry.supervised.points == len(TEACHERS) + 3 * len(STUDENTS)
    assert entry.distillation.points == 3 * len(STUDENTS) * len(TEACHERS)
    own = own_surface(entry)
    assert own.teacher_tokens.factor == pytest.approx(20)
    assert own.teacher_tokens.exponent == pytest.approx(1)
    assert len(own.combinations) == 9
    # between sizes and tokens that were measured, and nowhere else
    assert own.has_read(30_000, 1_000_000)
    assert own.has_read(20_500, 300_000)
    assert not own.has_read(30_000, 100_000_000)
    assert not own.has_read(3_000_000_000, 1_000_000)
    for student, tokens in ((20_000, 600_000), (40_000, 3_000_000)):
        found = own.surface.best_teacher(student, tokens, teacher_tokens=own.teacher_tokens)
        true = TRUTH.best_teacher(student, tokens, teacher_tokens=READ)
        assert found.loss == pytest.approx(true.loss, rel=1e-5)
        assert found.ratio == pytest.approx(true.ratio, rel=0.02)
    json.dumps(law.as_dict())


def test_one_budget_takes_a_form_without_tokens(tmp_path):
    path = write_table(tmp_path / "cells.csv", tokens=(600_000,))
    (entry,) = fit(read_table(path), draws=100).surfaces
    # the teachers' tokens differ from the students', so alone tokens are in it
    assert not entry.supervised.form.startswith("one_budget")
    assert entry.distillation.form.startswith("one_budget")
    # at one budget the term of the tokens is a constant, which the form does not have
    assert entry.error < 2e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init": "pruned"}, "of students from scratch (init 'scratch'), and these are pruned"),
        ({"told": False, "tokens": (600_000,)}, "are too few: the simplest form needs 5"),
        ({"told": False}, "what the teachers were trained on is not known"),
    ],
)
def test_what_cannot_be_fitted_says_why(tmp_path, changes, reason):
    path = write_table(tmp_path / "cells.csv", **changes)
    law = fit(read_table(path), draws=100)
    (entry,) = law.surfaces
    assert reason in entry.reason
    assert own_surface(entry) is None


def test_records_give_the_same_points_as_a_table(tmp_path):
    folder = write_output(tmp_path, Plan(inits=("scratch",), tokens=(400_000, 800_000), law=False))
    (entry,) = fit(cells_of(read_records(folder)), draws=100).surfaces
    # six teachers and three students at two budgets; cells with a teacher above the student
    assert entry.supervised.points == 6 + 2 * 3
    assert entry.distillation.points == 2 * (6 + 5 + 4)
    # all teachers have read the same
    assert entry.teacher_tokens[0] == pytest.approx(800_000)
    assert entry.teacher_tokens[1] == pytest.approx(0, abs=1e-9)


def test_the_surface_ranks_what_it_was_read_from(law):
    names = [rule.name for rule in surface_rules(law, 30_000, 1_000_000)]
    assert names == ["the surface of your sweep", "the published surface"]
    assert surface_rules(law, 3_000_000_000, 1_000_000) == [PUBLISHED_RULE]
    assert surface_rules(law, 30_000, 100_000_000) == [PUBLISHED_RULE]


def test_nothing_is_said_between_corners_that_were_not_measured(tmp_path):
    """Small students on few tokens and large ones on many: of the other two corners nothing."""
    path = write_table(tmp_path / "cells.csv")
    lines = path.read_text().splitlines()
    held = {("20000", "300000"), ("32000", "1200000"), ("50000", "4800000")}
    kept = [line for line in lines[1:] if (line.split(",")[3], line.split(",")[2]) in held]
    path.write_text("\n".join([lines[0], *kept]))
    own = own_surface(fit(read_table(path), draws=100).surfaces[0])
    assert own.has_read(32_000, 1_200_000)
    assert not own.has_read(20_000, 4_800_000)
    assert not own.has_read(50_000, 300_000)


def test_without_a_law_the_published_surface_ranks():
    assert surface_rules(None, 30_000, 1_000_000) == [PUBLISHED_RULE]


def test_recommend_by_a_surface_of_ones_own(law, tmp_path, typed):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(law.as_dict()))
    asked = ("--student", "30k", "--tokens", "1M", "--teachers", "40k,100k,1M", "--law", str(path))
    found = typed("recommend", *asked, "--json", "--figure", str(tmp_path / "advice.png"))
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["surface"]["source"] == "your sweep (llama, scratch)"
    first = min(told["recommendations"], key=lambda row: row["expected_loss"])
    above = TRUTH.supervised.loss(first["non_embedding"], READ.of(first["non_embedding"]))
    assert first["expected_loss"] == pytest.approx(
        float(TRUTH.loss(30_000, 1_000_000, above)), rel=1e-4
    )
    (other,) = told["other_surfaces"]
    published = PUBLISHED_SURFACE.supervised
    tokens = published.compute_optimal_tokens().of(100_000)
    assert other["expected_losses"]["100k"] == pytest.approx(
        float(PUBLISHED_SURFACE.loss(30_000, 1_000_000, published.loss(100_000, tokens)))
    )
    assert other["caution"] == "it was read from other sizes or tokens"
    shown = typed("recommend", *asked)
    assert "to less than 0.01%" in " ".join(shown.out.split())


def test_the_surface_is_drawn(law):
    own = own_surface(law.surfaces[0])
    picture = own_surface_chart(own, "llama", 4_800_000)
    assert picture.name == "surface-llama-4800000"
    assert picture.alt
