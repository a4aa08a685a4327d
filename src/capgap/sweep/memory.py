"""Memory of a sweep's tasks. Imports no torch."""

from collections.abc import Iterator
from functools import partial

from capgap.sweep.cells import Column, Task
from capgap.sweep.recipe import Recipe
from capgap.train.memory import FLOAT, LoopMemory, loop_memory


def task_loops(recipe: Recipe, task: Task, gpu: str | None) -> Iterator[LoopMemory]:
    """Every loop of a task, as each of its processes has it. `gpu`: its kind, None as there."""

    loop = partial(
        loop_memory,
        recipe.training,
        recipe.run,
        # a ladder's; at most those of a given teacher
        stored_bytes=FLOAT,
        window=recipe.corpus.window,
        gpu=gpu,
        ranks=recipe.run.gpus_per_column,
    )
    if isinstance(task, Column):
        above = None if task.teacher is None else task.teacher.shape
        if task.assistant is not None:
            yield loop(students=(task.assistant.shape,), teacher=above)
            above = task.assistant.shape
        yield loop(students=tuple(cell.shape for cell in task.cells), teacher=above)
    elif task.source is None:
        yield loop(students=(task.shape,), teacher=None)
