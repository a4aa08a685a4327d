"""Records -> the arrays that a curve is fitted on.

T is a teacher's and S a student's size, both in non-embedding parameters.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capgap.errors import UserError
from capgap.records import RunRecord
from capgap.sizes import format_count

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

# what a run must share with its baseline: the last entry is the size of the teacher that the
# initial weights were cut out of, None for `fixed` and `scratch`
BaselineKey = tuple[str, str | None, int, int | None, int, int | None]


@dataclass(frozen=True, order=True)
class Kind:
    """Curves that differ only in their student: one law is fitted to each kind."""

    architecture: str
    init: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.architecture}, {self.init}, {format_count(self.tokens)} tokens"


@dataclass(frozen=True)
class CurveData:
    """All cells of one student over its teachers.

    Document arrays hold summed nats [cells, documents] with one column for each held-out
    document; a row is NaN where there is no baseline or no teacher record. A table's losses count
    as those of one document of one token.
    """

    kind: Kind
    student_size: int
    student_parameters: int
    teacher_sizes: tuple[int, ...]
    teacher_parameters: Floats  # [teachers], ascending
    teacher_tokens: Floats  # [teachers] that they were trained on; NaN where it is not known
    cell_teacher: Integers  # [cells], index into the teachers
    cell_seed: Integers  # [cells]
    cell_documents: Floats
    baseline_documents: Floats
    teacher_documents: Floats
    document_tokens: Floats  # [documents]
    cell_stderr: Floats | None = None  # [cells] nats per token, as a table states them
    independent_errors: bool = False  # whether those are each cell's own

    def __str__(self) -> str:
        return f"{self.kind}, student {format_count(self.student_parameters)}"

    @property
    def num_teachers(self) -> int:
        return len(self.teacher_sizes)

    @property
    def num_seeds(self) -> int:
        """Seeds that occur at all; a teacher may have fewer."""
        return len(np.unique(self.cell_seed))


def baseline_key(record: RunRecord) -> BaselineKey:
    """What a cell and its baseline share: architecture, init, tokens, student, seed and, for
    init `pruned`, the teacher that the weights were cut out of."""
    cut_from = record.teacher_size if record.init in ("pruned", "chain") else None
    return (
        record.architecture,
        record.init,
        record.tokens,
        record.student_size,
        record.seed,
        cut_from,
    )


def baselines_by_key(records: Iterable[RunRecord]) -> dict[BaselineKey, RunRecord]:
    """Finished baselines, to be looked up with `baseline_key` of a cell.

    Raises UserError if two baselines claim the same place.
    """
    found: dict[BaselineKey, RunRecord] = {}
    for record in records:
        if record.kind == "baseline" and record.status == "done":
            _claim(found, baseline_key(record), record)
    return found


def excluded_records(records: Iterable[RunRecord]) -> list[dict[str, str]]:
    """Every record that no fit uses, with its reason."""
    return [
        {"id": record.id, "reason": f"failed: {record.failure.message}"}
        for record in records
        if record.failure is not None and record.status == "failed"
    ]


def curves_from_records(records: Sequence[RunRecord]) -> list[CurveData]:
    """Group the finished cells into curves, sorted by kind and student.

    Raises UserError if two cells claim one place of the grid, or if records of one architecture
    were evaluated on different held-out documents, which would make their losses incomparable.
    """
    done = [record for record in records if record.status == "done"]
    for architecture in {record.architecture for record in done}:
        _check_documents([record for record in done if record.architecture == architecture])
    baselines = baselines_by_key(done)
    teachers = {record.id: record for record in done if record.kind == "teacher"}
    groups: dict[tuple[Kind, int], list[RunRecord]] = {}
    for record in done:
        if record.kind == "cell" and record.init is not None and record.student_size is not None:
            kind = Kind(record.architecture, record.init, record.tokens)
            groups.setdefault((kind, record.student_size), []).append(record)
    return [
        _curve(kind, student_size, cells, baselines, teachers)
        for (kind, student_size), cells in sorted(groups.items(), key=lambda group: group[0])
    ]


def document_rows(records: Sequence[RunRecord | None]) -> Floats:
    """Summed nats [records, documents]; NaN rows for None."""
    lengths = [len(r.heldout.document_losses) for r in records if r is not None and r.heldout]
    rows = np.full((len(records), lengths[0] if lengths else 0), np.nan)
    for row, record in zip(rows, records, strict=True):
        if record is not None and record.heldout is not None:
            row[:] = record.heldout.document_losses
    return rows


def _curve(
    kind: Kind,
    student_size: int,
    cells: list[RunRecord],
    baselines: dict[BaselineKey, RunRecord],
    teachers: dict[str, RunRecord],
) -> CurveData:
    places: dict[tuple[int, int], RunRecord] = {}
    for cell in cells:
        _claim(places, (cell.teacher_size or 0, cell.seed), cell)
    ordered = [places[place] for place in sorted(places)]
    sizes = sorted({teacher_size for teacher_size, _ in places})
    reached = [
        [
            cell.teacher_parameters.non_embedding
            for cell in ordered
            if cell.teacher_size == size and cell.teacher_parameters is not None
        ]
        for size in sizes
    ]
    tokens = ordered[0].heldout.document_tokens if ordered[0].heldout else []
    rows = document_rows(ordered)
    own = [baselines.get(baseline_key(cell)) for cell in ordered]
    above = [teachers.get(cell.teacher or "") for cell in ordered]
    empty = np.full_like(rows, np.nan)
    return CurveData(
        kind=kind,
        student_size=student_size,
        # students cut out of different teachers may differ by the 2% that a shape can miss
        student_parameters=round(np.mean([cell.parameters.non_embedding for cell in ordered])),
        teacher_sizes=tuple(sizes),
        teacher_parameters=np.array([np.mean(counts) for counts in reached]),
        teacher_tokens=np.array([_trained_on(size, ordered, teachers) for size in sizes]),
        cell_teacher=np.array([sizes.index(cell.teacher_size or 0) for cell in ordered]),
        cell_seed=np.array([cell.seed for cell in ordered]),
        cell_documents=rows,
        baseline_documents=document_rows(own) if any(own) else empty,
        teacher_documents=document_rows(above) if any(above) else empty,
        document_tokens=np.array(tokens, dtype=np.float64),
    )


def _trained_on(size: int, cells: list[RunRecord], teachers: dict[str, RunRecord]) -> float:
    """Tokens of the teachers of a size; NaN for given ones, of which nobody told."""
    found = [teachers.get(cell.teacher or "") for cell in cells if cell.teacher_size == size]
    tokens = {teacher.tokens for teacher in found if teacher is not None and teacher.tokens > 0}
    return float(tokens.pop()) if len(tokens) == 1 else math.nan


def _claim(places: dict[Any, RunRecord], place: Any, record: RunRecord) -> None:
    other = places.setdefault(place, record)
    if other is not record:
        raise UserError(
            f"records {other.id} and {record.id} are the same run of the grid; "
            "keep one, or give them different seeds"
        )


def _check_documents(records: Sequence[RunRecord]) -> None:
    first = records[0]
    for record in records:
        if record.heldout is None or first.heldout is None:
            continue
        if record.heldout.document_tokens != first.heldout.document_tokens:
            raise UserError(
                f"records {first.id} and {record.id} were evaluated on different held-out "
                "documents, so their losses cannot be compared; evaluate them on the same corpus"
            )
