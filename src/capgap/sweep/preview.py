"""What a sweep would do and cost, before anything is spent."""

from typing import Any

import torch
from rich.console import Console

from capgap.machine import resolve_device
from capgap.sizes import clock_time, format_count
from capgap.sweep.checks import check_sources
from capgap.sweep.context import resolve_workers
from capgap.sweep.given import plan_of
from capgap.sweep.plan import FLOP_PARTS, Cell, Plan, Teacher, Work, expected_baselines
from capgap.sweep.progress import table
from capgap.sweep.recipe import Recipe
from capgap.sweep.schedule import Speed
from capgap.sweep.speed import LARGEST_PROBE, measure_speed
from capgap.train.settings import autocast_dtype, teacher_dtype

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
    cells = [cell for column in (*plan.columns, *baselines) for cell in column.cells]
    heldout = recipe.corpus.heldout_tokens
    runs = [_row(one, "teacher", one.flops(heldout), speed) for one in plan.teachers]
    runs += [_row(cell, cell.kind, cell.flops(recipe, heldout), speed) for cell in cells]
    seconds = sum(speed.seconds(task.work) for task in plan.tasks(baselines))
    return {
        "name": recipe.name,
        "recipe_hash": recipe.hash(),
        "teachers": len(plan.teachers),
        "cells": len(plan.cells),
        "baselines": len(cells) - len(plan.cells),
        "runs": runs,
        "flops": plan.flops(baselines),
        "workers": workers,
        "device": device,
        "teacher_dtype": teacher_dtype(training.teacher_dtype, training.precision, device),
        "expected_seconds": round(seconds / workers, 1),
    }


def _speed(plan: Plan, device: str) -> Speed:
    """Measured on the smallest and the largest model that may be built for it."""
    shapes = [teacher.shape for teacher in plan.teachers] + [cell.shape for cell in plan.cells]
    shapes.sort(key=lambda shape: shape.parameters().total)
    small = [shape for shape in shapes if shape.parameters().total <= LARGEST_PROBE] or shapes[:1]
    training = plan.recipe.training
    return measure_speed(
        small[0],
        small[-1],
        batch_tokens=training.micro_batch_tokens or training.batch_tokens,
        window=plan.recipe.corpus.window,
        device=device,
        dtype=autocast_dtype(training.precision, device),
    )


def _row(run: Teacher | Cell, kind: str, flops: dict[str, int], speed: Speed) -> dict[str, Any]:
    """One run; the seconds are those of its training."""
    return {
        "id": run.id,
        "kind": kind,
        "parameters": run.shape.parameters().as_dict(),
        "shape": vars(run.shape),
        "tokens": run.tokens,
        "learning_rate": run.learning_rate,
        "flops": flops,
        "expected_seconds": round(speed.seconds(Work(run.work.trained, [])), 1),
    }


def print_preview(found: dict[str, Any], console: Console) -> None:
    """The same for a person."""
    sizes = ("layers", "hidden", "heads", "ffn", "size", "vocab", "tokens", "rate")
    parts = [SHORT_PARTS[part] for part in FLOP_PARTS]
    shown = table(f"{found['name']}: what would be run", "run", *sizes, *parts, "time")
    for run in found["runs"]:
        shape, parameters = run["shape"], run["parameters"]
        rate = run["learning_rate"]
        shown.add_row(
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
    console.print(shown)
    console.print("size: non-embedding parameters; vocab: embedding and head; FLOPs by part\n")
    flops, precision = found["flops"], found["teacher_dtype"]
    if precision == "stored":
        precision = "the precision of their weights"
    told = ", ".join(f"{part.replace('_', ' ')} {flops[part]:.2g}" for part in FLOP_PARTS)
    console.print(
        f"{found['teachers']} teachers, {found['cells']} cells, {found['baselines']} baselines; "
        f"{sum(flops.values()):.3g} FLOPs with shared work counted once ({told})\n"
        f"expected {clock_time(found['expected_seconds'])} on {found['device']} with "
        f"{found['workers']} worker{'s' if found['workers'] > 1 else ''}, at the speed of two "
        f"models measured just now; teachers compute in {precision}",
        highlight=False,
    )
