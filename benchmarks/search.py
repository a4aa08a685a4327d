"""How good the choices of `capgap search` are, and what they cost.

    python benchmarks/search.py simulate --replicates 40
    python benchmarks/search.py compact runs/grid docs/results/search/grid.csv
    python benchmarks/search.py replay docs/results/search/grid.csv

`simulate` plays the strategies on the published distillation surface (arXiv 2502.08606) with noise;
`compact` makes one small table of a real sweep that ran a grid on all its rungs; `replay` plays the
strategies on such a table. Both print the tables of docs/results/search.md. Regret is the true loss
under the chosen teacher above that under the best one, in percent of the latter.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from capgap.errors import UserError
from capgap.law.model import Floats
from capgap.law.published import PUBLISHED_SURFACE
from capgap.sweep.recipe import SearchSettings
from capgap.sweep.search_model import (
    Choice,
    Decision,
    History,
    Round,
    SearchGrid,
    decide,
    rule_choices,
)
from search_strategies import at_random, by_halving

STUDENTS = np.geomspace(0.3e9, 0.6e9, 5)
TEACHERS = np.geomspace(0.72e9, 6e9, 10)  # 1.2 times the largest student, 20 times the smallest
TOKENS = np.array([100e9 / 9, 100e9 / 3, 100e9])
NOISES = (0.001, 0.003, 0.01)
# what the teachers were trained on
DESIGNS: dict[str, Callable[[Floats], Floats]] = {
    "compute-optimal": PUBLISHED_SURFACE.supervised.compute_optimal_tokens().of,
    "300B tokens": lambda sizes: np.full_like(sizes, 300e9),
    "equal FLOPs": lambda sizes: 2e9 * 100e9 / sizes,
}
STRATEGIES = ("model", "halving", "random")
REPLAY_BUDGETS = (0.2, 0.35, 0.5)


@dataclass(frozen=True)
class Played:
    """One search: regret of every student in percent, and the share of FLOPs it took."""

    regrets: list[float]
    spent: float


def next_by(name: str, grid: SearchGrid, rounds: list[Round], settings: SearchSettings) -> Decision:
    if name == "model":
        return decide(grid, rounds, settings)
    history = History(grid, rounds, settings.budget)
    return {"halving": by_halving, "random": at_random}[name](history, settings)


def play(
    name: str, grid: SearchGrid, seen: Floats, truth: Floats, settings: SearchSettings
) -> Played:
    """A search whose runs show `seen` [S, T, R, N]; `truth` [S, T] judges the choices."""
    rounds: list[Round] = []
    while (decision := next_by(name, grid, rounds, settings)).runs:
        losses = [
            float(seen[run.student, run.teacher, run.rung, run.seed]) for run in decision.runs
        ]
        rounds.append(Round(decision.runs, tuple(losses)))
    spent = History(grid, rounds, settings.budget).spent / grid.full_flops
    assert spent <= settings.budget
    return Played(regrets(decision.choices, truth), spent)


def regrets(choices: tuple[Choice, ...], truth: Floats) -> list[float]:
    assert len(choices) == len(truth)
    return [
        100 * float(truth[one.student, one.teacher] / truth[one.student].min() - 1)
        for one in choices
    ]


def whole_grid(seen: Floats, truth: Floats) -> list[float]:
    """Regrets of the lowest measured cells of the full grid, for all FLOPs."""
    best = seen[:, :, -1].mean(axis=-1).argmin(axis=1)
    return regrets(tuple(Choice(s, int(t), None) for s, t in enumerate(best)), truth)


def published_grid(design: str) -> tuple[SearchGrid, Floats]:
    """Students of the published surface under teachers that exist, and their true losses
    [S, T, R]."""
    surface = PUBLISHED_SURFACE
    teacher_losses = surface.supervised.loss(TEACHERS, DESIGNS[design](TEACHERS))
    truth = surface.loss(STUDENTS[:, None, None], TOKENS, teacher_losses[:, None])
    grid = SearchGrid(
        students=STUDENTS,
        teachers=TEACHERS,
        tokens=TOKENS.astype(np.int64),
        seeds=1,
        run_flops=6 * STUDENTS[:, None, None] * TOKENS * np.ones((1, len(TEACHERS), 1)),
        pass_flops=2 * TEACHERS[:, None] * TOKENS,
        teacher_flops=np.zeros(len(TEACHERS)),
    )
    return grid, truth


def simulate(replicates: int, budget: float) -> Iterator[str]:
    for design in DESIGNS:
        full = published_grid(design)[1][:, :, -1]
        spread = 100 * (full.max(axis=1) / full.min(axis=1) - 1)
        ratios = TEACHERS[full.argmin(axis=1)] / STUDENTS
        yield f"{design}: worst above best {spread.round(2)}%, T/S of the best {ratios.round(1)}"
    yield ""
    yield "| teachers trained on | noise | strategy | mean | 90% | worst | above 0.5% | FLOPs |"
    yield "|---|---|---|---|---|---|---|---|"
    for design in DESIGNS:
        grid, truth = published_grid(design)
        full = truth[:, :, -1]
        yield row(design, "any", "rule T = 2.5 S", [Played(regrets(rule_choices(grid), full), 0)])
        for noise in NOISES:
            found: dict[str, list[Played]] = {name: [] for name in STRATEGIES}
            whole = []
            for seed in range(replicates):
                drawn = np.random.default_rng(seed).normal(0, noise, (*truth.shape, grid.seeds))
                seen = truth[..., None] + drawn
                whole.append(Played(whole_grid(seen, full), 1.0))
                for name in STRATEGIES:
                    found[name].append(
                        play(name, grid, seen, full, SearchSettings(budget=budget, seed=seed))
                    )
            for name, played in (found | {"the whole grid": whole}).items():
                yield row(design, f"{noise:g}", name, played)


def row(design: str, noise: str, name: str, played: list[Played]) -> str:
    values = np.array([regret for one in played for regret in one.regrets])
    spent = np.mean([one.spent for one in played])
    return (
        f"| {design} | {noise} | {name} | {values.mean():.3f} | {np.quantile(values, 0.9):.3f} | "
        f"{values.max():.3f} | {np.mean(values > 0.5):.1%} | {spent:.1%} |"
    )


COLUMNS = (
    "student_size", "teacher_size", "tokens", "seed", "student_parameters", "teacher_parameters",
    "loss", "run_flops", "pass_flops", "teacher_flops",
)  # fmt: skip


def compact(folder: Path, table: Path) -> None:
    """The cells of a sweep with what a search of them would have counted."""
    from capgap.records import read_records

    records = read_records(folder)
    teachers = {one.id: one for one in records if one.kind == "teacher"}
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        for one in records:
            if one.kind != "cell" or one.heldout is None:
                continue
            above, flops = teachers[str(one.teacher)], one.flops
            assert one.teacher_parameters is not None
            out.writerow(
                [
                    one.student_size, one.teacher_size, one.tokens, one.seed,
                    one.parameters.non_embedding, one.teacher_parameters.non_embedding,
                    f"{one.heldout.loss:.6f}",
                    (flops.student or 0) + (flops.evaluation or 0),
                    flops.teacher_forward,
                    (flops.pruning or 0) + (above.flops.evaluation or 0),
                ]
            )  # fmt: skip


def read_grid(table: Path) -> tuple[SearchGrid, Floats]:
    """The grid of a compact table, its teachers as given ones, and its losses [S, T, R, N]."""
    with table.open() as file:
        rows = [{name: float(value) for name, value in one.items()} for one in csv.DictReader(file)]
    axes = [
        sorted({one[name] for one in rows})
        for name in ("student_size", "teacher_size", "tokens", "seed")
    ]
    losses = np.full([len(axis) for axis in axes], np.nan)
    students, teachers = np.zeros(len(axes[0])), np.zeros(len(axes[1]))
    own, passes = np.zeros(losses.shape[:3]), np.zeros(losses.shape[1:3])
    once = np.zeros(len(teachers))
    for one in rows:
        s, t, r, n = (
            axis.index(one[name])
            for axis, name in zip(
                axes, ("student_size", "teacher_size", "tokens", "seed"), strict=True
            )
        )
        losses[s, t, r, n] = one["loss"]
        students[s], teachers[t] = one["student_parameters"], one["teacher_parameters"]
        own[s, t, r], passes[t, r], once[t] = (
            one["run_flops"], one["pass_flops"], one["teacher_flops"],
        )  # fmt: skip
    assert not np.isnan(losses).any(), "the grid has holes"
    tokens = np.array(axes[2]).astype(np.int64)
    return SearchGrid(students, teachers, tokens, losses.shape[3], own, passes, once), losses


def replay(table: Path, replicates: int, ladder_tokens: float) -> Iterator[str]:
    """The strategies on a real grid: `replicates` orders of the seeds and of the draws."""
    grid, losses = read_grid(table)
    truth = losses[:, :, -1].mean(axis=-1)
    noise = losses.std(axis=-1, ddof=1) if grid.seeds > 1 else np.zeros(1)
    spread = 100 * (truth.max(axis=1) / truth.min(axis=1) - 1)
    yield f"loss at full tokens, mean of seeds [students, teachers]:\n{truth.round(4)}"
    yield f"standard deviation of a run over seeds: {np.sqrt((noise**2).mean()):.4f} nats"
    yield f"worst teacher above the best, by student: {spread.round(2)}%"
    yield f"best teacher by student and rung:\n{losses.mean(axis=-1).argmin(axis=1)}\n"
    yield "| teachers | seeds in the search | budget | strategy | mean | worst | FLOPs |"
    yield "|---|---|---|---|---|---|---|"
    # 6 FLOPs a parameter and token; a pass over the last rung takes 2
    training = 3 * grid.pass_flops[:, -1] / grid.tokens[-1] * ladder_tokens
    ladder = replace(grid, teacher_flops=grid.teacher_flops + training)
    rule = [Played(regrets(rule_choices(grid), truth), 0.0)]
    for teachers, asked in (("exist", grid), ("trained", ladder)):
        yield short_row(teachers, "", 0, "rule T = 2.5 S", rule)
        for seeds in (grid.seeds, 1):
            for budget, name in product(REPLAY_BUDGETS, STRATEGIES):
                played = []
                try:
                    for seed in range(replicates):
                        order = np.roll(np.arange(grid.seeds), seed)[:seeds]
                        settings = SearchSettings(budget=budget, seed=seed)
                        own = replace(asked, seeds=seeds)
                        played.append(play(name, own, losses[..., order], truth, settings))
                except UserError as error:
                    yield f"| {teachers} | {seeds} | {budget:.0%} | {name} | {error} | | |"
                    continue
                yield short_row(teachers, str(seeds), budget, name, played)


def short_row(teachers: str, seeds: str, budget: float, name: str, played: list[Played]) -> str:
    values = np.array([regret for one in played for regret in one.regrets])
    return (
        f"| {teachers} | {seeds} | {budget:.0%} | {name} | {values.mean():.3f} | "
        f"{values.max():.3f} | {np.mean([one.spent for one in played]):.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    simulated = parts.add_parser("simulate")
    simulated.add_argument("--replicates", type=int, default=40)
    simulated.add_argument("--budget", type=float, default=0.35)
    compacted = parts.add_parser("compact")
    compacted.add_argument("folder", type=Path)
    compacted.add_argument("table", type=Path)
    replayed = parts.add_parser("replay")
    replayed.add_argument("table", type=Path)
    replayed.add_argument("--replicates", type=int, default=20)
    replayed.add_argument("--ladder-tokens", type=float, default=800_000)
    asked = parser.parse_args()
    if asked.part == "compact":
        compact(asked.folder, asked.table)
        return
    lines = (
        simulate(asked.replicates, asked.budget)
        if asked.part == "simulate"
        else replay(asked.table, asked.replicates, asked.ladder_tokens)
    )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
