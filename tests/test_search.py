"""Decisions of a search on made-up surfaces: what they cost, when they stop, what they choose."""

import itertools

import numpy as np
import pytest

from capgap.errors import UserError
from capgap.sweep.recipe import SearchSettings
from capgap.sweep.search_model import History, Round, Run, SearchGrid, decide, rule_choices
from capgap.sweep.search_stage import Search

STUDENTS = np.array([1e6, 1.5e6, 2e6])
TEACHERS = np.geomspace(2.4e6, 2e7, 8)
TOKENS = np.array([1_000_000, 3_000_000, 9_000_000])


def made_grid(**changes):
    given = {
        "students": STUDENTS,
        "teachers": TEACHERS,
        "tokens": TOKENS,
        "seeds": 1,
        "run_flops": 6.0 * STUDENTS[:, None, None] * TOKENS * np.ones((1, len(TEACHERS), 1)),
        "pass_flops": 2.0 * TEACHERS[:, None] * TOKENS,
        "teacher_flops": np.zeros(len(TEACHERS)),
    }
    return SearchGrid(**(given | changes))


def true_losses(*, curvature=0.04):
    """[S, T, R]: the best teacher is 4 times the student at full tokens, and smaller with fewer."""
    ratio = np.log(TEACHERS / STUDENTS[:, None])[..., None]
    short = np.log(TOKENS / TOKENS[-1])
    level = 3.5 - 0.2 * np.log(STUDENTS / 1e6)[:, None, None] - 0.25 * short
    return level + curvature * (ratio - np.log(4) - 0.15 * short) ** 2


def search(grid, losses, settings, *, failed=()):
    """The rounds of a whole search [and its last decision]; `losses` [S, T, R, N]."""
    rounds = []
    while (decision := decide(grid, rounds, settings)).runs:
        found = [
            None if run in failed else float(losses[run.student, run.teacher, run.rung, run.seed])
            for run in decision.runs
        ]
        rounds.append(Round(decision.runs, tuple(found)))
        assert len(rounds) < 100
    return rounds, decision


def noisy(truth, noise, *, seeds=1, seed=0):
    drawn = np.random.default_rng(seed).normal(0, noise, (*truth.shape, seeds))
    return truth[..., None] + drawn


def regrets(choices, truth):
    full = truth[:, :, -1]
    return [full[one.student, one.teacher] / full[one.student].min() - 1 for one in choices]


@pytest.mark.parametrize("budget", [0.2, 0.35, 1.0])
def test_the_budget_is_never_exceeded_and_no_run_is_made_twice(budget):
    grid = made_grid(seeds=2, teacher_flops=1.5e6 * TEACHERS, own_teachers=True)
    rounds, last = search(grid, noisy(true_losses(), 0.005, seeds=2), SearchSettings(budget=budget))
    runs = [run for one in rounds for run in one.runs]
    assert len(set(runs)) == len(runs)
    assert 0 < History(grid, rounds, budget).spent <= budget * grid.full_flops
    assert len(last.choices) == len(STUDENTS)
    assert last.stop in ("safe", "budget", "exhausted")


def test_decisions_are_a_function_of_grid_rounds_and_settings():
    grid, losses = made_grid(), noisy(true_losses(), 0.003)
    settings = SearchSettings(budget=0.35, seed=3)
    rounds, last = search(grid, losses, settings)
    for number in range(len(rounds)):
        assert decide(grid, rounds[:number], settings).runs == rounds[number].runs
    assert decide(grid, rounds, settings) == last


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.001), (0.003, 0.003)])
def test_the_model_chooses_well_on_a_third_of_the_flops(noise, bound):
    """Within 0.5% of the loss at 35%, and within much less on average."""
    truth = true_losses()
    worst_teacher = (truth[:, :, -1].max(axis=1) / truth[:, :, -1].min(axis=1) - 1).max()
    assert worst_teacher > 0.015
    found = []
    for seed in range(3):
        _, last = search(made_grid(), noisy(truth, noise, seed=seed), SearchSettings(budget=0.35))
        found += regrets(last.choices, truth)
    assert max(found) <= 0.005
    assert np.mean(found) <= bound


def test_the_model_stops_early_where_the_choice_is_clear():
    grid = made_grid()
    rounds, last = search(
        grid, noisy(true_losses(curvature=0.3), 0.001), SearchSettings(budget=0.9)
    )
    assert last.stop == "safe"
    assert all(one.safe_probability >= 0.9 for one in last.choices)
    assert History(grid, rounds, 0.9).spent < 0.75 * grid.full_flops


def test_what_is_chosen_was_run_at_full_tokens():
    _, last = search(made_grid(), noisy(true_losses(), 0.003), SearchSettings(budget=0.4))
    assert all(one.runs > 0 for one in last.choices)


def test_expected_losses_are_as_uncertain_as_they_say():
    truth, misses = true_losses(), []
    for seed in range(6):
        _, last = search(made_grid(), noisy(truth, 0.005, seed=seed), SearchSettings(budget=0.35))
        misses += [
            (one.loss - truth[one.student, one.teacher, -1]) / one.loss_stderr
            for one in last.choices
        ]
    assert np.abs(misses).max() < 4
    assert 0.2 < np.std(misses) < 2


def test_the_rule_takes_the_teacher_nearest_to_two_and_a_half_students():
    grid = made_grid(teachers=np.array([1.2e6, 2.4e6, 3.9e6, 8e6]))
    assert [one.teacher for one in rule_choices(grid)] == [1, 2, 2]


def test_flops_count_what_a_batch_shares_once():
    grid = made_grid(teacher_flops=10.0 * TEACHERS, own_teachers=True, seeds=2)
    alone = Run(0, 3, 2, 0)
    own = grid.run_flops[0, 3, 2]
    assert grid.flops([alone]) == pytest.approx(10 * TEACHERS[3] + grid.pass_flops[3, 2] + own)
    # shorter runs of the same teacher and seed ride on the pass
    beside = [alone, Run(1, 3, 0, 0)]
    assert grid.flops(beside) == pytest.approx(grid.flops([alone]) + grid.run_flops[1, 3, 0])
    # in a later batch the pass comes again, the teacher's training does not
    later = grid.flops([Run(1, 3, 0, 0)], before=[alone])
    assert later == pytest.approx(grid.run_flops[1, 3, 0] + grid.pass_flops[3, 0])
    # another seed has a teacher of its own
    assert grid.flops([Run(0, 3, 2, 1)], before=[alone]) == pytest.approx(grid.flops([alone]))


def test_a_fixed_start_needs_the_smallest_teacher():
    grid = made_grid(teacher_flops=10.0 * TEACHERS, base_teacher=0)
    assert grid.used_teachers([Run(0, 5, 0, 0)]) == {(5, 0), (0, 0)}


def test_what_failed_is_not_chosen_nor_run_again():
    truth = true_losses()
    best = int(truth[0, :, -1].argmin())
    failed = {Run(0, best, rung, 0) for rung in range(3)}
    rounds, last = search(made_grid(), truth[..., None], SearchSettings(budget=0.6), failed=failed)
    tried = [run for one in rounds for run in one.runs]
    assert len(set(tried)) == len(tried)
    if set(tried) & failed:
        assert last.choices[0].teacher != best


def test_a_student_whose_runs_all_fail_gets_no_choice_and_the_others_do():
    def failing(*students):
        places = itertools.product(students, range(len(TEACHERS)), range(3))
        return {Run(student, teacher, rung, 0) for student, teacher, rung in places}

    losses = true_losses()[..., None]
    _, last = search(made_grid(), losses, SearchSettings(budget=1.0), failed=failing(1))
    assert [one.student for one in last.choices] == [0, 2]
    _, last = search(made_grid(), losses, SearchSettings(budget=1.0), failed=failing(0, 1, 2))
    assert last.choices == ()


def test_one_rung_and_two_teachers_are_enough():
    grid = made_grid(
        teachers=TEACHERS[:2],
        tokens=TOKENS[-1:],
        run_flops=np.ones((3, 2, 1)),
        pass_flops=np.ones((2, 1)),
        teacher_flops=np.zeros(2),
    )
    losses = true_losses()[:, :2, -1:, None]
    _, last = search(grid, losses, SearchSettings(budget=1.0))
    assert [one.teacher for one in last.choices] == list(losses[:, :, 0, 0].argmin(axis=1))


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(UserError, match=r"budget .* (greater than 0|less than or equal to 1)"):
        Search(recipe="laptop", budget=budget)


@pytest.mark.parametrize("tolerance", [0, 1, -1])
def test_a_tolerance_that_is_no_share_is_refused(tolerance):
    with pytest.raises(UserError, match="tolerance"):
        Search(recipe="laptop", tolerance=tolerance)


def test_a_budget_below_the_first_runs_and_a_single_teacher_are_refused():
    with pytest.raises(
        UserError, match=r"too small for this grid: the search needs at least 0\.\d"
    ):
        decide(made_grid(), [], SearchSettings(budget=0.0005))
    one = made_grid(
        teachers=TEACHERS[:1],
        run_flops=np.ones((3, 1, 3)),
        pass_flops=np.ones((1, 3)),
        teacher_flops=np.zeros(1),
    )
    with pytest.raises(UserError, match="two teachers or more"):
        decide(one, [], SearchSettings(budget=0.35))
