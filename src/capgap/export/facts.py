"""The model card of a model folder, from the records of its lineage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from capgap.export import lineage as kinds
from capgap.export.card import Benchmark, Card, Loss, objective
from capgap.export.folder import Source
from capgap.export.from_sweep import card_of_student
from capgap.export.licence import Licence, find_licence, is_on_hub
from capgap.export.lineage import Lineage
from capgap.models.shape import Shape
from capgap.models.stored import empty_model
from capgap.sizes import format_count

# How the reason of a set begins that lies neither in --data nor on the Hub
NO_COPY = "no local copy"
_TUNED = {
    kinds.INSTRUCTED: "instruction tuning: on conversations",
    kinds.PREFERRED: "preferences: DPO on pairs of answers",
}


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
        benchmarks=tuple(_benchmark(*task) for task in evaluated["tasks"].items()),
        six_benchmark_mean=None if mean is None else mean / 100,
        benchmarks_before=lineage.evaluated_before,
        has_chat_template=source.tokenizer.chat_template is not None,
    )


def _card(name: str, licence: Licence, source: Source, lineage: Lineage) -> Card:
    non_embedding, total = _sizes(source)
    tokens, losses = _losses(lineage, source.folder)
    teacher, cut = lineage.teacher, lineage.values(kinds.CUT)
    teacher_size = None
    if cut:
        teacher_size = Shape(**cut["teacher_shape"]).parameters().non_embedding
    return Card(
        name=name,
        architecture=source.config.model_type,
        non_embedding=non_embedding,
        total=total,
        licence=licence,
        teacher=teacher if teacher is None or is_on_hub(teacher) else Path(teacher).name,
        teacher_non_embedding=teacher_size,
        base_model=next((place for _, place in lineage.origins if is_on_hub(place)), None),
        made=tuple(_how_made(lineage)),
        heldout_tokens=tokens,
        losses=losses,
    )


def _sizes(source: Source) -> tuple[int, int]:
    """Parameters without embeddings and head, and all."""
    if source.shape is not None:
        counts = source.shape.parameters()
        return counts.non_embedding, counts.total
    model = empty_model(source.config)
    total = sum(one.numel() for one in model.parameters())
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return total - sum(one.numel() for one in tables), total


def _how_made(lineage: Lineage) -> list[str]:
    """The lines of a card, in the order of the work."""
    made = [*_cutting(lineage), *_training(lineage)]
    adapted = _adaptation(lineage)
    made = adapted + made if lineage.teacher_was_adapted else made + adapted
    return made + _tuning(lineage)


def _cutting(lineage: Lineage) -> list[str]:
    cut = lineage.values(kinds.CUT)
    if not cut:
        return []
    kept, scores = cut["parameters"]["non_embedding"], cut.get("scores", {})
    lines = [
        f"cut: out of `{Path(cut['teacher']).name}`, {_sizes_of(cut['teacher_shape'])}, to "
        f"{_sizes_of(cut['shape'])}: {format_count(kept)} non-embedding parameters"
    ]
    if "method" in scores:
        on = f" on {format_count(scores['tokens'])} tokens" if scores.get("tokens") else ""
        lines.append(f"what to keep: by {scores['method']} scores{on}")
    return lines


def _sizes_of(shape: dict[str, Any]) -> str:
    return (
        f"{shape['layers']} layers, hidden {shape['hidden']}, {shape['heads']} heads, ffn "
        f"{shape['ffn']}"
    )


def _training(lineage: Lineage) -> list[str]:
    record = lineage.values(kinds.DISTILLED)
    if not record:
        return []
    asked, training = record["asked"], record["asked"].get("training", {})
    lines = [f"training: {format_count(asked['tokens'])} tokens in windows of {asked['window']}"]
    if "alpha" in training:
        divergence = training.get("divergence", "forward_kl")
        lines.append(objective(training["alpha"], divergence, training.get("temperature", 1)))
    if record.get("flops") is not None:
        lines.append(f"compute: {record['flops']:.3g} FLOPs, of all students of the run")
    return lines


def _adaptation(lineage: Lineage) -> list[str]:
    record = lineage.values(kinds.ADAPTED)
    if not record:
        return []
    of = " of the teacher" if lineage.teacher_was_adapted else ""
    pieces = record.get("tokenizer", {}).get("pieces", record["asked"].get("pieces", 0))
    told = (
        f"adaptation{of}: {pieces:,} new pieces, {format_count(record['asked']['tokens'])} tokens"
    )
    for kind, measured in record.get("heldout", {}).items():
        before, after = measured.get("before"), measured.get("after") or measured.get("extended")
        if before is not None and after is not None:
            bits = f"{before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f}"
            told += f"; bits per byte of {kind} text {bits}"
    return [told]


def _tuning(lineage: Lineage) -> list[str]:
    lines = []
    for kind, line in _TUNED.items():
        record = lineage.values(kind)
        if not record:
            continue
        counted, lora = record.get("data"), record["asked"].get("lora")
        if isinstance(counted, dict) and counted.get("training") is not None:
            line += f", {counted['training']:,} of them"
        if lora is not None:
            line += f", LoRA of rank {lora.get('rank', '?')}, merged"
        losses = [(record.get(when) or {}).get("loss") for when in ("before", "after")]
        if None not in losses:
            line += f"; held-out loss {losses[0]:.3f} -> {losses[1]:.3f}"
        lines.append(line)
    return lines


def _losses(lineage: Lineage, folder: Path) -> tuple[int | None, tuple[Loss, ...]]:
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
    later = {*_TUNED} if lineage.teacher_was_adapted else {*_TUNED, kinds.ADAPTED}
    is_later = bool(later & lineage.records.keys())
    rows = {
        "after distilling" if is_later else "this student": after,
        "before distilling": record.get("before", {}).get(name),
    }
    losses = tuple(
        Loss(
            what=what,
            non_embedding=student.get("non_embedding"),
            loss=heldout.get("loss"),
            bits_per_byte=heldout.get("bits_per_byte"),
        )
        for what, heldout in rows.items()
        if heldout is not None
    )
    return (None if after is None else after.get("tokens")), losses


def _benchmark(name: str, task: dict[str, Any]) -> Benchmark:
    """A row of evaluate.json; what it lacks stays missing. Why there is no score is told without
    the folders and addresses of the record."""
    reason = task.get("missing")
    if reason is not None and reason.startswith(NO_COPY):
        reason = NO_COPY
    elif reason is not None and ("/" in reason or "\\" in reason):
        reason = "its record says why"
    return Benchmark(
        name=name,
        score=task.get("score"),
        stderr=task.get("score_stderr"),
        metric=task.get("metric"),
        shots=task.get("shots"),
        samples=task.get("questions"),
        reason=reason,
    )
