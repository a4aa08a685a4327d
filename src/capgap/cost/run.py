"""What the run of a recipe would take: `capgap plan` of a teacher, a cut and a distillation."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from capgap.cost.activations import FLOAT, HALF
from capgap.cost.memory import LoopMemory, loop_memory
from capgap.distill import CHECKSUM_BYTES, TokenRecord
from capgap.errors import UserError
from capgap.law.published import find_model, published_families
from capgap.machine import GPUS, hours, parse_gpus
from capgap.models.shape import Shape, ladder_shape
from capgap.pipeline.recipe import RunRecipe
from capgap.prune.shape import (
    Target,
    changed_shape,
    from_axes,
    from_ladder,
    keep_target,
    suited,
)
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.stages.prune import PruneSection
from capgap.train.learning_rate import auto_learning_rate

# Of a parameter: its weight and AdamW's two moments, as a checkpoint has them
CHECKPOINT_BYTES = 3 * FLOAT
MOST_GPUS = 4096
# Rows of a table after adaptation come in these
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class GivenTeacher:
    """The teacher of a run: its shape after adaptation, and bytes of one of its stored weights."""

    shape: Shape
    stored_bytes: int


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
    student = student_shape(recipe.prune, teacher.shape)
    training = recipe.training
    steps = recipe.distill.tokens // training.batch_tokens
    tokens = steps * training.batch_tokens
    counts, above = student.parameters(), teacher.shape.parameters()
    flops = {
        "student": training_flops(counts.total, tokens),
        "teacher_forward": forward_flops(above.total, tokens) if training.alpha > 0 else 0,
    }
    total = sum(flops.values())
    number = 1 if hardware is None else hardware[0]
    places = [
        _place(recipe, student, teacher, None if hardware is None else (count, hardware[1]))
        for count in sorted({1, number})
    ]
    for place in places:
        if hardware is not None:
            trained = share * (1 - recipe.run.checkpoint_share)
            place["hours"] = hours(total, (place["gpus"], hardware[1]), trained)
    rate = recipe.distill.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(counts.non_embedding, is_cut=True)
    return {
        "kind": "run",
        "name": recipe.name,
        "teacher": recipe.teacher.model or f"new, {format_count(recipe.teacher.size or 0)}",
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
        "utilisation": None if hardware is None else share,
        "places": places,
        "memory_gb": places[-1]["memory_gb"],
        "hours": places[-1]["hours"],
        "advice": _advice(recipe, student, teacher, hardware),
        "checkpoint_share": recipe.run.checkpoint_share,
        "disk": _disk(recipe, student, teacher),
    }


def find_teacher(recipe: RunRecipe) -> GivenTeacher:
    """By its published name, its folder's config, or the size of a new one, with the rows that
    adaptation adds; published weights have 16 bits."""
    name = recipe.teacher.model
    if name is None:
        size, words = recipe.teacher.size, recipe.teacher.vocabulary
        assert size is not None
        window = recipe.distill.window
        shape = ladder_shape(recipe.teacher.architecture, size, vocabulary=words, positions=window)
        return GivenTeacher(_adapted(shape, recipe), FLOAT)
    known = find_model(name)
    if known is not None:
        if known.head_norms:
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
    if recipe.distill.window > shape.positions:
        raise UserError(
            f"distill.window {recipe.distill.window}: {name} reads at most {shape.positions} tokens"
        )
    return GivenTeacher(_adapted(shape, recipe), stored)


def _adapted(shape: Shape, recipe: RunRecipe) -> Shape:
    """With the rows of the new tokens, in whole multiples as `capgap adapt` makes them."""
    if recipe.adapt is None:
        return shape
    words = shape.vocabulary + recipe.adapt.pieces
    return replace(shape, vocabulary=-(-words // ROWS_MULTIPLE) * ROWS_MULTIPLE)


def student_shape(asked: PruneSection, teacher: Shape) -> Shape:
    """What `capgap prune` cuts out of the teacher when it is asked the same."""
    if asked.sizes:
        return changed_shape(teacher, asked.sizes)
    if asked.keep is not None:
        target = keep_target(teacher, asked.keep)
        keep = target.parameters / target.count(teacher)
        return suited(teacher, target, from_axes(teacher, keep), layers=teacher.layers)[0]
    parameters = asked.params or asked.total_params
    assert parameters is not None
    target = Target(parameters, total=asked.params is None)
    return suited(teacher, target, from_ladder(teacher, target))[0]


def run_memory(
    recipe: RunRecipe, student: Shape, teacher: GivenTeacher, place: tuple[int, str] | None
) -> LoopMemory:
    """The loop of one process on so many GPUs of a kind; None is one of the recipe's device.

    UserError where the GPUs cannot share a batch.
    """
    ranks = 1 if place is None else place[0]
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
        teacher=teacher.shape if training.alpha > 0 else None,
        stored_bytes=teacher.stored_bytes,
        window=window,
        gpu=None if place is None else place[1],
        ranks=ranks,
    )


def _place(
    recipe: RunRecipe, student: Shape, teacher: GivenTeacher, place: tuple[int, str] | None
) -> dict[str, Any]:
    loop = run_memory(recipe, student, teacher, place)
    phase, parts = loop.peak()
    return {
        "gpus": loop.ranks,
        "micro_batch_tokens": loop.micro_batch_tokens,
        "micro_batches": loop.micro_batches,
        "memory_gb": round(loop.total / 1e9, 3),
        "memory": parts,
        "memory_at_most": loop.at_most(),
        "host_gb": None if place is None else round(loop.in_host() / 1e9, 3),
        "peak_phase": phase,
        "fits": None if place is None else loop.total <= GPUS[place[1]].memory,
        "hours": None,
    }


def _advice(
    recipe: RunRecipe, student: Shape, teacher: GivenTeacher, place: tuple[int, str] | None
) -> list[dict[str, Any]]:
    """What would make it fit, one change at a time and all of them; none where it fits."""
    if place is None:
        return []
    number, kind = place
    memory = GPUS[kind].memory
    loop = run_memory(recipe, student, teacher, place)
    if loop.total <= memory:
        return []
    changes: dict[str, dict[str, Any]] = {}
    window = recipe.distill.window
    if loop.micro_batch_tokens > window:
        batch = loop.micro_batch_tokens * loop.micro_batches
        changes[f"training.micro_batch_tokens={window}"] = {
            "micro_batch_tokens": window,
            "micro_batches": batch // window,
        }
    if not loop.activation_checkpointing:
        changes["training.activation_checkpointing=true"] = {"activation_checkpointing": True}
    if loop.teacher is not None:
        if loop.teacher_place == "device":
            changes["run.teacher_offload=true"] = {"teacher_place": "host"}
        changes["a cached teacher (capgap cache)"] = {"teacher": None}
    if len(changes) > 1:
        together = [item for fields in changes.values() for item in fields.items()]
        changes["all of these"] = dict(together)
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


def _disk(recipe: RunRecipe, student: Shape, teacher: GivenTeacher) -> dict[str, int]:
    """Bytes of what the run leaves, and of a cache of the teacher should one be made."""
    total, window = student.parameters().total, recipe.distill.window
    record = TokenRecord(teacher.shape.vocabulary, temperature=recipe.training.temperature)
    windows = recipe.distill.tokens // window
    # the next one is written before the oldest goes
    checkpoints = recipe.run.checkpoints + 1
    return {
        "cache_token_bytes": record.token_bytes,
        "cache": windows * (window * record.token_bytes + CHECKSUM_BYTES),
        "checkpoint": CHECKPOINT_BYTES * total,
        "checkpoints": checkpoints * CHECKPOINT_BYTES * total,
        "student": FLOAT * total,
        "teacher": teacher.stored_bytes * teacher.shape.parameters().total,
    }
