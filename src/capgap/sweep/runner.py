"""A recipe, an output folder: what is missing is done, and the results are written."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.tokens import Corpus, check_epochs
from capgap.errors import UserError
from capgap.machine import machine, resolve_device, versions
from capgap.records import RunRecord, read_records, write_json_atomically
from capgap.report.page import write_report
from capgap.sizes import format_count
from capgap.stage import Say
from capgap.stages.corpus import corpus_progress
from capgap.sweep.checks import check_disk, check_records, check_sources, claimed, lost_teachers
from capgap.sweep.context import Context, resolve_workers
from capgap.sweep.given import plan_of
from capgap.sweep.plan import (
    Cell,
    Column,
    Plan,
    Teacher,
    expected_baselines,
    select_baselines,
)
from capgap.sweep.progress import Display
from capgap.sweep.recipe import Recipe
from capgap.sweep.results import best_of, clear_work
from capgap.sweep.schedule import Workers
from capgap.sweep.summary import SweepResult, verdict_of
from capgap.sweep.worker import EndMessage, peak_memory
from capgap.train.settings import resolved_precision


def run_sweep(recipe: Recipe, out: Path, display: Display) -> SweepResult:
    """Runs what is not recorded yet, then fits the law and writes the report.

    Stopped or killed at any moment, the same call continues: finished runs are never computed
    again, half-done ones go on from their checkpoints. So does a recipe that has grown. UserError
    for the user's mistakes, before any work where they can be known.
    """
    return run_folder(plan_of(recipe), out, display, _run_everything, is_whole=True)


def run_folder(
    plan: Plan,
    out: Path,
    display: Display,
    work: Callable[["Runner"], None],
    *,
    is_whole: bool = False,
) -> SweepResult:
    """Everything around the runs: checks, corpus, workers, results. `work` asks for runs of the
    plan. `is_whole`: for all of them, so that there must be disk space for them, and the folder may
    hold some of a smaller plan."""
    number, threads = resolve_workers(
        plan.recipe.run.workers, resolve_device(plan.recipe.run.device), most=plan.width
    )
    with opened(plan, out, threads, grows=is_whole) as (context, earlier):
        records = check_records(context, plan, earlier)
        if is_whole:
            check_disk(context, plan)
        log = _Log(context, plan, earlier)
        # the workers load torch while the corpus is prepared
        with display, Workers(context, number) as workers:
            with log.stage("corpus"):
                corpus = _prepare(plan, context, records, display.say)
            _check_corpus(plan, corpus)
            # a recipe that has grown is noted before there is a run of it
            log.write(corpus=_corpus_summary(corpus))
            try:
                work(Runner(context, plan, workers, log, display))
            except (KeyboardInterrupt, SystemExit):
                display.say("stopping: every worker saves its state")
                raise
        display.say("fitting the law and writing the report")
        log.write(finished=datetime.now(UTC).isoformat(timespec="seconds"))
        with log.stage("report"):
            best = best_of(context, plan, corpus)
            # the report reads it there
            log.write(best=best)
            write_report(context.out)
            clear_work(context)
        log.write()
        return _result(out, log)


@contextmanager
def opened(
    plan: Plan, out: Path, threads: int | None, *, grows: bool
) -> Iterator[tuple[Context, list[str]]]:
    """The folder is this process's while inside: what all runs there share, and the hashes of the
    recipes that this one has grown out of. UserError as `claimed`."""
    recipe = plan.recipe
    check_sources(recipe, out)
    with claimed(out, recipe, grown=plan if grows else None) as earlier:
        yield context_of(recipe, out, threads), earlier


def context_of(recipe: Recipe, out: Path, threads: int | None) -> Context:
    """What all runs of the sweep in this folder share, on this machine."""
    device = resolve_device(recipe.run.device)
    resolved = _began_with(out) or resolved_precision(recipe.training, recipe.run, device)
    training = recipe.training.model_copy(update=resolved)
    return Context(recipe, out.resolve(), device, threads, training)


def prepare(plan: Plan, out: Path, say: Say) -> None:
    """What is needed before any task: the folder's record of the recipe, and the corpus."""
    with opened(plan, out, None, grows=True) as (context, earlier):
        records = check_records(context, plan, earlier)
        check_disk(context, plan)
        log = _Log(context, plan, earlier)
        corpus = _prepare(plan, context, records, say)
        _check_corpus(plan, corpus)
        log.write(corpus=_corpus_summary(corpus))


def _began_with(out: Path) -> dict[str, str] | None:
    """What `auto` became when the sweep in this folder began; None where it begins now."""
    path = out / "sweep.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found.get("resolved")


class Runner:
    """Runs teachers and columns of one plan, as often as asked; what is recorded is left alone."""

    def __init__(
        self, context: Context, plan: Plan, workers: Workers, log: "_Log", display: Display
    ) -> None:
        self.context = context
        self.plan = plan
        self.display = display
        self._workers = workers
        self._log = log
        self._expected: set[str] = set()
        self._finished = {one.id for one in plan.teachers if context.is_recorded(one.id)}
        self._finished.update(column.id for column in plan.columns if self._is_done(column))

    def run(
        self,
        teachers: Sequence[Teacher],
        columns: Sequence[Column],
        later: Sequence[Column] = (),
    ) -> None:
        """`teachers` are all that the columns need; `later` are columns that will come, but are not
        settled yet."""
        left = [column for column in columns if not self._is_done(column)]
        lost = lost_teachers(self.context, self.plan, left)
        self._finished.difference_update(teacher.id for teacher in lost)
        own = [one for one in teachers if one in lost or one.id not in self._expected]
        self._expected.update(teacher.id for teacher in own)
        tasks: list[Teacher | Column] = [*own, *columns]
        done = [task.id for task in tasks if self._is_done(task)]
        self.display.expect(tasks, done, later)
        self._workers.run(
            [task for task in tasks if task.id not in done],
            finished=self._finished,
            on_step=self.display.step,
            on_end=self._ended,
            on_start=self.display.started,
        )

    def _is_done(self, task: Teacher | Column) -> bool:
        if isinstance(task, Teacher):
            return task.id in self._finished
        return all(self.context.is_recorded(cell.id) for cell in task.cells)

    def _ended(self, task: Teacher | Column, message: EndMessage) -> None:
        self.display.ended(task, message)
        self._log.add(message)


def _run_everything(runner: Runner) -> None:
    """Every teacher, cell and baseline that is not recorded yet."""
    plan = runner.plan
    if plan.recipe.baselines == "all":
        runner.run(plan.teachers, [*plan.columns, *plan.baselines])
        return
    runner.run(plan.teachers, plan.columns, later=expected_baselines(plan))
    records = read_records(runner.context.out)
    runner.run(plan.teachers, select_baselines(plan, best_cells(plan, records)))


def best_cells(plan: Plan, records: Sequence[RunRecord]) -> list[Cell]:
    """For every curve the cells of the teacher whose students are best on average over seeds."""
    losses = {record.id: record.heldout.loss for record in records if record.heldout is not None}
    curves: dict[tuple[object, ...], dict[int, list[Cell]]] = {}
    for cell in plan.cells:
        if cell.id in losses and cell.teacher is not None:
            curves.setdefault(cell.curve, {}).setdefault(cell.teacher.size, []).append(cell)
    best = []
    for by_teacher in curves.values():
        best += min(by_teacher.values(), key=lambda cells: fmean(losses[one.id] for one in cells))
    return best


class _Log:
    """`sweep.json`: what the sweep is, and seconds by stage over all its sessions."""

    def __init__(self, context: Context, plan: Plan, earlier: Sequence[str]) -> None:
        self.path = context.out / "sweep.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        # what has grown is not finished
        is_same = before.get("recipe_hash") == context.recipe.hash()
        self.fields: dict[str, Any] = {
            "recipe": context.recipe.model_dump(mode="json"),
            "recipe_hash": context.recipe.hash(),
            "grown_from": list(earlier),
            "resolved": {
                "precision": context.training.precision,
                "teacher_dtype": context.training.teacher_dtype,
            },
            "machine": machine(context.device, context.threads),
            "versions": versions(),
            "flops": plan.flops(expected_baselines(plan)),
            "started": before.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": before.get("finished") if is_same else None,
            "corpus": before.get("corpus"),
            "best": before.get("best") if is_same else None,
        }
        self.stages: dict[str, float] = before.get("stages", {})
        self.peaks: dict[int, int] = {}
        self.memory_before: int = before.get("peak_memory_bytes", 0)
        self.wall_before: float = before.get("wall_seconds", 0.0)
        self.start = time.monotonic()
        if not before:
            self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._spent(name, time.monotonic() - start)

    def add(self, message: EndMessage) -> None:
        """What a task spent outside all stages is `python`: the overhead of our own code."""
        self.peaks[message.worker] = message.peak_memory
        for name, seconds in message.seconds.items():
            self._spent(name, seconds)
        self._spent("python", max(0.0, message.busy - sum(message.seconds.values())))
        self.write()

    def _spent(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def peak_memory(self) -> int:
        """Bytes: the sum of all processes' peaks, which the true peak cannot exceed."""
        return max(self.memory_before, peak_memory() + sum(self.peaks.values()))

    @property
    def wall_seconds(self) -> float:
        return self.wall_before + time.monotonic() - self.start

    def write(self, **changed: Any) -> None:
        self.fields |= changed
        measured = {
            "stages": self.stages,
            "wall_seconds": self.wall_seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        write_json_atomically(self.path, self.fields | measured)


def _prepare(plan: Plan, context: Context, records: Sequence[RunRecord], say: Say) -> Corpus:
    """The corpus of the sweep; once something is recorded, no other text may take its place."""
    asked = plan.recipe.corpus
    given = [teacher.source for teacher in plan.teachers if teacher.source is not None]
    say(f"preparing the corpus {asked.source}")
    corpus = prepare_corpus(
        asked.source,
        context.corpus_folder,
        vocabulary=asked.vocabulary,
        tokenizer=asked.tokenizer or next(iter(given), None),
        text_column=asked.text_column,
        separator=asked.separator,
        window=asked.window,
        heldout_source=asked.heldout_source,
        heldout_fraction=asked.heldout_fraction,
        heldout_tokens=asked.heldout_tokens,
        begin_windows=asked.begin_windows,
        max_bytes=asked.max_bytes,
        expected_hash=records[0].corpus_hash if records else None,
        # the folder is this recipe's, so what it holds besides is of one that did nothing yet
        replace=True,
        progress=corpus_progress(say),
    )
    say(
        f"corpus: {format_count(corpus.train_tokens)} training tokens, vocabulary "
        f"{corpus.vocabulary}"
    )
    return corpus


def _check_corpus(plan: Plan, corpus: Corpus) -> None:
    recipe = plan.recipe
    tasks = plan.tasks(plan.baselines)
    longest = max(tokens for task in tasks for _, tokens in task.work.trained)
    check_epochs(corpus, longest, recipe.corpus.max_epochs)
    if recipe.teachers.sizes and corpus.vocabulary != recipe.corpus.vocabulary:
        raise UserError(
            f"corpus.vocabulary = {recipe.corpus.vocabulary}, but the text gives a tokenizer of "
            f"{corpus.vocabulary} tokens: set corpus.vocabulary={corpus.vocabulary}"
        )


def _corpus_summary(corpus: Corpus) -> dict[str, Any]:
    """The manifest without its long lists, which stay in corpus/manifest.json."""
    long = {"source": "files", "heldout_source": "files", "heldout": "evaluated"}
    kept = {key: value for key, value in corpus.manifest.items() if key != "request"}
    for part, name in long.items():
        if kept[part] is not None:
            kept[part] = {key: value for key, value in kept[part].items() if key != name}
    return kept


def _result(out: Path, log: _Log) -> SweepResult:
    student = out / "student"
    return SweepResult(
        out=out,
        report=out / "report.html",
        student=student if student.exists() else None,
        best=log.fields["best"] and log.fields["best"]["cell"],
        verdict=verdict_of(out),
        stages=log.stages,
        wall_seconds=log.wall_seconds,
        peak_memory_bytes=log.peak_memory,
        failed=[record.id for record in read_records(out) if record.status == "failed"],
    )
