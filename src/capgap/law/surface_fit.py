"""Loss surfaces fitted to one's own cells, with what can and cannot be said of each coefficient.

Least squares from many starts with analytic gradients. N parameters, D tokens, L a loss in nats
per token, L_T the teacher's, as in `surface`. All coefficients but c0 are positive.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, least_squares

from capgap.errors import UserError
from capgap.law.law import SurfacePart
from capgap.law.model import Floats
from capgap.law.surface import DistillationSurface, Slopes, SupervisedSurface

# Of every coefficient: its lowest value, the two between which starts are drawn, its highest value;
# a fit that ends at the lowest or the highest one says so
_RANGES = {
    "E": (1e-3, 0.5, 3.0, 20.0),
    "A": (1e-2, 1e1, 1e5, 1e9),
    "B": (1e-2, 1e1, 1e5, 1e9),
    "alpha": (0.02, 0.15, 0.7, 2.0),
    "beta": (0.02, 0.15, 0.7, 2.0),
    "gamma": (0.05, 0.3, 1.2, 5.0),
    "c0": (-10.0, 0.0, 4.0, 10.0),
    "c1": (1e-3, 1.0, 1e3, 1e5),
    "f1": (1e-3, 0.03, 0.5, 5.0),
    "d1": (0.2, 0.8, 1.6, 5.0),
}
_LINEAR = "c0"  # sought by itself, all others by their logarithm
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
SUPERVISED_FORMS = {"full": {}, "chinchilla": {"gamma": 1.0}, "one_budget": _ONE_BUDGET}
DISTILLATION_FORMS = {
    "full": {},
    "fixed_onset": _FIXED_ONSET,
    "fixed_onset_chinchilla": _FIXED_ONSET | {"gamma": 1.0},
    "no_gap": _NO_GAP,
    "no_gap_chinchilla": _NO_GAP | {"gamma": 1.0},
    "one_budget": _ONE_BUDGET,
    "one_budget_fixed_onset": _ONE_BUDGET | _FIXED_ONSET,
    "one_budget_no_gap": _ONE_BUDGET | _NO_GAP,
}
# What is sought on a surface, c0 by itself, all others by their logarithm
SUPERVISED = tuple(field.name for field in fields(SupervisedSurface))
DISTILLATION = tuple(field.name for field in fields(DistillationSurface))[1:]
AnySurface = SupervisedSurface | DistillationSurface


class SurfaceFit(SurfacePart):
    """A fitted surface and how far it can be trusted.

    status: converged; bound_hit (`at_bounds` names the coefficients); not_identified (some
    combination of coefficients leaves no trace in the cells: `condition` is too large, take a
    reduced form or more varied cells); not_converged. `intervals`: 90% profile intervals by name,
    empty unless asked for; an end that reaches a bound is None. `deviation`: root mean square of
    the residuals in nats, over degrees of freedom.
    """

    surface: AnySurface

    @property
    def part(self) -> SurfacePart:
        return SurfacePart(**self.model_dump(exclude={"surface"}))


@dataclass(frozen=True)
class _Problem:
    """Least squares over the coefficients `names`: `surface` makes one of all of them, which is
    asked at `columns`; these, losses and their standard errors [cells]."""

    names: tuple[str, ...]
    fixed: dict[str, float]
    surface: Callable[..., Any]
    columns: tuple[Floats, ...]
    losses: Floats
    errors: Floats

    def predict(self, point: Floats) -> tuple[Floats, Slopes]:
        return self.surface(**self.values(point)).with_slopes(*self.columns)

    def residuals(self, point: Floats) -> Floats:
        return (self.predict(point)[0] - self.losses) / self.errors

    def jacobian(self, point: Floats) -> Floats:
        slopes = self.predict(point)[1]
        return np.stack([slopes[name] for name in self.names], axis=1) / self.errors[:, None]

    def values(self, point: Floats) -> dict[str, float]:
        return self.fixed | {
            name: _value(name, x) for name, x in zip(self.names, point, strict=True)
        }

    def ranges(self) -> Floats:
        """[4, coefficients] of _RANGES, as points."""
        ends = np.array([_RANGES[name] for name in self.names]).T
        logs = np.array([name != _LINEAR for name in self.names])
        ends[:, logs] = np.log(ends[:, logs])
        return ends


def _value(name: str, x: float) -> float:
    return float(x) if name == _LINEAR else float(np.exp(x))


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
    """L(N, D) from models that were trained without a teacher, arrays [cells]: least squares from
    many starts with analytic gradients.

    `errors` are standard errors of the losses in nats, all alike if none. Forms: `full`;
    `chinchilla` with gamma 1 (arXiv 2203.15556); `one_budget`, E + A / N^alpha, for models of the
    same tokens. UserError for too few cells, or numbers that are not positive and finite.
    """
    columns = _checked(parameters, tokens, losses, errors=errors)
    problem = _problem(SupervisedSurface, SUPERVISED, SUPERVISED_FORMS, form, columns)
    return _fit(problem, form, starts, seed, intervals)


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
    n, d, above, *measured = _checked(parameters, tokens, teacher_losses, losses, errors=errors)
    columns = (n, d, above, supervised.loss(n, d), *measured)
    surface = partial(DistillationSurface, supervised)
    problem = _problem(surface, DISTILLATION, DISTILLATION_FORMS, form, columns)
    return _fit(problem, form, starts, seed, intervals)


def _checked(*columns: ArrayLike, errors: ArrayLike | None) -> tuple[Floats, ...]:
    arrays = [np.asarray(column, dtype=float) for column in columns]
    arrays.append(np.ones_like(arrays[0]) if errors is None else np.asarray(errors, dtype=float))
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1:
        raise UserError("a surface is fitted on columns of one length")
    every = np.concatenate(arrays)
    wrong = every[~(np.isfinite(every) & (every > 0))]
    if len(wrong):
        raise UserError(
            "a surface is fitted on sizes, tokens, losses and errors above 0 and finite: take "
            f"{wrong[0]:g} out"
        )
    return tuple(arrays)


def _problem(
    surface: Callable[..., AnySurface],
    names: tuple[str, ...],
    forms: dict[str, dict[str, float]],
    form: str,
    columns: tuple[Floats, ...],
) -> _Problem:
    *asked, losses, errors = columns
    if form not in forms:
        raise UserError(f"no form {form!r} of this surface: take one of {', '.join(forms)}")
    free = tuple(name for name in names if name not in forms[form])
    if len(losses) <= len(free):
        raise UserError(
            f"{len(losses)} cells are too few for the {len(free)} coefficients of the form "
            f"{form!r}: give more, or take a reduced form"
        )
    return _Problem(free, forms[form], surface, tuple(asked), losses, errors)


def _fit(problem: _Problem, form: str, starts: int, seed: int, intervals: bool) -> SurfaceFit:
    lower, low, high, upper = problem.ranges()
    # evenly along every axis (a Latin hypercube)
    generator = np.random.default_rng(seed)
    strata = np.stack([generator.permutation(starts) for _ in low], axis=1)
    points = low + (high - low) * ((strata + generator.random(strata.shape)) / starts)
    best = min((_solve(problem, point) for point in points), key=lambda found: found.cost)
    # the winner once more, to the last digit
    best = _solve(problem, best.x, tolerance=1e-15, evaluations=20_000)
    at_bounds = tuple(
        name
        for name, x, least, most in zip(problem.names, best.x, lower, upper, strict=True)
        if min(x - least, most - x) < 1e-6
    )
    jacobian = problem.jacobian(best.x)
    # with columns of length 1: whatever units the coefficients have
    lengths = np.linalg.norm(jacobian, axis=0)
    condition = float(np.linalg.cond(jacobian / lengths)) if lengths.all() else math.inf
    status = "converged"
    if not best.success:
        status = "not_converged"
    elif at_bounds:
        status = "bound_hit"
    elif condition > IDENTIFIED:
        status = "not_identified"
    freedom = len(problem.losses) - len(problem.names)
    residuals = problem.predict(best.x)[0] - problem.losses
    fitted = problem.surface(**problem.values(best.x))
    coefficients = asdict(fitted)
    coefficients.pop("supervised", None)
    return SurfaceFit(
        surface=fitted,
        form=form,
        status=status,
        coefficients=coefficients,
        intervals=_profiles(problem, best) if intervals else {},
        at_bounds=at_bounds,
        condition=condition if math.isfinite(condition) else None,
        deviation=float(np.sqrt((residuals**2).sum() / freedom)),
        points=len(problem.losses),
    )


def _solve(
    problem: _Problem, point: Floats, *, tolerance: float = 1e-7, evaluations: int = 150
) -> Any:
    lower, _, _, upper = problem.ranges()
    return least_squares(
        problem.residuals,
        np.clip(point, lower + 1e-9, upper - 1e-9),
        problem.jacobian,
        bounds=(lower, upper),
        x_scale="jac",
        max_nfev=evaluations,
        **dict.fromkeys(("ftol", "xtol", "gtol"), tolerance),
    )


def _profiles(problem: _Problem, best: Any) -> dict[str, tuple[float | None, float | None]]:
    """Where the sum of squares, all others refitted, has grown by what 90% allow."""
    freedom = len(problem.losses) - len(problem.names)
    # errors that are given or not: the scatter about the surface is what counts, if it is larger
    scale = max(2 * best.cost / freedom, 1e-30)
    allowed = 0.5 * CHI_SQUARED_90 * scale
    lower, _, _, upper = problem.ranges()
    # how far each coefficient would go to the end of its interval if the surface were flat
    _, lengths, directions = np.linalg.svd(problem.jacobian(best.x), full_matrices=False)
    reach = directions / np.maximum(lengths, 1e-12 * lengths[0])[:, None]
    steps = np.clip(np.sqrt(CHI_SQUARED_90 * scale * (reach**2).sum(axis=0)), 1e-12, 1.0)
    return {
        name: (
            _profile_end(problem, best, i, -steps[i], lower[i], allowed),
            _profile_end(problem, best, i, steps[i], upper[i], allowed),
        )
        for i, name in enumerate(problem.names)
    }


def _profile_end(
    problem: _Problem, best: Any, index: int, step: float, bound: float, allowed: float
) -> float | None:
    """The value of a coefficient at which the refitted cost has grown by what is allowed; None
    where it does not before the bound."""
    name, best_x = problem.names[index], float(best.x[index])
    names = tuple(other for other in problem.names if other != name)
    start = np.delete(best.x, index)
    # refitted from another start a value may come out otherwise, and a sign with it
    known = {best_x: -float(np.sqrt(allowed))}

    def excess(value: float) -> float:
        """About linear in the value, and 0 where the end is."""
        nonlocal start
        if value in known:
            return known[value]
        fixed = problem.fixed | {name: _value(name, value)}
        refitted = _solve(replace(problem, names=names, fixed=fixed), start)
        start = refitted.x
        known[value] = float(np.sqrt(max(refitted.cost - best.cost, 0.0)) - np.sqrt(allowed))
        return known[value]

    nearer = min if step > 0 else max
    inside, outside = best_x, float(nearer(best_x + step, bound))
    while excess(outside) < 0:
        if outside == bound:
            return None
        inside, step = outside, 1.7 * step
        outside = float(nearer(inside + step, bound))
    if inside == best_x:
        start = np.delete(best.x, index)
    tolerance = max(5e-3 * abs(outside - best_x), 1e-14)
    return _value(name, brentq(excess, inside, outside, xtol=tolerance, rtol=1e-12))
