"""How long work takes on GPUs by name: by its arithmetic, or by the launches of small kernels."""

from collections.abc import Sequence
from typing import Any

from capgap.machine import hours
from capgap.models.shape import Shape
from capgap.sweep.cells import Column, Teacher, Work
from capgap.sweep.plan import Plan

# Seconds that a layer takes at least, forward and backward; tables, head, loss and optimizer count
# as so many layers. An H200 took 1.2 to 2.7 ms, and computed for a tenth to a fifth of it
# (docs/benchmarks.md)
LAYER_LAUNCH, OTHER_LAYERS = 1.5e-3, 4


def slowed(hours: float | None, layer_steps: float) -> dict[str, Any]:
    """`hours`, no less than the launches take of so many layers' steps, and what is `bound`."""
    launches = layer_steps * LAYER_LAUNCH / 3600
    if hours is None:
        return {"hours": None, "bound": None}
    bound = "launches" if launches > hours else "arithmetic"
    return {"hours": max(hours, launches), "bound": bound}


def _layer_steps(plan: Plan, work: Work) -> float:
    """Layers times the micro-batches that go through them; a forward pass is a third of a step."""
    training = plan.recipe.training

    def layers(models: Sequence[tuple[Shape, int]]) -> int:
        return sum((shape.layers + OTHER_LAYERS) * tokens for shape, tokens in models)

    each = plan.recipe.run.gpus_per_column
    micro = training.micro_batch_tokens or training.batch_tokens // each
    return (layers(work.trained) + layers(work.read) / 3) / (each * micro)


def sweep_hours(
    plan: Plan, columns: Sequence[Column], total: int, gpus: tuple[int, str] | None, share: float
) -> dict[str, Any]:
    """All work shared out evenly, but no less than the longest task with the teachers it needs."""
    if gpus is None:
        return slowed(None, 0)
    alone = {one.id: sum(one.work.flops(plan.recipe).values()) for one in plan.teachers}
    longest = max(
        max((alone[name] for name in column.teachers), default=0)
        + column.work.training_flops
        + column.work.forward_flops
        for column in columns
    )
    trained = share * (1 - plan.recipe.run.checkpoint_share)
    each = plan.recipe.run.gpus_per_column
    slowest = max(hours(total, gpus, trained), hours(longest, (each, gpus[1]), trained))
    tasks: list[Teacher | Column] = [*plan.teachers, *columns]
    steps = [_layer_steps(plan, task.work) for task in tasks]
    return slowed(slowest, max(sum(steps) / (gpus[0] // each), *steps))
