"""Records -> law.json: every curve with its optimum, the laws, the warnings, the verdict."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from capgap.errors import UserError
from capgap.law.cells import CurveData, Floats, curves_from_records, excluded_records
from capgap.law.csv_input import TableCells
from capgap.law.curve import Curve, Optimum, fit_curve
from capgap.law.forms import FormFit, compare_forms
from capgap.law.linear import Estimate, LinearLaw, fit_linear
from capgap.law.noise import document_counts, draw_points, mean_losses, resampled_losses
from capgap.law.own_surface import fit_surfaces
from capgap.law.published import PUBLISHED_LINES
from capgap.law.validity import Warned, curve_warnings, record_warnings, table_warnings
from capgap.law.verdict import Gain, verdict
from capgap.records import RunRecord

SCHEMA = 1
FIT_POINTS = 61


def fit_law(
    records: Sequence[RunRecord],
    *,
    confidence: float = 0.9,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit the law of capacity gap (arXiv 2311.07052) to the records of a sweep.

    Returns the content of law.json: plain values, sizes in non-embedding parameters, losses in
    nats per token. All intervals are at `confidence`, from `resamples` draws over held-out
    documents and seeds; the same `seed` gives the same numbers. In an interval, None is an open
    end. Raises UserError for an impossible confidence or number of resamples, for two records of
    one place of the grid, and for records evaluated on different documents.
    """
    counts = _document_counts(
        [len(r.heldout.document_tokens) for r in records if r.heldout], confidence, resamples, seed
    )
    return _fit(
        curves_from_records(records),
        counts,
        excluded_records(records),
        record_warnings(records, counts),
        confidence=confidence,
        seed=seed,
    )


def fit_table(
    table: TableCells,
    *,
    confidence: float = 0.9,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The same for the cells of a table (`csv_input.read_table`)."""
    counts = _document_counts([1], confidence, resamples, seed)
    return _fit(
        table.curves,
        counts,
        table.excluded,
        table_warnings(table),
        confidence=confidence,
        seed=seed,
    )


def _document_counts(
    numbers: Iterable[int], confidence: float, resamples: int, seed: int
) -> dict[int, Floats]:
    """Resamples of the held-out documents, for every number of documents."""
    if not 0.5 <= confidence < 1:
        raise UserError(f"confidence {confidence!r} is out of range: give 0.5 to below 1, as 0.9")
    if resamples < 100:
        raise UserError(f"resamples {resamples!r} is too few for an interval: give 100 or more")
    rng = np.random.default_rng(seed)
    return {number: document_counts(number, resamples, rng) for number in sorted(set(numbers))}


def _fit(
    data: Sequence[CurveData],
    counts: dict[int, Floats],
    excluded: list[dict[str, str]],
    about_records: list[Warned],
    *,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    resamples = next((len(own) for own in counts.values()), 0)
    rng = np.random.default_rng([seed, 1])
    grid_shift = rng.uniform(-1, 1, resamples)
    curves: list[Curve] = []
    laws: list[LinearLaw] = []
    forms: list[list[FormFit]] = []
    for _, members in groupby(data, key=lambda one: one.kind):
        of_kind = list(members)
        of_documents = counts[len(of_kind[0].document_tokens)]
        fitted = [
            fit_curve(points, confidence=confidence)
            for points in draw_points(of_kind, of_documents, rng)
        ]
        curves += fitted
        laws.append(fit_linear(fitted, confidence=confidence, grid_shift=grid_shift))
        forms.append(compare_forms(fitted, confidence=confidence, grid_shift=grid_shift))

    gains = [
        _gains(curve.points.data, counts[len(curve.points.data.document_tokens)])
        for curve in curves
    ]
    about_curves = [curve_warnings(curve) for curve in curves]
    described = [
        _describe_curve(curve, own_gains, own_warnings, counts, confidence)
        for curve, own_gains, own_warnings in zip(curves, gains, about_curves, strict=True)
    ]
    surfaces = fit_surfaces(data, seed=seed)
    warnings = about_records + [warned for own in about_curves for warned in own]
    return {
        "schema": SCHEMA,
        "scale": "non_embedding",
        "confidence": confidence,
        "curves": described,
        "laws": [
            _describe_law(law) | {"forms": [form.as_dict() for form in own]}
            for law, own in zip(laws, forms, strict=True)
        ],
        "surfaces": surfaces,
        "published": [line.as_dict() for line in PUBLISHED_LINES],
        "excluded": excluded,
        "validity": [warned.as_dict() for warned in warnings],
        "verdict": verdict(
            curves, gains, laws, forms, surfaces, about_records, confidence=confidence
        ),
    }


def _gains(data: CurveData, counts: Floats) -> list[Gain | None]:
    """Baseline loss minus loss for each teacher, over the seeds that have a baseline.

    The standard error holds the paired documents and, with two seeds or more, their scatter.
    """
    gains: list[Gain | None] = []
    differences = data.baseline_documents - data.cell_documents
    for teacher in range(data.num_teachers):
        rows = differences[data.cell_teacher == teacher]
        rows = rows[~np.isnan(rows).any(axis=1)]
        gains.append(_mean_over_seeds(rows, data.document_tokens, counts))
    return gains


def _mean_over_seeds(rows: Floats, tokens: Floats, counts: Floats) -> Gain | None:
    if not len(rows):
        return None
    by_seed = mean_losses(rows, tokens)
    variance = float(resampled_losses(rows, tokens, counts).mean(axis=1).var())
    if len(rows) > 1:
        variance += float(by_seed.var(ddof=1)) / len(rows)
    return Gain(float(by_seed.mean()), float(np.sqrt(variance)))


def _describe_curve(
    curve: Curve,
    gains: Sequence[Gain | None],
    warnings: Sequence[Warned],
    counts: dict[int, Floats],
    confidence: float,
) -> dict[str, Any]:
    points, data = curve.points, curve.points.data
    losses = mean_losses(data.cell_documents, data.document_tokens)
    described = []
    for teacher, size in enumerate(data.teacher_sizes):
        own = data.cell_teacher == teacher
        above = data.teacher_documents[own]
        above = above[~np.isnan(above).any(axis=1)]
        of_teacher = _mean_over_seeds(
            above, data.document_tokens, counts[len(data.document_tokens)]
        )
        gain = gains[teacher]
        described.append(
            {
                "teacher_size": size,
                "teacher_parameters": round(float(data.teacher_parameters[teacher])),
                "teacher_loss": of_teacher.value if of_teacher else None,
                "teacher_loss_stderr": of_teacher.stderr if of_teacher else None,
                "loss": float(points.losses[teacher]),
                "loss_stderr": float(points.stderr[teacher]),
                "comparison_stderr": float(points.comparison_stderr[teacher]),
                "losses": losses[own].tolist(),
                "seeds": data.cell_seed[own].tolist(),
                "gain": gain.value if gain else None,
                "gain_stderr": gain.stderr if gain else None,
            }
        )
    return {
        "architecture": data.kind.architecture,
        "init": data.kind.init,
        "tokens": data.kind.tokens,
        "student_size": data.student_size,
        "student_parameters": data.student_parameters,
        "points": described,
        "seed_deviation": points.seed_deviation,
        "fit": _describe_fit(curve, confidence),
        "optimum": _describe_optimum(curve.optimum, data.student_parameters),
        "curse": {
            "largest_minus_best": curve.curse.largest_minus_best,
            "stderr": curve.curse.stderr,
            "beyond_noise": curve.curse.beyond_noise,
        },
        "warnings": [warned.message for warned in warnings],
    }


def _describe_fit(curve: Curve, confidence: float) -> dict[str, Any] | None:
    """The smooth curve with its band, over the teachers' sizes."""
    smooth = curve.points.smooth
    if smooth is None:
        return None
    gaps = np.linspace(*smooth.ends, FIT_POINTS)
    mean, draws = smooth.losses(gaps)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return {
        "teacher_parameters": (np.exp(gaps) * curve.student_parameters).tolist(),
        "loss": mean.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }


def _describe_optimum(optimum: Optimum, student: int) -> dict[str, Any]:
    best, interval = optimum.teacher_parameters, optimum.interval
    return {
        "status": optimum.status,
        "teacher_parameters": best,
        "interval": list(interval) if interval else None,
        "ratio": None if best is None else best / student,
        "ratio_interval": [None if end is None else end / student for end in interval]
        if interval
        else None,
        "grid_best": optimum.grid_best,
        "grid_interval": list(optimum.grid_interval),
        "loss": optimum.loss,
    }


def _describe_law(law: LinearLaw) -> dict[str, Any]:
    described: dict[str, Any] = {
        "architecture": law.kind.architecture,
        "init": law.kind.init,
        "tokens": law.kind.tokens,
        "form": "linear",
    }
    estimates: dict[str, Estimate | None] = {
        "slope": law.slope,
        "intercept": law.intercept,
        "ratio": law.ratio,
    }
    for name, estimate in estimates.items():
        described[name] = estimate.value if estimate else None
        described[f"{name}_interval"] = [estimate.low, estimate.high] if estimate else None
    band = law.band
    described["band"] = band and {
        "student": band.student.tolist(),
        "low": band.low.tolist(),
        "mid": band.mid.tolist(),
        "high": band.high.tolist(),
    }
    return described | {"status": law.status, "reason": law.reason, "students": law.students}
