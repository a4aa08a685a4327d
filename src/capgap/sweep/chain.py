"""Chains: the assistant between a teacher and a student, made before the student's own turn."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.errors import UserError
from capgap.models.build import load_model, save_model
from capgap.models.shape import Shape
from capgap.prune.scores import load_importance
from capgap.prune.surgery import cut
from capgap.records import write_json_atomically
from capgap.sweep.context import Context
from capgap.sweep.plan import Assistant, Cell, Column
from capgap.sweep.task import Task, teacher_path
from capgap.train.learner import Learner


def make_assistant(task: Task, column: Column) -> None:
    """Cuts the column's assistant out of the teacher, distils it, scores its units.

    What is done already stays; what happened is written last, failures too.
    """
    context, assistant, teacher = task.context, column.assistant, column.teacher
    assert assistant is not None
    assert teacher is not None
    if context.assistant_outcome(assistant.id).exists():
        return
    source = teacher_path(context, teacher)
    model = cut_from(task, source, teacher.id, assistant.shape)
    outcome: dict[str, Any] = {"after_cut": _finite(task.evaluate(model).loss)}
    training = context.recipe.training
    steps = assistant.tokens // training.batch_tokens
    learner = Learner(assistant.id, model, steps, assistant.learning_rate, training.alpha)
    settings = task.settings("student", column.seed)
    task.run([learner], assistant.id, settings, teacher=task.load_teacher(source))
    heldout = None if learner.failure else task.evaluate(model)
    if heldout is not None and math.isfinite(heldout.loss):
        outcome |= {"loss": heldout.loss, "loss_stderr": heldout.loss_stderr}
        try:
            task.score(model, assistant.id)
        except UserError as error:
            outcome["failure"] = str(error)
        save_model(model, context.assistant_folder(assistant.id), task.corpus.tokenizer)
    else:
        failure = learner.failure or {"message": "non-finite held-out loss"}
        outcome["failure"] = failure["message"]
    write_json_atomically(context.assistant_outcome(assistant.id), outcome)


def failed_assistant(context: Context, cell: Cell) -> str | None:
    """Why the cell cannot begin, if its assistant could not be made."""
    if cell.assistant is None:
        return None
    path = context.assistant_outcome(cell.assistant.id)
    if not path.exists():
        return "its assistant was not made"
    failure = json.loads(path.read_text()).get("failure")
    return None if failure is None else f"its assistant failed: {failure}"


def assistant_run(context: Context, assistant: Assistant) -> dict[str, Any]:
    """What a record says of it."""
    path = context.assistant_outcome(assistant.id)
    outcome = json.loads(path.read_text()) if path.exists() else {}
    outcome.pop("failure", None)
    return {
        "parameters": assistant.shape.parameters().as_dict(),
        "shape": vars(assistant.shape),
        "tokens": assistant.tokens,
        "learning_rate": assistant.learning_rate,
        **outcome,
    }


def cut_from(task: Task, source: Path | str, name: str, shape: Shape) -> PreTrainedModel:
    """A model of `shape` from the model in `source`, whose scores are kept under `name`."""
    with task.clock.stage("pruning"):
        whole = load_model(source, dtype=torch.float32)
        importance = load_importance(task.context.importance_file(name))
        return cut(whole, importance, shape).to(task.context.device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
