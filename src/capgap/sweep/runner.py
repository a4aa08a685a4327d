"""A recipe, an output folder: what is missing is done, and the results are written."""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capgap.config import Recipe
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.tokens import Corpus, check_epochs
from capgap.errors import UserError
from capgap.records import RunRecord, read_records, write_json_atomically
from capgap.sizes import format_count
from capgap.sweep.context import Context, machine, resolve_device, resolve_workers, versions
from capgap.sweep.given import given_teachers
from capgap.sweep.plan import Cell, Column, Plan, Teacher, curve_key, make_plan, select_baselines
from capgap.sweep.progress import Display
from capgap.sweep.results import write_results
from capgap.sweep.schedule import Workers
from capgap.sweep.summary import SweepResult
from capgap.sweep.worker import EndMessage, peak_memory

# Weights, two moments and a copy on the way to disk
BYTES_PER_PARAMETER = 16


def run_sweep(recipe: Recipe, out: Path, display: Display) -> SweepResult:
    """Runs what is not recorded yet, then fits the law and writes the report.

    Stopped or killed at any moment, the same call continues: finished runs are never computed
    again, half-done ones go on from their checkpoints. UserError for the user's mistakes, before
    any work where they can be known.
    """
    device = resolve_device(recipe.run.device)
    number, threads = resolve_workers(recipe.run.workers, device)
    given = given_teachers(recipe)
    tokenizer = recipe.corpus.tokenizer or (given[0].source if given else None)
    plan = make_plan(recipe, given)
    with _claimed(out, recipe):
        context = Context(recipe, out.resolve(), device, threads)
        log = _Log(context, plan)
        _check_disk(context, plan)
        # the workers load torch while the corpus is prepared
        with display, Workers(context, number) as workers:
            with log.stage("corpus"):
                corpus = _prepare(recipe, context, tokenizer, display)
            _check_corpus(recipe, corpus, context)
            log.corpus = _corpus_summary(corpus)
            finished = {run for run in _run_ids(plan) if context.is_recorded(run)}

            def ended(task: Teacher | Column, message: EndMessage) -> None:
                display.ended(task, message)
                log.add(message)

            def run(tasks: Sequence[Teacher | Column]) -> None:
                done = [task.id for task in tasks if _is_done(task, context)]
                display.expect(tasks, done)
                workers.run(
                    [task for task in tasks if task.id not in done],
                    finished=finished,
                    on_step=display.step,
                    on_end=ended,
                    on_start=display.started,
                )

            runnable: list[Teacher | Column] = [*plan.teachers, *plan.columns]
            if recipe.baselines == "all":
                run([*runnable, *plan.baselines])
            else:
                run(runnable)
                run(select_baselines(plan, best_cells(plan, read_records(out))))
        display.say("fitting the law and writing the report")
        log.write(finished=True)
        with log.stage("report"):
            log.best = write_results(context, plan, corpus)
        log.write()
        return _result(out, log)


def best_cells(plan: Plan, records: Sequence[RunRecord]) -> list[Cell]:
    """For every curve the cells of the teacher whose students are best on average over seeds."""
    losses = {record.id: record.heldout.loss for record in records if record.heldout is not None}
    curves: dict[tuple[object, ...], dict[int, list[Cell]]] = {}
    for cell in plan.cells:
        if cell.id in losses and cell.teacher is not None:
            curves.setdefault(curve_key(cell), {}).setdefault(cell.teacher.size, []).append(cell)
    best = []
    for by_teacher in curves.values():
        means = {
            size: sum(losses[cell.id] for cell in cells) / len(cells)
            for size, cells in by_teacher.items()
        }
        best += by_teacher[min(means, key=means.__getitem__)]
    return best


@contextmanager
def _claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """The folder belongs to this recipe and, while inside, to this process alone."""
    marker = out / "sweep.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found["recipe_hash"] != recipe.hash():
            raise UserError(
                f"{out} holds the sweep of another recipe ({found['recipe']['name']}, hash "
                f"{found['recipe_hash']}; this one is {recipe.hash()}): choose another --out"
            )
    elif _is_foreign(out):
        raise UserError(f"{out} is no empty folder and no sweep: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write into {out}: {error.strerror}; choose another --out"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the sweep in {out}") from None
        yield


def _is_foreign(out: Path) -> bool:
    """A file, or a folder with something in it that no sweep began."""
    if not out.exists() or (out / ".lock").exists():
        return False
    return not out.is_dir() or any(out.iterdir())


class _Log:
    """`sweep.json`: what the sweep is, and seconds by stage over all its sessions."""

    def __init__(self, context: Context, plan: Plan) -> None:
        self.path = context.out / "sweep.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.fields: dict[str, Any] = {
            "recipe": context.recipe.model_dump(mode="json"),
            "recipe_hash": context.recipe.hash(),
            "machine": machine(context.device, context.threads),
            "versions": versions(),
            "flops": plan.flops(plan.baselines),
            "started": before.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": before.get("finished"),
        }
        self.corpus: dict[str, Any] | None = before.get("corpus")
        self.best: dict[str, str] | None = before.get("best")
        self.stages: dict[str, float] = before.get("stages", {})
        self.peaks: dict[int, int] = {}
        self.memory_before: int = before.get("peak_memory_bytes", 0)
        self.wall_before: float = before.get("wall_seconds", 0.0)
        self.start = time.monotonic()
        self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - start

    def add(self, message: EndMessage) -> None:
        """What a task spent outside all stages is `python`: the overhead of our own code."""
        self.peaks[message.worker] = message.peak_memory
        spent = dict(message.seconds)
        spent["python"] = max(0.0, message.busy - sum(spent.values()))
        for name, seconds in spent.items():
            self.stages[name] = self.stages.get(name, 0.0) + seconds
        self.write()

    @property
    def peak_memory(self) -> int:
        """Bytes: the sum of all processes' peaks, which the true peak cannot exceed."""
        return max(self.memory_before, peak_memory() + sum(self.peaks.values()))

    @property
    def wall_seconds(self) -> float:
        return self.wall_before + time.monotonic() - self.start

    def write(self, *, finished: bool = False) -> None:
        if finished:
            self.fields["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomically(
            self.path,
            self.fields
            | {
                "corpus": self.corpus,
                "stages": self.stages,
                "wall_seconds": self.wall_seconds,
                "peak_memory_bytes": self.peak_memory,
                "best": self.best,
            },
        )


def _prepare(recipe: Recipe, context: Context, tokenizer: str | None, display: Display) -> Corpus:
    asked = recipe.corpus
    display.say(f"preparing the corpus {asked.source}")
    corpus = prepare_corpus(
        asked.source,
        context.corpus_folder,
        vocabulary=asked.vocabulary,
        tokenizer=tokenizer,
        text_column=asked.text_column,
        separator=asked.separator,
        window=asked.window,
        heldout_source=asked.heldout_source,
        heldout_fraction=asked.heldout_fraction,
        heldout_tokens=asked.heldout_tokens,
        max_bytes=asked.max_bytes,
    )
    display.say(
        f"corpus: {format_count(corpus.train_tokens)} training tokens, vocabulary "
        f"{corpus.vocabulary}"
    )
    return corpus


def _check_corpus(recipe: Recipe, corpus: Corpus, context: Context) -> None:
    longest = max(recipe.teachers.tokens or 0, *recipe.students.tokens)
    check_epochs(corpus, longest, recipe.corpus.max_epochs)
    if recipe.teachers.sizes and corpus.vocabulary != recipe.corpus.vocabulary:
        raise UserError(
            f"corpus.vocabulary = {recipe.corpus.vocabulary}, but the text gives a tokenizer of "
            f"{corpus.vocabulary} tokens: set corpus.vocabulary={corpus.vocabulary}"
        )
    for record in read_records(context.out) if (context.out / "records").is_dir() else ():
        if record.corpus_hash != corpus.corpus_hash:
            raise UserError(
                f"the corpus has changed since {record.id} was made (it was "
                f"{record.corpus_hash[:12]}, now {corpus.corpus_hash[:12]}): choose another --out"
            )


def _corpus_summary(corpus: Corpus) -> dict[str, Any]:
    kept = {key: value for key, value in corpus.manifest.items() if key not in ("files", "request")}
    kept["heldout"] = {
        key: value for key, value in corpus.manifest["heldout"].items() if key != "evaluated"
    }
    return kept


def _run_ids(plan: Plan) -> Iterator[str]:
    """Everything that has a record, and the columns themselves."""
    for teacher in plan.teachers:
        yield teacher.id


def _is_done(task: Teacher | Column, context: Context) -> bool:
    if isinstance(task, Teacher):
        return context.is_recorded(task.id)
    return all(context.is_recorded(cell.id) for cell in task.cells)


def _check_disk(context: Context, plan: Plan) -> None:
    parameters = sum(teacher.shape.parameters().total for teacher in plan.teachers)
    parameters += sum(cell.shape.parameters().total for cell in plan.cells)
    needed = parameters * BYTES_PER_PARAMETER
    free = shutil.disk_usage(context.out).free
    if free < needed:
        raise UserError(
            f"{context.out} has {free / 1e9:.1f} GB free, the sweep needs about "
            f"{needed / 1e9:.1f} GB: free some or choose another --out"
        )


def _result(out: Path, log: _Log) -> SweepResult:
    law = json.loads((out / "law.json").read_text())
    student = out / "student"
    return SweepResult(
        out=out,
        report=out / "report.html",
        student=student if student.exists() else None,
        best=log.best["cell"] if log.best else None,
        verdict=law["verdict"],
        stages=log.stages,
        wall_seconds=log.wall_seconds,
        peak_memory_bytes=log.peak_memory,
        failed=[record.id for record in read_records(out) if record.status == "failed"],
    )
