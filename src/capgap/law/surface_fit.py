"""A user's cells -> a loss surface, with what can and cannot be said of each of its coefficients.

Least squares from many starts with analytic gradients. N parameters, D tokens, L a loss in nats
per token, L_T the teacher's, as in `surface`. All coefficients but c0 are positive and are sought
by their logarithm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, least_squares

from capgap.errors import UserError
from capgap.law.surface import DistillationSurface, Floats, SupervisedSurface, log_power_sum

Status = Literal["converged", "bound_hit", "not_identified", "not_converged"]

# (lower, upper) of every coefficient; a fit that ends at one says so
_BOUNDS = {
    "E": (1e-3, 20.0),
    "A": (1e-2, 1e9),
    "B": (1e-2, 1e9),
    "alpha": (0.02, 2.0),
    "beta": (0.02, 2.0),
    "gamma": (0.05, 5.0),
    "c0": (-10.0, 10.0),
    "c1": (1e-3, 1e5),
    "f1": (1e-3, 5.0),
    "d1": (0.2, 5.0),
}
_LINEAR = ("c0",)
# Between these the starts are drawn; narrower than the bounds
_STARTS = {
    "E": (0.5, 3.0),
    "A": (1e1, 1e5),
    "B": (1e1, 1e5),
    "alpha": (0.15, 0.7),
    "beta": (0.15, 0.7),
    "gamma": (0.3, 1.2),
    "c0": (0.0, 4.0),
    "c1": (1.0, 1e3),
    "f1": (0.03, 0.5),
    "d1": (0.8, 1.6),
}
# Ratio of the largest to the smallest singular value of the scaled Jacobian, above which a
# direction of the coefficients leaves no trace in the cells
IDENTIFIED = 1e7
CHI_SQUARED_90 = 2.706

# Cells that all have the same tokens say nothing about tokens
_ONE_BUDGET = {"B": 0.0, "beta": 1.0, "gamma": 1.0}
# Without the gap term the student's loss is that of its teacher and a power law
_NO_GAP = {"c1": 0.0, "f1": 1.0, "d1": 1.0}
# d1 and c1 both say where the gap sets in; cells seldom tell them apart
_FIXED_ONSET = {"d1": 1.0}
SUPERVISED_FORMS: dict[str, dict[str, float]] = {
    "full": {},
    "chinchilla": {"gamma": 1.0},
    "one_budget": _ONE_BUDGET,
}
DISTILLATION_FORMS: dict[str, dict[str, float]] = {
    "full": {},
    "fixed_onset": _FIXED_ONSET,
    "fixed_onset_chinchilla": _FIXED_ONSET | {"gamma": 1.0},
    "no_gap": _NO_GAP,
    "no_gap_chinchilla": _NO_GAP | {"gamma": 1.0},
    "one_budget": _ONE_BUDGET,
    "one_budget_fixed_onset": _ONE_BUDGET | _FIXED_ONSET,
    "one_budget_no_gap": _ONE_BUDGET | _NO_GAP,
}


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted surface and how far it can be trusted.

    status: converged; bound_hit (`at_bounds` names the coefficients); not_identified (some
    combination of coefficients leaves no trace in the cells: `condition` is too large, take a
    reduced form or more varied cells); not_converged. `intervals`: 90% profile intervals by name,
    None where they were not asked for; an end that reaches a bound is None. `deviation`: root mean
    square of the residuals in nats, over degrees of freedom.
    """

    surface: SupervisedSurface | DistillationSurface
    form: str
    status: Status
    at_bounds: tuple[str, ...]
    condition: float
    deviation: float
    cells: int
    intervals: dict[str, tuple[float | None, float | None]] | None


@dataclass(frozen=True)
class _Problem:
    """`predict` gives losses [cells], and for each coefficient their slopes [cells] along what it
    is sought by: its logarithm, or c0 itself."""

    names: tuple[str, ...]
    fixed: dict[str, float]
    predict: Callable[[dict[str, float]], tuple[Floats, dict[str, Floats]]]
    losses: Floats
    errors: Floats

    def residuals(self, point: Floats) -> Floats:
        return (self.predict(self.values(point))[0] - self.losses) / self.errors

    def jacobian(self, point: Floats) -> Floats:
        slopes = self.predict(self.values(point))[1]
        return np.stack([slopes[name] for name in self.names], axis=1) / self.errors[:, None]

    def values(self, point: Floats) -> dict[str, float]:
        free = zip(self.names, point, strict=True)
        found = {name: float(x) if name in _LINEAR else float(np.exp(x)) for name, x in free}
        return self.fixed | found

    def to_point(self, table: dict[str, tuple[float, float]]) -> tuple[Floats, Floats]:
        ends = np.array([table[name] for name in self.names])
        logs = np.array([name not in _LINEAR for name in self.names])
        ends[logs] = np.log(ends[logs])
        return ends[:, 0], ends[:, 1]


def fit_supervised(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    *,
    errors: ArrayLike | None = None,
    form: str = "full",
    starts: int = 24,
    seed: int = 0,
    intervals: bool = False,
) -> SurfaceFit:
    """L(N, D) from models that were trained without a teacher, arrays [cells].

    `errors` are standard errors of the losses in nats, all alike if none. Forms: `full`;
    `chinchilla` with gamma 1 (arXiv 2203.15556); `one_budget`, E + A / N^alpha, for models of the
    same tokens. UserError for too few cells, or numbers that are not positive and finite.
    """
    n, d, measured, scatter = _checked(parameters, tokens, losses, errors=errors)

    def predict(c: dict[str, float]) -> tuple[Floats, dict[str, Floats]]:
        power, slopes = _power(c, np.log(n), np.log(d))
        return c["E"] + power, slopes | {"E": np.full_like(power, c["E"])}

    names = ("E", "A", "B", "alpha", "beta", "gamma")
    problem = _problem(names, SUPERVISED_FORMS, form, predict, measured, scatter)
    return _fit(problem, form, lambda c: SupervisedSurface(**c), starts, seed, intervals)


def fit_distillation(
    parameters: ArrayLike,
    tokens: ArrayLike,
    teacher_losses: ArrayLike,
    losses: ArrayLike,
    supervised: SupervisedSurface,
    *,
    errors: ArrayLike | None = None,
    form: str = "full",
    starts: int = 24,
    seed: int = 0,
    intervals: bool = False,
) -> SurfaceFit:
    """L_S(N, D, L_T) from distilled students, arrays [cells], with the surface of undistilled ones.

    Forms: `full`; `fixed_onset` with d1 1; `no_gap` without the term of the capacity gap, for cells
    whose teachers were never too good for their students; both with gamma 1 besides as
    `fixed_onset_chinchilla` and `no_gap_chinchilla`; `one_budget`, `one_budget_fixed_onset` and
    `one_budget_no_gap` for students of the same tokens. Otherwise as `fit_supervised`.
    """
    n, d, above, measured, scatter = _checked(
        parameters, tokens, teacher_losses, losses, errors=errors
    )
    alone = supervised.loss(n, d)

    def predict(c: dict[str, float]) -> tuple[Floats, dict[str, Floats]]:
        power, slopes = _power(c, np.log(n), np.log(d))
        ratio = np.log(above / (c["d1"] * alone)) / c["f1"]
        soft = np.logaddexp(0.0, ratio)
        step = np.exp(ratio - soft)  # the logistic function of ratio
        factor = np.exp(-c["c0"] * np.log(above) - c["c1"] * c["f1"] * soft)
        gain = factor * power
        found = {name: factor * slope for name, slope in slopes.items()}
        found |= {
            "c0": -gain * np.log(above),
            "c1": -gain * c["c1"] * c["f1"] * soft,
            "f1": -gain * c["c1"] * c["f1"] * (soft - step * ratio),
            "d1": gain * c["c1"] * step,
        }
        return above + gain, found

    names = ("A", "B", "alpha", "beta", "gamma", "c0", "c1", "f1", "d1")
    problem = _problem(names, DISTILLATION_FORMS, form, predict, measured, scatter)
    return _fit(
        problem, form, lambda c: DistillationSurface(supervised, **c), starts, seed, intervals
    )


def _power(c: dict[str, float], n: Floats, d: Floats) -> tuple[Floats, dict[str, Floats]]:
    """(A / N^alpha + B / D^beta)^gamma and its slopes along the logarithms of the coefficients,
    from logarithms of N and D."""
    both, first, second = log_power_sum(c["A"], c["alpha"], n, c["B"], c["beta"], d)
    power = np.exp(c["gamma"] * both)
    one, other = np.exp(first - both), np.exp(second - both)
    grown = c["gamma"] * power
    return power, {
        "A": grown * one,
        "B": grown * other,
        "alpha": -grown * one * c["alpha"] * n,
        "beta": -grown * other * c["beta"] * d,
        "gamma": grown * both,
    }


def _checked(*columns: ArrayLike, errors: ArrayLike | None) -> tuple[Floats, ...]:
    arrays = [np.asarray(column, dtype=float) for column in columns]
    arrays.append(np.ones_like(arrays[0]) if errors is None else np.asarray(errors, dtype=float))
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1:
        raise UserError("a surface is fitted on columns of one length")
    for array in arrays:
        if not (np.isfinite(array) & (array > 0)).all():
            raise UserError(
                "a surface is fitted on sizes, tokens, losses and errors above 0 and finite: take "
                f"{array[~(np.isfinite(array) & (array > 0))][0]:g} out"
            )
    return tuple(arrays)


def _problem(
    names: tuple[str, ...],
    forms: dict[str, dict[str, float]],
    form: str,
    predict: Callable[[dict[str, float]], tuple[Floats, dict[str, Floats]]],
    losses: Floats,
    errors: Floats,
) -> _Problem:
    if form not in forms:
        raise UserError(f"no form {form!r} of this surface: take one of {', '.join(forms)}")
    free = tuple(name for name in names if name not in forms[form])
    if len(losses) <= len(free):
        raise UserError(
            f"{len(losses)} cells are too few for the {len(free)} coefficients of the form "
            f"{form!r}: give more, or take a reduced form"
        )
    return _Problem(free, forms[form], predict, losses, errors)


def _fit(
    problem: _Problem,
    form: str,
    surface: Callable[[dict[str, float]], SupervisedSurface | DistillationSurface],
    starts: int,
    seed: int,
    intervals: bool,
) -> SurfaceFit:
    low, high = problem.to_point(_STARTS)
    points = low + (high - low) * _spread(starts, len(low), seed)
    best = min((_solve(problem, point) for point in points), key=lambda found: found.cost)
    # the winner once more, to the last digit
    best = _solve(problem, best.x, tolerance=1e-15, evaluations=20_000)
    lower, upper = problem.to_point(_BOUNDS)
    at_bounds = tuple(
        name
        for name, x, least, most in zip(problem.names, best.x, lower, upper, strict=True)
        if min(x - least, most - x) < 1e-6
    )
    condition = _condition(problem.jacobian(best.x))
    status: Status = "converged"
    if not best.success:
        status = "not_converged"
    elif at_bounds:
        status = "bound_hit"
    elif condition > IDENTIFIED:
        status = "not_identified"
    freedom = len(problem.losses) - len(problem.names)
    residuals = problem.predict(problem.values(best.x))[0] - problem.losses
    return SurfaceFit(
        surface=surface(problem.values(best.x)),
        form=form,
        status=status,
        at_bounds=at_bounds,
        condition=condition,
        deviation=float(np.sqrt((residuals**2).sum() / freedom)),
        cells=len(problem.losses),
        intervals=_profiles(problem, best) if intervals else None,
    )


def _spread(count: int, dimensions: int, seed: int) -> Floats:
    """Points in the unit cube, evenly along every axis (a Latin hypercube)."""
    generator = np.random.default_rng(seed)
    places = np.stack([generator.permutation(count) for _ in range(dimensions)], axis=1)
    return (places + generator.random((count, dimensions))) / count


def _solve(
    problem: _Problem, point: Floats, *, tolerance: float = 1e-7, evaluations: int = 150
) -> Any:
    lower, upper = problem.to_point(_BOUNDS)
    inside = np.clip(point, lower + 1e-9, upper - 1e-9)
    return least_squares(
        problem.residuals,
        inside,
        problem.jacobian,
        bounds=(lower, upper),
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=evaluations,
    )


def _condition(jacobian: Floats) -> float:
    """Of the Jacobian with columns of length 1: whatever units the coefficients have."""
    lengths = np.linalg.norm(jacobian, axis=0)
    if not lengths.all():
        return float("inf")
    return float(np.linalg.cond(jacobian / lengths))


def _profiles(problem: _Problem, best: Any) -> dict[str, tuple[float | None, float | None]]:
    """Where the sum of squares, all others refitted, has grown by what 90% allow."""
    freedom = len(problem.losses) - len(problem.names)
    # errors that are given or not: the scatter about the surface is what counts, if it is larger
    scale = max(2 * best.cost / freedom, 1e-30)
    allowed = 0.5 * CHI_SQUARED_90 * scale
    lower, upper = problem.to_point(_BOUNDS)
    steps = _expected_steps(problem.jacobian(best.x), scale)
    found = {}
    for place, name in enumerate(problem.names):
        ends = []
        for step, bound in ((-steps[place], lower[place]), (steps[place], upper[place])):
            end = _profile_end(problem, best, place, step, bound, allowed)
            if end is not None and name not in _LINEAR:
                end = float(np.exp(end))
            ends.append(end)
        found[name] = (ends[0], ends[1])
    return found


def _expected_steps(jacobian: Floats, scale: float) -> Floats:
    """How far each coefficient would go to the end of its interval if the surface were flat."""
    _, lengths, directions = np.linalg.svd(jacobian, full_matrices=False)
    reach = directions / np.maximum(lengths, 1e-12 * lengths[0])[:, None]
    steps: Floats = np.sqrt(CHI_SQUARED_90 * scale * (reach**2).sum(axis=0))
    return np.clip(steps, 1e-12, 1.0)


def _profile_end(
    problem: _Problem, best: Any, place: int, step: float, bound: float, allowed: float
) -> float | None:
    """The value of one coefficient at which the refitted cost has grown by what is allowed; None
    where it does not before the bound."""
    name = problem.names[place]
    names = tuple(one for one in problem.names if one != name)
    start = np.delete(best.x, place)
    # refitted from another start a value may come out otherwise, and a sign with it
    known = {float(best.x[place]): -float(np.sqrt(allowed))}

    def excess(value: float) -> float:
        """About linear in the value, and 0 where the end is."""
        nonlocal start
        if value in known:
            return known[value]
        fixed = float(value) if name in _LINEAR else float(np.exp(value))
        smaller = _Problem(
            names, problem.fixed | {name: fixed}, problem.predict, problem.losses, problem.errors
        )
        found = _solve(smaller, start)
        start = found.x
        known[value] = float(np.sqrt(max(found.cost - best.cost, 0.0)) - np.sqrt(allowed))
        return known[value]

    nearer = min if step > 0 else max
    inside = float(best.x[place])
    outside = float(nearer(inside + step, bound))
    while excess(outside) < 0:
        if outside == bound:
            return None
        inside, step = outside, 1.7 * step
        outside = float(nearer(inside + step, bound))
    if inside == best.x[place]:
        start = np.delete(best.x, place)
    width = abs(outside - best.x[place])
    return float(brentq(excess, inside, outside, xtol=max(5e-3 * width, 1e-14), rtol=1e-12))
