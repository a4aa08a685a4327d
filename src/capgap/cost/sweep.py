"""What a sweep would take, told from its recipe without measuring anything."""

from collections.abc import Iterator, Sequence
from typing import Any

from capgap.cost.activations import FLOAT
from capgap.cost.memory import LoopMemory, loop_memory
from capgap.cost.run import CHECKPOINT_BYTES
from capgap.machine import GPUS, UTILISATION, hours, parse_gpus
from capgap.models.shape import Shape
from capgap.sweep.context import resolve_workers
from capgap.sweep.plan import Column, Plan, Teacher, expected_baselines, make_plan
from capgap.sweep.recipe import Recipe

# About: a teacher's on the standard library has 12 kB, a cell's tells more; most are the curve and
# the losses of held-out documents
RECORD_BYTES = 20_000


def plan_sweep(
    recipe: Recipe,
    given: Sequence[Teacher] = (),
    *,
    gpus: str | None = None,
    utilisation: float | None = None,
) -> dict[str, Any]:
    """Runs, tokens, FLOPs, the memory of the largest task, time and disk (docs/cli.md).

    `given` are the recipe's `teachers.models`, as `make_plan` takes them. UserError as that raises.
    """
    plan = make_plan(recipe, given)
    baselines = expected_baselines(plan)
    hardware = None if gpus is None else parse_gpus(gpus)
    share = UTILISATION if utilisation is None else utilisation
    flops = plan.flops(baselines)
    total = sum(flops.values())
    columns = (*plan.columns, *baselines)
    tasks = plan.tasks(baselines)
    tokens = sum(tokens for task in tasks for _, tokens in task.work.trained)
    name, loop = max(_loops(plan, hardware), key=lambda named: named[1].total)
    phase, parts = loop.peak()
    return {
        "kind": "sweep",
        "name": recipe.name,
        "teachers": len(plan.teachers),
        "cells": len(plan.cells),
        "baselines": sum(len(column.cells) for column in baselines),
        "teacher_params": max(one.shape.parameters().total for one in plan.teachers),
        "student_params": max(one.shape.parameters().total for one in plan.cells),
        "tokens": tokens,
        "batch_tokens": recipe.training.batch_tokens,
        "window": recipe.corpus.window,
        "steps": tokens // recipe.training.batch_tokens,
        "flops": flops,
        "flops_total": total,
        "gpus": gpus,
        "utilisation": None if hardware is None else share,
        "workers": _workers(plan, hardware),
        "memory_task": name,
        "memory": parts,
        "memory_at_most": loop.at_most(),
        "peak_phase": phase,
        "memory_gb": round(loop.total / 1e9, 3),
        "fits": None if hardware is None else loop.total <= GPUS[hardware[1]].memory,
        "hours": None if hardware is None else _hours(plan, columns, total, hardware, share),
        "disk": _disk(plan, len(plan.teachers) + sum(len(column.cells) for column in columns)),
    }


def _workers(plan: Plan, hardware: tuple[int, str] | None) -> int:
    if hardware is not None:
        return min(hardware[0], plan.width)
    device = "cuda" if plan.recipe.run.device.startswith("cuda") else "cpu"
    return resolve_workers(plan.recipe.run.workers, device, most=plan.width)[0]


def _loops(plan: Plan, hardware: tuple[int, str] | None) -> Iterator[tuple[str, LoopMemory]]:
    """What a worker has in memory, for every task that trains; by the task's id."""
    recipe = plan.recipe

    def loop(students: tuple[Shape, ...], teacher: Shape | None) -> LoopMemory:
        return loop_memory(
            recipe.training,
            recipe.run,
            students=students,
            teacher=teacher if recipe.training.alpha > 0 else None,
            # a ladder's; at most those of a given teacher
            stored_bytes=FLOAT,
            window=recipe.corpus.window,
            gpu=None if hardware is None else hardware[1],
        )

    for teacher in plan.teachers:
        if teacher.source is None:
            yield teacher.id, loop((teacher.shape,), None)
    for column in (*plan.columns, *plan.baselines):
        above = None if column.teacher is None else column.teacher.shape
        if column.assistant is not None:
            yield column.id, loop((column.assistant.shape,), above)
            above = column.assistant.shape
        yield column.id, loop(tuple(cell.shape for cell in column.cells), above)


def _hours(
    plan: Plan, columns: Sequence[Column], total: int, hardware: tuple[int, str], share: float
) -> float:
    """All work shared out evenly, but no less than the longest task with the teachers it needs."""
    heldout = plan.recipe.corpus.heldout_tokens
    alone = {one.id: sum(one.flops(heldout).values()) for one in plan.teachers}
    longest = max(
        max((alone[name] for name in column.teachers), default=0)
        + column.work.training_flops
        + column.work.forward_flops
        for column in columns
    )
    trained = share * (1 - plan.recipe.run.checkpoint_share)
    return max(hours(total, hardware, trained), hours(longest, (1, hardware[1]), trained))


def _disk(plan: Plan, runs: int) -> dict[str, int]:
    """Bytes of what stays of so many runs; `checkpoints` are those of the largest task, at most."""
    ladder = [one.shape.parameters().total for one in plan.teachers if one.source is None]
    columns = [
        sum(cell.shape.parameters().total for cell in column.cells) for column in plan.columns
    ]
    assistants = [cell.assistant.shape for cell in plan.cells if cell.assistant is not None]
    students = sum(columns) + sum(shape.parameters().total for shape in assistants)
    checkpoints = plan.recipe.run.checkpoints + 1
    return {
        "records": runs * RECORD_BYTES,
        "teachers": FLOAT * sum(ladder),
        "students": FLOAT * students,
        "checkpoints": checkpoints * CHECKPOINT_BYTES * max(ladder + columns),
    }
