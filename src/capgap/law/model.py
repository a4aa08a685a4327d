"""All curves of an architecture as smooth functions of the capacity gap, fitted together.

y is a loss in nats per token, x = ln(T/S); a cell is one run. For a cell of curve c,

    y = quadratic_c(x) + departure_c(x) + seed_c + luck(training) + documents + own noise

- The quadratic and the level of a seed are each curve's own, with a flat prior.
- The departure is a sum of higher Legendre polynomials with small coefficients, because loss rises
  faster on one side of an optimum than on the other. Curves of a kind have most of it in common:
  that part is hardly held back, for a skew that was taken for noise would move all optima alike.
- The luck of a teacher is what it is better or worse than its size says. Every student that one
  training of a teacher taught has it in common, whatever its size, tokens or first weights; what it
  gives to students of one kind alone is a second, smaller part.
- Held-out documents are a sample: the strongest patterns in which they prefer larger or smaller
  teachers are carried, and what is left of their scatter stays with each point.

A linear mixed model: the coefficients are integrated out exactly, the standard deviations by
importance sampling about the mode of their posterior.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

OWN = 3  # coefficients of the quadratic
DEGREE = 6
# Each polynomial of a departure is expected to be this much smaller than the one before it
DECAY = 0.35
EXPECTED = DECAY ** np.arange(DEGREE + 1 - OWN, dtype=float)
# Of the median curve's range of losses: the departure that the curves of a kind may have in common,
# about the most that an exponential rise on one side of an optimum makes
COMMON = 0.2
# Medians and deviations (of the logarithm) of what is expected before the data speak. Nats: own
# noise 0.001 to 0.01 and luck 0.002 to 0.013 in the project's sweeps (docs/results); departures
# are shares of the median curve's range.
PRIOR = {
    "noise": (0.003, 1.0),
    "luck": (0.009, 0.8),
    "kind_luck": (0.002, 0.7),
    "departure": (0.05, 1.0),
}
FLAT = 100.0  # deviation of a coefficient that nothing holds, in ranges of losses
# Logarithms of what a deviation can be, in ranges of losses
BOUNDS = (np.log(1e-4), np.log(30.0))
GRID = 161  # points on which a curve's lowest one is looked for
LEAST_SCALE = 1e-3  # nats: below it the expected noise would lie beyond the bounds
SAMPLES = 160  # of the standard deviations
MIN_TEACHERS = 4  # a quadratic through three points leaves nothing to check it by


@dataclass(frozen=True)
class Runs:
    """What is fitted; arrays [cells] unless said.

    curve, training, seed, point: consecutive numbers; a point is one teacher of one curve. kind
    [curves]. known [points]: variance of a point that is known beforehand. patterns [cells,
    patterns]: nats by which documents drawn anew move the cells, one deviation each.
    """

    losses: Floats
    gaps: Floats
    curve: Integers
    point: Integers
    seed: Integers
    training: Integers
    kind: Integers
    known: Floats
    patterns: Floats


@dataclass(frozen=True)
class Posterior:
    """Draws of the curves (Legendre coefficients [draws, curves, DEGREE + 1] over `domain`), of one
    run's own noise [draws, curves] and of the deviation of teachers' luck [draws], in nats."""

    domain: tuple[float, float]
    coefficients: Floats
    noise: Floats
    luck: Floats

    def losses(self, curve: int, gaps: Floats) -> Floats:
        """[draws, gaps] of a curve."""
        return np.asarray(self.coefficients[:, curve] @ _basis(gaps, self.domain).T)

    def lowest(self, curve: int, ends: tuple[float, float]) -> Floats:
        """x [draws] where a curve is lowest between two ends, by the parabola through its lowest
        three points."""
        grid = np.linspace(*ends, GRID)
        losses = self.losses(curve, grid)
        lowest = losses.argmin(axis=1)
        x = grid[lowest]
        inner = np.flatnonzero((lowest > 0) & (lowest < GRID - 1))
        before, at, after = (losses[inner, lowest[inner] + step] for step in (-1, 0, 1))
        bend = before - 2 * at + after
        step = np.where(bend > 0, 0.5 * (before - after) / np.where(bend > 0, bend, 1.0), 0.0)
        x[inner] += step * (grid[1] - grid[0])
        return np.asarray(x)


def fit_curves(runs: Runs, *, draws: int, rng: np.random.Generator) -> Posterior | None:
    """The posterior of all curves of an architecture; None where nothing tells what noise is: no
    run is repeated, and no curve has a teacher more than its quadratic needs."""
    model = _Model(runs)
    if not model.freedom:
        return None
    points, weights = model.explore(rng)
    chosen = rng.choice(len(points), draws, p=weights)
    coefficients = np.empty((draws, len(runs.kind), DEGREE + 1))
    for number in np.unique(chosen):
        drawn = np.flatnonzero(chosen == number)
        coefficients[drawn] = model.sample(points[number], len(drawn), rng)
    scales = np.exp(points[chosen])
    levels = np.zeros((len(runs.kind), DEGREE + 1))
    levels[:, 0] = model.means
    return Posterior(
        domain=model.domain,
        coefficients=coefficients * model.scale + levels,
        noise=scales[:, :1] * model.relative[runs.kind] * model.scale,
        luck=scales[:, 1] * model.scale,
    )


class _Model:
    """Losses in units of `scale`, about the mean of their curve."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.num_curves = curves = len(runs.kind)
        self.kinds = runs.kind[runs.curve]  # [cells]
        self.num_kinds = int(self.kinds.max()) + 1
        number = np.bincount(runs.curve, minlength=curves)
        self.means = np.bincount(runs.curve, runs.losses, curves) / number
        points = int(runs.point.max()) + 1
        of_point = np.bincount(runs.point, runs.losses, points) / np.bincount(runs.point)
        owner = np.zeros(points, dtype=int)
        owner[runs.point] = runs.curve
        ranges = [np.ptp(of_point[owner == c]) for c in range(curves)]
        # curves that are exactly flat still need a unit
        self.scale = max(float(np.median(ranges)), LEAST_SCALE)
        self.losses = (runs.losses - self.means[runs.curve]) / self.scale
        self.domain = (float(runs.gaps.min()), float(runs.gaps.max()) + 1e-12)
        basis = _basis(runs.gaps, self.domain)
        basis[:, OWN:] *= EXPECTED
        self._columns_of_curves(basis)
        self._common_columns(basis)
        self._relative_noise()
        self._products()

    def _columns_of_curves(self, basis: Floats) -> None:
        """[cells, columns] of each curve's own: quadratic, departure, seeds, points."""
        runs = self.runs
        seeds = int(runs.seed.max()) + 1
        # of the seeds that a curve has, so that its level is that of their mean
        present = np.zeros((self.num_curves, seeds))
        present[runs.curve, runs.seed] = 1
        present /= present.sum(axis=1, keepdims=True)
        shifts = np.eye(seeds)[runs.seed] - present[runs.curve]
        self.num_seeds = seeds if seeds > 1 else 0
        self.own = np.hstack([basis, shifts[:, : self.num_seeds]])
        self.known = np.zeros((self.num_curves, 0))
        if runs.known.any():
            first = np.full(self.num_curves, len(runs.known))
            np.minimum.at(first, runs.curve, runs.point)
            within = runs.point - first[runs.curve]
            width = int(within.max()) + 1
            self.own = np.hstack([self.own, np.eye(width)[within]])
            self.known = np.zeros((self.num_curves, width))
            self.known[runs.curve, within] = runs.known[runs.point] / self.scale**2

    def _common_columns(self, basis: Floats) -> None:
        """[cells, columns] of what curves share, and which deviation each column has."""
        runs, several = self.runs, self.num_kinds > 1
        self.num_trainings = int(runs.training.max()) + 1
        luck = np.eye(self.num_trainings)[runs.training]
        parts: list[Floats] = [luck]
        roles = ["luck"] * self.num_trainings
        for kind in range(self.num_kinds):
            mine = self.kinds == kind
            if several:
                trainings = np.unique(runs.training[mine])
                parts.append(luck[:, trainings] * mine[:, None])
                roles += ["kind_luck"] * len(trainings)
            parts.append(basis[:, OWN:] * mine[:, None])
            roles += ["common"] * (DEGREE + 1 - OWN)
        parts.append(runs.patterns / self.scale)
        roles += ["pattern"] * runs.patterns.shape[1]
        self.shared = np.hstack(parts)
        self.roles = np.array(roles)
        self.names = ("noise", "luck", *(("kind_luck",) if several else ()), "departure")

    def _relative_noise(self) -> None:
        """Own noise of each kind relative to all, from what is left after each curve's quadratic
        and seeds, and every training's own effect; held towards 1 where little is known."""
        runs = self.runs
        left, freedom = np.zeros(self.num_kinds), np.zeros(self.num_kinds)
        fixed = [*range(OWN), *range(DEGREE + 1, DEGREE + 1 + self.num_seeds)]
        self.freedom = 0
        for kind in range(self.num_kinds):
            mine = np.flatnonzero(self.kinds == kind)
            columns = [np.eye(self.num_trainings)[runs.training[mine]]]
            for curve in np.unique(runs.curve[mine]):
                of = runs.curve[mine] == curve
                columns.append(self.own[mine][:, fixed] * of[:, None])
                self.freedom += int(of.sum() - np.linalg.matrix_rank(columns[-1][of]))
            design = np.hstack(columns)
            solution, _, rank, _ = np.linalg.lstsq(design, self.losses[mine], rcond=1e-10)
            rest = self.losses[mine] - design @ solution
            left[kind], freedom[kind] = rest @ rest, len(mine) - rank
        total = left.sum() / max(freedom.sum(), 1.0)
        self.relative = np.sqrt((left + 4 * total) / (freedom + 4) / max(total, 1e-300))
        if total < 1e-20:
            self.relative = np.ones_like(left)

    def _products(self) -> None:
        """Sums over the cells of each curve, which no deviation changes."""
        runs = self.runs
        self.counts = np.bincount(runs.curve, minlength=self.num_curves)
        order = np.argsort(runs.curve, kind="stable")
        ends = np.split(order, np.cumsum(self.counts)[:-1])
        own, shared, y = self.own, self.shared, self.losses
        self.own_own = np.stack([own[i].T @ own[i] for i in ends])
        self.own_shared = np.stack([own[i].T @ shared[i] for i in ends])
        self.own_y = np.stack([own[i].T @ y[i] for i in ends])
        of_kind = [np.flatnonzero(self.kinds == kind) for kind in range(self.num_kinds)]
        self.shared_shared = np.stack([shared[i].T @ shared[i] for i in of_kind])
        self.shared_y = np.stack([shared[i].T @ y[i] for i in of_kind])
        self.y_y = np.array([y[i] @ y[i] for i in of_kind])

    def solve(self, point: Floats) -> tuple[float, Any]:
        """Log of the marginal likelihood, and what the coefficients' posterior is made of."""
        scales = dict(zip(self.names, np.exp(point), strict=True))
        noise = (scales["noise"] * self.relative) ** 2
        of_curve = noise[self.runs.kind]
        prior = np.full((self.num_curves, self.own.shape[1]), FLAT**2)
        prior[:, OWN : DEGREE + 1] = scales["departure"] ** 2
        if self.known.shape[1]:
            prior[:, -self.known.shape[1] :] = np.maximum(self.known, 1e-12)
        variance = {
            "luck": scales["luck"] ** 2,
            "kind_luck": scales.get("kind_luck", 1.0) ** 2,
            "common": COMMON**2,
            "pattern": 1.0,
        }
        spread = np.array([variance[role] for role in self.roles])
        inner = self.own_own / of_curve[:, None, None]
        inner[:, np.arange(inner.shape[1]), np.arange(inner.shape[1])] += 1 / prior
        root = np.linalg.cholesky(inner)
        half = np.linalg.solve(root, self.own_shared / of_curve[:, None, None])
        half_y = np.linalg.solve(root, (self.own_y / of_curve[:, None])[..., None])[..., 0]
        flat = half.reshape(-1, half.shape[2])
        middle = np.tensordot(1 / noise, self.shared_shared, 1) - flat.T @ flat
        right = (1 / noise) @ self.shared_y - flat.T @ half_y.ravel()
        middle[np.diag_indices_from(middle)] += 1 / spread
        outer = np.linalg.cholesky(middle)
        z = np.linalg.solve(outer, right)
        misfit = (1 / noise) @ self.y_y - half_y.ravel() @ half_y.ravel() - z @ z
        volume = (
            self.counts @ np.log(of_curve)
            + 2 * np.log(np.diagonal(root, axis1=1, axis2=2)).sum()
            + np.log(prior).sum()
            + 2 * np.log(np.diag(outer)).sum()
            + np.log(spread).sum()
        )
        return -0.5 * float(misfit + volume), (root, half, half_y, outer, z)

    def explore(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Samples [samples, deviations] of the logarithms, and their weights."""
        # prior medians (logarithms, in units of `scale`) and deviations
        units = [1.0 if name == "departure" else self.scale for name in self.names]
        medians, width = np.array([PRIOR[name] for name in self.names]).T
        middle = np.log(medians / units)

        def minus(point: Floats) -> float:
            far = (point - middle) / width
            return -self.solve(np.clip(point, *BOUNDS))[0] + 0.5 * float(far @ far)

        best = minimize(minus, middle, method="BFGS", options={"gtol": 1e-2, "maxiter": 40}).x
        curvature = _hessian(minus, best)
        values, vectors = np.linalg.eigh(curvature)
        # never wider than the prior, nor far narrower than a variance of few degrees of freedom;
        # symmetric, since the sign of a vector is the processor's own choice
        root = vectors / np.sqrt(np.clip(values, 1 / width.max() ** 2, None)) @ vectors.T
        standard = rng.standard_normal((SAMPLES, len(best)))
        heavy = np.sqrt(6 / rng.chisquare(6, SAMPLES))
        points = best + (standard * heavy[:, None]) @ root.T
        density = -(6 + len(best)) / 2 * np.log1p((standard**2).sum(1) * heavy**2 / 6)
        logs = np.array([-minus(point) for point in points]) - density
        weights = np.exp(logs - logs.max())
        return np.clip(points, *BOUNDS), weights / weights.sum()

    def sample(self, point: Floats, number: int, rng: np.random.Generator) -> Floats:
        """Coefficients [number, curves, DEGREE + 1]."""
        _, (root, half, half_y, outer, z) = self.solve(point)
        noise = rng.standard_normal((len(z), number))
        shared = np.linalg.solve(outer.T, z[:, None] + noise)  # [columns, number]
        rest = half_y[..., None] - half @ shared
        rest = rest + rng.standard_normal(rest.shape)
        own = np.linalg.solve(root.transpose(0, 2, 1), rest)[:, : DEGREE + 1]
        common = np.zeros((self.num_curves, DEGREE + 1, number))
        width = DEGREE + 1 - OWN
        departures = shared[self.roles == "common"].reshape(-1, width, number)
        common[:, OWN:] = departures[self.runs.kind]
        coefficients = own + common
        coefficients[:, OWN:] *= EXPECTED[:, None]
        return coefficients.transpose(2, 0, 1)


def _hessian(function: Any, at: Floats, step: float = 0.1) -> Floats:
    hessian = np.empty((len(at), len(at)))
    middle = function(at)
    steps = step * np.eye(len(at))
    plus = [function(at + one) for one in steps]
    for i in range(len(at)):
        hessian[i, i] = (plus[i] - 2 * middle + function(at - steps[i])) / step**2
        for j in range(i):
            both = function(at + steps[i] + steps[j])
            hessian[i, j] = hessian[j, i] = (both - plus[i] - plus[j] + middle) / step**2
    return hessian


def _basis(gaps: Floats, domain: tuple[float, float]) -> Floats:
    low, high = domain
    return legendre.legvander(2 * (gaps - low) / (high - low) - 1, DEGREE)
