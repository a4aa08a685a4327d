"""The model card of a sweep's best student, from the sweep's records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgap.export.card import Card, Loss
from capgap.export.licence import Licence
from capgap.records import RunRecord, read_records
from capgap.sizes import format_count


def sweep_card(recipe: dict[str, Any], best: RunRecord, records: Sequence[RunRecord]) -> Card:
    """`recipe` as sweep.json holds it. The licence is that of text and teacher, which a sweep does
    not know."""
    heldout, teacher_parameters = best.heldout, best.teacher_parameters
    assert heldout is not None
    assert teacher_parameters is not None
    rows = [
        Loss(
            what=what,
            non_embedding=record.parameters.non_embedding,
            loss=record.heldout.loss,
            bits_per_byte=record.heldout.bits_per_byte,
        )
        for what, record in _compared(best, records)
        if record.heldout is not None
    ]
    # where it lies is nobody's business
    source = Path(recipe["corpus"]["source"]).name
    made = (
        f"recipe: `{recipe['name']}` of a capgap sweep; text: `{source}`, "
        f"{format_count(best.steps * best.batch_tokens)} tokens",
        f"start: {_began(best)}",
        f"loss: {1 - best.alpha:g} cross-entropy + {best.alpha:g} {best.divergence} to the teacher "
        f"at temperature {best.temperature:g}",
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
        teacher_non_embedding=teacher_parameters.non_embedding,
        made=made,
        heldout_tokens=heldout.tokens,
        losses=tuple(rows),
    )


def card_of_student(folder: Path) -> Card | None:
    """That of OUT/student, from what lies in OUT; None where it is no student of a sweep."""
    marker = folder.resolve().parent / "sweep.json"
    if folder.resolve().name != "student" or not marker.is_file():
        return None
    found = json.loads(marker.read_text())
    records = read_records(marker.parent)
    cell = (found.get("best") or {}).get("cell")
    best = next((record for record in records if record.id == cell), None)
    return None if best is None else sweep_card(found["recipe"], best, records)


def _compared(best: RunRecord, records: Sequence[RunRecord]) -> list[tuple[str, RunRecord]]:
    """The student, its teacher, and its baseline without one."""
    teacher = next(record for record in records if record.id == best.teacher)
    baselines = [
        record
        for record in records
        if record.kind == "baseline"
        and (record.init, record.student_size, record.tokens, record.seed)
        == (best.init, best.student_size, best.tokens, best.seed)
        and record.teacher in (None, best.teacher)
    ]
    rows = [("this student", best), ("its teacher", teacher)]
    return rows + [("the same student by cross-entropy alone", record) for record in baselines]


def _began(best: RunRecord) -> str:
    return {
        "pruned": f"cut out of {best.teacher}",
        "fixed": "cut out of the smallest teacher",
        "scratch": "random weights",
        "chain": _by_way_of(best),
    }[str(best.init)]


def _by_way_of(best: RunRecord) -> str:
    """How a chain went; empty for a direct cell."""
    if best.assistant is None:
        return ""
    size = format_count(best.assistant.parameters.non_embedding)
    return (
        f"cut out of an assistant of {size}, which was cut out of {best.teacher}, distilled from "
        f"it on {format_count(best.assistant.tokens)} tokens, and then was the teacher"
    )
