"""Named warnings: what weakens a result, beside the result it weakens."""

from collections.abc import Iterable, Sequence

import numpy as np

from capgap.law.data import LOST, Cells, per_token
from capgap.law.law import Curve, Warned
from capgap.law.model import MIN_TEACHERS
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
    """About the runs, then about the curves; one that several curves share is given once."""
    found = [*_of_table(cells), *_of_teachers(cells), *_of_training(cells.records)]
    failed = [record.id for record in cells.records if record.status == "failed"]
    if failed:
        verb = "run" if len(failed) == 1 else "runs"
        message = f"{len(failed)} {verb} failed and no fit uses them: {', '.join(failed)}"
        found.append(Warned(name="failed_cells", where="whole sweep", message=message))
    places: dict[tuple[str, str], list[str]] = {}
    for curve in curves:
        kind = f"{curve.architecture}, {curve.init}, {format_count(curve.tokens)} tokens"
        where = f"{kind}, student {format_count(curve.student_parameters)}"
        for name, message in _of_curve(curve):
            places.setdefault((name, message), []).append(where)
    for (name, message), known in places.items():
        more = f" and {len(known) - 2} more" if len(known) > 2 else ""
        found.append(Warned(name=name, where="; ".join(known[:2]) + more, message=message))
    return found


def _of_table(cells: Cells) -> Iterable[Warned]:
    for name in cells.missing:
        message = f"the table has no column {name}: {LOST[name]}"
        yield Warned(name="missing_column", where="whole table", message=message)
    documents = cells.cells.shape[1]
    if cells.records and documents < FEW_DOCUMENTS:
        many = f"{documents} held-out documents are few to take the evaluation noise from"
        one = "one held-out document: what another text would have given is not known"
        message = many if documents > 1 else one
        yield Warned(name="few_documents", where="whole sweep", message=message)
    if (cells.losses > 7).any() and not cells.records:
        message = "losses above 7 nats are those of models that have hardly learnt: are they nats?"
        yield Warned(name="high_losses", where="whole table", message=message)


def _of_teachers(cells: Cells) -> Iterable[Warned]:
    """A teacher that is not better than the best smaller one, by its training and seed."""
    frame = cells.frame.assign(row=np.arange(len(cells.frame)))
    known = frame[~np.isnan(cells.teachers).any(axis=1)]
    tokens = cells.document_tokens
    for architecture, own in known.groupby("architecture"):
        by_seed = own["training"].nunique() > own["teacher_size"].nunique()
        ladders = own.groupby("seed") if by_seed else [("", own)]
        for seed, ladder in ladders:
            where = f"{architecture}, seed {seed}" if by_seed else str(architecture)
            rows = ladder.drop_duplicates("teacher_size").sort_values("teacher_size")
            documents = cells.teachers[rows["row"].to_numpy()]
            if not cells.records:
                # a table states the teacher's loss in every row; the mean of each size counts
                means = ladder.assign(loss=cells.teachers[ladder["row"].to_numpy(), 0])
                documents = means.groupby("teacher_size")["loss"].mean().to_numpy()[:, None]
            losses = per_token(documents, tokens)
            sizes = rows["teacher_parameters"].to_numpy(float)
            for larger in range(1, len(losses)):
                smaller = int(losses[:larger].argmin())
                if losses[larger] < losses[smaller]:
                    continue
                apart = documents[larger] - documents[smaller]
                mean = float(losses[larger] - losses[smaller])
                noise = ""
                if len(tokens) > 1:
                    shares = apart - mean * tokens
                    number = len(tokens) / (len(tokens) - 1)
                    error = float(np.sqrt((shares**2).sum() * number)) / tokens.sum()
                    noise = f" (evaluation noise {error:.4f})"
                message = (
                    f"the {format_count(sizes[larger])} teacher is not better than the "
                    f"{format_count(sizes[smaller])} one: its own held-out loss is {mean:.4f} nats "
                    f"higher{noise}; the curves then also show how well teachers were trained, not "
                    "the capacity gap alone"
                )
                yield Warned(name="teacher_loss_not_falling", where=where, message=message)


def _of_training(records: Sequence[RunRecord]) -> Iterable[Warned]:
    """Students that were still learning, and one learning rate for all sizes."""
    done = [record for record in records if record.status == "done"]
    students = [record for record in done if record.kind == "cell"]
    learning = [record for record in students if _still_learning(record)]
    if learning:
        message = (
            f"{len(learning)} of {len(students)} students had not stopped learning: the last tenth "
            f"of their training still took more than {STILL_LEARNING:.0%} off their cross-entropy, "
            "so with more tokens another teacher may be the best"
        )
        yield Warned(name="still_learning", where="whole sweep", message=message)
    teachers = [record for record in done if record.kind == "teacher"]
    for who, runs in (("teachers", teachers), ("students", students)):
        rates = {run.learning_rate for run in runs if run.learning_rate is not None}
        sizes = [run.parameters.non_embedding for run in runs if run.learning_rate is not None]
        if len(rates) == 1 and max(sizes) > ONE_RATE_RANGE * min(sizes):
            message = (
                f"{who} of {format_count(min(sizes))} to {format_count(max(sizes))} all have the "
                f"peak learning rate {rates.pop():g}: it was not tuned for their sizes"
            )
            yield Warned(name="one_learning_rate", where="whole sweep", message=message)


def _still_learning(record: RunRecord) -> bool:
    """By the means of the last tenth of the training curve and of the tenth before."""
    losses = [value for value in record.curve.ce if value is not None]
    tenth = len(losses) // 10
    if tenth < 1:
        return False
    last, before = np.mean(losses[-tenth:]), np.mean(losses[-2 * tenth : -tenth])
    return bool(last < (1 - STILL_LEARNING) * before)


def _of_curve(curve: Curve) -> Iterable[tuple[str, str]]:
    number = len(curve.points)
    if len({seed for point in curve.points for seed in point.seeds}) == 1:
        yield (
            "one_seed",
            "one seed: the noise of a rerun is not measured, only guessed from the scatter of the "
            "teachers about smooth curves",
        )
    if number < MIN_TEACHERS:
        is_are = "teacher is" if number == 1 else "teachers are"
        yield (
            "too_few_teachers",
            f"{number} {is_are} too few to fit a curve: at least {MIN_TEACHERS}",
        )
    sizes = [point.teacher_size for point in curve.points]
    best = sizes.index(curve.optimum.best)
    pairs = zip(sizes[max(0, best - 1) : best + 1], sizes[max(1, best) : best + 2], strict=False)
    spacing = max((high / low for low, high in pairs if high > low), default=1.0)
    if spacing > WIDEST_SPACING:
        yield (
            "spacing_too_coarse",
            f"neighbouring teachers around the optimum differ by {spacing:.2f}x, more than 1.6x",
        )
    over = [
        format_count(point.teacher_parameters)
        for point in curve.points
        if point.teacher_loss is not None and point.loss < point.teacher_loss
    ]
    if over:
        yield (
            "better_than_teacher",
            f"the student ends below the own loss of {', '.join(over)}: such a teacher is "
            "undertrained for it, and teaches by what it is unsure of rather than by what it knows",
        )
    if curve.gainer is None:
        yield (
            "missing_baseline",
            "no teacher that will do has a baseline (same init and tokens without a teacher), so "
            "what distilling gains is unknown",
        )
    below = [
        format_count(point.teacher_parameters)
        for point in curve.points
        if point.gain is not None and point.gain <= 0
    ]
    if below:
        yield (
            "below_baseline",
            f"distilling from {', '.join(below)} is no better than training the same student "
            "without a teacher",
        )
