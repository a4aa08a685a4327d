"""A search: rounds of a grid's runs, each decided on what the ones before have shown.

It runs through the same workers, records and checkpoints as a sweep. Decisions are a function of
the recipe and of the records alone, so a search that was stopped takes them again from the first,
finds their runs recorded, and goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from capgap.errors import UserError
from capgap.records import read_record, write_json_atomically
from capgap.sizes import format_count
from capgap.sweep.checks import check_disk
from capgap.sweep.context import SEARCH_FILE
from capgap.sweep.given import plan_of
from capgap.sweep.plan import Cell, Column, Plan, Teacher
from capgap.sweep.progress import Display, table
from capgap.sweep.recipe import Recipe
from capgap.sweep.runner import Runner, run_folder
from capgap.sweep.search_grid import Choice, History, Round, Run, SearchGrid, Settings
from capgap.sweep.search_model import decide, rule_choices
from capgap.sweep.summary import SweepResult, print_summary

RUNG_RATIO = 3
STOP_REASONS = {
    "safe": "every choice is safe",
    "budget": "nothing more that is worth running fits into the budget",
    "exhausted": "there is nothing left to run",
}


@dataclass(frozen=True)
class SearchResult:
    """What a search chose, and the folder's results as those of a sweep; `trace` is search.json."""

    sweep: SweepResult
    trace: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The keys of `capgap search --json` (docs/cli.md)."""
        kept = ("budget", "full_flops", "spent_flops", "spent_fraction", "stop")
        found = {name: self.trace[name] for name in (*kept, "choices")}
        return self.sweep.as_dict() | {"search": found}


def run_search(
    recipe: Recipe, out: Path, display: Display, settings: Settings, *, rungs: int = 3
) -> SearchResult:
    """The best teacher of every student for a share of the grid's FLOPs; writes search.json and
    what a sweep writes. Stopped at any moment, the same call continues.

    UserError: what a sweep refuses; more than one architecture, init or token budget; a budget that
    does not pay for the first runs.
    """
    search = Search(recipe, settings, rungs=rungs)
    result = run_folder(search.plan, out, display, search.run)
    return SearchResult(result, search.trace())


def with_rungs(recipe: Recipe, rungs: int) -> Recipe:
    """The recipe with its token budget on `rungs` rungs, each a third of the next.

    UserError: several inits or token budgets, a chain, or a shortest rung of less than a batch.
    """
    asked = recipe.students
    if rungs < 1:
        raise UserError(f"rungs {rungs} must be 1 or more")
    if len(recipe.architectures) > 1:
        raise UserError("a search looks at one architecture: give one in architectures")
    if len(asked.inits) > 1 or asked.inits[0] == "chain":
        raise UserError(
            "a search looks at one init, pruned, fixed or scratch, not at "
            f"{', '.join(asked.inits)}: "
            """choose one, as --set 'students.inits=["pruned"]'"""
        )
    if len(asked.tokens) > 1:
        budgets = ", ".join(format_count(tokens) for tokens in asked.tokens)
        raise UserError(
            f"a search looks for the best teacher at one token budget, not at {budgets}: choose "
            f"""one, as --set 'students.tokens=["{format_count(max(asked.tokens))}"]'"""
        )
    batch = recipe.training.batch_tokens
    tokens = [round(asked.tokens[0] / RUNG_RATIO**power) for power in reversed(range(rungs))]
    if tokens[0] < batch or len({round(count / batch) for count in tokens}) < rungs:
        raise UserError(
            f"--rungs {rungs}: the shortest of them would have {format_count(tokens[0])} tokens, "
            f"with batches of {format_count(batch)}: fewer rungs, or more students.tokens"
        )
    students = asked.model_copy(update={"tokens": tuple(tokens)})
    return recipe.model_copy(update={"students": students})


class Search:
    """The plan of a search, and its rounds."""

    def __init__(self, recipe: Recipe, settings: Settings, *, rungs: int = 3) -> None:
        self.settings = settings
        self.plan = plan_of(with_rungs(recipe, rungs))
        self.grid, self.cells = grid_of(self.plan)
        self.rounds: list[Round] = []
        self.steps: list[dict[str, Any]] = []
        # a budget that is too small is told before any work
        self.decision = decide(self.grid, self.rounds, settings)

    def run(self, runner: Runner) -> None:
        """Rounds of runs until the decision is to stop; search.json grows with every round."""
        context = runner.context
        while self.decision.runs:
            runs = self.decision.runs
            step = len(self.rounds) + 1
            subset = sub_plan(self.plan, [self.cells[run] for run in runs], label=f"round{step}")
            check_disk(context, subset)
            runner.display.say(f"round {step}: {self.decision.reason}")
            runner.run(subset.teachers, subset.columns)
            records = [read_record(context.record_folder(self.cells[run].id)) for run in runs]
            losses = [None if one.heldout is None else one.heldout.loss for one in records]
            self.rounds.append(Round(runs, tuple(losses)))
            reason = self.decision.reason
            self.decision = decide(self.grid, self.rounds, self.settings)
            self.steps.append(self._step(reason))
            write_json_atomically(context.out / SEARCH_FILE, self.trace())
            runner.display.say(self._state())

    def expected(self) -> dict[str, Any]:
        """What a dry run tells (docs/cli.md)."""
        grid, first = self.grid, self.decision.runs
        return {
            "name": self.plan.recipe.name,
            "recipe_hash": self.plan.recipe.hash(),
            "budget": self.settings.budget,
            "rungs": [int(tokens) for tokens in grid.tokens],
            "cells": len(grid.runs(grid.last)),
            "full_flops": round(grid.full_flops),
            "budget_flops": round(self.settings.budget * grid.full_flops),
            "first": [self.cells[run].id for run in first],
            "first_flops": round(grid.flops(first)),
        }

    def trace(self) -> dict[str, Any]:
        """The object of search.json (docs/output.md)."""
        grid, settings = self.grid, self.settings
        history = History(grid, self.rounds, settings.budget)
        return {
            "schema": 1,
            **asdict(settings),
            "recipe_hash": self.plan.recipe.hash(),
            "students": [
                {"size": size, "parameters": round(parameters)}
                for size, parameters in zip(_sizes(self.plan), grid.students, strict=True)
            ],
            "teachers": [
                {"size": one.size, "parameters": round(parameters)}
                for one, parameters in zip(_teachers(self.plan), grid.teachers, strict=True)
            ],
            "seeds": sorted({cell.seed for cell in self.plan.cells}),
            "rungs": [int(tokens) for tokens in grid.tokens],
            "full_flops": round(grid.full_flops),
            "spent_flops": round(history.spent),
            "spent_fraction": history.spent / grid.full_flops,
            "stop": self.decision.stop,
            "steps": self.steps,
            "choices": self._choices(self.decision.choices),
            "rule": self._choices(rule_choices(grid)),
        }

    def _step(self, reason: str) -> dict[str, Any]:
        """The last round, what it cost, and what is chosen after it."""
        last, before = self.rounds[-1], [run for one in self.rounds[:-1] for run in one.runs]
        history = History(self.grid, self.rounds, self.settings.budget)
        return {
            "round": len(self.rounds),
            "reason": reason,
            "runs": [
                {"id": self.cells[run].id, "loss": loss}
                for run, loss in zip(last.runs, last.losses, strict=True)
            ],
            "flops": round(self.grid.flops(last.runs, before)),
            "spent_fraction": history.spent / self.grid.full_flops,
            "choices": self._choices(self.decision.choices),
        }

    def _choices(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        sizes, teachers = _sizes(self.plan), _teachers(self.plan)
        return [
            {
                "student_size": sizes[one.student],
                "teacher_size": teachers[one.teacher].size,
                "ratio": float(self.grid.teachers[one.teacher] / self.grid.students[one.student]),
                "loss": one.loss,
                "loss_stderr": one.loss_stderr,
                "expected_regret": one.expected_regret,
                "safe_probability": one.safe_probability,
                "full_runs": one.runs,
            }
            for one in choices
        ]

    def _state(self) -> str:
        """The state of the search in one line."""
        chosen = ", ".join(
            f"{format_count(one['student_size'])} from {format_count(one['teacher_size'])}"
            for one in self.steps[-1]["choices"]
        )
        spent = self.steps[-1]["spent_fraction"]
        return f"round {len(self.rounds)} done, {spent:.1%} of the full grid spent; best: {chosen}"


def grid_of(plan: Plan) -> tuple[SearchGrid, dict[Run, Cell]]:
    """The plan as the search sees it, and the cell of every run.

    UserError: teachers of several architectures, whose curves are not one.
    """
    teachers, sizes = _teachers(plan), _sizes(plan)
    if len({teacher.architecture for teacher in teachers}) > 1:
        raise UserError(
            "a search looks at one architecture: give teachers of one in teachers.models"
        )
    teacher_sizes = [teacher.size for teacher in teachers]
    rungs = sorted({cell.budget for cell in plan.cells})
    seeds = sorted({cell.seed for cell in plan.cells})
    cells: dict[Run, Cell] = {}
    students = np.zeros(len(sizes))
    run_flops = np.zeros((len(sizes), len(teachers), len(rungs)))
    pass_flops = np.zeros((len(teachers), len(rungs)))
    for cell in plan.cells:
        assert cell.teacher is not None
        run = Run(
            sizes.index(cell.student_size),
            teacher_sizes.index(cell.teacher.size),
            rungs.index(cell.budget),
            seeds.index(cell.seed),
        )
        cells[run] = cell
        students[run.student] = cell.shape.parameters().non_embedding
        flops = Column("", cell.teacher, cell.seed, (cell,)).flops(plan.recipe)
        pass_flops[run.teacher, run.rung] = flops.pop("teacher_forward")
        run_flops[run.student, run.teacher, run.rung] = sum(flops.values())
    alone = [Plan(plan.recipe, (teacher,), (), ()).flops(()) for teacher in teachers]
    grid = SearchGrid(
        students=students,
        teachers=np.array([one.shape.parameters().non_embedding for one in teachers], dtype=float),
        tokens=np.array(rungs),
        seeds=len(seeds),
        run_flops=run_flops,
        pass_flops=pass_flops,
        teacher_flops=np.array([sum(flops.values()) for flops in alone], dtype=float),
        own_teachers=any(teacher.source is None for teacher in teachers),
        base_teacher=0 if plan.recipe.students.inits == ("fixed",) else None,
    )
    return grid, cells


def sub_plan(plan: Plan, cells: Sequence[Cell], *, label: str) -> Plan:
    """Only these cells, in columns of their own names, and the teachers that they need."""
    wanted = {cell.id for cell in cells}
    columns = []
    for column in plan.columns:
        own = tuple(cell for cell in column.cells if cell.id in wanted)
        if own:
            columns.append(replace(column, id=f"{column.id}-{label}", cells=own))
    needed = {teacher for column in columns for teacher in column.teachers}
    teachers = tuple(teacher for teacher in plan.teachers if teacher.id in needed)
    return Plan(plan.recipe, teachers, tuple(columns), ())


def _teachers(plan: Plan) -> list[Teacher]:
    """One of each size, ascending; a ladder has one a seed."""
    return sorted({one.size: one for one in plan.teachers}.values(), key=lambda one: one.size)


def _sizes(plan: Plan) -> list[int]:
    return sorted({cell.student_size for cell in plan.cells})


def print_search(result: SearchResult, console: Console) -> None:
    """The choices, what was spent, why the search stopped; then what a sweep tells."""
    trace = result.trace
    columns = ("teacher", "T/S", "expected loss", "expected regret", "safe", "runs")
    chosen = table("The best teacher of every student", "student", *columns)
    for one in trace["choices"]:
        regret = one["expected_regret"]
        chosen.add_row(
            format_count(one["student_size"]),
            format_count(one["teacher_size"]),
            f"{one['ratio']:.2f}",
            _with_error(one["loss"], one["loss_stderr"]),
            "-" if regret is None else f"{regret:.4f}",
            "-" if one["safe_probability"] is None else f"{one['safe_probability']:.0%}",
            str(one["full_runs"]),
        )
    console.print(chosen)
    console.print(
        f"losses in nats per token at {format_count(trace['rungs'][-1])} tokens; safe: the "
        f"probability that no teacher is better by more than {trace['tolerance']:.2%} of the loss; "
        "runs: of that cell at full tokens\n"
        f"spent {trace['spent_fraction']:.1%} of the full grid's {trace['full_flops']:.3g} FLOPs "
        f"(budget {trace['budget']:.1%}); stopped because {STOP_REASONS[trace['stop']]}\n",
        highlight=False,
    )
    print_summary(result.sweep, console)


def print_expected(found: dict[str, Any], console: Console) -> None:
    """The same for a person."""
    rungs = ", ".join(format_count(tokens) for tokens in found["rungs"])
    console.print(
        f"{found['name']}: the full grid has {found['cells']} cells and takes "
        f"{found['full_flops']:.3g} FLOPs without baselines\n"
        f"a budget of {found['budget']:.1%} allows {found['budget_flops']:.3g}, on rungs of "
        f"{rungs} tokens\nit begins with {len(found['first'])} "
        f"runs for {found['first_flops']:.3g} FLOPs:",
        highlight=False,
    )
    for name in found["first"]:
        console.print(f"  {name}", highlight=False, markup=False)


def _with_error(loss: float | None, error: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.4f}" + ("" if error is None else f" ± {error:.4f}")
