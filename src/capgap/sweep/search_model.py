"""The search's model of a grid: a Gaussian process over teachers, students and tokens.

A loss is the level of its student and rung, which is left free, plus the effect of the teacher: a
quadratic in ln T, smooth deviations from it and a deviation of each teacher's own, all of which
change slowly with ln S and ln tokens. So short runs speak for long ones as far as the rungs agree,
and students speak for each other. The scales are not chosen but averaged over, each by how likely
it makes what was measured.

S students, T teachers, R rungs; places are the S T R cells, rung fastest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.special import ndtr

from capgap.errors import UserError
from capgap.law.model import Floats, Integers
from capgap.sweep.search_grid import (
    MIN_TEACHERS,
    Choice,
    Decision,
    History,
    Round,
    Run,
    SearchGrid,
    Settings,
    spread,
    too_small,
)

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


@dataclass(frozen=True)
class Beliefs:
    """What is known of the losses without the noise of a run, under each of K settings of the
    scales: how likely the setting is, and mean and covariance of all places under it."""

    weights: Floats  # [K], their sum is 1
    noises: Floats  # [K]
    means: Floats  # [K, places]
    covariances: Floats  # [K, places, places]


def decide(grid: SearchGrid, rounds: Sequence[Round], settings: Settings) -> Decision:
    """The next batch of runs, or the end, after these rounds: a pure function of both, so that a
    search that was stopped takes the same decisions again.

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
    unmeasured = _affordable(history, _confirmation(history, choices))
    if unsafe:
        runs = _most_telling(history, beliefs, choices, unsafe)
        if runs:
            return Decision(runs, f"tells most per FLOP about {len(unsafe)} open students", choices)
    if unmeasured:
        return Decision(unmeasured, "the chosen teachers at full tokens", choices)
    if not unsafe:
        return Decision((), "", choices, "safe")
    everything = all(set(grid.runs(rung)) <= history.tried for rung in range(len(grid.tokens)))
    return Decision((), "", choices, "exhausted" if everything else "budget")


def rule_choices(grid: SearchGrid) -> tuple[Choice, ...]:
    """The teacher nearest to 2.5 times each student, by ratio; nothing is run (2311.07052)."""
    distance = np.abs(np.log(grid.teachers / (RULE_RATIO * grid.students[:, None])))
    return tuple(Choice(student, int(row.argmin()), None) for student, row in enumerate(distance))


def fit(history: History) -> Beliefs:
    """The likeliest settings of the scales, given the losses so far."""
    grid = history.grid
    runs = list(history.losses)
    where = np.array([_place(grid, run) for run in runs], dtype=np.int64)
    losses = np.array([history.losses[run] for run in runs])
    level = losses.mean() if runs else 0.0
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
    """Covariance of the losses [places, places] and the noise of a run, for all scales."""
    x, z, w = _coordinates(grid)
    students, teachers, rungs = _indices(grid)
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


def _coordinates(grid: SearchGrid) -> tuple[Floats, Floats, Floats]:
    """ln T and ln S on one scale, on which the teachers reach from -1 to 1, and ln tokens from -1
    to 0: each [places]."""
    students, teachers, rungs = _indices(grid)
    logs = np.log(grid.teachers)
    half = max(1e-9, (logs[-1] - logs[0]) / 2)
    x = (logs - (logs[0] + logs[-1]) / 2) / half
    z = (np.log(grid.students) - np.log(grid.students).mean()) / half
    w = np.log(grid.tokens / grid.tokens[-1])
    return x[teachers], z[students], (w / max(1e-9, -w[0]))[rungs]


def _indices(grid: SearchGrid) -> tuple[Integers, Integers, Integers]:
    counts = (len(grid.students), len(grid.teachers), len(grid.tokens))
    students, teachers, rungs = np.indices(counts).reshape(3, -1)
    return students, teachers, rungs


def _place(grid: SearchGrid, run: Run) -> int:
    return (run.student * len(grid.teachers) + run.teacher) * len(grid.tokens) + run.rung


def _at_full_tokens(grid: SearchGrid, student: int) -> Integers:
    """Places of one student's cells: [T]."""
    return np.array(
        [_place(grid, Run(student, teacher, grid.last, 0)) for teacher in range(len(grid.teachers))]
    )


def _start(grid: SearchGrid, settings: Settings) -> tuple[Run, ...]:
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


def _choices(history: History, beliefs: Beliefs, settings: Settings) -> tuple[Choice, ...]:
    """Each student's teacher with the lowest expected loss at full tokens, among those that were
    tried or could still be."""
    grid = history.grid
    draws = np.random.default_rng(settings.seed).standard_normal((DRAWS, len(grid.teachers)))
    choices = []
    for student in range(len(grid.students)):
        where = _at_full_tokens(grid, student)
        possible = np.array(
            [_is_possible(history, student, teacher) for teacher in range(len(grid.teachers))]
        )
        if not possible.any():
            continue
        means = beliefs.means[:, where]
        teacher = int(np.where(possible, beliefs.weights @ means, np.inf).argmin())
        loss = float(beliefs.weights @ means[:, teacher])
        variance, regret, safe = 0.0, 0.0, 0.0
        for weight, mean, whole in zip(beliefs.weights, means, beliefs.covariances, strict=True):
            own = whole[np.ix_(where, where)]
            drawn = mean + draws @ _root(own).T
            lost = drawn[:, teacher] - drawn[:, possible].min(axis=1)
            variance += weight * (own[teacher, teacher] + (mean[teacher] - loss) ** 2)
            regret += weight * float(lost.mean())
            safe += weight * float((lost <= settings.tolerance * loss).mean())
        choices.append(
            Choice(
                student, teacher, loss, float(np.sqrt(variance)), regret, safe,
                history.count(student, teacher),
            )
        )  # fmt: skip
    return tuple(choices)


def _is_possible(history: History, student: int, teacher: int) -> bool:
    if history.is_broken(student, teacher):
        return False
    grid = history.grid
    tried = any((one.student, one.teacher) == (student, teacher) for one in history.done)
    return tried or history.fits([Run(student, teacher, grid.last, 0)])


def _confirmation(history: History, choices: Sequence[Choice]) -> list[Run]:
    """The chosen teachers' runs at full tokens where there is none yet, the least certain first."""
    open_first = sorted(choices, key=lambda one: -(one.expected_regret or 0.0))
    return [
        Run(one.student, one.teacher, history.grid.last, 0) for one in open_first if one.runs == 0
    ]


def _affordable(history: History, runs: Sequence[Run]) -> tuple[Run, ...]:
    """As many of the runs as the budget still pays for, in their order."""
    taken: list[Run] = []
    for run in runs:
        if history.fits([*taken, run]):
            taken.append(run)
    return tuple(taken)


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
    at = np.array([_place(grid, run) for run in runs])
    students = [choice.student for choice in choices]
    teachers = [choice.teacher for choice in choices]
    losses = np.array([choice.loss for choice in choices])
    last = len(grid.tokens) - 1
    across = beliefs.covariances[:, at, last :: len(grid.tokens)]
    across = np.linalg.solve(np.linalg.cholesky(_noisy(beliefs, at)), across)
    across = across.reshape(*across.shape[:2], len(grid.students), len(grid.teachers))
    across = across[:, :, students]  # [K, runs, choices, T]
    chosen = np.arange(len(choices)), teachers
    apart = across - across[:, :, *chosen][..., None]
    moved = np.maximum(np.sqrt((apart**2).sum(axis=1)), 1e-12)  # [K, choices, T]
    means = beliefs.means[:, last :: len(grid.tokens)]
    means = means.reshape(len(means), len(grid.students), len(grid.teachers))[:, students]
    behind = (means - means[:, *chosen][..., None]) / moved
    density = np.exp(-0.5 * behind**2) / np.sqrt(2 * np.pi)
    gains = moved * (density - behind * ndtr(-behind)) / losses[:, None]
    gains[:, *chosen] = 0.0
    return float(beliefs.weights @ gains.sum(axis=(1, 2)))


def _after(grid: SearchGrid, beliefs: Beliefs, runs: Sequence[Run]) -> Beliefs:
    """The beliefs once the runs are made: what is uncertain follows without their losses."""
    at = np.array([_place(grid, run) for run in runs])
    across = beliefs.covariances[:, at]
    less = across.transpose(0, 2, 1) @ np.linalg.solve(_noisy(beliefs, at), across)
    return replace(beliefs, covariances=beliefs.covariances - less)


def _noisy(beliefs: Beliefs, at: Integers) -> Floats:
    """Covariance of what runs at these places show: [K, runs, runs]."""
    noise = beliefs.noises[:, None, None] ** 2 * np.eye(len(at))
    return beliefs.covariances[:, at[:, None], at] + noise


def _root(covariance: Floats) -> Floats:
    """A square root of a covariance that rounding may have made slightly indefinite."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))
