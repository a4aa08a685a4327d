"""Named warnings: what weakens a result, beside the result it weakens."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from capgap.evaluate.measured import ratio_standard_error
from capgap.law.data import Cells, per_token
from capgap.law.law import Curve, Point, Warned
from capgap.law.model import MIN_TEACHERS, Floats
from capgap.law.table import LOST
from capgap.records import RunRecord
from capgap.sizes import format_count

# 1% above the stated 1.6, for sizes that were rounded when they were written down
WIDEST_SPACING = 1.6 * 1.01
FEW_DOCUMENTS = 20
# Share of the cross-entropy that the last tenth of a finished training may still take off
STILL_LEARNING = 0.01
# Sizes further apart than this want learning rates of their own (benchmarks/learning_rates.py)
ONE_RATE_RANGE = 2.0


def all_warnings(cells: Cells, curves: Sequence[Curve]) -> list[Warned]:
    """About the runs, then about the curves; a warning that several curves share is given once."""
    where = "whole sweep" if cells.records else "whole table"
    found = [(name, where, message) for name, message in _of_table(cells)]
    found += [("teacher_loss_not_falling", *warning) for warning in _of_teachers(cells)]
    found += [(name, where, message) for name, message in _of_training(cells.records)]
    students: dict[tuple[str, str], list[str]] = {}
    for curve in curves:
        kind = f"{curve.architecture}, {curve.init}, {format_count(curve.tokens)} tokens"
        for warning in _of_curve(curve).items():
            student = f"{kind}, student {format_count(curve.student_parameters)}"
            students.setdefault(warning, []).append(student)
    for (name, message), own in students.items():
        more = f" and {len(own) - 2} more" if len(own) > 2 else ""
        found.append((name, "; ".join(own[:2]) + more, message))
    return [Warned(name=name, where=where, message=message) for name, where, message in found]


def _of_table(cells: Cells) -> Iterator[tuple[str, str]]:
    for name in cells.missing:
        yield "missing_column", f"the table has no column {name}: {LOST[name]}"
    documents = cells.cells.shape[1]
    if documents == 1 and cells.records:
        message = "one held-out document: what another text would have given is not known"
        yield "few_documents", message
    elif 1 < documents < FEW_DOCUMENTS:
        message = f"{documents} held-out documents are few to take the evaluation noise from"
        yield "few_documents", message
    if (cells.losses > 7).any() and not cells.records:
        message = "losses above 7 nats are those of models that have hardly learnt: are they nats?"
        yield "high_losses", message


def _of_teachers(cells: Cells) -> Iterator[tuple[str, str]]:
    """Teachers that are not better than the best smaller one, by training and seed: where, and what
    is said of them."""
    known = cells.frame[~np.isnan(cells.teachers).any(axis=1)]
    for architecture, own in known.groupby("architecture"):
        by_seed = own["training"].nunique() > own["teacher_size"].nunique()
        for seed, ladder in own.groupby("seed") if by_seed else [("", own)]:
            rows = [of_size for _, of_size in ladder.groupby("teacher_size")]
            # a table states the teacher's loss in every row: the mean of each size counts
            documents = np.stack([cells.teachers[one.index].mean(axis=0) for one in rows])
            sizes = [format_count(one["teacher_parameters"].iloc[0]) for one in rows]
            for message in _not_better(documents, cells.document_tokens, sizes):
                yield f"{architecture}, seed {seed}" if by_seed else str(architecture), message


def _not_better(documents: Floats, tokens: Floats, sizes: Sequence[str]) -> Iterator[str]:
    losses = per_token(documents, tokens)
    for larger in range(1, len(losses)):
        smaller = int(losses[:larger].argmin())
        mean = float(losses[larger] - losses[smaller])
        if mean < 0:
            continue
        error = ratio_standard_error(documents[larger] - documents[smaller], tokens)
        noise = "" if error is None else f" (evaluation noise {error:.4f})"
        yield (
            f"the {sizes[larger]} teacher is not better than the {sizes[smaller]} one: its own "
            f"held-out loss is {mean:.4f} nats higher{noise}; the curves then also show how well "
            "teachers were trained, not the capacity gap alone"
        )


def _of_training(records: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """Students that were still learning, one learning rate for all sizes, and failed runs."""
    done = [record for record in records if record.status == "done"]
    students = [record for record in done if record.kind == "cell"]
    learning = [record for record in students if _still_learning(record)]
    if learning:
        message = (
            f"{len(learning)} of {len(students)} students had not stopped learning: the last tenth "
            f"of their training still took more than {STILL_LEARNING:.0%} off their cross-entropy, "
            "so with more tokens another teacher may be the best"
        )
        yield "still_learning", message
    teachers = [record for record in done if record.kind == "teacher"]
    for who, runs in (("teachers", teachers), ("students", students)):
        rates = {run.learning_rate for run in runs if run.learning_rate is not None}
        sizes = [run.parameters.non_embedding for run in runs if run.learning_rate is not None]
        if len(rates) == 1 and max(sizes) > ONE_RATE_RANGE * min(sizes):
            message = (
                f"{who} of {format_count(min(sizes))} to {format_count(max(sizes))} all have the "
                f"peak learning rate {rates.pop():g}: it was not tuned for their sizes"
            )
            yield "one_learning_rate", message
    failed = [record.id for record in records if record.status == "failed"]
    if failed:
        yield "failed_cells", f"no fit uses these runs, which failed: {', '.join(failed)}"


def _still_learning(record: RunRecord) -> bool:
    """By the means of the last tenth of the training curve and of the tenth before."""
    losses = [value for value in record.curve.ce if value is not None]
    tenth = len(losses) // 10
    if tenth < 1:
        return False
    last, before = np.mean(losses[-tenth:]), np.mean(losses[-2 * tenth : -tenth])
    return bool(last < (1 - STILL_LEARNING) * before)


def _of_curve(curve: Curve) -> dict[str, str]:
    found = {}
    points, number = curve.points, len(curve.points)
    if len({seed for point in points for seed in point.seeds}) == 1:
        found["one_seed"] = (
            "one seed: the noise of a rerun is not measured, only guessed from the scatter of the "
            "teachers about smooth curves"
        )
    if number < MIN_TEACHERS:
        few = f"{number} {'teacher is' if number == 1 else 'teachers are'} too few to fit a curve"
        found["too_few_teachers"] = f"{few}: at least {MIN_TEACHERS}"
    sizes = [point.teacher_size for point in points]
    best = sizes.index(curve.optimum.best)
    around = sizes[max(0, best - 1) : best + 2]
    spacing = max((high / low for low, high in pairwise(around)), default=1.0)
    if spacing > WIDEST_SPACING:
        found["spacing_too_coarse"] = (
            f"neighbouring teachers around the optimum differ by {spacing:.2f}x, more than 1.6x"
        )
    over = _names(point for point in points if point.loss < (point.teacher_loss or 0.0))
    if over:
        found["better_than_teacher"] = (
            f"the student ends below the own loss of {over}: such a teacher is "
            "undertrained for it, and teaches by what it is unsure of rather than by what it knows"
        )
    if curve.gainer is None:
        found["missing_baseline"] = (
            "no teacher that will do has a baseline (same init and tokens without a teacher), so "
            "what distilling gains is unknown"
        )
    below = _names(point for point in points if point.gain is not None and point.gain <= 0)
    if below:
        found["below_baseline"] = (
            f"distilling from {below} is no better than training the same student without a teacher"
        )
    return found


def _names(points: Iterable[Point]) -> str:
    return ", ".join(format_count(point.teacher_parameters) for point in points)
