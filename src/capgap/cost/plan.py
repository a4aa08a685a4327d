"""What a recipe would take, estimated without a measurement: `capgap plan`. No torch."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from capgap.cost.time import OTHER_LAYERS, slowed, sweep_hours
from capgap.distill import CHECKSUM_BYTES, TokenRecord
from capgap.errors import UserError
from capgap.law.published import find_model, published_families
from capgap.machine import GPUS, UTILISATION, hours, parse_gpus
from capgap.models.shape import Shape, ladder_shape, ladder_size
from capgap.pipeline.recipe import RunRecipe
from capgap.sizes import (
    clock_time,
    format_bytes,
    format_count,
    forward_flops,
    training_flops,
)
from capgap.stage import text_table
from capgap.sweep.cells import Teacher
from capgap.sweep.memory import task_loops
from capgap.sweep.plan import Plan, expected_baselines, given_teachers, make_plan, resolve_workers
from capgap.sweep.recipe import Recipe
from capgap.train.learning_rate import auto_learning_rate
from capgap.train.memory import FLOAT, HALF, PARTS, LoopMemory, loop_memory

# Of a parameter: its weight and AdamW's two moments, as a checkpoint has them
CHECKPOINT_BYTES = 3 * FLOAT
# About: most are the curve and the losses of held-out documents
RECORD_BYTES = 20_000
MOST_GPUS = 4096
# Rows of a table after adaptation come in these
ROWS_MULTIPLE = 64

DISK = {"checkpoints": "checkpoints at most", "cache": "a cache of the teacher would have"}

Gpus = tuple[int, str] | None


class GivenTeacher(NamedTuple):
    """The teacher of a run: its shape after adaptation, and bytes of one of its stored weights."""

    shape: Shape
    stored_bytes: int


def estimate(
    recipe: Recipe | RunRecipe, *, gpus: str | None = None, utilisation: float | None = None
) -> dict[str, Any]:
    """What a recipe of either kind would take, before anything is spent: what `capgap plan` tells
    (docs/cli.md has the keys).

    gpus: such as `16xA100`, for the time and what fits; utilisation: the share of their peak that
    is reached. UserError for what could not be run.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(
            f"`utilisation` {utilisation:g}: give a share above 0 and at most 1, such as 0.4"
        )
    if isinstance(recipe, RunRecipe):
        return plan_run(recipe, gpus=gpus, utilisation=utilisation)
    return plan_sweep(recipe, given_teachers(recipe), gpus=gpus, utilisation=utilisation)


def _memory(loop: LoopMemory, gpus: Gpus) -> dict[str, Any]:
    """The keys of a loop's memory."""
    phase, parts = loop.peak()
    return {
        "memory_gb": round(loop.total / 1e9, 3),
        "memory": parts,
        "memory_at_most": loop.at_most(),
        "peak_phase": phase,
        "fits": None if gpus is None else loop.total <= GPUS[gpus[1]].memory,
    }


def plan_run(
    recipe: RunRecipe, *, gpus: str | None = None, utilisation: float | None = None
) -> dict[str, Any]:
    """Parameters, steps, FLOPs, memory, time and disk (docs/cli.md has the keys); `gpus` and
    `utilisation` stand for those of the recipe.

    UserError: no such teacher, a cut that is none, a window the teacher cannot read, a batch that
    the GPUs cannot share.
    """
    asked = gpus or recipe.hardware.gpus
    hardware = None if asked is None else parse_gpus(asked)
    share = recipe.hardware.utilisation if utilisation is None else utilisation
    teacher = find_teacher(recipe)
    student = recipe.prune.candidates(teacher.shape).shape
    training = recipe.training
    steps = recipe.distill.tokens // training.batch_tokens
    tokens = steps * training.batch_tokens
    counts, above = student.parameters(), teacher.shape.parameters()
    flops = {
        "student": training_flops(counts.total, tokens),
        "teacher_forward": forward_flops(above.total, tokens) if training.alpha > 0 else 0,
    }
    total = sum(flops.values())
    places = []
    for number in sorted({1, hardware[0] if hardware else 1}):
        machine = hardware and (number, hardware[1])
        loop = run_memory(recipe, student, teacher, machine)
        place = {
            "gpus": number,
            "micro_batch_tokens": loop.micro_batch_tokens,
            "micro_batches": loop.micro_batches,
            "host_gb": machine and round(loop.in_host() / 1e9, 3),
            "hours": machine and hours(total, machine, share * (1 - recipe.run.checkpoint_share)),
        }
        layers: float = student.layers + OTHER_LAYERS
        layers += (teacher.shape.layers + OTHER_LAYERS) / 3 if training.alpha > 0 else 0
        place |= slowed(place["hours"], steps * loop.micro_batches * layers)
        places.append(place | _memory(loop, machine))
    rate = recipe.distill.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(counts.non_embedding, is_cut=True)
    return {
        "kind": "run",
        "name": recipe.name,
        "teacher": recipe.teacher.model or f"new, {format_count(above.non_embedding)}",
        "teacher_params": above.total,
        "student_params": counts.total,
        "teacher_parameters": above.as_dict(),
        "student_parameters": counts.as_dict(),
        "teacher_shape": vars(teacher.shape),
        "student_shape": vars(student),
        "tokens": tokens,
        "batch_tokens": training.batch_tokens,
        "window": recipe.distill.window,
        "steps": steps,
        "learning_rate": rate,
        "flops": flops,
        "flops_total": total,
        "gpus": asked,
        "utilisation": hardware and share,
        "places": places,
        "memory_gb": places[-1]["memory_gb"],
        "hours": places[-1]["hours"],
        "advice": _advice(recipe, student, teacher, hardware),
        "checkpoint_share": recipe.run.checkpoint_share,
        "disk": _run_disk(recipe, student, teacher),
    }


def find_teacher(recipe: RunRecipe) -> GivenTeacher:
    """By its published name, its folder's config, or the size of a new one, with the rows that
    adaptation adds; published weights have 16 bits."""
    name, window = recipe.teacher.model, recipe.distill.window
    known = None if name is None else find_model(name)
    if name is None:
        size, words = recipe.teacher.size, recipe.teacher.vocabulary
        assert size is not None
        rows = {"vocabulary": words, "positions": window}
        kind = recipe.teacher.architecture
        shape = ladder_shape(kind, ladder_size(kind, size, **rows), **rows)
        stored = FLOAT
    elif known is not None:
        if not known.can_cut:
            raise UserError(
                f"teacher.model {name}: its architecture is none that capgap can cut "
                "(docs/families.md)"
            )
        shape, stored = known.shape, HALF
    elif Path(name).is_dir():
        from capgap.models.build import shape_of
        from capgap.models.stored import read_config

        config: Any = read_config(name)
        shape, stored = shape_of(config), getattr(config.dtype, "itemsize", FLOAT)
    else:
        names = [one.name for family in published_families().values() for one in family.models]
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"teacher.model {name!r} is no published model and no folder{hint}")
    if window > shape.positions:
        raise UserError(f"distill.window {window}: {name} reads at most {shape.positions} tokens")
    if recipe.adapt is not None:
        # the rows of the new tokens, in whole multiples as `capgap adapt` makes them
        words = shape.vocabulary + recipe.adapt.pieces
        shape = replace(shape, vocabulary=-(-words // ROWS_MULTIPLE) * ROWS_MULTIPLE)
    return GivenTeacher(shape, stored)


def run_memory(recipe: RunRecipe, student: Shape, teacher: GivenTeacher, gpus: Gpus) -> LoopMemory:
    """The loop of one process on so many GPUs of a kind; None is one of the recipe's device.

    UserError where the GPUs cannot share a batch.
    """
    ranks, kind = gpus or (1, None)
    window, training = recipe.distill.window, recipe.training
    windows = training.batch_tokens // window
    if windows % ranks:
        raise UserError(
            f"a batch of {windows} windows cannot be shared evenly by {ranks} GPUs: change "
            "training.batch_tokens or the number of GPUs"
        )
    if ranks > 1 and recipe.run.teacher_device != "same":
        raise UserError(
            f"run.teacher_device {recipe.run.teacher_device!r}: several GPUs shard the teacher; "
            "leave it at 'same'"
        )
    return loop_memory(
        training,
        recipe.run,
        students=(student,),
        teacher=teacher.shape,
        stored_bytes=teacher.stored_bytes,
        window=window,
        gpu=kind,
        ranks=ranks,
    )


def _advice(
    recipe: RunRecipe, student: Shape, teacher: GivenTeacher, gpus: Gpus
) -> list[dict[str, Any]]:
    """Changes that would make it fit, one change at a time and all of them; none where it fits."""
    if gpus is None:
        return []
    number, kind = gpus
    memory = GPUS[kind].memory
    loop = run_memory(recipe, student, teacher, gpus)
    if loop.total <= memory:
        return []
    changes: dict[str, dict[str, Any]] = {}
    window = recipe.distill.window
    if loop.micro_batch_tokens > window:
        batch = loop.micro_batch_tokens * loop.micro_batches
        shorter = {"micro_batch_tokens": window, "micro_batches": batch // window}
        changes[f"training.micro_batch_tokens={window}"] = shorter
    if not loop.activation_checkpointing:
        changes["training.activation_checkpointing=true"] = {"activation_checkpointing": True}
    if loop.teacher is not None:
        if loop.teacher_place == "device":
            changes["run.teacher_offload=true"] = {"teacher_place": "host"}
        changes["a cached teacher (capgap cache)"] = {"teacher": None}
    if len(changes) > 1:
        changes["all of these"] = {k: v for one in changes.values() for k, v in one.items()}
    loops = {name: replace(loop, **fields) for name, fields in changes.items()}
    # twice as many and so on, as long as they can share a batch
    windows = recipe.training.batch_tokens // window
    while (number := 2 * number) <= MOST_GPUS and windows % number == 0:
        more = run_memory(recipe, student, teacher, (number, kind))
        if more.total <= memory:
            loops[f"--gpus {number}x{kind}"] = more
            break
    return [
        {"change": name, "memory_gb": round(one.total / 1e9, 3), "fits": one.total <= memory}
        for name, one in loops.items()
    ]


def _run_disk(recipe: RunRecipe, student: Shape, teacher: GivenTeacher) -> dict[str, int]:
    """Bytes of what the run leaves, and of a cache of the teacher should one be made."""
    total, window = _total(student), recipe.distill.window
    record = TokenRecord(teacher.shape.vocabulary, temperature=recipe.training.temperature)
    windows = recipe.distill.tokens // window
    return {
        "cache_token_bytes": record.token_bytes,
        "cache": windows * (window * record.token_bytes + CHECKSUM_BYTES),
        "checkpoint": CHECKPOINT_BYTES * total,
        # the next one is written before the oldest goes
        "checkpoints": (recipe.run.checkpoints + 1) * CHECKPOINT_BYTES * total,
        "student": FLOAT * total,
        "teacher": teacher.stored_bytes * _total(teacher.shape),
    }


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
    tokens = sum(tokens for task in plan.tasks(baselines) for _, tokens in task.work.trained)
    kind = hardware and hardware[1]
    tasks = plan.tasks(plan.baselines)
    loops = [(one.id, loop) for one in tasks for loop in task_loops(recipe, one, kind)]
    name, loop = max(loops, key=lambda named: named[1].total)
    device = "cuda" if hardware or recipe.run.device.startswith("cuda") else "cpu"
    number = hardware[0] if hardware else recipe.run.gpus_per_column
    run = recipe.run.model_copy(update={"workers": "auto"}) if hardware else recipe.run
    workers = resolve_workers(run, device, most=plan.width, gpus=number)[0]
    return {
        "kind": "sweep",
        "name": recipe.name,
        "teachers": len(plan.teachers),
        "cells": len(plan.cells),
        "baselines": sum(len(column.cells) for column in baselines),
        "teacher_params": max(_total(one.shape) for one in plan.teachers),
        "student_params": max(_total(one.shape) for one in plan.cells),
        "tokens": tokens,
        "batch_tokens": recipe.training.batch_tokens,
        "window": recipe.corpus.window,
        "steps": tokens // recipe.training.batch_tokens,
        "flops": flops,
        "flops_total": total,
        "gpus": gpus,
        "utilisation": hardware and share,
        "workers": workers,
        "gpus_per_column": recipe.run.gpus_per_column,
        "memory_task": name,
        "disk": _sweep_disk(plan, len(plan.teachers) + sum(len(one.cells) for one in columns)),
        **sweep_hours(plan, columns, total, hardware, share),
    } | _memory(loop, hardware)


def _sweep_disk(plan: Plan, runs: int) -> dict[str, int]:
    """Bytes of what stays of so many runs; `checkpoints` are those of the largest task, at most."""
    ladder = [_total(one.shape) for one in plan.teachers if one.source is None]
    columns = [sum(_total(cell.shape) for cell in column.cells) for column in plan.columns]
    assistants = [_total(cell.assistant.shape) for cell in plan.cells if cell.assistant]
    students = sum(columns) + sum(assistants)
    largest = CHECKPOINT_BYTES * max(ladder + columns)
    return {
        "records": runs * RECORD_BYTES,
        "teachers": FLOAT * sum(ladder),
        "students": FLOAT * students,
        "checkpoints": (plan.recipe.run.checkpoints + 1) * largest,
    }


def _total(shape: Shape) -> int:
    return shape.parameters().total


def plan_text(found: dict[str, Any]) -> str:
    """The estimate as text for a person."""
    places = found.get("places", [found])
    if found["kind"] == "run":
        names = ["one GPU" if one["gpus"] == 1 else f"each of {one['gpus']}" for one in places]
        names = names if found["gpus"] else ["one process"]
        sides = [found["teacher_parameters"], found["student_parameters"]]
        rows = [[part.replace("_", "-"), *(f"{one[part]:,}" for one in sides)] for part in sides[0]]
        table = text_table(("parameters", "teacher", "student"), rows, left=1)
        lines = [f"{found['name']}: out of {found['teacher']}\n", table]
    else:
        names = [f"each of {found['workers']} workers"]
        if (each := found["gpus_per_column"]) > 1:
            names = [f"each of {each} GPUs a column, {found['workers']} at once"]
        lines = [
            f"{found['name']}: {found['teachers']} teachers, {found['cells']} cells, "
            f"{found['baselines']} baselines",
            f"largest teacher {format_count(found['teacher_params'])}, largest student "
            f"{format_count(found['student_params'])}, all parameters",
        ]
    flops = ", ".join(f"{n.replace('_', ' ')} {v:.3g}" for n, v in found["flops"].items() if v)
    memory = [one[when] for one in places for when in ("memory", "memory_at_most")]
    rows = [
        [part.replace("_", " "), *(f"{one[part] / 1e9:.3f}" for one in memory)]
        for part in PARTS
        if any(one[part] for one in memory)
    ]
    columns = ["memory at the peak, GB", *(title for name in names for title in (name, "at most"))]
    lines += [
        f"\n{format_count(found['tokens'])} tokens, {found['steps']:,} steps of "
        f"{found['batch_tokens']:,} tokens in windows of {found['window']:,}",
        f"{found['flops_total']:.3g} FLOPs: {flops}\n",
        text_table(columns, rows, left=1),
    ]
    for name, one in zip(names, places, strict=True):
        line = f"{name}: {format_bytes(one['memory_gb'] * 1e9)}"
        line += f" in the largest task, {one['memory_task']}" if "memory_task" in one else ""
        if one["peak_phase"] == "scoring":
            line += " while it is scored"
            line += ", whole on its first GPU" if found["gpus_per_column"] > 1 else ""
        line += "" if one["fits"] is None else f", {_verdict(one)}"
        if one.get("host_gb") is not None:
            line += f"; {one['host_gb']:.1f} GB in the host's memory"
        if one.get("micro_batches", 1) > 1:
            tokens = one["micro_batch_tokens"]
            line += f"; {one['micro_batches']} micro-batches of {tokens:,} tokens"
        if one["hours"] is not None:
            time = clock_time(one["hours"] * 3600)
            line += f"; {one['hours']:,.0f} hours" if one["hours"] >= 10 else f"; {time}"
        if one["bound"] == "launches":
            line += ", about, since small models wait for the launches of their kernels"
        lines.append(line)
    time = "name --gpus"
    time += "" if "places" in found else ", or let `capgap sweep --dry-run` measure this machine"
    if found["gpus"] is not None:
        time = f"{found['gpus']} at {found['utilisation']:.0%} of their peak"
    lines.append(f"time: {time}")
    lines += ["\nto make it fit:"] if found.get("advice") else []
    for one in found.get("advice", ()):
        lines.append(f"  {one['change']}: {one['memory_gb']:.1f} GB, {_verdict(one)}")
    disk = ", ".join(
        f"{DISK.get(name, name)} {format_bytes(size)}"
        for name, size in found["disk"].items()
        if name != "cache_token_bytes"
    )
    return "\n".join([*lines, f"\ndisk: {disk}"])


def _verdict(found: dict[str, Any]) -> str:
    return "fits" if found["fits"] else "does not fit"
