"""How far the points of a curve could have come out otherwise.

Two sources, carried as draws so that every later number inherits them:
- documents: the held-out documents are the same for every run, so they are resampled with one
  resample for all runs, and what is common to all teachers cancels in their differences;
- seeds: the scatter of repeated runs, after what a seed does to all teachers alike is removed, and
  the scatter about the smooth curves. It is pooled over the curves of a kind, because two or three
  seeds say little on their own; with one seed the curves alone tell it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capgap.law.cells import CurveData, Floats
from capgap.law.smooth import Observed, SmoothCurve, Smoothed, smooth

MIN_TEACHERS = 4  # a quadratic through three points leaves nothing to check it by


@dataclass(frozen=True)
class Points:
    """The points of one curve, over its teachers, and their noise.

    `measured` are draws [resamples, teachers] of the points, for comparing teachers as they are;
    `smooth` the curve through them, None below four teachers. `seed_deviation` is the pooled
    standard deviation of one run, None with one seed.
    """

    data: CurveData
    losses: Floats  # [teachers] nats per token
    stderr: Floats  # [teachers] of the loss itself: documents and seeds
    comparison_stderr: Floats  # [teachers] of the loss against the mean of all teachers
    measured: Floats
    smooth: SmoothCurve | None
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


def draw_points(
    curves: Sequence[CurveData], counts: Floats, rng: np.random.Generator
) -> list[Points]:
    """Points and draws for the curves of one kind; `counts` as `document_counts` gives them."""
    resamples = len(counts)
    averages = [_averages(data) for data in curves]
    losses = [mean_losses(data.cell_documents, data.document_tokens) for data in curves]
    means = [a.to_teachers @ y for a, y in zip(averages, losses, strict=True)]
    freedom = sum(a.freedom for a in averages)
    squares = sum(
        float(np.sum((a.to_residuals @ y) ** 2)) for a, y in zip(averages, losses, strict=True)
    )
    smoothed = _smooth(curves, averages, means, (squares, freedom), resamples, rng)
    if smoothed is not None:
        sigma = smoothed.sigma
    elif freedom:
        # from few degrees of freedom, hence Student's t
        sigma = np.sqrt(squares / rng.chisquare(freedom, resamples))
    else:
        sigma = np.zeros(resamples)

    through = iter(() if smoothed is None else smoothed.curves)
    points = []
    for data, a, y in zip(curves, averages, means, strict=True):
        own = _document_draws(data, a, counts) + _stated_draws(data, a, resamples, rng)
        of_seeds = rng.standard_normal((resamples, len(a.to_residuals))) @ a.to_teachers.T
        measured = y + own + of_seeds * sigma[:, None]
        against_mean = measured - measured.mean(axis=1, keepdims=True)
        points.append(
            Points(
                data=data,
                losses=y,
                stderr=np.hypot(measured.std(axis=0), _stated_of_all(data)),
                comparison_stderr=against_mean.std(axis=0),
                measured=measured,
                smooth=next(through) if data.num_teachers >= MIN_TEACHERS else None,
                seed_deviation=float(np.sqrt(squares / freedom)) if freedom else None,
            )
        )
    return points


def _smooth(
    curves: Sequence[CurveData],
    averages: Sequence[_Averages],
    means: Sequence[Floats],
    repeats: tuple[float, int],
    resamples: int,
    rng: np.random.Generator,
) -> Smoothed | None:
    """Smooth curves for those with enough teachers; None where there are none."""
    observed, of_documents, stated = [], [], []
    for data, a, y in zip(curves, averages, means, strict=True):
        if data.num_teachers < MIN_TEACHERS:
            continue
        gaps = np.log(data.teacher_parameters / data.student_parameters)
        observed.append(Observed(gaps, y, a.to_teachers @ a.to_teachers.T))
        losses = mean_losses(data.cell_documents, data.document_tokens)
        shares = a.to_teachers @ (data.cell_documents - losses[:, None] * data.document_tokens)
        of_documents.append((shares - shares.mean(axis=0)) / data.document_tokens.sum())
        own = data.cell_stderr if data.independent_errors else None
        variance = np.zeros(len(losses)) if own is None else own**2
        stated.append((a.to_teachers**2) @ variance)
    if not observed:
        return None
    known = shrunk_covariance(np.vstack(of_documents)) + np.diag(np.concatenate(stated))
    return smooth(observed, known, repeats=repeats, resamples=resamples, rng=rng)


def shrunk_covariance(shares: Floats) -> Floats:
    """Covariance of the sums over documents of `shares` [points, documents].

    Correlations are shrunk towards none by as much as they are uncertain (Schafer and Strimmer
    2005, 10.2202/1544-6115.1175): of more points than documents they would be mostly noise.
    """
    number = shares.shape[1]
    deviation = shares.std(axis=1) * number**0.5
    if number < 3 or not deviation.all():
        return np.diag(deviation**2)
    standard = (shares - shares.mean(axis=1, keepdims=True)) / shares.std(axis=1, keepdims=True)
    correlation = standard @ standard.T / number
    scatter = (standard**2 @ (standard**2).T / number - correlation**2) / (number - 1)
    off = ~np.eye(len(shares), dtype=bool)
    kept = 1 - min(1.0, float(scatter[off].sum() / max((correlation[off] ** 2).sum(), 1e-300)))
    correlation[off] *= kept
    return correlation * np.outer(deviation, deviation) * number / (number - 1)


def _document_draws(data: CurveData, averages: _Averages, counts: Floats) -> Floats:
    """What other documents would have made of the points: [resamples, teachers], about 0."""
    drawn = resampled_losses(data.cell_documents, data.document_tokens, counts)
    drawn = drawn - mean_losses(data.cell_documents, data.document_tokens)
    return np.asarray(drawn @ averages.to_teachers.T)


def _stated_draws(
    data: CurveData, averages: _Averages, resamples: int, rng: np.random.Generator
) -> Floats:
    """The same for errors that a table states as each cell's own."""
    if data.cell_stderr is None or not data.independent_errors:
        return np.zeros((resamples, data.num_teachers))
    drawn = rng.standard_normal((resamples, len(data.cell_stderr))) * data.cell_stderr
    return np.asarray(drawn @ averages.to_teachers.T)


def _stated_of_all(data: CurveData) -> Floats:
    """[teachers] errors that a table states and that all cells of a curve have in common."""
    if data.cell_stderr is None or data.independent_errors:
        return np.zeros(data.num_teachers)
    return np.array(
        [data.cell_stderr[data.cell_teacher == i].mean() for i in range(data.num_teachers)]
    )


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
