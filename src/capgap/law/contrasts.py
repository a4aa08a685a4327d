"""What moves the best teacher: slopes of curves over the same teachers beside each other.

A difference between two curves of the same teachers and seeds holds nothing of the teachers' luck,
and needs no optimum inside the grid: the curve that falls more for larger teachers has its best one
further up.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from capgap.law.law import Contrast, Curve, Estimate, Group
from capgap.law.lines import to_estimate
from capgap.law.model import Floats, Posterior


def contrasts_of(
    curves: Sequence[Curve],
    posterior: Posterior,
    groups: Sequence[tuple[Group, list[int]]],
    confidence: float,
) -> list[Contrast]:
    """More against fewer tokens, pruned against fixed first weights, through an assistant against
    at once, and the largest student of a group against its smallest. `curves` in the order of the
    posterior's."""
    found: list[Contrast] = []
    by_place = {(c.init, c.tokens, c.student_size): i for i, c in enumerate(curves)}
    inits = list(dict.fromkeys(curve.init for curve in curves))

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
            per = _estimate(np.mean(each, axis=0), confidence)
        found.append(
            Contrast(
                what=what,
                architecture=first[0].architecture,
                inits=(first[0].init, second[0].init),
                tokens=budgets.pop() if len(budgets) == 1 else None,
                students=tuple(sorted({c.student_parameters for c in (*first, *second)})),
                slope=_estimate(slope, confidence),
                stderr=float(slope.std()),
                level=_estimate(level, confidence),
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
    for _, members in groups:
        ordered = sorted(members, key=lambda i: curves[i].student_parameters)
        if len(ordered) > 1:
            add("student", [(ordered[-1], ordered[0])])
    return found


def _estimate(draws: Floats, confidence: float) -> Estimate:
    return to_estimate(np.concatenate([[draws.mean()], draws]), confidence)


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
