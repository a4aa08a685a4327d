"""A grid that can be searched, the rounds of a search, and what they have cost and shown.

S students, T teachers, R rungs (token budgets, the last is the one asked for), N seeds.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from capgap.errors import UserError
from capgap.law.model import Floats, Integers

MIN_TEACHERS = 2


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
    tolerance; None where nothing is expected. `runs`: how many of its runs had full tokens.
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
    tolerance: float = 0.0025
    confidence: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise UserError(
                f"budget {self.budget:g} is no share of the full grid: give more than 0, at most 1"
            )
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

    def count(self, student: int, teacher: int) -> int:
        """Seeds at full tokens."""
        return sum(
            (run.student, run.teacher, run.rung) == (student, teacher, self.grid.last)
            for run in self.losses
        )


def too_small(grid: SearchGrid, needed: float, budget: float) -> UserError:
    """The budget does not even pay for what a search needs at least."""
    return UserError(
        f"budget {budget:g} is too small for this grid: the search needs at least "
        f"{needed / grid.full_flops:.4f} of the full grid's FLOPs; give more, or more rungs"
    )


def spread(total: int, number: int) -> tuple[int, ...]:
    """`number` of `total` places, evenly, with both ends."""
    return tuple(sorted({int(place) for place in np.linspace(0, total - 1, number).round()}))
