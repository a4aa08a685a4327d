"""What a worker does: train one teacher, or one column of cells, and record every run.

A task may be cut short at any moment and started again: it goes on from its checkpoint, and what
is already recorded is left alone.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.artifact import read_json, write_json
from capgap.corpus.text import Text
from capgap.errors import UserError
from capgap.machine import machine, versions
from capgap.models.build import build_model, load_model
from capgap.models.parallel import ALONE, Ranks, whole_model
from capgap.models.shape import Shape
from capgap.prune.importance import load_importance, save_importance, score, scoring_batches
from capgap.prune.surgery import cut
from capgap.records import read_record, record_from_dict, write_record
from capgap.stages.inputs import warn_of_beginning
from capgap.stages.trainer import STUDENT_SEED, TEACHER_SEED, Loss, Trainer
from capgap.sweep.cells import Assistant, Cell, Column, Context, Task, Teacher
from capgap.train.learner import Learner
from capgap.train.loop import Progress
from capgap.train.metrics import StageClock

LOSSES = ("loss", "loss_stderr")


class TaskRun:
    """One task of a sweep, whose ranks all do the same, but for what the first one does for all:
    scoring, writing, a look at what is there. `warnings` are for its user."""

    def __init__(
        self,
        context: Context,
        clock: StageClock,
        should_stop: Callable[[], bool],
        on_step: Callable[[Progress], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.context = context
        self.recipe = context.recipe
        self.on_step = on_step
        self.ranks = ranks
        began, now = read_json(context.out / "sweep.json")["versions"], versions()
        self.warnings = [
            f"warning: {os.uname().nodename} has {name} {now.get(name)}, the sweep began with {one}"
            for name, one in began.items()
            if one != now.get(name)
        ]
        self.trainer = Trainer(
            Text.open([(context.corpus_folder, None)], context.recipe.corpus.window),
            context.training,
            context.recipe.run,
            context.device,
            say=self.warnings.append,
            should_stop=should_stop,
            ranks=ranks,
            clock=clock,
        )
        self.started = datetime.now(UTC)
        self.start = time.monotonic()

    def run(self, task: Task) -> None:
        if isinstance(task, Teacher):
            self._run_teacher(task)
        else:
            self._run_column(task)
        if self.ranks.is_first:
            shutil.rmtree(self.context.checkpoint_folder(task.id), ignore_errors=True)

    def _run_teacher(self, teacher: Teacher) -> None:
        """Trains the teacher (or takes it as it is), measures it, and scores its units."""
        trainer, source = self.trainer, teacher.source
        if source is None:
            model = build_model(teacher.shape, seed=teacher.seed)
        else:
            model = load_model(source)
        rate = teacher.learning_rate or 0.0
        learner = trainer.learner(teacher.id, model, teacher.tokens, rate)
        if source is None:
            seed = TEACHER_SEED + teacher.seed
            heldout = self._train([learner], teacher.id, seed)[teacher.id]
        else:
            warn_of_beginning(learner.parts, trainer.text, source, trainer.say, self.ranks)
            heldout = trainer.measured(learner)
        if heldout is not None:
            try:
                self._score(learner, teacher.id)
            except UserError as error:
                if source is not None:
                    raise
                # a ladder's teacher is not the user's: it diverged in its last step
                heldout, learner.failure = None, {"message": str(error)}
        if learner.failure is None and source is None:
            trainer.save(learner, self.context.teacher_folder(teacher.id))
        self._record(
            teacher,
            heldout,
            kind="teacher",
            teacher_size=teacher.size,
            alpha=0.0,
            failure=learner.failure,
            curve=learner.curve,
        )

    def _run_column(self, column: Column) -> None:
        """Trains all cells of the column that are not recorded yet, side by side."""
        context, trainer = self.context, self.trainer
        recorded = self.ranks.told([one for one in column.runs if context.is_recorded(one)])
        cells = {cell.id: cell for cell in column.cells if cell.id not in recorded}
        records = {name: read_record(context.record_folder(name)) for name in column.teachers}
        failed = sorted(name for name, record in records.items() if record.status == "failed")
        problem = f"its teacher {failed[0]} failed" if failed else None
        if cells and problem is None and column.assistant is not None:
            self._make_assistant(column, column.assistant)
        after_cuts: dict[str, Loss | None] = {}
        learners = []
        for cell in cells.values():
            failure = problem or self._failed_assistant(cell)
            if failure is not None:
                self._record_cell(cell, None, failure={"message": failure}, curve={})
                continue
            if cell.cut_from is None:
                model = build_model(cell.shape, seed=cell.seed)
            else:
                model = self._cut(cell.assistant or cell.cut_from, cell.shape)
            learner = trainer.learner(cell.id, model, cell.tokens, cell.learning_rate, cell.alpha)
            after_cuts[cell.id] = trainer.evaluate(learner.parts) if cell.cut_from else None
            learners.append(learner)
        if not learners:
            return
        teacher = None
        if column.teacher is not None:
            teacher = trainer.teacher(context.weights_of(column.assistant or column.teacher))

        def end(learner: Learner, heldout: Loss | None) -> None:
            cell, after_cut = cells[learner.id], after_cuts[learner.id]
            if self.ranks.told(context.is_recorded(cell.id)):
                return
            if heldout is not None and cell.kind == "cell":
                trainer.save(learner, context.student_folder(cell.id))
            losses = {name: _finite(getattr(after_cut, name, None)) for name in LOSSES}
            self._record_cell(
                cell,
                heldout,
                failure=learner.failure,
                curve=learner.curve,
                after_cut=None if losses["loss"] is None else losses,
                teacher_dtype=None if teacher is None or learner.alpha == 0 else teacher.dtype,
            )

        self._train(learners, column.id, STUDENT_SEED + column.seed, teacher=teacher, on_end=end)

    def _make_assistant(self, column: Column, assistant: Assistant) -> None:
        """Cuts the assistant between teacher and student out of the teacher, distils it, scores its
        units. What happened is written last, failures too."""
        context, trainer, teacher = self.context, self.trainer, column.teacher
        assert teacher is not None
        if self.ranks.told(context.assistant_outcome(assistant.id).exists()):
            return
        model = self._cut(teacher, assistant.shape)
        learner = trainer.learner(
            assistant.id, model, assistant.tokens, assistant.learning_rate, assistant.alpha
        )
        outcome: dict[str, Any] = {"after_cut": _finite(trainer.evaluate(learner.parts).loss)}
        source = trainer.teacher(context.weights_of(teacher))
        seed = STUDENT_SEED + column.seed
        heldout = self._train([learner], assistant.id, seed, teacher=source)[assistant.id]
        if heldout is not None:
            outcome |= {name: getattr(heldout, name) for name in LOSSES}
            try:
                self._score(learner, assistant.id)
            except UserError as error:
                learner.failure = {"message": str(error)}
            trainer.save(learner, context.assistant_folder(assistant.id))
        if learner.failure is not None:
            outcome["failure"] = learner.failure["message"]
        if self.ranks.is_first:
            write_json(context.assistant_outcome(assistant.id), outcome)
            shutil.rmtree(context.checkpoint_folder(assistant.id), ignore_errors=True)
        self.ranks.wait()

    def _train(
        self, learners: list[Learner], name: str, data_seed: int, **more: Any
    ) -> dict[str, Loss | None]:
        """As `Trainer.train`; trackers have a run of this name."""
        out = self.context.out / "trackers" / name
        asked = {"sweep": self.recipe.name, "data_seed": data_seed}
        trackers = self.recipe.track if self.ranks.is_first else ()
        with self.trainer.tracked(trackers, out, asked) as track:

            def on_step(progress: Progress) -> None:
                self.on_step(progress)
                track(progress)

            return self.trainer.train(
                learners,
                more.pop("teacher", None),
                data_seed=data_seed,
                checkpoints=self.context.checkpoint_folder(name),
                on_step=on_step,
                **more,
            )

    def _score(self, learner: Learner, name: str) -> None:
        """Keeps the importance of a model's units under that name; UserError where the model's loss
        is not finite."""
        recipe = self.recipe
        model = whole_model(learner.parts, self.ranks)
        with self.trainer.clock.stage("pruning"):
            importance = self.ranks.first(
                lambda: score(
                    model,
                    scoring_batches(self.trainer.text, recipe.scoring_tokens),
                    method=recipe.scoring_method,
                    depth=recipe.scoring_depth,
                )
            )
        if self.ranks.is_first:
            save_importance(self.context.importance_file(name), importance)

    def _cut(self, source: Teacher | Assistant, shape: Shape) -> PreTrainedModel:
        """A model of `shape` from one whose units are scored."""
        with self.trainer.clock.stage("pruning"):
            whole = load_model(self.context.weights_of(source), dtype=torch.float32)
            return cut(whole, load_importance(self.context.importance_file(source.id)), shape)

    def _failed_assistant(self, cell: Cell) -> str | None:
        """Why the cell cannot begin, if its assistant could not be made."""
        if cell.assistant is None:
            return None
        outcome = self._outcome(cell.assistant)
        if outcome is None:
            return "its assistant was not made"
        return f"its assistant failed: {outcome['failure']}" if "failure" in outcome else None

    def _outcome(self, assistant: Assistant) -> dict[str, Any] | None:
        path = self.context.assistant_outcome(assistant.id)
        return read_json(path) if path.exists() else None

    def _record_cell(self, cell: Cell, heldout: Loss | None, **fields: Any) -> None:
        teacher, assistant = cell.teacher, None
        if cell.assistant is not None:
            outcome = self._outcome(cell.assistant) or {}
            outcome.pop("failure", None)
            assistant = {
                "parameters": cell.assistant.shape.parameters().as_dict(),
                "shape": vars(cell.assistant.shape),
                "tokens": cell.assistant.tokens,
                "learning_rate": cell.assistant.learning_rate,
                **outcome,
            }
        if teacher is not None:
            fields |= {
                "teacher": teacher.id,
                "teacher_size": teacher.size,
                "teacher_parameters": teacher.shape.parameters().as_dict(),
            }
        self._record(
            cell,
            heldout,
            kind=cell.kind,
            init=cell.init,
            student_size=cell.student_size,
            tokens=cell.budget,
            alpha=cell.alpha,
            assistant=assistant,
            equal_flops_to=cell.equal_flops_to,
            **fields,
        )

    def _record(self, run: Teacher | Cell, heldout: Loss | None, **fields: Any) -> None:
        context, training = self.context, self.recipe.training
        values = {
            "schema": 1,
            "id": run.id,
            "status": "failed" if fields["failure"] else "done",
            "architecture": run.architecture,
            "seed": run.seed,
            "parameters": run.shape.parameters().as_dict(),
            "shape": vars(run.shape),
            "tokens": run.tokens,
            "steps": run.tokens // training.batch_tokens,
            "learning_rate": run.learning_rate,
            "recipe_hash": self.recipe.hash(),
            "corpus_hash": self.trainer.text.corpus_hash,
            "flops": run.work.flops(self.recipe, self.trainer.heldout.tokens),
            "heldout": None if heldout is None else heldout.as_dict(),
            "wall_seconds": time.monotonic() - self.start,
            "machine": machine(context.device, context.threads),
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.trainer.facts(),
            **fields,
        }
        if self.ranks.is_first:
            write_record(context.record_folder(run.id), record_from_dict(values, source=run.id))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
