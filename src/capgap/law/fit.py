"""A table of cells -> the law of capacity gap (arXiv 2311.07052): curves, contrasts, lines.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas

from capgap.errors import UserError
from capgap.law.contrasts import contrasts_of
from capgap.law.data import CURVE, Cells, per_token
from capgap.law.law import Curve, Estimate, Fit, Group, Law, Luck, Point
from capgap.law.lines import Best, fit_line, to_estimate
from capgap.law.model import MIN_TEACHERS, Floats, Integers, Posterior, Runs, fit_curves
from capgap.law.optimum import Comparison, compare_teachers, find_optimum
from capgap.law.own_surface import fit_surfaces
from capgap.law.warnings import all_warnings

FIT_POINTS = 61
# Students of as many tokens a parameter: shapes miss a size that was asked for by up to 2%
SAME_RATIO = 1.1
PATTERNS = 3  # of documents: levels are free, so slopes, curvatures and one more


@dataclass(frozen=True)
class Measured:
    """One curve's cells: rows of the table, and of each teacher [teachers] its sizes and the rows
    of its seeds."""

    rows: Integers  # [cells] row of every cell
    teacher: Integers  # [cells] index into the teachers
    sizes: tuple[int, ...]
    teachers: Floats  # [teachers] parameters
    student: float


def fit(cells: Cells, *, confidence: float = 0.9, draws: int = 1000, seed: int = 0) -> Law:
    """All that the cells say about teachers.

    All intervals are at `confidence`, from `draws` of the posterior; the same `seed` gives the
    same numbers. Raises UserError for an impossible confidence or number of draws.
    """
    if not 0.5 <= confidence < 1:
        raise UserError(f"confidence {confidence!r} is out of range: give 0.5 to below 1, as 0.9")
    if draws < 100:
        raise UserError(f"draws {draws!r} is too few for an interval: give 100 or more")
    rng = np.random.default_rng(seed)
    frame = cells.frame
    curves: list[Curve] = []
    lines, contrasts, lucks = [], [], []
    for architecture, own in frame.groupby("architecture", sort=True):
        measured = [_measured(rows) for _, rows in own.groupby(CURVE, sort=True)]
        keys = [key[1:3] for key, _ in own.groupby(CURVE, sort=True)]
        groups = _groups(str(architecture), keys, measured, len(curves))
        primary = _primary(groups, len(measured))
        posterior = _posterior(cells, measured, primary, draws, rng)
        found, optima = _curves(cells, measured, primary, posterior, confidence)
        curves += found
        for group, members in groups:
            known = [best for i in members if (best := optima[i]) is not None]
            lines.append(fit_line(group, known, confidence=confidence, rng=rng, draws=draws))
        lucks.append(_luck(str(architecture), own, posterior, confidence))
        if posterior is not None:
            contrasts += contrasts_of(found, posterior, groups, confidence)
    return Law(
        confidence=confidence,
        curves=tuple(curves),
        contrasts=tuple(contrasts),
        lines=tuple(lines),
        lucks=tuple(lucks),
        surfaces=tuple(fit_surfaces(cells, seed=seed)),
        warnings=tuple(all_warnings(cells, curves)),
        excluded=cells.excluded,
    )


def _measured(rows: pandas.DataFrame) -> Measured:
    sizes = tuple(int(size) for size in sorted(rows["teacher_size"].unique()))
    reached = rows.groupby("teacher_size")["teacher_parameters"].mean()
    return Measured(
        rows=rows.index.to_numpy(),
        teacher=np.searchsorted(sizes, rows["teacher_size"].to_numpy()),
        sizes=sizes,
        teachers=reached.to_numpy(float),
        # students cut out of different teachers may differ by the 2% that a shape can miss
        student=float(rows["student_parameters"].mean()),
    )


def _groups(
    architecture: str, keys: Sequence[tuple[str, int]], measured: Sequence[Measured], first: int
) -> list[tuple[Group, list[int]]]:
    """Curves that a law is fitted to, by their places among these, of which the first is the law's
    `first`: students on the same tokens; and where students have budgets of their own, those of as
    many tokens for each parameter."""
    found: list[tuple[Group, list[int]]] = []

    def add(members: list[int], tokens: int | None, ratio: float | None) -> None:
        places = tuple(first + i for i in members)
        group = Group(
            architecture=architecture,
            init=init,
            tokens=tokens,
            tokens_per_parameter=ratio,
            curves=places,
        )
        found.append((group, members))

    ratios = [tokens / one.student for (_, tokens), one in zip(keys, measured, strict=True)]
    for init in sorted({init for init, _ in keys}):
        own = [i for i, key in enumerate(keys) if key[0] == init]
        near: list[list[int]] = []
        for i in sorted(own, key=ratios.__getitem__):
            if near and ratios[i] <= SAME_RATIO * ratios[near[-1][0]]:
                near[-1].append(i)
            else:
                near.append([i])
        near = [sorted(one) for one in near if len({keys[i][1] for i in one}) > 1]
        shared = {i for one in near for i in one}
        for tokens in sorted({keys[i][1] for i in own}):
            members = [i for i in own if keys[i][1] == tokens]
            # one that shares its budget with no other is no group of its own if it has another
            if len(members) > 1 or members[0] not in shared:
                add(members, int(tokens), None)
        for one in near:
            add(one, None, float(np.exp(np.log([ratios[i] for i in one]).mean())))
    return found


def _primary(groups: Sequence[tuple[Group, list[int]]], number: int) -> list[int]:
    """The group of every curve in which its teachers are compared."""
    found = [-1] * number
    for place, (_, members) in enumerate(groups):
        for i in members:
            if found[i] < 0:
                found[i] = place
    return found


def _posterior(
    cells: Cells,
    measured: Sequence[Measured],
    primary: Sequence[int],
    draws: int,
    rng: np.random.Generator,
) -> Posterior | None:
    """None where nothing tells what noise is: no repeated run, no curve to scatter about."""
    rows = np.concatenate([one.rows for one in measured])
    numbers = [len(one.rows) for one in measured]
    curve = np.repeat(np.arange(len(measured)), numbers)
    first = np.cumsum([0, *(len(one.sizes) for one in measured)])
    point = np.concatenate([one.teacher for one in measured]) + first[curve]
    gaps = np.concatenate([np.log(one.teachers / one.student)[one.teacher] for one in measured])
    frame = cells.frame.loc[rows]
    patterns, known = _documents(cells, rows, curve, point)
    if cells.own_errors:
        stated = np.nan_to_num(frame["loss_stderr"].to_numpy(float)) ** 2
        number = np.bincount(point)
        known = known + np.bincount(point, stated) / number**2
    runs = Runs(
        losses=cells.losses[rows],
        gaps=gaps,
        curve=curve,
        point=point,
        seed=frame["seed"].rank(method="dense").to_numpy(int) - 1,
        training=frame["training"].astype("category").cat.codes.to_numpy(int),
        kind=np.unique(primary, return_inverse=True)[1],
        known=known,
        patterns=patterns,
    )
    return fit_curves(runs, draws=draws, rng=rng)


def _documents(
    cells: Cells, rows: Integers, curve: Integers, point: Integers
) -> tuple[Floats, Floats]:
    """Patterns [cells, patterns] and what they leave of each point's variance [points], in nats:
    how far the cells move against their curve when other documents are drawn."""
    number = cells.cells.shape[1]
    if number < 3:
        return np.zeros((len(rows), 0)), np.zeros(int(point.max()) + 1)
    tokens = cells.document_tokens
    shares = cells.cells[rows] - cells.losses[rows, None] * tokens
    counts = np.bincount(curve)
    means = np.stack([np.bincount(curve, column) / counts for column in shares.T], axis=1)
    shares = (shares - means[curve]) * np.sqrt(number / (number - 1)) / tokens.sum()
    left, sizes, _ = np.linalg.svd(shares, full_matrices=False)
    patterns = left[:, :PATTERNS] * sizes[:PATTERNS]
    rest = np.maximum((shares**2).sum(1) - (patterns**2).sum(1), 0.0)
    return patterns, np.bincount(point, rest) / np.bincount(point)


def _curves(
    cells: Cells,
    measured: Sequence[Measured],
    primary: Sequence[int],
    posterior: Posterior | None,
    confidence: float,
) -> tuple[list[Curve], list[Best | None]]:
    compared: dict[int, Comparison] = {}
    if posterior is not None:
        for group in set(primary):
            members = [i for i, one in enumerate(primary) if one == group]
            losses = [
                posterior.losses(i, np.log(measured[i].teachers / measured[i].student))
                for i in members
            ]
            compared |= dict(zip(members, compare_teachers(losses, confidence), strict=True))
    found = [
        _curve(cells, i, one, compared.get(i), posterior, confidence)
        for i, one in enumerate(measured)
    ]
    return [curve for curve, _ in found], [best for _, best in found]


def _curve(
    cells: Cells,
    number: int,
    one: Measured,
    comparison: Comparison | None,
    posterior: Posterior | None,
    confidence: float,
) -> tuple[Curve, Best | None]:
    frame = cells.frame.loc[one.rows]
    noise = None if posterior is None else float(np.sqrt((posterior.noise[:, number] ** 2).mean()))
    points = [_point(cells, one, i, comparison, noise) for i in range(len(one.sizes))]
    losses = np.array([point.loss for point in points])
    lowest = int((losses if comparison is None else comparison.cost).argmin())
    optimum, best = find_optimum(
        posterior, number, one.sizes, one.teachers, one.student, lowest, comparison, confidence
    )
    fitted = None
    if posterior is not None and len(one.sizes) >= MIN_TEACHERS:
        fitted = _fitted(posterior, number, one, confidence)
    first = frame.iloc[0]
    curve = Curve(
        architecture=first["architecture"],
        init=first["init"],
        tokens=int(first["tokens"]),
        student_size=int(first["student_size"]),
        student_parameters=round(one.student),
        points=tuple(points),
        fit=fitted,
        optimum=optimum,
        own_noise=noise,
    )
    return curve, best


def _point(
    cells: Cells, one: Measured, teacher: int, comparison: Comparison | None, noise: float | None
) -> Point:
    rows = one.rows[one.teacher == teacher]
    tokens = cells.document_tokens
    loss, error = _mean(cells.cells[rows], tokens, noise)
    stated = float(cells.frame["loss_stderr"].to_numpy(float)[rows].mean())
    if not np.isnan(stated):
        own = stated / (len(rows) ** 0.5 if cells.own_errors else 1.0)
        error = float(own if error is None else np.hypot(error, own))
    above, above_error = _mean(cells.teachers[rows], tokens, 0.0)
    # both runs of a difference have noise of their own
    twice = None if noise is None else noise * 2**0.5
    gain, gain_error = _mean(cells.baselines[rows] - cells.cells[rows], tokens, twice)
    longer, longer_error = None, None
    if cells.equal_flops is not None:
        longer, longer_error = _mean(cells.equal_flops[rows] - cells.cells[rows], tokens, twice)
    assert loss is not None
    return Point(
        teacher_size=one.sizes[teacher],
        teacher_parameters=round(float(one.teachers[teacher])),
        teacher_loss=above,
        teacher_loss_stderr=above_error,
        loss=loss,
        loss_stderr=error,
        cost=None if comparison is None else float(comparison.cost[teacher]),
        cost_stderr=None if comparison is None else float(comparison.stderr[teacher]),
        worse=False if comparison is None else bool(comparison.worse[teacher]),
        gain=gain,
        gain_stderr=gain_error,
        gain_flops=longer,
        gain_flops_stderr=longer_error,
        losses=tuple(cells.losses[rows].tolist()),
        seeds=tuple(cells.frame["seed"].to_numpy()[rows].tolist()),
    )


def _mean(rows: Floats, tokens: Floats, noise: float | None) -> tuple[float | None, float | None]:
    """Over the seeds that are there: nats per token, and its standard error from documents and a
    run's own noise; None where neither is known."""
    rows = rows[~np.isnan(rows).any(axis=1)]
    if not len(rows):
        return None, None
    by_seed = per_token(rows, tokens)
    mean, variance = float(by_seed.mean()), 0.0
    number = len(tokens)
    if number > 1:
        shares = rows.mean(axis=0) - mean * tokens
        variance = float((shares**2).sum()) * number / (number - 1) / float(tokens.sum()) ** 2
    elif not noise:
        return mean, None
    return mean, float(np.sqrt(variance + (noise or 0.0) ** 2 / len(rows)))


def _fitted(posterior: Posterior, number: int, one: Measured, confidence: float) -> Fit:
    logs = np.linspace(np.log(one.teachers[0]), np.log(one.teachers[-1]), FIT_POINTS)
    drawn = posterior.losses(number, logs - np.log(one.student))
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return Fit(
        teacher_parameters=tuple(np.exp(logs).tolist()),
        loss=tuple(drawn.mean(axis=0).tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
    )


def _luck(
    architecture: str, rows: pandas.DataFrame, posterior: Posterior | None, confidence: float
) -> Luck:
    deviation: Estimate | None = None
    if posterior is not None:
        middle = float(np.median(posterior.luck))
        deviation = to_estimate(np.concatenate([[middle], posterior.luck]), confidence)
    return Luck(
        architecture=architecture,
        deviation=deviation,
        trainings=rows["training"].nunique(),
        known=posterior is not None,
    )
