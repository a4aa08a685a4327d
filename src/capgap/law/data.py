"""A sweep's records -> one tidy table of cells, and the table of all runs, grid.csv.

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

from capgap.errors import UserError
from capgap.law.law import Excluded
from capgap.law.model import Floats
from capgap.records import RunRecord, write_text_atomically

# what a table may leave away, and what is not known then
LOST = {
    "teacher": "one training of every size is assumed to have taught all seeds",
    "seed": "every row counts as a run of one seed",
    "loss_stderr": "the losses' own standard errors are not known",
    "teacher_loss": "whether the teachers improve as they grow is not known",
    "baseline_loss": "what distilling gains is not known",
}
LARGEST_VOCABULARY = 1_000_000

# what a run must share with its baseline: the last entry is the size of the teacher that the
# initial weights were cut out of, None for `fixed` and `scratch`
BaselineKey = tuple[str, str | None, int, int | None, int, int | None]


@dataclass(frozen=True)
class Cells:
    """Finished cells, sorted by curve and teacher.

    frame: a row a cell, with the columns of FRAME; `training` names the one that made its teacher.
    Document arrays [cells, documents] hold summed nats, NaN where there is no such run; a table's
    losses count as those of one document of one token. equal_flops: baselines that have the cell's
    FLOPs in place of its tokens. own_errors: whether a table's `loss_stderr`
    is each cell's own noise. missing: columns that a table does not have.
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


KEYS = ["architecture", "init", "tokens", "student_size", "teacher_size", "seed"]
CURVE = KEYS[:4]
FRAME = [*KEYS, "student_parameters", "teacher_parameters", "teacher_tokens"]
FRAME += ["training", "loss_stderr"]


def per_token(rows: Floats, tokens: Floats) -> Floats:
    """Nats per token [rows] from summed nats [rows, documents]."""
    return np.asarray(rows.sum(axis=-1) / tokens.sum())


def baseline_key(record: RunRecord) -> BaselineKey:
    """What a cell and its baseline share: architecture, init, tokens, student, seed and, where the
    weights were cut out of a cell's own teacher, that teacher's size."""
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
        is_longer = record.equal_flops_to is not None
        if record.kind == "baseline" and record.status == "done" and not is_longer:
            _claim(found, baseline_key(record), record)
    return found


def cells_of(records: Sequence[RunRecord]) -> Cells:
    """The finished cells of a sweep.

    Raises UserError if two cells claim one place of the grid, or if records of one architecture
    were evaluated on different held-out documents, which would make their losses incomparable.
    """
    done = [record for record in records if record.status == "done" and record.heldout]
    _check_documents(done)
    excluded = [
        Excluded(id=record.id, reason=f"failed: {record.failure.message}")
        for record in records
        if record.failure is not None and record.status == "failed"
    ]
    baselines = baselines_by_key(done)
    teachers = {record.id: record for record in done if record.kind == "teacher"}
    longer = {record.equal_flops_to: record for record in done if record.equal_flops_to}
    places: dict[Any, RunRecord] = {}
    for record in done:
        if record.kind != "cell":
            continue
        limit = math.log((record.shape or {}).get("vocabulary") or LARGEST_VOCABULARY)
        if record.heldout is not None and record.heldout.loss > limit:
            reason = f"its loss is above ln(vocabulary), {limit:.2f}: it has learnt nothing"
            excluded.append(Excluded(id=record.id, reason=reason))
            continue
        _claim(places, tuple(getattr(record, key) for key in KEYS), record)
    ordered = [places[place] for place in sorted(places)]
    above = [teachers.get(cell.teacher or "") for cell in ordered]
    rows = [
        {key: getattr(cell, key) for key in KEYS}
        | {
            "student_parameters": cell.parameters.non_embedding,
            "teacher_parameters": getattr(cell.teacher_parameters, "non_embedding", math.nan),
            "teacher_tokens": math.nan if one is None or one.tokens <= 0 else float(one.tokens),
            "training": cell.teacher,
            "loss_stderr": math.nan,
        }
        for cell, one in zip(ordered, above, strict=True)
    ]
    tokens = ordered[0].heldout.document_tokens if ordered and ordered[0].heldout else [1]
    return Cells(
        frame=pandas.DataFrame(rows, columns=FRAME),
        cells=_documents(ordered, len(tokens)),
        baselines=_documents([baselines.get(baseline_key(cell)) for cell in ordered], len(tokens)),
        teachers=_documents(above, len(tokens)),
        document_tokens=np.array(tokens, dtype=float),
        equal_flops=_documents([longer.get(cell.id) for cell in ordered], len(tokens)),
        excluded=tuple(excluded),
        records=tuple(records),
    )


def _documents(records: Sequence[RunRecord | None], number: int) -> Floats:
    """Summed nats [records, documents]; NaN rows for None."""
    rows = np.full((len(records), number), np.nan)
    for row, record in zip(rows, records, strict=True):
        if record is not None and record.heldout is not None:
            row[:] = record.heldout.document_losses
    return rows


def _claim(places: dict[Any, RunRecord], place: Any, record: RunRecord) -> None:
    other = places.setdefault(place, record)
    if other is not record:
        raise UserError(
            f"records {other.id} and {record.id} are the same run of the grid; "
            "keep one, or give them different seeds"
        )


def _check_documents(records: Sequence[RunRecord]) -> None:
    first: dict[str, RunRecord] = {}
    for record in records:
        other = first.setdefault(record.architecture, record)
        assert record.heldout is not None
        assert other.heldout is not None
        if record.heldout.document_tokens != other.heldout.document_tokens:
            raise UserError(
                f"records {other.id} and {record.id} were evaluated on different held-out "
                "documents, so their losses cannot be compared; evaluate them on the same corpus"
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
    table = pandas.DataFrame(rows)
    if table.empty:
        return table
    # FLOPs of a large run exceed 64-bit integers, so those stay Python integers
    return table.astype(dict.fromkeys(_WHOLE, "Int64") | {"flops_total": object})


_WHOLE = (
    "seed",
    "tokens",
    "student_size",
    "student_parameters",
    "teacher_size",
    "teacher_parameters",
    "assistant_parameters",
)


def write_grid(records: Sequence[RunRecord], path: Path | str) -> None:
    """Write `grid_table(records)` as CSV in one atomic step; a missing value is an empty field."""
    write_text_atomically(path, grid_table(records).to_csv(index=False, lineterminator="\n"))


def _row(
    record: RunRecord, baseline: RunRecord | None, teacher: RunRecord | None
) -> dict[str, Any]:
    heldout, is_teacher = record.heldout, record.kind == "teacher"
    above = record.parameters if is_teacher else record.teacher_parameters
    names = ("id", "kind", "status", "architecture", "init", "seed", "tokens", "student_size")
    losses = ("loss", "loss_stderr", "bits_per_byte", "bits_per_byte_stderr")
    alone = baseline.heldout.loss if baseline is not None and baseline.heldout else None
    if record.kind != "cell":
        alone = None
    return {name: getattr(record, name) for name in names} | {
        "student_parameters": None if is_teacher else record.parameters.non_embedding,
        "teacher": record.id if is_teacher else record.teacher,
        "teacher_size": record.teacher_size,
        "teacher_parameters": above and above.non_embedding,
        "assistant_parameters": record.assistant and record.assistant.parameters.non_embedding,
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


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)
