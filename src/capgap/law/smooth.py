"""All curves of one kind as smooth functions of the capacity gap, fitted together.

y is a loss in nats per token, x = ln(T/S), sigma the standard deviation of one run.

A curve is a quadratic of its own plus a departure from it, because loss rises faster on one side
of its optimum than on the other. The departure is a sum of higher Legendre polynomials with small
coefficients, which the curves of a kind have mostly in common: a skew that one curve alone cannot
tell from noise would move all optima the same way. What they have in common is therefore hardly
held back, however little of it the losses show: more students would not make up for a skew that
was taken for noise. How far curves depart from one another is held to what the losses show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

OWN = 3  # coefficients of the quadratic
DEGREE = 6
# Each polynomial is expected to be this much smaller than the one before it
DECAY = 0.35
PLACES = 401

# Of the median curve's range of losses: the departure that all curves may have in common, about the
# most that an exponential rise on one side of an optimum makes
COMMON = 0.2
# The same for what one run's noise can be, and what each curve departs on top of that
NOISE = np.geomspace(1e-4, 1.0, 22)
DEPARTURE = np.geomspace(0.01, 0.5, 7)


@dataclass(frozen=True)
class Observed:
    """One curve's points.

    gaps: x [teachers], ascending; losses: y [teachers]; runs: [teachers, teachers], what the
    covariance of the losses is for one run's variance 1.
    """

    gaps: Floats
    losses: Floats
    runs: Floats


@dataclass(frozen=True)
class SmoothCurve:
    """`mean` [DEGREE + 1] and `draws` [resamples, DEGREE + 1], Legendre coefficients over
    `domain`, the range of x of all curves; `ends`, the range of this curve's own."""

    mean: Floats
    draws: Floats
    domain: tuple[float, float]
    ends: tuple[float, float]

    def losses(self, gaps: Floats) -> tuple[Floats, Floats]:
        """y at x: of the mean [gaps], of the draws [resamples, gaps]."""
        basis = legendre.legvander(_scaled(gaps, self.domain), DEGREE)
        return basis @ self.mean, self.draws @ basis.T

    def minimum(self) -> tuple[float, Floats]:
        """Where it is lowest within its own range: x of the mean, and of the draws [resamples]."""
        places = np.linspace(*self.ends, PLACES)
        mean, draws = self.losses(places)
        return float(_lowest(mean[None], places)[0]), _lowest(draws, places)


@dataclass(frozen=True)
class Smoothed:
    """The curves, and draws [resamples] of sigma that go with theirs."""

    curves: list[SmoothCurve]
    sigma: Floats


def smooth(
    observed: Sequence[Observed],
    known: Floats,
    *,
    repeats: tuple[float, int],
    resamples: int,
    rng: np.random.Generator,
) -> Smoothed:
    """Fits the curves of one kind; each must have four points or more.

    known: [points, points] of all curves one after the other, the covariance that does not come
    from repeating a run (that of the held-out documents). repeats: sum of squares and degrees of
    freedom of repeated runs; without any, sigma is what scatters about the smooth curves.

    The draws are from the posterior distribution: the quadratics are free (a flat prior), sigma
    and the size of the departure are integrated over their ranges, on a scale of logarithms.
    """
    model = _Model.of(observed, known)
    places, weights = model.weigh(repeats)
    chosen = np.sort(rng.choice(len(weights), resamples, p=weights))
    draws = np.empty((resamples, len(observed), DEGREE + 1))
    mean = np.zeros((len(observed), DEGREE + 1))
    for place in np.unique(chosen):
        at = np.flatnonzero(chosen == place)
        center, root = model.posterior(*places[place])
        points = center[:, None] + root @ rng.standard_normal((root.shape[1], len(at)))
        draws[at] = model.by_curve(points.T)
        mean += model.by_curve(center[None])[0] * len(at) / resamples
    # in the order of the hyperparameters until here, which no other draws have
    order = rng.permutation(resamples)
    curves = [
        SmoothCurve(mean[i], draws[order, i], model.domain, (one.gaps[0], one.gaps[-1]))
        for i, one in enumerate(observed)
    ]
    return Smoothed(curves, places[chosen][order][:, 0])


@dataclass(frozen=True)
class _Model:
    """A linear model: losses = own @ quadratics + departures + noise, points of all curves in one
    column. A departure's coefficients are in units of what is expected of them."""

    domain: tuple[float, float]
    losses: Floats
    own: Floats  # [points, OWN * curves]
    departures: Floats  # [points, (DEGREE + 1 - OWN) * curves]
    common: Floats  # covariance of the departures' coefficients that all curves have in common
    known: Floats
    runs: Floats
    scale: float  # the median curve's range of losses

    @classmethod
    def of(cls, observed: Sequence[Observed], known: Floats) -> "_Model":
        gaps = np.concatenate([one.gaps for one in observed])
        domain = (float(gaps.min()), float(gaps.max()))
        owner = np.repeat(np.arange(len(observed)), [len(one.gaps) for one in observed])
        basis = legendre.legvander(_scaled(gaps, domain), DEGREE)
        basis[:, OWN:] *= _expected()
        number = len(observed)
        mine = owner[:, None] == np.arange(number)  # [points, curves]
        runs = np.zeros((len(gaps), len(gaps)))
        for i, one in enumerate(observed):
            runs[np.ix_(mine[:, i], mine[:, i])] = one.runs
        # curves that are exactly flat still need a unit
        scale = max(float(np.median([np.ptp(one.losses) for one in observed])), 1e-12)
        degrees = np.eye(DEGREE + 1 - OWN)
        return cls(
            domain=domain,
            losses=np.concatenate([one.losses for one in observed]),
            own=(mine[:, :, None] * basis[:, None, :OWN]).reshape(len(gaps), -1),
            departures=(mine[:, :, None] * basis[:, None, OWN:]).reshape(len(gaps), -1),
            common=(COMMON * scale) ** 2 * np.kron(np.ones((number, number)), degrees),
            known=known,
            runs=runs,
            scale=scale,
        )

    def covariance(self, sigma: Floats, departure: Floats) -> Floats:
        """Of the losses about their quadratics: [..., points, points]."""
        common = self.departures @ self.common @ self.departures.T
        rest = self.departures @ self.departures.T
        sigma, departure = sigma[..., None, None], departure[..., None, None]
        return self.known + common + sigma**2 * self.runs + departure**2 * rest

    def weigh(self, repeats: tuple[float, int]) -> tuple[Floats, Floats]:
        """(sigma, departure) [places, 2], and the posterior weight of each: the restricted
        likelihood, in which the quadratics are integrated out."""
        squares, freedom = repeats
        grid = np.meshgrid(NOISE * self.scale, DEPARTURE * self.scale, indexing="ij")
        sigma, departure = (axis.ravel() for axis in grid)
        covariance = self.covariance(sigma, departure)
        solved = np.linalg.solve(covariance, self.own)
        information = self.own.T @ solved
        quadratics = np.linalg.solve(information, solved.transpose(0, 2, 1) @ self.losses[:, None])
        left = self.losses - quadratics[..., 0] @ self.own.T
        misfit = np.einsum("ki,ki->k", left, np.linalg.solve(covariance, left[..., None])[..., 0])
        logs = -0.5 * (
            np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1] + misfit
        )
        if freedom:
            logs -= freedom * np.log(sigma) + squares / (2 * sigma**2)
        weights = np.exp(logs - logs.max())
        return np.stack([sigma, departure], axis=1), weights / weights.sum()

    def posterior(self, sigma: float, departure: float) -> tuple[Floats, Floats]:
        """Mean of all coefficients, and a root of their covariance: quadratics, then departures."""
        covariance = self.covariance(np.array(sigma), np.array(departure))
        prior = self.common + departure**2 * np.eye(len(self.common))
        onto = np.linalg.solve(covariance, self.departures @ prior).T  # [departures, points]
        solved = np.linalg.solve(covariance, self.own)
        spread = np.linalg.inv(self.own.T @ solved)
        quadratics = spread @ solved.T @ self.losses
        departures = onto @ (self.losses - self.own @ quadratics)
        tilt = -onto @ self.own
        within = prior - onto @ self.departures @ prior + tilt @ spread @ tilt.T
        joint = np.block([[spread, spread @ tilt.T], [tilt @ spread, within]])
        values, vectors = np.linalg.eigh(joint)
        return np.concatenate([quadratics, departures]), vectors * np.sqrt(np.clip(values, 0, None))

    def by_curve(self, coefficients: Floats) -> Floats:
        """[draws, all coefficients] as Legendre coefficients [draws, curves, DEGREE + 1]."""
        split = self.own.shape[1]
        quadratics = coefficients[:, :split].reshape(len(coefficients), -1, OWN)
        departures = coefficients[:, split:].reshape(len(coefficients), -1, DEGREE + 1 - OWN)
        return np.concatenate([quadratics, departures * _expected()], axis=2)


def _expected() -> Floats:
    return DECAY ** np.arange(DEGREE + 1 - OWN, dtype=float)


def _scaled(gaps: Floats, domain: tuple[float, float]) -> Floats:
    low, high = domain
    return 2 * (gaps - low) / (high - low) - 1


def _lowest(losses: Floats, places: Floats) -> Floats:
    """Where each row [draws, places] is lowest, by the parabola through its lowest three."""
    lowest = losses.argmin(axis=1)
    found = places[lowest]
    inner = np.flatnonzero((lowest > 0) & (lowest < len(places) - 1))
    before, at, after = (losses[inner, lowest[inner] + step] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    step = np.where(bend > 0, 0.5 * (before - after) / np.where(bend > 0, bend, 1.0), 0.0)
    found[inner] += step * (places[1] - places[0])
    return np.asarray(found)
