"""What the records of a model tell, as facts of a model card."""

from pathlib import Path
from typing import Any

from capgap.export.card import Benchmark, Loss
from capgap.export.found import INSTRUCTED, PREFERRED, Records
from capgap.export.licence import is_on_hub
from capgap.sizes import format_count

# How the reason of a set begins that lies neither in --data nor on the Hub
NO_COPY = "no local copy"


def teacher_of(records: Records) -> str | None:
    """As the user named it: a folder or a name on the Hub."""
    if records.distilled is not None:
        told: str | None = records.distilled["asked"].get("teacher")
        return told
    return None if records.cut is None else records.cut.get("teacher")


def hub_name(place: str | None) -> str | None:
    """The name of a model on the Hub, such as base_model wants; None for a folder."""
    return place if place is not None and is_on_hub(place) else None


def base_model(records: Records) -> str | None:
    """The nearest model on the Hub that this one was made from; teachers before others."""
    names = (hub_name(place) for _, place in records.origins)
    return next((name for name in names if name is not None), None)


def how_made(records: Records) -> tuple[str, ...]:
    """The lines of a card."""
    lines = []
    adapted = [] if records.adapted is None else [_adaptation(records)]
    if records.teacher_adapted:
        lines += adapted
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
    if not records.teacher_adapted:
        lines += adapted
    lines += [_tuning(name, record) for name, record in records.tuned.items()]
    return tuple(lines)


def _adaptation(records: Records) -> str:
    record = records.adapted
    assert record is not None
    of = " of the teacher" if records.teacher_adapted else ""
    pieces = record.get("tokenizer", {}).get("pieces", record["asked"].get("pieces", 0))
    told = (
        f"adaptation{of}: {pieces:,} new pieces, {format_count(record['asked']['tokens'])} tokens"
    )
    for kind, measured in record.get("heldout", {}).items():
        ends = (measured.get("before"), measured.get("after") or measured.get("extended"))
        bits = [one["bits_per_byte"] for one in ends if one is not None]
        if len(bits) == 2:
            told += f"; bits per byte of {kind} text {bits[0]:.3f} -> {bits[1]:.3f}"
    return told


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
    is_further = records.tuned or (records.adapted and not records.teacher_adapted)
    rows = [
        ("after distilling" if is_further else "this student", after),
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
            reason=_reason(task.get("missing")),
        )
        for name, task in (records.evaluated or {"tasks": {}})["tasks"].items()
    )


def _reason(missing: str | None) -> str | None:
    """Why a set has no score, without the folders and addresses that the record tells."""
    if missing is None:
        return None
    if missing.startswith(NO_COPY):
        return NO_COPY
    return "its record says why" if "/" in missing or "\\" in missing else missing


def six_benchmark_mean(records: Records) -> float | None:
    """A share of 1; None where the six were not all measured."""
    mean = (records.evaluated or {}).get("mean_percent")
    return None if mean is None else mean / 100
