"""What a sweep would do and cost, before anything is spent."""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from capgap.config import Recipe
from capgap.machine import resolve_device
from capgap.models.shape import Shape
from capgap.sizes import clock_time, format_count, training_flops
from capgap.sweep.checks import check_sources
from capgap.sweep.context import resolve_workers
from capgap.sweep.given import plan_of
from capgap.sweep.plan import FLOP_PARTS, Cell, Column, Plan, Teacher, expected_baselines
from capgap.sweep.speed import LARGEST_PROBE, Speed, measure_speed
from capgap.train.precision import autocast_dtype, teacher_dtype

SHORT_PARTS = {
    "teacher_training": "T train",
    "teacher_forward": "T forward",
    "pruning": "prune",
    "student": "S train",
    "evaluation": "evaluate",
}


def preview(recipe: Recipe) -> dict[str, Any]:
    """Every run with parameters, tokens, FLOPs by part and expected seconds (docs/cli.md)."""
    plan = plan_of(recipe)
    check_sources(recipe)
    baselines = expected_baselines(plan)
    device = resolve_device(recipe.run.device)
    training = recipe.training
    workers, threads = resolve_workers(recipe.run.workers, device, most=plan.width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    speed = _speed(plan, device)
    torch.set_num_threads(before)
    columns = (*plan.columns, *baselines)
    runs = [_teacher_row(teacher, plan, speed) for teacher in plan.teachers]
    runs += [_cell_row(cell, plan, speed) for column in columns for cell in column.cells]
    work = sum(_teacher_seconds(teacher, speed) for teacher in plan.teachers)
    work += sum(_column_seconds(column, speed) for column in columns)
    return {
        "name": recipe.name,
        "recipe_hash": recipe.hash(),
        "teachers": len(plan.teachers),
        "cells": len(plan.cells),
        "baselines": sum(len(column.cells) for column in baselines),
        "runs": runs,
        "flops": plan.flops(baselines),
        "workers": workers,
        "device": device,
        "teacher_dtype": teacher_dtype(training.teacher_dtype, training.precision, device),
        "expected_seconds": round(work / workers, 1),
    }


def _speed(plan: Plan, device: str) -> Speed:
    shapes: list[Shape] = [teacher.shape for teacher in plan.teachers]
    shapes += [cell.shape for cell in plan.cells]
    shapes.sort(key=lambda shape: shape.parameters().total)
    small = [shape for shape in shapes if shape.parameters().total <= LARGEST_PROBE]
    probes = (small[0], small[-1]) if small else (shapes[0], shapes[0])
    training = plan.recipe.training
    return measure_speed(
        *probes,
        batch_tokens=training.micro_batch_tokens or training.batch_tokens,
        window=plan.recipe.corpus.window,
        device=device,
        dtype=autocast_dtype(training.precision, device),
    )


def _teacher_seconds(teacher: Teacher, speed: Speed) -> float:
    return speed.seconds(teacher.tokens, sum(teacher.flops(0).values()))


def _column_seconds(column: Column, speed: Speed) -> float:
    """A forward pass has a third of the overhead of a training step, and is done once."""
    seconds = sum(
        speed.seconds(cell.tokens, training_flops(cell.shape.parameters().total, cell.tokens))
        for cell in column.cells
    )
    if column.assistant is not None and column.teacher is not None:
        between, (cell,) = column.assistant, column.cells
        own = between.shape.parameters().total
        above = column.teacher.shape.parameters().total
        flops = (6 * own + 2 * above) * between.tokens + 2 * own * cell.tokens
        seconds += speed.seconds(between.tokens, flops)
    elif column.teacher is not None:
        total = column.teacher.shape.parameters().total
        seconds += speed.seconds(column.tokens, 2 * total * column.tokens)
        seconds -= column.tokens * speed.overhead * 2 / 3
    return seconds


def _teacher_row(teacher: Teacher, plan: Plan, speed: Speed) -> dict[str, Any]:
    return {
        "id": teacher.id,
        "kind": "teacher",
        "parameters": teacher.shape.parameters().as_dict(),
        "shape": vars(teacher.shape),
        "tokens": teacher.tokens,
        "learning_rate": teacher.learning_rate,
        "flops": teacher.flops(plan.recipe.corpus.heldout_tokens),
        "expected_seconds": round(_teacher_seconds(teacher, speed), 1),
    }


def _cell_row(cell: Cell, plan: Plan, speed: Speed) -> dict[str, Any]:
    recipe = plan.recipe
    flops = cell.flops(recipe, recipe.corpus.heldout_tokens)
    return {
        "id": cell.id,
        "kind": cell.kind,
        "parameters": cell.shape.parameters().as_dict(),
        "shape": vars(cell.shape),
        "tokens": cell.tokens,
        "learning_rate": cell.learning_rate,
        "flops": flops,
        "expected_seconds": round(speed.seconds(cell.tokens, flops["student"]), 1),
    }


def print_preview(found: dict[str, Any], console: Console) -> None:
    """The same for a person."""
    table = Table(title=f"{found['name']}: what would be run", title_justify="left", box=None)
    table.add_column("run")
    for name in ("layers", "hidden", "heads", "ffn", "size", "vocab", "tokens", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in FLOP_PARTS:
        table.add_column(SHORT_PARTS[part], justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for run in found["runs"]:
        shape, parameters = run["shape"], run["parameters"]
        rate = run["learning_rate"]
        table.add_row(
            run["id"],
            *(str(shape[name]) for name in ("layers", "hidden", "heads", "ffn")),
            format_count(parameters["non_embedding"]),
            format_count(parameters["embedding"] + parameters["head"]),
            format_count(run["tokens"]) if run["tokens"] else "-",
            "-" if rate is None else f"{rate:g}",
            *(f"{run['flops'][part]:.1e}" if run["flops"][part] else "-" for part in FLOP_PARTS),
            clock_time(run["expected_seconds"]),
        )
    # a narrower terminal breaks lines, which beats a table with every word cut short
    console.width = max(console.width, 120 + max(len(run["id"]) for run in found["runs"]))
    console.print(table)
    console.print("size: non-embedding parameters; vocab: embedding and head; FLOPs by part\n")
    flops, precision = found["flops"], found["teacher_dtype"]
    if precision == "stored":
        precision = "the precision of their weights"
    parts = ", ".join(f"{part.replace('_', ' ')} {flops[part]:.2g}" for part in FLOP_PARTS)
    console.print(
        f"{found['teachers']} teachers, {found['cells']} cells, {found['baselines']} baselines; "
        f"{sum(flops.values()):.3g} FLOPs with shared work counted once ({parts})\n"
        f"expected {clock_time(found['expected_seconds'])} on {found['device']} with "
        f"{found['workers']} worker{'s' if found['workers'] > 1 else ''}, at the speed of two "
        f"models measured just now; teachers compute in {precision}",
        highlight=False,
    )
