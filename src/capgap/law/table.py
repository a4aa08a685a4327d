"""The records as one flat table: grid.csv."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from capgap.law.cells import baseline_key, baselines_by_key
from capgap.records import RunRecord, write_text_atomically

COUNT_COLUMNS = (
    "seed",
    "tokens",
    "student_size",
    "student_parameters",
    "teacher_size",
    "teacher_parameters",
    "assistant_parameters",
    "flops_total",
)
COLUMNS = (
    "id",
    "kind",
    "status",
    "architecture",
    "init",
    "seed",
    "tokens",
    "student_size",
    "student_parameters",
    "teacher_size",
    "teacher_parameters",
    "assistant_parameters",
    "loss",
    "loss_stderr",
    "bits_per_byte",
    "bits_per_byte_stderr",
    "teacher_loss",
    "after_cut_loss",
    "baseline_loss",
    "gain",
    "kl",
    "agreement",
    "flops_total",
    "wall_seconds",
)


def grid_table(records: Sequence[RunRecord]) -> pandas.DataFrame:
    """One row for each record, sorted by id: sizes in parameters, losses in nats per token.

    `gain` is the baseline's loss minus the cell's, `kl` and `agreement` are the last ones logged
    in training. Missing values are missing, also in the whole-number columns.
    """
    baselines = baselines_by_key(records)
    teachers = {record.id: record for record in records if record.kind == "teacher"}
    rows = [
        _row(record, baselines.get(baseline_key(record)), teachers.get(record.teacher or ""))
        for record in sorted(records, key=lambda record: record.id)
    ]
    table = pandas.DataFrame(rows, columns=list(COLUMNS))
    # FLOPs of a large run exceed 64-bit integers, so those stay Python integers
    counts = {name: "Int64" for name in COUNT_COLUMNS if name != "flops_total"}
    return table.astype(counts | {"flops_total": object})


def write_grid(records: Sequence[RunRecord], path: Path | str) -> None:
    """Write `grid_table(records)` as CSV in one atomic step; a missing value is an empty field."""
    write_text_atomically(path, grid_table(records).to_csv(index=False, lineterminator="\n"))


def _row(
    record: RunRecord, baseline: RunRecord | None, teacher: RunRecord | None
) -> dict[str, Any]:
    heldout, student = record.heldout, record.kind != "teacher"
    above = record.teacher_parameters if student else record.parameters
    row: dict[str, Any] = {
        "id": record.id,
        "kind": record.kind,
        "status": record.status,
        "architecture": record.architecture,
        "init": record.init,
        "seed": record.seed,
        "tokens": record.tokens,
        "student_size": record.student_size,
        "student_parameters": record.parameters.non_embedding if student else None,
        "teacher_size": record.teacher_size,
        "teacher_parameters": above.non_embedding if above else None,
        "assistant_parameters": None
        if record.assistant is None
        else record.assistant.parameters.non_embedding,
        "teacher_loss": teacher.heldout.loss if teacher and teacher.heldout else None,
        "after_cut_loss": record.after_cut.loss if record.after_cut else None,
        "kl": _last(record.curve.kl),
        "agreement": _last(record.curve.agreement),
        "flops_total": record.flops.total,
        "wall_seconds": record.wall_seconds,
    }
    if heldout is not None:
        row |= {
            "loss": heldout.loss,
            "loss_stderr": heldout.loss_stderr,
            "bits_per_byte": heldout.bits_per_byte,
            "bits_per_byte_stderr": heldout.bits_per_byte_stderr,
        }
    if record.kind == "cell" and baseline is not None and baseline.heldout is not None:
        row["baseline_loss"] = baseline.heldout.loss
        if heldout is not None:
            row["gain"] = baseline.heldout.loss - heldout.loss
    return row


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)
