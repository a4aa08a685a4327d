"""A grid that can be searched, and a search's model of it: a Gaussian process over teachers,
students and tokens.

A loss is the level of its student and rung, which is left free, plus the effect of the teacher: a
quadratic in ln T, smooth deviations from it and a deviation of each teacher's own, all of which
change slowly with ln S and ln tokens. So short runs speak for long ones as far as the rungs agree,
and students speak for each other. The scales are not chosen but averaged over, each by how likely
it makes what was measured.

S students, T teachers, R rungs (token budgets, the last is the one asked for), and S T R cells.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.special import ndtr

from capgap.errors import UserError
from capgap.law.model import Floats, Integers
from capgap.sweep.recipe import SearchSettings

MIN_TEACHERS = 2
RULE_RATIO = 2.5  # arXiv 2311.07052
LEVEL_DEVIATION = 2.0  # of the common level and its trends, nats per token
OWN_LEVEL_DEVIATION = 0.05  # of a student's level on a rung from the trends
EFFECTS = (0.01, 0.03, 0.1, 0.3)  # of teachers, nats per token at the edge of the grid
NOISES = (0.001, 0.003, 0.01, 0.03)  # of a rerun, nats per token
RUNG_LENGTHS = (0.7, 2.0)  # in units of the distance from the shortest rung to the last
ROUGHNESS = (0.1, 0.4)  # deviations from the quadratic, as a share of the effect
KEPT_SCALES = 8
START_TEACHERS = 5
START_SHARE = 0.4  # of the budget, at most, for the first runs
COLUMNS_A_ROUND = 2
DRAWS = 512


class Run(NamedTuple):
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

    def cells(self, runs: Iterable[Run]) -> Integers:
        """Numbers of the runs' cells, the rung fastest: [runs]."""
        found = np.array([run[:3] for run in runs], dtype=np.int64).reshape(-1, 3)
        return np.asarray(np.ravel_multi_index(tuple(found.T), self.run_flops.shape))

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
            fed = run.teacher, run.seed
            longest[fed] = max(run.rung, longest.get(fed, 0))
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
        return any(run[:2] == (student, teacher) for run in self.failed)

    def is_possible(self, student: int, teacher: int) -> bool:
        """Whether the teacher was tried for the student, or could still be, and did not fail."""
        tried = any(run[:2] == (student, teacher) for run in self.done)
        full = Run(student, teacher, self.grid.last, 0)
        return not self.is_broken(student, teacher) and (tried or self.fits([full]))


@dataclass(frozen=True)
class Beliefs:
    """What is known of the losses without the noise of a run, under each of K settings of the
    scales: how likely the setting is, and mean and covariance of all cells under it."""

    weights: Floats  # [K], their sum is 1
    noises: Floats  # [K]
    means: Floats  # [K, cells]
    covariances: Floats  # [K, cells, cells]


def decide(grid: SearchGrid, rounds: Sequence[Round], settings: SearchSettings) -> Decision:
    """The next batch of runs, or the end, after these rounds of any grid: a pure function of both,
    without torch, so that a search that was stopped takes the same decisions again.

    The first runs are spread over the teachers; then what tells most per FLOP; then each chosen
    teacher at full tokens, which is kept in reserve from the beginning. UserError: fewer than two
    teachers, or a budget that the search cannot even begin with.
    """
    if len(grid.teachers) < MIN_TEACHERS:
        raise UserError("a search needs two teachers or more: there is nothing to choose from")
    history = History(grid, rounds, settings.budget)
    if not history.done:
        return Decision(_start(grid, settings), "start: short runs spread over the teachers", ())
    if not history.losses:
        return Decision((), "", (), "exhausted")  # all that was tried has failed
    beliefs = fit(history)
    choices = _choices(history, beliefs, settings)
    unsafe = [one.student for one in choices if (one.safe_probability or 0) < settings.confidence]
    unmeasured: list[Run] = []
    for run in _confirmation(history, choices):
        if history.fits([*unmeasured, run]):
            unmeasured.append(run)
    if unsafe:
        runs = _most_telling(history, beliefs, choices, unsafe)
        if runs:
            return Decision(runs, f"tells most per FLOP about {len(unsafe)} open students", choices)
    if unmeasured:
        return Decision(tuple(unmeasured), "the chosen teachers at full tokens", choices)
    if not unsafe:
        return Decision((), "", choices, "safe")
    everything = all(set(grid.runs(rung)) <= history.tried for rung in range(len(grid.tokens)))
    return Decision((), "", choices, "exhausted" if everything else "budget")


def too_small(grid: SearchGrid, needed: float, budget: float) -> UserError:
    """The budget does not even pay for what a search needs at least."""
    return UserError(
        f"budget {budget:g} is too small for this grid: the search needs at least "
        f"{needed / grid.full_flops:.4f} of the full grid's FLOPs; give more, or more rungs"
    )


def spread(total: int, number: int) -> list[int]:
    """`number` of `total` indices, evenly, with both ends."""
    return sorted({round(index) for index in np.linspace(0, total - 1, number).tolist()})


def rule_choices(grid: SearchGrid) -> tuple[Choice, ...]:
    """The teacher nearest to 2.5 times each student, by ratio; nothing is run (2311.07052)."""
    distance = np.abs(np.log(grid.teachers / (RULE_RATIO * grid.students[:, None])))
    return tuple(Choice(student, int(row.argmin()), None) for student, row in enumerate(distance))


def fit(history: History) -> Beliefs:
    """The likeliest settings of the scales, given the losses so far."""
    grid = history.grid
    where = grid.cells(history.losses)
    losses = np.array(list(history.losses.values()))
    level = losses.mean() if len(losses) else 0.0
    found = []
    for prior, noise in _priors(grid):
        seen = prior[np.ix_(where, where)] + noise**2 * np.eye(len(where))
        root = cholesky(seen, lower=True)
        solved = cho_solve((root, True), losses - level)
        evidence = -0.5 * (losses - level) @ solved - np.log(np.diag(root)).sum()
        found.append((float(evidence), noise, prior, root, solved))
    found.sort(key=lambda one: -one[0])
    found = found[:KEPT_SCALES]
    weights = np.exp([one[0] - found[0][0] for one in found])
    weights /= weights.sum()
    means, covariances = [], []
    for _, _, prior, root, solved in found:
        across = prior[:, where]
        means.append(level + across @ solved)
        covariances.append(prior - across @ cho_solve((root, True), across.T))
    noises = np.array([one[1] for one in found])
    return Beliefs(weights, noises, np.array(means), np.array(covariances))


def _priors(grid: SearchGrid) -> Iterator[tuple[Floats, float]]:
    """Covariance of the losses [cells, cells] and the noise of a run, for all scales."""
    students, teachers, rungs = np.indices(grid.run_flops.shape).reshape(3, -1)
    # ln T and ln S on one scale, on which teachers reach from -1 to 1, ln tokens from -1 to 0
    logs, student_logs = np.log(grid.teachers), np.log(grid.students)
    half = max(1e-9, (logs[-1] - logs[0]) / 2)
    x = ((logs - (logs[0] + logs[-1]) / 2) / half)[teachers]
    z = ((student_logs - student_logs.mean()) / half)[students]
    w = np.log(grid.tokens / grid.tokens[-1])
    w = (w / max(1e-9, -w[0]))[rungs]
    own_level = np.equal.outer(students, students) & np.equal.outer(rungs, rungs)
    trends = np.outer(w, w) + np.outer(z, z) + 0.1 * (np.outer(w**2, w**2) + np.outer(w * z, w * z))
    level = LEVEL_DEVIATION**2 * (1 + trends) + OWN_LEVEL_DEVIATION**2 * own_level
    quadratic = np.outer(x, x) + np.outer(x**2, x**2)
    smooth = np.exp(-0.5 * (np.subtract.outer(x, x) / 0.5) ** 2)
    own = 0.5 * np.equal.outer(teachers, teachers)
    over_students = np.exp(-0.5 * np.subtract.outer(z, z) ** 2)
    for length, rough in product(RUNG_LENGTHS, ROUGHNESS):
        over_rungs = np.exp(-0.5 * (np.subtract.outer(w, w) / length) ** 2)
        shape = (quadratic + rough**2 * (smooth + own)) * over_students * over_rungs
        for effect, noise in product(EFFECTS, NOISES):
            yield level + effect**2 * shape, noise


def _start(grid: SearchGrid, settings: SearchSettings) -> tuple[Run, ...]:
    """All students on the shortest rung, from as many as five teachers that are spread over the
    grid, fewer or smaller ones where those are too dear."""
    students = range(len(grid.students))
    allowed = settings.budget * grid.full_flops
    total = len(grid.teachers)

    def runs(teachers: Sequence[int]) -> list[Run]:
        return [Run(student, teacher, 0, 0) for teacher in teachers for student in students]

    for reach in range(total, MIN_TEACHERS - 1, -1):
        for number in range(min(START_TEACHERS, reach), min(MIN_TEACHERS, reach - 1), -1):
            first = runs(spread(reach, number))
            if grid.flops(first) <= START_SHARE * allowed:
                return tuple(first)
    first = runs(range(MIN_TEACHERS))
    if grid.flops(first) > allowed:
        raise too_small(grid, grid.flops(first), settings.budget)
    return tuple(first)


def _choices(history: History, beliefs: Beliefs, settings: SearchSettings) -> tuple[Choice, ...]:
    """Each student's teacher with the lowest expected loss at full tokens, among those that were
    tried or could still be."""
    grid = history.grid
    draws = np.random.default_rng(settings.seed).standard_normal((DRAWS, len(grid.teachers)))
    choices = []
    for student in range(len(grid.students)):
        teachers = range(len(grid.teachers))
        where = grid.cells(Run(student, teacher, grid.last, 0) for teacher in teachers)
        possible = np.array([history.is_possible(student, teacher) for teacher in teachers])
        if not possible.any():
            continue
        means = beliefs.means[:, where]
        teacher = int(np.where(possible, beliefs.weights @ means, np.inf).argmin())
        loss = float(beliefs.weights @ means[:, teacher])
        variance, regret, safe = 0.0, 0.0, 0.0
        for weight, mean, whole in zip(beliefs.weights, means, beliefs.covariances, strict=True):
            own = whole[np.ix_(where, where)]
            values, vectors = np.linalg.eigh(own)
            # rounding may have made it slightly indefinite
            drawn = mean + draws @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
            lost = drawn[:, teacher] - drawn[:, possible].min(axis=1)
            variance += weight * (own[teacher, teacher] + (mean[teacher] - loss) ** 2)
            regret += weight * float(lost.mean())
            safe += weight * float((lost <= settings.tolerance * loss).mean())
        seeds = sum(run[:3] == (student, teacher, grid.last) for run in history.losses)
        error = float(np.sqrt(variance))
        choices.append(Choice(student, teacher, loss, error, regret, safe, seeds))
    return tuple(choices)


def _confirmation(history: History, choices: Sequence[Choice]) -> list[Run]:
    """The chosen teachers' runs at full tokens where there is none yet, the least certain first."""
    open_first = sorted(choices, key=lambda one: -(one.expected_regret or 0.0))
    return [
        Run(one.student, one.teacher, history.grid.last, 0) for one in open_first if one.runs == 0
    ]


def _most_telling(
    history: History, beliefs: Beliefs, choices: Sequence[Choice], unsafe: Sequence[int]
) -> tuple[Run, ...]:
    """A round: up to two batches, each a teacher on one rung for open students, the one with the
    largest expected improvement of the choices per FLOP first."""
    grid = history.grid
    chosen: list[Run] = []
    # they will be made anyway, and another teacher's full run says little without them
    coming = _confirmation(history, choices)
    if coming:
        beliefs = _after(grid, beliefs, coming)
    for _ in range(COLUMNS_A_ROUND):
        best, value = None, 0.0
        for runs in _candidates(history, unsafe, set(chosen)):
            left = [run for run in _confirmation(history, choices) if run not in runs + chosen]
            everything = chosen + runs
            if not history.fits(everything, grid.flops(left, history.done + everything)):
                continue
            flops = grid.flops(everything, history.done) - grid.flops(chosen, history.done)
            gain = _improvement(grid, beliefs, choices, runs) / max(1, flops)
            if gain > value:
                best, value = runs, gain
        if best is None:
            break
        chosen += best
        beliefs = _after(grid, beliefs, best)
    return tuple(chosen)


def _candidates(history: History, unsafe: Sequence[int], taken: set[Run]) -> Iterator[list[Run]]:
    """For every teacher and rung: all open students together, and each alone, on the first seed
    that was not run."""
    grid = history.grid
    for teacher in range(len(grid.teachers)):
        open_students = [one for one in unsafe if not history.is_broken(one, teacher)]
        for rung in range(len(grid.tokens)):
            runs = []
            for student in open_students:
                for seed in range(grid.seeds):
                    run = Run(student, teacher, rung, seed)
                    if run not in history.tried and run not in taken:
                        runs.append(run)
                        break
            if len(runs) > 1:
                yield runs
            yield from ([run] for run in runs)


def _improvement(
    grid: SearchGrid, beliefs: Beliefs, choices: Sequence[Choice], runs: Sequence[Run]
) -> float:
    """Expected improvement of the choices, relative to their losses, by the runs' results: the
    knowledge gradient, summed over pairs of the chosen and another teacher."""
    at = grid.cells(runs)
    students = [choice.student for choice in choices]
    teachers = [choice.teacher for choice in choices]
    losses = np.array([choice.loss for choice in choices])
    full = slice(grid.last, None, len(grid.tokens))
    across = beliefs.covariances[:, at, full]
    across = np.linalg.solve(np.linalg.cholesky(_noisy(beliefs, at)), across)
    across = across.reshape(*across.shape[:2], len(grid.students), len(grid.teachers))
    across = across[:, :, students]  # [K, runs, choices, T]
    chosen = np.arange(len(choices)), teachers
    apart = across - across[:, :, *chosen][..., None]
    moved = np.maximum(np.sqrt((apart**2).sum(axis=1)), 1e-12)  # [K, choices, T]
    means = beliefs.means[:, full]
    means = means.reshape(len(means), len(grid.students), len(grid.teachers))[:, students]
    behind = (means - means[:, *chosen][..., None]) / moved
    density = np.exp(-0.5 * behind**2) / np.sqrt(2 * np.pi)
    gains = moved * (density - behind * ndtr(-behind)) / losses[:, None]
    gains[:, *chosen] = 0.0
    return float(beliefs.weights @ gains.sum(axis=(1, 2)))


def _after(grid: SearchGrid, beliefs: Beliefs, runs: Sequence[Run]) -> Beliefs:
    """The beliefs once the runs are made: what is uncertain follows without their losses."""
    at = grid.cells(runs)
    across = beliefs.covariances[:, at]
    less = across.transpose(0, 2, 1) @ np.linalg.solve(_noisy(beliefs, at), across)
    return replace(beliefs, covariances=beliefs.covariances - less)


def _noisy(beliefs: Beliefs, at: Integers) -> Floats:
    """Covariance of what runs of these cells show: [K, runs, runs]."""
    noise = beliefs.noises[:, None, None] ** 2 * np.eye(len(at))
    return beliefs.covariances[:, at[:, None], at] + noise
