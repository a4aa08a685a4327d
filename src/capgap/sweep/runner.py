"""A recipe, an output folder: what is missing is done, and the results are written."""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capgap.artifact import InUse, locked, read_json, write_json
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.tokens import Corpus
from capgap.errors import Interrupted, UserError
from capgap.leases import Leases
from capgap.machine import machine, resolve_device, versions, visible_gpus
from capgap.mirror import discard, exclusive, fetch, sync
from capgap.records import RunRecord, read_records
from capgap.report.page import write_report
from capgap.sizes import format_count
from capgap.stage import Say, ShouldStop
from capgap.stages.corpus import corpus_progress
from capgap.storage import is_copy
from capgap.sweep.cells import SHARED, Column, Context, Task, Teacher
from capgap.sweep.checks import (
    check_disk,
    check_epochs,
    check_records,
    check_sources,
    claimed,
    is_lost,
    lost_teachers,
)
from capgap.sweep.plan import Plan, expected_baselines, plan_of, resolve_workers, select_baselines
from capgap.sweep.progress import Display
from capgap.sweep.recipe import Recipe
from capgap.sweep.results import best_cells, best_of, summary, verdict_of
from capgap.sweep.schedule import (
    LOOK_SECONDS,
    Alone,
    Attempt,
    Claims,
    EndMessage,
    Engine,
    Schedule,
    Where,
)
from capgap.sweep.workers import Workers, peak_memory
from capgap.train.settings import autocast_dtype, resolved_precision
from capgap.train.trackers import gather_trackers


def run_sweep(
    recipe: Recipe,
    out: Path,
    display: Display,
    should_stop: ShouldStop = lambda: False,
    on: Where = "here",
) -> dict[str, Any]:
    """Runs what is not recorded yet, then fits the law and writes the report; returns what `capgap
    sweep --json` prints.

    `on`: worker processes `here`, alone in the folder; `shared` with other calls that take tasks by
    leases, here too; the nodes of a `ray` cluster.

    Stopped or killed at any moment, the same call continues: finished runs are never computed
    again, half-done ones go on from their checkpoints. So does a recipe that has grown. UserError
    for the user's mistakes, before any work where they can be known.
    """
    plan = plan_of(recipe)

    def everything(runner: Runner) -> None:
        if recipe.baselines == "all":
            runner.run(plan.teachers, [*plan.columns, *plan.baselines])
            return
        runner.run(plan.teachers, plan.columns, later=expected_baselines(plan))
        best = best_cells(plan, read_records(runner.context.out))
        runner.run(plan.teachers, select_baselines(plan, best))

    return run_folder(plan, out, display, everything, should_stop, is_whole=True, on=on)


def run_folder(
    plan: Plan,
    out: Path,
    display: Display,
    work: Callable[["Runner"], None],
    should_stop: ShouldStop = lambda: False,
    *,
    is_whole: bool = False,
    on: Where = "here",
) -> dict[str, Any]:
    """Everything around the runs: checks, corpus, workers, results. `work` asks for runs of the
    plan. `is_whole`: for all of them, so that there must be disk space for them, and the folder may
    hold some of a smaller plan."""
    if on == "ray":
        from capgap.ray_cluster import check_installed
        from capgap.sweep.on_ray import RayNodes

        check_installed()
    asked = plan.recipe.run
    device, gpus = resolve_device(asked.device), visible_gpus(asked.device)
    seen = asked.gpus_per_column if on == "ray" else None
    number, threads = resolve_workers(asked, device, most=plan.width, gpus=seen)
    with ExitStack() as stack:
        if on == "here":
            folder = stack.enter_context(_begun(plan, out, threads, is_whole=is_whole))
            claims: Claims = Alone()
        else:
            folder = stack.enter_context(joined(plan, out, threads, display.say, is_whole, on))
            stale, shares = asked.lease_seconds, lambda: sync(folder.context.out, *SHARED)
            leases = stack.enter_context(Leases(folder.context.leases, stale=stale, sync=shares))
            if on == "ray":
                _become_driver(leases, folder, display.say, should_stop)
            # whoever waits for another has none: the other would wait for its end
            folder.begin(leases)
            claims = leases
        context = folder.context
        stack.enter_context(display)
        engine: Engine = Workers(context, number, gpus, display.say)
        if on == "ray":
            # every task takes its own lease, where it runs
            claims, engine = Alone(), RayNodes(context, leases.owner)
        with engine:
            if on == "here" and not folder.records:
                # they load torch while the corpus is prepared
                engine.start()
            corpus = folder.prepare(display.say)
            try:
                work(Runner(folder, engine, display, should_stop, claims))
            except (KeyboardInterrupt, SystemExit, Interrupted):
                display.say("stopping: every worker saves its state")
                raise
        display.bars.stop()
        if on != "here":
            leases.release(folder.session)
            if on == "shared" and not _is_finisher(leases, folder, should_stop):
                report = out / "report.html"
                return {"out": str(out), "report": str(report), "finished": "elsewhere"}
            folder.gather(leases)
        display.say("fitting the law and writing the report")
        folder.write(finished=datetime.now(UTC).isoformat(timespec="seconds"))
        with folder.stage("report"):
            best = best_of(context, plan, corpus)
            # the report reads it there
            folder.write(best=best)
            report = write_report(context.out)
            # not needed any more: the other students' weights, the states of killed runs
            for name in ("students", "checkpoints"):
                discard(context.out / "work" / name)
        folder.write()
        student = out / "student"
        return {
            "out": str(out),
            "report": str(out / report.name),
            "student": str(student) if student.exists() else None,
            "best": best and best["cell"],
            "verdict": verdict_of(out),
            "stages": {name: round(seconds, 3) for name, seconds in folder.stages.items()},
            "wall_seconds": round(folder.wall_seconds, 3),
            "peak_memory_bytes": folder.peak_memory,
            "failed": [one.id for one in read_records(out) if one.status == "failed"],
        }


@contextmanager
def joined(
    plan: Plan, out: Path, threads: int | None, say: Say, is_whole: bool = True, on: Where = "here"
) -> Iterator["_Folder"]:
    """The output folder beside other processes, prepared: the first does it, the others wait."""
    has_said = False
    while not _is_prepared(out, plan.recipe.hash()):
        try:
            with exclusive(out, *SHARED), _begun(plan, out, None, is_whole=is_whole) as folder:
                if not _is_prepared(out, plan.recipe.hash()):
                    folder.prepare(say, on)
        except InUse as error:
            if not has_said:
                say(f"{error}: waits for it to be prepared")
            has_said = True
            time.sleep(LOOK_SECONDS)
    with locked(out, shared=True):
        # its files may come behind the word of it
        sync(out, *SHARED)
        context = context_of(plan.recipe, out, threads)
        earlier = read_json(out / "sweep.json").get("grown_from", [])
        records = check_records(context, plan, earlier)
        yield _Folder(plan, context, records, earlier, is_shared=True)


def _is_prepared(out: Path, recipe_hash: str) -> bool:
    path = out / "sweep.json"
    found = read_json(path) if path.exists() else {}
    return found.get("recipe_hash") == recipe_hash and found.get("corpus") is not None


def _become_driver(leases: Leases, folder: "_Folder", say: Say, should_stop: ShouldStop) -> None:
    """Waits until no other call has tasks run in the folder."""
    has_said = False
    while not leases.take("driver"):
        if not has_said:
            say(
                f"another driver is at work in {folder.context.out}: waits until it ends, or is "
                f"not heard of for {leases.stale:g} s"
            )
        has_said = True
        if should_stop():
            raise Interrupted
        time.sleep(LOOK_SECONDS)


def _is_finisher(leases: Leases, folder: "_Folder", should_stop: ShouldStop) -> bool:
    """Whether the results are this process's to write; False when another has written them."""
    while not leases.take("report"):
        if read_json(folder.path).get("finished") is not None:
            return False
        if should_stop():
            raise Interrupted
        time.sleep(LOOK_SECONDS)
    return read_json(folder.path).get("finished") is None


@contextmanager
def _begun(plan: Plan, out: Path, threads: int | None, *, is_whole: bool) -> Iterator["_Folder"]:
    """The output folder, checked, and this process's alone while inside. UserError as `claimed`."""
    gather_trackers(plan.recipe.track, out)
    check_sources(plan.recipe, out)
    with claimed(out, plan.recipe, grown=plan if is_whole else None) as earlier:
        context = context_of(plan.recipe, out, threads)
        records = check_records(context, plan, earlier)
        if is_whole:
            check_disk(context, plan)
        yield _Folder(plan, context, records, earlier)


def context_of(recipe: Recipe, out: Path, threads: int | None) -> Context:
    """What all runs of the sweep in this folder share, on this machine. What `auto` became when the
    sweep began stays. UserError where this machine cannot compute in it."""
    device = resolve_device(recipe.run.device)
    path = out / "sweep.json"
    began: dict[str, Any] = read_json(path) if path.exists() else {}
    resolved = began.get("resolved") or resolved_precision(recipe.training, recipe.run, device)
    training = recipe.training.model_copy(update=resolved)
    autocast_dtype(training.precision, device)
    return Context(recipe, out.resolve(), device, threads, training)


@dataclass
class Runner:
    """Runs teachers and columns of one plan, as often as asked; what is recorded is left alone."""

    folder: "_Folder"
    engine: Engine
    display: Display
    should_stop: ShouldStop
    claims: Claims = field(default_factory=Alone)

    def __post_init__(self) -> None:
        self.context = self.folder.context
        self._expected: set[str] = set()
        tasks = self.folder.plan.tasks(())
        self._finished = {task.id for task in tasks if self.context.is_done(task)}

    def run(
        self, teachers: Sequence[Teacher], columns: Sequence[Column], later: Sequence[Column] = ()
    ) -> None:
        """`teachers` are all that the columns need; `later` are columns that will come, but are not
        settled yet."""
        left = [column for column in columns if not self.context.is_done(column)]
        lost = lost_teachers(self.context, self.folder.plan, left)
        self._finished.difference_update(teacher.id for teacher in lost)
        own = [one for one in teachers if one in lost or one.id not in self._expected]
        self._expected.update(teacher.id for teacher in own)
        tasks: list[Task] = [*own, *columns]

        def is_done(task: Task) -> bool:
            return self.context.is_done(task) and not (task in lost and is_lost(self.context, task))

        done = [task.id for task in tasks if is_done(task)]
        self.display.expect(tasks, done, later)
        schedule = Schedule(
            self.engine,
            self.claims,
            is_done=is_done,
            micro_batch=self.context.smaller,
            should_stop=self.should_stop,
            on_start=self.display.started,
            on_step=self.display.step,
            on_end=self._ended,
            on_failure=self._failed,
            attempts=self.folder.attempts,
            is_shared=self.folder.is_shared,
        )
        schedule.run([task for task in tasks if task.id not in done], self._finished)
        sync(self.context.out, *SHARED)

    def _ended(self, task: Task, message: EndMessage) -> None:
        self.display.ended(task, message)
        self.folder.add(message)

    def _failed(self, attempt: Attempt) -> None:
        self.display.say(f"warning: {attempt.sentence()}")
        self.folder.write()


class _Folder:
    """The output folder of a plan with its corpus, and with `sweep.json`: what the sweep is, and
    seconds by stage over all its sessions. `records` are those that are there. Of processes that
    share it one writes at the end, by `gather`; before, each has a file of its own."""

    def __init__(
        self,
        plan: Plan,
        context: Context,
        records: Sequence[RunRecord],
        earlier: Sequence[str],
        *,
        is_shared: bool = False,
    ) -> None:
        self.plan = plan
        self.context = context
        self.records = records
        self.path = context.out / "sweep.json"
        before = read_json(self.path) if self.path.exists() else {}
        # what has grown is not finished
        ended = before if before.get("recipe_hash") == context.recipe.hash() else {}
        self.fields: dict[str, Any] = {
            "schema": 1,
            "recipe": context.recipe.model_dump(mode="json"),
            "recipe_hash": context.recipe.hash(),
            "grown_from": list(earlier),
            "resolved": {
                name: getattr(context.training, name) for name in ("precision", "teacher_dtype")
            },
            "machine": machine(context.device, context.threads),
            "versions": before.get("versions") or versions(),
            "flops": plan.flops(expected_baselines(plan)),
            "started": before.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": ended.get("finished"),
            "corpus": before.get("corpus"),
            "best": ended.get("best"),
        }
        self.is_shared = is_shared
        self._own = context.out / "work" / "sessions" / f"{uuid.uuid4().hex}.json"
        self.stages: dict[str, float] = {} if is_shared else before.get("stages", {})
        self.attempts = [Attempt(**one) for one in before.get("attempts", [])]
        self._peaks: dict[str, int] = {}
        self._peak_before: int = before.get("peak_memory_bytes", 0)
        self._wall_before: float = before.get("wall_seconds", 0.0)
        self._start = time.monotonic()
        if not before:
            self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._spent(name, time.monotonic() - start)

    def add(self, message: EndMessage) -> None:
        """What a task spent outside all stages is `python`: the overhead of our own code."""
        before = self._peaks.get(message.place, 0)
        self._peaks[message.place] = max(before, message.peak_memory)
        for name, seconds in message.seconds.items():
            self._spent(name, seconds)
        self._spent("python", max(0.0, message.busy - sum(message.seconds.values())))
        self.write()

    def _spent(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def peak_memory(self) -> int:
        """Bytes: the sum of all processes' peaks, which the true peak cannot exceed."""
        return max(self._peak_before, peak_memory() + sum(self._peaks.values()))

    @property
    def wall_seconds(self) -> float:
        return self._wall_before + time.monotonic() - self._start

    def write(self, **changed: Any) -> None:
        self.fields |= changed
        measured = {
            "stages": self.stages,
            "attempts": [vars(one) for one in self.attempts],
            "wall_seconds": self.wall_seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        own = self._own if self.is_shared else self.path
        write_json(own, measured if self.is_shared else self.fields | measured)

    @property
    def session(self) -> str:
        """The lease that this process holds until its own file is whole."""
        return f"session-{self._own.stem}"

    def begin(self, leases: Leases) -> None:
        self.write()
        leases.take(self.session)

    def gather(self, leases: Leases) -> None:
        """What all processes that shared the folder spent; from here on this one writes."""
        self.is_shared = False
        fetch(self._own.parent)
        for path in self._own.parent.glob("*.json"):
            while not leases.take(f"session-{path.stem}"):
                time.sleep(LOOK_SECONDS)
        fetch(self._own.parent)
        self.stages, self.attempts = read_json(self.path).get("stages", {}), []
        for path in sorted(self._own.parent.glob("*.json")):
            found = read_json(path)
            self.attempts += [Attempt(**one) for one in found["attempts"]]
            for name, seconds in found["stages"].items():
                self._spent(name, seconds)
        shutil.rmtree(self._own.parent)

    def prepare(self, say: Say, on: Where = "here") -> Corpus:
        """The corpus of the sweep; once something is recorded, no other text may take its place."""
        asked = self.plan.recipe.corpus
        models = [one.source for one in self.plan.teachers if one.source is not None]
        say(f"preparing the corpus {asked.source}")
        with self.stage("corpus"):
            corpus = prepare_corpus(
                asked.source,
                self.context.corpus_folder,
                tokenizer=asked.tokenizer or next(iter(models), None),
                expected_hash=self.records[0].corpus_hash if self.records else None,
                # the folder is this recipe's, so what it holds besides is of one that did nothing
                replace=True,
                on="ray" if on == "ray" and not is_copy(asked.source, self.path) else "here",
                progress=corpus_progress(say),
                **asked.model_dump(exclude={"source", "tokenizer", "max_epochs"}),
            )
        say(
            f"corpus: {format_count(corpus.train_tokens)} training tokens, vocabulary "
            f"{corpus.vocabulary}"
        )
        tasks = self.plan.tasks(self.plan.baselines)
        longest = max(tokens for task in tasks for _, tokens in task.work.trained)
        check_epochs(corpus, longest, asked.max_epochs)
        if not models and corpus.vocabulary != asked.vocabulary:
            raise UserError(
                f"corpus.vocabulary = {asked.vocabulary}, but the text gives a tokenizer of "
                f"{corpus.vocabulary} tokens: set corpus.vocabulary={corpus.vocabulary}"
            )
        # a recipe that has grown is noted before there is a run of it
        self.write(corpus=summary(corpus.manifest))
        return corpus
