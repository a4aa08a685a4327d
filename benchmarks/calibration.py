"""How often the intervals of the law hold the truth, and which grid tells one ratio from another.

    python benchmarks/calibration.py --grids 300 --out docs/results/calibration

Simulated sweeps go through the same code as measured ones: known curves, parabolas or skew ones,
with noise of seeds and of documents; some ladders end before the largest student's optimum. Writes
OUT.json and prints two tables in Markdown: coverage of the 90% intervals, and by which designs the
interval of the ratio holds the true one of 2.0, 2.5 and 3.3 and neither of the others.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from capgap.law.fit import fit_law
from law_surface import ladder, parabola, skew, sweep

SMALLEST_STUDENT = 40_000
STUDENT_SPACING = 1.5
RATIOS = (2.0, 2.5, 3.3)
# Steps that the ladder reaches beyond the smallest and the largest optimum
MARGIN = 2.2


@dataclass(frozen=True)
class Design:
    """`noise`: a run's standard deviation in nats; a document's effect on a run is three times
    that, of 40 documents. `edge`: the ladder lacks its three largest teachers."""

    spacing: float
    students: int
    seeds: int
    noise: float
    shape: str = "parabola"
    edge: bool = False
    ratio: float = 2.5


def teachers_of(design: Design, rng: np.random.Generator) -> list[int]:
    """A ladder that covers all optima, beginning anywhere within a step."""
    steps = design.spacing**MARGIN
    largest = SMALLEST_STUDENT * STUDENT_SPACING ** (design.students - 1)
    low = SMALLEST_STUDENT * design.ratio / steps * design.spacing ** rng.uniform(-1, 0)
    number = int(np.ceil(np.log(largest * design.ratio * steps / low) / np.log(design.spacing)))
    return ladder(low, design.spacing, number + 1 - 3 * design.edge)


def simulate(design: Design, number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    teachers = teachers_of(design, rng)
    students = [round(SMALLEST_STUDENT * STUDENT_SPACING**step) for step in range(design.students)]
    records = sweep(
        students,
        lambda student: [teacher for teacher in teachers if teacher > student],
        lambda student: design.ratio * student,
        seeds=design.seeds,
        curvature=0.1,
        shape=skew if design.shape == "skew" else parabola,
        seed_noise=design.noise,
        document_noise=3 * design.noise,
        gain=None,
        with_teachers=False,
        number=number,
    )
    fitted = fit_law(records, resamples=400, seed=number)
    law = fitted["laws"][0]
    return {
        "teachers": len(teachers),
        "slope": law["slope_interval"],
        "ratio": law["ratio_interval"],
        "identified": law["status"] == "identified",
    }


def summary(design: Design, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = asdict(design) | {
        "teachers": float(np.mean([one["teachers"] for one in found])),
        "grids": len(found),
        "identified": float(np.mean([one["identified"] for one in found])),
    }
    for name in ("slope", "ratio"):
        intervals = [one[name] for one in found if one[name] is not None]
        row[f"{name}_grids"] = len(intervals)
        row[f"{name}_coverage"] = float(
            np.mean([low <= design.ratio <= high for low, high in intervals])
        )
    others = [ratio for ratio in RATIOS if ratio != design.ratio]
    told = [
        one["ratio"] is not None
        and one["ratio"][0] <= design.ratio <= one["ratio"][1]
        and not any(one["ratio"][0] <= other <= one["ratio"][1] for other in others)
        for one in found
    ]
    return row | {"told_apart": float(np.mean(told))}


def run(designs: Sequence[Design], grids: int, workers: int) -> list[dict[str, Any]]:
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        for design in designs:
            found = list(pool.map(simulate, [design] * grids, range(grids), chunksize=10))
            rows.append(summary(design, found))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def coverage_designs() -> list[Design]:
    designs = [
        Design(spacing, students, 2, noise, shape)
        for spacing, students in ((1.25, 5), (1.4, 4), (1.6, 3))
        for noise in (0.001, 0.004, 0.01)
        for shape in ("parabola", "skew")
    ]
    designs += [Design(1.4, 4, 1, noise, "skew") for noise in (0.001, 0.004, 0.01)]
    return designs + [Design(1.4, 4, 2, noise, "skew", edge=True) for noise in (0.001, 0.004)]


def power_designs() -> list[Design]:
    return [
        Design(spacing, students, seeds, noise, "skew", ratio=ratio)
        for spacing in (1.25, 1.6, 2.0)
        for students in (2, 4)
        for seeds in (1, 3)
        for noise in (0.004, 0.01)
        for ratio in RATIOS
    ]


def print_coverage(rows: Sequence[dict[str, Any]]) -> None:
    print("| spacing | teachers | students | seeds | noise | curves | slope | ratio | identified |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        curves = row["shape"] + (", ladder too short" if row["edge"] else "")
        print(
            f"| {row['spacing']} | {row['teachers']:.0f} | {row['students']} | {row['seeds']} | "
            f"{row['noise']} | {curves} | {row['slope_coverage']:.0%} | "
            f"{row['ratio_coverage']:.0%} | {row['identified']:.0%} |"
        )
    for name in ("slope", "ratio"):
        number = sum(row[f"{name}_grids"] for row in rows)
        held = sum(row[f"{name}_grids"] * row[f"{name}_coverage"] for row in rows)
        print(f"\n{name}: {held / number:.1%} of {number:,} intervals hold the truth")


def print_power(rows: Sequence[dict[str, Any]]) -> None:
    print("\n| spacing | teachers | students | seeds | noise | 2.0 | 2.5 | 3.3 |")
    print("|---|---|---|---|---|---|---|---|")
    for start in range(0, len(rows), len(RATIOS)):
        alike = rows[start : start + len(RATIOS)]
        row = alike[0]
        told = " | ".join(f"{one['told_apart']:.0%}" for one in alike)
        print(
            f"| {row['spacing']} | {row['teachers']:.0f} | {row['students']} | {row['seeds']} | "
            f"{row['noise']} | {told} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=int, default=300, help="simulated grids of each design")
    parser.add_argument("--power-grids", type=int, default=60, help="the same for the second table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="OUT.json")
    asked = parser.parse_args()
    coverage = run(coverage_designs(), asked.grids, asked.workers)
    power = run(power_designs(), asked.power_grids, asked.workers)
    asked.out.with_suffix(".json").write_text(
        json.dumps({"coverage": coverage, "power": power}, indent=1) + "\n"
    )
    print_coverage(coverage)
    print_power(power)


if __name__ == "__main__":
    main()
