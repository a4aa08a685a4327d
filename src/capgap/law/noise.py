"""How far the points of a curve could have come out otherwise.

Three sources, all carried as draws so that every later number inherits them:
- documents: the held-out documents are the same for every run, so they are resampled with one
  resample for all runs, and what is common to all teachers cancels in their differences;
- seeds: the scatter of repeated runs, after what a seed does to all teachers alike is removed.
  It is pooled over the curves of a kind, because two or three seeds say little on their own;
- misfit: scatter about the smooth curve beyond the first two. With one seed it is the only
  place where seed noise shows. It is pooled over the curves of a kind as well.
The last two are estimated from few degrees of freedom; draws are scaled like Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capgap.law.cells import CurveData, Floats

MIN_TEACHERS = 4  # a quadratic through three points leaves nothing to check it by


@dataclass(frozen=True)
class Points:
    """The points of one curve, over its teachers, and their noise.

    `measured` and `smooth` are draws [resamples, teachers] of the points: `measured` for
    comparing teachers as they are, `smooth` with the misfit of the quadratic added.
    `seed_deviation` is the pooled standard deviation of one run, None with one seed.
    """

    data: CurveData
    losses: Floats  # [teachers] nats per token
    stderr: Floats  # [teachers] of the loss itself: documents and seeds
    comparison_stderr: Floats  # [teachers] of the loss against the mean of all teachers
    measured: Floats
    smooth: Floats
    seed_deviation: float | None


@dataclass(frozen=True)
class _Averages:
    """Linear maps from runs to teacher means and to what seeds leave unexplained."""

    to_teachers: Floats  # [teachers, cells]
    to_residuals: Floats  # [cells, cells]
    freedom: int


def document_counts(num_documents: int, resamples: int, rng: np.random.Generator) -> Floats:
    """How often each document occurs in each resample: [resamples, documents]."""
    share = np.full(num_documents, 1 / num_documents)
    return rng.multinomial(num_documents, share, size=resamples).astype(np.float64)


def mean_losses(rows: Floats, tokens: Floats) -> Floats:
    """Nats per token [rows] from summed nats [rows, documents] and tokens [documents]."""
    return rows.sum(axis=1) / tokens.sum()


def resampled_losses(rows: Floats, tokens: Floats, counts: Floats) -> Floats:
    """Nats per token of each resample of the documents: [resamples, rows]."""
    return (counts @ rows.T) / (counts @ tokens)[:, None]


def quadratic(u: Floats, weights: Floats) -> Floats:
    """The map [3, teachers] from losses to the coefficients c0, c1, c2 of the weighted fit."""
    powers = np.stack([np.ones_like(u), u, u * u], axis=1)
    weighted = powers * weights[:, None]
    return np.linalg.solve(weighted.T @ powers, weighted.T)


def log_sizes(data: CurveData) -> tuple[Floats, float]:
    """u = ln T - center over the teachers, and the center."""
    logs = np.log(data.teacher_parameters)
    return logs - logs.mean(), float(logs.mean())


def point_weights(data: CurveData) -> Floats:
    """Runs behind each point, scaled to mean one."""
    runs = np.bincount(data.cell_teacher, minlength=data.num_teachers).astype(np.float64)
    return runs / runs.mean()


def draw_points(
    curves: Sequence[CurveData], counts: Floats, rng: np.random.Generator
) -> list[Points]:
    """Points and draws for the curves of one kind; `counts` as `document_counts` gives them."""
    resamples = len(counts)
    averages = [_averages(data) for data in curves]
    losses = [mean_losses(data.cell_documents, data.document_tokens) for data in curves]
    by_documents = [
        resampled_losses(data.cell_documents, data.document_tokens, counts) @ a.to_teachers.T
        for data, a in zip(curves, averages, strict=True)
    ]
    freedom = sum(a.freedom for a in averages)
    squares = sum(
        float(np.sum((a.to_residuals @ y) ** 2)) for a, y in zip(averages, losses, strict=True)
    )
    seed_variance = squares / freedom if freedom else 0.0
    seed_scale = np.sqrt(seed_variance) * _student_scale(freedom, resamples, rng)
    misfit, misfit_freedom = _misfit_variance(curves, averages, losses, by_documents, seed_variance)
    misfit_scale = np.sqrt(misfit) * _student_scale(misfit_freedom, resamples, rng)

    points = []
    for data, a, y, documents in zip(curves, averages, losses, by_documents, strict=True):
        of_seeds = rng.standard_normal((resamples, len(y))) @ a.to_teachers.T
        of_misfit = rng.standard_normal((resamples, data.num_teachers)) * misfit_scale[:, None]
        measured = documents + of_seeds * seed_scale[:, None]
        smooth = measured + of_misfit
        if not freedom:
            measured = smooth
        against_mean = measured - measured.mean(axis=1, keepdims=True)
        points.append(
            Points(
                data=data,
                losses=a.to_teachers @ y,
                stderr=measured.std(axis=0),
                comparison_stderr=against_mean.std(axis=0),
                measured=measured,
                smooth=smooth,
                seed_deviation=float(np.sqrt(seed_variance)) if freedom else None,
            )
        )
    return points


def _averages(data: CurveData) -> _Averages:
    """Least squares for loss = teacher + seed; the mean over seeds where no run is missing.

    With a missing run, the other teachers tell what its seed would have done. Where the seeds do
    not overlap enough to tell (a seed effect is not estimable), plain means are taken.
    """
    num_cells = len(data.cell_teacher)
    teachers = np.eye(data.num_teachers)[data.cell_teacher]
    seeds, seed_index = np.unique(data.cell_seed, return_inverse=True)
    # sum-to-zero coding, so that a teacher's mean is its loss at the average seed
    coding = np.vstack([np.eye(len(seeds) - 1), -np.ones((1, len(seeds) - 1))])
    design = np.hstack([teachers, coding[seed_index]])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        design = teachers
    solve = np.linalg.pinv(design)
    return _Averages(
        to_teachers=solve[: data.num_teachers],
        to_residuals=np.eye(num_cells) - design @ solve,
        freedom=num_cells - design.shape[1],
    )


def _misfit_variance(
    curves: Sequence[CurveData],
    averages: Sequence[_Averages],
    losses: Sequence[Floats],
    by_documents: Sequence[Floats],
    seed_variance: float,
) -> tuple[float, int]:
    """Variance of a point about the quadratic, beyond documents and seeds, and its freedom."""
    excess, unit, freedom = 0.0, 0.0, 0
    for data, a, y, documents in zip(curves, averages, losses, by_documents, strict=True):
        if data.num_teachers < MIN_TEACHERS:
            continue
        u, _ = log_sizes(data)
        weights = point_weights(data)
        powers = np.stack([np.ones_like(u), u, u * u], axis=1)
        leave = np.eye(data.num_teachers) - powers @ quadratic(u, weights)
        form = leave.T @ (weights[:, None] * leave)
        known = np.cov(documents, rowvar=False) + seed_variance * a.to_teachers @ a.to_teachers.T
        means = a.to_teachers @ y
        excess += float(means @ form @ means - np.trace(form @ known))
        unit += float(np.trace(form))
        freedom += data.num_teachers - 3
    return (max(0.0, excess / unit), freedom) if freedom else (0.0, 0)


def _student_scale(freedom: int, resamples: int, rng: np.random.Generator) -> Floats:
    """Factors that turn normal draws into Student's t draws of this freedom."""
    if freedom == 0:
        return np.zeros(resamples)
    return np.sqrt(freedom / rng.chisquare(freedom, resamples))
