"""What a sweep would do and cost, before anything is spent, at a speed that is measured here."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.machine import resolve_device
from capgap.models.build import build_model
from capgap.models.parts import Parts
from capgap.models.shape import Shape
from capgap.sweep.cells import Cell, Teacher, Work
from capgap.sweep.checks import check_sources
from capgap.sweep.plan import Plan, expected_baselines, plan_of, resolve_workers
from capgap.sweep.recipe import Recipe
from capgap.sweep.schedule import Speed
from capgap.train.learner import make_optimizer
from capgap.train.settings import autocast_dtype, teacher_dtype

# Larger models are not built for an estimate: their speed follows from the larger of the two.
LARGEST_PROBE = 3_000_000
REPEATS = 5


def preview(recipe: Recipe) -> dict[str, Any]:
    """Every run with parameters, tokens, FLOPs by part and expected seconds (docs/cli.md)."""
    plan = plan_of(recipe)
    check_sources(recipe)
    baselines = expected_baselines(plan)
    device = resolve_device(recipe.run.device)
    training = recipe.training
    workers, threads = resolve_workers(recipe.run, device, most=plan.width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    speed = measure_speed(plan, device)
    torch.set_num_threads(before)
    cells = [cell for column in (*plan.columns, *baselines) for cell in column.cells]
    runs: list[Teacher | Cell] = [*plan.teachers, *cells]
    seconds = sum(speed.seconds(task.work) for task in plan.tasks(baselines))
    return {
        "name": recipe.name,
        "recipe_hash": recipe.hash(),
        "teachers": len(plan.teachers),
        "cells": len(plan.cells),
        "baselines": len(cells) - len(plan.cells),
        "runs": [_row(recipe, run, speed) for run in runs],
        "flops": plan.flops(baselines),
        "workers": workers,
        "gpus_per_column": recipe.run.gpus_per_column,
        "device": device,
        "teacher_dtype": teacher_dtype(training.teacher_dtype, training.precision, device),
        "expected_seconds": round(seconds / workers / recipe.run.gpus_per_column, 1),
    }


def _row(recipe: Recipe, run: Teacher | Cell, speed: Speed) -> dict[str, Any]:
    """One run; the seconds are those of its training."""
    return {
        "id": run.id,
        "kind": "teacher" if isinstance(run, Teacher) else run.kind,
        "parameters": run.shape.parameters().as_dict(),
        "shape": vars(run.shape),
        "tokens": run.tokens,
        "learning_rate": run.learning_rate,
        "flops": run.work.flops(recipe),
        "expected_seconds": round(speed.seconds(Work(students=run.work.trained)), 1),
    }


def measure_speed(plan: Plan, device: str) -> Speed:
    """Distils the smallest and the largest model that may be built for it for a few steps of one
    batch; the median counts."""
    shapes = [teacher.shape for teacher in plan.teachers] + [cell.shape for cell in plan.cells]
    shapes.sort(key=lambda shape: shape.parameters().total)
    built = [shape for shape in shapes if shape.parameters().total <= LARGEST_PROBE] or shapes[:1]
    ends = built[0], built[-1]
    small_seconds, large_seconds = (_seconds_a_token(shape, plan.recipe, device) for shape in ends)
    small_flops, large_flops = (6.0 * shape.parameters().total for shape in ends)
    if large_flops <= small_flops * 1.2 or large_seconds <= small_seconds:
        return Speed(0.0, large_flops / large_seconds)
    per_flop = (large_seconds - small_seconds) / (large_flops - small_flops)
    overhead = max(0.0, small_seconds - small_flops * per_flop)
    return Speed(overhead, 1 / per_flop)


def _seconds_a_token(shape: Shape, recipe: Recipe, device: str) -> float:
    training, window = recipe.training, recipe.corpus.window
    rows = (training.micro_batch_tokens or training.batch_tokens) // window
    dtype = autocast_dtype(training.precision, device)
    model = build_model(shape, seed=0).to(device)
    parts = Parts(model)
    optimizer = make_optimizer(model, weight_decay=0.1, decay_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, shape.vocabulary, (rows, window + 1), generator=generator)
    windows = windows.to(device)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            student = HeadInput.of(parts, windows[:, :-1])
            # the soft term is a good part of a small model's step; the student is its own teacher
            teacher = replace(student, hidden=student.hidden.detach())
            result = column_loss(
                [student], windows[:, 1:].reshape(-1), alphas=[0.5], teacher=teacher
            )
        (result.students[0].loss / (rows * window)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (rows * window)  # the first warms up
