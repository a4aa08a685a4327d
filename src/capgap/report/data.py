"""What the report reads: the files of a sweep's output folder, and selections of its records."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capgap.artifact import read_json
from capgap.errors import UserError
from capgap.law.law import Curve, Group, Law, Line, read_law
from capgap.records import RunRecord, read_records

# the order of pages; each has the same look in every report
INITS = ("pruned", "fixed", "scratch", "chain")
PARTS = ("curves", "contrasts", "lines", "lucks", "surfaces", "warnings", "excluded")
NO_LAW = Law.model_validate({"confidence": 0.9} | dict.fromkeys(PARTS, ()))


@dataclass(frozen=True)
class Results:
    """The parsed files of one output folder; what was not written is empty."""

    folder: Path
    sweep: Mapping[str, Any]
    records: tuple[RunRecord, ...]
    law: Law
    samples: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def law_alone(self) -> bool:
        """Whether there is a law without a sweep behind it."""
        return not self.sweep and not self.records

    @property
    def lines(self) -> list[Line]:
        """The law's, one of each group of curves, in the order of pages."""
        return sorted(self.law.lines, key=lambda line: place_of(line.group.init))

    @property
    def students(self) -> list[int]:
        """All student sizes: the position in this list decides a student's look."""
        found = {record.student_size for record in self.records if record.student_size}
        return sorted(found | {curve.student_size for curve in self.law.curves})


def load_results(folder: Path) -> Results:
    """Read `sweep.json`, the records, and where they are there `law.json`, `samples.json` and
    `search.json` of an output folder.

    Raises UserError where the folder is not a sweep's output or one of its files is broken.
    """
    if not (folder / "sweep.json").is_file():
        raise UserError(f"{folder} holds no sweep.json: name the output folder of a capgap sweep")
    records = tuple(read_records(folder)) if (folder / "records").is_dir() else ()
    law = read_law(folder / "law.json") if (folder / "law.json").is_file() else NO_LAW
    sweep, samples, search = (
        _read_object(folder / f"{name}.json") for name in ("sweep", "samples", "search")
    )
    return Results(folder, sweep, records, law, samples, search)


def _read_object(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def place_of(init: str) -> int:
    """The place of an init among all; after them what is none of them."""
    return INITS.index(init) if init in INITS else len(INITS)


def slug(group: Group) -> str:
    """The group as a part of a file name."""
    tokens = group.tokens or f"{group.tokens_per_parameter:.3g}-per-parameter"
    return safe(f"{group.architecture}-{group.init}-{tokens}")


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


def cells_of_curve(results: Results, curve: Curve) -> dict[int, RunRecord]:
    """The finished cells of a curve by the size of their teacher, each of its first seed."""
    names = ("architecture", "init", "tokens", "student_size")
    cells = sorted(done(results.records, "cell"), key=lambda cell: -cell.seed)
    own = [c for c in cells if all(getattr(c, name) == getattr(curve, name) for name in names)]
    return {cell.teacher_size or 0: cell for cell in own}
