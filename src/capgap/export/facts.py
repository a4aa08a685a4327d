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
INSTRUCTED, PREFERRED = "instruct.json", "prefer.json"
TUNED = (INSTRUCTED, PREFERRED)
# How far above the model's folder a record may lie: OUT/distill.json, OUT/students/NAME
LEVELS = 3


@dataclass(frozen=True)
class Records:
    """Those that were found, as they are; None where there is none. `tuned` by file name, in the
    order of the work; `paths` in the order found."""

    cut: dict[str, Any] | None
    distilled: dict[str, Any] | None
    tuned: dict[str, dict[str, Any]]
    evaluated: dict[str, Any] | None
    paths: tuple[Path, ...]


def find_records(folder: Path, given: Sequence[Path] = ()) -> Records:
    """Given records come first, the last of a kind; then those beside and above the model's folder
    that are about it, and about the models that it began as. UserError for a given record that is
    none.
    """
    found: dict[str, dict[str, Any]] = {}
    paths: dict[str, Path] = {}
    for path in given:
        record = _read(path)
        kind = None if record is None else _kind(record, path)
        if record is None or kind is None:
            known = ", ".join((CUT, DISTILLED, EVALUATED, INSTRUCTED, PREFERRED))
            raise UserError(f"--record {path} is none of {known}: leave it out")
        found[kind], paths[kind] = record, path
    _take(EVALUATED, folder, found, paths)
    place = folder
    # the way back: every stage once
    for kind in (PREFERRED, INSTRUCTED, DISTILLED):
        _take(kind, place, found, paths)
        if kind in found:
            place = _before(kind, found[kind], place)
    _take(CUT, folder, found, paths)
    _take(CUT, place, found, paths)
    tuned = {name: found[name] for name in TUNED if name in found}
    short = tuple(_from_here(path) for path in paths.values())
    return Records(found.get(CUT), found.get(DISTILLED), tuned, found.get(EVALUATED), short)


def _before(kind: str, record: dict[str, Any], place: Path) -> Path:
    """The model that the one in this folder began as; the same where the record does not tell."""
    if kind in TUNED:
        return Path(record["asked"]["model"])
    students = [Path(one) for one in record["asked"].get("students", [])]
    return next((one for one in students if one.name == place.name), place)


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
        if record is not None and _kind(record, path) == kind and _is_about(record, kind, folder):
            found[kind], paths[kind] = record, path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _kind(record: dict[str, Any], path: Path) -> str | None:
    """By what it holds; the two ways of tuning hold the same and are told by their names."""
    asked = record.get("asked")
    if isinstance(asked, dict) and "model" in asked and path.name in TUNED:
        return path.name
    keys = {CUT: ("teacher_shape", "shape"), DISTILLED: ("asked", "after"), EVALUATED: ("tasks",)}
    return next((kind for kind, has in keys.items() if all(key in record for key in has)), None)


def _is_about(record: dict[str, Any], kind: str, folder: Path) -> bool:
    """Whether a record that lies near a model tells of it: the folder above may hold several."""
    if kind == DISTILLED:
        return folder.name in record["after"]
    if kind == CUT:
        return True
    told = record.get("model" if kind == EVALUATED else "folder")
    return not isinstance(told, str) or Path(told).name == folder.name


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
    lines += [_tuning(name, record) for name, record in records.tuned.items()]
    return tuple(lines)


def _tuning(name: str, record: dict[str, Any]) -> str:
    what = {
        INSTRUCTED: "instruction tuning: on conversations",
        PREFERRED: "preferences: DPO on pairs of answers",
    }[name]
    counted, lora = record.get("data"), record["asked"].get("lora")
    size = counted.get("training") if isinstance(counted, dict) else None
    told = f"{what}" + ("" if size is None else f", {size:,} of them")
    told += "" if lora is None else f", LoRA of rank {lora.get('rank', '?')}, merged"
    losses = [(record.get(when) or {}).get("loss") for when in ("before", "after")]
    if None not in losses:
        told += f"; held-out loss {losses[0]:.3f} -> {losses[1]:.3f}"
    return told


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
    """(held-out tokens, rows) of the student before and after distilling; those of best/NAME for
    such one."""
    record = records.distilled or {"after": {}}
    # tuned further on it has another name, which only a single student leaves without doubt
    name = folder.name
    if name not in record["after"] and len(record["after"]) == 1:
        (name,) = record["after"]
    student = record["after"].get(name)
    if student is None:
        return None, ()
    after = student["heldout"]
    best = (record.get("best") or {}).get("students", {}).get(name)
    if best is not None and folder.parent.name == "best":
        after = best["heldout"]
    rows = [
        ("after distilling" if records.tuned else "this student", after),
        ("before distilling", record.get("before", {}).get(name)),
    ]
    losses = tuple(
        Loss(
            what=what,
            non_embedding=student.get("non_embedding"),
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
            stderr=task.get("score_stderr"),
            metric=task.get("metric"),
            shots=task.get("shots"),
            samples=task.get("questions"),
            reason=task.get("missing"),
        )
        for name, task in (records.evaluated or {"tasks": {}})["tasks"].items()
    )


def six_benchmark_mean(records: Records) -> float | None:
    """A share of 1; None where the six were not all measured."""
    mean = (records.evaluated or {}).get("mean_percent")
    return None if mean is None else mean / 100
