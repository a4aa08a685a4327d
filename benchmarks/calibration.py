"""How often what the law says is true, on pretended sweeps whose truth is known.

    python benchmarks/calibration.py --tables 200 --out docs/results/calibration.json

A table has students 1.25 times apart on a ladder of teachers, a run's own noise of 0.003 nats, and
the luck of its teachers. Tables go through the same code as measured ones. `--table` prints OUT
in Markdown.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from capgap.law.data import Cells
from capgap.law.fit import fit

SMALLEST = 40_000
RATIO = 2.5
NOISE = 0.003
DRAWS = 500
SHAPES = {
    "parabola": lambda x, _: x**2,
    # the same curvature, steeper for teachers that are too small
    "skew": lambda x, _: 2 * (np.exp(-x) + 2 * np.exp(x / 2) - 3) / 1.5,
    "V": lambda x, _: np.abs(x),
    # from a parabola for the smallest student to a skew curve for the largest
    "changing": lambda x, share: (
        (1 - share) * x**2 + share * 2 * (np.exp(-x) + 2 * np.exp(x / 2) - 3) / 1.5
    ),
}


@dataclass(frozen=True)
class Design:
    """`luck`: deviation of a teacher in nats. own_teachers: every seed trains its own, else one
    training of a size teaches all. curvature: nats a unit of (ln T)^2; 0 is a flat truth, "plateau"
    a loss that falls and then stays. shared: teachers at the same T/S for every student."""

    students: int
    teachers: int
    seeds: int
    luck: float
    own_teachers: bool = True
    curvature: float = 0.05
    spacing: float = 1.5
    shape: str = "parabola"
    shared: bool = False


def teachers_of(design: Design, rng: np.random.Generator) -> list[float]:
    """A ladder in whose middle the optima lie, beginning anywhere within a step."""
    middle = RATIO * SMALLEST * 1.25 ** ((design.students - 1) / 2)
    first = middle * design.spacing ** (-(design.teachers - 1) / 2 + rng.uniform(-0.5, 0.5))
    return [first * design.spacing**step for step in range(design.teachers)]


def pretend(design: Design, number: int) -> Cells:
    rng = np.random.default_rng(number)
    ladder = teachers_of(design, rng)
    lucks = design.luck * rng.standard_normal((design.teachers, design.seeds))
    rows = []
    for step in range(design.students):
        student = SMALLEST * 1.25**step
        own = ladder
        if design.shared:
            middle = (design.teachers - 1) / 2
            own = [RATIO * student * design.spacing ** (i - middle) for i in range(design.teachers)]
        for i, teacher in enumerate(own):
            if teacher <= student:
                continue
            x = float(np.log(teacher / student / RATIO))
            share = step / max(design.students - 1, 1)
            if design.shape == "plateau":
                smooth = design.curvature * max(-x, 0.0)
            else:
                smooth = design.curvature * float(SHAPES[design.shape](x, share))
            for seed in range(design.seeds):
                taught = seed if design.own_teachers else 0
                place = i if not design.shared else step * design.teachers + i
                luck = lucks[i, taught] if not design.shared else design.luck * rng.normal()
                rows.append(
                    {
                        "architecture": "a",
                        "init": "pruned",
                        "tokens": 10**6,
                        "student_size": round(student),
                        "teacher_size": round(teacher),
                        "seed": seed,
                        "student_parameters": student,
                        "teacher_parameters": teacher,
                        "teacher_tokens": np.nan,
                        "training": f"{place}-{taught}",
                        "loss_stderr": np.nan,
                        "loss": 3 + smooth + luck + NOISE * rng.standard_normal(),
                    }
                )
    frame = pandas.DataFrame(rows)
    losses = frame.pop("loss").to_numpy()[:, None]
    unknown = np.full_like(losses, np.nan)
    return Cells(frame, losses, unknown, unknown, np.ones(1))


def oracle(design: Design, cells: Cells) -> dict[str, float]:
    """Widths of 90% intervals of ln ratio and exponent for somebody who knows the curve's family,
    the noise and the luck: generalised least squares, linear about the truth, for the level of
    every student and seed, and every student's curvature and optimum."""
    frame = cells.frame
    x = np.log(frame["teacher_parameters"] / frame["student_parameters"] / RATIO).to_numpy()
    student = np.unique(frame["student_size"], return_inverse=True)[1]
    share = student / max(design.students - 1, 1)
    shape = SHAPES[design.shape]
    slope = (shape(x + 1e-4, share) - shape(x - 1e-4, share)) / 2e-4
    own = np.eye(design.students)[student]
    levels = own[:, :, None] * np.eye(design.seeds)[frame["seed"]][:, None, :]
    columns = np.hstack(
        [
            own * (design.curvature * slope)[:, None],
            own * shape(x, share)[:, None],
            levels.reshape(len(x), -1),
        ]
    )
    taught = np.unique(frame["training"], return_inverse=True)[1]
    same = (taught[:, None] == taught).astype(float)
    covariance = NOISE**2 * np.eye(len(x)) + design.luck**2 * same
    spread = np.linalg.pinv(columns.T @ np.linalg.solve(covariance, columns))
    spread = spread[: design.students, : design.students]
    logs = np.log(1.25) * np.arange(design.students)
    found = {"ratio": np.ones(design.students) / design.students}
    if design.students > 1:
        found["exponent"] = (logs - logs.mean()) / ((logs - logs.mean()) ** 2).sum()
    return {name: 3.29 * float(np.sqrt(w @ spread @ w)) for name, w in found.items()}


def one_table(design: Design, number: int) -> dict[str, Any]:
    cells = pretend(design, number)
    law = fit(cells, draws=DRAWS, seed=number)
    [line] = law.lines
    found: dict[str, Any] = {
        "told": line.is_identified,
        "cursed": any(curve.cursed for curve in law.curves),
        "interior": any(curve.optimum.status == "interior" for curve in law.curves),
    }
    for name, true in (("slope", RATIO), ("ratio", RATIO), ("exponent", 1.0)):
        estimate = getattr(line, name)
        if estimate is not None:
            found[name] = estimate.holds(true)
            width = np.log(estimate.high / estimate.low) if name == "ratio" else 0.0
            found[f"{name}_width"] = width or estimate.high - estimate.low
    if design.curvature and design.shape in SHAPES:
        found["oracle"] = oracle(design, cells)
    return found


def summary(design: Design, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = asdict(design) | {"tables": len(found)}
    for name in ("told", "cursed", "interior", "slope", "ratio", "exponent"):
        known = [one[name] for one in found if name in one]
        row[name] = float(np.mean(known)) if known else None
        row[f"{name}_tables"] = len(known)
    for name in ("ratio", "exponent"):
        widths = [
            one[f"{name}_width"] / one["oracle"][name]
            for one in found
            if f"{name}_width" in one and name in one.get("oracle", {})
        ]
        row[f"{name}_width"] = float(np.median(widths)) if widths else None
    return row


def designs() -> Iterator[Design]:
    lucks = (0.0, 0.005, 0.01)
    for curvature in (0.01, 0.02, 0.05, 0.1):
        for luck in lucks:
            for own in (True, False):
                yield Design(5, 6, 3, luck, own, curvature)
    for shape in ("skew", "V", "changing"):
        for luck in lucks:
            yield Design(5, 8, 3, luck, shape=shape)
    for luck in lucks:
        yield Design(4, 9, 1, luck, spacing=1.4)
        yield Design(5, 7, 3, luck, shared=True)
    for luck in lucks:
        for students, teachers, seeds in (
            *((1, 4, 1), (1, 5, 1), (1, 5, 3), (3, 2, 3), (3, 3, 3), (5, 6, 1), (5, 6, 3)),
        ):
            for own in (True, False) if seeds > 1 else (False,):
                yield Design(students, teachers, seeds, luck, own, curvature=0.0)
        yield Design(5, 8, 3, luck, shape="plateau")
        yield Design(5, 8, 3, luck, own_teachers=False, shape="plateau")


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    names = "students, teachers, seeds | spacing | one training for all seeds | luck"
    print(
        f"| {names} | curves | curvature | slope | ratio | exponent | law told | width beside the "
        "oracle's: ratio, exponent |"
    )
    print("|---" * 10 + "|")
    for row in rows:
        if not row["curvature"] or row["shape"] == "plateau":
            continue
        widths = [row[f"{name}_width"] for name in ("ratio", "exponent")]
        told = ", ".join("" if width is None else f"{width:.2f}" for width in widths)
        print(
            f"| {_layout(row)} | {row['shape']}{', same T/S' if row['shared'] else ''} | "
            f"{row['curvature']} | {percent(row['slope'])} | {percent(row['ratio'])} | "
            f"{percent(row['exponent'])} | {percent(row['told'])} | {told} |"
        )
    print(f"\n| {names} | truth | called harmful | optimum called inside |")
    print("|---" * 7 + "|")
    for row in rows:
        if not row["curvature"] or row["shape"] == "plateau":
            truth = "flat" if not row["curvature"] else "falls, then flat"
            print(
                f"| {_layout(row)} | {truth} | {percent(row['cursed'])} | "
                f"{percent(row['interior'])} |"
            )


def _layout(row: dict[str, Any]) -> str:
    numbers = ", ".join(str(row[name]) for name in ("students", "teachers", "seeds"))
    one = "yes" if row["seeds"] > 1 and not row["own_teachers"] else ""
    return f"{numbers} | {row['spacing']} | {one} | {row['luck']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=200, help="pretended tables of each design")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print OUT and do nothing else")
    asked = parser.parse_args()
    done = json.loads(asked.out.read_text()) if asked.out.exists() else []
    if not asked.table:
        with ProcessPoolExecutor(asked.workers) as pool:
            for design in designs():
                if any(asdict(design).items() <= row.items() for row in done):
                    continue
                numbers = range(asked.tables)
                found = list(pool.map(one_table, [design] * len(numbers), numbers, chunksize=5))
                done.append(summary(design, found))
                asked.out.write_text(json.dumps(done, indent=1) + "\n")
                print(done[-1], file=sys.stderr, flush=True)
    print_tables(done)


if __name__ == "__main__":
    main()
