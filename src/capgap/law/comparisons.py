"""What changes the best teacher: curves set beside each other, each answer a plain sentence.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from capgap.law.cells import Floats
from capgap.law.curve import Curve
from capgap.law.linear import LinearLaw
from capgap.law.noise import MIN_TEACHERS, mean_losses
from capgap.sizes import format_count


def compared_curves(
    curves: Sequence[Curve], laws: Sequence[LinearLaw], confidence: float
) -> list[str]:
    """Does the best teacher depend on init, on an assistant between, on tokens, on architecture;
    and does a teacher's own loss tell more than its size? Only what the curves can answer."""
    return [
        *_pruned_against_fixed(curves, confidence),
        *_chain_against_pruned(curves),
        *_fewer_against_more_tokens(curves, confidence),
        *_architectures(laws, confidence),
        *_teacher_losses(curves),
    ]


def _pruned_against_fixed(curves: Sequence[Curve], confidence: float) -> list[str]:
    """Where both inits were run: does the optimum stay when pruning is taken out of the curve?"""
    fixed = {_place(curve): curve for curve in curves if curve.points.data.kind.init == "fixed"}
    sentences = []
    for curve in curves:
        data = curve.points.data
        other = fixed.get(_place(curve))
        if data.kind.init == "pruned" and other is not None:
            where = (
                f"{data.kind.architecture}, {format_count(data.kind.tokens)} tokens, student "
                f"{format_count(curve.student_parameters)}, pruned against fixed init"
            )
            sentences.append(f"{where}: {_moved(curve, other, confidence)}.")
    return sentences


def _chain_against_pruned(curves: Sequence[Curve]) -> list[str]:
    """Where both were run: what an assistant between teacher and student brings for the same
    FLOPs, over all pairs of teacher and seed."""
    chains = {_place(curve): curve for curve in curves if curve.points.data.kind.init == "chain"}
    sentences = []
    for curve in curves:
        chain = chains.get(_place(curve))
        if curve.points.data.kind.init != "pruned" or chain is None:
            continue
        direct, through = _losses(curve), _losses(chain)
        pairs = sorted(direct.keys() & through.keys())
        if not pairs:
            continue
        differences = [through[pair] - direct[pair] for pair in pairs]
        mean = float(np.mean(differences))
        error = (
            "" if len(pairs) < 2 else f" ± {np.std(differences, ddof=1) / len(pairs) ** 0.5:.4f}"
        )
        wins = sum(difference < 0 for difference in differences)
        data = curve.points.data
        sentences.append(
            f"{data.kind.architecture}, {format_count(data.kind.tokens)} tokens, student "
            f"{format_count(curve.student_parameters)}, through an assistant against the direct "
            f"cut at equal FLOPs: the chain's loss is {abs(mean):.4f}{error} nats "
            f"{'lower' if mean < 0 else 'higher'} on average, and lower in {wins} of "
            f"{len(pairs)} pairs of teacher and seed."
        )
    return sentences


def _fewer_against_more_tokens(curves: Sequence[Curve], confidence: float) -> list[str]:
    """Each student at its smallest and its largest token budget."""
    groups: dict[tuple[str, str, int], list[Curve]] = {}
    for curve in curves:
        data = curve.points.data
        key = (data.kind.architecture, data.kind.init, data.student_size)
        groups.setdefault(key, []).append(curve)
    sentences = []
    for alike in groups.values():
        few, many = (
            pick(alike, key=lambda curve: curve.points.data.kind.tokens) for pick in (min, max)
        )
        if few is many:
            continue
        kind, more = few.points.data.kind, many.points.data.kind.tokens
        where = (
            f"{kind.architecture}, {kind.init}, student {format_count(few.student_parameters)}, "
            f"{format_count(more)} against {format_count(kind.tokens)} tokens"
        )
        change = _ratio_of_optima(many, few, confidence)
        if change is None:
            answer = (
                "whether tokens move the optimum cannot be told; it is "
                f"{_found(many)} with more and {_found(few)} with fewer"
            )
        else:
            factor, low, high = change
            number = f"{factor:.2f} times ({confidence:.0%} interval {low:.2f} to {high:.2f})"
            stays = low <= 1 <= high
            answer = (
                f"the optimum does not move beyond noise; it is {number} that with fewer tokens"
                if stays
                else f"the optimum is {number} that with fewer tokens: the ratio depends on tokens"
            )
        sentences.append(f"{where}: {answer}.")
    return sentences


def _architectures(laws: Sequence[LinearLaw], confidence: float) -> list[str]:
    """Each pair of architectures of one init and token budget, by their ratios."""
    sentences = []
    for i, one in enumerate(laws):
        for other in laws[i + 1 :]:
            same = (one.kind.init, one.kind.tokens) == (other.kind.init, other.kind.tokens)
            if not same or one.ratio is None or other.ratio is None:
                continue
            apart = one.ratio.high < other.ratio.low or other.ratio.high < one.ratio.low
            numbers = " and ".join(
                f"{law.ratio.value:.2f} ({law.ratio.low:.2f} to {law.ratio.high:.2f}) for "
                f"{law.kind.architecture}"
                for law in (one, other)
                if law.ratio is not None
            )
            answer = "depends on the architecture" if apart else "is the same within its intervals"
            sentences.append(
                f"{one.kind.init}, {format_count(one.kind.tokens)} tokens: T*/S {answer}: "
                f"{numbers} at {confidence:.0%} confidence."
            )
    return sentences


def _teacher_losses(curves: Sequence[Curve]) -> list[str]:
    """Within each kind: which predicts a cell left out better, its teacher's size or its teacher's
    own loss, each by a parabola of every student's own."""
    kinds = list(dict.fromkeys(curve.points.data.kind for curve in curves))
    sentences = []
    for kind in kinds:
        errors: list[tuple[Floats, Floats]] = []
        in_step = True
        for curve in curves:
            data = curve.points.data
            known = ~np.isnan(data.teacher_documents).any(axis=1)
            if data.kind != kind or not known.all() or data.num_teachers <= MIN_TEACHERS:
                continue
            own = mean_losses(data.teacher_documents, data.document_tokens)
            own = np.array([own[data.cell_teacher == i].mean() for i in range(data.num_teachers)])
            sizes = np.log(data.teacher_parameters)
            if np.ptp(own) == 0:
                continue
            in_step = in_step and bool(spearmanr(sizes, own).statistic < -1 + 1e-9)
            errors.append(
                (_left_out(sizes, curve.points.losses), _left_out(own, curve.points.losses))
            )
        if not errors:
            continue
        by_size, by_loss = (
            float(np.sqrt(np.mean(np.concatenate([pair[i] for pair in errors]) ** 2)))
            for i in (0, 1)
        )
        numbers = (
            f"a cell left out is predicted to {by_size:.4f} nats by its teacher's size and to "
            f"{by_loss:.4f} by its teacher's own loss"
        )
        better = "its own loss tells more" if by_loss < by_size else "size tells more"
        caution = (
            "; losses fall in step with sizes here, so the two are one cause to these cells"
            if in_step
            else f"; {better}"
        )
        sentences.append(f"{kind}: {numbers}{caution}.")
    return sentences


def _left_out(x: Floats, y: Floats) -> Floats:
    """Errors of a parabola at each point that was not used for it."""
    unit = (x - x.mean()) / np.ptp(x)
    powers = np.stack([np.ones_like(unit), unit, unit**2], axis=1)
    hat = powers @ np.linalg.pinv(powers)
    return np.asarray((y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-9))


def _ratio_of_optima(
    curve: Curve, other: Curve, confidence: float
) -> tuple[float, float, float] | None:
    """T* of one curve over that of another with its interval; None unless both are known."""
    ours, theirs = curve.optimum, other.optimum
    if (
        ours.status != "interior"
        or theirs.status != "interior"
        or ours.draws is None
        or theirs.draws is None
        or ours.teacher_parameters is None
        or theirs.teacher_parameters is None
    ):
        return None
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(ours.draws - theirs.draws, [tail, 1 - tail]))
    return ours.teacher_parameters / theirs.teacher_parameters, float(low), float(high)


def _place(curve: Curve) -> tuple[str, int, int]:
    """What curves of several inits have in common."""
    data = curve.points.data
    return data.kind.architecture, data.kind.tokens, data.student_size


def _losses(curve: Curve) -> dict[tuple[int, int], float]:
    """Nats per token of every cell, by size of teacher and seed."""
    data = curve.points.data
    losses = data.cell_documents.sum(1) / data.document_tokens.sum()
    places = zip(data.cell_teacher, data.cell_seed, strict=True)
    return {
        (data.teacher_sizes[teacher], int(seed)): float(loss)
        for (teacher, seed), loss in zip(places, losses, strict=True)
    }


def _moved(pruned: Curve, fixed: Curve, confidence: float) -> str:
    change = _ratio_of_optima(pruned, fixed, confidence)
    if change is not None:
        factor, low, high = change
        number = f"{factor:.2f} times ({confidence:.0%} interval {low:.2f} to {high:.2f})"
        if low <= 1 <= high:
            return f"the optimum does not move beyond noise; it is {number} that of the fixed init"
        return (
            f"the optimum is {number} that of the fixed init: the damage of pruning, not capacity "
            "alone, places it"
        )
    ours, theirs = pruned.optimum, fixed.optimum
    if ours.interval is not None and theirs.interval is not None:
        if _below(ours.interval, theirs.interval):
            return "the optimum is smaller with pruning; the intervals do not touch"
        if _below(theirs.interval, ours.interval):
            return "the optimum is larger with pruning; the intervals do not touch"
    return (
        "whether pruning moves the optimum cannot be told; it is "
        f"{_found(pruned)} with pruning and {_found(fixed)} without"
    )


def _below(
    first: tuple[float | None, float | None], second: tuple[float | None, float | None]
) -> bool:
    return first[1] is not None and second[0] is not None and first[1] < second[0]


def _found(curve: Curve) -> str:
    best = format_count(curve.optimum.grid_best)
    return {
        "interior": f"inside the grid (best cell {best})",
        "smallest": f"at the smallest teacher (best cell {best})",
        "largest": f"at the largest teacher (best cell {best})",
        "flat": f"flat within noise (best cell {best})",
        "too_few_points": f"known by too few teachers (best cell {best})",
    }[curve.optimum.status]
