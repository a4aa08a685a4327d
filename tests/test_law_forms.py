"""The three forms of law against known truths."""

import numpy as np
import pytest

from capgap.law.fit import fit_law
from law_surface import ladder, sweep

STUDENTS = [40_000, 63_000, 100_000, 160_000, 250_000]


def forms_of(best, students=STUDENTS, ratio=1.3, **options):
    records = sweep(students, lambda s: ladder(best(s) / 3, ratio, 9), best, **options)
    law = fit_law(records, resamples=400)
    return law["laws"][0]["forms"], law["verdict"]


def value(form, name):
    return form["coefficients"][name]["value"]


def test_a_proportional_truth():
    forms, verdict = forms_of(lambda s: 2.5 * s)
    found = {form["form"]: form for form in forms}
    assert value(found["ratio"], "ratio") == pytest.approx(2.5, rel=1e-5)
    assert value(found["power"], "exponent") == pytest.approx(1.0, abs=1e-5)
    assert value(found["power"], "factor") == pytest.approx(2.5, rel=1e-3)
    low, high = found["power"]["coefficients"]["exponent"]["interval"]
    assert low <= 1 + 1e-9
    assert high >= 1 - 1e-9
    assert all(form["prediction_error"] < 1e-4 for form in forms)
    assert any("compatible with being proportional to S" in sentence for sentence in verdict)


def test_a_power_law_is_told_from_a_line():
    forms, verdict = forms_of(lambda s: 3 * s * (s / 100_000) ** 0.5)
    assert forms[0]["form"] == "power"
    assert value(forms[0], "exponent") == pytest.approx(1.5, abs=1e-4)
    assert forms[0]["prediction_error"] < 1e-4
    errors = {form["form"]: form["prediction_error"] for form in forms}
    assert errors["ratio"] > 0.1
    assert any("the exponent m is 1.50" in sentence for sentence in verdict)


def test_an_intercept_is_told_from_a_ratio():
    forms, _ = forms_of(lambda s: 2 * s + 60_000)
    assert forms[0]["form"] == "linear"
    assert value(forms[0], "intercept") == pytest.approx(60_000, rel=1e-3)


def test_prediction_errors_are_those_of_students_left_out():
    """By hand for the ratio: without errors of its own, the weighted mean of T/S of the others."""
    truth = {40_000: 2.0, 80_000: 2.4, 160_000: 3.0}
    forms, _ = forms_of(lambda s: truth[s] * s, students=list(truth))
    found = next(form for form in forms if form["form"] == "ratio")
    ratios = np.array(list(truth.values()))
    errors = []
    for place in range(3):
        others = np.delete(ratios, place)
        # errors are in proportion to T, so T/S has weight 1 / (T/S)^2
        predicted = (others**-1).sum() / (others**-2).sum()
        errors.append(np.log(predicted / ratios[place]))
    assert found["prediction_error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.02)


def test_the_exponent_interval_covers_the_truth():
    covered = 0
    for number in range(40):
        forms, _ = forms_of(
            lambda s: 2.5 * s,
            students=STUDENTS[:4],
            ratio=1.3,
            curvature=0.2,
            seed_noise=0.02,
            document_noise=0.03,
            gain=None,
            with_teachers=False,
            number=number,
        )
        power = next(form for form in forms if form["form"] == "power")
        low, high = power["coefficients"]["exponent"]["interval"]
        covered += low <= 1 <= high
    assert covered >= 32


def test_one_student_has_a_ratio_alone():
    forms, verdict = forms_of(lambda s: 2.5 * s, students=[50_000])
    assert [form["form"] for form in forms] == ["ratio"]
    assert forms[0]["prediction_error"] is None
    assert not any("student left out" in sentence for sentence in verdict)
