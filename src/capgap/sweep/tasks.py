"""What a worker does: train one teacher, or one column of cells, and record every run.

A task may be cut short at any moment and started again: it goes on from its checkpoint, and what
is already recorded is left alone.
"""

import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from capgap.distill.divergences import Divergence
from capgap.errors import UserError
from capgap.evaluate.measured import HeldoutLoss
from capgap.machine import machine, versions
from capgap.models.build import build_model, load_model, save_model
from capgap.models.parts import Parts
from capgap.records import AfterCut, read_record, record_from_dict, write_record
from capgap.stages.inputs import warn_of_beginning
from capgap.sweep.chain import assistant_run, cut_from, failed_assistant, make_assistant
from capgap.sweep.context import Context
from capgap.sweep.plan import Cell, Column, Teacher
from capgap.sweep.task import Task, teacher_path
from capgap.train.learner import NOT_FINITE, Learner


def run_teacher(task: Task, teacher: Teacher) -> None:
    """Trains the teacher (or takes it as it is), measures it, and scores its units for the cuts."""
    context, recipe = task.context, task.context.recipe
    run = _Run(task)
    curve: dict[str, Any] = {}
    failure = None
    if teacher.source is not None:
        model = load_model(teacher.source).to(context.device)
        warn_of_beginning(Parts(model), task.corpus, teacher.source, task.warnings.append)
    else:
        assert teacher.learning_rate is not None
        model = build_model(teacher.shape, seed=teacher.seed).to(context.device)
        steps = teacher.tokens // recipe.training.batch_tokens
        learner = Learner(teacher.id, model, steps, teacher.learning_rate)
        task.run([learner], teacher.id, task.settings("teacher", teacher.seed))
        curve, failure = learner.curve, learner.failure
    heldout = None if failure else task.evaluate(model)
    if heldout is not None and not math.isfinite(heldout.loss):
        heldout, failure = None, NOT_FINITE
    if failure is None:
        try:
            task.score(model, teacher.id)
        except UserError as error:
            if teacher.source is not None:
                raise
            # a ladder's teacher is not the user's: it diverged in its last step
            heldout, failure = None, {"message": str(error)}
    if failure is None and teacher.source is None:
        save_model(model, context.teacher_folder(teacher.id), task.corpus.tokenizer)
    run.record(
        kind="teacher",
        id=teacher.id,
        architecture=teacher.architecture,
        seed=teacher.seed,
        teacher_size=teacher.size,
        parameters=teacher.shape.parameters().as_dict(),
        shape=vars(teacher.shape),
        tokens=teacher.tokens,
        steps=teacher.tokens // recipe.training.batch_tokens,
        learning_rate=teacher.learning_rate,
        alpha=0.0,
        flops=teacher.flops(task.heldout.tokens),
        heldout=heldout,
        failure=failure,
        curve=curve,
    )


def run_column(task: Task, column: Column) -> None:
    """Trains all cells of the column that are not recorded yet, side by side."""
    context, recipe = task.context, task.context.recipe
    cells = {cell.id: cell for cell in column.cells if not context.is_recorded(cell.id)}
    if not cells:
        return
    run = _Run(task)
    lost = _failed_teacher(context, column)
    if lost is None and column.assistant is not None:
        make_assistant(task, column)
    after_cuts: dict[str, HeldoutLoss | None] = {}
    learners = []
    for cell in cells.values():
        problem = lost or failed_assistant(context, cell)
        if problem is not None:
            failure = {"message": problem, "step": None, "windows": None}
            _record_cell(task, run, cell, _Unstarted(failure))
            continue
        model = _student(task, cell)
        after_cuts[cell.id] = task.evaluate(model) if cell.cut_from is not None else None
        steps = cell.tokens // recipe.training.batch_tokens
        learners.append(Learner(cell.id, model, steps, cell.learning_rate, cell.alpha))
    if not learners:
        return

    def finish(learner: Learner) -> None:
        cell = cells[learner.id]
        if context.is_recorded(cell.id):
            return
        heldout = None if learner.failure else task.evaluate(learner.model)
        if heldout is not None and not math.isfinite(heldout.loss):
            heldout, learner.failure = None, NOT_FINITE
        if learner.failure is None and cell.kind == "cell":
            save_model(learner.model, context.student_folder(cell.id), task.corpus.tokenizer)
        _record_cell(
            task,
            run,
            cell,
            learner,
            heldout=heldout,
            after_cut=after_cuts[cell.id],
            teacher_dtype=None if teacher is None or learner.alpha == 0 else teacher.dtype,
        )

    teacher = None
    if column.assistant is not None:
        teacher = task.load_teacher(context.assistant_folder(column.assistant.id))
    elif column.teacher is not None:
        teacher = task.load_teacher(teacher_path(context, column.teacher))
    settings = task.settings("student", column.seed)
    task.run(learners, column.id, settings, teacher=teacher, on_end=finish)


@dataclass(frozen=True)
class _Unstarted:
    """Stands for a learner that could not begin."""

    failure: dict[str, Any]
    curve: dict[str, list[float | None]] = field(default_factory=dict)


def _failed_teacher(context: Context, column: Column) -> str | None:
    for teacher in sorted(column.teachers):
        if read_record(context.record_folder(teacher)).status == "failed":
            return f"its teacher {teacher} failed"
    return None


def _student(task: Task, cell: Cell) -> PreTrainedModel:
    context = task.context
    if cell.cut_from is None:
        return build_model(cell.shape, seed=cell.seed).to(context.device)
    if cell.assistant is not None:
        place: Path | str = context.assistant_folder(cell.assistant.id)
        return cut_from(task, place, cell.assistant.id, cell.shape)
    return cut_from(task, teacher_path(context, cell.cut_from), cell.cut_from.id, cell.shape)


def _record_cell(
    task: Task,
    run: "_Run",
    cell: Cell,
    learner: "Learner | _Unstarted",
    *,
    heldout: HeldoutLoss | None = None,
    after_cut: HeldoutLoss | None = None,
    teacher_dtype: str | None = None,
) -> None:
    teacher = cell.teacher
    run.record(
        kind=cell.kind,
        id=cell.id,
        architecture=cell.architecture,
        seed=cell.seed,
        init=cell.init,
        student_size=cell.student_size,
        teacher_size=None if teacher is None else teacher.size,
        teacher=None if teacher is None else teacher.id,
        parameters=cell.shape.parameters().as_dict(),
        teacher_parameters=None if teacher is None else teacher.shape.parameters().as_dict(),
        shape=vars(cell.shape),
        tokens=cell.budget,
        steps=cell.tokens // task.context.recipe.training.batch_tokens,
        learning_rate=cell.learning_rate,
        alpha=cell.alpha,
        flops=cell.flops(task.context.recipe, task.heldout.tokens),
        teacher_dtype=teacher_dtype,
        heldout=heldout,
        failure=learner.failure,
        curve=learner.curve,
        assistant=None if cell.assistant is None else assistant_run(task.context, cell.assistant),
        equal_flops_to=cell.equal_flops_to,
        after_cut=None
        if after_cut is None or not math.isfinite(after_cut.loss)
        else vars(AfterCut(loss=after_cut.loss, loss_stderr=after_cut.loss_stderr)),
    )


class _Run:
    """Writes records with what all records share."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.started = datetime.now(UTC)
        self.start = time.monotonic()

    def record(self, *, id: str, heldout: HeldoutLoss | None, failure: Any, **fields: Any) -> None:
        context, recipe = self.task.context, self.task.context.recipe
        values = {
            "schema": 1,
            "id": id,
            "status": "failed" if failure else "done",
            "failure": failure,
            "batch_tokens": recipe.training.batch_tokens,
            "temperature": recipe.training.temperature,
            "divergence": str(
                Divergence(recipe.training.divergence, recipe.training.divergence_mix)
            ),
            "recipe_hash": recipe.hash(),
            "corpus_hash": self.task.corpus.corpus_hash,
            "heldout": None if heldout is None else heldout.as_dict(),
            "wall_seconds": time.monotonic() - self.start,
            "versions": versions(),
            "machine": machine(context.device, context.threads),
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **fields,
        }
        write_record(context.record_folder(id), record_from_dict(values, source=id))
