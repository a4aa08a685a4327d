"""Which form of law fits a user's students: T* = a S + b, T* = r S or T* = k S^m.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from capgap.law.cells import Floats
from capgap.law.curve import Curve
from capgap.law.linear import Estimate, Evidence, fit_draws, gather_evidence, to_estimate

Form = Literal["linear", "ratio", "power"]
FORMS: tuple[Form, ...] = ("linear", "ratio", "power")


@dataclass(frozen=True)
class FormFit:
    """One form fitted to all students, and how it predicts one that it has not seen.

    coefficients by name: slope and intercept, ratio, or factor and exponent. prediction_error: root
    mean square of ln(predicted / found) over the students whose optimum lies inside the grid, each
    left out once; None with fewer than three of them, or where a line predicts no teacher at all.
    """

    form: Form
    coefficients: dict[str, Estimate]
    prediction_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as law.json has them."""
        estimates = {
            name: {"value": one.value, "interval": [one.low, one.high]}
            for name, one in self.coefficients.items()
        }
        return {
            "form": self.form,
            "coefficients": estimates,
            "prediction_error": self.prediction_error,
        }


def compare_forms(
    curves: Sequence[Curve], *, confidence: float, grid_shift: Floats
) -> list[FormFit]:
    """Every form that the curves of one kind suffice for, the best predictor first.

    Optima at an edge of the grid enter as bounds in every form, as in `fit_linear`.
    """
    evidence = gather_evidence(curves, confidence, grid_shift)
    located, students = len(evidence.students), len(evidence.students) + len(evidence.bounds)
    fits = []
    for form in FORMS:
        if located < (1 if form == "ratio" else 2) or (form != "ratio" and students < 3):
            continue
        draws = _draws(evidence, form)
        names = {
            "linear": ("slope", "intercept"),
            "ratio": ("ratio",),
            "power": ("exponent", "factor"),
        }[form]
        if form == "power":
            draws = np.stack([draws[:, 0], np.exp(draws[:, 1])], axis=1)
        estimates = {name: to_estimate(draws[:, i], confidence) for i, name in enumerate(names)}
        fits.append(FormFit(form, estimates, _prediction_error(evidence, form)))

    def rank(fit: FormFit) -> float:
        return float("inf") if fit.prediction_error is None else fit.prediction_error

    return sorted(fits, key=rank)


def _draws(evidence: Evidence, form: Form) -> Floats:
    """[1 + resamples, coefficients]; of the power law (exponent, ln factor)."""
    if form != "power":
        return fit_draws(evidence, intercept=form == "linear")
    middle = float(np.log(evidence.students).mean())
    # the same fit in logarithms; about the mean, where slope and height do not trade off
    logs = replace(
        evidence,
        students=np.log(evidence.students) - middle,
        optima=np.log(evidence.optima),
        deviation=evidence.deviation / evidence.optima[0],
        bound_students=np.log(evidence.bound_students) - middle,
        bounds=np.log(evidence.bounds),
        bound_deviation=evidence.bound_deviation / evidence.bounds,
    )
    draws = fit_draws(logs, intercept=True)
    return np.stack([draws[:, 0], draws[:, 1] - draws[:, 0] * middle], axis=1)


def _prediction_error(evidence: Evidence, form: Form) -> float | None:
    """Every located student predicted from the others."""
    located = len(evidence.students)
    if located < 3:
        return None
    errors = []
    for left_out in range(located):
        others = replace(
            evidence,
            students=np.delete(evidence.students, left_out),
            # the estimate alone, without its resamples
            optima=np.delete(evidence.optima[:1], left_out, axis=1),
            deviation=np.delete(evidence.deviation, left_out),
        )
        coefficients = _draws(others, form)[0]
        predicted = _predict(coefficients, form, evidence.students[left_out])
        if predicted <= 0:
            return None
        errors.append(np.log(predicted / evidence.optima[0, left_out]))
    return float(np.sqrt(np.mean(np.square(errors))))


def _predict(coefficients: Floats, form: Form, student: float) -> float:
    if form == "power":
        return float(np.exp(coefficients[1]) * student ** coefficients[0])
    intercept = coefficients[1] if form == "linear" else 0.0
    return float(coefficients[0] * student + intercept)
