"""A table of cells -> the law of capacity gap (arXiv 2311.07052): curves, contrasts, lines.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas

from capgap.errors import UserError
from capgap.evaluate.measured import ratio_standard_error
from capgap.law.data import CURVE, Cells, per_token
from capgap.law.law import Compared, Contrast, Curve, Estimate, Fit, Group, Law, Luck, Point
from capgap.law.lines import (
    UNKNOWN,
    Best,
    Cost,
    Ladder,
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
    for architecture, rows in cells.frame.groupby("architecture", sort=True):
        own = _Architecture(cells, rows, len(curves), confidence)
        posterior = fit_curves(own.runs(), draws=draws, rng=rng)
        found, optima = own.curves(posterior)
        curves += found
        for group, members in zip(own.groups, own.members, strict=True):
            known = [best for i in members if (best := optima[i]) is not None]
            lines.append(fit_line(group, known, confidence=confidence, rng=rng, draws=draws))
        deviation = None
        if posterior is not None:
            middle = float(np.median(posterior.luck))
            deviation = to_estimate(posterior.luck, confidence, middle)
            contrasts += contrasts_of(found, posterior, own.members, confidence)
        lucks.append(
            Luck(
                architecture=str(architecture),
                deviation=deviation,
                trainings=rows["training"].nunique(),
                known=posterior is not None,
            )
        )
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


class _Architecture:
    """The curves of an architecture, of which `first` is the index in the law of the first.

    groups: those that a law is fitted to; members: their curves, counted from the first; primary:
    the group of every curve in which its teachers are compared, the first that it is in.
    """

    def __init__(self, cells: Cells, rows: pandas.DataFrame, first: int, confidence: float) -> None:
        self.cells, self.rows, self.confidence = cells, rows, confidence
        self.ladders = [Ladder(own) for _, own in rows.groupby(CURVE, sort=True)]
        self.groups = self._groups(first)
        self.members = [[index - first for index in group.curves] for group in self.groups]
        self.primary = [
            next(number for number, own in enumerate(self.members) if curve in own)
            for curve in range(len(self.ladders))
        ]

    def _groups(self, first: int) -> list[Group]:
        """Students on the same tokens; and where students have budgets of their own, those on as
        many tokens for each parameter."""
        keys = [one.key for one in self.ladders]
        ratios = [one.key["tokens"] / one.student for one in self.ladders]
        found: list[tuple[list[int], int | None, float | None]] = []
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
                    found.append((members, tokens, None))
            for one in near:
                found.append((one, None, float(np.exp(np.log([ratios[i] for i in one]).mean()))))
        return [
            Group(
                architecture=keys[members[0]]["architecture"],
                init=keys[members[0]]["init"],
                tokens=tokens,
                tokens_per_parameter=ratio,
                curves=tuple(first + i for i in members),
            )
            for members, tokens, ratio in found
        ]

    def runs(self) -> Runs:
        """What the curves are fitted to."""
        cells, rows = self.cells, self.rows
        by_curve, by_point = rows.groupby(CURVE), rows.groupby([*CURVE, "teacher_size"])
        curve, point = (groups.ngroup().to_numpy() for groups in (by_curve, by_point))
        students = by_curve["student_parameters"].transform("mean")
        teachers = by_point["teacher_parameters"].transform("mean")
        patterns, known = _documents(cells, rows.index.to_numpy(), curve, point)
        if cells.own_errors:
            stated = np.nan_to_num(rows["loss_stderr"].to_numpy(float)) ** 2
            known = known + np.bincount(point, stated) / np.bincount(point) ** 2
        return Runs(
            losses=cells.losses[rows.index],
            gaps=np.log((teachers / students).to_numpy(float)),
            curve=curve,
            point=point,
            seed=rows["seed"].rank(method="dense").to_numpy(int) - 1,
            training=rows["training"].astype("category").cat.codes.to_numpy(int),
            kind=np.unique(self.primary, return_inverse=True)[1],
            known=known,
            patterns=patterns,
        )

    def curves(self, posterior: Posterior | None) -> tuple[list[Curve], list[Best | None]]:
        """Every curve, and the best teacher of each for a law."""
        compared = {i: [UNKNOWN] * len(one.sizes) for i, one in enumerate(self.ladders)}
        if posterior is not None:
            for group in set(self.primary):
                members = [i for i, own in enumerate(self.primary) if own == group]
                losses = [posterior.losses(i, self.ladders[i].gaps) for i in members]
                together = compare_teachers(losses, self.confidence)
                compared |= dict(zip(members, together, strict=True))
        pairs = [self._curve(i, compared[i], posterior) for i in range(len(self.ladders))]
        return [curve for curve, _ in pairs], [best for _, best in pairs]

    def _curve(
        self, index: int, costs: list[Cost], posterior: Posterior | None
    ) -> tuple[Curve, Best | None]:
        own, noise, fitted = self.ladders[index], None, None
        if posterior is not None:
            noise = float(np.sqrt((posterior.noise[:, index] ** 2).mean()))
            if len(own.sizes) >= MIN_TEACHERS:
                fitted = self._fitted(index, posterior)
        points = [self._point(own, i, cost, noise) for i, cost in enumerate(costs)]
        optimum, best = find_optimum(posterior, index, own, points, self.confidence)
        curve = Curve(
            **own.key,
            student_parameters=round(own.student),
            points=tuple(points),
            fit=fitted,
            optimum=optimum,
            own_noise=noise,
        )
        return curve, best

    def _point(self, own: Ladder, teacher: int, cost: Cost, noise: float | None) -> Point:
        cells, rows = self.cells, own.rows[teacher]
        tokens = cells.document_tokens
        loss, error = _mean(cells.cells[rows], tokens, noise)
        stated = float(cells.frame["loss_stderr"].to_numpy(float)[rows].mean())
        if not np.isnan(stated):
            stated /= len(rows) ** 0.5 if cells.own_errors else 1.0
            error = float(stated if error is None else np.hypot(error, stated))
        above, above_error = _mean(cells.teachers[rows], tokens, 0.0)
        # both runs of a difference have noise of their own
        twice = None if noise is None else noise * 2**0.5
        gain, gain_error = _mean((cells.baselines - cells.cells)[rows], tokens, twice)
        flops, flops_error = None, None
        if cells.equal_flops is not None:
            flops, flops_error = _mean((cells.equal_flops - cells.cells)[rows], tokens, twice)
        assert loss is not None
        return Point(
            teacher_size=own.sizes[teacher],
            teacher_parameters=round(float(own.teachers[teacher])),
            teacher_loss=above,
            teacher_loss_stderr=above_error,
            loss=loss,
            loss_stderr=error,
            cost=cost[0],
            cost_stderr=cost[1],
            worse=cost[2],
            gain=gain,
            gain_stderr=gain_error,
            gain_flops=flops,
            gain_flops_stderr=flops_error,
            losses=cells.losses[rows].tolist(),
            seeds=cells.frame["seed"].to_numpy()[rows].tolist(),
        )

    def _fitted(self, index: int, posterior: Posterior) -> Fit:
        own = self.ladders[index]
        logs = np.linspace(np.log(own.teachers[0]), np.log(own.teachers[-1]), FIT_POINTS)
        drawn = posterior.losses(index, logs - np.log(own.student))
        low, high = interval_of(drawn, self.confidence).tolist()
        mean = drawn.mean(axis=0).tolist()
        return Fit(teacher_parameters=np.exp(logs).tolist(), loss=mean, low=low, high=high)


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
    # the sign of a pattern is the processor's own choice
    left *= np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
    patterns = left[:, :PATTERNS] * sizes[:PATTERNS]
    rest = np.maximum((shares**2).sum(1) - (patterns**2).sum(1), 0.0)
    return patterns, np.bincount(point, rest) / np.bincount(point)


def _mean(rows: Floats, tokens: Floats, noise: float | None) -> tuple[float | None, float | None]:
    """Over the seeds that are there: nats per token, and its standard error from documents and a
    run's own noise; None where neither is known."""
    rows = rows[~np.isnan(rows).any(axis=1)]
    if not len(rows):
        return None, None
    mean, error = float(per_token(rows, tokens).mean()), ratio_standard_error(rows.mean(0), tokens)
    if error is None and not noise:
        return mean, None
    return mean, float(np.hypot(error or 0.0, (noise or 0.0) / len(rows) ** 0.5))


def contrasts_of(
    curves: Sequence[Curve],
    posterior: Posterior,
    groups: Sequence[Sequence[int]],
    confidence: float,
) -> list[Contrast]:
    """What moves the best teacher: slopes of curves over the same teachers beside each other.

    `curves` in the order of the posterior's; groups: their indices.

    A difference between two curves of the same teachers and seeds holds nothing of the teachers'
    luck, and needs no optimum inside the grid: the curve that falls more for larger teachers has
    its best one further up.
    """

    def estimate(draws: Floats) -> Estimate:
        return to_estimate(draws, confidence, float(draws.mean()))

    found = []
    for what, asked in _pairs(curves, groups):
        differences = {pair: _difference(curves, posterior, *pair) for pair in asked}
        known = {pair: one for pair, one in differences.items() if one is not None}
        if not known:
            continue
        slope, level = np.mean(list(known.values()), axis=0)
        pairs = [(curves[first], curves[second]) for first, second in known]
        budgets = {(one.tokens, other.tokens) for one, other in pairs}
        per = None
        if what == "tokens":
            steps = [np.log(one.tokens / other.tokens) for one, other in pairs]
            each = [own[0] / step for own, step in zip(known.values(), steps, strict=True)]
            per = estimate(np.mean(each, axis=0))
        found.append(
            Contrast(
                what=what,
                architecture=pairs[0][0].architecture,
                inits=(pairs[0][0].init, pairs[0][1].init),
                tokens=budgets.pop() if len(budgets) == 1 else None,
                students=tuple(sorted({c.student_parameters for pair in pairs for c in pair})),
                slope=estimate(slope),
                stderr=float(slope.std()),
                level=estimate(level),
                per_log_tokens=per,
            )
        )
    return found


def _pairs(
    curves: Sequence[Curve], groups: Sequence[Sequence[int]]
) -> Iterator[tuple[Compared, list[tuple[int, int]]]]:
    """Indices of curves to compare: more tokens with fewer, pruned with fixed first weights,
    through an assistant with at once, and the largest student of a group with its smallest."""
    by_place = {(c.init, c.tokens, c.student_size): i for i, c in enumerate(curves)}
    by_student: dict[tuple[str, int], list[int]] = {}
    for (init, _, student), i in sorted(by_place.items()):
        by_student.setdefault((init, student), []).append(i)
    for init in dict.fromkeys(curve.init for curve in curves):
        own = [budgets for (name, _), budgets in sorted(by_student.items()) if name == init]
        yield "tokens", [(budgets[-1], budgets[0]) for budgets in own if len(budgets) > 1]
    for tokens in sorted({curve.tokens for curve in curves}):
        for first, second in (("pruned", "fixed"), ("chain", "pruned")):
            both = [
                (i, by_place[second, tokens, student])
                for (init, own_tokens, student), i in sorted(by_place.items())
                if (init, own_tokens) == (first, tokens) and (second, tokens, student) in by_place
            ]
            yield "init" if first == "pruned" else "chain", both
    for members in groups:
        ordered = sorted(members, key=lambda i: curves[i].student_parameters)
        yield "student", [(ordered[-1], ordered[0])] if len(ordered) > 1 else []


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
