"""Records of runs -> one tidy table of cells, and the table of all runs, grid.csv.

A cell is one distilled student. Sizes are non-embedding parameters, losses nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from capgap.artifact import write_text
from capgap.errors import UserError
from capgap.law.law import Excluded
from capgap.law.model import Floats
from capgap.records import RunRecord

LARGEST_VOCABULARY = 1_000_000

KEYS = ["architecture", "init", "tokens", "student_size", "teacher_size", "seed"]
CURVE = KEYS[:4]
FRAME = [*KEYS, "student_parameters", "teacher_parameters", "teacher_tokens"]
FRAME += ["training", "loss_stderr"]
_WHOLE = [*KEYS[2:], "student_parameters", "teacher_parameters", "assistant_parameters"]

# What a run and its baseline share: architecture, init, tokens, student size, seed, and the size of
# the teacher that the first weights were cut out of, None for `fixed` and `scratch`
BaselineKey = tuple[str, str | None, int, int | None, int, int | None]


@dataclass(frozen=True)
class Cells:
    """Finished cells, sorted by curve and teacher.

    frame: a row for each cell with the columns of FRAME; `training` names the run that made its
    teacher. Document arrays [cells, documents] hold summed nats, NaN where there is no such run;
    losses of a table count as those of one document of one token. equal_flops: baselines with the
    FLOPs of the cell instead of its tokens. own_errors: whether `loss_stderr` of a table is the
    noise of each cell alone. missing: columns that a table lacks.
    """

    frame: pandas.DataFrame
    cells: Floats
    baselines: Floats
    teachers: Floats
    document_tokens: Floats
    equal_flops: Floats | None = None
    own_errors: bool = False
    excluded: tuple[Excluded, ...] = ()
    missing: tuple[str, ...] = ()
    records: tuple[RunRecord, ...] = field(default=(), repr=False)

    @cached_property
    def losses(self) -> Floats:
        """[cells] nats per token."""
        return per_token(self.cells, self.document_tokens)


def per_token(rows: Floats, tokens: Floats) -> Floats:
    """Nats per token [rows] from summed nats [rows, documents]."""
    return np.asarray(rows.sum(axis=-1) / tokens.sum())


def baseline_key(record: RunRecord) -> BaselineKey:
    """What a cell and its baseline have in common."""
    cut_from = record.teacher_size if record.init in ("pruned", "chain") else None
    student = (record.student_size, record.seed)
    return (record.architecture, record.init, record.tokens, *student, cut_from)


def baselines_by_key(records: Iterable[RunRecord]) -> dict[BaselineKey, RunRecord]:
    """Finished baselines by `baseline_key`; UserError if two have the same."""
    baselines: dict[BaselineKey, RunRecord] = {}
    for record in records:
        if record.kind == "baseline" and record.status == "done" and not record.equal_flops_to:
            _claim(baselines, baseline_key(record), record)
    return baselines


def _claim(owners: dict[Any, RunRecord], key: Any, record: RunRecord) -> None:
    other = owners.setdefault(key, record)
    if other is not record:
        raise UserError(
            f"records {other.id} and {record.id} are the same run of the grid; "
            "keep one, or give them different seeds"
        )


def cells_of(records: Sequence[RunRecord]) -> Cells:
    """The finished cells of a sweep.

    UserError if two records are the same cell, or if records of one architecture were evaluated on
    different held-out documents, so that their losses cannot be compared.
    """
    done = [record for record in records if record.status == "done" and record.heldout]
    excluded = [
        Excluded(id=record.id, reason=f"failed: {record.failure.message}")
        for record in records
        if record.failure is not None and record.status == "failed"
    ]
    first: dict[str, RunRecord] = {}
    cells: dict[Any, RunRecord] = {}
    for record in done:
        other = first.setdefault(record.architecture, record)
        assert record.heldout is not None
        assert other.heldout is not None
        if record.heldout.document_tokens != other.heldout.document_tokens:
            raise UserError(
                f"records {other.id} and {record.id} were evaluated on different held-out "
                "documents, so their losses cannot be compared; evaluate them on the same corpus"
            )
        limit = math.log((record.shape or {}).get("vocabulary") or LARGEST_VOCABULARY)
        if record.kind == "cell" and record.heldout.loss > limit:
            reason = f"its loss is above ln(vocabulary), {limit:.2f}: it has learnt nothing"
            excluded.append(Excluded(id=record.id, reason=reason))
        elif record.kind == "cell":
            _claim(cells, tuple(getattr(record, key) for key in KEYS), record)
    ordered = [cells[key] for key in sorted(cells)]
    by_id = {record.id: record for record in done if record.kind == "teacher"}
    teachers = [by_id.get(cell.teacher or "") for cell in ordered]
    baselines = baselines_by_key(done)
    longer = {record.equal_flops_to: record for record in done if record.equal_flops_to}
    rows = [
        {key: getattr(cell, key) for key in KEYS}
        | {
            "student_parameters": cell.parameters.non_embedding,
            "teacher_parameters": getattr(cell.teacher_parameters, "non_embedding", math.nan),
            "teacher_tokens": float(teacher.tokens) if teacher and teacher.tokens else math.nan,
            "training": cell.teacher,
        }
        for cell, teacher in zip(ordered, teachers, strict=True)
    ]
    tokens = ordered[0].heldout.document_tokens if ordered and ordered[0].heldout else [1]

    def documents(runs: Iterable[RunRecord | None]) -> Floats:
        unknown = [math.nan] * len(tokens)
        own = [run.heldout.document_losses if run and run.heldout else unknown for run in runs]
        return np.array(own, dtype=float).reshape(-1, len(tokens))

    return Cells(
        frame=pandas.DataFrame(rows, columns=FRAME),
        cells=documents(ordered),
        baselines=documents(baselines.get(baseline_key(cell)) for cell in ordered),
        teachers=documents(teachers),
        document_tokens=np.array(tokens, dtype=float),
        equal_flops=documents(longer.get(cell.id) for cell in ordered),
        excluded=tuple(excluded),
        records=tuple(records),
    )


def run_rows(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """One row for each record, sorted by id: sizes in parameters, losses in nats per token; what
    is missing is None.

    `gain` is the baseline's loss minus the cell's, `kl` and `agreement` are the last ones logged
    in training.
    """
    baselines = baselines_by_key(records)
    teachers = {record.id: record for record in records if record.kind == "teacher"}
    names = ("id", "kind", "status", "architecture", "init", "seed", "tokens", "student_size")
    losses = ("loss", "loss_stderr", "bits_per_byte", "bits_per_byte_stderr")
    rows = []
    for record in sorted(records, key=lambda record: record.id):
        heldout, is_teacher = record.heldout, record.kind == "teacher"
        above = record.parameters if is_teacher else record.teacher_parameters
        teacher = teachers.get(record.teacher or "")
        baseline = baselines.get(baseline_key(record)) if record.kind == "cell" else None
        alone = baseline.heldout.loss if baseline and baseline.heldout else None
        assistant = record.assistant and record.assistant.parameters.non_embedding
        rows.append(
            {
                **{name: getattr(record, name) for name in names},
                "student_parameters": None if is_teacher else record.parameters.non_embedding,
                "teacher": record.id if is_teacher else record.teacher,
                "teacher_size": record.teacher_size,
                "teacher_parameters": above and above.non_embedding,
                "assistant_parameters": assistant,
                **{name: heldout and getattr(heldout, name) for name in losses},
                "teacher_loss": teacher.heldout.loss if teacher and teacher.heldout else None,
                "after_cut_loss": record.after_cut and record.after_cut.loss,
                "baseline_loss": alone,
                "gain": None if alone is None or heldout is None else alone - heldout.loss,
                "kl": _last(record.curve.kl),
                "agreement": _last(record.curve.agreement),
                "flops_total": record.flops.total,
                "wall_seconds": record.wall_seconds,
            }
        )
    return rows


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def grid_table(records: Sequence[RunRecord]) -> pandas.DataFrame:
    """`run_rows(records)`; missing values are missing, also in the whole-number columns."""
    table = pandas.DataFrame(run_rows(records))
    if table.empty:
        return table
    # FLOPs of a large run exceed 64-bit integers, so those stay Python integers
    return table.astype(dict.fromkeys(_WHOLE, "Int64") | {"flops_total": object})


def write_grid(records: Sequence[RunRecord], path: Path | str) -> None:
    """Write `grid_table(records)` as CSV in one atomic step; a missing value is an empty field."""
    write_text(path, grid_table(records).to_csv(index=False, lineterminator="\n"))
