"""The stage `column`: one teacher, or one column of students, of a sweep by itself."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from capgap.artifact import InUse, locked
from capgap.errors import UserError
from capgap.stage import ARGUMENT, HOW, SEVERAL, Say, ShouldStop, Stage, paced, text_table

if TYPE_CHECKING:
    from capgap.sweep.context import Context
    from capgap.sweep.plan import Column as PlannedColumn
    from capgap.sweep.plan import Plan, Teacher

WAIT = 1.0  # seconds


class Column(Stage):
    """Run one teacher or one column of a sweep, for clusters; `capgap sweep` then finds it done."""

    recipe: Annotated[str, ARGUMENT, "A recipe file, or a shipped recipe's name."]
    task: Annotated[str | None, ARGUMENT, "Which; without it all are listed."] = None
    out: Annotated[Path, HOW, "The sweep's output folder, which all its tasks share."]
    set: Annotated[
        tuple[str, ...], SEVERAL, "SECTION.KEY=VALUE of the recipe; may be given several times."
    ] = ()

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Prepares the folder where no task has yet, trains, and records every run.

        Several tasks may run at once in one folder, on one machine or on several that share it,
        but not beside a sweep. UserError: no such task, or one whose teacher is not trained yet.
        """
        from capgap.config import find_recipe, load_recipe
        from capgap.sweep.given import plan_of
        from capgap.sweep.runner import context_of

        plan = plan_of(load_recipe(find_recipe(self.recipe), self.set))
        always = plan.baselines if plan.recipe.baselines == "all" else ()
        tasks = {task.id: task for task in plan.tasks(always)}
        if self.task is None:
            context = context_of(plan.recipe, self.out, None)
            return {"tasks": [_described(context, task) for task in tasks.values()]}
        if self.task not in tasks:
            raise UserError(f"no task {self.task!r} in this sweep: without one all are listed")
        self._prepare(plan, say)
        with locked(self.out, shared=True):
            context = context_of(plan.recipe, self.out, None)
            task = tasks[self.task]
            missing = _missing(context, task)
            if missing:
                raise UserError(
                    f"{task.id} needs {missing[0]}, which is not trained yet: run it first"
                )
            with locked(context.out / "work" / "tasks" / task.id):
                warnings = _run(context, task, say, should_stop)
            return _described(context, task) | {"warnings": warnings}

    def told(self, found: dict[str, Any]) -> str:
        if self.task is None:
            rows = [[one["id"], one["state"], ", ".join(one["needs"])] for one in found["tasks"]]
            return text_table(("task", "state", "needs"), rows, left=3)
        warnings = "".join(f"{warning}\n" for warning in found["warnings"])
        return f"{warnings}{found['id']}: {found['state']}, recorded in {self.out}/records"

    def _prepare(self, plan: "Plan", say: Say) -> None:
        """The first of several tasks does it; the others wait."""
        from capgap.sweep.runner import prepare

        is_told = False
        while not _is_prepared(self.out, plan.recipe.hash()):
            try:
                prepare(plan, self.out, say)
            except InUse as error:
                if not is_told:
                    say(f"{error}: waits for it to be prepared")
                is_told = True
                time.sleep(WAIT)


def _is_prepared(out: Path, recipe_hash: str) -> bool:
    path = out / "sweep.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found.get("recipe_hash") == recipe_hash and found.get("corpus") is not None


def _runs(task: "Teacher | PlannedColumn") -> list[str]:
    """The ids of what it records."""
    cells = getattr(task, "cells", None)
    return [task.id] if cells is None else [cell.id for cell in cells]


def _missing(context: "Context", task: "Teacher | PlannedColumn") -> list[str]:
    """Teachers that it needs and that are not recorded."""
    needed = sorted(getattr(task, "teachers", ()))
    return [teacher for teacher in needed if not context.is_recorded(teacher)]


def _described(context: "Context", task: "Teacher | PlannedColumn") -> dict[str, Any]:
    missing = _missing(context, task)
    done = all(context.is_recorded(run) for run in _runs(task))
    state = "done" if done else "waits" if missing else "ready"
    return {"id": task.id, "state": state, "runs": _runs(task), "needs": missing}


def _run(
    context: "Context", planned: "Teacher | PlannedColumn", say: Say, should_stop: ShouldStop
) -> list[str]:
    """What there was to warn of."""
    from capgap.sweep.plan import Teacher
    from capgap.sweep.task import Task
    from capgap.sweep.tasks import run_column, run_teacher
    from capgap.train.loop import Progress
    from capgap.train.metrics import StageClock

    if all(context.is_recorded(run) for run in _runs(planned)):
        return []
    tell = paced(say)

    def on_step(progress: Progress) -> None:
        tell(lambda: f"{planned.id}: {progress.tokens:,} of {planned.tokens:,} tokens")

    task = Task(context, StageClock(context.device), should_stop, on_step)
    if isinstance(planned, Teacher):
        run_teacher(task, planned)
    else:
        run_column(task, planned)
    return task.warnings
