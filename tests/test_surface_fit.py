"""Fits of loss surfaces: recovery of known truths, gradients, intervals, what is not identified."""

import numpy as np
import pytest

from capgap.errors import UserError
from capgap.law import surface_fit
from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.surface import SupervisedSurface
from capgap.law.surface_fit import fit_distillation, fit_supervised

SUPERVISED = PUBLISHED_SURFACE.supervised
OWN = ("E", "A", "B", "alpha", "beta", "gamma")
STUDENT = ("A", "B", "alpha", "beta", "gamma", "c0", "c1", "f1", "d1")


def grid(*axes):
    return tuple(axis.ravel() for axis in np.meshgrid(*axes))


def models():
    return grid(np.geomspace(50e6, 20e9, 7), np.geomspace(1e9, 1e12, 7))


def students():
    return grid(np.geomspace(50e6, 20e9, 5), np.geomspace(1e9, 1e12, 5), np.linspace(1.6, 5.5, 10))


def test_published_coefficients_are_recovered_from_noiseless_cells():
    n, d = models()
    found = fit_supervised(n, d, SUPERVISED.loss(n, d))
    assert found.status == "converged"
    for name in OWN:
        assert getattr(found.surface, name) == pytest.approx(getattr(SUPERVISED, name), rel=1e-3)
    n, d, above = students()
    losses = PUBLISHED_SURFACE.loss(n, d, above)
    found = fit_distillation(n, d, above, losses, SUPERVISED)
    assert found.status == "converged"
    assert found.deviation < 1e-9
    for name in STUDENT:
        true = getattr(PUBLISHED_SURFACE, name)
        assert getattr(found.surface, name) == pytest.approx(true, rel=1e-3)


def test_recovery_does_not_hang_on_the_seed():
    n, d = models()
    for seed in range(1, 4):
        found = fit_supervised(n, d, SUPERVISED.loss(n, d), seed=seed, starts=12)
        assert found.surface.alpha == pytest.approx(SUPERVISED.alpha, rel=1e-3)


@pytest.mark.parametrize("kind", ["supervised", "distillation"])
def test_gradients_are_those_of_finite_differences(kind, monkeypatch):
    problems = []

    def keep(problem, *more):
        problems.append(problem)
        raise StopIteration

    monkeypatch.setattr(surface_fit, "_fit", keep)
    n, d, above = (axis[::7] for axis in students())
    asked = {
        "supervised": lambda: fit_supervised(n, d, SUPERVISED.loss(n, d)),
        "distillation": lambda: fit_distillation(
            n, d, above, PUBLISHED_SURFACE.loss(n, d, above), SUPERVISED
        ),
    }
    with pytest.raises(StopIteration):
        asked[kind]()
    (problem,) = problems
    _, low, high, _ = problem.ranges()
    for share in (0.2, 0.5, 0.7):
        point = low + share * (high - low)
        exact = problem.jacobian(point)
        for column in range(len(point)):
            step = np.zeros_like(point)
            step[column] = 1e-5
            above_below = problem.residuals(point + step) - problem.residuals(point - step)
            np.testing.assert_allclose(exact[:, column], above_below / 2e-5, rtol=1e-5, atol=1e-7)


def test_profile_intervals_cover_the_truth():
    """Over 60 noisy grids, the 90% interval covers the truth as often as it should."""
    n, d = models()
    truth = SupervisedSurface(E=1.7, A=400, B=410, alpha=0.34, beta=0.28)
    generator = np.random.default_rng(0)
    inside = dict.fromkeys(("E", "alpha", "beta"), 0)
    for _ in range(60):
        losses = truth.loss(n, d) + 0.01 * generator.standard_normal(len(n))
        found = fit_supervised(n, d, losses, form="chinchilla", starts=4, intervals=True)
        assert found.status == "converged"
        assert found.deviation == pytest.approx(0.01, rel=0.4)
        for name in inside:
            low, high = found.intervals[name]
            inside[name] += low <= getattr(truth, name) <= high
    # binomial: 54 expected, with a standard deviation of 2.3
    for name, covered in inside.items():
        assert 47 <= covered <= 60, name


def test_one_token_budget_identifies_no_data_term():
    n = np.geomspace(50e6, 20e9, 20)
    d = np.full_like(n, 1e11)
    found = fit_supervised(n, d, SUPERVISED.loss(n, d))
    assert found.status in ("not_identified", "bound_hit")
    assert found.deviation < 1e-6


def test_a_coefficient_at_its_bound_is_named():
    n, d = models()
    # the loss grows with the tokens: no positive power can follow
    found = fit_supervised(n, d, 2.0 + 0.1 * np.log(d / 1e9) + (1e8 / n) ** 0.3)
    assert found.status == "bound_hit"
    assert found.at_bounds


def test_without_a_gap_the_reduced_form_fits_as_well():
    # teachers that are never too good for their students
    n, d, above = grid(
        np.geomspace(1e9, 20e9, 5), np.geomspace(1e11, 1e12, 5), np.linspace(3.0, 3.4, 6)
    )
    truth = 1.0 * above + np.exp(-2.0 * np.log(above)) * (400 / n**0.34 + 410 / d**0.28) ** 0.8
    found = fit_distillation(n, d, above, truth, SUPERVISED, form="no_gap")
    assert found.status == "converged"
    assert found.surface.c1 == 0
    assert found.surface.c0 == pytest.approx(2.0, rel=1e-3)
    assert found.surface.alpha == pytest.approx(0.34, rel=1e-3)
    assert found.surface.loss(n, d, above) == pytest.approx(truth, rel=1e-9)


def test_cells_that_cannot_be_fitted():
    n, d = models()
    losses = SUPERVISED.loss(n, d)
    with pytest.raises(UserError, match="6 cells are too few for the 6 coefficients"):
        fit_supervised(n[:6], d[:6], losses[:6])
    with pytest.raises(UserError, match="take one of full, chinchilla"):
        fit_supervised(n, d, losses, form="quadratic")
    with pytest.raises(UserError, match="columns of one length"):
        fit_supervised(n, d, losses[1:])
    broken = losses.copy()
    broken[3] = -1.0
    with pytest.raises(UserError, match="take -1 out"):
        fit_supervised(n, d, broken)
    broken[3] = np.inf
    with pytest.raises(UserError, match="take inf out"):
        fit_supervised(n, d, broken)
