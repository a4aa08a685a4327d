"""The optimum of a curve against surfaces whose optimum is known."""

import numpy as np
import pytest

from capgap.law.cells import curves_from_records
from capgap.law.curve import fit_curve
from capgap.law.fit import fit_law
from capgap.law.noise import document_counts, draw_points
from law_surface import ladder, sweep


def curve_of(records, *, seed=0, resamples=300):
    rng = np.random.default_rng(seed)
    data = curves_from_records(records)
    counts = document_counts(len(data[0].document_tokens), resamples, rng)
    [points] = draw_points(data, counts, rng)
    return fit_curve(points, confidence=0.9)


def one_curve(best, *, factor=1.4, number_of_teachers=8, **noise):
    return sweep(
        [50_000],
        lambda _: ladder(60_000, factor, number_of_teachers),
        lambda _: best,
        gain=None,
        with_teachers=False,
        **noise,
    )


def test_without_noise_the_optimum_is_exact():
    [curve] = fit_law(one_curve(171_000))["curves"]
    optimum = curve["optimum"]
    assert optimum["status"] == "interior"
    assert optimum["teacher_parameters"] == pytest.approx(171_000, rel=1e-6)
    assert optimum["ratio"] == pytest.approx(3.42, rel=1e-6)
    # loss = 3 + 0.05 (ln T - ln best)^2 + what the documents add to all alike
    fit = curve["fit"]
    x = np.log(np.array(fit["teacher_parameters"]) / 171_000)
    assert fit["loss"] == pytest.approx(optimum["loss"] + 0.05 * x**2, rel=1e-9)
    assert (np.array(fit["low"]) <= fit["loss"]).all()
    assert (np.array(fit["high"]) >= fit["loss"]).all()


def test_the_interval_is_no_finer_than_half_the_grid_to_either_side():
    optimum = fit_law(one_curve(171_000, factor=1.5))["curves"][0]["optimum"]
    low, high = optimum["interval"]
    assert low == pytest.approx(171_000 / 1.5**0.5, rel=1e-3)
    assert high == pytest.approx(171_000 * 1.5**0.5, rel=1e-3)
    assert optimum["grid_best"] == 202_500
    assert optimum["grid_interval"] == [135_000, 303_750]


def test_a_seed_that_shifts_all_teachers_alike_changes_nothing_even_with_a_missing_cell():
    records = one_curve(171_000, seeds=3)
    missing = next(r.id for r in records if r.kind == "cell" and r.seed == 2)
    # the plain mean of the teacher without seed 2 is off by 0.1 nats; its curve must not be
    curve = curve_of([record for record in records if record.id != missing])
    assert curve.optimum.teacher_parameters == pytest.approx(171_000, rel=1e-6)
    assert curve.points.seed_deviation == pytest.approx(0, abs=1e-6)


def test_seed_noise_is_measured():
    spread = [
        curve_of(one_curve(171_000, seeds=3, seed_noise=0.01, number=number)).points.seed_deviation
        for number in range(30)
    ]
    assert np.sqrt(np.mean(np.square(spread))) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("teachers", "factor", "noise"),
    [
        (16, 1.1, {"seeds": 2, "seed_noise": 0.025, "document_noise": 0.02}),
        (16, 1.1, {"seeds": 1, "seed_noise": 0.02, "document_noise": 0.03}),
        (16, 1.1, {"seeds": 2, "seed_noise": 0.001, "document_noise": 0.12}),
    ],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(teachers, factor, noise):
    """Spacing and noise are such that the noise, not the grid, sets the width."""
    best = 60_000 * factor ** (teachers / 2 - 0.2)
    covered = 0
    for number in range(200):
        records = one_curve(
            best, factor=factor, number_of_teachers=teachers, curvature=0.2, number=number, **noise
        )
        optimum = curve_of(records, seed=number).optimum
        low, high = optimum.interval or (None, None)
        covered += (low is None or low <= best) and (high is None or high >= best)
    assert 0.80 <= covered / 200 <= 0.98


def test_equal_teachers_are_flat_and_carry_no_curse():
    found = [
        curve_of(
            one_curve(1, curvature=0.0, seed_noise=0.01, document_noise=0.02, number=number),
            seed=number,
        )
        for number in range(100)
    ]
    flat = [curve for curve in found if curve.optimum.status == "flat"]
    # at 90% confidence up to one in ten may look like a difference
    assert len(flat) >= 85
    assert not any(curve.curse.beyond_noise for curve in flat)
    assert flat[0].optimum.interval is None
    assert flat[0].optimum.teacher_parameters is None
    assert not any(curve.optimum.status == "interior" for curve in found[:20])


@pytest.mark.parametrize(
    ("best", "status", "cursed"), [(20_000, "smallest", True), (3_000_000, "largest", False)]
)
def test_an_optimum_outside_the_grid_leaves_its_interval_open(best, status, cursed):
    curve = curve_of(one_curve(best, seed_noise=0.004, document_noise=0.02))
    low, high = curve.optimum.interval
    assert curve.optimum.status == status
    assert curve.curse.beyond_noise is cursed
    assert (low is None, high is None) == (status == "smallest", status == "largest")
    ends = curve.points.data.teacher_parameters
    assert high is None or ends[0] < high < ends[-1]
    assert low is None or ends[0] < low < ends[-1]


def test_an_edge_within_noise_is_not_called_interior():
    """The minimum is inside, but the largest teacher is as good within noise."""
    best = 60_000 * 1.4**6.4
    found = {
        curve_of(one_curve(best, seed_noise=0.01, number=number)).optimum.status
        for number in range(10)
    }
    assert "interior" not in found
    assert "largest" in found


def test_three_teachers_are_too_few():
    curve = curve_of(one_curve(84_000, number_of_teachers=3))
    assert curve.optimum.status == "too_few_points"
    assert curve.optimum.teacher_parameters is None
    assert curve.optimum.interval == (60_000, 117_600)
    assert curve.optimum.grid_best == 84_000
    assert curve.optimum.grid_interval == (60_000, 117_600)
    assert curve.curse.largest_minus_best == pytest.approx(0.05 * np.log(1.4) ** 2, rel=1e-6)


def test_a_shape_that_is_no_parabola_widens_the_interval_of_one_seed():
    """With one seed the scatter about the smooth curve is all there is to judge noise by."""
    smooth = curve_of(one_curve(150_000, factor=1.2, number_of_teachers=9, seeds=1))
    rough = curve_of(
        one_curve(150_000, factor=1.2, number_of_teachers=9, seeds=1, seed_noise=0.008)
    )
    assert rough.optimum.draws.std() > 20 * smooth.optimum.draws.std()
    assert rough.points.seed_deviation is None
