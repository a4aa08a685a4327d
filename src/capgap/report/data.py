"""What the report reads: the files of a sweep's output folder, and selections of its records."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from capgap.errors import UserError
from capgap.law.cells import Kind
from capgap.records import RunRecord, read_records


@dataclass(frozen=True)
class Results:
    """The parsed files of one output folder; what was not written is empty."""

    folder: Path
    sweep: Mapping[str, Any]
    records: tuple[RunRecord, ...]
    law: Mapping[str, Any]
    samples: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def law_alone(self) -> bool:
        """Whether there is a law without a sweep behind it."""
        return not self.sweep and not self.records


def load_results(folder: Path) -> Results:
    """Read `sweep.json`, the records, and where they are there `law.json`, `samples.json` and
    `search.json` of an output folder.

    Raises UserError where the folder is not a sweep's output or one of its files is broken.
    """
    if not (folder / "sweep.json").is_file():
        raise UserError(f"{folder} holds no sweep.json: name the output folder of a capgap sweep")
    started = (folder / "records").is_dir()
    return Results(
        folder=folder,
        sweep=_read_object(folder / "sweep.json"),
        records=tuple(read_records(folder)) if started else (),
        law=_read_object(folder / "law.json"),
        samples=_read_object(folder / "samples.json"),
        search=_read_object(folder / "search.json"),
    )


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): delete it and run the sweep again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def kind_of(item: Mapping[str, Any]) -> Kind:
    """Which curves a curve or a law of law.json belongs to."""
    return Kind(item["architecture"], item["init"], item["tokens"])


def law_of(results: Results, kind: Kind) -> Mapping[str, Any] | None:
    """The law of one kind of curves, identified or not."""
    return next((law for law in results.law.get("laws", ()) if kind_of(law) == kind), None)


def belongs(record: RunRecord, kind: Kind) -> bool:
    return (record.architecture, record.init, record.tokens) == (
        kind.architecture,
        kind.init,
        kind.tokens,
    )


def slug(kind: Kind) -> str:
    """The kind as a part of a file name."""
    return safe(f"{kind.architecture}-{kind.init}-{kind.tokens}")


def safe(name: str) -> str:
    """The name with a hyphen for all that a file name or a link could stumble over."""
    return re.sub(r"[^\w.+-]+", "-", name)


def done(records: Iterable[RunRecord], *kinds: str) -> list[RunRecord]:
    """Records of these kinds ("teacher", "cell", "baseline") that finished."""
    return [record for record in records if record.kind in kinds and record.status == "done"]


def heldout_loss(record: RunRecord) -> float:
    """Held-out loss in nats per token of a run that finished."""
    assert record.heldout is not None, record.id
    return record.heldout.loss


def kinds_of(results: Results) -> list[Kind]:
    """Every kind of curve that has a cell, finished or not, in a stable order."""
    cells = (record for record in results.records if record.kind == "cell")
    found = {Kind(cell.architecture, cell.init or "", cell.tokens) for cell in cells}
    return sorted(found | {kind_of(curve) for curve in results.law.get("curves", ())})


def curves_of(results: Results, kind: Kind) -> list[Mapping[str, Any]]:
    """The law's curves of one kind, smallest student first; those without points left out."""
    held = [c for c in results.law.get("curves", ()) if kind_of(c) == kind and c["points"]]
    return sorted(held, key=lambda curve: curve["student_size"])


def student_sizes(results: Results) -> list[int]:
    """All student sizes of the sweep: the position in this list decides a student's look."""
    found = {record.student_size for record in results.records if record.student_size}
    return sorted(found | {curve["student_size"] for curve in results.law.get("curves", ())})


@dataclass(frozen=True)
class Ends:
    """Of one student in one kind: the cell of its best teacher, and that of its largest."""

    student_size: int
    best: RunRecord
    largest: RunRecord


def best_and_largest(results: Results, kind: Kind) -> list[Ends]:
    """One entry for every student with a finished cell.

    The best teacher is the one with the lowest mean over seeds; of several seeds the lowest is
    taken.
    """
    by_student: dict[int, dict[int, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for cell in done(results.records, "cell"):
        if belongs(cell, kind):
            by_student[cell.student_size or 0][cell.teacher_size or 0].append(cell)
    ends = []
    for student, by_teacher in sorted(by_student.items()):
        means = {size: fmean(map(heldout_loss, held)) for size, held in by_teacher.items()}
        best = min(sorted(means), key=lambda size: means[size])
        first = {size: min(held, key=lambda c: c.seed) for size, held in by_teacher.items()}
        ends.append(Ends(student, first[best], first[max(means)]))
    return ends
