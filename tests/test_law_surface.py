"""The published loss surfaces: against the formula written out, and what they say of teachers."""

from decimal import Decimal, getcontext

import numpy as np
import pytest

from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.surface import SupervisedSurface, TeacherTokens

SUPERVISED = PUBLISHED_SURFACE.supervised


def exact(parameters, tokens, teacher_loss):
    """Both formulas in 60 digits."""
    getcontext().prec = 60
    n, d, above = Decimal(parameters), Decimal(tokens), Decimal(teacher_loss)
    number = {
        name: Decimal(repr(getattr(PUBLISHED_SURFACE, name)))
        for name in ("A", "B", "alpha", "beta", "gamma", "c0", "c1", "f1", "d1")
    }
    own = {
        name: Decimal(repr(getattr(SUPERVISED, name)))
        for name in ("E", "A", "B", "alpha", "beta", "gamma")
    }
    alone = own["E"] + (own["A"] / n ** own["alpha"] + own["B"] / d ** own["beta"]) ** own["gamma"]
    gap = 1 + (above / (alone * number["d1"])) ** (1 / number["f1"])
    student = number["A"] / n ** number["alpha"] + number["B"] / d ** number["beta"]
    factor = above ** -number["c0"] * gap ** (-number["c1"] * number["f1"])
    return alone, above + factor * student ** number["gamma"]


@pytest.mark.parametrize("parameters", [143e6, 1e9, 12.6e9])
@pytest.mark.parametrize("tokens", [2e9, 80e9, 512e9])
@pytest.mark.parametrize("teacher_loss", [1.7, 2.0, 2.5, 3.5])
def test_the_formulas_in_sixty_digits(parameters, tokens, teacher_loss):
    alone, student = exact(int(parameters), int(tokens), str(teacher_loss))
    assert SUPERVISED.loss(parameters, tokens) == pytest.approx(float(alone), rel=1e-12)
    found = PUBLISHED_SURFACE.loss(parameters, tokens, teacher_loss)
    assert found == pytest.approx(float(student), rel=1e-12)


def test_a_huge_teacher_loss_is_no_overflow():
    assert np.isfinite(PUBLISHED_SURFACE.loss(1e3, 1e3, 500.0))
    assert PUBLISHED_SURFACE.loss([1e9, 3e9], 80e9, [[2.0], [2.1]]).shape == (2, 2)


@pytest.mark.parametrize("parameters", [1e9, 3e9, 7e9])
@pytest.mark.parametrize("tokens_per_parameter", [80, 160, 512])
def test_published_best_ratios(parameters, tokens_per_parameter):
    """Near 8.5 to 10 for a billion parameters and more at 80 and more tokens a parameter."""
    tokens = tokens_per_parameter * parameters
    best = PUBLISHED_SURFACE.best_teacher(parameters, tokens, teacher_tokens=TeacherTokens(20))
    assert 8.4 < best.ratio < 10.3
    assert best.within[0] < best.ratio < best.within[1]
    assert best.within[1] / best.within[0] > 1.5  # flat
    few = PUBLISHED_SURFACE.best_teacher(
        parameters, 20 * parameters, teacher_tokens=TeacherTokens(20)
    )
    assert few.ratio > 50


def test_compute_optimal_tokens_are_those_of_the_lowest_loss():
    surface = SupervisedSurface(E=1.7, A=400, B=410, alpha=0.34, beta=0.28)
    for parameters in (1e8, 1e10):
        tokens = surface.compute_optimal_tokens().of(parameters)
        sizes = parameters * np.exp(np.linspace(-0.5, 0.5, 2001))
        losses = surface.loss(sizes, parameters * tokens / sizes)
        assert sizes[losses.argmin()] == pytest.approx(parameters, rel=1e-3)


def test_a_student_with_the_best_teacher_beats_one_without():
    best = PUBLISHED_SURFACE.best_teacher(1e9, 80e9)
    assert best.loss < SUPERVISED.loss(1e9, 80e9)
