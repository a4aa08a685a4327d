"""A user's cells -> a loss surface, with what can and cannot be said of each of its coefficients.

Least squares from many starts with analytic gradients. N parameters, D tokens, L a loss in nats
per token, L_T the teacher's, as in `surface`. All coefficients but c0 are positive and are sought
by their logarithm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from capgap.errors import UserError
from capgap.law.surface import DistillationSurface, SupervisedSurface

Floats = NDArray[np.floating[Any]]
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

SUPERVISED_FORMS: dict[str, dict[str, float]] = {"full": {}, "chinchilla": {"gamma": 1.0}}
# without the gap term the student's loss is that of its teacher and a power law
DISTILLATION_FORMS: dict[str, dict[str, float]] = {
    "full": {},
    "no_gap": {"c1": 0.0, "f1": 1.0, "d1": 1.0},
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
    """`predict` gives losses [cells] and d loss / d coefficient [cells, coefficients]."""

    names: tuple[str, ...]
    fixed: dict[str, float]
    predict: Callable[[dict[str, float]], tuple[Floats, dict[str, Floats]]]
    losses: Floats
    errors: Floats

    def residuals(self, point: Floats) -> Floats:
        return (self.predict(self.values(point))[0] - self.losses) / self.errors

    def jacobian(self, point: Floats) -> Floats:
        values = self.values(point)
        slopes = self.predict(values)[1]
        columns = [slopes[name] * (1.0 if name in _LINEAR else values[name]) for name in self.names]
        return np.stack(columns, axis=1) / self.errors[:, None]

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

    `errors` are standard errors of the losses in nats, all alike if none. Forms: `full`, or
    `chinchilla` with gamma 1 (arXiv 2203.15556). UserError for too few cells, or numbers that are
    not positive and finite.
    """
    n, d, measured, scatter = _checked(parameters, tokens, losses, errors=errors)

    def predict(c: dict[str, float]) -> tuple[Floats, dict[str, Floats]]:
        power, slopes = _power(c, np.log(n), np.log(d))
        return c["E"] + power, slopes | {"E": np.ones_like(power)}

    names = ("E", "A", "B", "alpha", "beta", "gamma")
    problem = _problem(names, SUPERVISED_FORMS, form, predict, measured, scatter)

    def surface(values: dict[str, float]) -> SupervisedSurface:
        return SupervisedSurface(**values)

    return _fit(problem, form, surface, starts, seed, intervals)


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

    Forms: `full`, or `no_gap` without the term of the capacity gap, for cells whose teachers were
    never too good for their students. Otherwise as `fit_supervised`.
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
            "c1": -gain * c["f1"] * soft,
            "f1": -gain * c["c1"] * (soft - step * ratio),
            "d1": gain * c["c1"] * step / c["d1"],
        }
        return above + gain, found

    names = ("A", "B", "alpha", "beta", "gamma", "c0", "c1", "f1", "d1")
    problem = _problem(names, DISTILLATION_FORMS, form, predict, measured, scatter)

    def surface(values: dict[str, float]) -> DistillationSurface:
        return DistillationSurface(supervised=supervised, **values)

    return _fit(problem, form, surface, starts, seed, intervals)


def _power(c: dict[str, float], n: Floats, d: Floats) -> tuple[Floats, dict[str, Floats]]:
    """(A / N^alpha + B / D^beta)^gamma and its slopes, from logarithms of N and D."""
    first, second = np.log(c["A"]) - c["alpha"] * n, np.log(c["B"]) - c["beta"] * d
    both = np.logaddexp(first, second)
    power = np.exp(c["gamma"] * both)
    one, other = np.exp(first - both), np.exp(second - both)
    grown = c["gamma"] * power
    return power, {
        "A": grown * one / c["A"],
        "B": grown * other / c["B"],
        "alpha": -grown * one * n,
        "beta": -grown * other * d,
        "gamma": power * both,
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
    best = _solve(problem, best.x, precise=True)
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


def _solve(problem: _Problem, point: Floats, *, precise: bool = False) -> Any:
    lower, upper = problem.to_point(_BOUNDS)
    inside = np.clip(point, lower + 1e-9, upper - 1e-9)
    tolerance = 1e-15 if precise else 1e-10
    return least_squares(
        problem.residuals,
        inside,
        problem.jacobian,
        bounds=(lower, upper),
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=20_000 if precise else 400,
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
    limit = best.cost + 0.5 * CHI_SQUARED_90 * scale
    lower, upper = problem.to_point(_BOUNDS)
    found = {}
    for place, name in enumerate(problem.names):
        ends = []
        for side, bound in ((-1, lower[place]), (1, upper[place])):
            end = _profile_end(problem, best.x, place, side, bound, limit)
            if end is not None and name not in _LINEAR:
                end = float(np.exp(end))
            ends.append(end)
        found[name] = (ends[0], ends[1])
    return found


def _profile_end(
    problem: _Problem, point: Floats, place: int, side: int, bound: float, limit: float
) -> float | None:
    """The value of one coefficient at which the refitted cost crosses the limit; None where it
    does not before the bound."""
    name = problem.names[place]
    names = tuple(one for one in problem.names if one != name)
    rest = np.delete(point, place)

    def refitted(value: float) -> tuple[float, Floats]:
        fixed = float(value) if name in _LINEAR else float(np.exp(value))
        smaller = _Problem(
            names, problem.fixed | {name: fixed}, problem.predict, problem.losses, problem.errors
        )
        found = _solve(smaller, start)
        return found.cost, found.x

    start = rest
    inside, step = point[place], 1e-3
    for _ in range(60):
        outside = inside + side * step
        if (outside - bound) * side >= 0:
            return None
        cost, reached = refitted(outside)
        if cost > limit:
            break
        inside, start, step = outside, reached, 1.7 * step
    else:
        return None
    for _ in range(30):
        middle = 0.5 * (inside + outside)
        cost, reached = refitted(middle)
        if cost > limit:
            outside = middle
        else:
            inside, start = middle, reached
        if abs(outside - inside) < 1e-5 * max(1.0, abs(inside)):
            break
    return float(inside)
