"""Memory of a sweep's tasks. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from capgap.prune import SCORING_WINDOWS, Method, reading_methods
from capgap.sweep.cells import Context, Task, Teacher
from capgap.sweep.recipe import Recipe
from capgap.train.memory import FLOAT, PARTS, LoopMemory, kept_bytes, loop_memory


@dataclass(frozen=True)
class ScoredMemory(LoopMemory):
    """Of a loop whose model is scored behind it, by the first of its processes, alone and whole.
    `methods` are those that read text. given_bytes: of a weight of a model that exists, and is not
    trained before; None of others."""

    methods: tuple[Method, ...] = ()
    given_bytes: int | None = None

    def phases(self) -> dict[str, dict[str, int]]:
        found = super().phases()
        (model,) = self.students
        whole = (self.given_bytes or FLOAT) * model.parameters().total
        has_gradients = "weights" in self.methods or "first_order" in self.methods
        tokens = SCORING_WINDOWS * self.window
        kept = kept_bytes(model, tokens, self.window, autocast=False) if has_gradients else 0
        scoring = dict.fromkeys(PARTS, 0) | {
            # beside its part of them
            "weights": whole // self.ranks + (whole if self.ranks > 1 else 0),
            "gradients": whole if "weights" in self.methods else 0,
            "activations": kept,
            "teacher": self._teacher_weights,
        }
        return ({} if self.given_bytes else found) | {"scoring": scoring}


def task_loops(recipe: Recipe, task: Task, gpu: str | None) -> Iterator[LoopMemory]:
    """Every loop of a task, as each of its processes has it. `gpu`: its kind, None as there."""
    loop = partial(
        loop_memory,
        recipe.training,
        recipe.run,
        window=recipe.corpus.window,
        gpu=gpu,
        ranks=recipe.run.gpus_per_column,
    )
    scored = partial(
        ScoredMemory, methods=reading_methods(recipe.scoring_method, recipe.scoring_depth)
    )
    if isinstance(task, Teacher):
        found = vars(loop(students=(task.shape,), teacher=None, stored_bytes=FLOAT))
        yield scored(**found, given_bytes=task.stored_bytes if task.source else None)
        return
    above, stored = None, FLOAT
    if task.teacher is not None:
        above, stored = task.teacher.shape, task.teacher.stored_bytes
    if task.assistant is not None:
        shape = task.assistant.shape
        yield scored(**vars(loop(students=(shape,), teacher=above, stored_bytes=stored)))
        above, stored = shape, FLOAT
    students = tuple(cell.shape for cell in task.cells)
    yield loop(students=students, teacher=above, stored_bytes=stored)


def gpu_bytes(context: Context, task: Task) -> int:
    """At the peak of a task, on the GPU that needs most."""
    run = context.recipe.run.model_copy(update={"device": "cuda"})
    recipe = context.recipe.model_copy(update={"run": run, "training": context.training})
    return max(loop.total for loop in task_loops(recipe, task, None))


def host_bytes(context: Context, task: Task) -> int:
    """In the host's memory, of a task on a GPU: the largest model while it is read or cut, copies
    of checkpoints."""
    work = task.work
    shapes = [shape for shape, _ in [*work.trained, *work.read]]
    copies = max(loop.in_host() for loop in task_loops(context.recipe, task, None))
    return copies + FLOAT * max(shape.parameters().total for shape in shapes)
