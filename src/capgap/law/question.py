"""Which small grid answers a large question: what it costs of the whole, how far its law has to
reach, and how wide the answer will be. Tried on pretended sweeps whose truth is known.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas

from capgap.errors import UserError
from capgap.law.data import Cells
from capgap.law.fit import fit
from capgap.law.law import Line, Value
from capgap.sizes import LADDER_TOKENS, forward_flops, training_flops

# How many times smaller than the question the largest student of a grid is
SHRINK = (4, 16, 64)
STUDENTS, APART, SEEDS = 5, 2, 2
# Teachers from 1.2 times the smallest student to 6 times the largest; the published best is 2.5
LEAST_RATIO, MOST_RATIO, STEP = 1.2, 6.0, 1.8
FEWEST = 4  # for a curve
SMALLEST = 20_000
# The truth that tables are drawn from, in nats as in this project's sweeps (docs/results)
TRUE_RATIO, CURVATURE, LUCK, NOISE = 2.5, 0.03, 0.005, 0.003
TABLES, DRAWS = 8, 200


class Grid(Value):
    """Students on tokens in the question's proportion, each from every teacher. trained: whether
    the teachers have to be. share: of the FLOPs of trying all of the question's teachers. reach:
    the question's student over the largest here. factor: what the 90% interval of the best
    teacher of the question spans, high over low, median of pretended sweeps; None where none of
    them told a law."""

    students: tuple[int, ...]
    teachers: tuple[int, ...]
    tokens: tuple[int, ...]
    trained: bool
    flops: float
    share: float
    reach: float
    factor: float | None


class Question(Value):
    """spacing: between neighbouring teachers of the question, geometric mean; a grid tells them
    apart where its factor is no larger. answer: the number of the cheapest such grid; None where
    there is none."""

    student: int
    tokens: int
    flops: float
    spacing: float
    grids: tuple[Grid, ...]
    answer: int | None


def ask(student: int, tokens: int, teachers: Sequence[int], *, tables: int = TABLES) -> Question:
    """Grids for the best of these teachers (non-embedding parameters) for such a student.

    Teachers of the question that are as small as a grid needs are taken as they are. UserError for
    fewer than two teachers.
    """
    sizes = sorted(set(teachers))
    if len(sizes) < 2:
        raise UserError("a question needs two teachers or more to choose from")
    flops = float(sum(_cell_flops(student, size, tokens) for size in sizes))
    spacing = (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))
    grids = []
    for shrink in SHRINK:
        largest = student / shrink
        students = [largest / APART**step for step in range(STUDENTS)]
        if students[-1] < SMALLEST:
            break
        low, high = LEAST_RATIO * students[-1], MOST_RATIO * largest
        steps = math.ceil(math.log(high / low) / math.log(STEP)) + 1
        ladder = [float(size) for size in np.geomspace(low, high, steps)]
        there = [float(size) for size in sizes if low <= size <= high]
        for ladders, trained in ((there, False), (ladder, True)):
            if len(ladders) >= FEWEST:
                grids.append(_grid(student, tokens, ladders, students, flops, trained, tables))
    good = [i for i, one in enumerate(grids) if one.factor is not None and one.factor <= spacing]
    cheapest = min(good, key=lambda place: grids[place].flops, default=None)
    cheap = None if cheapest is None or grids[cheapest].share >= 1 else cheapest
    return Question(
        student=student,
        tokens=tokens,
        flops=flops,
        spacing=spacing,
        grids=tuple(grids),
        answer=cheap,
    )


def _grid(
    student: int,
    tokens: int,
    teachers: Sequence[float],
    students: Sequence[float],
    whole: float,
    trained: bool,
    tables: int,
) -> Grid:
    budgets = [tokens / student * size for size in students]
    flops = SEEDS * sum(
        _cell_flops(size, teacher, budget)
        for size, budget in zip(students, budgets, strict=True)
        for teacher in teachers
        if teacher > size
    )
    if trained:
        read = LADDER_TOKENS * teachers[-1]
        flops += SEEDS * sum(training_flops(1, 1) * size * read for size in teachers)
    found = [
        one
        for number in range(tables)
        if (one := reached(pretend(students, teachers, number, own=trained), student)) is not None
    ]
    # a law that most sweeps do not tell is none to count on
    spans = [high / low for low, high in found]
    factor = None if 2 * len(found) < tables else float(np.median(spans))
    return Grid(
        students=tuple(map(round, students)),
        teachers=tuple(map(round, teachers)),
        tokens=tuple(map(round, budgets)),
        trained=trained,
        flops=float(flops),
        share=float(flops / whole),
        reach=student / students[0],
        factor=factor,
    )


def _cell_flops(student: float, teacher: float, tokens: float) -> float:
    return training_flops(1, 1) * student * tokens + forward_flops(1, 1) * teacher * tokens


def pretend(
    students: Sequence[float], teachers: Sequence[float], number: int, *, own: bool = True
) -> Cells:
    """A measured table whose best teacher is TRUE_RATIO times the student; own: every seed has
    teachers of its own training, each with its luck."""
    rng = np.random.default_rng(number)
    luck = LUCK * rng.standard_normal((len(teachers), SEEDS))
    rows: list[dict[str, Any]] = []
    for size in students:
        for place, teacher in enumerate(teachers):
            if teacher <= size:
                continue
            far = np.log(teacher / size / TRUE_RATIO)
            for seed in range(SEEDS):
                taught = seed if own else 0
                noise = NOISE * rng.standard_normal()
                rows.append(
                    {
                        "architecture": "a",
                        "init": "pruned",
                        # one proportion of tokens to size is one law
                        "tokens": round(20 * size),
                        "student_size": round(size),
                        "teacher_size": round(teacher),
                        "seed": seed,
                        "student_parameters": size,
                        "teacher_parameters": teacher,
                        "teacher_tokens": np.nan,
                        "training": f"{place}-{taught}",
                        "loss_stderr": np.nan,
                        "loss": 3 + CURVATURE * far**2 + luck[place, taught] + noise,
                    }
                )
    frame = pandas.DataFrame(rows)
    losses = frame.pop("loss").to_numpy()[:, None]
    unknown = np.full_like(losses, np.nan)
    return Cells(frame, losses, unknown, unknown, np.ones(1))


def reached(cells: Cells, student: float) -> tuple[float, float] | None:
    """The 90% interval of the best teacher for a student outside of the table, by the power law:
    that of the ratio where the students lie, widened by the exponent's on the way; None where no
    law is told."""
    law = fit(cells, draws=DRAWS)
    lines = [line for line in law.lines if line.is_identified]
    if not lines:
        return None
    return reach(lines[0], sorted(set(cells.frame["student_parameters"])), student)


def reach(line: Line, students: Sequence[float], student: float) -> tuple[float, float] | None:
    """The same from a line that was fitted to these students."""
    ratio, exponent = line.ratio, line.exponent
    if ratio is None or exponent is None:
        return None
    middle = float(np.mean(np.log(students)))
    far = float(np.log(student)) - middle
    here = np.log(ratio.value) + middle
    low, high = (
        here + exponent.value * far + sign * np.hypot(np.log(end / ratio.value), far * width)
        for sign, end, width in (
            (-1, ratio.low, exponent.value - exponent.low),
            (1, ratio.high, exponent.high - exponent.value),
        )
    )
    return float(np.exp(low)), float(np.exp(high))
