"""The stages of grids: a whole sweep, and one of its tasks by itself."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from capgap.artifact import InUse
from capgap.errors import Interrupted, UserError
from capgap.machine import started
from capgap.mirror import sync
from capgap.section import Count
from capgap.sizes import clock_time, format_count
from capgap.stage import (
    ARGUMENT,
    HOW,
    SEVERAL,
    FieldError,
    Say,
    ShouldStop,
    Stage,
    paced,
    text_table,
)
from capgap.sweep.cells import SHARED
from capgap.sweep.recipe import Recipe

if TYPE_CHECKING:
    from capgap.sweep.cells import Context, Task
    from capgap.sweep.plan import Plan
    from capgap.sweep.progress import Display
    from capgap.sweep.schedule import EndMessage, StepMessage, Where

# What a task says that is begun again with less at once, or when another is done with it
OUT_OF_MEMORY = "no memory for what is read at once"
IN_USE = "another process is at work on"
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
        """UserError under torchrun."""
        from capgap.config import find_recipe, load_recipe

        if started()[1] > 1:
            raise UserError(
                f"a {self.title()} starts processes of its own: run it without torchrun"
            )

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
    on: Annotated[Literal["here", "ray"], HOW, "Run tasks here, or on a Ray cluster:"] = "here"
    worker: Annotated[
        bool, HOW, "Take tasks beside other such calls that work in the same folder."
    ] = False

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.worker and self.on == "ray":
            raise ValueError("worker and on=ray: take one, since Ray's tasks are workers")
        return self

    @property
    def shares(self) -> tuple[str, ...]:
        return () if self.where == "here" else SHARED

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"{self.loaded.name}{self.folder_ending}"

    @property
    def where(self) -> "Where":
        """As `run_sweep` takes it."""
        return "shared" if self.worker else self.on

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

        return run_sweep(self.loaded, self.folder, display, should_stop, self.where)

    def told(self, found: dict[str, Any]) -> str:
        return _told_preview(found) if self.dry_run else _told_results(found)

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        if self.dry_run:
            return tuple(self.but(dry_run=False).command())
        own = ("--text", "TEXT", "--teachers", "TEACHER,TEACHER,TEACHER,TEACHER")
        return ("init", "mine.toml", *own, "--students", "SIZE,SIZE,SIZE", "--tokens", "TOKENS")

    def failure(self, found: dict[str, Any]) -> str:
        if self.dry_run or "finished" in found or found["best"] is not None:
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
        f"{found['workers']} workers (processes each: {found['gpus_per_column']}), at the speed of "
        f"two models measured just now; teachers compute in {precision}"
    )


def _told_results(found: dict[str, Any]) -> str:
    """The answer, where the results lie, and each stage's share of the work."""
    if "finished" in found:
        return f"every task is done; another process wrote the report: {found['report']}"
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
    runs: Annotated[
        tuple[str, ...], SEVERAL, HOW, "Of a column these runs alone; may be given several times."
    ] = ()
    micro_batch_tokens: Annotated[
        Count | None, HOW, "Tokens at once, in place of the recipe's, where memory is short."
    ] = None
    owner: Annotated[
        str | None, HOW, "Name of who asks: it may take the task over from its own earlier try."
    ] = None

    @property
    def shares(self) -> tuple[str, ...]:
        return SHARED

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Prepares the folder where no task has yet, trains, and records every run.

        Several tasks may run at once in one folder, on one machine or on several that share it,
        but not beside a sweep that is alone in it. UserError: no such task, one whose teacher is
        not trained yet, or one that another process is at.
        """
        from capgap.sweep.plan import plan_of
        from capgap.sweep.runner import context_of, joined

        plan = plan_of(self.loaded)
        always = plan.baselines if plan.recipe.baselines == "all" else ()
        tasks = {task.id: task for task in plan.tasks(always)}
        if self.runs:
            if self.task is None:
                raise FieldError("runs", "are those of a task: name it")
            tasks[self.task] = _part_of(plan, self.task, self.runs)
        if self.task is None:
            context = context_of(plan.recipe, self.out, None)
            return {"tasks": [_described(context, task) for task in tasks.values()]}
        if self.task not in tasks:
            raise UserError(f"no task {self.task!r} in this sweep: without one all are listed")
        task = tasks[self.task]
        with joined(plan, self.out, None, say) as folder:
            context = folder.context
            missing = _described(context, task)["needs"]
            if missing:
                raise UserError(
                    f"{task.id} needs {missing[0]}, which is not trained yet: run it first"
                )
            ended = self._work(context, task, say, should_stop)
            return _described(context, task) | {"warnings": ended.message.splitlines()} | ended.cost

    def told(self, found: dict[str, Any]) -> str:
        if self.task is None:
            rows = [[one["id"], one["state"], ", ".join(one["needs"])] for one in found["tasks"]]
            return text_table(("task", "state", "needs"), rows, left=3)
        warnings = "".join(f"{warning}\n" for warning in found["warnings"])
        return f"{warnings}{found['id']}: {found['state']}, recorded in {self.out}/records"

    def _work(
        self, context: "Context", task: "Task", say: Say, should_stop: ShouldStop
    ) -> "EndMessage":
        """How the task ended, which is well."""
        from capgap.leases import Leases
        from capgap.sweep.checks import is_lost
        from capgap.sweep.plan import resolve_workers
        from capgap.sweep.schedule import EndMessage
        from capgap.sweep.workers import run_shared, run_task

        stale = context.recipe.run.lease_seconds
        synced = partial(sync, context.out, *SHARED)
        with Leases(context.leases, self.owner, stale=stale, sync=synced) as leases:
            if context.is_done(task) and not is_lost(context, task):
                return EndMessage(task.id, "done")
            if not leases.take(task.id):
                raise InUse(f"{IN_USE} {task.id} in {self.out}")
            tell, parent = paced(say), os.getppid()

            def on_step(message: "StepMessage") -> None:
                leases.tell(task.id, vars(message))
                tell(lambda: f"{task.id}: {message.tokens:,} of {task.tokens:,} tokens")

            def stops() -> bool:
                # whoever asked for it was killed: others may begin it again
                is_orphan = self.owner is not None and os.getppid() != parent
                return should_stop() or task.id in leases.lost() or is_orphan

            own = context.with_micro_batch(self.micro_batch_tokens)
            if context.recipe.run.gpus_per_column > 1:
                threads = resolve_workers(context.recipe.run, context.device, most=1)[1]
                ended = run_shared(replace(own, threads=threads), task, on_step, stops)
            else:
                ended = run_task(os.uname().nodename, own, task, on_step, stops)
        if ended.outcome == "stopped":
            raise Interrupted
        if ended.outcome == "crashed":
            raise RuntimeError(f"{task.id} broke:\n{ended.message}")
        if ended.outcome == "out_of_memory":
            raise UserError(
                f"{OUT_OF_MEMORY} ({ended.message}): fewer `micro_batch_tokens` take less"
            )
        if ended.outcome in ("user_error", "lost"):
            raise UserError(ended.message)
        return ended


def _described(context: "Context", task: "Task") -> dict[str, Any]:
    """`needs`: teachers that are not recorded yet."""
    missing = [name for name in sorted(task.teachers) if not context.is_recorded(name)]
    state = "done" if context.is_done(task) else "waits" if missing else "ready"
    return {"id": task.id, "state": state, "runs": list(task.runs), "needs": missing}


def _part_of(plan: "Plan", name: str, runs: Sequence[str]) -> "Task":
    """The column with these runs alone, under a name of its own: a search has such, and baselines
    of the best teachers. UserError where none has them."""
    for column in (*plan.columns, *plan.baselines):
        own = tuple(cell for cell in column.cells if cell.id in runs)
        if own:
            return replace(column, id=name, cells=own)
    raise UserError(f"no column of this sweep has the run {runs[0]!r}")
