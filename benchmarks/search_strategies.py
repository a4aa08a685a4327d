"""Other ways to search, to set capgap's own beside: successive halving, and random choice."""

from dataclasses import dataclass
from itertools import product

import numpy as np

from capgap.sweep.recipe import SearchSettings
from capgap.sweep.search_model import (
    MIN_TEACHERS,
    Choice,
    Decision,
    History,
    Run,
    SearchGrid,
    spread,
    too_small,
)

WIDER = (3, 2, 1)  # times the share of teachers that halving keeps at least


def mean_loss(history: History, student: int, teacher: int, rung: int) -> float | None:
    """Over the seeds that were run."""
    found = [
        loss
        for run, loss in history.losses.items()
        if (run.student, run.teacher, run.rung) == (student, teacher, rung)
    ]
    return sum(found) / len(found) if found else None


def measured_choices(history: History) -> tuple[Choice, ...]:
    """Each student's teacher with the lowest mean loss on the longest rung that it was run on."""
    grid, choices = history.grid, []
    for student in range(len(grid.students)):
        for rung in reversed(range(len(grid.tokens))):
            means = {
                teacher: mean
                for teacher in range(len(grid.teachers))
                if not history.is_broken(student, teacher)
                and (mean := mean_loss(history, student, teacher, rung)) is not None
            }
            if means:
                best = min(means, key=means.__getitem__)
                loss = means[best] if rung == grid.last else None
                full = (student, best, history.grid.last)
                seeds = sum(run[:3] == full for run in history.losses)
                choices.append(Choice(student, best, loss, runs=seeds))
                break
    return tuple(choices)


def at_random(history: History, settings: SearchSettings) -> Decision:
    """Columns at full tokens (all students of one teacher and seed) in an order drawn once."""
    grid, last = history.grid, history.grid.last
    columns = [
        (teacher, seed) for teacher in range(len(grid.teachers)) for seed in range(grid.seeds)
    ]
    order = np.random.default_rng(settings.seed).permutation(len(columns))
    choices = measured_choices(history)
    left = 0
    for teacher, seed in (columns[place] for place in order):
        runs = tuple(Run(student, teacher, last, seed) for student in range(len(grid.students)))
        if set(runs) <= history.tried:
            continue
        left += 1
        if history.fits(runs):
            return Decision(runs, "drawn at random", choices)
    if not history.done:
        cheapest = min(
            ([Run(s, t, last, 0) for s in range(len(grid.students))] for t, _ in columns),
            key=grid.flops,
        )
        raise too_small(grid, grid.flops(cheapest), settings.budget)
    return Decision((), "", choices, "budget" if left else "exhausted")


@dataclass(frozen=True)
class _Halving:
    """The first teachers, the seeds of every run, and how many teachers are kept on each rung."""

    teachers: tuple[int, ...]
    seeds: int
    kept: tuple[int, ...]


def by_halving(history: History, settings: SearchSettings) -> Decision:
    """Successive halving, student by student but in step: all teachers on the shortest rung, on
    every later rung a share of them, the best of the rung before. A rung that takes k times the
    tokens keeps one teacher in k, or more where the budget allows it."""
    grid = history.grid
    plan = _halving_plan(grid, settings.budget)
    kept: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(grid.students)), plan.teachers)
    choices = measured_choices(history)
    for rung, number in enumerate(plan.kept):
        runs: list[Run] = []
        for student, teachers in kept.items():
            alive = [one for one in teachers if not history.is_broken(student, one)]
            if rung > 0:
                means = {one: mean_loss(history, student, one, rung - 1) for one in alive}
                ranked = sorted((mean, one) for one, mean in means.items() if mean is not None)
                alive = [one for _, one in ranked[:number]]
            kept[student] = tuple(alive)
            runs += [Run(student, one, rung, seed) for one in alive for seed in range(plan.seeds)]
        missing = tuple(run for run in runs if run not in history.tried)
        if missing and history.fits(missing):
            return Decision(missing, f"the best {number} teachers of every student", choices)
        if missing:
            return Decision((), "", choices, "budget")
    return Decision((), "", choices, "exhausted")


def _halving_plan(grid: SearchGrid, budget: float) -> _Halving:
    """As many teachers as the budget pays for, spread over the grid, or over its smaller ones if it
    does not pay for half of them; then as many seeds; then as many teachers on later rungs."""
    allowed = budget * grid.full_flops
    total = len(grid.teachers)
    for reach in range(total, MIN_TEACHERS - 1, -1):
        for number in range(reach, max(MIN_TEACHERS, (reach + 1) // 2) - 1, -1):
            first = tuple(spread(reach, number))
            for seeds, wider in product(range(grid.seeds, 0, -1), WIDER):
                plan = _Halving(first, seeds, _kept(grid, number, wider))
                if _dearest(grid, plan) <= allowed:
                    return plan
    smallest = _Halving(tuple(spread(MIN_TEACHERS, MIN_TEACHERS)), 1, _kept(grid, MIN_TEACHERS, 1))
    raise too_small(grid, _dearest(grid, smallest), budget)


def _kept(grid: SearchGrid, number: int, wider: int) -> tuple[int, ...]:
    shares = [float(grid.tokens[0] / tokens) for tokens in grid.tokens]
    return tuple(max(1, min(number, round(wider * number * share))) for share in shares)


def _dearest(grid: SearchGrid, plan: _Halving) -> float:
    """FLOPs if no two students share a teacher on the later rungs but where they must, and the
    largest teachers win."""
    total, done = 0.0, list[Run]()
    for rung, number in enumerate(plan.kept):
        shared = plan.teachers if rung == 0 else plan.teachers[-number * len(grid.students) :]
        runs = []
        for student in range(len(grid.students)):
            own = (
                plan.teachers
                if rung == 0
                else [shared[(student * number + place) % len(shared)] for place in range(number)]
            )
            runs += [Run(student, one, rung, seed) for one in own for seed in range(plan.seeds)]
        total += grid.flops(set(runs), done)
        done += runs
    return total
