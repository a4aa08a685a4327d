"""What is known of a model: the records beside and above its folder, as facts of a model card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.errors import UserError
from capgap.export.card import Benchmark, Loss
from capgap.export.licence import is_on_hub
from capgap.sizes import format_count

CUT, DISTILLED, EVALUATED = "pruning.json", "distill.json", "evaluate.json"
# How far above the model's folder a record may lie: OUT/distill.json, OUT/students/NAME
LEVELS = 3


@dataclass(frozen=True)
class Records:
    """Those that were found, as they are; None where there is none. `paths` in the order found."""

    cut: dict[str, Any] | None
    distilled: dict[str, Any] | None
    evaluated: dict[str, Any] | None
    paths: tuple[Path, ...]


def find_records(folder: Path, given: Sequence[Path] = ()) -> Records:
    """Given records come first, then those beside and above the model's folder that are about it.

    The cut may also be told beside the student that distilling began with. UserError for a given
    record that is none.
    """
    found: dict[str, dict[str, Any]] = {}
    paths: dict[str, Path] = {}
    for path in given:
        record = _read(path)
        kind = None if record is None else _kind(record)
        if record is None or kind is None:
            raise UserError(
                f"--record {path} is no {CUT}, {DISTILLED} or {EVALUATED} of capgap: leave it out"
            )
        found[kind], paths[kind] = record, path
    places = [folder.resolve(), *folder.resolve().parents][:LEVELS]
    for kind in (DISTILLED, EVALUATED, CUT):
        for place in places:
            _take(kind, place / kind, folder, found, paths)
    if CUT not in found and DISTILLED in found:
        for student in _students_before(found[DISTILLED], folder.name):
            _take(CUT, Path(student) / CUT, folder, found, paths)
    short = tuple(_from_here(path) for path in paths.values())
    return Records(found.get(CUT), found.get(DISTILLED), found.get(EVALUATED), short)


def _from_here(path: Path) -> Path:
    """Relative to the current folder where it lies in it."""
    whole, here = path.resolve(), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else path


def _take(
    kind: str,
    path: Path,
    folder: Path,
    found: dict[str, dict[str, Any]],
    paths: dict[str, Path],
) -> None:
    if kind in found or not path.is_file():
        return
    record = _read(path)
    if record is not None and _kind(record) == kind and _is_about(record, kind, folder):
        found[kind], paths[kind] = record, path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _kind(record: dict[str, Any]) -> str | None:
    keys = {CUT: ("teacher_shape", "shape"), DISTILLED: ("asked", "after")}
    kind = next((kind for kind, has in keys.items() if all(key in record for key in has)), None)
    return kind or (EVALUATED if isinstance(_first(record, "tasks", "sets"), dict) else None)


def _is_about(record: dict[str, Any], kind: str, folder: Path) -> bool:
    """Whether a record that lies near a model tells of it: the folder above may hold several."""
    if kind == DISTILLED:
        return folder.name in record["after"]
    named = record.get("model") if kind == EVALUATED else None
    return not isinstance(named, str) or Path(named).name == folder.name


def _students_before(distilled: dict[str, Any], name: str) -> list[str]:
    students = distilled["asked"].get("students", [])
    return [student for student in students if Path(student).name == name]


def teacher_of(records: Records) -> str | None:
    """As the user named it: a folder or a name on the Hub."""
    if records.distilled is not None:
        told: str | None = records.distilled["asked"].get("teacher")
        return told
    return None if records.cut is None else records.cut.get("teacher")


def hub_name(place: str | None) -> str | None:
    """The name of a model on the Hub, such as base_model wants; None for a folder."""
    return place if place is not None and is_on_hub(place) else None


def how_made(records: Records) -> tuple[str, ...]:
    """The lines of a card."""
    lines = []
    if records.cut is not None:
        own, cut = records.cut["teacher_shape"], records.cut["shape"]
        kept = records.cut["parameters"]["non_embedding"]
        lines.append(
            f"cut: out of `{Path(records.cut['teacher']).name}`, {_sizes(own)}, to {_sizes(cut)}: "
            f"{format_count(kept)} non-embedding parameters"
        )
        scores = records.cut.get("scores", {})
        if "method" in scores:
            read = scores.get("tokens")
            on = f" on {format_count(read)} tokens" if read else ""
            lines.append(f"what to keep: by {scores['method']} scores{on}")
    if records.distilled is not None:
        lines += _training(records.distilled)
    return tuple(lines)


def _sizes(shape: dict[str, Any]) -> str:
    return (
        f"{shape['layers']} layers, hidden {shape['hidden']}, {shape['heads']} heads, ffn "
        f"{shape['ffn']}"
    )


def _training(record: dict[str, Any]) -> list[str]:
    asked, training = record["asked"], record["asked"].get("training", {})
    tokens = asked["tokens"]
    lines = [f"training: {format_count(tokens)} tokens in windows of {asked['window']}"]
    if "alpha" in training:
        alpha = training["alpha"]
        lines.append(
            f"loss: {1 - alpha:g} cross-entropy + {alpha:g} "
            f"{training.get('divergence', 'forward_kl')} to the teacher at temperature "
            f"{training.get('temperature', 1):g}"
        )
    if record.get("flops") is not None:
        lines.append(f"compute: {record['flops']:.3g} FLOPs, of all students of the run")
    return lines


def losses_of(records: Records, folder: Path) -> tuple[int | None, tuple[Loss, ...]]:
    """(held-out tokens, rows) of the student in this folder, before and after; those of best/NAME
    for such one."""
    name = folder.name
    if records.distilled is None or name not in records.distilled["after"]:
        return None, ()
    record = records.distilled
    after, size = record["after"][name]["heldout"], record["after"][name].get("non_embedding")
    best = (record.get("best") or {}).get("students", {}).get(name)
    if best is not None and folder.parent.name == "best":
        after = best["heldout"]
    rows = [
        ("this student", after),
        ("before distilling", record.get("before", {}).get(name)),
    ]
    losses = tuple(
        Loss(
            what=what,
            non_embedding=size,
            loss=heldout.get("loss"),
            bits_per_byte=heldout.get("bits_per_byte"),
        )
        for what, heldout in rows
        if heldout is not None
    )
    return (None if after is None else after.get("tokens")), losses


def benchmarks_of(records: Records) -> tuple[Benchmark, ...]:
    """The rows of evaluate.json; what it lacks stays missing."""
    return tuple(
        Benchmark(
            name=name,
            score=task.get("score"),
            stderr=_first(task, "stderr", "score_stderr"),
            metric=task.get("metric"),
            shots=task.get("shots"),
            samples=_first(task, "samples", "questions"),
            reason=_first(task, "reason", "missing"),
        )
        for name, task in _tasks(records.evaluated or {}).items()
        if isinstance(task, dict)
    )


def six_benchmark_mean(records: Records) -> float | None:
    """A share of 1; None where the six were not all measured."""
    record = records.evaluated or {}
    if record.get("mean_percent") is not None:
        return float(record["mean_percent"]) / 100
    mean: float | None = record.get("six_benchmark_mean")
    return mean


def _tasks(record: dict[str, Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = _first(record, "tasks", "sets") or {}
    return tasks


def _first(values: dict[str, Any], *names: str) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)
