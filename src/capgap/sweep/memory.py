"""Memory of a sweep's tasks. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from capgap.models.shape import Shape
from capgap.prune import SCORING_WINDOWS, Method, reading_methods
from capgap.sweep.cells import Column, Context, Task
from capgap.sweep.recipe import Recipe
from capgap.train.memory import FLOAT, LoopMemory, kept_bytes, loop_memory


@dataclass(frozen=True)
class ScoredMemory(LoopMemory):
    """Of a loop whose model is scored behind it, by the first of its processes, alone and whole.
    `methods` are those that read text. A given model is not trained before."""

    methods: tuple[Method, ...] = ()
    is_given: bool = False

    def phases(self) -> dict[str, dict[str, int]]:
        found = super().phases()
        (model,) = self.students
        whole, tokens = FLOAT * model.parameters().total, SCORING_WINDOWS * self.window
        has_gradients = "weights" in self.methods or "first_order" in self.methods
        kept = kept_bytes(model, tokens, self.window, autocast=False) if has_gradients else 0
        found["scoring"] = dict.fromkeys(found["loss"], 0) | {
            # beside its part of what was trained, and of the moments
            "weights": found["loss"]["weights"] + (whole if self.ranks > 1 else 0),
            "optimizer": 0 if self.is_given else found["loss"]["optimizer"],
            "gradients": whole if "weights" in self.methods else 0,
            "activations": kept,
        }
        return {"scoring": found["scoring"]} if self.is_given else found


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

    def scored(shape: Shape, teacher: Shape | None = None, is_given: bool = False) -> LoopMemory:
        methods = reading_methods(recipe.scoring_method, recipe.scoring_depth)
        found = vars(loop(students=(shape,), teacher=teacher))
        return ScoredMemory(**found, methods=methods, is_given=is_given)

    if isinstance(task, Column):
        above = None if task.teacher is None else task.teacher.shape
        if task.assistant is not None:
            yield scored(task.assistant.shape, above)
            above = task.assistant.shape
        yield loop(students=tuple(cell.shape for cell in task.cells), teacher=above)
    else:
        yield scored(task.shape, is_given=task.source is not None)


def gpu_bytes(context: Context, task: Task) -> int:
    """At the peak of a task, on the GPU that needs most."""
    run = context.recipe.run.model_copy(update={"device": "cuda"})
    recipe = context.recipe.model_copy(update={"run": run, "training": context.training})
    return max(loop.total for loop in task_loops(recipe, task, None))
