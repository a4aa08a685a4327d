"""Named warnings: what weakens a result, beside the result it weakens."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from capgap.law.cells import Floats, document_rows
from capgap.law.csv_input import TableCells
from capgap.law.curve import Curve
from capgap.law.noise import MIN_TEACHERS, mean_losses, resampled_losses
from capgap.records import RunRecord
from capgap.sizes import format_count

# 1% above the stated 1.6, for sizes that were rounded when they were written down
WIDEST_SPACING = 1.6
SPACING_TOLERANCE = 1.01
FEW_DOCUMENTS = 20
# Share of the cross-entropy that the last tenth of a finished training may still take off
STILL_LEARNING = 0.01
# Sizes further apart than this want learning rates of their own (benchmarks/learning_rates.py)
ONE_RATE_RANGE = 2.0


@dataclass(frozen=True)
class Warned:
    """One warning: its name, what it concerns, and a plain sentence."""

    name: str
    where: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)


def grouped_warnings(law: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(message, where) of every validity warning; one that many curves share is said once."""
    places: dict[str, list[str]] = defaultdict(list)
    for warning in law.get("validity", ()):
        places[warning["message"]].append(warning["where"])
    return [
        (message, "; ".join(found[:2]) + (f" and {len(found) - 2} more" if found[2:] else ""))
        for message, found in places.items()
    ]


def record_warnings(records: Sequence[RunRecord], counts: Mapping[int, Floats]) -> list[Warned]:
    """Warnings about the runs themselves: teachers that do not improve, failed cells.

    `counts` has, for a number of held-out documents, their resamples [resamples, documents].
    """
    teachers = [r for r in records if r.kind == "teacher" and r.heldout is not None]
    groups = sorted({(teacher.architecture, teacher.seed) for teacher in teachers})
    warnings: list[Warned] = []
    for architecture, seed in groups:
        ladder = [t for t in teachers if (t.architecture, t.seed) == (architecture, seed)]
        ladder.sort(key=lambda teacher: teacher.parameters.non_embedding)
        warnings += _ladder_warnings(ladder, f"{architecture}, seed {seed}", counts)
    warnings += _training_warnings([r for r in records if r.status == "done"])
    failed = [record.id for record in records if record.status == "failed"]
    if failed:
        verb = "run" if len(failed) == 1 else "runs"
        message = f"{len(failed)} {verb} failed and no fit uses them: {', '.join(failed)}"
        warnings.append(Warned("failed_cells", "whole sweep", message))
    return warnings


def _training_warnings(records: Sequence[RunRecord]) -> Iterable[Warned]:
    """Students that were still learning, and one learning rate for all sizes."""
    students = [record for record in records if record.kind == "cell"]
    learning = [record for record in students if _still_learning(record)]
    if learning:
        yield Warned(
            "still_learning",
            "whole sweep",
            f"{len(learning)} of {len(students)} students had not stopped learning: the last tenth "
            f"of their training still took more than {STILL_LEARNING:.0%} off their cross-entropy, "
            "so with more tokens another teacher may be the best",
        )
    teachers = [record for record in records if record.kind == "teacher"]
    for who, runs in (("teachers", teachers), ("students", students)):
        rates = {run.learning_rate for run in runs if run.learning_rate is not None}
        sizes = [run.parameters.non_embedding for run in runs if run.learning_rate is not None]
        if len(rates) == 1 and max(sizes) > ONE_RATE_RANGE * min(sizes):
            yield Warned(
                "one_learning_rate",
                "whole sweep",
                f"{who} of {format_count(min(sizes))} to {format_count(max(sizes))} all have the "
                f"peak learning rate {rates.pop():g}: it was not tuned for their sizes",
            )


def _still_learning(record: RunRecord) -> bool:
    """By the means of the last tenth of the training curve and of the tenth before."""
    losses = [value for value in record.curve.ce if value is not None]
    tenth = len(losses) // 10
    if tenth < 1:
        return False
    last, before = np.mean(losses[-tenth:]), np.mean(losses[-2 * tenth : -tenth])
    return bool(last < (1 - STILL_LEARNING) * before)


def table_warnings(table: TableCells) -> list[Warned]:
    """What a table does not have, and what is not known for that; teachers that do not improve."""
    lost = {
        "seed": "every row counts as a run of one seed",
        "loss_stderr": "the losses' own standard errors are not known",
        "teacher_loss": "whether the teachers improve as they grow is not known",
        "baseline_loss": "what distilling gains is not known",
    }
    return [
        Warned("missing_column", "whole table", f"the table has no column {name}: {lost[name]}")
        for name in table.missing_columns
    ] + list(_table_ladders(table))


def _table_ladders(table: TableCells) -> Iterable[Warned]:
    """A table states the teacher's loss in every row; the mean of each size counts."""
    for architecture in dict.fromkeys(curve.kind.architecture for curve in table.curves):
        losses: dict[int, list[float]] = {}
        for curve in table.curves:
            if curve.kind.architecture == architecture:
                for teacher, (loss,) in zip(
                    curve.cell_teacher, curve.teacher_documents, strict=True
                ):
                    if not np.isnan(loss):
                        losses.setdefault(curve.teacher_sizes[teacher], []).append(float(loss))
        means = {size: float(np.mean(own)) for size, own in sorted(losses.items()) if own}
        sizes = list(means)
        for i, size in enumerate(sizes[1:], start=1):
            best = min(sizes[:i], key=means.__getitem__)
            if means[size] >= means[best]:
                yield Warned(
                    "teacher_loss_not_falling",
                    architecture,
                    _not_falling(size, best, f"{means[size] - means[best]:.4f} nats higher"),
                )


def _not_falling(larger: int, smaller: int, difference: str) -> str:
    return (
        f"the {format_count(larger)} teacher is not better than the {format_count(smaller)} one: "
        f"its own held-out loss is {difference}; the curves then also show how well teachers were "
        "trained, not the capacity gap alone"
    )


def curve_warnings(curve: Curve) -> list[Warned]:
    """Warnings about one curve, beside its optimum."""
    data, optimum = curve.points.data, curve.optimum
    found: list[tuple[str, str]] = []
    if data.num_seeds == 1:
        found.append(
            (
                "one_seed",
                "one seed: the noise of a rerun is not measured, only guessed from the scatter of "
                "the teachers about a smooth curve",
            )
        )
    if data.num_teachers < MIN_TEACHERS:
        found.append(
            (
                "too_few_teachers",
                f"{data.num_teachers} teachers are too few to fit a curve: at least {MIN_TEACHERS}",
            )
        )
    # of a table the documents are not known
    if 1 < data.cell_documents.shape[1] < FEW_DOCUMENTS:
        found.append(
            (
                "few_documents",
                f"{data.cell_documents.shape[1]} held-out documents are few to take the "
                "evaluation noise from",
            )
        )
    if optimum.status in ("smallest", "largest"):
        beyond = "below" if optimum.status == "smallest" else "above"
        found.append(
            (
                "edge_optimum",
                f"the {optimum.status} teacher cannot be told from the best one: the optimum may "
                f"lie {beyond} the grid",
            )
        )
    spacing = _spacing_at_optimum(curve)
    if spacing > WIDEST_SPACING * SPACING_TOLERANCE:
        found.append(
            (
                "spacing_too_coarse",
                f"neighbouring teachers around the optimum differ by {spacing:.2f}x, more than "
                f"{WIDEST_SPACING}x",
            )
        )
    found += _baseline_warnings(curve)
    return [Warned(name, str(data), message) for name, message in found]


def _ladder_warnings(
    ladder: Sequence[RunRecord], where: str, counts: Mapping[int, Floats]
) -> Iterable[Warned]:
    """A teacher that is not better than the best smaller one, with the paired difference."""
    if not ladder or ladder[0].heldout is None:
        return
    tokens = np.array(ladder[0].heldout.document_tokens, dtype=np.float64)
    rows = document_rows(ladder)
    losses = mean_losses(rows, tokens)
    draws = resampled_losses(rows, tokens, counts[len(tokens)])
    for larger in range(1, len(ladder)):
        smaller = int(np.argmin(losses[:larger]))
        difference = losses[larger] - losses[smaller]
        if difference < 0:
            continue
        noise = float((draws[:, larger] - draws[:, smaller]).std())
        sizes = [ladder[i].parameters.non_embedding for i in (larger, smaller)]
        told = f"{difference:.4f} nats higher (evaluation noise {noise:.4f})"
        yield Warned("teacher_loss_not_falling", where, _not_falling(sizes[0], sizes[1], told))


def _spacing_at_optimum(curve: Curve) -> float:
    """Ratio of asked sizes on the wider side of the best cell; 1 for a single teacher."""
    sizes = curve.points.data.teacher_sizes
    best = int(np.argmin(curve.points.losses))
    pairs = [(i, i + 1) for i in (best - 1, best) if i >= 0 and i + 1 < len(sizes)]
    return max((sizes[high] / sizes[low] for low, high in pairs), default=1.0)


def _baseline_warnings(curve: Curve) -> list[tuple[str, str]]:
    data = curve.points.data
    gains = mean_losses(data.baseline_documents - data.cell_documents, data.document_tokens)
    best = int(np.argmin(curve.points.losses))
    without, below = [], []
    for teacher, size in enumerate(data.teacher_parameters):
        own = gains[data.cell_teacher == teacher]
        if np.isnan(own).any():
            # a recipe may save the others' baselines; the answer itself must have one
            if teacher == best:
                without.append(size)
        elif own.mean() <= 0:
            below.append(size)
    found = []
    if without:
        found.append(
            (
                "missing_baseline",
                "the best teacher lacks a baseline (same init and tokens without a teacher), so "
                "the gain of distilling from it is unknown",
            )
        )
    if below:
        sizes = ", ".join(format_count(size) for size in below)
        found.append(
            (
                "below_baseline",
                f"distilling from {sizes} is no better than training the same student without a "
                "teacher",
            )
        )
    return found
