"""A table of cells -> the law of capacity gap (arXiv 2311.07052): curves, contrasts, lines.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas

from capgap.errors import UserError
from capgap.law.data import CURVE, Cells, per_token
from capgap.law.law import Contrast, Curve, Estimate, Fit, Group, Law, Luck, Point
from capgap.law.lines import (
    Best,
    Comparison,
    compare_teachers,
    find_optimum,
    fit_line,
    interval_of,
    to_estimate,
)
from capgap.law.model import MIN_TEACHERS, Floats, Integers, Posterior, Runs, fit_curves
from capgap.law.own_surface import fit_surfaces
from capgap.law.warnings import all_warnings

FIT_POINTS = 61
# Students of as many tokens a parameter: shapes miss a size that was asked for by up to 2%
SAME_RATIO = 1.1
PATTERNS = 3  # of documents: levels are free, so slopes, curvatures and one more


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
    curves: list[Curve] = []
    lines, contrasts, lucks = [], [], []
    for _, rows in cells.frame.groupby("architecture", sort=True):
        own = _Architecture(cells, rows, len(curves), confidence)
        groups = own.groups()
        posterior = own.posterior(groups, draws, rng)
        found, optima = own.curves(groups, posterior)
        curves += found
        for group in groups:
            known = [best for i in own.members(group) if (best := optima[i]) is not None]
            lines.append(fit_line(group, known, confidence=confidence, rng=rng, draws=draws))
        lucks.append(own.luck(posterior))
        if posterior is not None:
            members = [own.members(group) for group in groups]
            contrasts += contrasts_of(found, posterior, members, confidence)
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


class _Measured:
    """The cells of a curve: rows of the table [cells], index of the teacher of each, the sizes of
    the teachers, asked for and reached [teachers], and ln(T/S) of the reached ones."""

    def __init__(self, rows: pandas.DataFrame) -> None:
        by_teacher = rows.groupby("teacher_size")["teacher_parameters"].mean()
        self.rows: Integers = rows.index.to_numpy()
        self.sizes = tuple(int(size) for size in by_teacher.index)
        self.teacher: Integers = np.searchsorted(self.sizes, rows["teacher_size"].to_numpy())
        self.teachers: Floats = by_teacher.to_numpy(float)
        # students cut out of different teachers may differ by the 2% that a shape can miss
        self.student = float(rows["student_parameters"].mean())
        self.gaps: Floats = np.log(self.teachers / self.student)
        self.key = rows.iloc[0][CURVE]


@dataclass(frozen=True)
class _Architecture:
    """The rows of an architecture; `first` is the index of its first curve in the law."""

    cells: Cells
    rows: pandas.DataFrame
    first: int
    confidence: float

    @cached_property
    def measured(self) -> list[_Measured]:
        return [_Measured(rows) for _, rows in self.rows.groupby(CURVE, sort=True)]

    def members(self, group: Group) -> list[int]:
        """Indices of the curves of a group among those of the architecture."""
        return [index - self.first for index in group.curves]

    def groups(self) -> list[Group]:
        """Curves that a law is fitted to: students on the same tokens; and where students have
        budgets of their own, those on as many tokens for each parameter."""
        groups = []
        keys = [one.key for one in self.measured]
        ratios = [one.key["tokens"] / one.student for one in self.measured]

        def add(members: list[int], tokens: int | None, ratio: float | None) -> None:
            groups.append(
                Group(
                    architecture=keys[members[0]]["architecture"],
                    init=keys[members[0]]["init"],
                    tokens=tokens,
                    tokens_per_parameter=ratio,
                    curves=tuple(self.first + i for i in members),
                )
            )

        for init in sorted({key["init"] for key in keys}):
            own = [i for i, key in enumerate(keys) if key["init"] == init]
            near: list[list[int]] = []
            for i in sorted(own, key=ratios.__getitem__):
                if near and ratios[i] <= SAME_RATIO * ratios[near[-1][0]]:
                    near[-1].append(i)
                else:
                    near.append([i])
            near = [sorted(one) for one in near if len({keys[i]["tokens"] for i in one}) > 1]
            shared = {i for one in near for i in one}
            for tokens in sorted({keys[i]["tokens"] for i in own}):
                members = [i for i in own if keys[i]["tokens"] == tokens]
                # one that shares its budget with no other is no group of its own if it has another
                if len(members) > 1 or members[0] not in shared:
                    add(members, int(tokens), None)
            for one in near:
                add(one, None, float(np.exp(np.log([ratios[i] for i in one]).mean())))
        return groups

    def primary(self, groups: list[Group]) -> list[int]:
        """The group of every curve in which its teachers are compared: the first that it is in."""
        members = [self.members(group) for group in groups]
        every = range(len(self.measured))
        return [next(i for i, own in enumerate(members) if curve in own) for curve in every]

    def posterior(
        self, groups: list[Group], draws: int, rng: np.random.Generator
    ) -> Posterior | None:
        """None where nothing tells what noise is: no repeated run, no curve to scatter about."""
        cells, measured = self.cells, self.measured
        rows = np.concatenate([one.rows for one in measured])
        curve = np.repeat(np.arange(len(measured)), [len(one.rows) for one in measured])
        first = np.cumsum([0, *(len(one.sizes) for one in measured)])
        point = np.concatenate([one.teacher for one in measured]) + first[curve]
        frame = cells.frame.loc[rows]
        patterns, known = _documents(cells, rows, curve, point)
        if cells.own_errors:
            stated = np.nan_to_num(frame["loss_stderr"].to_numpy(float)) ** 2
            known = known + np.bincount(point, stated) / np.bincount(point) ** 2
        runs = Runs(
            losses=cells.losses[rows],
            gaps=np.concatenate([one.gaps[one.teacher] for one in measured]),
            curve=curve,
            point=point,
            seed=frame["seed"].rank(method="dense").to_numpy(int) - 1,
            training=frame["training"].astype("category").cat.codes.to_numpy(int),
            kind=np.unique(self.primary(groups), return_inverse=True)[1],
            known=known,
            patterns=patterns,
        )
        return fit_curves(runs, draws=draws, rng=rng)

    def curves(
        self, groups: list[Group], posterior: Posterior | None
    ) -> tuple[list[Curve], list[Best | None]]:
        """Every curve, and the best teacher of each for a law."""
        compared: dict[int, Comparison] = {}
        if posterior is not None:
            primary = self.primary(groups)
            for group in set(primary):
                members = [i for i, own in enumerate(primary) if own == group]
                losses = [posterior.losses(i, self.measured[i].gaps) for i in members]
                together = compare_teachers(losses, self.confidence)
                compared |= dict(zip(members, together, strict=True))
        pairs = [self._curve(i, compared.get(i), posterior) for i in range(len(self.measured))]
        return [curve for curve, _ in pairs], [best for _, best in pairs]

    def _curve(
        self, index: int, comparison: Comparison | None, posterior: Posterior | None
    ) -> tuple[Curve, Best | None]:
        own, noise, fitted = self.measured[index], None, None
        if posterior is not None:
            noise = float(np.sqrt((posterior.noise[:, index] ** 2).mean()))
            if len(own.sizes) >= MIN_TEACHERS:
                fitted = self._fitted(index, posterior)
        points = [self._point(own, i, comparison, noise) for i in range(len(own.sizes))]
        costs = [point.loss for point in points] if comparison is None else comparison.cost
        optimum, best = find_optimum(
            posterior,
            index,
            own.sizes,
            own.teachers,
            own.student,
            int(np.argmin(costs)),
            comparison,
            self.confidence,
        )
        curve = Curve(
            architecture=own.key["architecture"],
            init=own.key["init"],
            tokens=int(own.key["tokens"]),
            student_size=int(own.key["student_size"]),
            student_parameters=round(own.student),
            points=tuple(points),
            fit=fitted,
            optimum=optimum,
            own_noise=noise,
        )
        return curve, best

    def _point(
        self, own: _Measured, teacher: int, comparison: Comparison | None, noise: float | None
    ) -> Point:
        cells, rows = self.cells, own.rows[own.teacher == teacher]
        tokens = cells.document_tokens
        loss, error = _mean(cells.cells[rows], tokens, noise)
        stated = float(cells.frame["loss_stderr"].to_numpy(float)[rows].mean())
        if not np.isnan(stated):
            stated /= len(rows) ** 0.5 if cells.own_errors else 1.0
            error = float(stated if error is None else np.hypot(error, stated))
        above, above_error = _mean(cells.teachers[rows], tokens, 0.0)
        # both runs of a difference have noise of their own
        twice = None if noise is None else noise * 2**0.5
        differences = {"gain": cells.baselines - cells.cells}
        if cells.equal_flops is not None:
            differences["gain_flops"] = cells.equal_flops - cells.cells
        means: dict[str, float | None] = dict.fromkeys(("gain_flops", "gain_flops_stderr"))
        for name, documents in differences.items():
            means[name], means[f"{name}_stderr"] = _mean(documents[rows], tokens, twice)
        assert loss is not None
        return Point(
            teacher_size=own.sizes[teacher],
            teacher_parameters=round(float(own.teachers[teacher])),
            teacher_loss=above,
            teacher_loss_stderr=above_error,
            loss=loss,
            loss_stderr=error,
            cost=None if comparison is None else float(comparison.cost[teacher]),
            cost_stderr=None if comparison is None else float(comparison.stderr[teacher]),
            worse=False if comparison is None else bool(comparison.worse[teacher]),
            losses=tuple(cells.losses[rows].tolist()),
            seeds=tuple(cells.frame["seed"].to_numpy()[rows].tolist()),
            **means,
        )

    def _fitted(self, index: int, posterior: Posterior) -> Fit:
        own = self.measured[index]
        logs = np.linspace(np.log(own.teachers[0]), np.log(own.teachers[-1]), FIT_POINTS)
        drawn = posterior.losses(index, logs - np.log(own.student))
        low, high = interval_of(drawn, self.confidence)
        return Fit(
            teacher_parameters=tuple(np.exp(logs).tolist()),
            loss=tuple(drawn.mean(axis=0).tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
        )

    def luck(self, posterior: Posterior | None) -> Luck:
        deviation = None
        if posterior is not None:
            middle = float(np.median(posterior.luck))
            deviation = to_estimate(posterior.luck, self.confidence, middle)
        return Luck(
            architecture=self.rows.iloc[0]["architecture"],
            deviation=deviation,
            trainings=self.rows["training"].nunique(),
            known=posterior is not None,
        )


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


def _mean(rows: Floats, tokens: Floats, noise: float | None) -> tuple[float | None, float | None]:
    """Over the seeds that are there: nats per token, and its standard error from documents and a
    run's own noise; None where neither is known."""
    rows = rows[~np.isnan(rows).any(axis=1)]
    if not len(rows):
        return None, None
    mean, variance = float(per_token(rows, tokens).mean()), 0.0
    number = len(tokens)
    if number > 1:
        shares = rows.mean(axis=0) - mean * tokens
        variance = float((shares**2).sum()) * number / (number - 1) / float(tokens.sum()) ** 2
    elif not noise:
        return mean, None
    return mean, float(np.sqrt(variance + (noise or 0.0) ** 2 / len(rows)))


def contrasts_of(
    curves: Sequence[Curve],
    posterior: Posterior,
    groups: Sequence[Sequence[int]],
    confidence: float,
) -> list[Contrast]:
    """What moves the best teacher: slopes of curves over the same teachers beside each other.

    More against fewer tokens, pruned against fixed first weights, through an assistant against at
    once, and the largest student of a group against its smallest. `curves` in the order of the
    posterior's; groups: their indices.

    A difference between two curves of the same teachers and seeds holds nothing of the teachers'
    luck, and needs no optimum inside the grid: the curve that falls more for larger teachers has
    its best one further up.
    """
    found: list[Contrast] = []
    by_place = {(c.init, c.tokens, c.student_size): i for i, c in enumerate(curves)}
    inits = list(dict.fromkeys(curve.init for curve in curves))

    def estimate(draws: Floats) -> Estimate:
        return to_estimate(draws, confidence, float(draws.mean()))

    def add(
        what: Literal["tokens", "init", "chain", "student"], pairs: list[tuple[int, int]]
    ) -> None:
        both = [(pair, _difference(curves, posterior, *pair)) for pair in pairs]
        known = [(pair, one) for pair, one in both if one is not None]
        if not known:
            return
        slope, level = np.mean([one for _, one in known], axis=0)
        first, second = ([curves[pair[i]] for pair, _ in known] for i in (0, 1))
        budgets = {(a.tokens, b.tokens) for a, b in zip(first, second, strict=True)}
        per = None
        if what == "tokens":
            steps = [np.log(a.tokens / b.tokens) for a, b in zip(first, second, strict=True)]
            each = [one[0] / step for (_, one), step in zip(known, steps, strict=True)]
            per = estimate(np.mean(each, axis=0))
        found.append(
            Contrast(
                what=what,
                architecture=first[0].architecture,
                inits=(first[0].init, second[0].init),
                tokens=budgets.pop() if len(budgets) == 1 else None,
                students=tuple(sorted({c.student_parameters for c in (*first, *second)})),
                slope=estimate(slope),
                stderr=float(slope.std()),
                level=estimate(level),
                per_log_tokens=per,
            )
        )

    for init in inits:
        pairs = []
        for student in sorted({c.student_size for c in curves if c.init == init}):
            budgets = sorted(t for i, t, s in by_place if (i, s) == (init, student))
            if len(budgets) > 1:
                many, few = (by_place[init, t, student] for t in (budgets[-1], budgets[0]))
                pairs.append((many, few))
        add("tokens", pairs)
    for tokens in sorted({curve.tokens for curve in curves}):
        for first, second in (("pruned", "fixed"), ("chain", "pruned")):
            both = [
                (i, by_place[second, tokens, student])
                for (init, own, student), i in sorted(by_place.items())
                if (init, own) == (first, tokens) and (second, tokens, student) in by_place
            ]
            add("init" if first == "pruned" else "chain", both)
    for members in groups:
        ordered = sorted(members, key=lambda i: curves[i].student_parameters)
        if len(ordered) > 1:
            add("student", [(ordered[-1], ordered[0])])
    return found


def _difference(
    curves: Sequence[Curve], posterior: Posterior, first: int, second: int
) -> Floats | None:
    """[2, draws] nats by which the first curve rises more than the second for a teacher e times
    larger, and by which it is higher, over the teachers that they share."""
    sizes = {point.teacher_size: point for point in curves[first].points}
    shared = [p for p in curves[second].points if p.teacher_size in sizes]
    if len(shared) < 2:
        return None
    logs = np.log([point.teacher_parameters for point in shared])
    weights = (logs - logs.mean()) / ((logs - logs.mean()) ** 2).sum()
    one, other = (
        posterior.losses(i, logs - np.log(curves[i].student_parameters)) for i in (first, second)
    )
    return np.stack([(one - other) @ weights, (one - other).mean(axis=1)])
