"""The model card of a sweep's best student, from the sweep's records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgap.export.card import Card, Loss, objective
from capgap.export.licence import Licence
from capgap.records import RunRecord, read_records
from capgap.sizes import format_count


def sweep_card(recipe: dict[str, Any], best: RunRecord, records: Sequence[RunRecord]) -> Card:
    """`recipe` as sweep.json holds it. The licence is that of text and teacher, which a sweep does
    not know."""
    assert best.heldout is not None
    assert best.teacher_parameters is not None
    # where it lies is nobody's business
    source = Path(recipe["corpus"]["source"]).name
    made = (
        f"recipe: `{recipe['name']}` of a capgap sweep; text: `{source}`, "
        f"{format_count(best.steps * best.batch_tokens)} tokens",
        f"start: {_beginning(best)}",
        objective(best.alpha, best.divergence, best.temperature),
        f"peak learning rate {best.learning_rate:g}, batches of {best.batch_tokens} tokens, seed "
        f"{best.seed}",
    )
    return Card(
        name=best.id,
        architecture=best.architecture,
        non_embedding=best.parameters.non_embedding,
        total=best.parameters.total,
        licence=Licence(None, "a sweep does not know that of its teachers and its text"),
        teacher=best.teacher,
        teacher_non_embedding=best.teacher_parameters.non_embedding,
        made=made,
        heldout_tokens=best.heldout.tokens,
        losses=tuple(_losses(best, records)),
    )


def card_of_student(folder: Path) -> Card | None:
    """That of OUT/student, from what lies in OUT; None where it is no student of a sweep."""
    marker = folder.resolve().parent / "sweep.json"
    if folder.resolve().name != "student" or not marker.is_file():
        return None
    sweep = json.loads(marker.read_text())
    records = read_records(marker.parent)
    cell = (sweep.get("best") or {}).get("cell")
    best = next((record for record in records if record.id == cell), None)
    return None if best is None else sweep_card(sweep["recipe"], best, records)


def _losses(best: RunRecord, records: Sequence[RunRecord]) -> list[Loss]:
    """Of the student, its teacher, and its baseline without one."""
    rows = [("this student", best)]
    rows += [("its teacher", record) for record in records if record.id == best.teacher]
    rows += [
        ("the same student by cross-entropy alone", record)
        for record in records
        if record.kind == "baseline"
        and (record.init, record.student_size, record.tokens, record.seed)
        == (best.init, best.student_size, best.tokens, best.seed)
        and record.teacher in (None, best.teacher)
    ]
    return [
        Loss(
            what=what,
            non_embedding=record.parameters.non_embedding,
            loss=record.heldout.loss,
            bits_per_byte=record.heldout.bits_per_byte,
        )
        for what, record in rows
        if record.heldout is not None
    ]


def _beginning(best: RunRecord) -> str:
    """What the student was before it was trained."""
    if best.assistant is not None:
        size = format_count(best.assistant.parameters.non_embedding)
        tokens = format_count(best.assistant.tokens)
        return (
            f"cut out of an assistant of {size}, which was cut out of {best.teacher}, distilled "
            f"from it on {tokens} tokens, and then was the teacher"
        )
    beginnings = {"fixed": "cut out of the smallest teacher", "scratch": "random weights"}
    return beginnings.get(str(best.init), f"cut out of {best.teacher}")
