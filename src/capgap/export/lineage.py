"""The records that tell of a model, and the models that it was made from.

A stage leaves its record in the model's folder or above it. The record names the teacher and the
model that this one began as, whose records lie near them in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capgap.artifact import read_json
from capgap.errors import UserError
from capgap.stage import FieldError

CUT, DISTILLED, EVALUATED = "pruning.json", "distill.json", "evaluate.json"
ADAPTED, INSTRUCTED, PREFERRED = "adapt.json", "instruct.json", "prefer.json"
KINDS = (PREFERRED, INSTRUCTED, ADAPTED, DISTILLED, CUT, EVALUATED)
# The keys that tell a kind; the others are alike and told by the file's name: OUT/NAME, OUT/model
_KEYS = {DISTILLED: {"asked", "after"}, CUT: {"teacher_shape", "shape"}, EVALUATED: {"tasks"}}
# OUT/distill.json lies two folders above OUT/students/NAME
_FOLDERS = 3
# The name that says nothing of a model
_ANY = "model"

_OWN, _TEACHER = "the model", "the teacher"
_BEFORE, _BEFORE_TEACHER = "the model that it began as", "the model that the teacher began as"
# Which records near such a model belong to the lineage
_TAKEN = {_OWN: {*KINDS}, _BEFORE: {*KINDS} - {EVALUATED}, _TEACHER: {ADAPTED}}


@dataclass(frozen=True)
class Record:
    """What a stage wrote of a model."""

    kind: str
    path: Path
    values: dict[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """What the stage was asked for."""
        found: dict[str, Any] = self.values if self.kind == CUT else self.values.get("asked", {})
        return found

    def began_as(self, model: Path) -> Path:
        """What this model was before the stage; itself where the record does not tell."""
        if self.kind not in _KEYS:
            return Path(self.asked["model"])
        students = [Path(one) for one in self.asked.get("students", [])]
        return next((one for one in students if one.name == model.name), model)

    def names(self, model: Path) -> bool:
        """Whether it says that it tells of this folder, or of one of its name that is gone; many
        are called `model`, which is no name."""
        values = self.values
        if self.kind == DISTILLED:
            values = values["after"].get(model.name, {})
        named = values.get("model" if self.kind == EVALUATED else "folder")
        if not isinstance(named, str):
            return False
        is_gone = not Path(named).exists() and Path(named).name == model.name != _ANY
        return is_gone or Path(named).resolve() == model.resolve()

    def is_about(self, model: Path) -> bool:
        """Whether it names the model, or lies as its stage left the two: a whole run may have been
        moved, and folders above a model may hold records of others."""
        place, own = self.path.parent.resolve(), model.resolve()
        if place == own and self.kind != EVALUATED:
            return True
        if self.kind == CUT:
            lies_there = False
        elif self.kind == EVALUATED:
            lies_there = self.values.get("model") is None and place in (own, own.parent)
        elif self.kind == DISTILLED:
            is_below = own.parent in (place / "students", place / "best")
            lies_there = is_below and model.name in self.values["after"]
        else:
            is_finished = self.values.get("finished") is not False
            name = Path(self.values.get("folder") or own).name
            lies_there = is_finished and place == own.parent and name == own.name
        return lies_there or self.names(model)


@dataclass(frozen=True)
class Lineage:
    """`records` of a model by kind, the nearest of each, and the `models` that it was made from:
    (what it is, folder or name on the Hub), itself first, then nearer ones before others."""

    records: dict[str, Record]
    models: list[tuple[str, Path]] = field(default_factory=list)

    def values(self, kind: str) -> dict[str, Any]:
        """What the record of a kind holds; {} where there is none."""
        return self.records[kind].values if kind in self.records else {}

    @property
    def origins(self) -> list[tuple[str, str]]:
        """The models that it was made from: teachers and theirs, then what it began as itself."""
        ordered = sorted(self.models[1:], key=lambda one: one[0] == _BEFORE)
        return [(what, str(model)) for what, model in ordered]

    @property
    def teacher(self) -> str | None:
        """As the user named it: a folder or a name on the Hub."""
        record = self.records.get(DISTILLED) or self.records.get(CUT)
        return None if record is None else record.asked.get("teacher")

    @property
    def teacher_was_adapted(self) -> bool:
        """Whether the adaptation is the teacher's, not the model's own."""
        record, teacher = self.records.get(ADAPTED), self.teacher
        return record is not None and teacher is not None and record.names(Path(teacher))

    @property
    def evaluated_before(self) -> bool:
        """Whether the evaluation is of a model that this one began as."""
        record, (_, own) = self.records.get(EVALUATED), self.models[0]
        before = [model for what, model in self.models if what == _BEFORE]
        return record is not None and not record.names(own) and any(map(record.names, before))

    @property
    def paths(self) -> list[Path]:
        """Of the records, relative to the current folder where they lie in it."""
        whole, here = [one.path.resolve() for one in self.records.values()], Path.cwd()
        return [path.relative_to(here) if path.is_relative_to(here) else path for path in whole]


def find_lineage(folder: Path, given: Sequence[Path] = ()) -> Lineage:
    """Given records come first, the last of a kind, an evaluation of this very model before others;
    then those near the model and near the models that it began as. UserError for a given record
    that is none.
    """
    given_records = _given(folder, given)
    found, seen = Lineage(dict(given_records)), set()
    waiting = [(_OWN, folder)]
    for what, model in waiting:
        if model.resolve() in seen:
            continue
        seen.add(model.resolve())
        found.models.append((what, model))
        is_own = what in (_OWN, _BEFORE)
        records = _near(model)
        for kind, record in given_records.items():
            # what is given needs no name, but an adaptation may be the teacher's
            if record.names(model) or (is_own and kind != ADAPTED):
                records[kind] = record
        for record in records.values():
            if record.kind in _TAKEN.get(what, ()):
                found.records.setdefault(record.kind, record)
            if record.asked.get("teacher"):
                teacher = Path(record.asked["teacher"])
                waiting.append((_TEACHER if is_own else _BEFORE_TEACHER, teacher))
            waiting.append((_BEFORE if is_own else _BEFORE_TEACHER, record.began_as(model)))
    adapted = found.records.get(ADAPTED)
    if adapted is not None and (base := adapted.began_as(folder)).resolve() not in seen:
        found.models.append((_BEFORE, base))
    return found


def _given(folder: Path, paths: Sequence[Path]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for path in paths:
        record = _read(path)
        if record is None:
            raise FieldError("record", f"{path} is none of {', '.join(KINDS)}: leave it out")
        earlier = found.get(record.kind)
        if record.kind != EVALUATED or earlier is None or not earlier.names(folder):
            found[record.kind] = record
    return found


def _near(model: Path) -> dict[str, Record]:
    """The records about a model in its folder and above it, by kind; the nearest of each."""
    folders = [model.resolve(), *model.resolve().parents][:_FOLDERS]
    read = [_read(folder / kind) for kind in KINDS for folder in reversed(folders)]
    return {one.kind: one for one in read if one is not None and one.is_about(model)}


def _read(path: Path) -> Record | None:
    """A record of one of the kinds; None for any other file."""
    try:
        values = read_json(path)
    except UserError:
        return None
    asked = values.get("asked")
    if path.name in KINDS and path.name not in _KEYS and isinstance(asked, dict):
        return Record(path.name, path, values) if "model" in asked else None
    kinds = [kind for kind, keys in _KEYS.items() if keys <= values.keys()]
    return Record(kinds[0], path, values) if kinds else None
