"""The stage `export`: a model as others load it, with a card that says where it comes from."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.errors import UserError

if TYPE_CHECKING:
    from capgap.export.card import Card
    from capgap.export.folder import Source
    from capgap.export.found import Records
    from capgap.export.licence import Licence
    from capgap.models.shape import Shape

DTYPES = ("fp32", "fp16", "bf16")
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ExportRequest:
    """What is exported where. `dtype` None keeps the stored one; `records` come before those that
    lie beside and above the model; `gguf` is a file to write as well; `name` stands in the card."""

    model: str
    out: Path
    shard_bytes: int = SHARD_BYTES
    dtype: str | None = None
    records: tuple[Path, ...] = ()
    gguf: Path | None = None
    name: str | None = None


def run_export(
    request: ExportRequest, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Writes a Hugging Face folder, and the GGUF file; returns what `capgap export --json` prints.

    Tensors are read, checked and written one file at a time; then logits are compared, for which
    the whole model is read where memory suffices. UserError for the user's mistakes,
    NaN among the weights too; nothing is written then.
    """
    from capgap.export.card import card_text
    from capgap.export.folder import check_logits, copy_licence, write_folder
    from capgap.export.found import find_records
    from capgap.export.licence import CARD
    from capgap.export.vllm import check_vllm
    from capgap.models.stored import local_folder, written_beside
    from capgap.records import write_text_atomically

    _check(request)
    source, shape = _open(request)
    records = find_records(source.folder, request.records)
    card = _card(request, source, shape, records)
    with _kept_when_whole(request.gguf), written_beside(request.out) as folder:
        write_folder(source, folder, shard_bytes=request.shard_bytes, say=say)
        for _, place in records.origins:
            if Path(place).is_dir():
                copy_licence(local_folder(place), folder)
        write_text_atomically(folder / CARD, card_text(card))
        config = json.loads((folder / "config.json").read_text())
        found = _told(request, folder, source, card) | {
            "records": [str(path) for path in records.paths],
            "vllm": check_vllm(shape, source.config.dtype, config),
        }
        found["gguf"] = _gguf(request, folder, card.name, card.licence)
        found["logits_not_compared"] = check_logits(source, folder, request.gguf)
    return found


@contextmanager
def _kept_when_whole(path: Path | None) -> Iterator[None]:
    """Takes the file away again where something fails."""
    try:
        yield
    except BaseException:
        if path is not None:
            path.unlink(missing_ok=True)
        raise


def _check(request: ExportRequest) -> None:
    if request.out.exists():
        raise UserError(f"{request.out} exists: choose another --out, or delete it")
    if request.gguf is not None and request.gguf.exists():
        raise UserError(f"{request.gguf} exists: choose another --gguf, or delete it")
    if request.gguf is not None and request.out.resolve() in request.gguf.resolve().parents:
        raise UserError(
            f"--gguf {request.gguf} lies within --out, a folder of its own: put it beside"
        )
    if request.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {request.dtype!r}: take one of {', '.join(DTYPES)}")


def _open(request: ExportRequest) -> "tuple[Source, Shape | None]":
    from capgap.corpus.tokenizer import load_tokenizer, num_words
    from capgap.export.folder import DTYPES as TORCH_DTYPES
    from capgap.export.folder import open_source
    from capgap.models.build import shape_of
    from capgap.models.families import FAMILIES
    from capgap.models.stored import local_folder, read_config
    from capgap.stages.inputs import check_words

    config = read_config(request.model)
    shape = shape_of(config) if config.model_type in FAMILIES else None
    folder = local_folder(request.model)
    tokenizer = load_tokenizer(folder)
    check_words(request.model, config, num_words(tokenizer))
    if request.gguf is not None:
        from capgap.export.gguf_file import check_gguf

        check_gguf(config, tokenizer)
    dtype = None if request.dtype is None else TORCH_DTYPES[request.dtype]
    return open_source(folder, config, tokenizer, dtype), shape


def _card(
    request: ExportRequest, source: "Source", shape: "Shape | None", records: "Records"
) -> "Card":
    from capgap.export.card import Card
    from capgap.export.facts import (
        base_model,
        benchmarks_of,
        how_made,
        hub_name,
        losses_of,
        six_benchmark_mean,
        teacher_of,
    )
    from capgap.export.from_sweep import card_of_student
    from capgap.export.licence import find_licence

    teacher = teacher_of(records)
    is_here = Path(request.model).is_dir()
    licence = find_licence([*records.origins, ("the model", request.model)])
    card = card_of_student(source.folder) if is_here else None
    if card is None:
        non_embedding, total = _sizes(source, shape)
        tokens, losses = losses_of(records, source.folder)
        card = Card(
            name=Path(request.model).resolve().name if is_here else request.model,
            architecture=source.config.model_type,
            non_embedding=non_embedding,
            total=total,
            licence=licence,
            teacher=None if teacher is None else hub_name(teacher) or Path(teacher).name,
            teacher_non_embedding=_teacher_size(records),
            base_model=base_model(records),
            made=how_made(records),
            heldout_tokens=tokens,
            losses=losses,
        )
    return replace(
        card,
        name=request.name or card.name,
        licence=card.licence if licence.id is None else licence,
        benchmarks=benchmarks_of(records),
        six_benchmark_mean=six_benchmark_mean(records),
        benchmarks_before=records.evaluated_before,
        has_chat_template=source.tokenizer.chat_template is not None,
    )


def _sizes(source: "Source", shape: "Shape | None") -> tuple[int, int]:
    """Parameters without embeddings and head, and all."""
    from capgap.models.stored import empty_model

    if shape is not None:
        counts = shape.parameters()
        return counts.non_embedding, counts.total
    model = empty_model(source.config)
    total = sum(one.numel() for one in model.parameters())
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return total - sum(one.numel() for one in tables), total


def _teacher_size(records: "Records") -> int | None:
    """Non-embedding parameters, where the cut tells them."""
    from capgap.models.shape import Shape

    if records.cut is None:
        return None
    return Shape(**records.cut["teacher_shape"]).parameters().non_embedding


def _gguf(
    request: ExportRequest, folder: Path, name: str, licence: "Licence"
) -> dict[str, Any] | None:
    if request.gguf is None:
        return None
    from capgap.export.gguf_file import write_gguf

    return write_gguf(folder, request.gguf, name=name, licence=licence)


def _told(request: ExportRequest, folder: Path, source: "Source", card: "Card") -> dict[str, Any]:
    return {
        "schema": 1,
        "model": request.model,
        "folder": str(request.out),
        "name": card.name,
        "architecture": card.architecture,
        "non_embedding": card.non_embedding,
        "parameters": card.total,
        "dtype": str(source.config.dtype).removeprefix("torch."),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "files": sorted(path.name for path in folder.iterdir()),
        "teacher": card.teacher,
        "licence": {"id": card.licence.id, "source": card.licence.source},
        "chat_template": card.has_chat_template,
    }
