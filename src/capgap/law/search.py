"""Which runs of a grid to make next: the search for every student's best teacher within a budget.

The grid is data, the past is a list of rounds, and a decision is a pure function of both: a search
that was stopped takes the same decisions again, and needs no state of its own. S students, T
teachers, R rungs (token budgets, the last is the one asked for), N seeds.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from capgap.errors import UserError
from capgap.law.cells import Floats, Integers

STRATEGIES = ("model", "halving", "random")
MIN_TEACHERS = 2
RULE_RATIO = 2.5  # arXiv 2311.07052
WIDER = (3, 2, 1)  # times the share of teachers that halving keeps at least


@dataclass(frozen=True, order=True)
class Run:
    """One run of the grid, by indices: a student distilled from a teacher on a rung's tokens."""

    student: int
    teacher: int
    rung: int
    seed: int


@dataclass(frozen=True)
class SearchGrid:
    """What can be run and what it costs, in FLOPs.

    A batch of runs costs the runs' own work, one pass of a teacher for all its runs of one seed
    (as long as the longest of them), and once for every teacher that was not used before its
    training and scoring. `own_teachers`: every seed has teachers of its own. `base_teacher`: one
    that every run needs, because students start from its weights.
    """

    students: Floats  # [S] parameters
    teachers: Floats  # [T] parameters, ascending
    tokens: Integers  # [R] ascending
    seeds: int
    run_flops: Floats  # [S, T, R]
    pass_flops: Floats  # [T, R]
    teacher_flops: Floats  # [T]
    own_teachers: bool = False
    base_teacher: int | None = None

    @property
    def last(self) -> int:
        """The rung of the tokens that were asked for."""
        return len(self.tokens) - 1

    def runs(self, rung: int) -> list[Run]:
        """All runs of a rung."""
        return [
            Run(student, teacher, rung, seed)
            for seed in range(self.seeds)
            for teacher in range(len(self.teachers))
            for student in range(len(self.students))
        ]

    def used_teachers(self, runs: Collection[Run]) -> set[tuple[int, int]]:
        """(teacher, seed) of all that must be trained and scored for these runs."""
        found = {(run.teacher, run.seed if self.own_teachers else 0) for run in runs}
        if self.base_teacher is not None:
            found |= {(self.base_teacher, seed) for _, seed in found}
        return found

    def flops(self, runs: Collection[Run], before: Collection[Run] = ()) -> float:
        """Of one batch of runs, after those `before`."""
        new = self.used_teachers(runs) - self.used_teachers(before)
        longest: dict[tuple[int, int], int] = {}
        for run in runs:
            place = (run.teacher, run.seed)
            longest[place] = max(run.rung, longest.get(place, 0))
        return float(
            sum(self.teacher_flops[teacher] for teacher, _ in new)
            + sum(self.pass_flops[teacher, rung] for (teacher, _), rung in longest.items())
            + sum(self.run_flops[run.student, run.teacher, run.rung] for run in runs)
        )

    @property
    def full_flops(self) -> float:
        """Of the whole grid at its full tokens, all seeds, without baselines."""
        return self.flops(self.runs(self.last))


@dataclass(frozen=True)
class Round:
    """Runs made together, with their held-out losses in nats per token; None for a failed one."""

    runs: tuple[Run, ...]
    losses: tuple[float | None, ...]


@dataclass(frozen=True)
class Choice:
    """The teacher chosen for a student, and how good its student is expected to be.

    `loss` at full tokens in nats per token, its standard deviation, the loss that choosing it
    instead of the true best is expected to cost, and the probability that this is at most the
    tolerance; None where the strategy does not say. `runs`: how many of its runs had full tokens.
    """

    student: int
    teacher: int
    loss: float | None
    loss_stderr: float | None = None
    expected_regret: float | None = None
    safe_probability: float | None = None
    runs: int = 0


@dataclass(frozen=True)
class Decision:
    """What to run next and why; no runs, but a reason to stop, at the end."""

    runs: tuple[Run, ...]
    reason: str
    choices: tuple[Choice, ...]
    stop: Literal["safe", "budget", "exhausted"] | None = None


@dataclass(frozen=True)
class Settings:
    """How to search. `budget` is the share of the full grid's FLOPs that may be spent; a choice is
    safe when it is within `tolerance` (a share of the loss) of the best teacher with probability
    `confidence`."""

    budget: float
    strategy: str = "model"
    tolerance: float = 0.0025
    confidence: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise UserError(
                f"budget {self.budget:g} is no share of the full grid: give more than 0, at most 1"
            )
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy {self.strategy!r} is unknown: {', '.join(STRATEGIES)}")
        for name in ("tolerance", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name):g} must lie between 0 and 1")


class History:
    """What the rounds so far have cost and shown."""

    def __init__(self, grid: SearchGrid, rounds: Sequence[Round], budget: float) -> None:
        self.grid = grid
        self.losses: dict[Run, float] = {}
        self.failed: set[Run] = set()
        self.done: list[Run] = []
        self.spent = 0.0
        for one in rounds:
            self.spent += grid.flops(one.runs, self.done)
            self.done += one.runs
            for run, loss in zip(one.runs, one.losses, strict=True):
                if loss is None:
                    self.failed.add(run)
                else:
                    self.losses[run] = loss
        self.left = budget * grid.full_flops - self.spent
        self.tried = set(self.done)

    def fits(self, runs: Collection[Run], reserved: float = 0.0) -> bool:
        return self.grid.flops(runs, self.done) + reserved <= self.left

    def is_broken(self, student: int, teacher: int) -> bool:
        """Whether a run of this student from this teacher has failed: it is not chosen then."""
        return any(run.student == student and run.teacher == teacher for run in self.failed)

    def mean(self, student: int, teacher: int, rung: int) -> float | None:
        """Over the seeds that were run."""
        found = [
            loss
            for run, loss in self.losses.items()
            if (run.student, run.teacher, run.rung) == (student, teacher, rung)
        ]
        return sum(found) / len(found) if found else None

    def count(self, student: int, teacher: int) -> int:
        """Seeds at full tokens."""
        return sum(
            (run.student, run.teacher, run.rung) == (student, teacher, self.grid.last)
            for run in self.losses
        )


def decide(grid: SearchGrid, rounds: Sequence[Round], settings: Settings) -> Decision:
    """The next batch of runs, or the end, after these rounds.

    UserError: fewer than two teachers, or a budget that the search cannot even begin with.
    """
    if len(grid.teachers) < MIN_TEACHERS:
        raise UserError("a search needs two teachers or more: there is nothing to choose from")
    history = History(grid, rounds, settings.budget)
    if settings.strategy == "model":
        from capgap.law.search_model import next_by_model

        return next_by_model(history, settings)
    return (_next_by_halving if settings.strategy == "halving" else _next_at_random)(
        history, settings
    )


def rule_choices(grid: SearchGrid) -> tuple[Choice, ...]:
    """The teacher nearest to 2.5 times each student, by ratio; nothing is run (2311.07052)."""
    distance = np.abs(np.log(grid.teachers / (RULE_RATIO * grid.students[:, None])))
    return tuple(Choice(student, int(row.argmin()), None) for student, row in enumerate(distance))


def measured_choices(history: History) -> tuple[Choice, ...]:
    """Each student's teacher with the lowest mean loss on the longest rung that it was run on."""
    grid, choices = history.grid, []
    for student in range(len(grid.students)):
        for rung in reversed(range(len(grid.tokens))):
            means = {
                teacher: mean
                for teacher in range(len(grid.teachers))
                if not history.is_broken(student, teacher)
                and (mean := history.mean(student, teacher, rung)) is not None
            }
            if means:
                best = min(means, key=means.__getitem__)
                loss = means[best] if rung == grid.last else None
                choices.append(Choice(student, best, loss, runs=history.count(student, best)))
                break
    return tuple(choices)


def too_small(grid: SearchGrid, needed: float, budget: float) -> UserError:
    """The budget does not even pay for what a strategy needs at least."""
    return UserError(
        f"budget {budget:g} is too small for this grid: the search needs at least "
        f"{needed / grid.full_flops:.4f} of the full grid's FLOPs; give more, or more rungs"
    )


def _next_at_random(history: History, settings: Settings) -> Decision:
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


def _next_by_halving(history: History, settings: Settings) -> Decision:
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
                means = {one: history.mean(student, one, rung - 1) for one in alive}
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
            first = spread(reach, number)
            for seeds, wider in product(range(grid.seeds, 0, -1), WIDER):
                plan = _Halving(first, seeds, _kept(grid, number, wider))
                if _dearest(grid, plan) <= allowed:
                    return plan
    smallest = _Halving(spread(MIN_TEACHERS, MIN_TEACHERS), 1, _kept(grid, MIN_TEACHERS, 1))
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


def spread(total: int, number: int) -> tuple[int, ...]:
    """`number` of `total` places, evenly, with both ends."""
    return tuple(sorted({int(place) for place in np.linspace(0, total - 1, number).round()}))
