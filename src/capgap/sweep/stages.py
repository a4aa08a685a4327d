"""The stages of grids: a whole sweep, and one of its tasks by itself."""

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from capgap.artifact import InUse, locked, read_json
from capgap.errors import UserError
from capgap.machine import started
from capgap.sizes import clock_time, format_count
from capgap.stage import ARGUMENT, HOW, SEVERAL, Say, ShouldStop, Stage, paced, text_table
from capgap.sweep.recipe import Recipe

if TYPE_CHECKING:
    from capgap.sweep.cells import Context, Task
    from capgap.sweep.plan import Plan
    from capgap.sweep.progress import Display

WAIT = 1.0  # seconds
PARTS = {
    "teacher_training": "T train",
    "teacher_forward": "T forward",
    "pruning": "prune",
    "student": "S train",
    "evaluation": "evaluate",
}


RecipeName = Annotated[str, ARGUMENT, "A recipe file, or a shipped recipe's name."]


class OfRecipe(Stage):
    """What is asked of a recipe, by default that of a sweep."""

    recipe: RecipeName
    set: Annotated[
        tuple[str, ...], SEVERAL, "SECTION.KEY=VALUE of the recipe; may be given several times."
    ] = ()

    @cached_property
    def loaded(self) -> Recipe:
        from capgap.config import find_recipe, load_recipe

        return load_recipe(find_recipe(self.recipe), self.set)


class Sweep(OfRecipe):
    """Run a grid of teachers and students; the same command continues one that was stopped."""

    # its workers save their state as it ends
    saves_when_asked: ClassVar[bool] = False
    folder_ending: ClassVar[str] = ""

    out: Annotated[Path | None, HOW, "Output folder; runs/NAME if none is given."] = None
    dry_run: Annotated[
        bool, HOW, "Print every run, its cost and the time; run and write nothing."
    ] = False

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"{self.loaded.name}{self.folder_ending}"

    @property
    def writes(self) -> tuple[Path, ...]:
        return (self.folder,)

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Runs what is not recorded yet, fits the law, writes the report; returns where it lies.

        Stopped or killed at any moment, the same call continues. It starts processes that load the
        calling script again: call it under `if __name__ == "__main__":`. UserError for a mistake in
        the recipe, or a folder that holds something else.
        """
        if started()[1] > 1:
            raise UserError(
                f"a {self.title()} starts processes of its own: run it without torchrun"
            )
        assert self.loaded  # before what is heavy is
        if self.dry_run:
            return self._expected()
        from capgap.sweep.progress import Display

        return self._run(say if isinstance(say, Display) else Display(say), should_stop)

    def _expected(self) -> dict[str, Any]:
        from capgap.sweep.preview import preview

        return preview(self.loaded)

    def _run(self, display: "Display", should_stop: ShouldStop) -> dict[str, Any]:
        from capgap.sweep.runner import run_sweep

        return run_sweep(self.loaded, self.folder, display, should_stop)

    def told(self, found: dict[str, Any]) -> str:
        return _told_preview(found) if self.dry_run else _told_results(found)

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        if self.dry_run:
            return tuple(self.but(dry_run=False).command())
        own = ("--text", "TEXT", "--teachers", "TEACHER,TEACHER,TEACHER,TEACHER")
        return ("init", "mine.toml", *own, "--students", "SIZE,SIZE,SIZE", "--tokens", "TOKENS")

    def failure(self, found: dict[str, Any]) -> str:
        if self.dry_run or found["best"] is not None:
            return ""
        return f"no cell of the {self.title()} was finished; see the report"


class Quickstart(Sweep):
    """From which teacher should I distil? An answer from real text in minutes, no download."""

    recipe: str = "quickstart"
    out: Annotated[Path | None, HOW, "Output folder."] = Path("runs/quickstart")


def _told_preview(found: dict[str, Any]) -> str:
    """Every run, then all together."""
    sizes = ("layers", "hidden", "heads", "ffn")
    names = ("run", *sizes, "size", "vocab", "tokens", "rate", *PARTS.values(), "time")
    rows = []
    for run in found["runs"]:
        parameters, rate = run["parameters"], run["learning_rate"]
        rows.append(
            [
                run["id"],
                *(str(run["shape"][name]) for name in sizes),
                format_count(parameters["non_embedding"]),
                format_count(parameters["embedding"] + parameters["head"]),
                format_count(run["tokens"]) if run["tokens"] else "-",
                "-" if rate is None else f"{rate:g}",
                *(f"{run['flops'][part]:.1e}" if run["flops"][part] else "-" for part in PARTS),
                clock_time(run["expected_seconds"]),
            ]
        )
    flops, precision = found["flops"], found["teacher_dtype"]
    parts = ", ".join(f"{part.replace('_', ' ')} {flops[part]:.2g}" for part in PARTS)
    if precision == "stored":
        precision = "the precision of their weights"
    return (
        f"{found['name']}: what would be run\n{text_table(names, rows, left=1)}\n"
        "size: non-embedding parameters; vocab: embedding and head; FLOPs by part\n\n"
        f"{found['teachers']} teachers, {found['cells']} cells, {found['baselines']} baselines; "
        f"{sum(flops.values()):.3g} FLOPs with shared work counted once ({parts})\n"
        f"expected {clock_time(found['expected_seconds'])} on {found['device']} with "
        f"{found['workers']} workers, at the speed of two models measured just now; teachers "
        f"compute in {precision}"
    )


def _told_results(found: dict[str, Any]) -> str:
    """The answer, where the results lie, and each stage's share of the work."""
    stages = found["stages"]
    total = sum(stages.values())
    rows = [
        (name.replace("_", " "), f"{seconds:.1f}", f"{seconds / total:.1%}")
        for name, seconds in sorted(stages.items(), key=lambda stage: -stage[1])
    ]
    lines = [
        *(f"- {sentence}" for sentence in found["verdict"]),
        "",
        "Where the work went",
        text_table(("stage", "seconds", "share"), rows, left=1),
        f"{clock_time(found['wall_seconds'])} on the clock for {clock_time(total)} of work; all "
        f"processes together took at most {found['peak_memory_bytes'] / 1e9:.1f} GB of memory",
        "",
    ]
    if found["failed"]:
        lines.append(f"failed: {', '.join(found['failed'])}")
    if found["student"] is not None:
        lines.append(f"best student: {found['best']} in {found['student']}")
    return "\n".join([*lines, f"report: {found['report']}"])


class Column(OfRecipe):
    """Run one teacher or one column of a sweep, for clusters; `capgap sweep` then finds it done."""

    task: Annotated[str | None, ARGUMENT, "Which; without it all are listed."] = None
    out: Annotated[Path, HOW, "The sweep's output folder, which all its tasks share."]

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Prepares the folder where no task has yet, trains, and records every run.

        Several tasks may run at once in one folder, on one machine or on several that share it,
        but not beside a sweep. UserError: no such task, or one whose teacher is not trained yet.
        """
        from capgap.sweep.plan import plan_of
        from capgap.sweep.runner import context_of

        plan = plan_of(self.loaded)
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
            missing = _described(context, task)["needs"]
            if missing:
                raise UserError(
                    f"{task.id} needs {missing[0]}, which is not trained yet: run it first"
                )
            with locked(context.out / "work" / "tasks" / task.id):
                warnings = _run_task(context, task, say, should_stop)
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

        has_said = False
        while not _is_prepared(self.out, plan.recipe.hash()):
            try:
                prepare(plan, self.out, say)
            except InUse as error:
                if not has_said:
                    say(f"{error}: waits for it to be prepared")
                has_said = True
                time.sleep(WAIT)


def _is_prepared(out: Path, recipe_hash: str) -> bool:
    path = out / "sweep.json"
    found = read_json(path) if path.exists() else {}
    return found.get("recipe_hash") == recipe_hash and found.get("corpus") is not None


def _described(context: "Context", task: "Task") -> dict[str, Any]:
    """`needs`: teachers that are not recorded yet."""
    missing = [name for name in sorted(task.teachers) if not context.is_recorded(name)]
    state = "done" if context.is_done(task) else "waits" if missing else "ready"
    return {"id": task.id, "state": state, "runs": list(task.runs), "needs": missing}


def _run_task(context: "Context", task: "Task", say: Say, should_stop: ShouldStop) -> list[str]:
    """What there was to warn of."""
    from capgap.sweep.tasks import TaskRun
    from capgap.train.loop import Progress
    from capgap.train.metrics import StageClock

    if context.is_done(task):
        return []
    tell = paced(say)

    def on_step(progress: Progress) -> None:
        tell(lambda: f"{task.id}: {progress.tokens:,} of {task.tokens:,} tokens")

    run = TaskRun(context, StageClock(context.device), should_stop, on_step)
    run.run(task)
    return run.warnings
