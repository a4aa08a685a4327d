"""Does the grid that `capgap plan --question` proposes hold the truth? On pretended sweeps.

    python benchmarks/question.py --tables 100

For each question the proposed grid is drawn so many times with a known law, the noise and the luck
of teachers; the 90% interval of the best teacher for the question's own student is compared with
the truth.
"""

import argparse

from capgap.law.published import find_family
from capgap.law.question import TRUE_RATIO, ask, pretend, reached
from capgap.sizes import format_count

QUESTIONS = (
    ("pythia", "300M", 300_000_000, 6_000_000_000),
    ("qwen2.5", "300M", 300_000_000, 5_000_000_000),
    ("llama2", "3B", 3_000_000_000, 126_000_000_000),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=100)
    tables = parser.parse_args().tables
    print("| question | grid | of the cost | reach | factor | law told | truth within 90% |")
    print("|---|---|---|---|---|---|---|")
    for family, name, student, tokens in QUESTIONS:
        teachers = [model.non_embedding for model in find_family(family).models]
        asked = ask(student, tokens, teachers)
        for number, grid in enumerate(asked.grids):
            # other draws than those that chose the grid
            found = [
                reached(pretend(grid.students, grid.teachers, 1000 + i, own=grid.trained), student)
                for i in range(tables)
            ]
            told = [one for one in found if one is not None]
            held = sum(low <= TRUE_RATIO * student <= high for low, high in told)
            mark = " (proposed)" if number == asked.answer else ""
            factor = "" if grid.factor is None else f"{grid.factor:.2f}"
            print(
                f"| {family}, {name}, {format_count(tokens)} | {number + 1}{mark} "
                f"| {grid.share:.2%} | {grid.reach:g}x | {factor} | {len(told)} of {tables} "
                f"| {held} of {len(told)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
