"""Memory of a sweep's tasks. Imports no torch."""

from collections.abc import Iterator

from capgap.models.shape import Shape
from capgap.sweep.cells import Column, Task
from capgap.sweep.recipe import Recipe
from capgap.train.memory import FLOAT, LoopMemory, loop_memory


def task_loops(recipe: Recipe, task: Task, gpu: str | None) -> Iterator[LoopMemory]:
    """Every loop of a task, as one of the processes has it that share the task; none where nothing
    is trained. `gpu` is its kind; without one the recipe's own device counts."""

    def loop(students: tuple[Shape, ...], teacher: Shape | None) -> LoopMemory:
        return loop_memory(
            recipe.training,
            recipe.run,
            students=students,
            teacher=teacher,
            # a ladder's; at most those of a given teacher
            stored_bytes=FLOAT,
            window=recipe.corpus.window,
            gpu=gpu,
            ranks=recipe.run.gpus_per_column,
        )

    if isinstance(task, Column):
        above = None if task.teacher is None else task.teacher.shape
        if task.assistant is not None:
            yield loop((task.assistant.shape,), above)
            above = task.assistant.shape
        yield loop(tuple(cell.shape for cell in task.cells), above)
    elif task.source is None:
        yield loop((task.shape,), None)
