"""The model card of a model folder, from the records of its lineage."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from capgap.export import lineage as kinds
from capgap.export.card import (
    Card,
    Licence,
    Loss,
    card_of_student,
    find_licence,
    is_on_hub,
    objective,
)
from capgap.export.folder import Source
from capgap.export.lineage import Lineage
from capgap.models.identity import count_parameters
from capgap.models.shape import Shape
from capgap.models.stored import empty_model
from capgap.sizes import format_count

# How the reason of a set begins that lies neither in --data nor on the Hub
NO_COPY = "no local copy"
Record = dict[str, Any]


def model_card(model: str, source: Source, lineage: Lineage, name: str | None = None) -> Card:
    """`model` is a folder or a name on the Hub, `name` what the card calls it. The student of a
    sweep keeps the card that the sweep gave it."""
    is_here = Path(model).is_dir()
    licence = find_licence([*lineage.origins, ("the model", model)])
    card = card_of_student(source.folder) if is_here else None
    if card is None:
        own_name = Path(model).resolve().name if is_here else model
        card = _card(own_name, licence, source, lineage)
    evaluated = lineage.values(kinds.EVALUATED) or {"tasks": {}}
    mean = evaluated.get("mean_percent")
    return replace(
        card,
        name=name or card.name,
        licence=card.licence if licence.id is None else licence,
        benchmarks={name: _benchmark(task) for name, task in evaluated["tasks"].items()},
        six_benchmark_mean=None if mean is None else mean / 100,
        benchmarks_before=lineage.evaluated_before,
        has_chat_template=source.tokenizer.chat_template is not None,
    )


def _card(name: str, licence: Licence, source: Source, lineage: Lineage) -> Card:
    non_embedding, total = count_parameters(empty_model(source.config))
    teacher, cut = lineage.teacher, lineage.values(kinds.CUT)
    teacher_size = Shape(**cut["teacher_shape"]).parameters().non_embedding if cut else None
    tokens, losses = _student_losses(lineage, source.folder)
    return Card(
        name=name,
        architecture=source.config.model_type,
        non_embedding=non_embedding,
        total=total,
        licence=licence,
        teacher=teacher if teacher is None or is_on_hub(teacher) else Path(teacher).name,
        teacher_non_embedding=teacher_size,
        base_model=next((origin for _, origin in lineage.origins if is_on_hub(origin)), None),
        made=tuple(_how_made(lineage)),
        heldout_tokens=tokens,
        losses=losses,
    )


def _how_made(lineage: Lineage) -> Iterator[str]:
    """The lines of a card, in the order of the work."""
    stages = [kinds.CUT, kinds.DISTILLED, kinds.INSTRUCTED, kinds.PREFERRED]
    stages.insert(0 if lineage.teacher_was_adapted else 2, kinds.ADAPTED)
    for kind in stages:
        record = lineage.values(kind)
        if record:
            yield from _LINES[kind](record, lineage)


def _cutting(cut: Record, lineage: Lineage) -> Iterator[str]:
    sizes = "{layers} layers, hidden {hidden}, {heads} heads, ffn {ffn}"
    count = format_count(cut["parameters"]["non_embedding"])
    yield (
        f"cut: out of `{Path(cut['teacher']).name}`, {sizes.format(**cut['teacher_shape'])}, to "
        f"{sizes.format(**cut['shape'])}: {count} non-embedding parameters"
    )
    scores = cut.get("scores", {})
    if "method" in scores:
        on = f" on {format_count(scores['tokens'])} tokens" if scores.get("tokens") else ""
        yield f"what to keep: by {scores['method']} scores{on}"


def _training(record: Record, lineage: Lineage) -> Iterator[str]:
    asked, training = record["asked"], record["asked"].get("training", {})
    yield f"training: {format_count(asked['tokens'])} tokens in windows of {asked['window']}"
    if "alpha" in training:
        divergence = training.get("divergence", "forward_kl")
        yield objective(training["alpha"], divergence, training.get("temperature", 1))
    if record.get("flops") is not None:
        yield f"compute: {record['flops']:.3g} FLOPs, of all students of the run"


def _adaptation(record: Record, lineage: Lineage) -> Iterator[str]:
    of, asked = " of the teacher" if lineage.teacher_was_adapted else "", record["asked"]
    pieces = record.get("tokenizer", {}).get("pieces", asked.get("pieces", 0))
    line = f"adaptation{of}: {pieces:,} new pieces, {format_count(asked['tokens'])} tokens"
    for kind, measured in record.get("heldout", {}).items():
        before, after = measured.get("before"), measured.get("after") or measured.get("extended")
        if before is not None and after is not None:
            bits = f"{before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f}"
            line += f"; bits per byte of {kind} text {bits}"
    yield line


def _tuning(line: str, record: Record, lineage: Lineage) -> Iterator[str]:
    counted, lora = record.get("data"), record["asked"].get("lora")
    if isinstance(counted, dict) and counted.get("training") is not None:
        line += f", {counted['training']:,} of them"
    if lora is not None:
        line += f", LoRA of rank {lora.get('rank', '?')}, merged"
    losses = [(record.get(when) or {}).get("loss") for when in ("before", "after")]
    if None not in losses:
        line += f"; held-out loss {losses[0]:.3f} -> {losses[1]:.3f}"
    yield line


_LINES: dict[str, Callable[[Record, Lineage], Iterator[str]]] = {
    kinds.CUT: _cutting,
    kinds.DISTILLED: _training,
    kinds.ADAPTED: _adaptation,
    kinds.INSTRUCTED: partial(_tuning, "instruction tuning: on conversations"),
    kinds.PREFERRED: partial(_tuning, "preferences: DPO on pairs of answers"),
}


def _student_losses(lineage: Lineage, folder: Path) -> tuple[int | None, tuple[Loss, ...]]:
    """(held-out tokens, rows) of the student before and after distilling; those of best/NAME for
    such one."""
    record = lineage.values(kinds.DISTILLED) or {"after": {}}
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
    later = {kinds.INSTRUCTED, kinds.PREFERRED}
    if not lineage.teacher_was_adapted:
        later.add(kinds.ADAPTED)
    rows = {
        "after distilling" if later & lineage.records.keys() else "this student": after,
        "before distilling": record.get("before", {}).get(name),
    }
    size = student.get("non_embedding")
    losses = tuple(
        Loss(what, size, heldout.get("loss"), heldout.get("bits_per_byte"))
        for what, heldout in rows.items()
        if heldout is not None
    )
    return (None if after is None else after.get("tokens")), losses


def _benchmark(task: dict[str, Any]) -> dict[str, Any]:
    """What evaluate.json says of one; why there is no score is told without the folders and
    addresses of the record."""
    reason = task.get("missing")
    if reason is not None and reason.startswith(NO_COPY):
        reason = NO_COPY
    elif reason is not None and ("/" in reason or "\\" in reason):
        reason = "its record says why"
    return task | {"missing": reason}
