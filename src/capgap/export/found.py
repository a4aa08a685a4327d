"""The records that tell of a model: those beside and above its folder, and the models before it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.errors import UserError

CUT, DISTILLED, EVALUATED = "pruning.json", "distill.json", "evaluate.json"
ADAPTED, INSTRUCTED, PREFERRED = "adapt.json", "instruct.json", "prefer.json"
TUNED = (INSTRUCTED, PREFERRED)
# Stages that write OUT/model, and beside it a record that is told by its name
NAMED = (ADAPTED, *TUNED)
# The name that says nothing of a model
ANY = "model"
# How far above the model's folder a record may lie: OUT/distill.json, OUT/students/NAME
LEVELS = 3
TEACHER, BEFORE_TEACHER = "the teacher", "the model that the teacher began as"
BEFORE = "the model that it began as"


@dataclass(frozen=True)
class Records:
    """Those that were found, as they are; None where there is none.

    `tuned` by file name, in the order of the work; `paths` in the order found. `origins` are the
    models that this one was made from, as (what it is, folder or name on the Hub): its teachers and
    what these began as, then what it began as itself. `teacher_adapted`: `adapted` tells of the
    teacher; `evaluated_before`: `evaluated` tells of a model that this one began as.
    """

    cut: dict[str, Any] | None
    distilled: dict[str, Any] | None
    adapted: dict[str, Any] | None
    tuned: dict[str, dict[str, Any]]
    evaluated: dict[str, Any] | None
    paths: tuple[Path, ...]
    origins: tuple[tuple[str, str], ...]
    teacher_adapted: bool
    evaluated_before: bool


def find_records(folder: Path, given: Sequence[Path] = ()) -> Records:
    """Given records come first, the last of a kind, an evaluation of this very model before others;
    then those beside and above the model's folder that are about it, and about the models that it
    began as. UserError for a given record that is none.
    """
    found, paths = _given(folder, given)
    _take(EVALUATED, folder, found, paths)
    places = _way_back(folder, found, paths)
    _take(CUT, folder, found, paths)
    _take(CUT, places[-1], found, paths)
    teacher = _teacher(found)
    if teacher is not None:
        _take(ADAPTED, Path(teacher), found, paths)
    tells = None if teacher is None else Path(teacher)
    evaluated = found.get(EVALUATED, {}).get("model")
    return Records(
        cut=found.get(CUT),
        distilled=found.get(DISTILLED),
        adapted=found.get(ADAPTED),
        tuned={name: found[name] for name in TUNED if name in found},
        evaluated=found.get(EVALUATED),
        paths=tuple(_from_here(path) for path in paths.values()),
        origins=tuple(_origins(found, places)),
        teacher_adapted=tells is not None
        and _tells_of(found.get(ADAPTED, {}).get("folder"), tells),
        evaluated_before=not _tells_of(evaluated, folder)
        and any(_tells_of(evaluated, place) for place in places[1:]),
    )


def _given(
    folder: Path, given: Sequence[Path]
) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """(records, paths) by kind."""
    found: dict[str, dict[str, Any]] = {}
    paths: dict[str, Path] = {}
    for path in given:
        record = _read(path)
        kind = None if record is None else _kind(record, path)
        if record is None or kind is None:
            known = ", ".join((CUT, DISTILLED, EVALUATED, *NAMED))
            raise UserError(f"--record {path} is none of {known}: leave it out")
        if kind == EVALUATED and _tells_of(found.get(kind, {}).get("model"), folder):
            continue
        found[kind], paths[kind] = record, path
    return found, paths


def _way_back(folder: Path, found: dict[str, dict[str, Any]], paths: dict[str, Path]) -> list[Path]:
    """The model and those that it began as, through every stage once."""
    places = [folder]
    for kind in (PREFERRED, INSTRUCTED, DISTILLED, None):
        _take(ADAPTED, places[-1], found, paths)
        if _tells_of(found.get(ADAPTED, {}).get("folder"), places[-1]):
            places.append(_before(ADAPTED, found[ADAPTED], places[-1]))
        if kind is not None:
            _take(kind, places[-1], found, paths)
        if kind in found:
            places.append(_before(kind, found[kind], places[-1]))
    return places


def _before(kind: str, record: dict[str, Any], place: Path) -> Path:
    """The model that the one in this folder began as; the same where the record does not tell."""
    if kind in NAMED:
        return Path(record["asked"]["model"])
    students = [Path(one) for one in record["asked"].get("students", [])]
    return next((one for one in students if one.name == place.name), place)


def _teacher(found: dict[str, dict[str, Any]]) -> str | None:
    if DISTILLED in found:
        told: str | None = found[DISTILLED]["asked"].get("teacher")
        return told
    return found.get(CUT, {}).get("teacher")


def _origins(found: dict[str, dict[str, Any]], places: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """See `Records`: nearer models first, each once."""
    teachers = [_teacher(found), found.get(CUT, {}).get("teacher")]
    begun: list[str | None] = [str(place) for place in places[1:]]
    if ADAPTED in found:
        is_teachers = any(
            _tells_of(found[ADAPTED].get("folder"), Path(one)) for one in teachers if one
        )
        adapted = found[ADAPTED]["asked"]["model"]
        (teachers if is_teachers else begun).append(adapted)
    seen = {places[0].resolve()}
    for what, more, starts in ((TEACHER, BEFORE_TEACHER, teachers), (BEFORE, BEFORE, begun)):
        first = _teacher(found)
        waiting = [Path(one) for one in starts if one]
        while waiting:
            place = waiting.pop(0)
            if place.resolve() not in seen:
                seen.add(place.resolve())
                yield (what if what != TEACHER or str(place) == str(first) else more), str(place)
                waiting += _made_from(place)


def _made_from(place: Path) -> list[Path]:
    """The models that the records near this one name."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (*NAMED, DISTILLED, CUT):
        _take(kind, place, found, {})
    teachers = [found[CUT].get("teacher")] if CUT in found else []
    if DISTILLED in found:
        teachers.insert(0, found[DISTILLED]["asked"].get("teacher"))
    before = [_before(kind, found[kind], place) for kind in (*NAMED, DISTILLED) if kind in found]
    return [*(Path(one) for one in teachers if one), *before]


def _from_here(path: Path) -> Path:
    """Relative to the current folder where it lies in it."""
    whole, here = path.resolve(), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else path


def _take(
    kind: str, folder: Path, found: dict[str, dict[str, Any]], paths: dict[str, Path]
) -> None:
    """The record of this kind beside or above a model, where it is about it."""
    for place in [folder.resolve(), *folder.resolve().parents][:LEVELS]:
        path = place / kind
        if kind in found or not path.is_file():
            continue
        record = _read(path)
        if record is not None and _kind(record, path) == kind and _is_about(record, path, folder):
            found[kind], paths[kind] = record, path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _kind(record: dict[str, Any], path: Path) -> str | None:
    """By what it holds; the stages that hold the same are told by their names."""
    asked = record.get("asked")
    if isinstance(asked, dict) and "model" in asked and path.name in NAMED:
        return path.name
    keys = {CUT: ("teacher_shape", "shape"), DISTILLED: ("asked", "after"), EVALUATED: ("tasks",)}
    return next((kind for kind, has in keys.items() if all(key in record for key in has)), None)


def _is_about(record: dict[str, Any], path: Path, folder: Path) -> bool:
    """Whether a record that lies near a model tells of it: the folders above may hold several."""
    kind, place, whole = path.name, path.parent.resolve(), folder.resolve()
    if kind == CUT:
        return place == whole
    if kind == EVALUATED:
        told = record.get("model")
        return _tells_of(told, folder) or (told is None and place in (whole, whole.parent))
    if kind == DISTILLED:
        student = record["after"].get(folder.name)
        if student is None:
            return False
        is_below = whole.parent in (place / "students", place / "best")
        return is_below or _tells_of(student.get("folder"), folder)
    told, is_beside = record.get("folder"), whole.parent == place
    if record.get("finished") is False:
        return False
    if isinstance(told, str) and Path(told).exists():
        return _tells_of(told, folder)
    # the whole run may have been moved
    return is_beside and (told is None or Path(told).name == whole.name)


def _tells_of(told: Any, folder: Path) -> bool:
    """Whether a record names this folder, or one of its name that is gone; many are called
    `model`, which is no name."""
    if not isinstance(told, str):
        return False
    if Path(told).resolve() == folder.resolve():
        return True
    return not Path(told).exists() and Path(told).name == folder.name != ANY
