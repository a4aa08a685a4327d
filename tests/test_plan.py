"""From a recipe to its cells: how many, which shapes, which baselines, what they cost."""

import pytest

from capgap.config import parse_recipe
from capgap.errors import UserError
from capgap.sweep.plan import make_plan, select_baselines


def plan_of(data, **changes):
    return make_plan(parse_recipe(data | changes))


@pytest.fixture
def full_recipe(tiny_recipe):
    tiny_recipe |= {
        "architectures": ["llama", "gpt_neox"],
        "seeds": [0, 1],
        "students": {
            "sizes": ["8k", "11k"],
            "tokens": [2560, 5120],
            "inits": ["pruned", "fixed", "scratch"],
        },
    }
    return tiny_recipe


def test_every_cell_of_the_grid_is_there_once(full_recipe):
    plan = plan_of(full_recipe)
    assert len(plan.teachers) == 2 * 2 * 4
    assert len(plan.columns) == len(plan.teachers)
    assert len(plan.cells) == 16 * 3 * 2 * 2
    ids = [cell.id for cell in plan.cells]
    assert len(set(ids)) == len(ids)
    for column in plan.columns:
        assert {cell.teacher.id for cell in column.cells} == {column.teacher.id}
        assert column.tokens == 5120


def test_sizes_are_within_two_percent_of_those_asked(full_recipe):
    plan = plan_of(full_recipe)
    for teacher in plan.teachers:
        assert abs(teacher.shape.parameters().non_embedding / teacher.size - 1) < 0.02
    for cell in plan.cells:
        assert abs(cell.shape.parameters().non_embedding / cell.student_size - 1) < 0.02


def test_inits_start_where_their_name_says(full_recipe):
    for cell in plan_of(full_recipe).cells:
        if cell.init == "pruned":
            assert cell.cut_from == cell.teacher
        elif cell.init == "fixed":
            assert cell.cut_from.size == 14_000
            assert cell.cut_from.seed == cell.seed
            assert cell.cut_from.architecture == cell.architecture
        else:
            assert cell.cut_from is None


def test_every_cell_has_its_matched_baseline(full_recipe):
    plan = plan_of(full_recipe)
    baselines = [cell for column in plan.baselines for cell in column.cells]
    assert len({cell.id for cell in baselines}) == len(baselines)

    def start(cell):
        teacher = cell.teacher.id if cell.init == "pruned" else None
        return (cell.architecture, cell.init, teacher, cell.shape, cell.tokens, cell.seed)

    assert {start(cell) for cell in plan.cells} == {start(cell) for cell in baselines}
    for cell in baselines:
        assert cell.alpha == 0
        assert cell.kind == "baseline"
    # pruned: one a cell; fixed and scratch: one for all four teachers
    assert len(baselines) == 64 + 2 * 16


def test_selected_baselines_are_those_of_the_best_and_the_largest(tiny_recipe):
    plan = plan_of(tiny_recipe, baselines="best_and_largest")
    best = [cell for cell in plan.cells if cell.teacher.size == 20_000]
    chosen = [cell for column in select_baselines(plan, best) for cell in column.cells]
    assert {cell.teacher.size for cell in chosen} == {20_000, 40_000}
    assert len(chosen) == 4
    same = [cell for cell in plan.cells if cell.teacher.size == 40_000]
    assert sum(len(column.cells) for column in select_baselines(plan, same)) == 2


def test_baselines_of_equal_flops_read_more(full_recipe):
    plan = plan_of(full_recipe, equal_flops=True)
    longer = [c for column in plan.baselines for c in column.cells if c.equal_flops_to]
    cells = {cell.id: cell for cell in plan.cells}
    assert {one.equal_flops_to for one in longer} == set(cells)
    for one in longer:
        cell = cells[one.equal_flops_to]
        mine, its = (c.work.flops(plan.recipe, 0) for c in (one, cell))
        batch = 6 * one.shape.parameters().total * plan.recipe.training.batch_tokens
        assert mine["teacher_forward"] == 0
        assert abs(mine["student"] - its["student"] - its["teacher_forward"]) <= batch
        assert (one.shape, one.init, one.cut_from) == (cell.shape, cell.init, cell.cut_from)
    assert len({c.id for column in plan.baselines for c in column.cells}) == sum(
        len(column.cells) for column in plan.baselines
    )
    best = [cell for cell in plan.cells if cell.teacher.size == 12_000]
    chosen = [c for column in select_baselines(plan, best) for c in column.cells]
    assert {c.equal_flops_to for c in chosen if c.equal_flops_to} >= {cell.id for cell in best}


def test_one_depth_for_all_models(full_recipe):
    full_recipe["students"]["sizes"] = ["9.5k", "11k"]
    plan = plan_of(full_recipe, layers=3)
    models = [*plan.teachers, *plan.cells]
    assert {model.shape.layers for model in models} == {3}
    for model in models:
        asked = getattr(model, "student_size", None) or model.size
        assert abs(model.shape.parameters().non_embedding / asked - 1) < 0.02
    with pytest.raises(UserError, match="of 30 layers: the smallest has"):
        plan_of(full_recipe, layers=30)


def test_controls_may_have_fewer_budgets(full_recipe):
    full_recipe["students"]["control_tokens"] = [2560]
    budgets = {}
    for cell in plan_of(full_recipe).cells:
        budgets.setdefault(cell.init, set()).add(cell.budget)
    assert budgets == {"pruned": {2560, 5120}, "fixed": {2560}, "scratch": {2560}}
    full_recipe["students"]["control_tokens"] = [99]
    with pytest.raises(UserError, match=r"control_tokens \[99\] are none of tokens"):
        plan_of(full_recipe)


def test_keys_that_say_nothing_leave_the_hash_of_a_recipe(full_recipe):
    plain = parse_recipe(full_recipe).hash()
    assert parse_recipe(full_recipe | {"equal_flops": False}).hash() == plain
    assert parse_recipe(full_recipe | {"layers": 3}).hash() != plain


def test_flops_by_part_count_shared_work_once(tiny_recipe):
    plan = plan_of(tiny_recipe)
    flops = plan.flops(plan.baselines)
    students = 2 * sum(6 * cell.shape.parameters().total * cell.tokens for cell in plan.cells)
    forwards = sum(2 * one.shape.parameters().total * 2560 for one in plan.teachers)
    assert flops["student"] == students
    assert flops["teacher_forward"] == forwards
    assert flops["teacher_training"] == sum(
        6 * one.shape.parameters().total * 5120 for one in plan.teachers
    )
    alone = sum(cell.work.flops(plan.recipe, 1000)["teacher_forward"] for cell in plan.cells)
    assert alone == 2 * forwards  # two students a column


def test_student_larger_than_a_teacher_is_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"student size 15k is larger than the teacher llama-t14k"):
        plan_of(tiny_recipe, students={"sizes": ["15k"], "tokens": [2560]})


def test_impossible_and_repeated_sizes_are_refused(tiny_recipe):
    with pytest.raises(UserError, match="too few"):
        plan_of(tiny_recipe, teachers={"sizes": [10], "tokens": 2560})
    with pytest.raises(UserError, match="asked for twice"):
        plan_of(tiny_recipe, teachers={"sizes": ["20k", "20k"], "tokens": 2560})
    with pytest.raises(UserError, match="asked for twice"):
        plan_of(tiny_recipe, students={"sizes": ["8k", 8000], "tokens": [2560]})


def test_auto_learning_rate_falls_with_size_and_can_be_set(tiny_recipe):
    rates = [teacher.learning_rate for teacher in plan_of(tiny_recipe).teachers]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
    tiny_recipe["teachers"]["learning_rate"] = 0.003
    assert {one.learning_rate for one in plan_of(tiny_recipe).teachers} == {0.003}


def test_without_the_soft_term_no_teacher_reads(tiny_recipe):
    plan = plan_of(tiny_recipe, training=tiny_recipe["training"] | {"alpha": 0})
    assert plan.flops(plan.baselines)["teacher_forward"] == 0
    assert [column.work.read for column in plan.columns] == [[]] * 4
