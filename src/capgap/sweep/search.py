"""A search: rounds of a grid's runs, each decided on what the ones before have shown.

It runs through the same workers, records and checkpoints as a sweep. Decisions are a function of
the recipe and of the records alone, so a search that was stopped takes them again from the first,
finds their runs recorded, and goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from capgap.artifact import write_json
from capgap.errors import UserError
from capgap.records import read_record
from capgap.sizes import format_count
from capgap.stage import FieldError
from capgap.sweep.cells import SEARCH_FILE, Cell, Column, Teacher
from capgap.sweep.checks import check_disk
from capgap.sweep.plan import Plan, plan_of
from capgap.sweep.recipe import Recipe, SearchSettings
from capgap.sweep.runner import Runner
from capgap.sweep.search_model import (
    Choice,
    History,
    Round,
    Run,
    SearchGrid,
    decide,
    rule_choices,
)

RUNG_RATIO = 3


def with_rungs(recipe: Recipe, rungs: int) -> Recipe:
    """The recipe with its token budget on `rungs` rungs, each a third of the next.

    UserError: several inits or token budgets, a chain, or a shortest rung of less than a batch.
    """
    asked = recipe.students
    if len(recipe.architectures) > 1:
        raise UserError("a search looks at one architecture: give one in architectures")
    if len(asked.inits) > 1 or asked.inits[0] == "chain":
        raise UserError(
            "a search looks at one init, pruned, fixed or scratch, not at "
            f"{', '.join(asked.inits)}: "
            """choose one, as `set` 'students.inits=["pruned"]'"""
        )
    if asked.tokens_per_parameter:
        raise UserError("a search looks at one token budget: give students.tokens")
    if len(asked.tokens) > 1:
        budgets = ", ".join(format_count(tokens) for tokens in asked.tokens)
        raise UserError(
            f"a search looks for the best teacher at one token budget, not at {budgets}: choose "
            f"""one, as `set` 'students.tokens=["{format_count(max(asked.tokens))}"]'"""
        )
    batch = recipe.training.batch_tokens
    tokens = [round(asked.tokens[0] / RUNG_RATIO**power) for power in reversed(range(rungs))]
    if tokens[0] < batch or len({round(count / batch) for count in tokens}) < rungs:
        raise FieldError(
            "rungs",
            f"{rungs}: the shortest of them would have {format_count(tokens[0])} tokens, with "
            f"batches of {format_count(batch)}: fewer rungs, or more students.tokens",
        )
    students = asked.model_copy(update={"tokens": tuple(tokens)})
    return recipe.model_copy(update={"students": students})


class GridSearch:
    """The plan of a search, and its rounds. UserError: what a sweep refuses; more than one
    architecture, init or token budget; a budget that does not pay for the first runs."""

    def __init__(self, recipe: Recipe, settings: SearchSettings) -> None:
        self.settings = settings
        self.plan = plan_of(with_rungs(recipe, settings.rungs))
        self.grid, self.cells = grid_of(self.plan)
        self.sizes, self.teachers = _axes(self.plan)
        self.rounds: list[Round] = []
        self.steps: list[dict[str, Any]] = []
        # a budget that is too small is told before any work
        self.decision = decide(self.grid, self.rounds, settings)

    def run(self, runner: Runner) -> None:
        """Rounds of runs until the decision is to stop; search.json grows with every round."""
        context = runner.context
        while self.decision.runs:
            runs, reason = self.decision.runs, self.decision.reason
            step = len(self.rounds) + 1
            subset = sub_plan(self.plan, [self.cells[run] for run in runs], label=f"round{step}")
            check_disk(context, subset)
            runner.display.say(f"round {step}: {reason}")
            runner.run(subset.teachers, subset.columns)
            records = [read_record(context.record_folder(self.cells[run].id)) for run in runs]
            losses = [None if one.heldout is None else one.heldout.loss for one in records]
            before = [run for one in self.rounds for run in one.runs]
            self.rounds.append(Round(runs, tuple(losses)))
            self.decision = decide(self.grid, self.rounds, self.settings)
            spent = self._spent / self.grid.full_flops
            self.steps.append(
                {
                    "round": step,
                    "reason": reason,
                    "runs": [
                        {"id": self.cells[run].id, "loss": loss}
                        for run, loss in zip(runs, losses, strict=True)
                    ],
                    "flops": round(self.grid.flops(runs, before)),
                    "spent_fraction": spent,
                    "choices": self._choices(self.decision.choices),
                }
            )
            write_json(context.out / SEARCH_FILE, self.trace())
            chosen = ", ".join(
                f"{format_count(one['student_size'])} from {format_count(one['teacher_size'])}"
                for one in self.steps[-1]["choices"]
            )
            runner.display.say(
                f"round {step} done, {spent:.1%} of the full grid spent; best: {chosen}"
            )

    def expected(self) -> dict[str, Any]:
        """What a dry run tells (docs/cli.md)."""
        grid, first = self.grid, self.decision.runs
        return {
            "name": self.plan.recipe.name,
            "recipe_hash": self.plan.recipe.hash(),
            "budget": self.settings.budget,
            "rungs": grid.tokens.tolist(),
            "cells": len(grid.runs(grid.last)),
            "full_flops": round(grid.full_flops),
            "budget_flops": round(self.settings.budget * grid.full_flops),
            "first": [self.cells[run].id for run in first],
            "first_flops": round(grid.flops(first)),
        }

    def trace(self) -> dict[str, Any]:
        """The object of search.json (docs/output.md)."""
        grid, asked = self.grid, {"budget", "tolerance", "confidence", "seed"}
        return {
            "schema": 1,
            **self.settings.model_dump(include=asked),
            "recipe_hash": self.plan.recipe.hash(),
            "students": [
                {"size": size, "parameters": round(parameters)}
                for size, parameters in zip(self.sizes, grid.students, strict=True)
            ],
            "teachers": [
                {"size": one.size, "parameters": round(parameters)}
                for one, parameters in zip(self.teachers, grid.teachers, strict=True)
            ],
            "seeds": sorted({cell.seed for cell in self.plan.cells}),
            "rungs": grid.tokens.tolist(),
            "full_flops": round(grid.full_flops),
            "spent_flops": round(self._spent),
            "spent_fraction": self._spent / grid.full_flops,
            "stop": self.decision.stop,
            "steps": self.steps,
            "choices": self._choices(self.decision.choices),
            "rule": self._choices(rule_choices(grid)),
        }

    @property
    def _spent(self) -> float:
        return History(self.grid, self.rounds, self.settings.budget).spent

    def _choices(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        expected = ("loss", "loss_stderr", "expected_regret", "safe_probability")
        return [
            {
                "student_size": self.sizes[one.student],
                "teacher_size": self.teachers[one.teacher].size,
                "ratio": float(self.grid.teachers[one.teacher] / self.grid.students[one.student]),
                **{name: getattr(one, name) for name in expected},
                "full_runs": one.runs,
            }
            for one in choices
        ]


def grid_of(plan: Plan) -> tuple[SearchGrid, dict[Run, Cell]]:
    """The plan as the search sees it, and the cell of every run.

    UserError: teachers of several architectures, whose curves are not one.
    """
    sizes, teachers = _axes(plan)
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
        flops = Column("", cell.teacher, cell.seed, (cell,)).work.flops(plan.recipe)
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


def _axes(plan: Plan) -> tuple[list[int], list[Teacher]]:
    """Sizes of students, and a teacher of each size (a ladder has one a seed), both ascending."""
    teachers = {one.size: one for one in plan.teachers}
    sizes = {cell.student_size for cell in plan.cells}
    return sorted(sizes), [teachers[size] for size in sorted(teachers)]
